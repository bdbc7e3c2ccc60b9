//! Names of things, and how one version of one is spoken of: `name`, `name@3`, `name@champion`.
//!
//! Names and aliases are letters, digits, `.`, `_` and `-`, beginning with a letter or a digit; case does not tell two
//! of them apart. They never become paths.

use crate::error::{quote, Error};

/// The longest name, in bytes.
pub const MAX_NAME: usize = 96;
/// The alias that every name has: its highest version.
pub const LATEST: &str = "latest";

/// Which version of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// The highest.
    Latest,
    /// This one.
    Version(i64),
    /// The one an alias points at.
    Alias(String),
}

/// A name, and which of its versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The name.
    pub name: String,
    /// The version.
    pub which: Which,
}

impl Reference {
    /// Reads `name`, `name@version` or `name@alias`.
    pub fn parse(text: &str) -> Result<Reference, Error> {
        let (name, which) = match text.split_once('@') {
            None => (text, Which::Latest),
            Some((name, word)) => (name, which(word)?),
        };
        check_name(name)?;
        Ok(Reference { name: name.into(), which })
    }
}

/// Reads what stands after the `@`.
pub fn which(word: &str) -> Result<Which, Error> {
    if word.eq_ignore_ascii_case(LATEST) {
        return Ok(Which::Latest);
    }
    if word.bytes().all(|byte| byte.is_ascii_digit()) && !word.is_empty() {
        let version = word.parse().ok().filter(|version| *version > 0);
        let version =
            version.ok_or_else(|| Error::Request(format!("{} is no version: they count from 1", quote(word))))?;
        return Ok(Which::Version(version));
    }
    check_alias(word)?;
    Ok(Which::Alias(word.into()))
}

/// Refuses what cannot be a name.
pub fn check_name(name: &str) -> Result<(), Error> {
    check(name).map_err(|why| Error::Request(format!("{} cannot be a name: {why}", shown(name))))
}

/// Refuses what cannot be an alias: what cannot be a name, numbers, and `latest`.
pub fn check_alias(alias: &str) -> Result<(), Error> {
    let wrong = |why: &str| Error::Request(format!("{} cannot be an alias: {why}", shown(alias)));
    check(alias).map_err(wrong)?;
    if alias.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong("numbers are versions"));
    }
    match alias.eq_ignore_ascii_case(LATEST) {
        true => Err(wrong("it is always the highest version")),
        false => Ok(()),
    }
}

/// A word in a message; nothing at all would not be seen there.
fn shown(word: &str) -> String {
    if word.is_empty() {
        "''".into()
    } else {
        quote(word)
    }
}

fn check(word: &str) -> Result<(), &'static str> {
    if word.is_empty() {
        return Err("it is empty");
    }
    if word.len() > MAX_NAME {
        return Err("it is longer than 96 bytes");
    }
    if !word.as_bytes()[0].is_ascii_alphanumeric() {
        return Err("it begins with a letter or a digit");
    }
    match word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
        true => Ok(()),
        false => Err("it is made of letters, digits, '.', '_' and '-'"),
    }
}

/// Makes a name of any text, such as a file's name: what a name cannot have becomes `-`. None where nothing is left.
pub fn name_of(text: &str) -> Option<String> {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let name: String = text.chars().map(plain).collect();
    let name = name.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    let name = name[..name.len().min(MAX_NAME)].trim_end_matches(['-', '.']).to_lowercase();
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read() {
        let read = |text: &str| Reference::parse(text).map(|reference| (reference.name, reference.which));
        assert_eq!(read("support").unwrap(), ("support".into(), Which::Latest));
        assert_eq!(read("support@latest").unwrap(), ("support".into(), Which::Latest));
        assert_eq!(read("support@3").unwrap(), ("support".into(), Which::Version(3)));
        assert_eq!(read("a.b_c-1@champion").unwrap(), ("a.b_c-1".into(), Which::Alias("champion".into())));
    }

    #[test]
    fn hostile_names_are_refused() {
        let long = "x".repeat(97);
        for text in [
            "",
            "@1",
            "..",
            "../x",
            "a/b",
            "a\\b",
            "a\0b",
            "a b",
            "-x",
            ".x",
            "ü",
            "a@",
            "a@0",
            "a@b@c",
            "a@../x",
            "a@99999999999999999999",
            "a\n",
            "a@-1",
            &long,
        ] {
            assert!(Reference::parse(text).is_err(), "{text:?}");
        }
        assert!(check_alias("12").is_err() && check_alias("Latest").is_err() && check_alias("v12").is_ok());
    }

    #[test]
    fn names_are_made_of_any_text() {
        assert_eq!(name_of("SmolLM2-135M Instruct.Q4_1"), Some("smollm2-135m-instruct.q4_1".into()));
        assert_eq!(name_of("../.."), None);
        assert_eq!(name_of("--x/y--"), Some("x-y".into()));
        assert!(name_of(&"ü".repeat(300)).is_none() && name_of(&"x".repeat(300)).unwrap().len() == MAX_NAME);
    }
}
