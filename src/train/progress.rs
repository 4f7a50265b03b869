//! How far a run had come when it was saved: what going on with it takes beside the weights.

use super::spike::Spikes;
use crate::checkpoint::{Meta, Moments};
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Keys of a native checkpoint's metadata.
const BATCHES: &str = "batches";
const UNFINISHED: &str = "unfinished";
const SPIKES: &str = "spikes";

/// What comes after a step, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Report {
    /// The loss on the validation data.
    Validation,
    /// A text that the model makes up.
    Sample,
}

/// A run's progress.
#[derive(Debug, Clone)]
pub struct Progress {
    /// The checkpoint that tells it.
    pub file: PathBuf,
    /// Steps done.
    pub step: u64,
    /// Batches taken from the training data.
    pub batches: u64,
    /// The report after the last step that was interrupted, with those that come after it: they are still due.
    pub unfinished: Option<Report>,
    /// The updates so far, where spikes are skipped.
    pub spikes: Spikes,
    /// AdamW's moments.
    pub moments: Moments,
}

impl Progress {
    /// The progress that a checkpoint's metadata tells.
    ///
    /// # Errors
    /// [`Error::File`] when an entry is missing or makes no sense.
    pub fn of(file: &Path, meta: &Meta, moments: Moments) -> Result<Self> {
        let entry = |key: &str| meta.extra.get(key);
        let damaged = |what: &str| Error::file(file, format!("{what}; start from it with -e instead"));
        let batches = entry(BATCHES).and_then(|batches| batches.parse().ok());
        let unfinished = match entry(UNFINISHED).map(String::as_str) {
            None => None,
            Some("validation") => Some(Report::Validation),
            Some("sample") => Some(Report::Sample),
            Some(_) => return Err(damaged("says that an unknown report is unfinished")),
        };
        let spikes = entry(SPIKES).map(|text| serde_json::from_str(text)).transpose();
        Ok(Self {
            file: file.to_path_buf(),
            step: meta.step,
            batches: batches.ok_or_else(|| damaged("does not say how far its run had come in the data"))?,
            unfinished,
            spikes: spikes.map_err(|_| damaged("does not say in order which losses came before"))?.unwrap_or_default(),
            moments,
        })
    }
}

/// The entries of a checkpoint's metadata that [`Progress::of`] reads. `spikes` is given where spikes are skipped.
///
/// # Errors
/// [`Error::Internal`] when the spikes are no JSON.
pub fn entries(batches: u64, unfinished: Option<Report>, spikes: Option<&Spikes>) -> Result<BTreeMap<String, String>> {
    let mut entries = BTreeMap::from([(BATCHES.to_string(), batches.to_string())]);
    if let Some(report) = unfinished {
        let name = if report == Report::Validation { "validation" } else { "sample" };
        entries.insert(UNFINISHED.to_string(), name.to_string());
    }
    if let Some(spikes) = spikes {
        let text = serde_json::to_string(spikes).map_err(|error| Error::Internal(error.to_string()))?;
        entries.insert(SPIKES.to_string(), text);
    }
    Ok(entries)
}
