//! A folder to run the program in, and small models and token files to run it on.

use bandtrain::bandwidths::Bandwidths;
use bandtrain::checkpoint::{Checkpoint, Format, Meta, save};
use bandtrain::config::{BYTES_VOCAB, GptConfig};
use bandtrain::weights::Weights;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::SystemTime;
use tempfile::TempDir;

/// A model that trains in a blink, for the byte tokenizer.
pub const TINY: GptConfig = GptConfig {
    channels: 16,
    num_layers: 1,
    num_heads: 2,
    max_seq_len: 16,
    vocab_size: BYTES_VOCAB,
    padded_vocab_size: BYTES_VOCAB.next_multiple_of(64),
    mlp_width: None,
    fc1_bandwidth: Bandwidths::DENSE,
    fc2_bandwidth: Bandwidths::DENSE,
};

/// A temporary folder in which the program runs.
pub struct Place {
    folder: TempDir,
}

impl Place {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    /// A place with `tiny.bin`, an llm.c model, and `train.bin` and `val.bin`, tokens of a repeated sentence.
    pub fn with_model_and_data() -> Self {
        let place = Self::new();
        place.save_model("tiny.bin", TINY, Meta::default());
        let text: Vec<u16> = "One day a cat sat on a mat and saw a rat. ".bytes().map(u16::from).collect();
        place.write("train.bin", token_file(&text.repeat(40)));
        place.write("val.bin", token_file(&text.repeat(5)));
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// Saves a fresh model in the format of the file's ending.
    pub fn save_model(&self, name: &str, config: GptConfig, meta: Meta) {
        let checkpoint = Checkpoint { weights: Weights::init(&config, 5).unwrap(), meta };
        let path = self.path(name);
        save(&path, &checkpoint, Format::of_path(&path).unwrap()).unwrap();
    }

    /// The program with these words as its arguments, not yet started.
    pub fn command(&self, line: &str) -> Command {
        self.program(env!("CARGO_BIN_EXE_bandtrain"), line)
    }

    /// The same of another program.
    pub fn program(&self, program: &str, line: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.folder.path()).args(line.split_whitespace()).stdin(Stdio::null());
        // Vulkan's drivers complain on standard error when they look for a display and this is not set.
        command.env("XDG_RUNTIME_DIR", self.folder.path());
        // These tests are about a machine without a card of NVIDIA's; tests/cuda.rs is about the others.
        command.env("CUDA_VISIBLE_DEVICES", "").env_remove("BANDTRAIN_CUDA_LIBS");
        command
    }

    /// Runs a command line that must succeed; returns what it prints.
    pub fn ok(&self, line: &str) -> String {
        self.succeed(&mut self.command(line))
    }

    pub fn succeed(&self, command: &mut Command) -> String {
        let output = command.output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr.as_str()), (Some(0), ""), "{command:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command line that must be refused with a sentence holding `part`, leaving the folder as it was.
    pub fn mistake(&self, line: &str, part: &str) {
        self.refuse(&mut self.command(line), part);
    }

    pub fn refuse(&self, command: &mut Command, part: &str) {
        let before = self.contents();
        let output = command.output().unwrap();
        let sentence = one_sentence(&output, 2);
        assert!(sentence.contains(part), "{command:?}: '{sentence}' should contain '{part}'");
        assert_eq!(self.contents(), before, "{command:?} left something behind");
    }

    /// Every file and folder with its length and the time of its last change.
    fn contents(&self) -> BTreeMap<PathBuf, (u64, SystemTime)> {
        let (mut found, mut folders) = (BTreeMap::new(), vec![self.folder.path().to_path_buf()]);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let (path, metadata) = entry.map(|entry| (entry.path(), entry.metadata().unwrap())).unwrap();
                match metadata.is_dir() {
                    true => folders.push(path.clone()),
                    false => drop(found.insert(path.clone(), (metadata.len(), metadata.modified().unwrap()))),
                }
                found.entry(path).or_insert((0, SystemTime::UNIX_EPOCH));
            }
        }
        found
    }
}

/// The single line on standard error of a run that ended with `code`.
pub fn one_sentence(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(stderr.starts_with("bandtrain: ") && stderr.ends_with('\n'), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.len() < 600 && !stderr.contains("panicked"), "{stderr}");
    stderr
}

/// A token file with an honest header.
pub fn token_file(tokens: &[u16]) -> Vec<u8> {
    token_file_with([20240520, 1, tokens.len() as i32], tokens)
}

/// A token file with these words in its header.
pub fn token_file_with(words: [i32; 3], tokens: &[u16]) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.resize(1024, 0);
    bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    bytes
}

/// A metrics file: each line an object.
pub fn json_lines(path: &Path) -> Vec<serde_json::Map<String, serde_json::Value>> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The bits of every `key` of a metrics file, in order.
pub fn losses(path: &Path, key: &str) -> Vec<f32> {
    json_lines(path).iter().filter_map(|record| record.get(key)?.as_f64()).map(|loss| loss as f32).collect()
}
