//! The shape tables: every parameter and every activation of a model, with its size and its place.
//!
//! Parameters lie in one flat buffer in checkpoint order (llm.c's), gradients and moments in others of the same layout.
//! The same tables drive allocation, checkpoints and the memory estimate, so these cannot disagree.

use crate::band::{Band, Dense};
use crate::bandwidths::Connections;
use crate::blocks::{BlockPattern, Blocks};
use crate::config::GptConfig;
use crate::error::Result;

/// Tensors start at multiples of this many elements: 256 bytes of f32, the strictest alignment a GPU binding asks for.
pub const TENSOR_ALIGN: usize = 64;

/// `len` elements of a flat buffer, from `offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First element.
    pub offset: usize,
    /// Elements.
    pub len: usize,
}

impl Span {
    /// The span as an index range.
    pub fn range(self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.len
    }
}

/// The kinds of parameter tensors, in checkpoint order, under llm.c's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)] // shapes and meaning: Param::shape
pub enum Param {
    Wte,
    Wpe,
    Ln1w,
    Ln1b,
    Qkvw,
    Qkvb,
    Attprojw,
    Attprojb,
    Ln2w,
    Ln2b,
    Fcw,
    Fcb,
    Fcprojw,
    Fcprojb,
    Lnfw,
    Lnfb,
}

impl Param {
    /// All kinds, in checkpoint order.
    pub const ALL: [Param; 16] = [
        Param::Wte,
        Param::Wpe,
        Param::Ln1w,
        Param::Ln1b,
        Param::Qkvw,
        Param::Qkvb,
        Param::Attprojw,
        Param::Attprojb,
        Param::Ln2w,
        Param::Ln2b,
        Param::Fcw,
        Param::Fcb,
        Param::Fcprojw,
        Param::Fcprojb,
        Param::Lnfw,
        Param::Lnfb,
    ];

    /// llm.c's name of the tensor.
    pub fn name(self) -> &'static str {
        match self {
            Param::Wte => "wte",
            Param::Wpe => "wpe",
            Param::Ln1w => "ln1w",
            Param::Ln1b => "ln1b",
            Param::Qkvw => "qkvw",
            Param::Qkvb => "qkvb",
            Param::Attprojw => "attprojw",
            Param::Attprojb => "attprojb",
            Param::Ln2w => "ln2w",
            Param::Ln2b => "ln2b",
            Param::Fcw => "fcw",
            Param::Fcb => "fcb",
            Param::Fcprojw => "fcprojw",
            Param::Fcprojb => "fcprojb",
            Param::Lnfw => "lnfw",
            Param::Lnfb => "lnfb",
        }
    }

    /// Whether every layer has its own.
    pub fn per_layer(self) -> bool {
        !matches!(self, Param::Wte | Param::Wpe | Param::Lnfw | Param::Lnfb)
    }

    /// The name of its tensor of a layer, as [`Tensor::name`] has it.
    pub fn name_in(self, layer: usize) -> String {
        match self.per_layer() {
            true => format!("h.{layer}.{}", self.name()),
            false => self.name().to_string(),
        }
    }

    /// Whether it is a matrix: only these decay, and only these start random.
    pub fn is_matrix(self) -> bool {
        use Param::*;
        matches!(self, Wte | Wpe | Qkvw | Attprojw | Fcw | Fcprojw)
    }

    /// The dense shape of one layer's tensor: rows and columns; a vector is one row.
    pub fn shape(self, config: &GptConfig) -> (usize, usize) {
        let (c, w) = (config.channels, config.mlp_width());
        match self {
            Param::Wte => (config.padded_vocab_size, c),
            Param::Wpe => (config.max_seq_len, c),
            Param::Qkvw => (3 * c, c),
            Param::Qkvb => (1, 3 * c),
            Param::Attprojw => (c, c),
            Param::Fcw => (w, c),
            Param::Fcb => (1, w),
            Param::Fcprojw => (c, w),
            _ => (1, c),
        }
    }
}

/// One tensor of the flat parameter buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// Its kind.
    pub param: Param,
    /// Its layer; 0 for the tensors that exist once.
    pub layer: usize,
    /// Its place; packed length for a banded tensor.
    pub span: Span,
    /// How the dense matrix lies when the tensor is packed in a band; `None` when it is stored dense.
    pub packed: Option<Dense>,
}

impl Tensor {
    /// Its name in messages and in the native format: `wte`, or `h.3.fcw` for one layer's.
    pub fn name(&self) -> String {
        self.param.name_in(self.layer)
    }
}

/// Where every parameter of a model lies.
#[derive(Debug, Clone)]
pub struct ParamTable {
    tensors: Vec<Tensor>,
    first: [usize; 16],
    len: usize,
    /// Every band that a tensor is packed in, once.
    bands: Vec<Band>,
    /// For each layer which of them, `None` where it is dense.
    fc1: Vec<Option<usize>>,
    fc2: Vec<Option<usize>>,
}

impl ParamTable {
    /// Lays out the parameters of `config`, learned blocks as they start.
    ///
    /// # Errors
    /// Sizes that do not fit each other, see [`GptConfig::checked`].
    pub fn new(config: &GptConfig) -> Result<Self> {
        Self::with_blocks(config, |_, _| None)
    }

    /// Lays out the parameters of `config`, where the learned tensor of a kind and layer keeps the blocks that `blocks` says, or
    /// with `None` those that it starts from. Other tensors are not asked about.
    ///
    /// # Errors
    /// As [`ParamTable::new`]; blocks that are not those of a layer of these sizes.
    pub fn with_blocks(config: &GptConfig, blocks: impl Fn(Param, usize) -> Option<Blocks>) -> Result<Self> {
        let config = config.checked()?;
        let (narrow, wide) = (config.channels, config.mlp_width());
        let (mut known, mut bands) = (Vec::new(), Vec::new());
        let mut index = |key: (Connections, u64), param, layer| match known.iter().position(|other| *other == key) {
            _ if key.0 == Connections::DENSE => Ok(None),
            Some(index) => Ok(Some(index)),
            None => {
                let learned = if key.0.is_learned() { blocks(param, layer) } else { None };
                bands.push(match learned {
                    Some(blocks) => Band::of_blocks(narrow, wide, blocks)?,
                    None => Band::of(key.0, narrow, wide, key.1)?,
                });
                known.push(key);
                Ok::<_, crate::Error>(Some(bands.len() - 1))
            }
        };
        let mut indices = |param| -> Result<Vec<_>> {
            let layers = connections(&config, param).into_iter().enumerate();
            layers.map(|(layer, kept)| index((kept, stream(kept, layer, param)), param, layer)).collect()
        };
        let (fc1, fc2) = (indices(Param::Fcw)?, indices(Param::Fcprojw)?);
        let mut table = Self { tensors: Vec::new(), first: [0; 16], len: 0, bands, fc1, fc2 };
        for param in Param::ALL {
            table.first[param as usize] = table.tensors.len();
            for layer in 0..if param.per_layer() { config.num_layers } else { 1 } {
                table.push(param, layer, &config);
            }
        }
        Ok(table)
    }

    fn push(&mut self, param: Param, layer: usize, config: &GptConfig) {
        let (rows, cols) = param.shape(config);
        let (len, packed) = match self.band(param, layer) {
            Some((band, layout)) => (band.packed_len(), Some(layout)),
            None => (rows * cols, None),
        };
        self.tensors.push(Tensor { param, layer, span: Span { offset: self.len, len }, packed });
        self.len = (self.len + len).next_multiple_of(TENSOR_ALIGN);
    }

    /// Every tensor, in checkpoint order.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Elements of the flat buffer, alignment gaps included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no parameters (there always are).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The tensor of a kind and layer (0 for the kinds that exist once).
    pub fn tensor(&self, param: Param, layer: usize) -> Tensor {
        self.tensors[self.first[param as usize] + layer]
    }

    /// Where the tensor of a kind and layer lies.
    pub fn span(&self, param: Param, layer: usize) -> Span {
        self.tensor(param, layer).span
    }

    /// Every band that a tensor is packed in, once.
    pub fn bands(&self) -> &[Band] {
        &self.bands
    }

    /// Which of [`ParamTable::bands`] the tensor of a kind and layer is packed in; `None` when it is dense.
    pub fn band_index(&self, param: Param, layer: usize) -> Option<usize> {
        match param {
            Param::Fcw => self.fc1[layer],
            Param::Fcprojw => self.fc2[layer],
            _ => None,
        }
    }

    /// The band that the tensor of a kind and layer is packed in, with the way its dense matrix lies; `None` when it is
    /// dense.
    pub fn band(&self, param: Param, layer: usize) -> Option<(&Band, Dense)> {
        let layout = if param == Param::Fcw { Dense::WideByNarrow } else { Dense::NarrowByWide };
        self.band_index(param, layer).map(|index| (&self.bands[index], layout))
    }

    /// The spans whose weights decay: the matrices.
    pub fn decayed(&self) -> Vec<Span> {
        self.tensors.iter().filter(|tensor| tensor.param.is_matrix()).map(|tensor| tensor.span).collect()
    }

    /// Weights that exist: exact band counts, no padding of any kind.
    pub fn count(&self, config: &GptConfig) -> usize {
        Param::ALL.into_iter().map(|param| self.weights(config, param)).sum()
    }

    /// Weights that exist in all layers' tensors of a kind.
    pub fn weights(&self, config: &GptConfig, kind: Param) -> usize {
        let size = |tensor: &Tensor| match (tensor.param, self.band(tensor.param, tensor.layer)) {
            (_, Some((band, _))) => band.count(),
            (Param::Wte, None) => config.vocab_size * config.channels,
            (param, None) => param.shape(config).0 * param.shape(config).1,
        };
        self.tensors.iter().filter(|tensor| tensor.param == kind).map(size).sum()
    }
}

/// What each layer's FC1 (`fcw`) or FC2 (`fcprojw`) keeps; nothing for other kinds.
fn connections(config: &GptConfig, param: Param) -> Vec<Connections> {
    let bandwidths = match param {
        Param::Fcw => config.fc1_bandwidth,
        Param::Fcprojw => config.fc2_bandwidth,
        _ => return Vec::new(),
    };
    (0..config.num_layers).map(|layer| bandwidths.of(layer, config.num_layers)).collect()
}

/// The tensors whose blocks are learned, in checkpoint order, with what they keep.
pub fn learned_tensors(config: &GptConfig) -> Vec<(Param, usize, BlockPattern)> {
    let of = |param| {
        let learned = move |(layer, kept)| match kept {
            Connections::Pattern(pattern) if pattern.is_learned() => Some((param, layer, pattern)),
            _ => None,
        };
        connections(config, param).into_iter().enumerate().filter_map(learned)
    };
    [Param::Fcw, Param::Fcprojw].into_iter().flat_map(of).collect()
}

/// The random stream of a layer's FC1 or FC2: each has its own pattern where that is random or learned, and all have the same
/// where not.
fn stream(connections: Connections, layer: usize, param: Param) -> u64 {
    match connections {
        Connections::Pattern(BlockPattern::Random { .. } | BlockPattern::Learned { .. }) => {
            2 * layer as u64 + u64::from(param == Param::Fcprojw)
        }
        Connections::Pattern(BlockPattern::Strided { .. }) | Connections::Band(_) => 0,
    }
}

/// One activation buffer of a training step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activation {
    /// Its name, as `info` prints it.
    pub name: &'static str,
    /// Whether every layer keeps its own for the backward pass.
    pub per_layer: bool,
    /// Elements of one.
    pub len: usize,
    /// Whether it holds statistics that stay fp32 in every precision.
    pub statistic: bool,
}

/// The kinds of activation buffers; [`Act::describe`] has their shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // shapes and meaning: Act::describe
pub enum Act {
    Embedded,
    Ln1,
    Ln1Mean,
    Ln1Rstd,
    Qkv,
    Attention,
    LogSumExp,
    ResidualMid,
    Ln2,
    Ln2Mean,
    Ln2Rstd,
    PreGelu,
    Gelu,
    ResidualOut,
    Lnf,
    LnfMean,
    LnfRstd,
    Branch,
    Losses,
    DResidual,
    DLayerNorm,
    DAttention,
    DQkv,
    DPreGelu,
}

impl Act {
    /// The buffers of the forward pass.
    pub const FORWARD: [Act; 19] = [
        Act::Embedded,
        Act::Ln1,
        Act::Ln1Mean,
        Act::Ln1Rstd,
        Act::Qkv,
        Act::Attention,
        Act::LogSumExp,
        Act::ResidualMid,
        Act::Ln2,
        Act::Ln2Mean,
        Act::Ln2Rstd,
        Act::PreGelu,
        Act::Gelu,
        Act::ResidualOut,
        Act::Lnf,
        Act::LnfMean,
        Act::LnfRstd,
        Act::Branch,
        Act::Losses,
    ];
    /// What the backward pass needs besides; shared by all layers.
    pub const BACKWARD: [Act; 5] = [Act::DResidual, Act::DLayerNorm, Act::DAttention, Act::DQkv, Act::DPreGelu];

    /// Name, shape and kind for a batch of B sequences of T tokens.
    pub fn describe(self, config: &GptConfig, b: usize, t: usize) -> Activation {
        let (c, w, nh) = (config.channels, config.mlp_width(), config.num_heads);
        let layer = |name, len| Activation { name, per_layer: true, len, statistic: false };
        let once = |name, len| Activation { name, per_layer: false, len, statistic: false };
        let statistic = |activation| Activation { statistic: true, ..activation };
        match self {
            Act::Embedded => once("embedded", b * t * c),
            Act::Ln1 => layer("ln1", b * t * c),
            Act::Ln1Mean => statistic(layer("ln1_mean", b * t)),
            Act::Ln1Rstd => statistic(layer("ln1_rstd", b * t)),
            Act::Qkv => layer("qkv", b * t * 3 * c),
            Act::Attention => layer("attention", b * t * c),
            Act::LogSumExp => statistic(layer("log_sum_exp", b * nh * t)),
            Act::ResidualMid => layer("residual_mid", b * t * c),
            Act::Ln2 => layer("ln2", b * t * c),
            Act::Ln2Mean => statistic(layer("ln2_mean", b * t)),
            Act::Ln2Rstd => statistic(layer("ln2_rstd", b * t)),
            Act::PreGelu => layer("pre_gelu", b * t * w),
            Act::Gelu => layer("gelu", b * t * w),
            Act::ResidualOut => layer("residual_out", b * t * c),
            Act::Lnf => once("lnf", b * t * c),
            Act::LnfMean => statistic(once("lnf_mean", b * t)),
            Act::LnfRstd => statistic(once("lnf_rstd", b * t)),
            Act::Branch => once("branch", b * t * c),
            Act::Losses => statistic(once("losses", b * t)),
            Act::DResidual => once("d_residual", b * t * c),
            Act::DLayerNorm => once("d_layernorm", b * t * c),
            Act::DAttention => once("d_attention", b * t * c),
            Act::DQkv => once("d_qkv", b * t * 3 * c),
            Act::DPreGelu => once("d_pre_gelu", b * t * w),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{PRESETS, preset};

    #[test]
    fn the_experiments_model_has_its_published_size() {
        let config = preset("tinystories-51m").unwrap().model;
        let table = ParamTable::new(&config).unwrap();
        // 51,237,888 values with the padded vocabulary rows (47 rows of 512).
        assert_eq!(table.count(&config), 51_237_888 - 47 * 512);
    }

    #[test]
    fn tensors_follow_each_other_aligned_and_in_order() {
        for preset in PRESETS {
            let table = ParamTable::new(&GptConfig { fc2_bandwidth: 33.into(), ..preset.model }).unwrap();
            let mut end = 0;
            for tensor in table.tensors() {
                assert_eq!(tensor.span.offset % TENSOR_ALIGN, 0);
                assert_eq!(tensor.span.offset, end);
                end = (tensor.span.offset + tensor.span.len).next_multiple_of(TENSOR_ALIGN);
                assert_eq!(table.tensor(tensor.param, tensor.layer), *tensor);
            }
            assert_eq!(table.len(), end);
        }
    }

    #[test]
    fn every_layer_has_its_own_bandwidth_and_equal_ones_share_a_band() {
        let toy = preset("toy").unwrap().model;
        let (fc1, fc2) = ("64,0,64,32".parse().unwrap(), "32..128".parse().unwrap());
        let table = ParamTable::new(&GptConfig { fc1_bandwidth: fc1, fc2_bandwidth: fc2, ..toy }).unwrap();
        let of = |param| {
            (0..4).map(|layer| table.band(param, layer).map_or(0, |(band, _)| band.bandwidth())).collect::<Vec<_>>()
        };
        assert_eq!((of(Param::Fcw), of(Param::Fcprojw)), (vec![64, 0, 64, 32], vec![32, 64, 96, 128]));
        assert_eq!(table.bands().len(), 4);
        assert_eq!(table.span(Param::Fcw, 1).len, 128 * 512);
    }

    #[test]
    fn every_layer_has_its_own_random_blocks() {
        let dense = preset("tinystories-51m").unwrap().model;
        let config = GptConfig {
            fc1_bandwidth: "random:0.5:1".parse().unwrap(),
            fc2_bandwidth: "random:0.5:1,strided:0.5,512,random:0.5:1,strided:0.5,512,0,0".parse().unwrap(),
            ..dense
        };
        let table = ParamTable::new(&config).unwrap();
        assert_eq!(table.bands().len(), 8 + 2 + 2);
        let blocks: Vec<String> = table.bands().iter().filter_map(Band::blocks).map(|b| b.to_text()).collect();
        assert_eq!(blocks.iter().collect::<std::collections::BTreeSet<_>>().len(), blocks.len());
        assert_eq!(table.weights(&config, Param::Fcw), 8 * 512 * 2048 / 2);
        assert_eq!(table.span(Param::Fcw, 3).len, 512 * 2048 / 2);
    }

    #[test]
    fn learned_layers_have_blocks_of_their_own() {
        let toy = preset("toy").unwrap().model;
        let config = GptConfig {
            fc1_bandwidth: "learned:0.5:band".parse().unwrap(),
            fc2_bandwidth: "strided:0.5".parse().unwrap(),
            ..toy
        };
        let start = ParamTable::new(&config).unwrap();
        assert_eq!((start.bands().len(), learned_tensors(&config).len()), (4 + 1, 4));
        let other = Blocks::from_text("11 11 00 00", 128, 512).unwrap();
        let blocks = |param, layer| (param == Param::Fcprojw || layer == 2).then(|| other.clone());
        let table = ParamTable::with_blocks(&config, blocks).unwrap();
        let of = |table: &ParamTable, param, layer| table.band(param, layer).unwrap().0.blocks().unwrap().clone();
        assert_eq!(of(&table, Param::Fcw, 2), other);
        for (param, layer) in [(Param::Fcw, 1), (Param::Fcw, 3), (Param::Fcprojw, 2)] {
            assert_eq!(of(&table, param, layer), of(&start, param, layer));
        }
        assert!(ParamTable::with_blocks(&config, |_, _| Some(Blocks::none(128, 512))).is_err());
    }

    #[test]
    fn a_narrower_mlp_has_fewer_weights() {
        let dense = preset("tinystories-51m").unwrap().model;
        let narrow = dense.with_mlp_width(1472);
        let count = |config: &GptConfig| ParamTable::new(config).unwrap().count(config);
        assert_eq!(count(&dense) - count(&narrow), 8 * (2048 - 1472) * (2 * 512 + 1));
        assert_eq!(dense.with_mlp_width(2048), dense);
    }

    #[test]
    fn a_band_shrinks_the_buffer() {
        let dense = preset("tinystories-51m").unwrap().model;
        let banded = GptConfig { fc1_bandwidth: 1024.into(), fc2_bandwidth: 512.into(), ..dense };
        let (dense_len, banded_len) = (ParamTable::new(&dense).unwrap().len(), ParamTable::new(&banded).unwrap().len());
        let saved = 8.0 * 1_048_576.0 * ((1.0 - 1.15 * 0.43787) + (1.0 - 1.25 * 0.2348));
        assert!((dense_len - banded_len) as f64 >= saved, "{} < {saved}", dense_len - banded_len);
    }
}
