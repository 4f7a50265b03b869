//! `bandtrain sweep`: many trainings one after another, and what came of them.
//!
//! Every run has an ordinary run's folder. What is over has an `outcome.json` in it and is never done again; whatever else is
//! there goes on from its checkpoint, or starts again where it has none.

use super::device::{Task, with_backend};
use super::parse;
use super::sweep_file::{Overrides, SweepFile};
use super::train::{self, Trained};
use super::train_options::TrainOptions;
use crate::VERSION;
use crate::atomic::AtomicFile;
use crate::backend::Backend;
use crate::checkpoint::{Keep, Series};
use crate::energy::EnergyMeter;
use crate::error::{Error, Result};
use crate::interrupt;
use crate::learn::LearnRule;
use crate::output::{self, grouped, loss};
use crate::report::Show;
use crate::say;
use crate::sweep::{self, Energy, Facts, Measured, Outcome, PAGE_FILE, Results, Row, Status};
use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const AFTER_HELP: &str = "\
Example:
  bandtrain sweep data/sweeps/fc1-bandwidth.toml

The file:
  keep-checkpoints = true         # whether runs keep their checkpoints once they are done
  [train]                         # any of training's options, for all runs
  preset = \"tinystories-51m\"
  steps = 1000
  [[grid]]                        # each grid is the product of its lists
  pattern = [\"dense\", \"band\", \"small-dense\"]   # the last: a narrower MLP with as many weights as the band; with density
                                  # also \"random\" (blocks, others for each seed), \"strided\", \"learned\" (from random
                                  # ones) and \"learned-band\" (from a diagonal band)
  bandwidth = [1024, 512, 256]    # or density = [0.438, 0.235]; over the depth \"1024..256\" or \"1024,512,256,256\"
  layers = [\"fc1\", \"fc2\", \"both\"]
  learn-every = [100]             # of learned blocks, as training's options; also learn-fraction and learn-until
  learning-rate = [3e-4]          # without it, training's own
  seed = [1, 2, 3]                # without it, 42

The same command goes on after whatever stopped it: a run that is over is not done again, and one that was begun
goes on from its checkpoint (checkpoint-every = \"10m\" under [train] makes some) or starts again.
The folder holds results.csv (the runs), summary.csv (over the seeds), results.json (both), report.html (a page that needs
nothing else; 'bandtrain report' makes it again), and runs/NAME, a folder for each run, as --run makes it: 'bandtrain plot' and 'bandtrain generate' take it.";

/// Trains a grid of models one after another and compares them
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct SweepArgs {
    /// TOML file that says what varies
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Folder for runs and results [default: runs/NAME, with the file's name]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Only runs whose names contain this; may be given several times
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Do at most this many runs now
    #[arg(long, value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    limit: Option<usize>,
    /// Do runs that failed again
    #[arg(long)]
    retry_failed: bool,
    /// Only list the runs, and how long they may take once one of them is done
    #[arg(long, conflicts_with = "retry_failed")]
    dry_run: bool,
    #[command(flatten)]
    overrides: Overrides,
}

/// Runs the command.
///
/// # Errors
/// A file that is no sweep; a folder that holds another; [`Error::Usage`] in the end when runs failed.
pub fn run(args: SweepArgs) -> Result<()> {
    let mut sweep = Sweep::open(&args)?;
    let chosen = sweep.chosen(&args.only)?;
    if args.dry_run {
        return sweep.list(&chosen);
    }
    let _lock = sweep.begin()?;
    sweep.work(&chosen, args.limit.unwrap_or(usize::MAX), args.retry_failed)
}

/// One run of a sweep.
struct Planned {
    facts: Facts,
    options: TrainOptions,
    folder: PathBuf,
    /// What came of it, once it is over.
    outcome: Option<Outcome>,
}

impl Planned {
    fn status(&self) -> Status {
        match &self.outcome {
            Some(Outcome::Done(_)) => Status::Done,
            Some(Outcome::Failed(_)) => Status::Failed,
            None if self.folder.join("starts.jsonl").exists() => Status::Begun,
            None => Status::New,
        }
    }

    fn row(&self) -> Row {
        let (measured, error) = match &self.outcome {
            Some(Outcome::Done(measured)) => (Some(measured.clone()), None),
            Some(Outcome::Failed(error)) => (None, Some(error.clone())),
            None => (None, None),
        };
        Row { facts: self.facts.clone(), status: self.status(), error, measured }
    }
}

/// A sweep with its runs.
struct Sweep {
    name: String,
    folder: PathBuf,
    keep_checkpoints: bool,
    settings: BTreeMap<String, String>,
    runs: Vec<Planned>,
}

impl Sweep {
    fn open(args: &SweepArgs) -> Result<Self> {
        let SweepFile { name, keep_checkpoints, mut train, points } =
            SweepFile::read(&args.file, args.overrides.clone())?;
        let preset = train::name_preset(&mut train)?;
        let steps = *train.steps.get_or_insert(preset.steps);
        // One sample for the comparison, unless more are asked for.
        train.sample_every.get_or_insert(steps);
        let settings = settings(&train)?;
        let folder = args.output.clone().unwrap_or_else(|| Path::new("runs").join(&name));
        let run = |point: &crate::sweep::Point| -> Result<Planned> {
            let config = point.config(&preset.model).map_err(|error| error_of(&point.name(), error))?;
            let learning_rate = point.learning_rate.or(train.learning_rate).unwrap_or(preset.learning_rate);
            let learn = &point.learn;
            let (every, fraction) = (learn.every.or(train.learn_every), learn.fraction.or(train.learn_fraction));
            let learns = point.pattern.is_learned();
            let learn = learns.then(|| LearnRule::new(every, fraction, learn.until.or(train.learn_until), steps));
            let facts = Facts::new(point, &config, learn, learning_rate)?;
            let folder = folder.join("runs").join(&facts.name);
            let options = TrainOptions {
                fc1_bandwidth: Some(config.fc1_bandwidth),
                fc2_bandwidth: Some(config.fc2_bandwidth),
                mlp_width: config.mlp_width,
                learn_every: learn.map(|rule| rule.every),
                learn_fraction: learn.map(|rule| rule.fraction),
                learn_until: learn.map(|rule| rule.until),
                learning_rate: Some(learning_rate),
                seed: Some(point.seed),
                run: Some(folder.clone()),
                resume: true,
                ..train.clone()
            };
            let outcome = Outcome::read(&folder)?;
            Ok(Planned { facts, options, folder, outcome })
        };
        let runs = points.iter().map(run).collect::<Result<_>>()?;
        let sweep = Self { name, folder, keep_checkpoints, settings, runs };
        sweep.check_settings()?;
        Ok(sweep)
    }

    /// The indices of the runs whose names contain one of these texts; all when there are none.
    fn chosen(&self, only: &[String]) -> Result<Vec<usize>> {
        let is_chosen = |name: &str| only.is_empty() || only.iter().any(|text| name.contains(text.as_str()));
        let chosen: Vec<_> = (0..self.runs.len()).filter(|&run| is_chosen(&self.runs[run].facts.name)).collect();
        match chosen.is_empty() {
            true => Err(Error::usage(format!(
                "--only leaves nothing to run; the names are like {}, and --dry-run lists them",
                self.runs[0].facts.name
            ))),
            false => Ok(chosen),
        }
    }

    fn settings_file(&self) -> PathBuf {
        self.folder.join("settings.json")
    }

    /// Refuses a folder whose runs share other settings.
    fn check_settings(&self) -> Result<()> {
        let path = self.settings_file();
        let text = match std::fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            text => text.map_err(Error::io("read", &path))?,
        };
        let before: BTreeMap<String, String> = serde_json::from_slice(&text).map_err(|error| {
            Error::file(&path, format!("is not what a sweep wrote: {}", output::quoted(&error.to_string())))
        })?;
        let none = "not given".to_string();
        let differs = |key: &&String| before.get(*key) != self.settings.get(*key);
        match before.keys().chain(self.settings.keys()).find(differs) {
            None => Ok(()),
            Some(key) => {
                let (before, now) = (before.get(key).unwrap_or(&none), self.settings.get(key).unwrap_or(&none));
                let what = format!(
                    "holds runs of other settings ({key} was {before} and is now {now}); restore that, or choose another \
                     folder with --output"
                );
                Err(Error::file(&self.folder, what))
            }
        }
    }

    /// Makes the folder and keeps other sweeps out of it as long as the lock lives.
    fn begin(&self) -> Result<File> {
        let runs = self.folder.join("runs");
        std::fs::create_dir_all(&runs).map_err(Error::io("create", &runs))?;
        let path = self.folder.join("sweep.lock");
        let lock = File::options().create(true).append(true).open(&path).map_err(Error::io("open", &path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let what = "another sweep is at work in this folder; wait for it, or choose another one with --output";
                return Err(Error::file(&self.folder, what));
            }
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
        }
        let settings =
            serde_json::to_string_pretty(&self.settings).map_err(|error| Error::Internal(error.to_string()))?;
        let mut file = AtomicFile::create(&self.settings_file())?;
        file.append(settings.as_bytes())?;
        file.seal()?.publish()?;
        Ok(lock)
    }

    /// Does those of the chosen runs that are not over, `most` of them.
    fn work(&mut self, chosen: &[usize], most: usize, retry_failed: bool) -> Result<()> {
        let interrupt = interrupt::listen()?;
        let is_due = |run: &Planned| match run.status() {
            Status::New | Status::Begun => true,
            Status::Done => false,
            Status::Failed => retry_failed,
        };
        let due: Vec<usize> = chosen.iter().copied().filter(|&run| is_due(&self.runs[run])).collect();
        say!("sweep {}: {} of {} runs to do in {}", self.name, due.len(), self.runs.len(), self.folder.display())?;
        let todo = due.len().min(most);
        for (number, &index) in due.iter().take(most).enumerate() {
            if interrupt.load(Ordering::Relaxed) {
                return Err(Error::Interrupted("the same command goes on with the sweep".to_string()));
            }
            let Planned { facts, folder, .. } = &self.runs[index];
            say!("\n[{}/{todo}] {}: {}", number + 1, facts.name, describe(facts))?;
            Outcome::remove(folder)?;
            let outcome = train_one(&self.runs[index])?;
            let Planned { folder, outcome: known, .. } = &mut self.runs[index];
            outcome.write(folder)?;
            // As it will be read from now on: a figure's last bit may get lost in its decimals.
            *known = Outcome::read(folder)?;
            self.report()?;
            self.clear_checkpoints()?;
            self.tell(index, &due[number + 1..todo])?;
        }
        self.clear_checkpoints()?;
        let results = self.report()?;
        say!("")?;
        print_table(&results)?;
        say!(
            "\nresults: {}, to be read as {}",
            self.folder.join("results.csv").display(),
            self.folder.join(PAGE_FILE).display()
        )?;
        let failed: Vec<&str> = results.with(Status::Failed).map(|row| row.facts.name.as_str()).collect();
        match failed.as_slice() {
            [] => Ok(()),
            failed => Err(Error::usage(format!(
                "{} of {} runs failed ({}); results.csv has their reasons, and --retry-failed does them again",
                failed.len(),
                self.runs.len(),
                failed.join(", ")
            ))),
        }
    }

    /// Writes the tables and the page as they are now.
    fn report(&self) -> Result<Results> {
        let results = self.results();
        results.write(&self.folder)?;
        sweep::write_page(&results, &self.folder, &self.folder.join(PAGE_FILE))?;
        Ok(results)
    }

    fn results(&self) -> Results {
        let runs = self.runs.iter().map(Planned::row).collect();
        Results { name: self.name.clone(), settings: self.settings.clone(), runs }
    }

    /// Says what came of a run, and how long those after it may take.
    fn tell(&self, index: usize, left: &[usize]) -> Result<()> {
        let run = &self.runs[index];
        match &run.outcome {
            Some(Outcome::Done(measured)) => {
                let joules =
                    measured.energy.joules.map(|joules| format!(", {}", output::joules(joules))).unwrap_or_default();
                let left = match self.estimate(left) {
                    Some(time) if !left.is_empty() => format!("; about {} left", rounded(time)),
                    _ => String::new(),
                };
                say!(
                    "{} done: validation loss {}, {} tok/s, {:.0} s{joules}{left}",
                    run.facts.name,
                    loss(measured.val_loss as f32),
                    grouped(measured.tok_per_s as usize),
                    measured.seconds
                )
            }
            Some(Outcome::Failed(error)) => say!("{} failed: {error}", run.facts.name),
            None => Ok(()),
        }
    }

    /// How long these runs may take, from the mean of those that are done.
    fn estimate(&self, runs: &[usize]) -> Option<Duration> {
        let seconds = |run: &Planned| match &run.outcome {
            Some(Outcome::Done(measured)) => Some(measured.wall_seconds.unwrap_or(measured.seconds)),
            _ => None,
        };
        let known: Vec<f64> = self.runs.iter().filter_map(seconds).collect();
        let mean = known.iter().sum::<f64>() / known.len() as f64;
        (!known.is_empty()).then(|| Duration::from_secs_f64((mean * runs.len() as f64).clamp(0.0, 1e9)))
    }

    /// `--dry-run`.
    fn list(&self, chosen: &[usize]) -> Result<()> {
        let width = chosen.iter().map(|&run| self.runs[run].facts.name.len()).max().unwrap_or(0);
        say!(
            "{:width$}  {:>6}  {:>8}  {:>12}  {:>10}  {:>9}",
            "run",
            "state",
            "MLP kept",
            "parameters",
            "weights",
            "rate"
        )?;
        for &run in chosen {
            let Facts { name, mlp_density, parameters, weight_bytes, learning_rate, .. } = &self.runs[run].facts;
            say!(
                "{name:width$}  {:>6}  {:>6.2} %  {:>12}  {:>10}  {learning_rate:>9.1e}",
                self.runs[run].status().name(),
                100.0 * mlp_density,
                grouped(*parameters),
                output::bytes(*weight_bytes)
            )?;
        }
        let left: Vec<usize> = chosen
            .iter()
            .copied()
            .filter(|&run| matches!(self.runs[run].status(), Status::New | Status::Begun))
            .collect();
        match (left.len(), self.estimate(&left)) {
            (0, _) => say!("{} runs, all of them over", chosen.len()),
            (count, None) => {
                say!("{count} of {} runs to do; how long they take is known once one is done (--limit 1)", chosen.len())
            }
            (count, Some(time)) => say!("{count} of {} runs to do, about {}", chosen.len(), rounded(time)),
        }
    }

    /// Removes the checkpoints of runs that are done, where they are not to be kept.
    fn clear_checkpoints(&self) -> Result<()> {
        if self.keep_checkpoints {
            return Ok(());
        }
        for run in self.runs.iter().filter(|run| run.status() == Status::Done) {
            let series = Series::new(&run.folder.join("model.safetensors"), Keep { last: None, milestone_every: 0 })?;
            for file in series.files()?.into_iter().filter(|file| file.exists()) {
                std::fs::remove_file(&file).map_err(Error::io("remove", &file))?;
            }
        }
        Ok(())
    }
}

/// An error with the name of the run whose options led to it.
fn error_of(run: &str, error: Error) -> Error {
    Error::usage(format!("the run {run} is not possible: {error}"))
}

/// What makes all runs of a sweep comparable: the options that they share, but for those of places, times and devices.
fn settings(train: &TrainOptions) -> Result<BTreeMap<String, String>> {
    const FREE: [&str; 8] = [
        "backend",
        "adapter",
        "checkpoint-every",
        "keep",
        "milestone-every",
        "val-every",
        "sample-every",
        "sample-tokens",
    ];
    let table = toml::Table::try_from(train)
        .map_err(|error| Error::Internal(format!("the options cannot be recorded: {error}")))?;
    let text = |value: toml::Value| match value {
        toml::Value::String(text) => text,
        other => other.to_string(),
    };
    let settings = table.into_iter().filter(|(key, _)| !FREE.contains(&key.as_str()));
    Ok(settings.map(|(key, value)| (key, text(value))).collect())
}

/// A run's training, on whatever device.
struct One(TrainOptions);

/// What is known of a training once it is over, whichever way.
struct Ended {
    trained: Result<Trained>,
    energy: std::result::Result<f64, String>,
    device: String,
}

impl Task for One {
    type Output = Ended;

    fn run<B: Backend>(self, backend: B) -> Result<Ended> {
        let device = format!("{}, {}", backend.description(), backend.arithmetic().name());
        let meter = EnergyMeter::start(&backend.description());
        let trained = train::train(self.0, backend, Show::Brief);
        Ok(Ended { trained, energy: meter.joules(), device })
    }
}

/// Trains one run. What is the run's own fault becomes its outcome; what any other run would meet as well is an error.
fn train_one(run: &Planned) -> Result<Outcome> {
    let start = Instant::now();
    let ended = with_backend(&run.options.device(), One(run.options.clone()))?;
    match ended.trained {
        Ok(trained) => {
            let mut measured = match Measured::of_metrics(&run.folder, trained.steps, trained.step_tokens) {
                Err(error @ Error::Io { .. }) => return Err(error),
                Err(error) => return Ok(Outcome::Failed(error.to_string())),
                Ok(measured) => measured,
            };
            let whole = sweep::last_start(&run.folder)? == 0;
            measured.wall_seconds = whole.then(|| start.elapsed().as_secs_f64());
            measured.energy = Energy::from(match ended.energy {
                Err(why) => Err(why),
                Ok(joules) => sweep::whole_energy(&run.folder, joules)?
                    .ok_or_else(|| "the run was ended by force, and what it had taken until then was lost".to_string()),
            });
            (measured.memory_bytes, measured.blocks) = (trained.memory_bytes, trained.blocks);
            (measured.device, measured.version) = (ended.device, VERSION.to_string());
            Ok(Outcome::Done(measured))
        }
        Err(Error::Interrupted(text)) => {
            if let Ok(joules) = ended.energy {
                sweep::keep_energy(&run.folder, joules)?;
            }
            Err(Error::Interrupted(format!("{text}; the same command goes on with the sweep")))
        }
        Err(error @ (Error::StdoutClosed | Error::Io { .. })) => Err(error),
        Err(error) => Ok(Outcome::Failed(error.to_string())),
    }
}

fn describe(facts: &Facts) -> String {
    format!(
        "{:.2} % of the MLP's weights, {} parameters, learning rate {:e}, seed {}",
        100.0 * facts.mlp_density,
        grouped(facts.parameters),
        facts.learning_rate,
        facts.seed
    )
}

/// The runs over their seeds.
fn print_table(results: &Results) -> Result<()> {
    let groups = results.groups();
    let width = groups.iter().map(|group| group.group.len()).max().unwrap_or(0);
    say!(
        "{:width$}  {:>8}  {:>5}  {:>18}  {:>9}  {:>8}  {:>8}",
        "group",
        "MLP kept",
        "runs",
        "validation loss",
        "tok/s",
        "seconds",
        "energy"
    )?;
    for group in groups {
        let none = || "-".to_string();
        let value = group.val_loss.map_or_else(none, |spread| match spread.deviation {
            Some(deviation) => format!("{} +- {deviation:.4}", loss(spread.mean as f32)),
            None => loss(spread.mean as f32),
        });
        say!(
            "{:width$}  {:>6.2} %  {:>5}  {value:>18}  {:>9}  {:>8}  {:>8}",
            group.group,
            100.0 * group.mlp_density,
            format!("{}/{}", group.done, group.runs),
            group.tok_per_s.map_or_else(none, |rate| grouped(rate as usize)),
            group.seconds.map_or_else(none, |seconds| format!("{seconds:.1}")),
            group.joules.map_or_else(none, output::joules)
        )?;
    }
    Ok(())
}

/// A time without its fractions of a second.
fn rounded(time: Duration) -> impl std::fmt::Display {
    humantime::format_duration(Duration::from_secs(time.as_secs()))
}
