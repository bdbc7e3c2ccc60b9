//! Weight formats: encoding, decoding, hostile input, GGUF blocks and the NF4 of bitsandbytes.

#[path = "quant/encode.rs"]
mod encode;
#[path = "quant/format.rs"]
mod format;
#[path = "quant/gguf.rs"]
mod gguf;
#[path = "quant/nf4.rs"]
mod nf4;

use handmill::quant::Format;

/// Every format, and every option of q4 and q8.
fn all_formats() -> Vec<Format> {
    let mut formats = vec![Format::F32, Format::F16, Format::BF16, Format::Nf4, Format::Nf4Dq];
    for group in [16, 32, 64, 128] {
        for wide in [false, true] {
            formats.push(Format::Q4 { group, wide });
            formats.push(Format::Q8 { group, wide, affine: false });
            formats.push(Format::Q8 { group, wide, affine: true });
        }
    }
    formats
}

/// SplitMix64: enough randomness for tests, the same numbers everywhere.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Uniform in 0..1.
    fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Nearly normal, mean 0, variance 1: the sum of twelve uniforms less six.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.unit()).sum::<f32>() - 6.0
    }
}
