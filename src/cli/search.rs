//! `handmill search`: the nearest rows to a query.

mod text;

use anyhow::Result;
use clap::Args;

pub use text::{citation, hits};

use super::Common;

/// Find the passages of an index nearest to a question
///
/// Exact: every passage is compared. With --json: hits: [{rank, score, path, lines, heading, text}], query, ms,
/// device.
#[derive(Args)]
pub struct Search {
    #[command(flatten)]
    text: text::Text,
    /// How many to find
    #[arg(short, value_name = "K", default_value_t = 5)]
    k: usize,
    #[command(flatten)]
    common: Common,
}

impl Search {
    pub fn run(&self) -> Result<()> {
        self.text.run(self.k, &self.common)
    }
}
