//! The library's error: which file, which tensor, what is wrong and what to do about it.

use std::path::{Path, PathBuf};

/// What the library answers when something outside it is wrong. Its text stands alone: it names the file and, where
/// there is one, the tensor, says what was expected and what was found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused a file.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A file does not hold what its format, or the model it describes, asks for.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, in words.
        what: String,
    },
    /// One tensor of a file is not what it must be.
    #[error("{}: tensor {name}: {what}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor, shortened and escaped by [`quote`] where the name comes from a file.
        name: String,
        /// What is wrong, in words.
        what: String,
    },
    /// A model was asked for what it cannot do: more tokens than its context holds, an id beyond its vocabulary.
    #[error("{0}")]
    Request(String),
    /// A device failed or refused.
    #[error(transparent)]
    Device(#[from] crate::device::Error),
    /// The tokenizer refused its files, a text or an id.
    #[error(transparent)]
    Tokenizer(#[from] crate::model::tokenizer::Error),
    /// The chat template failed.
    #[error(transparent)]
    Chat(#[from] crate::model::chat::Error),
    /// The sampler refused its settings or the logits.
    #[error(transparent)]
    Sampler(#[from] crate::model::sampler::Error),
}

impl Error {
    /// An [`Error::Io`].
    pub fn io(path: &Path, cause: std::io::Error) -> Error {
        Error::Io { path: path.to_path_buf(), cause }
    }

    /// An [`Error::File`].
    pub fn file(path: &Path, what: impl Into<String>) -> Error {
        Error::File { path: path.to_path_buf(), what: what.into() }
    }

    /// An [`Error::File`] for JSON text that is not what was expected: line, column, and what the parser says.
    pub fn json(path: &Path, cause: &serde_json::Error) -> Error {
        let (line, column) = (cause.line(), cause.column());
        // The parser ends its message with the place too; said first, it outlives the shortening.
        let said = cause.to_string();
        let said = said.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&said);
        Error::file(path, format!("line {line} column {column}: {}", shorten(said, 320)))
    }

    /// An [`Error::File`] for what SQLite says of a database; `mend` is what to do where it is damaged.
    pub fn sqlite(path: &Path, error: &rusqlite::Error, mend: &str) -> Error {
        use rusqlite::ErrorCode;
        let said = quote(&error.to_string());
        let what = match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => "the disk is full: make room and run the command again".into(),
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                "is being changed by another program: try again".into()
            }
            Some(ErrorCode::ReadOnly) => format!("cannot be written ({said}): check its permissions"),
            Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
                format!("cannot be opened ({said}): check its permissions")
            }
            _ => format!("is damaged ({said}): {mend}"),
        };
        Error::file(path, what)
    }

    /// An [`Error::Tensor`]; `name` may be anything a file claims, and is quoted.
    pub fn tensor(path: &Path, name: &str, what: impl Into<String>) -> Error {
        Error::Tensor { path: path.to_path_buf(), name: quote(name), what: what.into() }
    }
}

/// Text from a file, made fit for one line of a message: at most 96 characters, control characters escaped; an
/// apostrophe, which ends nothing there, stays.
pub fn quote(text: &str) -> String {
    shorten(text, 96)
}

fn shorten(text: &str, max: usize) -> String {
    let mut short = String::new();
    for c in text.chars().take(max) {
        match c {
            '\'' => short.push(c),
            c => short.extend(c.escape_debug()),
        }
    }
    if text.chars().nth(max).is_some() {
        short.push_str("...");
    }
    short
}
