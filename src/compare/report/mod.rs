//! What is written beside the state: `compare.json` and `report.html`.

use std::path::Path;

use super::outcome::Outcome;
use crate::aside;
use crate::error::Error;

/// Writes both files.
pub fn write(out: &Path, outcome: &Outcome) -> Result<(), Error> {
    aside::write(&out.join("compare.json"), format!("{:#}\n", outcome.json()).as_bytes())
}
