//! Weights on a device and what is done with them: products, with an adapter beside them, and rows picked by ids.

use super::stack::Stack;
use crate::device::{self, Buffer, Device};
use crate::error::Error;
use crate::op::{Dims, OpSpec};
use crate::ops;
use crate::quant::Format;
use crate::tensor::Dtype;

/// A weight matrix [n, k] on a device. Cloning shares the memory.
#[derive(Clone)]
pub struct Matrix {
    /// Rows: out features, or tokens of an embedding.
    pub n: usize,
    /// Columns: in features, or the width of an embedding.
    pub k: usize,
    /// What the parts of a shard hold.
    pub format: Format,
    /// The rows, in order.
    pub shards: Vec<Shard>,
}

/// Some rows of a [`Matrix`].
#[derive(Clone)]
pub struct Shard {
    /// First row.
    pub y0: usize,
    /// How many rows.
    pub n: usize,
    /// The parts of [`Format::parts`], of these rows.
    pub parts: Vec<Buffer>,
}

/// A projection y = x·Wᵀ + bias.
#[derive(Clone)]
pub struct Linear {
    /// W, [n, k].
    pub matrix: Matrix,
    /// `f32[n]`, cut like the matrix; none where there is no bias.
    pub bias: Option<Vec<Buffer>>,
    /// The adapter beside it.
    pub lora: Option<Lora>,
    /// Adapters beside it of which each token names its own.
    pub stack: Option<Stack>,
    op: &'static OpSpec,
    /// Of [`super::weights::LoadOptions::bf16`].
    pub(super) bf16: bool,
    empty: Buffer,
}

/// Fewest rows for which tensor cores are worth a cast: below, streaming the weights takes all the time. From 8 rows on
/// products in f32 take nearly three times the instructions of `splitk`, seven times with weights of 16 bits, as
/// tests/counts/qmatmul.rs counts.
const BF16_ROWS: usize = 8;

/// The two factors of an adapter beside a projection: y = x·Wᵀ + bias + scale·(x·Aᵀ)·Bᵀ.
#[derive(Clone)]
pub struct Lora {
    /// Rank.
    pub r: usize,
    /// What the low-rank term is multiplied with.
    pub scale: f32,
    /// A, f32[r, k].
    pub a: Buffer,
    /// B, f32[n, r], cut like the matrix.
    pub b: Vec<Buffer>,
}

/// A table of rows that ids pick from.
#[derive(Clone)]
pub struct Embedding {
    /// [vocab, width].
    pub matrix: Matrix,
    op: &'static OpSpec,
}

impl Matrix {
    /// The dims of weight formats that follow an op's own: G, WIDE and AFFINE, as far as the format has them.
    fn format_dims(&self) -> ([usize; 3], usize) {
        match self.format {
            Format::Q4 { group, wide } => ([group, wide as usize, 0], 2),
            Format::Q8 { group, wide, affine } => ([group, wide as usize, affine as usize], 3),
            _ => ([0; 3], 0),
        }
    }

    /// Params of `op` whose own dims are `own`, followed by the format's.
    fn dims(&self, op: &OpSpec, own: &[usize], scalars: &[f32]) -> Dims {
        let (format, count) = self.format_dims();
        let mut dims = [0; 16];
        dims[..own.len()].copy_from_slice(own);
        dims[own.len()..own.len() + count].copy_from_slice(&format[..count]);
        op.dims(&dims[..own.len() + count], scalars)
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        self.shards.iter().flat_map(|shard| &shard.parts).map(Buffer::bytes).sum()
    }
}

impl Linear {
    /// A projection without bias by a matrix that is already there, such as a tied embedding.
    pub fn new(device: &dyn Device, matrix: Matrix) -> Result<Linear, Error> {
        let op = ops::find("qmatmul", matrix.format.name());
        Ok(Linear { matrix, bias: None, lora: None, stack: None, op, bf16: false, empty: device.alloc(0)? })
    }

    /// Queues y[m, n] = x[m, k]·Wᵀ + bias, whatever adapter is beside it.
    pub fn apply(&self, device: &dyn Device, x: &Buffer, y: &Buffer, m: usize) -> Result<(), Error> {
        self.queue(device, x, None, y, m)
    }

    /// Queues y[m, n] = x[m, k]·Wᵀ + bias, and its adapter's term where there is one. `shrunk` has room for f32[m, r]
    /// and keeps x·Aᵀ.
    pub fn apply_adapted(
        &self,
        device: &dyn Device,
        x: &Buffer,
        shrunk: &Buffer,
        y: &Buffer,
        m: usize,
    ) -> Result<(), Error> {
        let Some(lora) = &self.lora else { return self.queue(device, x, None, y, m) };
        lora.shrink(device, x, shrunk, m, self.matrix.k)?;
        self.queue(device, x, Some((lora, shrunk)), y, m)
    }

    /// Queues dx[m, k] = dy[m, n]·W + dS·A with dS = `adapter`'s buffer, f32[m, r]; added to dx where `add`.
    pub fn apply_transposed(
        &self,
        device: &dyn Device,
        dy: &Buffer,
        adapter: Option<(&Lora, &Buffer)>,
        dx: &Buffer,
        m: usize,
        add: bool,
    ) -> Result<(), Error> {
        let Matrix { n, k, format, .. } = self.matrix;
        let op = ops::find("qmatmul_t", format.name());
        let mut rounded = None;
        for (i, shard) in self.matrix.shards.iter().enumerate() {
            let adapter = adapter.filter(|_| i == 0);
            let r = adapter.map_or(0, |(lora, _)| lora.r);
            let own = [m, shard.n, k, n, shard.y0, r, (add || i > 0) as usize];
            let dims = self.matrix.dims(op, &own, &[]);
            let (ds, a) = adapter.map_or((&self.empty, &self.empty), |(lora, ds)| (ds, &lora.a));
            if i == 0 {
                rounded = self.round(device, op, dy, m, n, &dims)?;
            }
            let (act, dy) = rounded.as_ref().map_or((Dtype::F32, dy), |dy| (Dtype::BF16, dy));
            let mut args = Vec::with_capacity(10);
            args.push(dy);
            args.extend(&shard.parts);
            args.extend([ds, a, dx]);
            device::run_as(act, device, op, &args, &dims)?;
        }
        Ok(())
    }

    /// Queues y[m, n] = x[m, k]·Wᵀ + bias + scale·S·Bᵀ with S = `shrunk`, f32[m, r].
    pub fn queue(
        &self,
        device: &dyn Device,
        x: &Buffer,
        adapter: Option<(&Lora, &Buffer)>,
        y: &Buffer,
        m: usize,
    ) -> Result<(), Error> {
        let Matrix { n, k, .. } = self.matrix;
        let (r, scale) = adapter.map_or((0, 0.0), |(lora, _)| (lora.r, lora.scale));
        let mut rounded = None;
        for (i, shard) in self.matrix.shards.iter().enumerate() {
            let own = [m, shard.n, k, n, shard.y0, self.bias.is_some() as usize, r];
            let dims = self.matrix.dims(self.op, &own, &[scale]);
            let bias = self.bias.as_ref().map_or(&self.empty, |bias| &bias[i]);
            let (s, b) = adapter.map_or((&self.empty, &self.empty), |(lora, shrunk)| (shrunk, &lora.b[i]));
            if i == 0 {
                rounded = self.round(device, self.op, x, m, k, &dims)?;
            }
            let (act, x) = rounded.as_ref().map_or((Dtype::F32, x), |x| (Dtype::BF16, x));
            let mut args = Vec::with_capacity(10);
            args.push(x);
            args.extend(&shard.parts);
            args.extend([bias, s, b, y]);
            device::run_as(act, device, self.op, &args, &dims)?;
        }
        Ok(())
    }

    /// x[m, columns] in bf16, where that is allowed, pays, and `op` has a kernel for it.
    fn round(
        &self,
        device: &dyn Device,
        op: &OpSpec,
        x: &Buffer,
        m: usize,
        columns: usize,
        dims: &Dims,
    ) -> Result<Option<Buffer>, Error> {
        if !self.bf16
            || m < BF16_ROWS
            || device.caps().batch_invariant
            || op.choose(dims, Dtype::BF16, device.caps()).is_none()
        {
            return Ok(None);
        }
        let rounded = device.alloc(2 * m * columns)?;
        let cast = ops::find("cast", "bf16");
        device::run(device, cast, &[x, &rounded], &cast.dims(&[m, columns], &[]))?;
        Ok(Some(rounded))
    }
}

impl Lora {
    /// Queues S[m, r] = x[m, k]·Aᵀ.
    pub fn shrink(&self, device: &dyn Device, x: &Buffer, s: &Buffer, m: usize, k: usize) -> Result<(), Error> {
        let op = ops::find("lora_shrink", "f32");
        let dims = op.dims(&[m, k, self.r, self.r, 0, 0], &[]);
        let none = s.view(0, 0);
        Ok(device::run(device, op, &[x, &self.a, &none, &none, s], &dims)?)
    }
}

impl Embedding {
    /// A table over a matrix.
    pub fn new(matrix: Matrix) -> Embedding {
        Embedding { op: ops::find("embedding", matrix.format.name()), matrix }
    }

    /// Queues y[m, width] = the rows of `ids[m]`. Rows of ids beyond the table stay as they are: check ids first.
    pub fn apply(&self, device: &dyn Device, ids: &Buffer, y: &Buffer, m: usize) -> Result<(), Error> {
        for shard in &self.matrix.shards {
            let dims = self.matrix.dims(self.op, &[m, shard.n, self.matrix.k, shard.y0], &[]);
            let mut args = Vec::with_capacity(8);
            args.push(ids);
            args.extend(&shard.parts);
            args.push(y);
            device::run(device, self.op, &args, &dims)?;
        }
        Ok(())
    }
}
