//! The one error type: what went wrong, where, and what to do about it.
//!
//! Every variant prints as a single sentence. [`Error::exit_code`] tells a user's mistake (2) from a fault of ours (1)
//! and from an interruption (130).

use std::io;
use std::path::{Path, PathBuf};

/// Shorthand for results with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong, by whose hands it can be mended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag, a configuration or a combination of them that cannot be honoured. The sentence says what to do.
    #[error("{0}")]
    Usage(String),

    /// A file whose contents are not what they should be.
    #[error("{}: {what}", path.display())]
    File {
        /// The file as the user named it.
        path: PathBuf,
        /// What is wrong with it and what to do.
        what: String,
    },

    /// The operating system refused an operation on a file.
    #[error("cannot {action} {}: {source}{}", path.display(), io_hint(source))]
    Io {
        /// The verb: "open", "write", "create".
        action: &'static str,
        /// The file or folder as the user named it.
        path: PathBuf,
        /// The operating system's own words.
        source: io::Error,
    },

    /// A download that did not end well.
    #[error("{0}")]
    Network(String),

    /// A device that is missing, too small, or that failed.
    #[error("{0}")]
    Device(String),

    /// Device memory that ran out when it was asked for, whatever had been foreseen.
    #[error("{what}; {advice}")]
    OutOfMemory {
        /// The device, what for, how much was asked and how much is there: one clause.
        what: String,
        /// What to do.
        advice: String,
    },

    /// Standard output was closed by its reader (`bandtrain ... | head`): not an error to report.
    #[error("standard output was closed")]
    StdoutClosed,

    /// The user asked to stop (Ctrl-C, SIGTERM); work up to here is saved as the text says.
    #[error("interrupted; {0}")]
    Interrupted(String),

    /// A fault of this program.
    #[error("internal fault: {0}; please report it with the command line that led here")]
    Internal(String),
}

impl Error {
    /// A [`Error::Usage`] from anything printable.
    pub fn usage(what: impl Into<String>) -> Self {
        Error::Usage(what.into())
    }

    /// A [`Error::File`] about `path`.
    pub fn file(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Error::File { path: path.as_ref().to_path_buf(), what: what.into() }
    }

    /// Turns an [`io::Error`] into an [`Error::Io`]: `.map_err(Error::io("open", path))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    /// An [`Error::OutOfMemory`] with the advice that always helps.
    pub fn out_of_memory(what: impl Into<String>) -> Self {
        Error::OutOfMemory { what: what.into(), advice: "use a smaller batch (-b) or sequence (-t)".to_string() }
    }

    /// The same with this advice where device memory ran out, for who knows better than the device what can be done.
    pub fn with_memory_advice(self, advice: impl Into<String>) -> Self {
        match self {
            Error::OutOfMemory { what, .. } => Error::OutOfMemory { what, advice: advice.into() },
            other => other,
        }
    }

    /// The process exit code for this error: 2 a user's mistake, 1 a fault of ours, 130 interrupted, 0 for a reader of
    /// standard output that had seen enough.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::StdoutClosed => 0,
            Error::Interrupted(_) => 130,
            Error::Internal(_) => 1,
            _ => 2,
        }
    }
}

/// Advice for the operating system's commonest refusals.
fn io_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; check the path",
        io::ErrorKind::PermissionDenied => "; check the permissions or choose another place",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some space or choose another disk",
        io::ErrorKind::ReadOnlyFilesystem => "; choose a place that can be written",
        io::ErrorKind::IsADirectory => "; name a file, not a folder",
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            "; choose a path that leads through folders only"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_name_the_file_and_what_to_do() {
        let error = Error::io("open", "no/such.bin")(io::Error::from(io::ErrorKind::NotFound));
        assert_eq!(error.to_string(), "cannot open no/such.bin: entity not found; check the path");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn exit_codes_tell_whose_fault_it_is() {
        assert_eq!(Error::usage("x").exit_code(), 2);
        assert_eq!(Error::Internal("x".into()).exit_code(), 1);
        assert_eq!(Error::Interrupted("x".into()).exit_code(), 130);
    }
}
