//! Text files that grow by whole lines.

use crate::atomic::AtomicFile;
use crate::error::{Error, Result};
use serde::Serialize;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A file that grows by whole lines.
#[derive(Debug)]
pub struct LineFile {
    path: PathBuf,
    file: File,
}

impl LineFile {
    /// An empty file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(Error::io("create", path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Goes on with a file, or begins it.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened.
    pub fn append(path: &Path) -> Result<Self> {
        let file = File::options().create(true).append(true).open(path).map_err(Error::io("open", path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Goes on with a file after `step`: later lines, and whatever a crash left of one, are dropped.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read or written.
    pub fn resume(path: &Path, step: u64, step_of: fn(&str) -> Option<u64>) -> Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            text => text.map_err(Error::io("read", path))?,
        };
        let mut kept = AtomicFile::create(path)?;
        let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        for line in whole.filter(|line| step_of(line).is_some_and(|at| at <= step)) {
            kept.append(line.as_bytes())?;
        }
        kept.seal()?.publish()?;
        Self::append(path)
    }

    /// One write a line, so that a reader, or a crash, never sees half of one.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be written.
    pub fn line(&mut self, line: &str) -> Result<()> {
        self.file.write_all(format!("{line}\n").as_bytes()).map_err(Error::io("write", &self.path))
    }

    /// A line that is a JSON object.
    ///
    /// # Errors
    /// As [`LineFile::line`]; [`Error::Internal`] when the record is no JSON.
    pub fn json(&mut self, record: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(record)
            .map_err(|error| Error::Internal(format!("a record of the training is not JSON: {error}")))?;
        self.line(&line)
    }
}

/// The step of a line of JSON.
pub fn step_of_record(line: &str) -> Option<u64> {
    serde_json::from_str::<serde_json::Value>(line).ok()?.get("step")?.as_u64()
}

/// The step of a line of llm.c's log: `s:STEP ...`.
pub fn step_of_log(line: &str) -> Option<u64> {
    line.strip_prefix("s:")?.split(' ').next()?.parse().ok()
}
