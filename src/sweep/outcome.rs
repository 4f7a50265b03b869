//! One run of a sweep: what it is, and what came of it.

use super::grid::{Layers, Pattern, Point};
use crate::atomic::AtomicFile;
use crate::bandwidths::Bandwidths;
use crate::config::GptConfig;
use crate::error::{Error, Result};
use crate::learn::LearnRule;
use crate::output::quoted;
use crate::plot::{Curve, Run};
use crate::shapes::{Param, ParamTable};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The file in a run's folder that says that the run is over.
const OUTCOME_FILE: &str = "outcome.json";

/// What a run is, known before it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Its name and its folder's.
    pub name: String,
    /// What it has in common with the runs of other seeds.
    pub group: String,
    /// Which connections its MLPs keep.
    pub pattern: Pattern,
    /// The layers that are cut, `None` when dense.
    pub layers: Option<Layers>,
    /// Bandwidths of FC1, 0 is dense.
    pub fc1_bandwidth: Bandwidths,
    /// Bandwidths of FC2, 0 is dense.
    pub fc2_bandwidth: Bandwidths,
    /// C, the model's channels.
    pub channels: usize,
    /// L, the model's blocks.
    pub num_layers: usize,
    /// W, the MLP's width.
    pub mlp_width: usize,
    /// Weights of FC1 that exist, as a share of C x 4C.
    pub fc1_density: f64,
    /// Weights of FC2 that exist, as a share of 4C x C.
    pub fc2_density: f64,
    /// Weights of both, as a share of 2 x C x 4C.
    pub mlp_density: f64,
    /// Weights of FC1 and FC2 in all layers, without biases.
    pub mlp_weights: usize,
    /// Parameters of the model, exact counts without any padding.
    pub parameters: usize,
    /// Bytes of the parameters as they are stored in fp32, packed, with their padding.
    pub weight_bytes: usize,
    /// When learned blocks are exchanged; `None` when there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learn: Option<LearnRule>,
    /// The learning rate at its peak.
    pub learning_rate: f64,
    /// The seed of weights, batch order and samples.
    pub seed: u64,
}

impl Facts {
    /// The facts of a point of a grid whose model has these sizes and learns its blocks by this rule, if any.
    ///
    /// # Errors
    /// Sizes that do not fit each other.
    pub fn new(point: &Point, config: &GptConfig, learn: Option<LearnRule>, learning_rate: f64) -> Result<Self> {
        let table = ParamTable::new(config)?;
        let weights = |param| table.weights(config, param);
        let (fc1, fc2) = (weights(Param::Fcw), weights(Param::Fcprojw));
        let whole = (config.num_layers * config.channels * config.full_mlp_width()) as f64;
        Ok(Self {
            name: point.name(),
            group: point.group(),
            pattern: point.pattern,
            layers: point.cut.as_ref().map(|(layers, _)| *layers),
            fc1_bandwidth: config.fc1_bandwidth,
            fc2_bandwidth: config.fc2_bandwidth,
            channels: config.channels,
            num_layers: config.num_layers,
            mlp_width: config.mlp_width(),
            fc1_density: fc1 as f64 / whole,
            fc2_density: fc2 as f64 / whole,
            mlp_density: (fc1 + fc2) as f64 / (2.0 * whole),
            mlp_weights: fc1 + fc2,
            parameters: table.count(config),
            weight_bytes: table.len() * size_of::<f32>(),
            learn,
            learning_rate,
            seed: point.seed,
        })
    }
}

/// How far a run has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It has not begun.
    New,
    /// It was interrupted.
    Begun,
    /// It ended as it should.
    Done,
    /// It ended with an error.
    Failed,
}

impl Status {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Status::New => "new",
            Status::Begun => "begun",
            Status::Done => "done",
            Status::Failed => "failed",
        }
    }
}

/// Joules, or why they are not known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Energy {
    /// Energy of the whole card from the run's start to its end, validations and samples included.
    pub joules: Option<f64>,
    /// Why it is not known, where it is not.
    pub joules_note: Option<String>,
}

impl From<std::result::Result<f64, String>> for Energy {
    fn from(joules: std::result::Result<f64, String>) -> Self {
        match joules {
            Ok(joules) => Self { joules: Some(joules), joules_note: None },
            Err(why) => Self { joules: None, joules_note: Some(why) },
        }
    }
}

/// What a finished run showed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Validation loss after the last step.
    pub val_loss: f64,
    /// The smallest validation loss of all.
    pub best_val_loss: f64,
    /// Mean training loss of the last tenth of the steps.
    pub train_loss: f64,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Median over the steps.
    pub tok_per_s: f64,
    /// Time of all steps together, without validations, samples and checkpoints.
    pub seconds: f64,
    /// Time from the start to the end; `None` when the run was interrupted in between.
    pub wall_seconds: Option<f64>,
    /// Energy.
    #[serde(flatten)]
    pub energy: Energy,
    /// Bytes of device memory that the training was estimated to take.
    pub memory_bytes: usize,
    /// The learned blocks in the end, by tensor, as [`crate::blocks::Blocks::to_text`] writes them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub blocks: BTreeMap<String, String>,
    /// The device and its arithmetic.
    pub device: String,
    /// The program.
    pub version: String,
}

impl Measured {
    /// What the metrics of a run's folder tell of `steps` steps of `step_tokens` tokens; the rest is left empty.
    ///
    /// # Errors
    /// Metrics that cannot be read, or that lack the last step or the validation after it.
    pub fn of_metrics(folder: &Path, steps: u64, step_tokens: u64) -> Result<Self> {
        let run = Run::read(folder)?;
        let lacks = |what: &str| Error::file(folder.join("metrics.jsonl"), format!("lacks {what} step {steps}"));
        let val_loss = *run.val_loss.get(&steps).ok_or_else(|| lacks("a validation after"))?;
        let last: Vec<f64> = run.train_loss.range(steps - steps.div_ceil(10) + 1..).map(|(_, &loss)| loss).collect();
        if run.step_ms.len() as u64 != steps || last.is_empty() {
            return Err(lacks("steps up to"));
        }
        Ok(Self {
            val_loss,
            best_val_loss: run.val_loss.values().copied().fold(f64::INFINITY, f64::min),
            train_loss: last.iter().sum::<f64>() / last.len() as f64,
            steps,
            tokens: steps * step_tokens,
            tok_per_s: median(&run.tok_per_s),
            seconds: run.step_ms.values().sum::<f64>() / 1e3,
            wall_seconds: None,
            energy: Energy { joules: None, joules_note: None },
            memory_bytes: 0,
            blocks: BTreeMap::new(),
            device: String::new(),
            version: String::new(),
        })
    }
}

fn median(curve: &Curve) -> f64 {
    let mut values: Vec<f64> = curve.values().copied().collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        len => (values[(len - 1) / 2] + values[len / 2]) / 2.0,
    }
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It ended as it should.
    Done(Measured),
    /// It ended with this sentence.
    Failed(String),
}

impl Outcome {
    /// Reads the outcome of the run in a folder, `None` when it is not over.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] when the file is no outcome.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = outcome_file(folder);
        let text = match std::fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            text => text.map_err(Error::io("read", &path))?,
        };
        serde_json::from_slice(&text).map(Some).map_err(|error| {
            let what = quoted(&error.to_string());
            Error::file(
                &path,
                format!("is not what a sweep wrote: {what}; remove it, and the run goes on or starts again"),
            )
        })
    }

    /// Writes the outcome of the run in a folder, which is over from then on.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, folder: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|error| Error::Internal(error.to_string()))?;
        let mut file = AtomicFile::create(&outcome_file(folder))?;
        file.append(format!("{text}\n").as_bytes())?;
        file.seal()?.publish()
    }

    /// Forgets the outcome of the run in a folder, which is not over any more.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(folder: &Path) -> Result<()> {
        let path = outcome_file(folder);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", &path)(error)),
            _ => Ok(()),
        }
    }
}

fn outcome_file(folder: &Path) -> PathBuf {
    folder.join(OUTCOME_FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_become_measurements() {
        let folder = tempfile::tempdir().unwrap();
        let step = |step: u64, loss: f64, ms: f64| {
            format!("{{\"step\":{step},\"train_loss\":{loss},\"tok_per_s\":{},\"step_ms\":{ms}}}\n", 1e3 * 8.0 / ms)
        };
        let metrics = format!(
            "{{\"step\":0,\"val_loss\":5.0}}\n{}{}{}{{\"step\":3,\"val_loss\":2.5}}\n",
            step(1, 4.0, 100.0),
            step(2, 3.0, 10.0),
            step(3, 2.0, 12.0)
        );
        std::fs::write(folder.path().join("metrics.jsonl"), metrics).unwrap();
        let measured = Measured::of_metrics(folder.path(), 3, 8).unwrap();
        assert_eq!((measured.val_loss, measured.best_val_loss, measured.train_loss), (2.5, 2.5, 2.0));
        assert_eq!((measured.tokens, measured.seconds), (24, 0.122));
        assert!((measured.tok_per_s - 8.0 / 0.012).abs() < 1e-9, "{}", measured.tok_per_s);
        let words = Measured::of_metrics(folder.path(), 4, 8).unwrap_err().to_string();
        assert!(words.ends_with("metrics.jsonl: lacks a validation after step 4"), "{words}");
    }

    #[test]
    fn an_outcome_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Outcome::read(folder.path()).unwrap(), None);
        let failed = Outcome::Failed("the training diverged".to_string());
        failed.write(folder.path()).unwrap();
        assert_eq!(Outcome::read(folder.path()).unwrap(), Some(failed));
        std::fs::write(folder.path().join(OUTCOME_FILE), "{\"done\": 3}").unwrap();
        assert!(Outcome::read(folder.path()).unwrap_err().to_string().contains("is not what a sweep wrote"));
        Outcome::remove(folder.path()).unwrap();
        assert_eq!(Outcome::read(folder.path()).unwrap(), None);
        Outcome::remove(folder.path()).unwrap();
    }
}
