//! `--resume`: which options make a run what it is, and the checkpoint it goes on from.

use super::train_options::TrainOptions;
use crate::checkpoint::{self, Format};
use crate::config::GptConfig;
use crate::data::Loader;
use crate::error::{Error, Result};
use crate::train::{BATCHES_KEY, Progress};
use crate::weights::Weights;
use std::collections::BTreeMap;
use std::path::Path;

/// Options that change what a run computes. The number of steps is one only where the schedule depends on it.
const DECISIVE: [&str; 12] = [
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
    "seed",
];
/// What precedes their names in a checkpoint's metadata.
const PREFIX: &str = "run.";

/// Where a run goes on.
pub struct Resumed {
    /// The weights it had.
    pub weights: Weights,
    /// How far it had come.
    pub progress: Progress,
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

/// Loads the checkpoint at `path` when there is one; says what it found in `notes`.
///
/// # Errors
/// [`Error::Usage`] when the checkpoint is of llm.c's format, which has no room for moments, or when the run has changed
/// and `force` is not given; [`Error::File`] when it is damaged or holds no moments.
pub fn find(
    path: &Path,
    run: &BTreeMap<String, String>,
    config: &GptConfig,
    force: bool,
    notes: &mut Vec<String>,
) -> Result<Option<Resumed>> {
    if Format::of_path(path)? != Format::Safetensors {
        return Err(Error::usage(format!(
            "cannot resume from {}: llm.c's format has no room for moments; end the checkpoint's name in .safetensors",
            path.display()
        )));
    }
    if !path.exists() {
        notes.push(format!("nothing to resume from: there is no {} yet; starting fresh", path.display()));
        return Ok(None);
    }
    let (checkpoint, moments) = checkpoint::load_with_moments(path)?;
    if checkpoint.weights.config() != config {
        return Err(Error::usage(format!(
            "cannot resume from {}: its model has other sizes or bandwidths ({:?}) than the one asked for ({config:?}); \
             give the sizes it was trained with, or start from it with -e",
            path.display(),
            checkpoint.weights.config()
        )));
    }
    let changes = changes(&checkpoint.meta.extra, run);
    if !changes.is_empty() && !force {
        return Err(Error::usage(format!(
            "cannot resume from {}: {}; restore these options, or give --force to go on with the new ones",
            path.display(),
            changes.join(", ")
        )));
    }
    let (step, batches) = (checkpoint.meta.step, checkpoint.meta.extra.get(BATCHES_KEY));
    let Some(batches) = batches.and_then(|batches| batches.parse().ok()) else {
        return Err(Error::file(
            path,
            "does not say how far its run had come in the data; start from it with -e instead",
        ));
    };
    notes.push(format!("resuming after step {step} from {}", path.display()));
    notes.extend((!changes.is_empty()).then(|| format!("forced to change {}", changes.join(", "))));
    Ok(Some(Resumed { weights: checkpoint.weights, progress: Progress { step, batches, moments } }))
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
