//! `--resume`: which options make a run what it is, and the checkpoint it goes on from.

use super::train_options::TrainOptions;
use crate::checkpoint::{self, Series};
use crate::config::GptConfig;
use crate::data::Loader;
use crate::error::{Error, Result};
use crate::train::Progress;
use crate::weights::Weights;
use std::collections::BTreeMap;

/// Options that change what a run computes. The number of steps is one only where the schedule depends on it.
const DECISIVE: [&str; 18] = [
    "shuffle",
    "batch-size",
    "seq-len",
    "grad-accum",
    "learning-rate",
    "schedule",
    "warmup",
    "beta1",
    "beta2",
    "weight-decay",
    "grad-clip",
    "skip-loss-zscore",
    "skip-grad-zscore",
    "learn-every",
    "learn-fraction",
    "learn-until",
    "seed",
    "rescale-init",
];
/// What precedes their names in a checkpoint's metadata.
const PREFIX: &str = "run.";

/// Where a run goes on.
pub struct Resumed {
    /// The weights it had.
    pub weights: Weights,
    /// How far it had come.
    pub progress: Progress,
    /// What made it what it was, among other metadata.
    run: BTreeMap<String, String>,
}

/// What makes a run the same run, as entries for its checkpoints' metadata.
///
/// # Errors
/// [`Error::Internal`] when the options are no TOML.
pub fn identity(
    options: &TrainOptions,
    config: &GptConfig,
    train: &Loader,
    val: Option<&Loader>,
) -> Result<BTreeMap<String, String>> {
    let internal = |error: String| Error::Internal(format!("the options cannot be recorded: {error}"));
    let table = toml::Table::try_from(options).map_err(|error| internal(error.to_string()))?;
    let constant = table.get("schedule").and_then(toml::Value::as_str) == Some("constant");
    let keys = DECISIVE.into_iter().chain((!constant).then_some("steps"));
    let data = |loader: &Loader, pattern: &str| {
        let pattern = table.get(pattern).and_then(toml::Value::as_str).unwrap_or("the toy corpus");
        format!("{pattern} ({} tokens, fingerprint {:016x})", loader.num_tokens(), loader.fingerprint())
    };
    let mut entries: BTreeMap<String, String> =
        keys.filter_map(|key| Some((key.to_string(), table.get(key)?.to_string()))).collect();
    let model = serde_json::to_string(config).map_err(|error| internal(error.to_string()))?;
    entries.insert("model".to_string(), model);
    entries.insert("train-data".to_string(), data(train, "train-data"));
    if let Some(val) = val {
        entries.insert("val-data".to_string(), data(val, "val-data"));
    }
    Ok(entries.into_iter().map(|(key, value)| (format!("{PREFIX}{key}"), value)).collect())
}

/// Refuses to start a run afresh among the older checkpoints of another, which it would remove one after the other.
///
/// # Errors
/// [`Error::File`] naming one of them.
pub fn check_fresh(series: &Series) -> Result<()> {
    match series.any_older()? {
        None => Ok(()),
        Some(older) => Err(Error::file(
            older,
            "is left from an earlier run of this name; go on from it with --resume, move it away, or choose another -c",
        )),
    }
}

/// Loads the newest whole checkpoint of a run when there is one; says what it found in `notes`.
///
/// # Errors
/// [`Error::Usage`] when the run has changed and `force` is not given; [`Error::File`] when there are checkpoints but none
/// that is whole and holds moments.
pub fn find(
    series: &Series,
    run: &BTreeMap<String, String>,
    config: &GptConfig,
    force: bool,
    notes: &mut Vec<String>,
) -> Result<Option<Resumed>> {
    let Some(Resumed { weights, progress, run: before }) = newest(series, notes)? else {
        notes.push(format!("nothing to resume from: there is no {} yet; starting fresh", series.native().display()));
        return Ok(None);
    };
    let path = progress.file.display();
    if weights.config() != config {
        return Err(Error::usage(format!(
            "cannot resume from {path}: its model has other sizes or bandwidths ({:?}) than the one asked for ({config:?}); \
             give the sizes it was trained with, or start from it with -e",
            weights.config()
        )));
    }
    let changes = changes(&before, run);
    if !changes.is_empty() && !force {
        return Err(Error::usage(format!(
            "cannot resume from {path}: {}; restore these options, or give --force to go on with the new ones",
            changes.join(", ")
        )));
    }
    notes.push(format!("resuming after step {} from {path}", progress.step));
    notes.extend((!changes.is_empty()).then(|| format!("forced to change {}", changes.join(", "))));
    Ok(Some(Resumed { weights, progress, run: before }))
}

/// The newest checkpoint that is whole; each damaged one before it is noted. `None` when there are no checkpoints.
fn newest(series: &Series, notes: &mut Vec<String>) -> Result<Option<Resumed>> {
    let mut newest_error = None;
    for file in series.files()? {
        let loaded = checkpoint::load_with_moments(&file).and_then(|(checkpoint, moments)| {
            let progress = Progress::of(&file, &checkpoint.meta, moments)?;
            Ok(Resumed { weights: checkpoint.weights, progress, run: checkpoint.meta.extra })
        });
        match loaded {
            Err(error @ Error::File { .. }) => {
                notes.push(format!("{error}; looking for the checkpoint before it"));
                newest_error.get_or_insert(error);
            }
            loaded => return loaded.map(Some),
        }
    }
    newest_error.map_or(Ok(None), Err)
}

/// What differs between the run that wrote a checkpoint and this one, in words.
fn changes(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Vec<String> {
    let none = "nothing".to_string();
    let mut keys: Vec<_> = before.keys().filter(|key| key.starts_with(PREFIX)).chain(now.keys()).collect();
    keys.sort();
    keys.dedup();
    let change = |key: &&String| before.get(*key) != now.get(*key);
    let words = |key: &String| {
        let (before, now) = (before.get(key).unwrap_or(&none), now.get(key).unwrap_or(&none));
        format!("{} was {before} and is now {now}", key.trim_start_matches(PREFIX))
    };
    keys.into_iter().filter(change).map(words).collect()
}
