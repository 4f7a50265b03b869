//! All runs of a sweep together: a table for each run, one over the seeds, as CSV and JSON.

use super::grid::{Layers, Pattern};
use super::outcome::{Facts, Measured, Status};
use crate::atomic::AtomicFile;
use crate::error::{Error, Result};
use crate::output::quoted;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// A table of the runs.
const RUNS_FILE: &str = "results.csv";
/// A table with a row for each group.
const GROUPS_FILE: &str = "summary.csv";
/// Both, and the settings that all runs share.
const JSON_FILE: &str = "results.json";

/// One run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What it is.
    #[serde(flatten)]
    pub facts: Facts,
    /// How far it has come.
    pub status: Status,
    /// Why it failed.
    pub error: Option<String>,
    /// What it showed, when it is done.
    #[serde(flatten)]
    pub measured: Option<Measured>,
}

/// Mean and spread of a quantity over the seeds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Standard deviation of the sample (n - 1); `None` for a single value.
    pub deviation: Option<f64>,
    /// The smallest.
    pub least: f64,
    /// The largest.
    pub most: f64,
}

impl Spread {
    /// Of these values; `None` when there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        if values.is_empty() {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let fold = |pick: fn(f64, f64) -> f64, start| values.iter().copied().fold(start, pick);
        Some(Self {
            mean,
            deviation: (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt()),
            least: fold(f64::min, f64::INFINITY),
            most: fold(f64::max, f64::NEG_INFINITY),
        })
    }
}

/// The runs that differ in their seed alone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Group {
    /// What they have in common: the first one's facts, its name and its seed aside.
    pub group: String,
    /// Which connections their MLPs keep.
    pub pattern: Pattern,
    /// The layers that are cut.
    pub layers: Option<Layers>,
    /// Weights of the MLPs that exist, as a share of 2 x C x 4C.
    pub mlp_density: f64,
    /// Parameters of the model.
    pub parameters: usize,
    /// Bytes of the parameters as stored in fp32.
    pub weight_bytes: usize,
    /// The learning rate.
    pub learning_rate: f64,
    /// Runs there are.
    pub runs: usize,
    /// Runs that are done: the figures are theirs.
    pub done: usize,
    /// Runs that failed.
    pub failed: usize,
    /// Validation loss at the end.
    pub val_loss: Option<Spread>,
    /// Mean tokens per second.
    pub tok_per_s: Option<f64>,
    /// Mean time of the steps.
    pub seconds: Option<f64>,
    /// Mean energy, of the runs that tell it.
    pub joules: Option<f64>,
}

impl Group {
    fn of(rows: &[&Row]) -> Self {
        let Facts { group, pattern, layers, mlp_density, parameters, weight_bytes, learning_rate, .. } = &rows[0].facts;
        let measured: Vec<&Measured> = rows.iter().filter_map(|row| row.measured.as_ref()).collect();
        let spread = |value: fn(&Measured) -> Option<f64>| {
            Spread::of(&measured.iter().filter_map(|run| value(run)).collect::<Vec<_>>())
        };
        Self {
            group: group.clone(),
            pattern: *pattern,
            layers: *layers,
            mlp_density: *mlp_density,
            parameters: *parameters,
            weight_bytes: *weight_bytes,
            learning_rate: *learning_rate,
            runs: rows.len(),
            done: measured.len(),
            failed: rows.iter().filter(|row| row.status == Status::Failed).count(),
            val_loss: spread(|run| Some(run.val_loss)),
            tok_per_s: spread(|run| Some(run.tok_per_s)).map(|spread| spread.mean),
            seconds: spread(|run| Some(run.seconds)).map(|spread| spread.mean),
            joules: spread(|run| run.energy.joules).map(|spread| spread.mean),
        }
    }
}

/// A sweep's runs with what came of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// The sweep's name.
    pub name: String,
    /// The options that all runs share, as text.
    pub settings: BTreeMap<String, String>,
    /// The runs, in the order of the grid.
    pub runs: Vec<Row>,
}

impl Results {
    /// The runs over their seeds, in the order of the grid.
    pub fn groups(&self) -> Vec<Group> {
        let mut groups: Vec<Vec<&Row>> = Vec::new();
        for row in &self.runs {
            match groups.iter_mut().find(|group| group[0].facts.group == row.facts.group) {
                Some(group) => group.push(row),
                None => groups.push(vec![row]),
            }
        }
        groups.iter().map(|rows| Group::of(rows)).collect()
    }

    /// The runs of this status.
    pub fn with(&self, status: Status) -> impl Iterator<Item = &Row> {
        self.runs.iter().filter(move |row| row.status == status)
    }

    /// Both tables and everything, as JSON.
    ///
    /// # Errors
    /// [`Error::Internal`] when they are no JSON.
    pub fn json(&self) -> Result<String> {
        let internal = |error: serde_json::Error| Error::Internal(format!("the results are no JSON: {error}"));
        let mut value = serde_json::to_value(self).map_err(internal)?;
        value["groups"] = serde_json::to_value(self.groups()).map_err(internal)?;
        serde_json::to_string_pretty(&value).map(|text| format!("{text}\n")).map_err(internal)
    }

    /// Reads the `results.json` that [`Results::write`] left in a folder.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] when it is none.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(JSON_FILE);
        let text = std::fs::read(&path).map_err(Error::io("open", &path))?;
        serde_json::from_slice(&text).map_err(|error| {
            let what = quoted(&error.to_string());
            Error::file(&path, format!("is not what a sweep wrote: {what}; name the folder of a sweep"))
        })
    }

    /// Writes `results.csv` (the runs), `summary.csv` (over the seeds) and `results.json` (both) into a folder.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, folder: &Path) -> Result<()> {
        let files = [
            (RUNS_FILE, table(&RUN_COLUMNS, &self.runs)?),
            (GROUPS_FILE, table(&GROUP_COLUMNS, &self.groups())?),
            (JSON_FILE, self.json()?.into_bytes()),
        ];
        files.into_iter().try_for_each(|(name, bytes)| {
            let mut file = AtomicFile::create(&folder.join(name))?;
            file.append(&bytes)?;
            file.seal()?.publish()
        })
    }
}

/// A column of a table: its name and what it holds, empty where nothing is known.
type Column<T> = (&'static str, fn(&T) -> String);

fn known<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

fn measured<T: ToString>(row: &Row, value: impl FnOnce(&Measured) -> T) -> String {
    known(row.measured.as_ref().map(value))
}

const RUN_COLUMNS: [Column<Row>; 34] = [
    ("name", |row| row.facts.name.clone()),
    ("group", |row| row.facts.group.clone()),
    ("pattern", |row| row.facts.pattern.name().to_string()),
    ("layers", |row| known(row.facts.layers.map(Layers::name))),
    ("fc1_bandwidth", |row| row.facts.fc1_bandwidth.to_string()),
    ("fc2_bandwidth", |row| row.facts.fc2_bandwidth.to_string()),
    ("mlp_width", |row| row.facts.mlp_width.to_string()),
    ("fc1_density", |row| row.facts.fc1_density.to_string()),
    ("fc2_density", |row| row.facts.fc2_density.to_string()),
    ("mlp_density", |row| row.facts.mlp_density.to_string()),
    ("mlp_weights", |row| row.facts.mlp_weights.to_string()),
    ("parameters", |row| row.facts.parameters.to_string()),
    ("weight_bytes", |row| row.facts.weight_bytes.to_string()),
    ("learn_every", |row| known(row.facts.learn.map(|rule| rule.every))),
    ("learn_fraction", |row| known(row.facts.learn.map(|rule| rule.fraction))),
    ("learn_until", |row| known(row.facts.learn.map(|rule| rule.until))),
    ("learning_rate", |row| row.facts.learning_rate.to_string()),
    ("seed", |row| row.facts.seed.to_string()),
    ("status", |row| row.status.name().to_string()),
    ("val_loss", |row| measured(row, |run| run.val_loss)),
    ("best_val_loss", |row| measured(row, |run| run.best_val_loss)),
    ("train_loss", |row| measured(row, |run| run.train_loss)),
    ("steps", |row| measured(row, |run| run.steps)),
    ("tokens", |row| measured(row, |run| run.tokens)),
    ("tok_per_s", |row| measured(row, |run| run.tok_per_s)),
    ("seconds", |row| measured(row, |run| run.seconds)),
    ("wall_seconds", |row| known(row.measured.as_ref().and_then(|run| run.wall_seconds))),
    ("joules", |row| known(row.measured.as_ref().and_then(|run| run.energy.joules))),
    ("joules_note", |row| known(row.measured.as_ref().and_then(|run| run.energy.joules_note.clone()))),
    ("memory_bytes", |row| measured(row, |run| run.memory_bytes)),
    ("device", |row| measured(row, |run| run.device.clone())),
    ("version", |row| measured(row, |run| run.version.clone())),
    ("error", |row| known(row.error.clone())),
    ("run", |row| format!("runs/{}", row.facts.name)),
];

const GROUP_COLUMNS: [Column<Group>; 17] = [
    ("group", |group| group.group.clone()),
    ("pattern", |group| group.pattern.name().to_string()),
    ("layers", |group| known(group.layers.map(Layers::name))),
    ("mlp_density", |group| group.mlp_density.to_string()),
    ("parameters", |group| group.parameters.to_string()),
    ("weight_bytes", |group| group.weight_bytes.to_string()),
    ("learning_rate", |group| group.learning_rate.to_string()),
    ("runs", |group| group.runs.to_string()),
    ("done", |group| group.done.to_string()),
    ("failed", |group| group.failed.to_string()),
    ("val_loss_mean", |group| known(group.val_loss.map(|loss| loss.mean))),
    ("val_loss_deviation", |group| known(group.val_loss.and_then(|loss| loss.deviation))),
    ("val_loss_least", |group| known(group.val_loss.map(|loss| loss.least))),
    ("val_loss_most", |group| known(group.val_loss.map(|loss| loss.most))),
    ("tok_per_s", |group| known(group.tok_per_s)),
    ("seconds", |group| known(group.seconds)),
    ("joules", |group| known(group.joules)),
];

/// Rows as CSV.
fn table<T>(columns: &[Column<T>], rows: &[T]) -> Result<Vec<u8>> {
    let internal = |error: String| Error::Internal(format!("the results are no CSV: {error}"));
    let mut writer = csv::Writer::from_writer(Vec::new());
    let mut lines = vec![columns.iter().map(|(name, _)| name.to_string()).collect::<Vec<_>>()];
    lines.extend(rows.iter().map(|row| columns.iter().map(|(_, value)| value(row)).collect()));
    for line in lines {
        writer.write_record(line).map_err(|error| internal(error.to_string()))?;
    }
    writer.into_inner().map_err(|error| internal(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_the_samples() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[2.0]).unwrap().deviation, None);
        let spread = Spread::of(&[1.0, 2.0, 6.0]).unwrap();
        assert_eq!((spread.mean, spread.deviation, spread.least, spread.most), (3.0, Some(7f64.sqrt()), 1.0, 6.0));
    }
}
