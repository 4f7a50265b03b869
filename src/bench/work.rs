//! What an operation has to do, whoever implements it: the arithmetic of its products and the memory it reads and writes.

use crate::backend::{Arithmetic, Device, HeadDims, Role, SequenceDims};
use serde::Serialize;
use std::iter::Sum;
use std::ops::Add;

/// An operation's least arithmetic and memory traffic.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Work {
    /// Multiplications and additions of its products, two for each pair of factors: the exact band without padding, under
    /// the diagonal of causal attention only. Other arithmetic (GELU, softmax, LayerNorm, AdamW) is not counted.
    pub flops: f64,
    /// Bytes of every tensor it reads and of every tensor it writes, each counted once at the size it is stored in.
    pub bytes: f64,
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }
}

impl Sum for Work {
    fn sum<I: Iterator<Item = Self>>(works: I) -> Self {
        works.fold(Self::default(), Add::add)
    }
}

/// Bytes of an element, as a backend stores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Activations and their gradients.
    pub activation: usize,
    /// Weights as products and the token embedding read them.
    pub operand: usize,
    /// Gradients of weights.
    pub gradient: usize,
}

/// Bytes of master weights, moments, statistics and token ids.
const WORD: usize = 4;

/// A product's matrix of weights, dense or banded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Matrix {
    /// Elements of an input row.
    pub inputs: usize,
    /// Elements of an output row.
    pub outputs: usize,
    /// Weights that exist.
    pub kept: usize,
    /// Weights that are stored: with a band's padding.
    pub stored: usize,
}

impl Matrix {
    /// One that keeps everything.
    pub fn dense(inputs: usize, outputs: usize) -> Self {
        Self { inputs, outputs, kept: inputs * outputs, stored: inputs * outputs }
    }
}

impl Stored {
    /// How a device stores its elements.
    pub fn of<D: Device>(device: &D) -> Self {
        Self {
            activation: device.element_bytes(Role::Activations),
            operand: if device.arithmetic() == Arithmetic::Bf16 { 2 } else { WORD },
            gradient: device.element_bytes(Role::Gradients),
        }
    }

    /// `out = inp * weight + bias`; with `gelu` the sum is kept beside its GELU.
    pub(super) fn forward(self, rows: usize, matrix: Matrix, gelu: bool) -> Work {
        let outputs = matrix.outputs * if gelu { 2 } else { 1 };
        self.product(rows, matrix, matrix.inputs + outputs, self.operand * matrix.stored + WORD * matrix.outputs)
    }

    /// `dinp = dout * weight`; with `gelu` times its derivative at a further tensor like `dinp`.
    pub(super) fn input_gradient(self, rows: usize, matrix: Matrix, gelu: bool) -> Work {
        let inputs = matrix.inputs * if gelu { 2 } else { 1 };
        self.product(rows, matrix, matrix.outputs + inputs, self.operand * matrix.stored)
    }

    /// The gradients of weight and bias, set.
    pub(super) fn weight_gradient(self, rows: usize, matrix: Matrix) -> Work {
        let gradients = self.gradient * (matrix.stored + matrix.outputs);
        self.product(rows, matrix, matrix.inputs + matrix.outputs, gradients)
    }

    /// A product over `rows` rows of which each has `row` elements read or written, and `rest` bytes beside the rows.
    fn product(self, rows: usize, matrix: Matrix, row: usize, rest: usize) -> Work {
        Work { flops: 2.0 * to_f64(&[rows, matrix.kept]), bytes: self.rows(rows, row) + rest as f64 }
    }

    /// Bytes of `rows` rows of `len` activations.
    fn rows(self, rows: usize, len: usize) -> f64 {
        to_f64(&[self.activation, rows, len])
    }

    /// Reads qkv, writes the output and its log-sum-exp.
    pub(super) fn attention_forward(self, dims: SequenceDims) -> Work {
        let statistics = to_f64(&[WORD, dims.rows(), dims.heads]);
        Work { flops: 2.0 * causal(dims), bytes: self.rows(dims.rows(), 4 * dims.channels) + statistics }
    }

    /// Reads qkv, output, its gradient and log-sum-exp, writes the gradient of qkv. The scores once more and four
    /// gradients are five products, where the forward has two.
    pub(super) fn attention_backward(self, dims: SequenceDims) -> Work {
        let statistics = to_f64(&[WORD, dims.rows(), dims.heads]);
        Work { flops: 5.0 * causal(dims), bytes: self.rows(dims.rows(), 8 * dims.channels) + statistics }
    }

    /// `tensors` activations `[M, C]` read or written, mean and reciprocal deviation, and the affine's weight and bias or
    /// their gradients.
    pub(super) fn layernorm(self, rows: usize, channels: usize, tensors: usize) -> Work {
        let affine = 2 * WORD * channels;
        self.moved(self.rows(rows, tensors * channels) + to_f64(&[2, WORD, rows]) + affine as f64)
    }

    /// Reads tokens, their rows of the embedding and every position's, writes the sum.
    pub(super) fn embed_forward(self, dims: SequenceDims) -> Work {
        let positions = to_f64(&[WORD, dims.tokens, dims.channels]);
        let tokens = to_f64(&[dims.rows(), WORD + self.operand * dims.channels]);
        self.moved(self.rows(dims.rows(), dims.channels) + tokens + positions)
    }

    /// Reads the gradient, adds it to the rows of `different` tokens and sets those of all positions.
    pub(super) fn embed_backward(self, dims: SequenceDims, different: usize) -> Work {
        let gradients = to_f64(&[self.gradient, dims.channels, 2 * different + dims.tokens]);
        self.moved(self.rows(dims.rows(), dims.channels) + gradients + to_f64(&[WORD, dims.rows()]))
    }

    /// Logits and loss. Logits stay within the operation, so their memory is no traffic that has to be.
    pub(super) fn loss_forward(self, dims: HeadDims) -> Work {
        let embedding = to_f64(&[self.operand, dims.vocab, dims.channels]);
        let bytes = self.rows(dims.rows, dims.channels) + embedding + to_f64(&[2, WORD, dims.rows]);
        Work { flops: 2.0 * to_f64(&[dims.rows, dims.channels, dims.vocab]), bytes }
    }

    /// The same with the gradients of both operands.
    pub(super) fn loss_forward_backward(self, dims: HeadDims) -> Work {
        let Work { flops, bytes } = self.loss_forward(dims);
        let gradient = to_f64(&[self.gradient, dims.padded_vocab, dims.channels]);
        Work { flops: 3.0 * flops, bytes: bytes + self.rows(dims.rows, dims.channels) + gradient }
    }

    /// Reads every gradient.
    pub(super) fn grad_norm(self, len: usize) -> Work {
        self.moved(to_f64(&[self.gradient, len]))
    }

    /// Reads weight, gradient and both moments, writes all but the gradient; `copied` says that the operands' copy is
    /// written too.
    pub(super) fn adamw(self, len: usize, copied: bool) -> Work {
        let copy = if copied && self.operand != WORD { self.operand } else { 0 };
        self.moved(to_f64(&[6 * WORD + self.gradient + copy, len]))
    }

    fn moved(self, bytes: f64) -> Work {
        Work { flops: 0.0, bytes }
    }
}

/// FLOPs of one product of causal attention: each token with itself and all before it.
fn causal(dims: SequenceDims) -> f64 {
    to_f64(&[dims.batch, dims.channels, dims.tokens, dims.tokens + 1])
}

/// A product of sizes, which may exceed 64 bits.
fn to_f64(sizes: &[usize]) -> f64 {
    sizes.iter().map(|&size| size as f64).product()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BF16: Stored = Stored { activation: 2, operand: 2, gradient: 4 };
    const FP32: Stored = Stored { activation: 4, operand: 4, gradient: 4 };

    #[test]
    fn products_count_each_tensor_once() {
        let fc1 = Matrix { inputs: 8, outputs: 32, kept: 100, stored: 128 };
        let forward = BF16.forward(10, fc1, true);
        assert_eq!(forward, Work { flops: 2000.0, bytes: (2 * 10 * (8 + 32 + 32) + 2 * 128 + 4 * 32) as f64 });
        assert_eq!(BF16.forward(10, fc1, false).bytes, forward.bytes - (2 * 10 * 32) as f64);
        assert_eq!(FP32.input_gradient(10, fc1, false).bytes, (4 * 10 * (8 + 32) + 4 * 128) as f64);
        assert_eq!(FP32.input_gradient(10, fc1, true).bytes, (4 * 10 * (8 + 8 + 32) + 4 * 128) as f64);
        assert_eq!(BF16.weight_gradient(10, fc1).bytes, (2 * 10 * (8 + 32) + 4 * (128 + 32)) as f64);
        assert_eq!(Matrix::dense(8, 32).kept, 256);
    }

    #[test]
    fn attention_multiplies_under_the_diagonal() {
        let dims = SequenceDims { batch: 2, tokens: 3, channels: 8, heads: 2 };
        // Two sequences of 1 + 2 + 3 scores of 8 channels each, twice: with keys and with values.
        assert_eq!(FP32.attention_forward(dims).flops, (2 * 2 * 6 * 8 * 2) as f64);
        assert_eq!(FP32.attention_backward(dims).flops, (2 * 2 * 6 * 8 * 5) as f64);
        assert_eq!(FP32.attention_forward(dims).bytes, (4 * 6 * 4 * 8 + 4 * 6 * 2) as f64);
    }

    #[test]
    fn adamw_moves_28_bytes_and_the_copy_of_what_has_one() {
        assert_eq!(FP32.adamw(10, true).bytes, 280.0);
        assert_eq!((BF16.adamw(10, true).bytes, BF16.adamw(10, false).bytes), (300.0, 280.0));
    }
}
