//! The energy of a run that was interrupted, kept part by part beside it.

use crate::error::{Error, Result};
use crate::report::LineFile;
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// A part of a run, between two of its checkpoints.
#[derive(Serialize, Deserialize)]
struct Segment {
    from: u64,
    to: u64,
    joules: f64,
}

fn segments_file(folder: &Path) -> PathBuf {
    folder.join("energy.jsonl")
}

/// Keeps what the part of a run that was just interrupted, after a checkpoint, has taken.
///
/// # Errors
/// [`Error::Io`].
pub fn keep_energy(folder: &Path, joules: f64) -> Result<()> {
    let to = last_step(&folder.join("metrics.jsonl"))?;
    LineFile::append(&segments_file(folder))?.json(&Segment { from: last_start(folder)?, to, joules })
}

/// The energy of a run from its beginning, whose last part took `joules`; `None` when that of an earlier part was not kept.
///
/// # Errors
/// [`Error::Io`].
pub fn whole_energy(folder: &Path, mut joules: f64) -> Result<Option<f64>> {
    let mut from = last_start(folder)?;
    let mut segments: Vec<Segment> = records(&segments_file(folder))?;
    while from > 0 {
        // A later part may have been done again from an earlier checkpoint.
        match segments.pop() {
            Some(segment) if segment.to == from => (from, joules) = (segment.from, joules + segment.joules),
            Some(_) => {}
            None => return Ok(None),
        }
    }
    Ok(Some(joules))
}

/// The step after which a run was started the last time.
///
/// # Errors
/// [`Error::Io`].
pub fn last_start(folder: &Path) -> Result<u64> {
    last_step(&folder.join("starts.jsonl"))
}

/// The step that the last line of a file of records is about; 0 when there is none.
fn last_step(path: &Path) -> Result<u64> {
    #[derive(Deserialize)]
    struct Record {
        step: u64,
    }
    Ok(records::<Record>(path)?.last().map_or(0, |record| record.step))
}

/// The lines of a file that are records; none when there is no file.
fn records<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Vec<T>> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        text => text.map_err(Error::io("read", path))?,
    };
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn parts_add_up_and_what_was_lost_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str, step: u64| fs::write(folder.path().join(name), format!("{{\"step\":{step}}}\n")).unwrap();
        let part = |from, to, joules| {
            at("starts.jsonl", from);
            at("metrics.jsonl", to);
            keep_energy(folder.path(), joules).unwrap();
        };
        assert_eq!(whole_energy(folder.path(), 5.0).unwrap(), Some(5.0));
        part(0, 100, 10.0);
        part(100, 250, 15.0);
        at("starts.jsonl", 250);
        assert_eq!(whole_energy(folder.path(), 5.0).unwrap(), Some(30.0));
        // Killed after the checkpoint of step 300.
        at("starts.jsonl", 300);
        assert_eq!(whole_energy(folder.path(), 5.0).unwrap(), None);
    }
}
