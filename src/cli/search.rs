//! `handmill search`: the nearest rows of a corpus of vectors.

mod vectors;

use anyhow::Result;
use clap::Args;

use super::Common;

/// Find the rows of a corpus nearest to each query by cosine, exactly
///
/// Corpus and queries are matrices, a row each vector: .npy (f32, f16), .fvecs or .safetensors. Rows are brought to unit
/// norm; scores are cosines, equal ones in the order of the rows. The result is the same bits on every device, for any
/// batch. With --json: n, d, queries, k, ms_per_batch, bytes, device, format, batch, normalised, dropped, scored,
/// widened, exhausted.
#[derive(Args)]
pub struct Search {
    #[command(flatten)]
    vectors: vectors::VectorSearch,
    /// Rows to find for each query, 1 to 2048
    #[arg(short, value_name = "N", default_value_t = 10)]
    k: usize,
    #[command(flatten)]
    common: Common,
}

impl Search {
    pub fn run(&self) -> Result<()> {
        self.vectors.run(self.k, &self.common)
    }
}
