//! Checkpoints: a model's weights in files. One native format and three to trade with other programs.
//!
//! [`load`] finds out by itself what it is given; [`save`] writes whole files or none. Every reader checks all sizes
//! against the file's own length before it allocates, so that no file can make the program panic or ask for more memory
//! than the file is long (twice that for half-precision files). docs/formats.md describes the bytes.

mod container;
mod hf;
mod hf_tokenizer;
mod llmc;
mod safetensors;
mod series;
mod values;

pub use series::{Keep, Series};
pub use values::Encoding;

use crate::config::GptConfig;
use crate::data::Tokenizer;
use crate::error::{Error, Result};
use crate::output::quoted;
use crate::shapes::{Param, Tensor};
use crate::weights::Weights;
use container::Container;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// The newest checkpoint's name in a run's folder.
pub const RUN_FILE: &str = "model.safetensors";

/// The outcome of a check whose sentence still lacks the name of the file.
type Checked<T> = std::result::Result<T, String>;

/// A model with what is known about it.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// The weights, with their configuration.
    pub weights: Weights,
    /// What stands beside them.
    pub meta: Meta,
}

impl Checkpoint {
    /// The tokenizer it names, where the model knows every token of it.
    pub fn tokenizer(&self) -> Option<Tokenizer> {
        let named = Tokenizer::from_name(self.meta.tokenizer.as_deref()?).ok()?;
        (named.vocab_size() <= self.weights.config().vocab_size).then_some(named)
    }
}

/// AdamW's moments, laid out as the weights are.
#[derive(Debug, Clone)]
pub struct Moments {
    /// Running mean of the gradients.
    pub first: Weights,
    /// Running mean of their squares.
    pub second: Weights,
}

/// What a checkpoint says beside its weights. The native format keeps all of it, an HF export the tokenizer and the
/// step, llm.c's files nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// The tokenizer's name, `gpt2` or `bytes`; a reader that finds none takes the one whose vocabulary has the model's
    /// size, or none.
    pub tokenizer: Option<String>,
    /// Optimizer steps taken.
    pub step: u64,
    /// Further entries of the native format's metadata, kept as they are. The format's own keys cannot be replaced.
    pub extra: BTreeMap<String, String>,
}

impl Meta {
    /// What can be known from the model's sizes alone: the tokenizer, by its vocabulary.
    pub fn of_config(config: &GptConfig) -> Self {
        let fitting = Tokenizer::for_vocab_size(config.vocab_size).ok();
        Self { tokenizer: fitting.map(|tokenizer| tokenizer.name().to_string()), ..Self::default() }
    }

    /// Reads `tokenizer` and `step` out of a safetensors file's metadata; keys that are missing are guessed.
    fn take(notes: &mut BTreeMap<String, String>, config: &GptConfig) -> Checked<Self> {
        let mut meta = Self::of_config(config);
        if let Some(name) = notes.remove("tokenizer") {
            check_tokenizer(&name)?;
            meta.tokenizer = Some(name);
        }
        if let Some(step) = notes.remove("step") {
            meta.step =
                step.parse().map_err(|_| format!("its metadata gives the step as {}, not a number", quoted(&step)))?;
        }
        Ok(meta)
    }

    /// The entries that [`Meta::take`] reads.
    fn entries(&self) -> impl Iterator<Item = (String, String)> {
        let tokenizer = self.tokenizer.iter().map(|name| ("tokenizer".to_string(), name.clone()));
        tokenizer.chain([("step".to_string(), self.step.to_string())])
    }
}

fn check_tokenizer(name: &str) -> Checked<()> {
    match Tokenizer::from_name(name) {
        Ok(_) => Ok(()),
        Err(_) => Err(format!("its metadata names the tokenizer {}, but only gpt2 and bytes are known", quoted(name))),
    }
}

/// The formats there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// llm.c's model file, version 3: fp32, dense.
    Llmc,
    /// llm.c's model file, version 5: bf16, dense.
    LlmcBf16,
    /// The native format: safetensors, fp32, banded tensors packed.
    Safetensors,
    /// A folder as Hugging Face transformers reads it: fp32, dense.
    Hf,
}

impl Format {
    /// All formats.
    pub const ALL: [Format; 4] = [Format::Llmc, Format::LlmcBf16, Format::Safetensors, Format::Hf];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::Llmc => "llmc",
            Format::LlmcBf16 => "llmc-bf16",
            Format::Safetensors => "safetensors",
            Format::Hf => "hf",
        }
    }

    /// The format called `name`.
    ///
    /// # Errors
    /// [`Error::Usage`] listing the names there are.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Format::name).join(", ");
            Error::usage(format!("there is no checkpoint format '{name}'; choose one of {names}"))
        })
    }

    /// The format to write at `path`: `.bin` is llm.c's fp32, `.safetensors` the native one.
    ///
    /// # Errors
    /// [`Error::Usage`] for any other extension.
    pub fn of_path(path: &Path) -> Result<Self> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("bin") => Ok(Format::Llmc),
            Some("safetensors") => Ok(Format::Safetensors),
            _ => Err(Error::usage(format!(
                "cannot tell the checkpoint format from the name {}; end it in .safetensors (native) or .bin (llm.c)",
                path.display()
            ))),
        }
    }

    /// How the format stores a weight.
    fn encoding(self) -> Encoding {
        if self == Format::LlmcBf16 { Encoding::Bf16 } else { Encoding::F32 }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which format a file or folder has, by its first bytes (a folder is [`Format::Hf`]).
///
/// # Errors
/// [`Error::Io`] when it cannot be opened, [`Error::File`] saying what it seems to be when it is no checkpoint.
pub fn detect(path: &Path) -> Result<Format> {
    if fs::metadata(path).map_err(Error::io("open", path))?.is_dir() {
        return Ok(Format::Hf);
    }
    let start = first_bytes(path)?;
    if first_word(&start) == Some(llmc::MAGIC) {
        let (_, encoding) = llmc::read_header(path)?;
        return Ok(if encoding == Encoding::F32 { Format::Llmc } else { Format::LlmcBf16 });
    }
    if start.get(8) != Some(&b'{') {
        return Err(Error::file(path, unknown(&start)));
    }
    let container = Container::open(path)?;
    if safetensors::recognises(&container) {
        Ok(Format::Safetensors)
    } else if hf::recognises(&container) {
        Ok(Format::Hf)
    } else {
        let what = "is a safetensors file, but neither bandtrain's (its metadata lacks format = bandtrain) nor a \
                    Hugging Face GPT-2 (it has no wte.weight); only these two can be read";
        Err(Error::file(path, what))
    }
}

/// The newest checkpoint of a run's folder; `None` when `path` is something else.
fn newest_of_run(path: &Path) -> Option<PathBuf> {
    let file = path.join(RUN_FILE);
    (path.is_dir() && matches!(detect(&file), Ok(Format::Safetensors))).then_some(file)
}

/// Loads a model from a file of any [`Format`], a Hugging Face folder, or a run's folder: its newest checkpoint. Padded
/// vocabulary rows are set to zero.
///
/// # Errors
/// [`Error::Io`] when something cannot be read, [`Error::File`] when it is no whole and valid checkpoint.
pub fn load(path: &Path) -> Result<Checkpoint> {
    let newest = newest_of_run(path);
    let path = newest.as_deref().unwrap_or(path);
    let mut checkpoint = match detect(path)? {
        Format::Llmc | Format::LlmcBf16 => {
            let weights = llmc::read(path)?;
            Checkpoint { meta: Meta::of_config(weights.config()), weights }
        }
        Format::Safetensors => safetensors::read(path)?,
        Format::Hf => hf::read(path)?,
    };
    let real = checkpoint.weights.config().vocab_size * checkpoint.weights.config().channels;
    checkpoint.weights.stored_mut(Param::Wte, 0)[real..].fill(0.0);
    Ok(checkpoint)
}

/// Writes a model; [`Format::Hf`] makes a folder, and not in that of a run, the others a file. An older checkpoint at `path` is replaced in one
/// step and only by a complete one that [`load`] would accept; after an error it is still there, and nothing else is.
///
/// # Errors
/// [`Error::Io`] when something cannot be written (a full disk), [`Error::File`] when a weight is not finite or too large
/// for the format, [`Error::Internal`] when a weight outside the band is not zero.
pub fn save(path: &Path, checkpoint: &Checkpoint, format: Format) -> Result<()> {
    if matches!(format, Format::Llmc | Format::LlmcBf16) {
        check_llmc(path, checkpoint.weights.config())?;
    }
    check_savable(path, &checkpoint.weights, &checkpoint.meta, format.encoding())?;
    match format {
        Format::Llmc | Format::LlmcBf16 => llmc::write(path, &checkpoint.weights, format.encoding())?.publish(),
        Format::Safetensors => safetensors::write(path, checkpoint, None)?.publish(),
        Format::Hf if newest_of_run(path).is_some() => {
            Err(Error::file(path, format!("holds a run, whose {RUN_FILE} would be overwritten; name another folder")))
        }
        Format::Hf => hf::write(path, checkpoint),
    }
}

/// Writes a native checkpoint with the moments that a training needs to go on from it, as [`save`] does.
///
/// # Errors
/// As [`save`].
pub fn save_with_moments(path: &Path, checkpoint: &Checkpoint, moments: &Moments) -> Result<()> {
    check_savable(path, &checkpoint.weights, &checkpoint.meta, Encoding::F32)?;
    check_savable(path, &moments.first, &checkpoint.meta, Encoding::F32)?;
    check_savable(path, &moments.second, &checkpoint.meta, Encoding::F32)?;
    safetensors::write(path, checkpoint, Some(moments))?.publish()
}

/// Loads a native checkpoint with its moments.
///
/// # Errors
/// As [`load`]; [`Error::File`] when the file holds no moments.
pub fn load_with_moments(path: &Path) -> Result<(Checkpoint, Moments)> {
    match detect(path)? {
        Format::Safetensors => safetensors::read_with_moments(path),
        _ => Err(Error::file(path, "holds no moments, so no training can be resumed from it; start from it with -e")),
    }
}

/// Refuses a model that llm.c's files cannot describe: their headers do not tell the width of the MLP, which is 4C there.
///
/// # Errors
/// [`Error::File`] saying so.
pub fn check_llmc(path: &Path, config: &GptConfig) -> Result<()> {
    match config.mlp_width() == config.full_mlp_width() {
        true => Ok(()),
        false => Err(Error::file(
            path,
            format!(
                "is llm.c's format, whose MLPs have the width 4C = {}, but this model's have {}; choose a .safetensors file, or \
                 Hugging Face's format (convert --to hf)",
                config.full_mlp_width(),
                config.mlp_width()
            ),
        )),
    }
}

/// Refuses to put what no reader accepts in the place of a good checkpoint.
fn check_savable(path: &Path, weights: &Weights, meta: &Meta, encoding: Encoding) -> Result<()> {
    if let Some(name) = &meta.tokenizer {
        check_tokenizer(name).map_err(Error::Internal)?;
    }
    for &tensor in weights.table().tensors() {
        let (name, stored) = (tensor.name(), weights.stored(tensor.param, tensor.layer));
        if let Some(index) = stored.iter().position(|&value| !encoding.rounded(value).is_finite()) {
            let what = format!(
                "was not written: weight {index} of tensor {name} is {}; the training has diverged, go back to an \
                 earlier checkpoint and lower the learning rate",
                stored[index]
            );
            return Err(Error::file(path, what));
        }
        if let Some((band, _)) = weights.table().band(tensor.param, tensor.layer)
            && let Some((j, i, _)) = safetensors::first_outside(band, band.panels(), stored)
        {
            return Err(Error::Internal(format!(
                "the weight of tensor {name} at wide row {j}, narrow column {i} lies outside the band, but is not zero"
            )));
        }
    }
    Ok(())
}

/// A tensor's dense matrix, copied only when it is packed.
fn dense_or_stored(weights: &Weights, tensor: Tensor) -> Cow<'_, [f32]> {
    match tensor.packed {
        None => Cow::Borrowed(weights.stored(tensor.param, tensor.layer)),
        Some(_) => Cow::Owned(weights.dense(tensor.param, tensor.layer)),
    }
}

/// Opens a regular file; anything else could block or never end.
fn open(path: &Path) -> Result<File> {
    if !fs::metadata(path).map_err(Error::io("open", path))?.is_file() {
        return Err(Error::file(path, "is not a regular file; name a checkpoint"));
    }
    File::open(path).map_err(Error::io("open", path))
}

fn file_len(path: &Path, file: &File) -> Result<u64> {
    Ok(file.metadata().map_err(Error::io("read", path))?.len())
}

/// The file's first 16 bytes, or as many as it has.
fn first_bytes(path: &Path) -> Result<Vec<u8>> {
    let mut start = Vec::new();
    open(path)?.take(16).read_to_end(&mut start).map_err(Error::io("read", path))?;
    Ok(start)
}

fn first_word(start: &[u8]) -> Option<i32> {
    start.first_chunk().map(|bytes| i32::from_le_bytes(*bytes))
}

/// What a file that is no checkpoint seems to be, from its first bytes.
fn unknown(start: &[u8]) -> String {
    const KNOWN: &str = "checkpoints are bandtrain's .safetensors, llm.c's .bin (versions 3 and 5) and Hugging Face \
                         GPT-2 folders";
    let is = match first_word(start) {
        Some(20240520) => "is a file of tokens, not a checkpoint; give it as training or validation data",
        Some(20240522) => "is one of llm.c's evaluation files (HellaSwag or MMLU), not a checkpoint",
        Some(20240328) => "is one of llm.c's tokenizer files, not a checkpoint",
        Some(20240527) => "is one of llm.c's optimizer state files, not a checkpoint; name the model file beside it",
        _ => by_signature(start),
    };
    let bytes: Vec<_> = start.iter().map(|byte| format!("{byte:02x}")).collect();
    match bytes.is_empty() {
        true => format!("is empty; {KNOWN}"),
        false => format!("{is} (first bytes {}); {KNOWN}", bytes.join(" ")),
    }
}

fn by_signature(start: &[u8]) -> &'static str {
    match start {
        [b'P', b'K', 3, 4, ..] | [0x80, 2..=5, ..] => {
            "is a PyTorch pickle or a zip archive, not a checkpoint; save it as safetensors first"
        }
        [b'G', b'G', b'U', b'F', ..] => "is a GGUF file, which cannot be read",
        [0x1f, 0x8b, ..] => "is compressed with gzip; decompress it first",
        [b'v', b'e', b'r', b's', b'i', b'o', b'n', b' ', ..] => {
            "is a Git LFS pointer, not the file it stands for; fetch that with 'git lfs pull'"
        }
        _ => "is no checkpoint",
    }
}
