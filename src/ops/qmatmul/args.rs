//! The arguments of a `qmatmul` launch on the CPU, by name.

use crate::op::{Dims, Slice};
use crate::ops::weights::{part_count, Weights};

/// A launch's arguments by name.
pub struct Args<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub x: &'a [f32],
    pub w: Weights<'a>,
    pub extra: Extra<'a>,
    pub y: Output<'a>,
}

/// What is added to a product: the bias and the low-rank term.
#[derive(Clone, Copy)]
pub struct Extra<'a> {
    pub bias: &'a [f32],
    pub s: f32,
    pub r: usize,
    pub lora_s: &'a [f32],
    pub lora_b: &'a [f32],
}

impl Extra<'_> {
    /// Of element (m, n).
    #[inline]
    pub fn at(&self, m: usize, n: usize) -> f32 {
        let bias = self.bias.get(n).copied().unwrap_or(0.0);
        if self.r == 0 {
            return bias;
        }
        let (s, b) = (&self.lora_s[m * self.r..][..self.r], &self.lora_b[n * self.r..][..self.r]);
        bias + self.s * s.iter().zip(b).map(|(s, b)| s * b).sum::<f32>()
    }
}

/// y's columns Y0..Y0+N, written by several threads, each its own columns or rows.
pub struct Output<'a> {
    first: *mut f32,
    ld: usize,
    m: usize,
    n: usize,
    _memory: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: threads write through `set` and `row` at places that are theirs alone.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    fn new(y: &'a mut [f32], ld: usize, y0: usize, m: usize, n: usize) -> Output<'a> {
        assert!(y0 + n <= ld && y.len() == m * ld, "columns {y0}+{n} of y[{m},{ld}]");
        let start = y0.min(y.len());
        let first = y[start..].as_mut_ptr();
        Output { first, ld, m, n, _memory: std::marker::PhantomData }
    }

    /// Writes element (m, n).
    ///
    /// # Safety
    /// No other thread touches this element meanwhile.
    #[inline]
    pub unsafe fn set(&self, m: usize, n: usize, value: f32) {
        debug_assert!(m < self.m && n < self.n);
        // SAFETY: `new` saw that the element lies in y; the caller that no one else touches it.
        unsafe { *self.first.add(m * self.ld + n) = value }
    }

    /// Where column Y0 of row 0 lies.
    pub fn first(&self) -> *mut f32 {
        self.first
    }

    /// Where element (m, n) lies.
    pub fn at(&self, m: usize, n: usize) -> *mut f32 {
        assert!(m < self.m && n < self.n);
        self.first.wrapping_add(m * self.ld + n)
    }

    /// Numbers from one row to the next.
    pub fn stride(&self) -> usize {
        self.ld
    }

    /// Row m.
    ///
    /// # Safety
    /// No other thread touches this row meanwhile.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row(&self, m: usize) -> &mut [f32] {
        assert!(m < self.m);
        // SAFETY: `new` saw that the row lies in y; the caller that no one else touches it.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(m * self.ld), self.n) }
    }
}

pub fn arguments<'a>(word: &str, d: &Dims, args: &'a mut [Slice<'_>]) -> Args<'a> {
    let (m, n, k) = (d["M"], d["N"], d["K"]);
    let (y, inputs) = args.split_last_mut().expect("arguments of the contract");
    let [x, rest @ ..] = &*inputs else { unreachable!("arguments of the contract") };
    let (parts, rest) = rest.split_at(part_count(word));
    let [bias, lora_s, lora_b] = rest else { unreachable!("arguments of the contract") };
    Args {
        m,
        n,
        k,
        x: x.f32(),
        w: Weights::new(word, d, parts),
        extra: Extra { bias: bias.f32(), s: d.scalar("s"), r: d["R"], lora_s: lora_s.f32(), lora_b: lora_b.f32() },
        y: Output::new(y.f32_mut(), d["LDY"], d["Y0"], m, n),
    }
}
