//! The output head and its cross-entropy on the GPU: `shaders/loss.wgsl` between products, a chunk of rows at a time, and
//! the embedding in chunks of rows that fit a binding.

use super::buffer::{Buffer, row_chunks};
use super::embed::Tokens;
use super::matrix::{Matrix, Operand, PLAIN};
use super::pipelines::Kernel;
use super::{Wgpu, add_word};
use crate::backend::{HeadDims, Loss, Write};
use crate::error::Result;
use crate::shapes::Span;

/// Threads of a workgroup: of one that sums losses or takes a row of a large vocabulary, and of one for small rows.
const THREADS: usize = 256;
const FEW_THREADS: usize = 64;
/// Rows of a large tile of products.
const TILE_ROWS: usize = 128;

/// Elements from one row of logits to the next.
fn stride(dims: HeadDims) -> usize {
    dims.padded_vocab.next_multiple_of(4)
}

/// The chunks of rows, of `limit` elements at most: (first row, rows). Each has as many, but for whole tiles of products.
fn chunks(dims: HeadDims, limit: usize) -> impl Iterator<Item = (usize, usize)> {
    let row_len = stride(dims).max(dims.channels);
    let count = row_chunks(dims.rows, row_len, limit).count().max(1);
    let even = dims.rows.div_ceil(count).next_multiple_of(TILE_ROWS);
    row_chunks(dims.rows, row_len, limit.min(even * row_len))
}

/// Elements of the logits that exist at one time, `limit` at most.
pub(super) fn logits_len(dims: HeadDims, limit: usize) -> usize {
    chunks(dims, limit).map(|(_, rows)| rows).max().unwrap_or(0) * stride(dims)
}

fn cross_entropy_kernel(vocab: usize, gradient: bool) -> Kernel {
    let threads = if vocab <= 4 * 4 * FEW_THREADS { FEW_THREADS } else { THREADS };
    let variables = [("sums", 1), ("threads", threads as u32), ("gradient", u32::from(gradient))];
    Kernel::new("loss", "cross_entropy", &variables)
}

fn sum_kernel() -> Kernel {
    Kernel::new("loss", "loss_sum", &[("sums", 1), ("threads", THREADS as u32)])
}

/// Every instantiation.
pub(super) fn kernels() -> Vec<Kernel> {
    let losses = |vocab| [cross_entropy_kernel(vocab, false), cross_entropy_kernel(vocab, true)];
    [257, 50257].into_iter().flat_map(losses).chain([sum_kernel()]).collect()
}

/// The head's operands.
struct Head<'a> {
    x: Matrix<'a>,
    wte: Matrix<'a>,
    targets: &'a Tokens,
    losses: &'a Buffer,
    dims: HeadDims,
}

impl Wgpu {
    /// Elements of logits that may exist at one time.
    pub(super) fn logits_limit(&self) -> usize {
        self.binding_len().min(self.tuning.logits << 18)
    }

    /// The rows of the embedding in chunks: (first row, rows).
    fn vocab_chunks(&self, rows: usize, channels: usize) -> Vec<(usize, usize)> {
        row_chunks(rows, channels, self.binding_len()).collect()
    }

    /// `logits = x wte^T` for as many rows of wte as `logits` has columns.
    fn logits(&mut self, logits: Matrix<'_>, x: Matrix<'_>, wte: Matrix<'_>) -> Result<()> {
        for (first, count) in self.vocab_chunks(logits.cols, wte.cols) {
            let wte = Operand::Along(wte.rows(first, count));
            self.product(logits.cols(first, count), Operand::Along(x), wte, PLAIN, Write::Set)?;
        }
        Ok(())
    }

    /// Losses of rows [first, first + logits.rows); with `scale` the logits become their gradients.
    fn cross_entropy(&mut self, head: &Head<'_>, logits: Matrix<'_>, first: usize, scale: Option<f32>) -> Result<()> {
        let rows = Span { offset: first, len: logits.rows };
        let matrix = Span { offset: 0, len: logits.rows * logits.stride };
        let binds = [head.targets.ids().read(rows), logits.buffer.write(matrix), head.losses.write(rows)];
        let sizes = [logits.rows, head.dims.vocab, logits.stride].map(|word| word as u32);
        let words = [&sizes[..], &[scale.unwrap_or(0.0).to_bits(), 0]].concat();
        // Three passes and two exponentials: as long as this many FLOPs of a product, on lavapipe.
        let flops = 60.0 * logits.stride as f64;
        self.dispatch(&cross_entropy_kernel(head.dims.vocab, scale.is_some()), &binds, &words, logits.rows, flops)
    }
}

impl Loss for Wgpu {
    fn loss_forward(
        &mut self,
        losses: &mut Buffer,
        x: &Buffer,
        params: &Buffer,
        wte: Span,
        targets: &Tokens,
        dims: HeadDims,
    ) -> Result<()> {
        self.op = "loss_forward";
        let limit = self.logits_limit();
        let scratch = self.scratch("logits", logits_len(dims, limit))?;
        let x = Matrix::new(x, 0, dims.rows, dims.channels);
        let wte = Matrix::new(params, wte.offset, dims.padded_vocab, dims.channels);
        let head = Head { x, wte, targets, losses, dims };
        for (first, count) in chunks(dims, limit) {
            let logits = Matrix { stride: stride(dims), ..Matrix::new(&scratch, 0, count, dims.padded_vocab) };
            self.logits(logits, head.x.rows(first, count), head.wte)?;
            self.cross_entropy(&head, logits, first, None)?;
        }
        Ok(())
    }

    fn loss_forward_backward(
        &mut self,
        losses: &mut Buffer,
        dx: &mut Buffer,
        grads: &mut Buffer,
        x: &Buffer,
        params: &Buffer,
        wte: Span,
        targets: &Tokens,
        dims: HeadDims,
        scale: f32,
        write: Write,
    ) -> Result<()> {
        self.op = "loss_forward_backward";
        let HeadDims { rows, channels: c, padded_vocab, .. } = dims;
        let limit = self.logits_limit();
        let scratch = self.scratch("logits", logits_len(dims, limit))?;
        let (x, dx) = (Matrix::new(x, 0, rows, c), Matrix::new(dx, 0, rows, c));
        let dwte = Matrix::new(grads, wte.offset, padded_vocab, c);
        let head = Head { x, wte: Matrix::new(params, wte.offset, padded_vocab, c), targets, losses, dims };
        for (first, count) in chunks(dims, limit) {
            let logits = Matrix { stride: stride(dims), ..Matrix::new(&scratch, 0, count, padded_vocab) };
            let (x, dx) = (x.rows(first, count), dx.rows(first, count));
            self.logits(logits, x, head.wte)?;
            self.cross_entropy(&head, logits, first, Some(scale))?;
            let row_write = if first == 0 { write } else { Write::Add };
            for (v, vocab) in self.vocab_chunks(padded_vocab, c) {
                let dlogits = logits.cols(v, vocab);
                let vocab_write = if v == 0 { Write::Set } else { Write::Add };
                let wte = Operand::Across(head.wte.rows(v, vocab));
                self.deep_product(dx, Operand::Along(dlogits), wte, vocab_write)?;
                let (left, right) = (Operand::Across(dlogits), Operand::Across(x));
                self.deep_product(dwte.rows(v, vocab), left, right, row_write)?;
            }
        }
        Ok(())
    }

    fn head_logits(
        &mut self,
        logits: &mut Buffer,
        x: &Buffer,
        params: &Buffer,
        wte: Span,
        first_row: usize,
        dims: HeadDims,
    ) -> Result<()> {
        self.op = "head_logits";
        let HeadDims { rows, channels: c, vocab, padded_vocab } = dims;
        let logits = Matrix::new(logits, 0, rows, vocab);
        let x = Matrix::new(x, first_row * c, rows, c);
        let wte = Matrix::new(params, wte.offset, padded_vocab, c);
        for (first, count) in row_chunks(rows, vocab.max(c), self.binding_len()) {
            self.logits(logits.rows(first, count), x.rows(first, count), wte)?;
        }
        Ok(())
    }

    fn loss_sum(&mut self, total: &mut Buffer, losses: &Buffer, rows: usize, scale: f32, write: Write) -> Result<()> {
        self.op = "loss_sum";
        let binds = [losses.read(Span { offset: 0, len: rows }), total.write(Span { offset: 0, len: 1 })];
        let words = [rows as u32, 0, 0, scale.to_bits(), add_word(write)];
        self.dispatch(&sum_kernel(), &binds, &words, 1, rows as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_rows_are_even() {
        let rows = |rows, limit| {
            let dims = HeadDims { rows, channels: 8, vocab: 100, padded_vocab: 100 };
            chunks(dims, limit).map(|(_, rows)| rows).collect::<Vec<_>>()
        };
        assert_eq!(rows(8192, 600_000), [4096, 4096]);
        assert_eq!(rows(1000, 60_000), [512, 488]);
        assert_eq!(rows(130, 6_400), [64, 64, 2]);
        assert_eq!(rows(70, 1 << 20), [70]);
    }
}
