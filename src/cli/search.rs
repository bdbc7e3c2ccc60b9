//! `handmill search`: the nearest passages to a question, or the nearest rows of a corpus of vectors.

mod text;
mod vectors;

use anyhow::Result;
use clap::Args;

pub use text::{citation, hits};

use super::{Common, Usage};

/// Find what is nearest by cosine, exactly: passages of an index, or rows of a corpus of vectors
///
/// Every passage and every row is compared. With --index, --model and --query it finds passages; --json: hits: [{rank,
/// score, path, lines, heading, text}], query, ms, device. With --corpus and --queries it finds rows of a matrix, .npy
/// (f32, f16), .fvecs or .safetensors, a row each vector, brought to unit norm; equal scores stand in the order of the
/// rows, and the result is the same bits on every device, for any batch; --json: n, d, queries, k, ms_per_batch, bytes,
/// device, format, batch, normalised, dropped, scored, widened, exhausted.
#[derive(Args)]
pub struct Search {
    #[command(flatten)]
    text: text::Text,
    #[command(flatten)]
    vectors: vectors::VectorSearch,
    /// How many to find [default: 5 passages, or 10 rows]
    #[arg(short, value_name = "K")]
    k: Option<usize>,
    #[command(flatten)]
    common: Common,
}

impl Search {
    pub fn run(&self) -> Result<()> {
        if self.vectors.asked() {
            return self.vectors.run(self.k.unwrap_or(10), &self.common);
        }
        if self.text.asked() {
            return self.text.run(self.k.unwrap_or(5), &self.common);
        }
        Err(Usage("give --index, --model and --query, or --corpus and --queries".into()).into())
    }
}
