//! Hugging Face's GPT-2: a folder with `config.json` and `model.safetensors`, dense, and when written the tokenizer's files.
//!
//! The projections `c_attn`, `c_proj` and `c_fc` are Conv1D there, [inputs, outputs]: the transpose of ours. The token
//! embedding has no padded rows, and the head is tied to it. Source of the names and fields: transformers,
//! `modeling_gpt2.py` and `configuration_gpt2.py`.

use crate::atomic::{AtomicFile, SealedFile};
use crate::bandwidths::Bandwidths;
use crate::checkpoint::container::{self, Container, Entry};
use crate::checkpoint::{Checkpoint, Encoding, Meta, dense_or_stored, file_len, hf_tokenizer, open};
use crate::config::{GptConfig, padded_vocab};
use crate::error::{Error, Result};
use crate::output::quoted;
use crate::shapes::{Param, ParamTable, Tensor};
use crate::weights::Weights;
use rayon::prelude::*;
use serde::Deserialize;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const MODEL_FILE: &str = "model.safetensors";
const CONFIG_FILE: &str = "config.json";
const GENERATION_FILE: &str = "generation_config.json";
/// What transformers puts before every name but the head's.
const PREFIX: &str = "transformer.";
/// The head's weight, which must equal the token embedding.
const HEAD: &str = "lm_head.weight";
/// A configuration is a few kilobytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
const READABLE: [Encoding; 3] = [Encoding::F32, Encoding::F16, Encoding::Bf16];

/// The tensor's name in transformers, without the prefix.
fn hf_name(tensor: Tensor) -> String {
    let name = match tensor.param {
        Param::Wte => return "wte.weight".to_string(),
        Param::Wpe => return "wpe.weight".to_string(),
        Param::Lnfw => return "ln_f.weight".to_string(),
        Param::Lnfb => return "ln_f.bias".to_string(),
        Param::Ln1w => "ln_1.weight",
        Param::Ln1b => "ln_1.bias",
        Param::Qkvw => "attn.c_attn.weight",
        Param::Qkvb => "attn.c_attn.bias",
        Param::Attprojw => "attn.c_proj.weight",
        Param::Attprojb => "attn.c_proj.bias",
        Param::Ln2w => "ln_2.weight",
        Param::Ln2b => "ln_2.bias",
        Param::Fcw => "mlp.c_fc.weight",
        Param::Fcb => "mlp.c_fc.bias",
        Param::Fcprojw => "mlp.c_proj.weight",
        Param::Fcprojb => "mlp.c_proj.bias",
    };
    format!("h.{}.{name}", tensor.layer)
}

/// Whether transformers stores the tensor as a Conv1D weight, transposed.
fn is_conv1d(param: Param) -> bool {
    matches!(param, Param::Qkvw | Param::Attprojw | Param::Fcw | Param::Fcprojw)
}

/// The tensor's shape in transformers.
fn hf_shape(param: Param, config: &GptConfig) -> Vec<usize> {
    let (rows, cols) = param.shape(config);
    match param {
        Param::Wte => vec![config.vocab_size, cols],
        _ if is_conv1d(param) => vec![cols, rows],
        _ if param.is_matrix() => vec![rows, cols],
        _ => vec![cols],
    }
}

/// Whether the file holds a GPT-2 under transformers' names.
pub(super) fn recognises(container: &Container) -> bool {
    prefix(container).is_some()
}

/// The prefix that the file's names have, `None` when it holds no GPT-2.
fn prefix(container: &Container) -> Option<&'static str> {
    [PREFIX, ""].into_iter().find(|prefix| container.shape(&format!("{prefix}wte.weight")).is_some())
}

/// Writes the folder `path`, made when it is missing; all files are complete before any gets its name. The tokenizer's are
/// among them when the checkpoint has one.
///
/// # Errors
/// [`Error::File`] when `path` is a file, [`Error::Io`]; then nothing new is left.
pub fn write(path: &Path, checkpoint: &Checkpoint) -> Result<()> {
    if path.is_file() {
        return Err(Error::file(path, "is a file, but a Hugging Face checkpoint is a folder; name a folder"));
    }
    let existed = path.is_dir();
    fs::create_dir_all(path).map_err(Error::io("create", path))?;
    let written = write_files(path, checkpoint);
    if written.is_err() && !existed {
        // Removes only a folder that is empty; the error that led here is the one to report.
        let _ = fs::remove_dir(path);
    }
    written
}

fn write_files(folder: &Path, checkpoint: &Checkpoint) -> Result<()> {
    let (config, tokenizer) = (checkpoint.weights.config(), checkpoint.tokenizer());
    // A model without a tokenizer ends its texts, if at all, with its last token, as the known ones do.
    let end_of_text = tokenizer.map_or(config.vocab_size - 1, |tokenizer| tokenizer.end_of_text().into());
    let mut texts =
        vec![(CONFIG_FILE, config_json(config, end_of_text)), (GENERATION_FILE, generation_json(end_of_text))];
    texts.extend(tokenizer.into_iter().flat_map(|tokenizer| hf_tokenizer::files(tokenizer, config.max_seq_len)));
    let mut sealed = vec![write_model(&folder.join(MODEL_FILE), checkpoint)?];
    for (name, text) in texts {
        let mut file = AtomicFile::create(&folder.join(name))?;
        file.append(text.as_bytes())?;
        sealed.push(file.seal()?);
    }
    sealed.into_iter().try_for_each(SealedFile::publish)
}

fn write_model(path: &Path, checkpoint: &Checkpoint) -> Result<SealedFile> {
    let (config, tensors) = (checkpoint.weights.config(), checkpoint.weights.table().tensors());
    let entry = |tensor: &Tensor| (format!("{PREFIX}{}", hf_name(*tensor)), hf_shape(tensor.param, config));
    let entries: Vec<Entry> = tensors.iter().map(entry).collect();
    // transformers refuses files that do not say which framework wrote them.
    let format = ("format".to_string(), "pt".to_string());
    let notes: BTreeMap<_, _> = checkpoint.meta.entries().chain([format]).collect();
    container::write(path, notes, &entries, |index| hf_values(&checkpoint.weights, tensors[index]))
}

/// The tensor's values in transformers' layout.
fn hf_values(weights: &Weights, tensor: Tensor) -> Cow<'_, [f32]> {
    let (rows, cols) = tensor.param.shape(weights.config());
    match tensor.param {
        Param::Wte => Cow::Borrowed(&weights.stored(Param::Wte, 0)[..weights.config().vocab_size * cols]),
        param if is_conv1d(param) => Cow::Owned(transposed(&dense_or_stored(weights, tensor), rows, cols)),
        _ => dense_or_stored(weights, tensor),
    }
}

/// The transpose of a [rows, cols] matrix.
fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut result = vec![0.0; rows * cols];
    result.par_chunks_mut(rows).enumerate().for_each(|(col, line)| {
        line.iter_mut().enumerate().for_each(|(row, value)| *value = values[row * cols + col]);
    });
    result
}

fn config_json(config: &GptConfig, end_of_text: usize) -> String {
    let fields = serde_json::json!({
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.0,
        "bos_token_id": end_of_text,
        "embd_pdrop": 0.0,
        "eos_token_id": end_of_text,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "model_type": "gpt2",
        "n_embd": config.channels,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "n_layer": config.num_layers,
        "n_positions": config.max_seq_len,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": true,
        "torch_dtype": "float32",
        "vocab_size": config.vocab_size,
    });
    format!("{fields:#}\n")
}

fn generation_json(end_of_text: usize) -> String {
    let fields = serde_json::json!({
        "_from_model_config": true, "bos_token_id": end_of_text, "eos_token_id": end_of_text,
    });
    format!("{fields:#}\n")
}

/// Reads a folder, or a bare model file with `config.json` beside it. Padded vocabulary rows are added.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] when a file is missing, when the configuration describes a model that is not GPT-2 as
/// bandtrain computes it, when tensors and configuration disagree, and when a weight is not finite.
pub fn read(path: &Path) -> Result<Checkpoint> {
    let (model_path, config_path) = paths(path)?;
    let mut container = Container::open(&model_path)?;
    let Some(prefix) = prefix(&container) else {
        return Err(Error::file(&model_path, "has no tensor wte.weight; only GPT-2 models can be read"));
    };
    let hf_config = HfConfig::read(&config_path)?;
    let config = derive_config(&container, prefix, &hf_config)?;
    // Other programs may use the same keys for other things; theirs are not ours to judge.
    let meta = Meta::take(&mut container.notes(), &config).unwrap_or_else(|_| Meta::of_config(&config));
    check_tensors(&container, prefix, &config)?;
    let weights = read_weights(&mut container, prefix, &config)?;
    check_head(&mut container, &weights, hf_config.tie_word_embeddings)?;
    Ok(Checkpoint { weights, meta })
}

/// The model file and the configuration of a folder or a bare model file.
fn paths(path: &Path) -> Result<(PathBuf, PathBuf)> {
    if !path.is_dir() {
        return Ok((path.to_path_buf(), path.with_file_name(CONFIG_FILE)));
    }
    let model = path.join(MODEL_FILE);
    if model.is_file() {
        return Ok((model, path.join(CONFIG_FILE)));
    }
    let what = if path.join("model.safetensors.index.json").is_file() {
        "holds a model split into several files; save it again as one (save_pretrained with a larger max_shard_size)"
    } else if path.join("pytorch_model.bin").is_file() {
        "holds pytorch_model.bin, but no model.safetensors; save it again with save_pretrained"
    } else {
        "is a folder without model.safetensors; name a checkpoint file or a Hugging Face GPT-2 folder"
    };
    Err(Error::file(path, what))
}

/// The fields of `config.json` that decide what the weights mean. Absent ones have transformers' defaults, which are
/// GPT-2's.
#[derive(Debug, Deserialize)]
struct HfConfig {
    #[serde(skip)]
    path: PathBuf,
    model_type: Option<String>,
    n_head: Option<usize>,
    n_embd: Option<usize>,
    n_layer: Option<usize>,
    n_positions: Option<usize>,
    vocab_size: Option<usize>,
    n_inner: Option<usize>,
    activation_function: Option<String>,
    layer_norm_epsilon: Option<f64>,
    tie_word_embeddings: Option<bool>,
    scale_attn_weights: Option<bool>,
    scale_attn_by_inverse_layer_idx: Option<bool>,
    add_cross_attention: Option<bool>,
}

impl HfConfig {
    fn read(path: &Path) -> Result<Self> {
        if !path.is_file() {
            let what = "does not exist, but the number of heads (n_head) stands only there; put the model's config.json \
                        beside its weights";
            return Err(Error::file(path, what));
        }
        let file = open(path)?;
        if file_len(path, &file)? > MAX_CONFIG_BYTES {
            return Err(Error::file(path, format!("is longer than {MAX_CONFIG_BYTES} bytes; it is no configuration")));
        }
        let text = fs::read(path).map_err(Error::io("read", path))?;
        let config: Self = serde_json::from_slice(&text).map_err(|error| {
            Error::file(path, format!("is not a model's configuration: {}", quoted(&error.to_string())))
        })?;
        let config = Self { path: path.to_path_buf(), ..config };
        config.check_kind()?;
        Ok(config)
    }

    /// Refuses what bandtrain would compute otherwise than transformers.
    fn check_kind(&self) -> Result<()> {
        let kind = self.model_type.as_deref().unwrap_or("gpt2");
        let activation = self.activation_function.as_deref().unwrap_or("gelu_new");
        let epsilon = self.layer_norm_epsilon.unwrap_or(1e-5);
        let refused = [
            (kind != "gpt2", format!("model_type is {}, not gpt2", quoted(kind))),
            // Two names of one function.
            (
                !["gelu_new", "gelu_pytorch_tanh"].contains(&activation),
                format!("activation_function is {}, not gelu_new", quoted(activation)),
            ),
            (epsilon != 1e-5, format!("layer_norm_epsilon is {epsilon}, not 1e-5")),
            (self.scale_attn_weights == Some(false), "scale_attn_weights is false, not true".to_string()),
            (
                self.scale_attn_by_inverse_layer_idx == Some(true),
                "scale_attn_by_inverse_layer_idx is true, not false".to_string(),
            ),
            (self.add_cross_attention == Some(true), "add_cross_attention is true, not false".to_string()),
        ];
        match refused.into_iter().find(|(wrong, _)| *wrong) {
            None => Ok(()),
            Some((_, what)) => Err(Error::file(&self.path, format!("{what}; such a model cannot be read"))),
        }
    }
}

/// The model's sizes: from the tensors, the heads from the configuration, which must agree wherever it speaks.
fn derive_config(container: &Container, prefix: &str, hf: &HfConfig) -> Result<GptConfig> {
    let (vocab_size, channels) = matrix_shape(container, &format!("{prefix}wte.weight"))?;
    let (max_seq_len, _) = matrix_shape(container, &format!("{prefix}wpe.weight"))?;
    let has_layer = |layer: &usize| container.shape(&format!("{prefix}h.{layer}.ln_1.weight")).is_some();
    let num_layers = (0..).take_while(has_layer).count();
    let fault = |what: String| Error::file(&hf.path, what);
    // Conv1D: inputs by outputs. What is missing here is told by who checks all tensors.
    let full = channels.saturating_mul(4);
    let mlp_width = match container.shape(&format!("{prefix}h.0.mlp.c_fc.weight")) {
        Some(&[_, width]) => width,
        _ => full,
    };
    let stated = [
        ("vocab_size", hf.vocab_size, vocab_size),
        ("n_embd", hf.n_embd, channels),
        ("n_positions", hf.n_positions, max_seq_len),
        ("n_layer", hf.n_layer, num_layers),
        ("n_inner", Some(hf.n_inner.unwrap_or(full)), mlp_width),
    ];
    if let Some((name, Some(stated), found)) =
        stated.into_iter().find(|(_, stated, found)| stated.is_some_and(|stated| stated != *found))
    {
        let what =
            format!("says {name} is {stated}, but the tensors say {found}; the two files do not belong together");
        return Err(fault(what));
    }
    let num_heads = hf.n_head.ok_or_else(|| fault("lacks n_head, the number of heads; add it".to_string()))?;
    // Far beyond any vocabulary `checked` refuses; the bound keeps the rounding up from overflowing.
    let padded_vocab_size = padded_vocab(vocab_size.min(1 << 30));
    let sizes = GptConfig {
        channels,
        num_layers,
        num_heads,
        max_seq_len,
        vocab_size,
        padded_vocab_size,
        mlp_width: None,
        fc1_bandwidth: Bandwidths::DENSE,
        fc2_bandwidth: Bandwidths::DENSE,
    }
    .with_mlp_width(mlp_width);
    sizes.checked().map_err(|error| Error::file(container.path(), format!("its tensors make no model: {error}")))
}

fn matrix_shape(container: &Container, name: &str) -> Result<(usize, usize)> {
    match container.shape(name) {
        Some(&[rows, cols]) => Ok((rows, cols)),
        Some(shape) => {
            Err(Error::file(container.path(), format!("tensor {name} has shape {shape:?}, but must be a matrix")))
        }
        None => Err(Error::file(container.path(), format!("lacks tensor {name}; the file is incomplete"))),
    }
}

/// Exactly the model's tensors are there; masks that older versions of transformers saved, and the head, may be.
fn check_tensors(container: &Container, prefix: &str, config: &GptConfig) -> Result<()> {
    let mut known = BTreeSet::from([HEAD.to_string()]);
    for &tensor in ParamTable::new(config)?.tensors() {
        let name = format!("{prefix}{}", hf_name(tensor));
        container.check(&name, &hf_shape(tensor.param, config), &READABLE)?;
        known.insert(name);
    }
    let is_mask = |name: &String| name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias");
    match container.names().into_iter().find(|name| !known.contains(name) && !is_mask(name)) {
        None => Ok(()),
        Some(name) => {
            let what =
                format!("holds tensor {}, which GPT-2 does not have; such a model cannot be read", quoted(&name));
            Err(Error::file(container.path(), what))
        }
    }
}

fn read_weights(container: &mut Container, prefix: &str, config: &GptConfig) -> Result<Weights> {
    let mut weights = Weights::zeros(config)?;
    for index in 0..weights.table().tensors().len() {
        let tensor = weights.table().tensors()[index];
        let name = format!("{prefix}{}", hf_name(tensor));
        let len = hf_shape(tensor.param, config).iter().product();
        if is_conv1d(tensor.param) {
            let mut values = vec![0.0; len];
            container.read(&name, &mut values)?;
            let (rows, cols) = tensor.param.shape(config);
            weights.set_dense(tensor.param, tensor.layer, &transposed(&values, cols, rows));
        } else {
            container.read(&name, &mut weights.stored_mut(tensor.param, tensor.layer)[..len])?;
        }
    }
    Ok(weights)
}

/// A head of its own must hold the token embedding's values: bandtrain ties the two.
fn check_head(container: &mut Container, weights: &Weights, tied: Option<bool>) -> Result<()> {
    let config = weights.config();
    if container.shape(HEAD).is_none() {
        return match tied {
            Some(false) => Err(Error::file(
                container.path(),
                format!("lacks tensor {HEAD}, which its configuration does not tie to the embedding; it is incomplete"),
            )),
            _ => Ok(()),
        };
    }
    container.check(HEAD, &hf_shape(Param::Wte, config), &READABLE)?;
    let mut head = vec![0.0; config.vocab_size * config.channels];
    container.read(HEAD, &mut head)?;
    match head.iter().zip(weights.stored(Param::Wte, 0)).position(|(head, embedding)| head != embedding) {
        None => Ok(()),
        Some(index) => Err(Error::file(
            container.path(),
            format!(
                "tensor {HEAD} differs from wte.weight at weight {index}, but bandtrain ties the head to the token \
                 embedding; such a model cannot be read"
            ),
        )),
    }
}
