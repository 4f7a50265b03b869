//! What a training reports while it runs: a live line or plain lines, a JSON-lines file, and the experiment's log.

use crate::atomic::AtomicFile;
use crate::error::{Error, Result};
use crate::output::{grouped, loss};
use crate::say;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One step, as `--metrics` writes it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepRecord {
    /// Counts from 1.
    pub step: u64,
    /// Mean loss of the step's batch before its update.
    pub train_loss: f32,
    /// Learning rate of the update.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f32,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Tokens per second in this step.
    pub tok_per_s: f64,
    /// Milliseconds of this step.
    pub step_ms: f64,
    /// Why its update was left out, if it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

/// One validation, as `--metrics` writes it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ValRecord {
    /// Steps done; 0 is before training.
    pub step: u64,
    /// Mean loss over the validation batches.
    pub val_loss: f32,
}

/// A file that grows by whole lines.
struct LineFile {
    path: PathBuf,
    file: File,
}

impl LineFile {
    fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(Error::io("create", path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Goes on with a file after `step`: later lines, and whatever a crash left of one, are dropped.
    fn resume(path: &Path, step: u64, step_of: fn(&str) -> Option<u64>) -> Result<Self> {
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
        let file = File::options().append(true).open(path).map_err(Error::io("open", path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// One write a line, so that a reader, or a crash, never sees half of one.
    fn line(&mut self, line: &str) -> Result<()> {
        self.file.write_all(format!("{line}\n").as_bytes()).map_err(Error::io("write", &self.path))
    }
}

/// Sends what happens to everyone who asked for it.
pub struct Reporter {
    steps: u64,
    quiet: bool,
    bar: Option<ProgressBar>,
    metrics: Option<LineFile>,
    log: Option<LineFile>,
}

impl Reporter {
    /// A reporter for `steps` steps. On a terminal there is a live line, in a pipe a line for each step, with `quiet`
    /// neither. `metrics` receives JSON lines, `log` llm.c's log format (`s:STEP trl:LOSS` and `s:STEP tel:LOSS`).
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be created.
    pub fn new(steps: u64, quiet: bool, metrics: Option<&Path>, log: Option<&Path>) -> Result<Self> {
        let (metrics, log) = (metrics.map(LineFile::create).transpose()?, log.map(LineFile::create).transpose()?);
        Ok(Self::over(steps, quiet, metrics, log))
    }

    /// The same for a run that goes on after `step`: the files keep their records up to there.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read or written.
    pub fn resume(steps: u64, quiet: bool, metrics: Option<&Path>, log: Option<&Path>, step: u64) -> Result<Self> {
        let metrics = metrics.map(|path| LineFile::resume(path, step, step_of_record)).transpose()?;
        let log = log.map(|path| LineFile::resume(path, step, step_of_log)).transpose()?;
        Ok(Self::over(steps, quiet, metrics, log))
    }

    fn over(steps: u64, quiet: bool, metrics: Option<LineFile>, log: Option<LineFile>) -> Self {
        let live = !quiet && std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        let bar = live.then(|| {
            let bar = ProgressBar::new(steps);
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg} ETA {eta}");
            bar.set_style(style.expect("the template is well formed"));
            bar
        });
        Self { steps, quiet, bar, metrics, log }
    }

    /// A step is done.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn step(&mut self, record: &StepRecord) -> Result<()> {
        let StepRecord { step, train_loss, lr, grad_norm, tok_per_s, step_ms, skipped, .. } = record;
        if let Some(file) = &mut self.metrics {
            file.line(&json(record)?)?;
        }
        if let Some(file) = &mut self.log {
            file.line(&format!("s:{step} trl:{}", loss(*train_loss)))?;
        }
        let rate = grouped(*tok_per_s as usize);
        if let Some(bar) = &self.bar {
            bar.set_position(*step);
            bar.set_message(format!("loss {}  norm {grad_norm:.3}  lr {lr:.2e}  {rate} tok/s", loss(*train_loss)));
        } else if !self.quiet {
            let eta = Duration::from_secs_f64((step_ms / 1e3 * (self.steps - step) as f64).clamp(0.0, 1e9));
            say!(
                "step {step:>width$}/{} | train loss {} | norm {grad_norm:.4} | lr {lr:.3e} | \
                 {step_ms:.0} ms | {rate} tok/s | ETA {}",
                self.steps,
                loss(*train_loss),
                indicatif::FormattedDuration(Duration::from_secs(eta.as_secs())),
                width = self.steps.to_string().len(),
            )?;
        }
        match skipped {
            Some(reason) => self.note(&format!("step {step}/{} | update skipped: {reason}", self.steps)),
            None => Ok(()),
        }
    }

    /// A validation is done.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn validation(&mut self, record: &ValRecord) -> Result<()> {
        let ValRecord { step, val_loss } = record;
        if let Some(file) = &mut self.metrics {
            file.line(&json(record)?)?;
        }
        if let Some(file) = &mut self.log {
            file.line(&format!("s:{step} tel:{}", loss(*val_loss)))?;
        }
        self.note(&format!("step {step}/{} | validation loss {}", self.steps, loss(*val_loss)))
    }

    /// A line for the user, above the live line.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn note(&mut self, text: &str) -> Result<()> {
        match &self.bar {
            _ if self.quiet => Ok(()),
            Some(bar) => bar.suspend(|| say!("{text}")),
            None => say!("{text}"),
        }
    }

    /// The training is over: removes the live line.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// The step of a line of `--metrics`.
fn step_of_record(line: &str) -> Option<u64> {
    serde_json::from_str::<serde_json::Value>(line).ok()?.get("step")?.as_u64()
}

/// The step of a line of llm.c's log: `s:STEP ...`.
fn step_of_log(line: &str) -> Option<u64> {
    line.strip_prefix("s:")?.split(' ').next()?.parse().ok()
}

fn json(record: &impl Serialize) -> Result<String> {
    serde_json::to_string(record).map_err(|error| Error::Internal(format!("a metrics record is not JSON: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_receive_one_line_for_each_event() {
        let folder = tempfile::tempdir().unwrap();
        let (metrics, log) = (folder.path().join("m.jsonl"), folder.path().join("log.txt"));
        let mut reporter = Reporter::new(10, true, Some(&metrics), Some(&log)).unwrap();
        reporter.validation(&ValRecord { step: 0, val_loss: 5.5 }).unwrap();
        let record = StepRecord {
            step: 1,
            train_loss: 5.25,
            lr: 3e-4,
            grad_norm: 2.0,
            tokens: 128,
            tok_per_s: 1000.0,
            step_ms: 128.0,
            skipped: None,
        };
        reporter.step(&record).unwrap();
        let lines = std::fs::read_to_string(metrics).unwrap();
        let mut lines = lines.lines();
        assert_eq!(lines.next().unwrap(), r#"{"step":0,"val_loss":5.5}"#);
        let step: serde_json::Value = serde_json::from_str(lines.next().unwrap()).unwrap();
        assert_eq!((step["train_loss"].as_f64(), step["tokens"].as_u64()), (Some(5.25), Some(128)));
        assert_eq!(std::fs::read_to_string(log).unwrap(), "s:0 tel:5.500000\ns:1 trl:5.250000\n");
    }

    #[test]
    fn a_file_that_cannot_be_created_is_named() {
        let error = Reporter::new(1, true, Some(Path::new("/no/such/folder/m.jsonl")), None).err().unwrap();
        assert!(error.to_string().contains("/no/such/folder/m.jsonl"), "{error}");
    }
}
