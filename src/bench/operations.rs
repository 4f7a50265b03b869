//! The other operations of a training step, on a model with as many blocks as there are sets of buffers.

use super::ceilings::ADAMW;
use super::turns::{Needed, Rotation, in_turns, rotation};
use super::work::{Matrix, Stored, Work};
use super::{filled, median};
use crate::backend::{
    Affine, Backend, Embeddings, HeadDims, LinearDims, Normed, NormedInput, OptimizerState, Role, SequenceDims, Write,
};
use crate::config::GptConfig;
use crate::error::Result;
use crate::shapes::{Param, ParamTable};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashSet;

/// An operation that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    EmbedForward,
    EmbedBackward,
    NormForward,
    ResidualNormForward,
    NormBackward,
    Product(Param, Gradient),
    AttentionForward,
    AttentionBackward,
    LossForward,
    LossForwardBackward,
    GradNorm,
    AdamW,
}

/// Which of a layer's products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gradient {
    None,
    Input,
    Weight,
}

use Operation::*;

/// All of them with their names, in the order they are measured. The head comes before the optimizer, whose update writes the
/// operands' copy that products ask for.
pub(super) const OPERATIONS: [(&str, Operation); 17] = [
    ("embedding forward", EmbedForward),
    ("embedding backward", EmbedBackward),
    ("LayerNorm forward", NormForward),
    ("residual + LayerNorm forward", ResidualNormForward),
    ("LayerNorm backward", NormBackward),
    ("QKV forward", Product(Param::Qkvw, Gradient::None)),
    ("QKV input gradient", Product(Param::Qkvw, Gradient::Input)),
    ("QKV weight gradient", Product(Param::Qkvw, Gradient::Weight)),
    ("attention forward", AttentionForward),
    ("attention backward", AttentionBackward),
    ("projection forward", Product(Param::Attprojw, Gradient::None)),
    ("projection input gradient", Product(Param::Attprojw, Gradient::Input)),
    ("projection weight gradient", Product(Param::Attprojw, Gradient::Weight)),
    ("head + loss forward", LossForward),
    ("head + loss, all gradients", LossForwardBackward),
    ("gradient norm", GradNorm),
    ("AdamW", AdamW),
];

/// One operation.
pub(super) struct Measured {
    pub operation: &'static str,
    pub seconds: f64,
    pub work: Work,
}

/// Sizes of a batch and its head.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub sequence: SequenceDims,
    pub head: HeadDims,
}

impl Shape {
    /// The model whose operations these are, with so many blocks and a dense MLP.
    pub fn config(self, blocks: usize) -> GptConfig {
        GptConfig {
            channels: self.head.channels,
            num_layers: blocks,
            num_heads: self.sequence.heads,
            max_seq_len: self.sequence.tokens,
            vocab_size: self.head.vocab,
            padded_vocab_size: self.head.padded_vocab,
            mlp_width: None,
            fc1_bandwidth: 0.into(),
            fc2_bandwidth: 0.into(),
        }
    }

    /// Elements of one set's activations: five `[M, C]` and two `[M, 3C]`; beside them statistics.
    pub fn stream_elements(self) -> f64 {
        let SequenceDims { batch, tokens, channels, heads } = self.sequence;
        (batch as f64) * (tokens as f64) * (11.0 * channels as f64 + heads as f64 + 5.0)
    }

    /// Elements of one block's weights, gradients and moments.
    pub fn block_elements(self) -> f64 {
        4.0 * 12.0 * (self.head.channels as f64 + 2.0).powi(2)
    }

    /// The same of the embeddings.
    pub fn embedding_elements(self) -> f64 {
        4.0 * (self.head.padded_vocab + self.sequence.tokens) as f64 * self.head.channels as f64
    }

    fn linear(self, param: Param) -> LinearDims {
        let (outputs, inputs) = param.shape(&self.config(1));
        LinearDims { rows: self.head.rows, inputs, outputs }
    }
}

/// The activations of one set.
struct Streams<B: Backend> {
    x: B::Buffer,
    branch: B::Buffer,
    residual: B::Buffer,
    out: B::Buffer,
    dout: B::Buffer,
    qkv: B::Buffer,
    dqkv: B::Buffer,
    mean: B::Buffer,
    rstd: B::Buffer,
    log_sum_exp: B::Buffer,
    losses: B::Buffer,
}

impl<B: Backend> Streams<B> {
    fn new(backend: &mut B, Shape { sequence, head }: Shape) -> Result<Self> {
        let (rows, channels) = (head.rows, head.channels);
        let mut of = |role, len| filled(backend, role, "activations", len);
        Ok(Self {
            x: of(Role::Activations, rows * channels)?,
            branch: of(Role::Activations, rows * channels)?,
            residual: of(Role::Activations, rows * channels)?,
            out: of(Role::Activations, rows * channels)?,
            dout: of(Role::Activations, rows * channels)?,
            qkv: of(Role::Activations, 3 * rows * channels)?,
            dqkv: of(Role::Activations, 3 * rows * channels)?,
            mean: of(Role::Statistics, rows)?,
            rstd: of(Role::Statistics, rows)?,
            log_sum_exp: of(Role::Statistics, rows * sequence.heads)?,
            losses: of(Role::Statistics, rows)?,
        })
    }
}

/// Everything that the operations work on.
struct Bench<B: Backend> {
    shape: Shape,
    table: ParamTable,
    params: B::Buffer,
    grads: B::Buffer,
    m: B::Buffer,
    v: B::Buffer,
    norm: B::Buffer,
    plan: B::Plan,
    tokens: B::Tokens,
    different_tokens: usize,
    streams: Vec<Streams<B>>,
}

impl<B: Backend> Bench<B> {
    fn new(backend: &mut B, shape: Shape, sets: usize) -> Result<Self> {
        let table = ParamTable::new(&shape.config(sets))?;
        let len = table.len();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let drawn: Vec<u32> = (0..shape.head.rows).map(|_| rng.random_range(0..shape.head.vocab as u32)).collect();
        let mut tokens = backend.alloc_tokens("tokens", drawn.len())?;
        backend.upload_tokens(&mut tokens, &drawn)?;
        let mut norm = backend.alloc(Role::Statistics, "gradient norm", 1)?;
        backend.upload(&mut norm, 0, &[1.0])?;
        Ok(Self {
            shape,
            params: filled(backend, Role::Parameters, "parameters", len)?,
            grads: filled(backend, Role::Gradients, "gradients", len)?,
            m: filled(backend, Role::Moments, "first moments", len)?,
            v: backend.alloc(Role::Moments, "second moments", len)?,
            norm,
            plan: backend.adamw_plan(&table.decayed(), len)?,
            tokens,
            different_tokens: drawn.into_iter().collect::<HashSet<_>>().len(),
            streams: (0..sets).map(|_| Streams::new(backend, shape)).collect::<Result<_>>()?,
            table,
        })
    }

    fn affine(&self, weight: Param, bias: Param, block: usize) -> Affine {
        Affine { weight: self.table.span(weight, block), bias: self.table.span(bias, block) }
    }

    fn work(&self, stored: Stored, operation: Operation) -> Work {
        let Shape { sequence, head } = self.shape;
        let norm = |tensors| stored.layernorm(head.rows, head.channels, tensors);
        match operation {
            EmbedForward => stored.embed_forward(sequence),
            EmbedBackward => stored.embed_backward(sequence, self.different_tokens),
            NormForward => norm(2),
            ResidualNormForward | NormBackward => norm(4),
            Product(param, gradient) => product_work(stored, self.shape.linear(param), gradient),
            AttentionForward => stored.attention_forward(sequence),
            AttentionBackward => stored.attention_backward(sequence),
            LossForward => stored.loss_forward(head),
            LossForwardBackward => stored.loss_forward_backward(head),
            GradNorm => stored.grad_norm(self.table.len()),
            AdamW => stored.adamw(self.table.len(), true),
        }
    }

    /// Records an operation on one set.
    fn record(&mut self, backend: &mut B, operation: Operation, set: usize) -> Result<()> {
        let Shape { sequence, head } = self.shape;
        let (rows, wte) = (head.rows, self.table.span(Param::Wte, 0));
        let embeddings = Embeddings { tokens: wte, positions: self.table.span(Param::Wpe, 0) };
        let affine = self.affine(Param::Ln1w, Param::Ln1b, set);
        let Self { params, grads, m, v, norm, plan, tokens, .. } = self;
        let Streams { x, branch, residual, out, dout, qkv, dqkv, mean, rstd, log_sum_exp, losses } =
            &mut self.streams[set];
        match operation {
            EmbedForward => backend.embed_forward(out, tokens, params, embeddings, sequence, 0),
            EmbedBackward => backend.embed_backward(grads, dout, tokens, embeddings, sequence, Write::Set),
            NormForward => backend.layernorm_forward(Normed { out, mean, rstd }, x, params, affine, rows),
            ResidualNormForward => {
                let normed = Normed { out, mean, rstd };
                backend.residual_layernorm_forward(residual, normed, x, branch, params, affine, rows)
            }
            NormBackward => {
                let input = NormedInput { x, mean, rstd };
                let (add, set) = (Write::Add, Write::Set);
                backend.layernorm_backward(residual, grads, dout, input, params, affine, rows, add, set)
            }
            Product(param, gradient) => self.record_product(backend, param, gradient, set),
            AttentionForward => backend.attention_forward(out, log_sum_exp, qkv, sequence),
            AttentionBackward => backend.attention_backward(dqkv, dout, out, log_sum_exp, qkv, sequence),
            LossForward => backend.loss_forward(losses, x, params, wte, tokens, head),
            LossForwardBackward => {
                let scale = 1.0 / rows as f32;
                backend.loss_forward_backward(losses, dout, grads, x, params, wte, tokens, head, scale, Write::Set)
            }
            GradNorm => backend.grad_norm(norm, grads),
            AdamW => backend.adamw_step(OptimizerState { params, m, v }, grads, norm, plan, &ADAMW),
        }
    }

    fn record_product(&mut self, backend: &mut B, param: Param, gradient: Gradient, set: usize) -> Result<()> {
        let (dims, is_qkv) = (self.shape.linear(param), param == Param::Qkvw);
        let affine = self.affine(param, if is_qkv { Param::Qkvb } else { Param::Attprojb }, set);
        let (params, grads) = (&self.params, &mut self.grads);
        let Streams { x, out, dout, qkv, dqkv, .. } = &mut self.streams[set];
        let (result, gradient_of_result) = if is_qkv { (qkv, &*dqkv) } else { (out, &*dout) };
        match gradient {
            Gradient::None => backend.linear_forward(result, None, x, params, affine, dims),
            Gradient::Input => backend.linear_backward_input(x, gradient_of_result, params, affine.weight, None, dims),
            Gradient::Weight => backend.linear_backward_weight(grads, affine, gradient_of_result, x, dims, Write::Set),
        }
    }
}

fn product_work(stored: Stored, dims: LinearDims, gradient: Gradient) -> Work {
    let matrix = Matrix::dense(dims.inputs, dims.outputs);
    match gradient {
        Gradient::None => stored.forward(dims.rows, matrix, false),
        Gradient::Input => stored.input_gradient(dims.rows, matrix, false),
        Gradient::Weight => stored.weight_gradient(dims.rows, matrix),
    }
}

/// Times every operation; says over how many sets of buffers, and on how many parameters the optimizer works. `progress` is
/// told how many of [`OPERATIONS`] are done.
///
/// # Errors
/// The device has not enough memory or fails.
pub(super) fn time<B: Backend>(
    backend: &mut B,
    shape: Shape,
    repeats: usize,
    mut progress: impl FnMut(usize),
) -> Result<(Rotation, usize, Vec<Measured>)> {
    let stored = Stored::of(backend);
    let operand_bytes = stored.embed_forward(shape.sequence).bytes;
    // Weights, gradients and both moments are one buffer each, of equal length.
    let (block, embedding) = (shape.block_elements(), shape.embedding_elements());
    let sets = Needed { set: 4.0 * (shape.stream_elements() + block), once: 4.0 * embedding };
    let rotation = rotation(backend, operand_bytes, sets, Needed { set: block, once: embedding })?;
    let sets = rotation.sets;
    let mut bench = Bench::new(backend, shape, sets)?;
    let mut measured = Vec::with_capacity(OPERATIONS.len());
    for (index, (name, operation)) in OPERATIONS.into_iter().enumerate() {
        let mut samples = in_turns(backend, repeats, 1, sets, |backend, _, set| bench.record(backend, operation, set))?;
        let seconds = median(samples.remove(0));
        measured.push(Measured { operation: name, seconds, work: bench.work(stored, operation) });
        progress(index + 1);
    }
    Ok((rotation, bench.table.len(), measured))
}
