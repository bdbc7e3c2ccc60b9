//! Adapters of one projection, one below the other, of which each token of a pass names its own.
//!
//! ```text
//! slot      0        1 (does not touch this projection)   2
//! A  [T,k]  rows 0..8                                     rows 8..24         T = 24: true ranks 8 and 16
//! Bᵀ [T,n]  rows 0..8                                     rows 8..24
//! ```
//!
//! Taking one out, or another in, copies the others on the device; the base's weights stay where they are.

use super::adapter::{Adapter, Module, TARGETS};
use super::linear::{Matrix, Shard};
use super::llama::Llama;
use crate::device::{self, Buffer, Device};
use crate::error::Error;
use crate::ops;

/// The adapters beside one projection.
#[derive(Clone)]
pub struct Stack {
    /// A of all, f32[T, k].
    a: Buffer,
    /// Bᵀ of all, f32[T, n of the shard], cut like the matrix.
    b: Vec<Buffer>,
    /// Rows of A that are a slot's: u32[slots, 2].
    rows: Buffer,
    /// What a slot's term is multiplied with: f32[slots].
    scale: Buffer,
    /// The same on the host.
    slots: Vec<Slot>,
}

/// A slot's rows of A and Bᵀ.
#[derive(Clone, Copy, Default)]
struct Slot {
    first: usize,
    rank: usize,
    scale: f32,
}

impl Stack {
    /// Queues y[m, n] += scale·(x[m, k]·Aᵀ)·Bᵀ of each token's adapter; `adapter` is i32[m], a slot or −1, and `shrunk`
    /// has room for f32[m, r], r the largest rank.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn apply(
        &self,
        device: &dyn Device,
        matrix: &Matrix,
        x: &Buffer,
        adapter: &Buffer,
        shrunk: &Buffer,
        y: &Buffer,
        m: usize,
    ) -> Result<(), Error> {
        let (shrink, expand) = (ops::find("lora_shrink", "f32"), ops::find("lora_expand", "f32"));
        let (r, t, l) = (self.rank(), self.height(), self.slots.len());
        let dims = shrink.dims(&[m, matrix.k, r, t, l, 1], &[]);
        device::run(device, shrink, &[x, &self.a, adapter, &self.rows, shrunk], &dims)?;
        for (Shard { y0, n, .. }, b) in matrix.shards.iter().zip(&self.b) {
            let dims = expand.dims(&[m, *n, r, t, l, matrix.n, *y0], &[]);
            device::run(device, expand, &[shrunk, b, adapter, &self.rows, &self.scale, y], &dims)?;
        }
        Ok(())
    }

    /// The largest rank.
    pub fn rank(&self) -> usize {
        self.slots.iter().map(|slot| slot.rank).max().unwrap_or(0)
    }

    /// Rows of A and of Bᵀ.
    fn height(&self) -> usize {
        self.slots.iter().map(|slot| slot.rank).sum()
    }

    /// The stack `old` without `slot`, or with `module` in it, for a projection by `matrix`; none where nothing is left.
    fn with(
        device: &dyn Device,
        matrix: &Matrix,
        old: Option<&Stack>,
        slot: usize,
        module: Option<(&Module, usize, f32)>,
    ) -> Result<Option<Stack>, Error> {
        let mut slots: Vec<Slot> = old.map_or(Vec::new(), |old| old.slots.clone());
        slots.resize(slots.len().max(slot + 1), Slot::default());
        slots[slot] = Slot { first: 0, rank: module.map_or(0, |m| m.1), scale: module.map_or(0.0, |m| m.2) };
        let mut height = 0;
        for slot in &mut slots {
            slot.first = height;
            height += slot.rank;
        }
        if height == 0 {
            return Ok(None);
        }
        let rows: Vec<[u32; 2]> = slots.iter().map(|s| [s.first as u32, (s.first + s.rank) as u32]).collect();
        let scale: Vec<f32> = slots.iter().map(|slot| slot.scale).collect();
        let stack = Stack {
            a: device.alloc(4 * height * matrix.k)?,
            b: matrix.shards.iter().map(|s| Ok(device.alloc(4 * height * s.n)?)).collect::<Result<_, Error>>()?,
            rows: device.alloc(8 * rows.len())?,
            scale: device.alloc(4 * scale.len())?,
            slots,
        };
        device.write(&stack.rows, 0, bytemuck::cast_slice(&rows))?;
        device.write(&stack.scale, 0, bytemuck::cast_slice(&scale))?;
        if let Some(old) = old {
            for (i, (from, to)) in old.slots.iter().zip(&stack.slots).enumerate() {
                if i == slot || from.rank == 0 {
                    continue;
                }
                let copy = |a: &Buffer, b: &Buffer, width: usize| {
                    device.copy(a, 4 * from.first * width, b, 4 * to.first * width, 4 * from.rank * width)
                };
                copy(&old.a, &stack.a, matrix.k)?;
                for ((a, b), shard) in old.b.iter().zip(&stack.b).zip(&matrix.shards) {
                    copy(a, b, shard.n)?;
                }
            }
        }
        if let Some((module, rank, _)) = module {
            let first = 4 * stack.slots[slot].first;
            device.write(&stack.a, first * matrix.k, bytemuck::cast_slice(&module.a))?;
            for (shard, buffer) in matrix.shards.iter().zip(&stack.b) {
                let column = |r: usize| (shard.y0..shard.y0 + shard.n).map(move |n| module.b[n * rank + r]);
                let values: Vec<f32> = (0..rank).flat_map(column).collect();
                device.write(buffer, first * shard.n, bytemuck::cast_slice(&values))?;
            }
        }
        Ok(Some(stack))
    }
}

impl Llama {
    /// Puts an adapter beside the weights for the tokens that name `slot`, in place of what was there. Errors: an
    /// adapter for a model of other sizes, memory; then `slot` is empty.
    pub fn stack(&mut self, slot: usize, adapter: &Adapter) -> Result<(), Error> {
        adapter.check(&self.config)?;
        self.unstack(slot)?;
        let device = self.device.clone();
        let (rank, scale) = (adapter.config.r, adapter.config.scale());
        let put = |layers: &mut Vec<super::llama::Layer>, module: &Module| {
            let linear = layers[module.layer].projection_mut(module.target);
            linear.stack =
                Stack::with(&*device, &linear.matrix, linear.stack.as_ref(), slot, Some((module, rank, scale)))?;
            Ok(())
        };
        let done: Result<(), Error> = adapter.modules.iter().try_for_each(|module| put(&mut self.layers, module));
        if done.is_err() {
            self.unstack(slot)?;
        }
        done
    }

    /// Empties `slot`. Errors: memory, for the copies without it.
    pub fn unstack(&mut self, slot: usize) -> Result<(), Error> {
        for layer in &mut self.layers {
            for (target, _) in TARGETS {
                let linear = layer.projection_mut(target);
                if linear.stack.as_ref().is_some_and(|stack| stack.slots.get(slot).is_some_and(|slot| slot.rank > 0)) {
                    linear.stack = Stack::with(&*self.device, &linear.matrix, linear.stack.as_ref(), slot, None)?;
                }
            }
        }
        Ok(())
    }

    /// The largest rank among the adapters of all slots; 0 without any.
    pub fn stacked_rank(&self) -> usize {
        let projections = self.layers.iter().flat_map(|layer| layer.projections());
        projections.filter_map(|(_, linear)| linear.stack.as_ref().map(Stack::rank)).max().unwrap_or(0)
    }
}
