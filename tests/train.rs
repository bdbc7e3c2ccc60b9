//! Fine-tuning: against PEFT on a real model, against f64 on tiny ones, and through the tool.

#[path = "train/peft.rs"]
mod peft;

use std::path::PathBuf;

/// A model of the folder HANDMILL_MODELS, or of its default place.
pub fn model(name: &str) -> PathBuf {
    let folder = std::env::var_os("HANDMILL_MODELS").map(PathBuf::from).unwrap_or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
        let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set"));
        cache.unwrap_or_else(|| home().join(".cache")).join("handmill/models")
    });
    let path = folder.join(name);
    assert!(path.exists(), "{} is missing: run tools/fetch_models, or set HANDMILL_MODELS", path.display());
    path
}

pub fn smollm2() -> PathBuf {
    model("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// A file of tests/fixtures.
pub fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", name].iter().collect()
}
