//! The checkpoints of one run: the newest under the name that was asked for, older ones beside it with their steps in their
//! names.
//!
//! Beside `m.safetensors` lie `m-00000500.safetensors`, which is removed when enough newer ones are there, and
//! `m-milestone-00001000.safetensors`, which never is. llm.c's format has no room for moments: beside `m.bin` the series is that of
//! `m.state.safetensors`, and `m.bin` its newest weights.

use super::{Checkpoint, Format, Moments, save, save_with_moments};
use crate::atomic;
use crate::error::{Error, Result};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// What stands before the step in a milestone's name.
const MILESTONE: &str = "milestone-";

/// What becomes of older checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Keep {
    /// How many checkpoints to keep, the newest included; 0 keeps all. `None` keeps the newest only and touches no other.
    pub last: Option<usize>,
    /// Checkpoints after multiples of this many steps are kept for good; 0 is none.
    pub milestone_every: u64,
}

/// The checkpoints of one run.
#[derive(Debug)]
pub struct Series {
    path: PathBuf,
    native: PathBuf,
    keep: Keep,
    /// The step of what now has the plain name, once this run has written or read it.
    newest: Option<u64>,
}

impl Series {
    /// The series whose newest checkpoint is at `path`. Nothing is touched yet.
    ///
    /// # Errors
    /// [`Error::Usage`] when `path` ends in neither .safetensors nor .bin.
    pub fn new(path: &Path, keep: Keep) -> Result<Self> {
        let native = match Format::of_path(path)? {
            Format::Safetensors => path.to_path_buf(),
            _ => path.with_extension("state.safetensors"),
        };
        Ok(Self { path: path.to_path_buf(), native, keep, newest: None })
    }

    /// The native file that a run goes on from: the path itself, or the state beside a file of llm.c's.
    pub fn native(&self) -> &Path {
        &self.native
    }

    /// The run goes on after `step` from the checkpoint in `file`, which was found to be good. When it is the newest, what a kill
    /// just after it was written has left undone is done: its milestone named, the oldest removed. What of that could not be
    /// done is returned.
    pub fn resumed(&mut self, file: &Path, step: u64) -> Vec<Error> {
        self.newest = (file == self.native).then_some(step);
        if self.newest.is_none() {
            return Vec::new();
        }
        let milestone = self.numbered(MILESTONE, step);
        let named = match self.is_milestone(step) && !milestone.exists() {
            true => atomic::second_name(&self.native, &milestone).err(),
            false => None,
        };
        let removed = self.remove_old(step, false).unwrap_or_else(|error| vec![error]);
        named.into_iter().chain(removed).collect()
    }

    /// Every checkpoint there is, the newest first: the plain name, then by falling step.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be read.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        let plain = self.native.exists().then(|| self.native.clone());
        Ok(plain.into_iter().chain(self.older()?.into_iter().map(|older| older.path)).collect())
    }

    /// A checkpoint with its step in its name, if there is one.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be read.
    pub fn any_older(&self) -> Result<Option<PathBuf>> {
        Ok(self.older()?.into_iter().next().map(|older| older.path))
    }

    /// Writes the newest checkpoint, gives the one before a name of its own if it is kept, and removes those whose time is
    /// over. At every instant the plain name is a whole checkpoint, the old or the new one. What could not be removed is
    /// returned: no reason to end a training.
    ///
    /// # Errors
    /// As [`save`].
    pub fn save(&mut self, checkpoint: &Checkpoint, moments: &Moments) -> Result<Vec<Error>> {
        let step = checkpoint.meta.step;
        if let Some(before) =
            self.newest.filter(|&before| before != step && self.keep.last.is_some_and(|last| last != 1))
        {
            atomic::second_name(&self.native, &self.numbered("", before))?;
        }
        if self.path != self.native {
            // Before the state, which says that the step is done.
            save(&self.path, checkpoint, Format::Llmc)?;
        }
        save_with_moments(&self.native, checkpoint, moments)?;
        self.newest = Some(step);
        if self.is_milestone(step) {
            atomic::second_name(&self.native, &self.numbered(MILESTONE, step))?;
        }
        self.remove_old(step, true)
    }

    /// Whether the checkpoint after `step` is kept for good.
    pub fn is_milestone(&self, step: u64) -> bool {
        self.keep.milestone_every > 0 && step.is_multiple_of(self.keep.milestone_every)
    }

    /// Removes all but the last ones before `step`; and the `later` ones if asked to, once that has been written: they are those
    /// of a run that was given up when this one went on from before them.
    fn remove_old(&self, step: u64, later: bool) -> Result<Vec<Error>> {
        let Some(last) = self.keep.last.filter(|&last| last > 0) else { return Ok(Vec::new()) };
        let (kept, numbered) = (last - 1, self.older()?.into_iter().filter(|older| !older.is_milestone));
        let (after, before): (Vec<_>, Vec<_>) = numbered.partition(|older| older.step >= step);
        let after = after.into_iter().filter(|_| later);
        let removed = after.chain(before.into_iter().skip(kept)).map(|older| match fs::remove_file(&older.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", &older.path)(error)),
            _ => Ok(()),
        });
        Ok(removed.filter_map(Result::err).collect())
    }

    fn numbered(&self, kind: &str, step: u64) -> PathBuf {
        let stem = self.native.file_stem().unwrap_or_default().to_string_lossy();
        self.native.with_file_name(format!("{stem}-{kind}{step:08}.safetensors"))
    }

    /// The checkpoints with steps in their names, the latest first.
    fn older(&self) -> Result<Vec<Older>> {
        let folder = atomic::folder_of(&self.native);
        let entries = match fs::read_dir(folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(Error::io("read", folder))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::io("read", folder))?;
            found.extend(self.parse(&entry.file_name().to_string_lossy()));
        }
        found.sort_by_key(|older| std::cmp::Reverse((older.step, older.is_milestone)));
        Ok(found)
    }

    /// The checkpoint that has this name, if it is one of this series.
    fn parse(&self, name: &str) -> Option<Older> {
        let stem = self.native.file_stem()?.to_string_lossy();
        let rest = name.strip_prefix(&*stem)?.strip_prefix('-')?.strip_suffix(".safetensors")?;
        let digits = rest.strip_prefix(MILESTONE).unwrap_or(rest);
        let whole = digits.len() >= 8 && digits.bytes().all(|digit| digit.is_ascii_digit());
        let step = digits.parse().ok().filter(|_| whole)?;
        Some(Older { path: self.native.with_file_name(name), step, is_milestone: digits.len() < rest.len() })
    }
}

/// A checkpoint with its step in its name.
struct Older {
    path: PathBuf,
    step: u64,
    is_milestone: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Meta, load};
    use crate::config::{GptConfig, preset};
    use crate::weights::Weights;

    /// What a series leaves in its folder after checkpoints at these steps.
    fn names(last: Option<usize>, milestone_every: u64, steps: &[u64], path: &str) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let config =
            GptConfig { channels: 8, num_layers: 1, num_heads: 1, max_seq_len: 4, ..preset("toy").unwrap().model };
        let weights = Weights::init(&GptConfig { fc1_bandwidth: 0.into(), ..config }, 1).unwrap();
        let moments = Moments { first: weights.clone(), second: weights.clone() };
        let mut series = Series::new(&folder.path().join(path), Keep { last, milestone_every }).unwrap();
        fs::write(folder.path().join("m-note.safetensors"), "not one of them").unwrap();
        for &step in steps {
            let checkpoint = Checkpoint { weights: weights.clone(), meta: Meta { step, ..Meta::default() } };
            assert!(series.save(&checkpoint, &moments).unwrap().is_empty());
            assert_eq!(load(series.native()).unwrap().meta.step, step);
        }
        for file in series.files().unwrap() {
            load(&file).unwrap();
        }
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().to_string_lossy().into_owned();
        let mut names: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(name).filter(|name| name != "m-note.safetensors").collect();
        names.sort();
        names
    }

    #[test]
    fn older_checkpoints_are_kept_as_asked() {
        let native = "m.safetensors";
        assert_eq!(names(None, 0, &[1, 2, 3], native), [native]);
        assert_eq!(names(Some(1), 0, &[1, 2, 3], native), [native]);
        assert_eq!(names(Some(2), 0, &[1, 2, 3], native), ["m-00000002.safetensors", native]);
        assert_eq!(names(Some(0), 0, &[1, 2, 3], native), ["m-00000001.safetensors", "m-00000002.safetensors", native]);
        // A run that went back to an earlier step leaves its future behind.
        assert_eq!(
            names(Some(3), 0, &[1, 5, 6, 2, 3], native),
            ["m-00000001.safetensors", "m-00000002.safetensors", native]
        );
    }

    #[test]
    fn milestones_stay() {
        let expected = [
            "m-00000005.safetensors",
            "m-milestone-00000002.safetensors",
            "m-milestone-00000004.safetensors",
            "m.safetensors",
        ];
        assert_eq!(names(Some(2), 2, &[1, 2, 3, 4, 5, 7], "m.safetensors"), expected);
    }

    #[test]
    fn what_a_kill_left_undone_is_done_when_the_run_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        let left = ["m-00000001.safetensors", "m-00000003.safetensors", "m-00000005.safetensors", "m.safetensors"];
        left.iter().for_each(|name| fs::write(file(name), name).unwrap());
        let keep = Keep { last: Some(2), milestone_every: 4 };
        let mut series = Series::new(&file("m.safetensors"), keep).unwrap();
        // From an older one, nothing is known to be undone.
        assert!(series.resumed(&file("m-00000003.safetensors"), 3).is_empty());
        assert!(left.iter().all(|name| file(name).exists()));
        assert!(series.resumed(&file("m.safetensors"), 4).is_empty());
        assert_eq!(fs::read(file("m-milestone-00000004.safetensors")).unwrap(), b"m.safetensors");
        // What is later is removed only by the next checkpoint.
        assert!(!file(left[0]).exists() && left[1..].iter().all(|name| file(name).exists()));
    }

    #[test]
    fn llmc_files_have_their_state_beside_them() {
        let expected = ["m.bin", "m.state-00000002.safetensors", "m.state.safetensors"];
        assert_eq!(names(Some(2), 0, &[1, 2, 3], "m.bin"), expected);
    }
}
