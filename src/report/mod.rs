//! What a training reports while it runs: a live line, plain lines or a dashboard; JSON lines, llm.c's log and TensorBoard's
//! event files.

mod dashboard;
mod events;
mod lines;
mod load;

pub use dashboard::restore as restore_terminal;
pub use lines::LineFile;

use crate::error::Result;
use crate::output::{grouped, loss};
use crate::say;
use dashboard::Dashboard;
use events::EventFile;
use indicatif::{ProgressBar, ProgressStyle};
use lines::{step_of_log, step_of_record};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
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

/// One exchange of learned blocks, as `--metrics` writes it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExchangeRecord {
    /// Steps done.
    pub step: u64,
    /// The share of blocks that was dropped; some of these may have come back at once.
    pub learn_fraction: f64,
    /// Blocks that are others than before, by tensor.
    pub exchanged: BTreeMap<String, usize>,
    /// Learned blocks of all tensors.
    #[serde(skip)]
    pub learned: usize,
}

impl ExchangeRecord {
    /// Blocks of all tensors that are others than before.
    pub fn count(&self) -> usize {
        self.exchanged.values().sum()
    }
}

/// A text that the model made up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SampleRecord {
    /// Steps done.
    pub step: u64,
    /// The text.
    pub sample: String,
}

/// What standard output shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Show {
    /// Nothing.
    Nothing,
    /// A live line on a terminal, a line for each step in a pipe.
    Lines,
    /// As lines, but in a pipe without one for each step, and nowhere the samples: one run among many.
    Brief,
    /// The whole terminal.
    Dashboard,
}

/// Files that receive reports, those that are asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReportFiles {
    /// JSON lines: steps and validations.
    pub metrics: Option<PathBuf>,
    /// llm.c's log format: `s:STEP trl:LOSS` and `s:STEP tel:LOSS`.
    pub log: Option<PathBuf>,
    /// JSON lines: samples.
    pub samples: Option<PathBuf>,
    /// The folder of TensorBoard's event files.
    pub events: Option<PathBuf>,
}

/// What a reporter does with standard output.
enum Screen {
    Nothing,
    Lines,
    Notes,
    Bar(ProgressBar),
    Dashboard(Dashboard),
}

impl Screen {
    fn new(show: Show, steps: u64, device: &str) -> Result<Self> {
        Ok(match show {
            Show::Nothing => Screen::Nothing,
            Show::Dashboard => Screen::Dashboard(Dashboard::start(steps, device)?),
            Show::Lines | Show::Brief if std::io::stdout().is_terminal() && std::io::stderr().is_terminal() => {
                let bar = ProgressBar::new(steps);
                let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg} ETA {eta}");
                bar.set_style(style.expect("the template is well formed"));
                Screen::Bar(bar)
            }
            Show::Lines => Screen::Lines,
            Show::Brief => Screen::Notes,
        })
    }
}

/// Files that are open.
#[derive(Default)]
struct OpenFiles {
    metrics: Option<LineFile>,
    log: Option<LineFile>,
    samples: Option<LineFile>,
    events: Option<EventFile>,
}

impl OpenFiles {
    fn new(files: &ReportFiles, after: Option<u64>) -> Result<Self> {
        let open = |path: &Option<PathBuf>, step_of| {
            path.as_deref().map(|path| match after {
                None => LineFile::create(path),
                Some(step) => LineFile::resume(path, step, step_of),
            })
        };
        let events = files.events.as_deref().map(|folder| EventFile::create(folder, after.unwrap_or(0)));
        Ok(Self {
            metrics: open(&files.metrics, step_of_record).transpose()?,
            log: open(&files.log, step_of_log).transpose()?,
            samples: open(&files.samples, step_of_record).transpose()?,
            events: events.transpose()?,
        })
    }
}

/// What a run does when it has the first thing to report.
type Begin = Box<dyn FnOnce() -> Result<()>>;

/// Sends what happens to everyone who asked for it.
pub struct Reporter {
    steps: u64,
    brief: bool,
    screen: Screen,
    /// What is to be opened by the first report.
    waiting: Option<(ReportFiles, Option<u64>, Begin)>,
    files: OpenFiles,
}

impl Reporter {
    /// A reporter for `steps` steps on the device that is described. A run that goes on `after` a step keeps what its files
    /// tell up to there; any other begins them anew. That happens with the first report, just before `begin`: a training that
    /// ends before, for want of memory say, leaves the files of an earlier one as they are.
    ///
    /// # Errors
    /// A terminal that cannot be drawn on.
    pub fn new(
        steps: u64,
        show: Show,
        device: &str,
        files: &ReportFiles,
        after: Option<u64>,
        begin: impl FnOnce() -> Result<()> + 'static,
    ) -> Result<Self> {
        let waiting = Some((files.clone(), after, Box::new(begin) as Begin));
        Ok(Self {
            steps,
            brief: show == Show::Brief,
            screen: Screen::new(show, steps, device)?,
            waiting,
            files: OpenFiles::default(),
        })
    }

    /// The files, opened when they are asked for first.
    fn files(&mut self) -> Result<&mut OpenFiles> {
        if let Some((files, after, begin)) = self.waiting.take() {
            self.files = OpenFiles::new(&files, after)?;
            begin()?;
        }
        Ok(&mut self.files)
    }

    /// A step is done.
    ///
    /// # Errors
    /// A file cannot be opened or written.
    pub fn step(&mut self, record: &StepRecord) -> Result<()> {
        let StepRecord { step, train_loss, lr, grad_norm, tok_per_s, step_ms, skipped, .. } = record;
        let files = self.files()?;
        if let Some(file) = &mut files.metrics {
            file.json(record)?;
        }
        if let Some(file) = &mut files.log {
            file.line(&format!("s:{step} trl:{}", loss(*train_loss)))?;
        }
        if let Some(file) = &mut files.events {
            let (loss, norm) = (f64::from(*train_loss), f64::from(*grad_norm));
            let rate = ("tokens_per_second", *tok_per_s);
            file.scalars(*step, &[("loss/train", loss), ("learning_rate", *lr), ("gradient_norm", norm), rate])?;
        }
        let rate = grouped(*tok_per_s as usize);
        match &self.screen {
            Screen::Nothing | Screen::Notes => {}
            Screen::Dashboard(dashboard) => dashboard.step(record),
            Screen::Bar(bar) => {
                bar.set_position(*step);
                bar.set_message(format!("loss {}  norm {grad_norm:.3}  lr {lr:.2e}  {rate} tok/s", loss(*train_loss)));
            }
            Screen::Lines => {
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
        }
        match skipped {
            Some(reason) => self.note(&format!("step {step}/{} | update skipped: {reason}", self.steps)),
            None => Ok(()),
        }
    }

    /// A validation is done.
    ///
    /// # Errors
    /// A file cannot be opened or written.
    pub fn validation(&mut self, record: &ValRecord) -> Result<()> {
        let ValRecord { step, val_loss } = record;
        let files = self.files()?;
        if let Some(file) = &mut files.metrics {
            file.json(record)?;
        }
        if let Some(file) = &mut files.log {
            file.line(&format!("s:{step} tel:{}", loss(*val_loss)))?;
        }
        if let Some(file) = &mut files.events {
            file.scalars(*step, &[("loss/validation", f64::from(*val_loss))])?;
        }
        if let Screen::Dashboard(dashboard) = &self.screen {
            dashboard.validation(record);
        }
        self.note(&format!("step {step}/{} | validation loss {}", self.steps, loss(*val_loss)))
    }

    /// Learned blocks were exchanged.
    ///
    /// # Errors
    /// A file cannot be opened or written.
    pub fn exchange(&mut self, record: &ExchangeRecord) -> Result<()> {
        if let Some(file) = &mut self.files()?.metrics {
            file.json(record)?;
        }
        let ExchangeRecord { step, learn_fraction, learned, .. } = record;
        let count = record.count();
        self.note(&format!(
            "step {step}/{} | {count} of {learned} learned blocks exchanged (fraction {learn_fraction:.4})",
            self.steps
        ))
    }

    /// A sample is made.
    ///
    /// # Errors
    /// A file cannot be opened or written.
    pub fn sample(&mut self, record: &SampleRecord) -> Result<()> {
        let SampleRecord { step, sample } = record;
        let files = self.files()?;
        if let Some(file) = &mut files.samples {
            file.json(record)?;
        }
        if let Some(file) = &mut files.events {
            file.text(*step, "sample", sample)?;
        }
        if let Screen::Dashboard(dashboard) = &self.screen {
            dashboard.sample(record);
        }
        match self.brief {
            true => Ok(()),
            false => self.note(&format!("step {step}/{} | sample: {}", self.steps, sample.replace('\n', "\n    "))),
        }
    }

    /// A line for the user, above the live line.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn note(&mut self, text: &str) -> Result<()> {
        match &self.screen {
            Screen::Nothing => Ok(()),
            Screen::Lines | Screen::Notes => say!("{text}"),
            Screen::Bar(bar) => bar.suspend(|| say!("{text}")),
            Screen::Dashboard(dashboard) => {
                dashboard.note(text);
                Ok(())
            }
        }
    }

    /// The training is over: what comes now are plain lines.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn finish(&mut self) -> Result<()> {
        let plain = if matches!(self.screen, Screen::Nothing) { Screen::Nothing } else { Screen::Lines };
        match std::mem::replace(&mut self.screen, plain) {
            Screen::Nothing | Screen::Lines | Screen::Notes => {}
            Screen::Bar(bar) => bar.finish_and_clear(),
            Screen::Dashboard(dashboard) => dashboard.close()?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;

    #[test]
    fn files_receive_one_line_for_each_event() {
        let folder = tempfile::tempdir().unwrap();
        let (metrics, log) = (folder.path().join("m.jsonl"), folder.path().join("log.txt"));
        let files = ReportFiles { metrics: Some(metrics.clone()), log: Some(log.clone()), ..ReportFiles::default() };
        let begun = Rc::new(Cell::new(false));
        let (begin, has_begun) = (begun.clone(), || begun.get() && metrics.exists() && log.exists());
        let start = move || {
            begin.set(true);
            Ok(())
        };
        let mut reporter = Reporter::new(10, Show::Nothing, "CPU", &files, None, start).unwrap();
        reporter.note("nothing to keep").unwrap();
        assert!(!has_begun());
        reporter.validation(&ValRecord { step: 0, val_loss: 5.5 }).unwrap();
        assert!(has_begun());
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
        let lines = std::fs::read_to_string(&metrics).unwrap();
        let mut lines = lines.lines();
        assert_eq!(lines.next().unwrap(), r#"{"step":0,"val_loss":5.5}"#);
        let step: serde_json::Value = serde_json::from_str(lines.next().unwrap()).unwrap();
        assert_eq!((step["train_loss"].as_f64(), step["tokens"].as_u64()), (Some(5.25), Some(128)));
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "s:0 tel:5.500000\ns:1 trl:5.250000\n");
    }

    #[test]
    fn a_file_that_cannot_be_created_is_named() {
        let files = ReportFiles { metrics: Some("/no/such/folder/m.jsonl".into()), ..ReportFiles::default() };
        let mut reporter = Reporter::new(1, Show::Nothing, "CPU", &files, None, || Ok(())).unwrap();
        let error = reporter.validation(&ValRecord { step: 0, val_loss: 5.5 }).unwrap_err();
        assert!(error.to_string().contains("/no/such/folder/m.jsonl"), "{error}");
    }
}
