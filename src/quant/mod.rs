//! Weight formats: what the bytes of a quantized matrix mean, how to make them and how to read them back.
//!
//! A weight W is N rows (output features) by K columns (input features), row-major. A [`Packed`] holds it as plain
//! tensors in the order kernels take them:
//!
//! ```text
//! format          parts                                                                      a weight's value
//! f32 f16 bf16    weight [N,K]                                                               itself
//! q4  (G, wide)   codes u8[N,K/2]  scales f16|f32[N,K/G]  mins, as scales                    scale*code + min
//! q8  (G, wide)   codes i8[N,K]    scales f16|f32[N,K/G]  mins, as scales, or [0,K/G]        scale*code (+ min)
//! nf4             codes u8[N,K/2]  absmax f32[N,K/64]                                        LEVELS[code]*absmax
//! nf4dq           codes u8[N,K/2]  absmax u8[N,K/64]      code f32[256]  absmax2 f32[B/256]  offset f32[1]
//!                 with B = N*K/64 blocks; the absmax of block b is code[absmax[b]]*absmax2[b/256] + offset
//!
//! a byte of q4    bits 7..4: column 2j+1   bits 3..0: column 2j          (little end first, as integers are stored)
//! a byte of nf4   bits 7..4: column 2j     bits 3..0: column 2j+1        (the order of bitsandbytes)
//! ```
//!
//! A value is the f32 that IEEE arithmetic gives for the formula on the right, one rounding an operation:
//! [`decode`]. Bounds on kernels that sum in another order start from the real numbers: [`decode_with_magnitude`].

mod error;
mod format;
pub mod gguf_blocks;

pub use error::{Error, Result};
pub use format::{Format, Packed, PartSpec};
