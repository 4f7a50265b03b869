//! The model's sizes, checked once, and the presets.

use crate::bandwidths::Bandwidths;
use crate::blocks;
use crate::error::{Error, Result};
use crate::optim::Schedule;
use serde::{Deserialize, Serialize};

/// The vocabulary rows are padded to a multiple of this; padded logits never take part in the softmax.
pub const VOCAB_PADDING: usize = 64;

/// Sizes no honest model exceeds. They bound what a file's header can make us allocate.
const MAX_CHANNELS: usize = 1 << 16;
const MAX_LAYERS: usize = 1 << 10;
const MAX_MLP_WIDTH: usize = 4 * MAX_CHANNELS;
const MAX_SEQ_LEN: usize = 1 << 20;
/// Blocks that patterns choose from, over all layers.
const MAX_BLOCKS: usize = 1 << 17;
/// Token files hold 16-bit tokens.
const MAX_VOCAB: usize = 1 << 16;

/// The sizes of one GPT-2 model. Letters as in the field: C, L, NH, T, V, Vp.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GptConfig {
    /// C: width of the residual stream.
    pub channels: usize,
    /// L: transformer blocks.
    pub num_layers: usize,
    /// NH: attention heads; divides C.
    pub num_heads: usize,
    /// T: the longest sequence the position embedding knows.
    pub max_seq_len: usize,
    /// V: tokens that exist.
    pub vocab_size: usize,
    /// Vp: rows of the token embedding, V padded; the rows from V on are zero.
    pub padded_vocab_size: usize,
    /// W, width of the MLP, where it is not 4C: [`GptConfig::mlp_width`] tells it, [`GptConfig::with_mlp_width`] sets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mlp_width: Option<usize>,
    /// Bandwidths of FC1 (C -> W) in outputs, or patterns; 0 is dense.
    pub fc1_bandwidth: Bandwidths,
    /// Bandwidths of FC2 (W -> C) in inputs, or patterns; 0 is dense.
    pub fc2_bandwidth: Bandwidths,
}

impl GptConfig {
    /// W: width of the MLP, 4C unless it was set.
    pub fn mlp_width(&self) -> usize {
        self.mlp_width.unwrap_or(self.full_mlp_width())
    }

    /// 4C, GPT-2's width of the MLP.
    pub fn full_mlp_width(&self) -> usize {
        self.channels.saturating_mul(4)
    }

    /// The same sizes with an MLP of `width`.
    pub fn with_mlp_width(self, width: usize) -> Self {
        Self { mlp_width: (width != self.full_mlp_width()).then_some(width), ..self }
    }

    /// HS: channels of one attention head, C / NH.
    pub fn head_size(&self) -> usize {
        self.channels / self.num_heads
    }

    /// Returns the configuration when all sizes fit each other.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the first size that does not fit.
    pub fn checked(self) -> Result<Self> {
        let GptConfig { channels, num_layers, num_heads, max_seq_len, vocab_size, padded_vocab_size, .. } = self;
        let in_range = |name: &str, value: usize, most: usize| {
            if value == 0 || value > most {
                return Err(Error::usage(format!("{name} is {value}, but must lie between 1 and {most}")));
            }
            Ok(())
        };
        in_range("the number of channels C", channels, MAX_CHANNELS)?;
        in_range("the number of layers L", num_layers, MAX_LAYERS)?;
        in_range("the number of heads NH", num_heads, MAX_CHANNELS)?;
        in_range("the width of the MLP W", self.mlp_width(), MAX_MLP_WIDTH)?;
        in_range("the longest sequence T", max_seq_len, MAX_SEQ_LEN)?;
        in_range("the vocabulary size V", vocab_size, MAX_VOCAB)?;
        self.fc1_bandwidth.checked(num_layers)?;
        self.fc2_bandwidth.checked(num_layers)?;
        self.check_blocks()?;
        if !channels.is_multiple_of(num_heads) {
            return Err(Error::usage(format!(
                "C = {channels} channels cannot be shared equally by NH = {num_heads} heads; choose NH that divides C"
            )));
        }
        if padded_vocab_size < vocab_size || padded_vocab_size > MAX_VOCAB + VOCAB_PADDING {
            return Err(Error::usage(format!(
                "the padded vocabulary Vp = {padded_vocab_size} must be at least V = {vocab_size} and at most {}",
                MAX_VOCAB + VOCAB_PADDING
            )));
        }
        Ok(self)
    }

    /// Patterns of blocks are laid out before any weight is: no file may make us lay out more than an honest model has.
    fn check_blocks(&self) -> Result<()> {
        let patterns = [self.fc1_bandwidth, self.fc2_bandwidth].map(|all| all.patterns(self.num_layers));
        let (down, across) = blocks::grid(self.channels, self.mlp_width());
        let count = patterns.iter().sum::<usize>() * down * across;
        if count > MAX_BLOCKS {
            return Err(Error::usage(format!(
                "the patterns of this model choose from {count} blocks, but {MAX_BLOCKS} are the most; choose a smaller \
                 model, or bands"
            )));
        }
        Ok(())
    }
}

/// Pads a vocabulary size to the next multiple of [`VOCAB_PADDING`].
pub const fn padded_vocab(vocab_size: usize) -> usize {
    vocab_size.next_multiple_of(VOCAB_PADDING)
}

/// A named model with the training defaults that suit it.
#[derive(Debug, Clone, Copy)]
pub struct Preset {
    /// The name given to `--preset`.
    pub name: &'static str,
    /// The model's sizes.
    pub model: GptConfig,
    /// B: sequences per batch.
    pub batch_size: usize,
    /// Optimizer steps.
    pub steps: u64,
    /// Learning rate at its peak.
    pub learning_rate: f64,
    /// How it runs.
    pub schedule: Schedule,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Steps between validations.
    pub val_every: u64,
    /// Steps between samples.
    pub sample_every: u64,
}

const fn gpt(channels: usize, num_layers: usize, num_heads: usize, max_seq_len: usize, vocab_size: usize) -> GptConfig {
    GptConfig {
        channels,
        num_layers,
        num_heads,
        max_seq_len,
        vocab_size,
        padded_vocab_size: vocab_size.next_multiple_of(VOCAB_PADDING),
        mlp_width: None,
        fc1_bandwidth: Bandwidths::DENSE,
        fc2_bandwidth: Bandwidths::DENSE,
    }
}

/// Tokens of GPT-2's BPE, the end-of-text token included.
pub const GPT2_VOCAB: usize = 50257;
/// Tokens of the byte tokenizer: 256 bytes and the end-of-text token.
pub const BYTES_VOCAB: usize = 257;

const fn standard(name: &'static str, model: GptConfig, batch_size: usize) -> Preset {
    Preset {
        name,
        model,
        batch_size,
        steps: 3000,
        learning_rate: 3e-4,
        schedule: Schedule::Constant,
        warmup: 0,
        val_every: 100,
        sample_every: 500,
    }
}

/// Every preset, smallest first. `tinystories-51m` is the experiment's model; `toy` shows the band without being asked.
pub const PRESETS: [Preset; 7] = [
    Preset {
        name: "toy",
        model: GptConfig { fc1_bandwidth: Bandwidths::Same(256), ..gpt(128, 4, 4, 128, BYTES_VOCAB) },
        batch_size: 8,
        steps: 600,
        learning_rate: 3e-3,
        schedule: Schedule::Cosine,
        warmup: 20,
        val_every: 100,
        sample_every: 200,
    },
    standard("tinystories-7m", gpt(128, 4, 4, 256, GPT2_VOCAB), 16),
    standard("tinystories-51m", gpt(512, 8, 8, 512, GPT2_VOCAB), 16),
    standard("gpt2", gpt(768, 12, 12, 1024, GPT2_VOCAB), 4),
    standard("gpt2-medium", gpt(1024, 24, 16, 1024, GPT2_VOCAB), 4),
    standard("gpt2-large", gpt(1280, 36, 20, 1024, GPT2_VOCAB), 4),
    standard("gpt2-xl", gpt(1600, 48, 25, 1024, GPT2_VOCAB), 4),
];

/// Finds a preset by name.
///
/// # Errors
/// [`Error::Usage`] listing the names there are.
pub fn preset(name: &str) -> Result<Preset> {
    PRESETS.iter().copied().find(|preset| preset.name == name).ok_or_else(|| {
        let names: Vec<_> = PRESETS.iter().map(|preset| preset.name).collect();
        Error::usage(format!("there is no preset '{name}'; choose one of {}", names.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_valid() {
        for preset in PRESETS {
            preset.model.checked().unwrap();
        }
    }

    #[test]
    fn heads_must_divide_channels() {
        let error = GptConfig { num_heads: 5, ..PRESETS[0].model }.checked().unwrap_err();
        assert!(error.to_string().contains("choose NH that divides C"), "{error}");
    }

    #[test]
    fn zero_and_absurd_sizes_are_refused() {
        for broken in [
            GptConfig { channels: 0, ..PRESETS[0].model },
            GptConfig { num_layers: 1 << 30, ..PRESETS[0].model },
            GptConfig { max_seq_len: 0, ..PRESETS[0].model },
            GptConfig { vocab_size: 1 << 20, ..PRESETS[0].model },
            GptConfig { padded_vocab_size: 1, ..PRESETS[0].model },
            PRESETS[0].model.with_mlp_width(0),
            PRESETS[0].model.with_mlp_width(1 << 30),
            GptConfig { fc2_bandwidth: "1,2,3".parse().unwrap(), ..PRESETS[0].model },
            GptConfig {
                channels: MAX_CHANNELS,
                num_layers: MAX_LAYERS,
                fc1_bandwidth: "random:0.5".parse().unwrap(),
                ..PRESETS[0].model
            },
        ] {
            assert!(broken.checked().is_err(), "{broken:?}");
        }
    }
}
