//! What a training writes: a checkpoint with its resolved options beside it, or with `--run` a folder with everything.

use super::train_options::TrainOptions;
use crate::VERSION;
use crate::atomic::{AtomicFile, folder_of};
use crate::checkpoint::{Format, RUN_FILE};
use crate::data::{matching_files, same_file};
use crate::error::{Error, Result};
use crate::report::{LineFile, ReportFiles};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Files of a training.
pub struct Outputs {
    /// The newest checkpoint.
    pub checkpoint: PathBuf,
    /// What the training reports.
    pub reports: ReportFiles,
    /// The options, all of them filled in.
    resolved: PathBuf,
    /// A line for each time that the run was started, in a run's folder.
    starts: Option<PathBuf>,
}

impl Outputs {
    /// What the options ask for; `name` is the model's.
    ///
    /// # Errors
    /// [`Error::Usage`] when the checkpoint's name ends in neither .safetensors nor .bin.
    pub fn new(options: &mut TrainOptions, name: &str) -> Result<Self> {
        if let Some(folder) = &options.run {
            return Ok(Self::in_folder(folder, options.log.clone()));
        }
        let checkpoint = options.checkpoint.get_or_insert_with(|| PathBuf::from(format!("runs/{name}.safetensors")));
        Format::of_path(checkpoint)?;
        let (metrics, log) = (options.metrics.clone(), options.log.clone());
        Ok(Self {
            checkpoint: checkpoint.clone(),
            reports: ReportFiles { metrics, log, ..ReportFiles::default() },
            resolved: checkpoint.with_extension("toml"),
            starts: None,
        })
    }

    fn in_folder(folder: &Path, log: Option<PathBuf>) -> Self {
        Self {
            checkpoint: folder.join(RUN_FILE),
            reports: ReportFiles {
                metrics: Some(folder.join("metrics.jsonl")),
                log,
                samples: Some(folder.join("samples.jsonl")),
                events: Some(folder.to_path_buf()),
            },
            resolved: folder.join("run.toml"),
            starts: Some(folder.join("starts.jsonl")),
        }
    }

    /// Refuses to write over what the training reads, or two things into one file. `native` is the checkpoint that a run goes
    /// on from.
    ///
    /// # Errors
    /// [`Error::File`] naming the file; what opening the training's data meets.
    pub fn check_apart(&self, options: &TrainOptions, native: &Path) -> Result<()> {
        // Its own checkpoint and its own resolved options may go in and out: they are read whole before they are replaced.
        let (checkpoint, resolved) = (self.checkpoint.as_path(), self.resolved.as_path());
        let mut inputs: Vec<(PathBuf, Option<&Path>)> = Vec::new();
        inputs.extend(options.init.iter().map(|init| (init.clone(), Some(checkpoint))));
        inputs.extend(options.config.iter().map(|config| (config.clone(), Some(resolved))));
        for data in [&options.train_data, &options.val_data].into_iter().flatten() {
            inputs.extend(matching_files(data)?.into_iter().map(|file| (file, None)));
        }
        let state = (native != checkpoint).then_some(native);
        let ReportFiles { metrics, log, samples, .. } = &self.reports;
        let reports = [log, metrics, samples, &self.starts].map(Option::as_deref);
        let named = reports.into_iter().chain([Some(checkpoint), state, Some(resolved)]);
        let outputs: Vec<&Path> = named.flatten().collect();
        for (index, &output) in outputs.iter().enumerate() {
            let overwritten =
                |(input, successor): &(PathBuf, _)| *successor != Some(output) && same_file(input, output);
            if inputs.iter().any(overwritten) {
                return Err(Error::file(
                    output,
                    "is an input of the training and would be overwritten; name another output",
                ));
            }
            if outputs[..index].iter().any(|other| same_file(other, output)) {
                let what = "would be written twice; name different files for -c, -o and --metrics";
                return Err(Error::file(output, what));
            }
        }
        Ok(())
    }

    /// Refuses a folder that holds a run already, which a fresh one would destroy.
    ///
    /// # Errors
    /// [`Error::File`] naming the folder.
    pub fn check_fresh(&self) -> Result<()> {
        match self.starts.is_some() && (self.resolved.exists() || self.checkpoint.exists()) {
            true => Err(Error::file(
                folder_of(&self.resolved),
                "holds a run already; go on with it with --resume, or choose another folder for --run",
            )),
            false => Ok(()),
        }
    }

    /// Finds out before hours of training whether a checkpoint can be written at its end, and reports before.
    ///
    /// # Errors
    /// [`Error::Io`] naming what cannot be written.
    pub fn check_writable(&self) -> Result<()> {
        let folder = folder_of(&self.checkpoint);
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        if self.checkpoint.is_dir() {
            return Err(Error::file(&self.checkpoint, "is a folder; name a file for the checkpoint"));
        }
        tempfile::tempfile_in(folder).map_err(Error::io("write to", folder))?;
        let ReportFiles { metrics, log, samples, .. } = &self.reports;
        [metrics, log, samples].into_iter().flatten().try_for_each(|file| match file.exists() {
            true => File::options().append(true).open(file).map(|_| ()).map_err(Error::io("open", file)),
            false => tempfile::tempfile_in(folder_of(file)).map(|_| ()).map_err(Error::io("create", file)),
        })
    }

    /// What writes the options, all of them filled in, as a file that `--config` takes, and in a run's folder a line about this
    /// start: when, what program, on what device, after which step.
    ///
    /// # Errors
    /// Options that are no TOML, a fault of the program; what is returned meets [`Error::Io`] when they cannot be written.
    pub fn record(
        &self,
        options: &TrainOptions,
        device: &str,
        step: u64,
    ) -> Result<impl FnOnce() -> Result<()> + 'static> {
        let text = toml::to_string(options)
            .map_err(|error| Error::Internal(format!("the options cannot be written as TOML: {error}")))?;
        let text = format!("# What bandtrain {VERSION} ran; 'bandtrain --config FILE' runs it again.\n{text}");
        let time = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let start = serde_json::json!({ "step": step, "time": time, "version": VERSION, "device": device });
        let (resolved, starts) = (self.resolved.clone(), self.starts.clone());
        Ok(move || {
            let mut file = AtomicFile::create(&resolved)?;
            file.append(text.as_bytes())?;
            file.seal()?.publish()?;
            starts.map_or(Ok(()), |starts| LineFile::append(&starts)?.json(&start))
        })
    }

    /// What a user may want to do with the run next.
    pub fn advice(&self) -> Vec<String> {
        let mut advice = vec![format!("try: bandtrain generate -e {} -n 100", self.checkpoint.display())];
        if self.starts.is_some() {
            let folder = folder_of(&self.resolved).display();
            advice.push(format!(
                "see: bandtrain plot {folder} --output {folder}/plot.svg, or tensorboard --logdir {folder}"
            ));
        }
        advice
    }
}
