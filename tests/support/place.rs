//! Where models and data lie that the tools fetch.

use std::path::PathBuf;

/// A path below a variable's folder or its default in the user's cache.
pub fn place_of(variable: &str, default: &str, name: &str, tool: &str) -> PathBuf {
    let folder = std::env::var_os(variable).map(PathBuf::from).unwrap_or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
        let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set"));
        cache.unwrap_or_else(|| home().join(".cache")).join(default)
    });
    let path = folder.join(name);
    assert!(path.exists(), "{} is missing: run {tool}, or set {variable}", path.display());
    path
}
