//! llm.c's model files, dense: version 3 (fp32) and version 5 (bf16).
//!
//! 256 little-endian int32 (magic, version, T, V, L, NH, C, Vp, zeros), then the sixteen kinds of tensors in the order of
//! [`Param::ALL`], each for all layers together. Source of the format: llm.c, `train_gpt2.py` (`write_model`) and
//! `train_gpt2.cu` (`gpt2_build_from_checkpoint`).

use crate::atomic::{AtomicFile, SealedFile};
use crate::bandwidths::Bandwidths;
use crate::checkpoint::values::{self, Encoding};
use crate::checkpoint::{Checked, dense_or_stored, file_len, open};
use crate::config::GptConfig;
use crate::error::{Error, Result};
use crate::shapes::Param;
use crate::weights::Weights;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The first word of a model file.
pub const MAGIC: i32 = 20240326;
const HEADER_WORDS: usize = 256;
const HEADER_BYTES: usize = 4 * HEADER_WORDS;

/// The encoding that a version of the format stores.
fn encoding_of(version: i32) -> Option<Encoding> {
    match version {
        3 => Some(Encoding::F32),
        5 => Some(Encoding::Bf16),
        _ => None,
    }
}

fn version_of(encoding: Encoding) -> i32 {
    if encoding == Encoding::F32 { 3 } else { 5 }
}

/// Reads the header alone: the model's sizes, dense, and how its weights are stored. The file's length is checked.
///
/// # Errors
/// [`Error::File`] for a wrong magic, version or size, and for a file that is not exactly as long as its header implies.
pub fn read_header(path: &Path) -> Result<(GptConfig, Encoding)> {
    parse_header(path, &mut open(path)?)
}

/// Reads a model, tensor by tensor. It is dense even where its values happen to lie in a band.
///
/// # Errors
/// As [`read_header`]; and [`Error::File`] naming the first weight that is not finite.
pub fn read(path: &Path) -> Result<Weights> {
    let mut file = open(path)?;
    let (config, encoding) = parse_header(path, &mut file)?;
    let mut weights = Weights::zeros(&config)?;
    for index in 0..weights.table().tensors().len() {
        let tensor = weights.table().tensors()[index];
        let stored = weights.stored_mut(tensor.param, tensor.layer);
        values::read(&mut file, encoding, stored).map_err(Error::io("read", path))?;
        values::check_finite(path, &tensor.name(), stored)?;
    }
    Ok(weights)
}

/// Writes a model; banded weights become dense matrices with zeros. `encoding` is F32 (version 3) or Bf16 (version 5).
///
/// # Errors
/// [`Error::Io`].
pub fn write(path: &Path, weights: &Weights, encoding: Encoding) -> Result<SealedFile> {
    let mut file = AtomicFile::create(path)?;
    file.append(bytemuck::cast_slice(&header(weights.config(), version_of(encoding))))?;
    for &tensor in weights.table().tensors() {
        values::append(&mut file, encoding, &dense_or_stored(weights, tensor))?;
    }
    file.seal()
}

fn header(config: &GptConfig, version: i32) -> [i32; HEADER_WORDS] {
    let GptConfig { channels, num_layers, num_heads, max_seq_len, vocab_size, padded_vocab_size, .. } = *config;
    let mut header = [0; HEADER_WORDS];
    header[..2].copy_from_slice(&[MAGIC, version]);
    let sizes = [max_seq_len, vocab_size, num_layers, num_heads, channels, padded_vocab_size];
    // A checked configuration's sizes are at most 2^20.
    header[2..8].iter_mut().zip(sizes).for_each(|(word, size)| *word = size as i32);
    header
}

fn parse_header(path: &Path, file: &mut File) -> Result<(GptConfig, Encoding)> {
    let len = file_len(path, file)?;
    if len < HEADER_BYTES as u64 {
        let what = format!(
            "is {len} bytes long, but an llm.c model starts with a header of {HEADER_BYTES} bytes: it is truncated; \
             copy or download it again"
        );
        return Err(Error::file(path, what));
    }
    let mut words = [0i32; HEADER_WORDS];
    file.read_exact(bytemuck::cast_slice_mut(&mut words)).map_err(Error::io("read", path))?;
    let (config, encoding) = check_header(&words).map_err(|what| Error::file(path, what))?;
    check_len(len, &config, encoding).map_err(|what| Error::file(path, what))?;
    Ok((config, encoding))
}

fn check_header(words: &[i32; HEADER_WORDS]) -> Checked<(GptConfig, Encoding)> {
    if words[0] != MAGIC {
        return Err(format!("starts with {}, but an llm.c model starts with {MAGIC}; name a model file", words[0]));
    }
    let encoding = encoding_of(words[1]).ok_or_else(|| {
        format!(
            "is an llm.c model of version {}, but only versions 3 (fp32) and 5 (bf16) can be read; \
             export it again with a current llm.c",
            words[1]
        )
    })?;
    let size = |at: usize, name: &str| {
        usize::try_from(words[at]).map_err(|_| format!("its header gives {name} as {}; it is damaged", words[at]))
    };
    let config = GptConfig {
        max_seq_len: size(2, "the longest sequence T")?,
        vocab_size: size(3, "the vocabulary size V")?,
        num_layers: size(4, "the number of layers L")?,
        num_heads: size(5, "the number of heads NH")?,
        channels: size(6, "the number of channels C")?,
        padded_vocab_size: size(7, "the padded vocabulary Vp")?,
        mlp_width: None,
        fc1_bandwidth: Bandwidths::DENSE,
        fc2_bandwidth: Bandwidths::DENSE,
    };
    let config = config.checked().map_err(|error| format!("its header makes no model: {error}"))?;
    Ok((config, encoding))
}

fn check_len(len: u64, config: &GptConfig, encoding: Encoding) -> Checked<()> {
    let expected = implied_len(config, encoding).ok_or("its header implies more bytes than can be counted")?;
    let GptConfig { channels, num_layers, max_seq_len, padded_vocab_size, .. } = config;
    let implied = format!("its header (C {channels}, L {num_layers}, T {max_seq_len}, Vp {padded_vocab_size}) implies");
    match len.cmp(&expected) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Less => {
            Err(format!("is {len} bytes long, but {implied} {expected}: it is truncated; copy or download it again"))
        }
        std::cmp::Ordering::Greater => Err(format!(
            "is {len} bytes long, but {implied} {expected}: bytes were appended or the header is damaged; \
             copy or download it again"
        )),
    }
}

/// Bytes of the file of a model, `None` beyond 64 bits.
fn implied_len(config: &GptConfig, encoding: Encoding) -> Option<u64> {
    let weights = Param::ALL.into_iter().try_fold(0u64, |sum, param| {
        let (rows, cols) = param.shape(config);
        let layers = if param.per_layer() { config.num_layers } else { 1 };
        sum.checked_add((rows as u64).checked_mul(cols as u64)?.checked_mul(layers as u64)?)
    })?;
    weights.checked_mul(encoding.bytes() as u64)?.checked_add(HEADER_BYTES as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bandwidths::Bandwidths;
    use crate::config::preset;

    #[test]
    fn the_reference_model_has_its_known_length() {
        let config = preset("tinystories-51m").unwrap().model;
        assert_eq!(implied_len(&config, Encoding::F32), Some(1024 + 4 * 51_237_888));
        assert_eq!(implied_len(&config, Encoding::Bf16), Some(1024 + 2 * 51_237_888));
    }

    #[test]
    fn the_header_of_a_model_is_read_back() {
        for preset in crate::config::PRESETS {
            let config = GptConfig { fc1_bandwidth: Bandwidths::DENSE, ..preset.model };
            assert_eq!(check_header(&header(&config, 5)).unwrap(), (config, Encoding::Bf16));
        }
    }
}
