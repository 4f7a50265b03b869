//! What each fuzz target does with its input: hand it to a reader as a file, and require that it comes back with a value
//! or a sentence. The tests replay every input that is kept (`tests/fuzz_corpus.rs`), so this needs no fuzzer.

use bandtrain::bandwidths::Bandwidths;
use bandtrain::checkpoint::{self, Checkpoint, Format, Meta};
use bandtrain::config::GptConfig;
use bandtrain::data::tokenize::{TokenizeOptions, ValidationSplit, tokenize};
use bandtrain::data::{TokenFile, Tokenizer, hellaswag as questions};
use bandtrain::plot::{self, Run};
use bandtrain::weights::Weights;
use bandtrain::{Error, Result};
use cap::Cap;
use std::alloc::System;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use tempfile::TempDir;

/// Counts the memory that the program has at a time.
#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);
/// The most that it may have had, its tables included. The inputs have some kilobytes, so what exceeds this is what a header
/// made a reader ask for.
const MOST_MEMORY: usize = 64 << 20;

/// A target: reads its input in one way, as a file in a folder.
pub type Target = fn(&Folder, &[u8]);

/// Every target by its name, which is also that of its folder in `corpus` and of its program in `fuzz_targets`.
pub const TARGETS: [(&str, Target); 9] = [
    ("tokens", tokens),
    ("checkpoint", checkpoint),
    ("safetensors", safetensors),
    ("hugging_face", hugging_face),
    ("options", options),
    ("text", text),
    ("hellaswag", hellaswag),
    ("hellaswag_lines", hellaswag_lines),
    ("metrics", metrics),
];

/// The smallest model there is to speak of.
const SMALL: GptConfig = GptConfig {
    channels: 4,
    num_layers: 1,
    num_heads: 2,
    max_seq_len: 8,
    vocab_size: 5,
    padded_vocab_size: 64,
    mlp_width: None,
    fc1_bandwidth: Bandwidths::DENSE,
    fc2_bandwidth: Bandwidths::DENSE,
};

/// Where inputs become files. `hf` holds a good model under Hugging Face's names, and its configuration is beside the others.
pub struct Folder(TempDir);

impl Folder {
    /// A folder of its own in `place`, removed when it is dropped.
    pub fn create(place: &Path) -> Self {
        let folder = Self(tempfile::tempdir_in(place).expect("a temporary folder can be made"));
        let weights = Weights::init(&SMALL, 1).expect("the sizes fit");
        let checkpoint = Checkpoint { meta: Meta::of_config(&SMALL), weights };
        checkpoint::save(&folder.path("hf"), &checkpoint, Format::Hf).expect("the folder can be written");
        fs::copy(folder.path("hf/config.json"), folder.path("config.json")).expect("the file is there");
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The input as a file of this name.
    fn file(&self, name: &str, data: &[u8]) -> PathBuf {
        fs::write(self.path(name), data).expect("the temporary folder can be written");
        self.path(name)
    }
}

/// One input of a fuzzer; the tests, which have none, do without.
#[allow(dead_code)]
pub fn fuzz(target: Target, data: &[u8]) {
    static FOLDER: LazyLock<Folder> = LazyLock::new(|| Folder::create(&env::temp_dir()));
    target(&FOLDER, data);
}

/// A reader may refuse with one sentence that is the user's to mend, and with nothing else, and takes no more memory than
/// [`MOST_MEMORY`].
fn accept<T>(result: Result<T>) -> Option<T> {
    let most = MEMORY.max_allocated();
    assert!(most <= MOST_MEMORY, "a file led to {most} bytes of memory");
    match result {
        Ok(value) => Some(value),
        Err(error @ (Error::File { .. } | Error::Io { .. } | Error::Usage(_))) => {
            assert!(error.to_string().len() < 2000, "a sentence of {} bytes", error.to_string().len());
            None
        }
        // A device's error among them: more memory was asked for than there is.
        Err(error) => panic!("a file led to {error:?}"),
    }
}

/// A token file.
pub fn tokens(folder: &Folder, data: &[u8]) {
    if let Some(file) = accept(TokenFile::open(&folder.file("tokens.bin", data), 257)) {
        assert!(file.tokens().iter().all(|&token| token < 257));
    }
}

/// A checkpoint of whatever format, as it is. What is read can be written and read again.
pub fn checkpoint(folder: &Folder, data: &[u8]) {
    load(folder, &folder.file("checkpoint", data));
}

/// A safetensors file, native or Hugging Face's: the input is the header, and zeros follow as it asks for them.
pub fn safetensors(folder: &Folder, data: &[u8]) {
    const MOST: usize = 1 << 16;
    let header = serde_json::from_slice::<safetensors::tensor::Metadata>(data);
    let body = header.map_or(0, |header| header.data_len()).min(MOST);
    let length = (data.len() as u64).to_le_bytes();
    load(folder, &folder.file("model.safetensors", &[&length, data, &vec![0; body]].concat()));
}

fn load(folder: &Folder, path: &Path) {
    let _ = accept(checkpoint::load_with_moments(path));
    if let Some(checkpoint) = accept(checkpoint::load(path)) {
        let again = folder.path("again.safetensors");
        checkpoint::save(&again, &checkpoint, Format::Safetensors).expect("what was read can be written");
        let read = checkpoint::load(&again).expect("what was written can be read");
        assert_eq!(read.weights.values(), checkpoint.weights.values());
        assert_eq!(read.weights.config(), checkpoint.weights.config());
    }
}

/// `config.json` beside a good model.
pub fn hugging_face(folder: &Folder, data: &[u8]) {
    folder.file("hf/config.json", data);
    if let Some(checkpoint) = accept(checkpoint::load(&folder.path("hf"))) {
        assert_eq!(checkpoint.weights.config().channels, SMALL.channels);
    }
}

/// A file of training options. The data that the command line names are missing, so no training begins.
pub fn options(folder: &Folder, data: &[u8]) {
    let path = folder.file("options.toml", data);
    let data = folder.path("missing.bin");
    let words = ["bandtrain", "--backend", "cpu", "--config", &path.to_string_lossy(), "-i", &data.to_string_lossy()];
    let result = bandtrain::cli::run(words.map(Into::into));
    assert!(accept(result).is_none(), "a training without data");
}

/// Text to tokenize: the first byte chooses its form, the tokenizer, and whether some is held out.
pub fn text(folder: &Folder, data: &[u8]) {
    let (&choice, text) = data.split_first().unwrap_or((&0, &[]));
    let name = ["in.txt", "in.json", "in.jsonl", "in.ndjson"][usize::from(choice % 4)];
    let tokenizer = if choice & 4 == 0 { Tokenizer::Bytes } else { Tokenizer::Gpt2 };
    let output = folder.path("text.bin");
    let split = ValidationSplit { output: folder.path("val.bin"), fraction: 0.5, seed: 1 };
    let options = TokenizeOptions {
        inputs: vec![folder.file(name, text)],
        output: output.clone(),
        validation: (choice & 8 != 0).then_some(split),
        shard_tokens: None,
        tokenizer,
    };
    if accept(tokenize(&options, &mut |_, _| Ok(()))).is_some() {
        let written = TokenFile::open(&output, tokenizer.vocab_size()).expect("what was written can be read");
        tokenizer.decode(written.tokens()).expect("every token is one of the tokenizer's");
    }
}

/// A file of questions. What is read can be written and read again.
pub fn hellaswag(folder: &Folder, data: &[u8]) {
    let config = GptConfig { vocab_size: 257, padded_vocab_size: 320, max_seq_len: 64, ..SMALL };
    if let Some(read) = accept(questions::read(&folder.file("questions.bin", data), &config)) {
        let again = folder.path("again.bin");
        questions::write(&again, &read).expect("what was read can be written");
        assert_eq!(questions::read(&again, &config).expect("what was written can be read"), read);
    }
}

/// HellaSwag's own lines.
pub fn hellaswag_lines(folder: &Folder, data: &[u8]) {
    let output = folder.path("lines.bin");
    let _ = accept(questions::convert(&[folder.file("lines.jsonl", data)], &output, Tokenizer::Gpt2));
}

/// A metrics file to plot.
pub fn metrics(folder: &Folder, data: &[u8]) {
    if let Some(run) = accept(Run::read(&folder.file("run.jsonl", data))) {
        assert!(plot::svg(&[run]).starts_with("<svg"));
    }
}
