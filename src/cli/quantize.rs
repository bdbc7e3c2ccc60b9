use anyhow::Result;
use clap::Args;
/// x
#[derive(Args)]
pub struct Quantize {}
impl Quantize {
    pub fn run(&self) -> Result<()> {
        Ok(())
    }
}
