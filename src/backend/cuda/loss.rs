//! The output head and its loss on the card: products by the library, `kernels/loss.cu`, rows in chunks.

use super::buffer::{Buffer, Element};
use super::embed::Tokens;
use super::product::{Matrix, Operand, PLAIN};
use super::{Cuda, Unit, args, unit};
use crate::backend::{Arithmetic, HeadDims, Loss, Write};
use crate::error::Result;
use crate::shapes::Span;

const THREADS: usize = 512;
const COPY_THREADS: usize = 256;
/// Chunks have a multiple of so many rows where they can: whole tiles of products.
const ROW_ALIGN: usize = 256;

fn unit_of(arithmetic: Arithmetic, aligned: bool, gradient: bool, logit: &'static str) -> Unit {
    unit("loss", arithmetic, aligned).with(&[("LOGIT", logit.into()), ("GRADIENT", gradient.into())])
}

/// The same where each block has shared memory for a row.
fn held_unit_of(arithmetic: Arithmetic, gradient: bool) -> Unit {
    unit_of(arithmetic, true, gradient, "Element").with(&[("HELD", true.into())])
}

/// What both passes over the head need.
#[derive(Clone, Copy)]
struct Head {
    x: Matrix,
    wte: Matrix,
    logits: Matrix,
    targets: u64,
    losses: u64,
}

impl Cuda {
    /// Rows whose logits exist at one time.
    pub(super) fn chunk_rows(&self, dims: HeadDims, element: Element) -> usize {
        let fitting = self.logit_bytes / (dims.padded_vocab * element.bytes());
        if fitting < ROW_ALIGN {
            return fitting.clamp(1, dims.rows.max(1));
        }
        // As many in each chunk, but for the alignment: products of few rows are slow.
        let chunks = dims.rows.div_ceil(fitting / ROW_ALIGN * ROW_ALIGN).max(1);
        dims.rows.div_ceil(chunks).next_multiple_of(ROW_ALIGN).min(dims.rows).max(1)
    }

    /// The rows in chunks: (first, count).
    fn row_chunks(&self, dims: HeadDims, element: Element) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (rows, most) = (dims.rows, self.chunk_rows(dims, element));
        (0..rows).step_by(most).map(move |first| (first, most.min(rows - first)))
    }

    fn head(
        &mut self,
        losses: &Buffer,
        x: &Buffer,
        params: &Buffer,
        wte: Span,
        targets: &Tokens,
        dims: HeadDims,
    ) -> Result<Head> {
        let HeadDims { rows, channels: c, padded_vocab, .. } = dims;
        let element = self.element();
        let (chunk, cols) = (self.chunk_rows(dims, element), padded_vocab);
        Ok(Head {
            x: self.matrix(x, rows, c)?,
            wte: self.weight(params, wte, padded_vocab, c)?,
            logits: Matrix { at: self.scratch("logits", element, chunk * cols)?, element, rows: chunk, cols },
            targets: targets.ids(rows)?,
            losses: losses.f32s(rows)?,
        })
    }

    /// The losses of one chunk of rows, and with `scale` the gradient of `scale * sum of losses` in the logits' place.
    fn chunk_losses(
        &mut self,
        op: &'static str,
        head: &Head,
        dims: HeadDims,
        (first, count): (usize, usize),
        scale: Option<f32>,
    ) -> Result<Matrix> {
        let logits = head.logits.rows(0, count);
        self.product(
            op,
            logits,
            Operand::Along(head.x.rows(first, count)),
            Operand::Along(head.wte),
            PLAIN,
            Write::Set,
        )?;
        let aligned = dims.padded_vocab.is_multiple_of(logits.element.lanes());
        // Two blocks a multiprocessor at least, or none has anything to do while its row comes.
        let row_bytes = dims.padded_vocab * logits.element.bytes();
        let held = aligned && 2 * row_bytes <= self.card().shared_memory;
        let (unit, shared) = match held {
            true => (held_unit_of(self.arithmetic, scale.is_some()), row_bytes),
            false => (unit_of(self.arithmetic, aligned, scale.is_some(), "Element"), 0),
        };
        let further = |at: u64| at + 4 * first as u64;
        let args = args![
            further(head.losses),
            logits.at,
            further(head.targets),
            dims.vocab,
            dims.padded_vocab,
            scale.unwrap_or(0.0),
        ];
        self.launch(op, &unit, "cross_entropy", [count, 1, 1], THREADS, shared, args);
        Ok(logits)
    }
}

impl Loss for Cuda {
    fn loss_forward(
        &mut self,
        losses: &mut Buffer,
        x: &Buffer,
        params: &Buffer,
        wte: Span,
        targets: &Tokens,
        dims: HeadDims,
    ) -> Result<()> {
        let head = self.head(losses, x, params, wte, targets, dims)?;
        for chunk in self.row_chunks(dims, self.element()) {
            self.chunk_losses("loss_forward", &head, dims, chunk, None)?;
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
        const OP: &str = "loss_forward_backward";
        let head = self.head(losses, x, params, wte, targets, dims)?;
        let dx = self.matrix(dx, dims.rows, dims.channels)?;
        let dwte = self.gradient(grads, wte, dims.padded_vocab, dims.channels)?;
        for (first, count) in self.row_chunks(dims, self.element()) {
            let dlogits = self.chunk_losses(OP, &head, dims, (first, count), Some(scale))?;
            let (x, dx) = (head.x.rows(first, count), dx.rows(first, count));
            self.product(OP, dx, Operand::Along(dlogits), Operand::Across(head.wte), PLAIN, Write::Set)?;
            let write = if first == 0 { write } else { Write::Add };
            self.product(OP, dwte, Operand::Across(dlogits), Operand::Across(x), PLAIN, write)?;
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
        const OP: &str = "head_logits";
        let HeadDims { rows, channels: c, vocab, padded_vocab } = dims;
        let x = self.matrix(x, first_row + rows, c)?;
        let wte = self.weight(params, wte, padded_vocab, c)?;
        let out = logits.f32s(rows * vocab)?;
        let chunk = self.chunk_rows(dims, Element::F32);
        let at = self.scratch("logits of generation", Element::F32, chunk * padded_vocab)?;
        let unit = unit_of(self.arithmetic, true, false, "float");
        for (first, count) in self.row_chunks(dims, Element::F32) {
            let padded = Matrix { at, element: Element::F32, rows: count, cols: padded_vocab };
            let rows = x.rows(first_row + first, count);
            self.product(OP, padded, Operand::Along(rows), Operand::Along(wte), PLAIN, Write::Set)?;
            let args = args![out + 4 * (first * vocab) as u64, at, vocab, padded_vocab];
            self.launch(OP, &unit, "copy_logits", [count, vocab.div_ceil(COPY_THREADS), 1], COPY_THREADS, 0, args);
        }
        Ok(())
    }

    fn loss_sum(&mut self, total: &mut Buffer, losses: &Buffer, rows: usize, scale: f32, write: Write) -> Result<()> {
        let (total, losses) = (total.f32s(1)?, losses.f32s(rows)?);
        let unit = unit_of(self.arithmetic, true, true, "Element");
        self.launch("loss_sum", &unit, "loss_sum", [1, 1, 1], THREADS, 0, args![total, losses, rows, scale, write]);
        Ok(())
    }
}

/// Every instantiation.
pub(super) fn units(arithmetic: Arithmetic) -> Vec<(Unit, &'static str, usize, usize)> {
    let losses = |aligned| {
        [true, false].map(|gradient| (unit_of(arithmetic, aligned, gradient, "Element"), "cross_entropy", THREADS, 0))
    };
    let held = [true, false].map(|gradient| (held_unit_of(arithmetic, gradient), "cross_entropy", THREADS, 0));
    let others = [
        (unit_of(arithmetic, true, true, "Element"), "loss_sum", THREADS, 0),
        (unit_of(arithmetic, true, false, "float"), "copy_logits", COPY_THREADS, 0),
    ];
    [true, false].into_iter().flat_map(losses).chain(held).chain(others).collect()
}
