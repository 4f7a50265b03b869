//! The operations a GPT-2 with banded MLPs is made of: one small trait per stem, each with its forward and its backward.
//!
//! Only a backend's buffers, plain sizes and the band cross this boundary; a buffer's element type is the backend's own
//! affair. Fusion lives in an operation's meaning (a product with its bias and GELU, the head with its loss): a backend
//! may run one as 1..n kernels. Operations only record; [`Device::download`], [`Device::collect`] and [`Device::sync`]
//! are the only ones that wait.
//!
//! Letters: B sequences, T tokens each, C channels, NH heads of HS = C/NH channels, W = 4C, V vocabulary, Vp padded.
//! Rows are M = B*T tokens. Matrices are row-major: `[M, C]` is M rows of C. A *gradient* argument of parameters is the
//! flat gradient buffer, laid out as the parameters are; [`Write`] says whether it is set or added to.

pub mod cpu;
pub mod cuda;
pub mod wgpu;

use crate::band::Band;
use crate::error::Result;
use crate::shapes::Span;
use crate::tolerance::UNIT_F32;
use serde::Serialize;

/// What a buffer holds; a backend chooses the element type by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Master weights: fp32 always (a backend may keep a low-precision copy beside them).
    Parameters,
    /// The optimizer's moments: fp32 always.
    Moments,
    /// Gradients of the parameters.
    Gradients,
    /// Activations and their gradients.
    Activations,
    /// Means, log-sum-exps, losses, norms: fp32 always.
    Statistics,
}

/// What a backend multiplies and stores; sums, statistics, gradients, moments and master weights are fp32 in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// IEEE single precision.
    Fp32,
    /// Single precision in memory; products take their operands as TF32 (10 bits after the point).
    Tf32,
    /// Activations, their gradients and a copy of the weights in bfloat16 (7 bits after the point).
    Bf16,
}

impl Arithmetic {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Arithmetic::Fp32 => "fp32",
            Arithmetic::Tf32 => "tf32",
            Arithmetic::Bf16 => "bf16",
        }
    }

    /// Unit round-off of what is multiplied.
    pub fn operand_unit(self) -> f64 {
        match self {
            Arithmetic::Fp32 => UNIT_F32,
            Arithmetic::Tf32 => 0.5f64.powi(11),
            Arithmetic::Bf16 => 0.5f64.powi(8),
        }
    }

    /// Unit round-off of the sums in products. Tensor cores cut sums off instead of rounding them to nearest (Fasi et al. 2021,
    /// "Numerical behavior of NVIDIA tensor cores").
    pub fn sum_unit(self) -> f64 {
        match self {
            Arithmetic::Fp32 => UNIT_F32,
            Arithmetic::Tf32 | Arithmetic::Bf16 => 2.0 * UNIT_F32,
        }
    }

    /// Unit round-off of stored activations.
    pub fn stored_unit(self) -> f64 {
        match self {
            Arithmetic::Fp32 | Arithmetic::Tf32 => UNIT_F32,
            Arithmetic::Bf16 => 0.5f64.powi(8),
        }
    }

    /// The operand that stands for `x`: rounded to nearest, TF32 with ties away from zero, bfloat16 to even.
    pub fn operand(self, x: f32) -> f32 {
        match self {
            Arithmetic::Fp32 => x,
            Arithmetic::Tf32 => f32::from_bits(x.to_bits().wrapping_add(1 << 12) & !((1 << 13) - 1)),
            Arithmetic::Bf16 => half::bf16::from_f32(x).to_f32(),
        }
    }
}

/// Whether an operation overwrites a parameter's gradient or adds to it (the second and later micro-steps).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// Overwrite.
    Set,
    /// Add.
    Add,
}

/// Weight and bias of a layer in the flat parameter or gradient buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Affine {
    /// The weight.
    pub weight: Span,
    /// The bias.
    pub bias: Span,
}

/// Sizes of a batch: B sequences of T tokens, C channels, NH heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceDims {
    /// B.
    pub batch: usize,
    /// T.
    pub tokens: usize,
    /// C.
    pub channels: usize,
    /// NH.
    pub heads: usize,
}

impl SequenceDims {
    /// M = B * T.
    pub fn rows(self) -> usize {
        self.batch * self.tokens
    }

    /// HS = C / NH.
    pub fn head_size(self) -> usize {
        self.channels / self.heads
    }
}

/// Sizes of a dense product: rows M, inputs K, outputs O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearDims {
    /// M.
    pub rows: usize,
    /// K.
    pub inputs: usize,
    /// O.
    pub outputs: usize,
}

/// Sizes of the output head: rows M, channels C, vocabulary V and padded Vp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadDims {
    /// M.
    pub rows: usize,
    /// C.
    pub channels: usize,
    /// V: logits that exist.
    pub vocab: usize,
    /// Vp: rows of the embedding.
    pub padded_vocab: usize,
}

/// What the optimizer needs to know of one step, in f64: 1 - 0.999 loses four digits in f32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// The step's number, from 1.
    pub step: u64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Keeps the quotient finite.
    pub eps: f64,
    /// Decoupled weight decay, of the matrices only.
    pub weight_decay: f64,
    /// The largest global gradient norm let through; 0 lets every norm through.
    pub grad_clip: f64,
}

/// The same as the constants a kernel computes with, derived here so that all backends round alike.
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct AdamWConstants {
    /// Learning rate.
    pub learning_rate: f32,
    /// beta1.
    pub beta1: f32,
    /// 1 - beta1.
    pub one_minus_beta1: f32,
    /// beta2.
    pub beta2: f32,
    /// 1 - beta2.
    pub one_minus_beta2: f32,
    /// 1 / (1 - beta1^step): what makes the first moment unbiased.
    pub unbias1: f32,
    /// 1 / (1 - beta2^step).
    pub unbias2: f32,
    /// eps.
    pub eps: f32,
    /// Weight decay.
    pub weight_decay: f32,
    /// Clipping norm, 0 for none.
    pub grad_clip: f32,
}

impl AdamWStep {
    /// The constants of this step.
    pub fn constants(&self) -> AdamWConstants {
        let steps = self.step.min(i32::MAX as u64) as i32;
        AdamWConstants {
            learning_rate: self.learning_rate as f32,
            beta1: self.beta1 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            unbias1: (1.0 / (1.0 - self.beta1.powi(steps))) as f32,
            unbias2: (1.0 / (1.0 - self.beta2.powi(steps))) as f32,
            eps: self.eps as f32,
            weight_decay: self.weight_decay as f32,
            grad_clip: self.grad_clip as f32,
        }
    }
}

/// The part of a model that products belong to, for their times: the same operations run in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// None in particular.
    #[default]
    Model,
    /// The attention's projections.
    Attention,
    /// FC1 and FC2.
    Mlp,
}

/// What one kernel (or library call) of an operation took on the device.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OpTime {
    /// The method of these traits that ran it, or its stem: "band_expand".
    pub op: &'static str,
    /// The part of the model that it ran for, as [`Device::profile_part`] was told.
    pub part: Part,
    /// The kernel's own name.
    pub kernel: String,
    /// How often it ran.
    pub count: usize,
    /// All runs together.
    pub seconds: f64,
}

/// Memory and transfers.
pub trait Device {
    /// Device memory of one element type.
    type Buffer;
    /// Device memory of token ids.
    type Tokens;
    /// A read-back that was asked for and not yet collected.
    type Pending;

    /// Whether an operation is complete when it returns; else its result is worth asking for one step late.
    const SYNCHRONOUS: bool = false;

    /// The device in words, for the user.
    fn description(&self) -> String;

    /// What it computes in.
    fn arithmetic(&self) -> Arithmetic {
        Arithmetic::Fp32
    }

    /// Bytes of memory free for buffers, where the device tells.
    fn free_bytes(&self) -> Option<usize> {
        None
    }

    /// Bytes that a single buffer may have, where there is such a limit.
    fn max_buffer_bytes(&self) -> Option<usize> {
        None
    }

    /// Bytes of one element of a buffer of this role.
    fn element_bytes(&self, role: Role) -> usize;

    /// Memory, in bytes, that the head and other operations take besides the buffers, for a batch of these sizes.
    fn scratch_bytes(&self, dims: HeadDims, sequence: SequenceDims) -> usize;

    /// A buffer of `len` zeros. `name` is for messages.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory): the device has not enough memory.
    fn alloc(&mut self, role: Role, name: &str, len: usize) -> Result<Self::Buffer>;

    /// A buffer of `len` tokens.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    fn alloc_tokens(&mut self, name: &str, len: usize) -> Result<Self::Tokens>;

    /// Copies `values` to the buffer's elements from `offset`.
    ///
    /// # Errors
    /// The device failed.
    fn upload(&mut self, buffer: &mut Self::Buffer, offset: usize, values: &[f32]) -> Result<()>;

    /// Copies token ids to the start of the buffer. The caller has checked them against the vocabulary.
    ///
    /// # Errors
    /// As [`Device::upload`].
    fn upload_tokens(&mut self, buffer: &mut Self::Tokens, tokens: &[u32]) -> Result<()>;

    /// Waits for all recorded work and returns the elements of `span`.
    ///
    /// # Errors
    /// As [`Device::upload`].
    fn download(&mut self, buffer: &Self::Buffer, span: Span) -> Result<Vec<f32>>;

    /// Records a read-back of `span` as it is at this point of the recorded work.
    ///
    /// # Errors
    /// As [`Device::upload`].
    fn request(&mut self, buffer: &Self::Buffer, span: Span) -> Result<Self::Pending>;

    /// Waits for a read-back and returns its elements.
    ///
    /// # Errors
    /// As [`Device::upload`].
    fn collect(&mut self, pending: Self::Pending) -> Result<Vec<f32>>;

    /// Waits for all recorded work.
    ///
    /// # Errors
    /// As [`Device::upload`].
    fn sync(&mut self) -> Result<()>;

    /// Starts to time every operation on the device; false when it cannot.
    ///
    /// # Errors
    /// As [`Device::upload`].
    fn profile_start(&mut self) -> Result<bool> {
        Ok(false)
    }

    /// Says which part of the model the operations recorded from now on belong to.
    fn profile_part(&mut self, _part: Part) {}

    /// Ends it: what each kernel (or library call) took, summed by operation, part and name.
    ///
    /// # Errors
    /// As [`Device::upload`].
    fn profile_finish(&mut self) -> Result<Vec<OpTime>> {
        Ok(Vec::new())
    }
}

/// Token and position embeddings.
pub trait Embed: Device {
    /// `out[b, t, :] = wte[tokens[b, t], :] + wpe[past + t, :]`; out `[B, T, C]`.
    ///
    /// # Errors
    /// The device failed.
    fn embed_forward(
        &mut self,
        out: &mut Self::Buffer,
        tokens: &Self::Tokens,
        params: &Self::Buffer,
        embeddings: Embeddings,
        dims: SequenceDims,
        past: usize,
    ) -> Result<()>;

    /// `dwte[tokens[b, t], :] += dout[b, t, :]`, always added (the head's gradient is there first);
    /// `dwpe[t, :] (+)= sum over b of dout[b, t, :]` for t < T, and 0 beyond T when set. Sums run in a fixed order.
    ///
    /// # Errors
    /// The device failed.
    fn embed_backward(
        &mut self,
        grads: &mut Self::Buffer,
        dout: &Self::Buffer,
        tokens: &Self::Tokens,
        embeddings: Embeddings,
        dims: SequenceDims,
        write: Write,
    ) -> Result<()>;
}

/// Where the embeddings lie in the flat parameter or gradient buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Embeddings {
    /// wte `[Vp, C]`.
    pub tokens: Span,
    /// wpe `[maxT, C]`.
    pub positions: Span,
}

/// The three buffers a LayerNorm writes: its output `[M, C]`, mean and reciprocal standard deviation `[M]`.
pub struct Normed<'a, Buffer> {
    /// `(x - mean) * rstd * weight + bias`.
    pub out: &'a mut Buffer,
    /// Mean over C.
    pub mean: &'a mut Buffer,
    /// 1 / sqrt(variance + 1e-5), the variance divided by C.
    pub rstd: &'a mut Buffer,
}

/// What a LayerNorm's backward needs of its forward.
pub struct NormedInput<'a, Buffer> {
    /// The input `[M, C]`.
    pub x: &'a Buffer,
    /// Mean over C.
    pub mean: &'a Buffer,
    /// 1 / sqrt(variance + 1e-5).
    pub rstd: &'a Buffer,
}

/// LayerNorm, alone and fused with the residual addition before it (Ba et al. 2016).
pub trait LayerNorm: Device {
    /// LayerNorm of `x` `[M, C]`.
    ///
    /// # Errors
    /// The device failed.
    fn layernorm_forward(
        &mut self,
        normed: Normed<'_, Self::Buffer>,
        x: &Self::Buffer,
        params: &Self::Buffer,
        affine: Affine,
        rows: usize,
    ) -> Result<()>;

    /// `residual = x + branch`, then the LayerNorm of `residual`.
    ///
    /// # Errors
    /// The device failed.
    #[allow(clippy::too_many_arguments)]
    fn residual_layernorm_forward(
        &mut self,
        residual: &mut Self::Buffer,
        normed: Normed<'_, Self::Buffer>,
        x: &Self::Buffer,
        branch: &Self::Buffer,
        params: &Self::Buffer,
        affine: Affine,
        rows: usize,
    ) -> Result<()>;

    /// Given the gradient `dout` of the LayerNorm's output: `dresidual` is set to, or (`residual_write`) has added to it,
    /// the gradient of the input; weight and bias gradients (`write`) are summed over rows in a fixed order.
    ///
    /// # Errors
    /// The device failed.
    #[allow(clippy::too_many_arguments)]
    fn layernorm_backward(
        &mut self,
        dresidual: &mut Self::Buffer,
        grads: &mut Self::Buffer,
        dout: &Self::Buffer,
        input: NormedInput<'_, Self::Buffer>,
        params: &Self::Buffer,
        affine: Affine,
        rows: usize,
        residual_write: Write,
        write: Write,
    ) -> Result<()>;
}

/// Dense products, with the GELU of the MLP fused where it is asked for.
pub trait Linear: Device {
    /// `out[m, o] = bias[o] + sum over k of inp[m, k] * weight[o, k]`; with `pre`, that sum goes to `pre` and
    /// `out = gelu(pre)` (see [`cpu::gelu`]). inp `[M, K]`, weight `[O, K]`, out and pre `[M, O]`.
    ///
    /// # Errors
    /// The device failed.
    fn linear_forward(
        &mut self,
        out: &mut Self::Buffer,
        pre: Option<&mut Self::Buffer>,
        inp: &Self::Buffer,
        params: &Self::Buffer,
        affine: Affine,
        dims: LinearDims,
    ) -> Result<()>;

    /// `dinp[m, k] = sum over o of dout[m, o] * weight[o, k]`, times `gelu'(pre[m, k])` when `pre` is given.
    ///
    /// # Errors
    /// The device failed.
    fn linear_backward_input(
        &mut self,
        dinp: &mut Self::Buffer,
        dout: &Self::Buffer,
        params: &Self::Buffer,
        weight: Span,
        pre: Option<&Self::Buffer>,
        dims: LinearDims,
    ) -> Result<()>;

    /// `dweight[o, k] (+)= sum over m of dout[m, o] * inp[m, k]`, `dbias[o] (+)= sum over m of dout[m, o]`.
    ///
    /// # Errors
    /// The device failed.
    fn linear_backward_weight(
        &mut self,
        grads: &mut Self::Buffer,
        affine: Affine,
        dout: &Self::Buffer,
        inp: &Self::Buffer,
        dims: LinearDims,
        write: Write,
    ) -> Result<()>;
}

/// What follows the expanding product of a band.
pub enum Expansion<'a, Buffer> {
    /// FC1 forward: add the bias `[W]`, store the sum in `pre` `[M, W]`, return its GELU.
    BiasGelu {
        /// Where the bias lies in the parameters.
        bias: Span,
        /// Receives the value before the GELU.
        pre: &'a mut Buffer,
    },
    /// FC2 input gradient: multiply with the GELU's derivative at `pre` `[M, W]`.
    GeluBackward {
        /// The value before the GELU.
        pre: &'a Buffer,
    },
}

/// Which operand's column sums are the bias gradient of an outer product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BiasGrad {
    /// FC1: dbias `[W]` is summed over the wide operand's rows.
    Wide(Span),
    /// FC2: dbias `[N]` is summed over the narrow operand's rows.
    Narrow(Span),
}

/// The three products of a band, or of blocks in its place. P is the packed weight; all three visit the band's panels only.
pub trait BandLinear: Device {
    /// The band's geometry on the device.
    type Table;

    /// Brings a band's geometry to the device, once per model.
    ///
    /// # Errors
    /// The device has not enough memory.
    fn band_table(&mut self, band: &Band) -> Result<Self::Table>;

    /// `y[m, j] = sum over i in band(j) of x[m, i] * P[j, i]`, then `expansion`: FC1 forward, FC2 input gradient.
    /// x `[M, N]`, y `[M, W]`.
    ///
    /// # Errors
    /// The device failed.
    #[allow(clippy::too_many_arguments)]
    fn band_expand(
        &mut self,
        y: &mut Self::Buffer,
        x: &Self::Buffer,
        params: &Self::Buffer,
        panels: Span,
        table: &Self::Table,
        rows: usize,
        expansion: Expansion<'_, Self::Buffer>,
    ) -> Result<()>;

    /// `y[m, i] = sum over j in band(i) of x[m, j] * P[j, i]`, plus the bias `[N]` where given: FC2 forward, FC1 input
    /// gradient. x `[M, W]`, y `[M, N]`.
    ///
    /// # Errors
    /// The device failed.
    #[allow(clippy::too_many_arguments)]
    fn band_contract(
        &mut self,
        y: &mut Self::Buffer,
        x: &Self::Buffer,
        params: &Self::Buffer,
        panels: Span,
        table: &Self::Table,
        rows: usize,
        bias: Option<Span>,
    ) -> Result<()>;

    /// `dP[j, i] (+)= sum over m of wide[m, j] * narrow[m, i]` for (j, i) in the band, 0.0 in every other slot; and the
    /// bias gradient. wide `[M, W]`, narrow `[M, N]`: FC1 and FC2 weight gradient.
    ///
    /// # Errors
    /// The device failed.
    #[allow(clippy::too_many_arguments)]
    fn band_outer(
        &mut self,
        grads: &mut Self::Buffer,
        panels: Span,
        bias: BiasGrad,
        wide: &Self::Buffer,
        narrow: &Self::Buffer,
        table: &Self::Table,
        rows: usize,
        write: Write,
    ) -> Result<()>;
}

/// Keys and values of the tokens seen so far, each `[B, capacity, C]`.
pub struct KeyValues<'a, Buffer> {
    /// Keys.
    pub keys: &'a mut Buffer,
    /// Values.
    pub values: &'a mut Buffer,
    /// Tokens per sequence the buffers have room for.
    pub capacity: usize,
    /// Tokens per sequence already in them.
    pub past: usize,
}

/// Causal multi-head attention with scale 1/sqrt(HS).
pub trait Attention: Device {
    /// qkv `[B, T, 3C]` (queries, keys, values, each NH heads of HS) -> out `[B, T, C]`; `log_sum_exp` `[B, NH, T]` of the
    /// scaled scores is kept for the backward pass. No T x T matrix outlives a tile.
    ///
    /// # Errors
    /// The device failed.
    fn attention_forward(
        &mut self,
        out: &mut Self::Buffer,
        log_sum_exp: &mut Self::Buffer,
        qkv: &Self::Buffer,
        dims: SequenceDims,
    ) -> Result<()>;

    /// Gradient `dqkv` `[B, T, 3C]` from `dout` `[B, T, C]`, recomputing the scores.
    ///
    /// # Errors
    /// The device failed.
    fn attention_backward(
        &mut self,
        dqkv: &mut Self::Buffer,
        dout: &Self::Buffer,
        out: &Self::Buffer,
        log_sum_exp: &Self::Buffer,
        qkv: &Self::Buffer,
        dims: SequenceDims,
    ) -> Result<()>;

    /// Generation: appends the T new tokens' keys and values to the cache, then attends over all `past + T` tokens.
    ///
    /// # Errors
    /// The device failed.
    fn attention_cached(
        &mut self,
        out: &mut Self::Buffer,
        cache: KeyValues<'_, Self::Buffer>,
        qkv: &Self::Buffer,
        dims: SequenceDims,
    ) -> Result<()>;
}

/// The output head, tied to the token embedding, and its loss. Logits `x[m, :] . wte[v, :]` exist for v < V only and never
/// all at once: a backend works through the rows in chunks.
pub trait Loss: Device {
    /// `losses[m] = -log softmax(logits[m])[targets[m]]`; x `[M, C]`.
    ///
    /// # Errors
    /// The device failed.
    fn loss_forward(
        &mut self,
        losses: &mut Self::Buffer,
        x: &Self::Buffer,
        params: &Self::Buffer,
        wte: Span,
        targets: &Self::Tokens,
        dims: HeadDims,
    ) -> Result<()>;

    /// Losses as in [`Loss::loss_forward`], and the gradients of `scale * sum of losses`: dx `[M, C]` and dwte `[Vp, C]`
    /// (its rows from V on are 0).
    ///
    /// # Errors
    /// The device failed.
    #[allow(clippy::too_many_arguments)]
    fn loss_forward_backward(
        &mut self,
        losses: &mut Self::Buffer,
        dx: &mut Self::Buffer,
        grads: &mut Self::Buffer,
        x: &Self::Buffer,
        params: &Self::Buffer,
        wte: Span,
        targets: &Self::Tokens,
        dims: HeadDims,
        scale: f32,
        write: Write,
    ) -> Result<()>;

    /// Generation: `logits[m, v]` `[M, V]` of the M = `dims.rows` rows of x from `first_row`.
    ///
    /// # Errors
    /// The device failed.
    fn head_logits(
        &mut self,
        logits: &mut Self::Buffer,
        x: &Self::Buffer,
        params: &Self::Buffer,
        wte: Span,
        first_row: usize,
        dims: HeadDims,
    ) -> Result<()>;

    /// `total[0] (+)= scale * sum over m of losses[m]`, in a fixed order.
    ///
    /// # Errors
    /// The device failed.
    fn loss_sum(
        &mut self,
        total: &mut Self::Buffer,
        losses: &Self::Buffer,
        rows: usize,
        scale: f32,
        write: Write,
    ) -> Result<()>;
}

/// The buffers AdamW updates.
pub struct OptimizerState<'a, Buffer> {
    /// Master weights.
    pub params: &'a mut Buffer,
    /// First moment.
    pub m: &'a mut Buffer,
    /// Second moment.
    pub v: &'a mut Buffer,
}

/// AdamW (Loshchilov & Hutter 2019) with clipping by the global norm before it.
pub trait AdamW: Device {
    /// Which elements decay, on the device.
    type Plan;

    /// Prepares the optimizer for `len` parameters of which those in `decayed` decay.
    ///
    /// # Errors
    /// The device has not enough memory.
    fn adamw_plan(&mut self, decayed: &[Span], len: usize) -> Result<Self::Plan>;

    /// `norm[0]` = the Euclidean norm of all gradients, summed in a fixed order. One that is not finite stays there whatever
    /// gradients come after it, so that nothing is updated until someone has looked at it.
    ///
    /// # Errors
    /// The device failed.
    fn grad_norm(&mut self, norm: &mut Self::Buffer, grads: &Self::Buffer) -> Result<()>;

    /// With g the gradient times min(1, clip / norm): `m = b1*m + (1-b1)*g`, `v = b2*v + (1-b2)*g^2`,
    /// `p -= lr * (m/(1-b1^step) / (sqrt(v/(1-b2^step)) + eps) + decay*p)`. Where p, m, v and g are 0 (outside a band)
    /// p stays exactly 0. When the norm is not finite nothing changes.
    ///
    /// # Errors
    /// The device failed.
    fn adamw_step(
        &mut self,
        state: OptimizerState<'_, Self::Buffer>,
        grads: &Self::Buffer,
        norm: &Self::Buffer,
        plan: &Self::Plan,
        step: &AdamWStep,
    ) -> Result<()>;
}

/// Everything a GPT-2 with banded MLPs needs.
pub trait Backend: Embed + LayerNorm + Linear + BandLinear + Attention + Loss + AdamW {}

impl<T: Embed + LayerNorm + Linear + BandLinear + Attention + Loss + AdamW> Backend for T {}

/// The places of `tokens` sorted by token, places of one token ascending; and (token, first place in that order) of each
/// different token, with an end mark: what sums the token embedding's gradient in a fixed order.
fn sorted_places(tokens: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let mut order: Vec<u32> = (0..tokens.len() as u32).collect();
    order.sort_by_key(|&place| tokens[place as usize]);
    let mut runs = Vec::new();
    let mut last = None;
    for (index, &place) in order.iter().enumerate() {
        let token = tokens[place as usize];
        if last.replace(token) != Some(token) {
            runs.extend([token, index as u32]);
        }
    }
    runs.extend([u32::MAX, tokens.len() as u32]);
    (order, runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_list_each_token_once_with_its_places_in_order() {
        let (order, runs) = sorted_places(&[7, 3, 7, 0, 3]);
        assert_eq!(order, [3, 1, 4, 0, 2]);
        assert_eq!(runs, [0, 0, 3, 1, 7, 3, u32::MAX, 5]);
        assert_eq!(sorted_places(&[]), (vec![], vec![u32::MAX, 0]));
    }

    #[test]
    fn operands_are_rounded_to_nearest() {
        assert_eq!(Arithmetic::Tf32.operand(1.0 + 2f32.powi(-11)), 1.0 + 2f32.powi(-10));
        assert_eq!(Arithmetic::Tf32.operand(-1.0 - 2f32.powi(-12)), -1.0);
        assert_eq!(Arithmetic::Bf16.operand(1.0 + 2f32.powi(-8)), 1.0);
        assert_eq!(Arithmetic::Fp32.operand(0.1), 0.1);
    }
}
