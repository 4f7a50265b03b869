//! The file of a sweep: the training that all runs share, and the grids of what they differ in.

use super::device::{BackendName, Precision};
use super::parse;
use super::train_options::{TrainOptions, parse_toml, read_text};
use crate::error::{Error, Result};
use crate::optim::Recipe;
use crate::sweep::{Grid, Point};
use clap::builder::NonEmptyStringValueParser;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::path::Path;

/// Options that a sweep decides, with what decides them.
const DECIDED: [(&str, &str); 12] = [
    ("init", "every run starts from fresh weights"),
    ("fc1-bandwidth", "list it as bandwidth under [[grid]]"),
    ("fc2-bandwidth", "list it as bandwidth under [[grid]]"),
    ("mlp-width", "list \"small-dense\" as a pattern under [[grid]]"),
    ("dense", "list \"dense\" as a pattern under [[grid]]"),
    ("seed", "list it under [[grid]]"),
    ("run", "every run has a folder of its own under --output"),
    ("checkpoint", "every run has a folder of its own under --output"),
    ("metrics", "every run has a folder of its own under --output"),
    ("log", "every run has a folder of its own under --output"),
    ("resume", "a sweep always goes on where it was"),
    ("quiet", "send standard output elsewhere instead"),
];

/// A sweep's file, read and checked.
pub struct SweepFile {
    /// What results and report call it.
    pub name: String,
    /// Whether runs keep their checkpoints once they are done.
    pub keep_checkpoints: bool,
    /// The options that all runs share, those of the command line included.
    pub train: TrainOptions,
    /// What the runs differ in.
    pub points: Vec<Point>,
}

/// The file as it is written.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Written<G> {
    name: Option<String>,
    #[serde(default = "yes")]
    keep_checkpoints: bool,
    #[serde(default)]
    train: TrainOptions,
    grid: G,
}

fn yes() -> bool {
    true
}

/// Options of the command line that win over those of the file.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "In place of the file's [train]")]
pub struct Overrides {
    /// Sizes and defaults
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Optimizer settings by name
    #[arg(long, value_enum, value_name = "NAME")]
    recipe: Option<Recipe>,
    /// Training token files (path or glob)
    #[arg(long, short = 'i', value_parser = NonEmptyStringValueParser::new(), value_name = "FILES")]
    train_data: Option<String>,
    /// Validation token files (path or glob)
    #[arg(long, short = 'j', value_parser = NonEmptyStringValueParser::new(), value_name = "FILES")]
    val_data: Option<String>,
    /// Optimizer steps
    #[arg(long, short = 'n', value_parser = parse::positive_steps, value_name = "N", allow_negative_numbers = true)]
    steps: Option<u64>,
    /// Sequences per batch
    #[arg(long, short = 'b', value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    batch_size: Option<usize>,
    /// Tokens per sequence
    #[arg(long, short = 't', value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    seq_len: Option<usize>,
    /// Steps between validations
    #[arg(long, short = 'v', value_parser = parse::positive_steps, value_name = "N", allow_negative_numbers = true)]
    val_every: Option<u64>,
    /// Most batches of a validation, 0 is all
    #[arg(long, short = 'm', value_parser = parse::count, value_name = "N", allow_negative_numbers = true)]
    val_batches: Option<usize>,
    /// Where to compute
    #[arg(long, value_enum, value_name = "NAME")]
    backend: Option<BackendName>,
    /// wgpu: the adapter, by its index or a part of its name
    #[arg(long, value_name = "NAME|INDEX")]
    adapter: Option<String>,
    /// How to compute
    #[arg(long, value_enum, value_name = "NAME")]
    precision: Option<Precision>,
}

impl Overrides {
    fn options(self) -> TrainOptions {
        TrainOptions {
            preset: self.preset,
            recipe: self.recipe,
            train_data: self.train_data,
            val_data: self.val_data,
            steps: self.steps,
            batch_size: self.batch_size,
            seq_len: self.seq_len,
            val_every: self.val_every,
            val_batches: self.val_batches,
            backend: self.backend,
            adapter: self.adapter,
            precision: self.precision,
            ..TrainOptions::default()
        }
    }
}

impl SweepFile {
    /// Reads a sweep's file; the command line wins over its options.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] saying what does not belong into it, or makes no sweep.
    pub fn read(path: &Path, overrides: Overrides) -> Result<Self> {
        let text = read_text(path)?;
        // A single grid may do without its second pair of brackets.
        let several =
            text.parse::<toml::Table>().is_ok_and(|table| table.get("grid").is_some_and(toml::Value::is_array));
        let written = match several {
            true => written::<Vec<Grid>>(path, &text)?,
            false => {
                let Written { name, keep_checkpoints, train, grid } = written::<Grid>(path, &text)?;
                Written { name, keep_checkpoints, train, grid: vec![grid] }
            }
        };
        let fault = |what: String| Error::file(path, what);
        written.train.check(path)?;
        check_shared(&written.train).map_err(fault)?;
        let train = overrides.options().or(written.train);
        let points = points(&written.grid).map_err(fault)?;
        if train.val_every == Some(0) {
            return Err(fault(
                "[train] sets val-every = 0, but a sweep compares validation losses; leave it out".into(),
            ));
        }
        if train.train_data.is_some() && train.val_data.is_none() {
            return Err(fault("[train] names train-data, but not the val-data by which a sweep compares runs".into()));
        }
        if train.learning_rate.is_some() && written.grid.iter().any(|grid| !grid.learning_rate.is_empty()) {
            return Err(fault("[train] and [[grid]] both give learning-rate; leave one of them out".into()));
        }
        check_learning(&train, &written.grid, &points).map_err(fault)?;
        let stem = || path.file_stem().map_or_else(|| "sweep".into(), |stem| stem.to_string_lossy().into_owned());
        let name = written.name.unwrap_or_else(stem);
        Ok(Self { name, keep_checkpoints: written.keep_checkpoints, train, points })
    }
}

fn written<G: DeserializeOwned>(path: &Path, text: &str) -> Result<Written<G>> {
    parse_toml(path, text, "a sweep has [train] with training's options and [[grid]] with what varies")
}

/// Refuses options that a sweep decides.
fn check_shared(train: &TrainOptions) -> std::result::Result<(), String> {
    let table = toml::Table::try_from(train).map_err(|error| error.to_string())?;
    match DECIDED.into_iter().find(|(key, _)| table.contains_key(*key)) {
        Some((key, why)) => Err(format!("[train] sets {key}, but {why}")),
        None => Ok(()),
    }
}

/// Refuses options about learned blocks where no run has any, or where a grid varies them.
fn check_learning(train: &TrainOptions, grids: &[Grid], points: &[Point]) -> std::result::Result<(), String> {
    let Some(given) = train.learning() else { return Ok(()) };
    if !points.iter().any(|point| point.pattern.is_learned()) {
        return Err(format!("[train] sets {given}, but no grid has the pattern learned or learned-band; leave it out"));
    }
    let twice = [
        ("learn-every", train.learn_every.is_some(), grids.iter().any(|grid| !grid.learn_every.is_empty())),
        ("learn-fraction", train.learn_fraction.is_some(), grids.iter().any(|grid| !grid.learn_fraction.is_empty())),
        ("learn-until", train.learn_until.is_some(), grids.iter().any(|grid| !grid.learn_until.is_empty())),
    ];
    match twice.into_iter().find(|(_, shared, varied)| *shared && *varied) {
        Some((key, ..)) => Err(format!("[train] and [[grid]] both give {key}; leave one of them out")),
        None => Ok(()),
    }
}

/// The points of all grids; one that several of them have counts once.
fn points(grids: &[Grid]) -> std::result::Result<Vec<Point>, String> {
    let mut points: Vec<Point> = Vec::new();
    for (index, grid) in grids.iter().enumerate() {
        let more = grid.points().map_err(|what| match grids.len() {
            1 => format!("[[grid]]: {what}"),
            _ => format!("[[grid]] number {}: {what}", index + 1),
        })?;
        for point in more {
            if !points.contains(&point) {
                points.push(point);
            }
        }
    }
    match points.is_empty() {
        true => Err("has no [[grid]], so there is nothing to run".to_string()),
        false => Ok(points),
    }
}
