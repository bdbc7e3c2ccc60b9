//! bitsandbytes' 4-bit weights in safetensors: one matrix as up to six tensors.
//!
//! ```text
//! X.weight                               U8  [N·K/2, 1]       two codes a byte, the first in the high half
//! X.weight.absmax                        F32 [N·K/64]         or U8 codes, where nested
//! X.weight.quant_map                     F32 [16]             code -> value in [-1, 1]
//! X.weight.nested_absmax                 F32 [N·K/64/256]     where nested
//! X.weight.nested_quant_map              F32 [256]            where nested: absmax code -> value
//! X.weight.quant_state.bitsandbytes__nf4 U8  JSON             shape, block sizes, nested offset
//! ```

use serde::Deserialize;

use super::checkpoint::{Checkpoint, Encoding, TensorView};
use crate::error::{quote, Error};

/// Values in a block, which share one absmax.
pub const BLOCK: usize = 64;
/// Absmax values in a nested block.
pub const NESTED_BLOCK: usize = 256;

/// A matrix in 4 bits, its parts checked against each other.
#[derive(Clone, Debug)]
pub struct Bnb4View<'a> {
    /// N out features, K in features. Blocks run through the rows without regard to where they end.
    pub shape: [usize; 2],
    /// ceil(N·K/2) bytes; value 2i is the high half of byte i.
    pub codes: TensorView<'a>,
    /// F32, 16 of them: the value of each code.
    pub quant_map: TensorView<'a>,
    /// The scale of each block.
    pub absmax: Absmax<'a>,
}

/// The scales of a matrix's blocks, ceil(N·K/64) of them.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum Absmax<'a> {
    /// F32, as they are.
    Plain(TensorView<'a>),
    /// `nested_quant_map[codes[i]] * nested_absmax[i / 256] + offset`.
    Nested {
        /// U8, one a block.
        codes: TensorView<'a>,
        /// F32, one a nested block.
        absmax: TensorView<'a>,
        /// F32, 256 of them.
        quant_map: TensorView<'a>,
        /// The mean that was taken off before quantizing.
        offset: f32,
    },
}

/// The JSON of `quant_state`. `dtype`, the type the matrix was made from, does not bear on its values.
#[derive(Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

impl Checkpoint {
    /// The parts of a matrix that bitsandbytes stored in 4 bits; `None` where `name` has no quant_state beside it. An
    /// error names the part that is missing, of a wrong type or size, or of a kind (fp4, other block sizes) that is not
    /// supported.
    pub fn bnb4(&self, name: &str) -> Option<Result<Bnb4View<'_>, Error>> {
        let state = ["nf4", "fp4"].map(|kind| format!("{name}.quant_state.bitsandbytes__{kind}"));
        state.iter().find(|state| self.has(state)).map(|state| self.bnb4_parts(name, state))
    }

    fn bnb4_parts(&self, name: &str, state: &str) -> Result<Bnb4View<'_>, Error> {
        let text = self.tensor(state)?;
        if text.encoding != Encoding::U8 || text.bytes.len() > 4096 {
            return Err(text.wrong("must be at most 4096 bytes of JSON, stored as U8"));
        }
        let state: State = serde_json::from_slice(text.bytes)
            .map_err(|error| text.wrong(format!("is not the JSON expected: {}", quote(&error.to_string()))))?;
        if state.quant_type != "nf4" {
            let what = format!("quant_type is {}; only nf4 is supported: quantize again", quote(&state.quant_type));
            return Err(text.wrong(what));
        }
        if state.blocksize != BLOCK {
            return Err(text.wrong(format!("blocksize is {}; only {BLOCK} is supported", state.blocksize)));
        }
        let (&[n, k], Some(count)) =
            (&state.shape[..], state.shape.iter().try_fold(1, |a: usize, &b| a.checked_mul(b)))
        else {
            return Err(text.wrong(format!("shape is {}; a matrix is expected", quote(&format!("{:?}", state.shape)))));
        };
        let blocks = count.div_ceil(BLOCK);

        let codes = self.part(name, Encoding::U8, count.div_ceil(2))?;
        let quant_map = self.part(&format!("{name}.quant_map"), Encoding::F32, 16)?;
        let absmax = format!("{name}.absmax");
        let absmax = match state.nested_blocksize {
            None => Absmax::Plain(self.part(&absmax, Encoding::F32, blocks)?),
            Some(NESTED_BLOCK) => {
                // Some versions write the prefix of the type's name, most do not.
                if state.nested_dtype.as_deref().map(|name| name.trim_start_matches("torch.")) != Some("float32") {
                    let found = quote(&format!("{:?}", state.nested_dtype));
                    return Err(text.wrong(format!("nested_dtype is {found}; only float32 is supported")));
                }
                let offset = state.nested_offset.map(|offset| offset as f32).filter(|offset| offset.is_finite());
                let Some(offset) = offset else {
                    return Err(text.wrong("nested_offset must be a finite number"));
                };
                let nested = blocks.div_ceil(NESTED_BLOCK);
                Absmax::Nested {
                    codes: self.part(&absmax, Encoding::U8, blocks)?,
                    absmax: self.part(&format!("{name}.nested_absmax"), Encoding::F32, nested)?,
                    quant_map: self.part(&format!("{name}.nested_quant_map"), Encoding::F32, 256)?,
                    offset,
                }
            }
            Some(other) => {
                return Err(text.wrong(format!("nested_blocksize is {other}; only {NESTED_BLOCK} is supported")));
            }
        };
        Ok(Bnb4View { shape: [n, k], codes, quant_map, absmax })
    }

    /// A part with this many values of this encoding.
    fn part(&self, name: &str, encoding: Encoding, count: usize) -> Result<TensorView<'_>, Error> {
        let part = self.tensor(name)?;
        let found: usize = part.shape.iter().product();
        if part.encoding != encoding || found != count {
            let (encoding, stored) = (encoding.name(), part.encoding.name());
            return Err(part.wrong(format!("holds {found} values of {stored}; {count} of {encoding} are expected")));
        }
        Ok(part)
    }
}
