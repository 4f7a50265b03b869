//! The output head and its cross-entropy on the CPU, a chunk of rows at a time.

use super::matrix::{Into, Mat, MatMut, Threads, multiply};
use super::{Cpu, sum_of};
use crate::backend::{HeadDims, Loss, Write};
use crate::error::Result;
use crate::shapes::Span;
use rayon::prelude::*;
use std::ops::Range;

/// Rows whose logits exist at one time.
pub(super) const CHUNK_ROWS: usize = 256;

impl Loss for Cpu {
    fn loss_forward(
        &mut self,
        losses: &mut Vec<f32>,
        x: &Vec<f32>,
        params: &Vec<f32>,
        wte: Span,
        targets: &Vec<u32>,
        dims: HeadDims,
    ) -> Result<()> {
        let HeadDims { channels: c, vocab: v, .. } = dims;
        let wte = Mat::new(&params[wte.range()], v, c, c);
        by_chunks(losses, x, wte, targets, dims, 0.0, |_, _| ());
        Ok(())
    }

    fn loss_forward_backward(
        &mut self,
        losses: &mut Vec<f32>,
        dx: &mut Vec<f32>,
        grads: &mut Vec<f32>,
        x: &Vec<f32>,
        params: &Vec<f32>,
        wte: Span,
        targets: &Vec<u32>,
        dims: HeadDims,
        scale: f32,
        write: Write,
    ) -> Result<()> {
        let HeadDims { channels: c, vocab: v, .. } = dims;
        let dwte = &mut grads[wte.range()];
        if write == Write::Set {
            dwte.par_chunks_mut(1 << 14).for_each(|chunk| chunk.fill(0.0));
        }
        let wte = Mat::new(&params[wte.range()], v, c, c);
        by_chunks(losses, x, wte, targets, dims, scale, |rows, dlogits| {
            let dlogits = Mat::new(dlogits, rows.len(), v, v);
            let dx = MatMut::new(&mut dx[rows.start * c..], rows.len(), c, c);
            multiply(dx, dlogits, wte, Into::Set, Threads::All);
            let x = Mat::new(&x[rows.start * c..], rows.len(), c, c);
            multiply(MatMut::new(dwte, v, c, c), dlogits.t(), x, Into::Add, Threads::All);
        });
        Ok(())
    }

    fn head_logits(
        &mut self,
        logits: &mut Vec<f32>,
        x: &Vec<f32>,
        params: &Vec<f32>,
        wte: Span,
        first_row: usize,
        dims: HeadDims,
    ) -> Result<()> {
        let HeadDims { rows, channels: c, vocab: v, .. } = dims;
        let wte = Mat::new(&params[wte.range()], v, c, c);
        chunk_logits(logits, &x[first_row * c..], wte, rows, dims);
        Ok(())
    }

    fn loss_sum(
        &mut self,
        total: &mut Vec<f32>,
        losses: &Vec<f32>,
        rows: usize,
        scale: f32,
        write: Write,
    ) -> Result<()> {
        let sum = f64::from(scale) * sum_of(&losses[..rows], f64::from);
        total[0] = match write {
            Write::Set => sum as f32,
            Write::Add => (f64::from(total[0]) + sum) as f32,
        };
        Ok(())
    }
}

/// The losses of all rows, [`CHUNK_ROWS`] at a time; `then` receives each chunk's rows and the gradient of `scale * sum of
/// losses` with respect to its logits.
fn by_chunks(
    losses: &mut [f32],
    x: &[f32],
    wte: Mat<'_>,
    targets: &[u32],
    dims: HeadDims,
    scale: f32,
    mut then: impl FnMut(Range<usize>, &[f32]),
) {
    let HeadDims { rows, channels: c, vocab: v, .. } = dims;
    let mut logits = vec![0.0; CHUNK_ROWS.min(rows) * v];
    for first in (0..rows).step_by(CHUNK_ROWS) {
        let chunk = first..(first + CHUNK_ROWS).min(rows);
        let logits = &mut logits[..chunk.len() * v];
        chunk_logits(logits, &x[first * c..], wte, chunk.len(), dims);
        (&mut losses[chunk.clone()], &targets[chunk.clone()], logits.par_chunks_mut(v))
            .into_par_iter()
            .for_each(|(loss, &target, logits)| *loss = cross_entropy(logits, target as usize, scale));
        then(chunk, logits);
    }
}

/// `logits[m, v] = x[m, :] . wte[v, :]` for `rows` rows.
fn chunk_logits(logits: &mut [f32], x: &[f32], wte: Mat<'_>, rows: usize, dims: HeadDims) {
    let HeadDims { channels: c, vocab: v, .. } = dims;
    multiply(MatMut::new(logits, rows, v, v), Mat::new(x, rows, c, c), wte.t(), Into::Set, Threads::All);
}

/// Returns -log softmax(logits)[target] and leaves `scale * (softmax(logits) - onehot(target))` in `logits`.
fn cross_entropy(logits: &mut [f32], target: usize, scale: f32) -> f32 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, &logit| max.max(logit));
    let target_logit = f64::from(logits[target] - max);
    let mut sum = 0.0f64;
    for logit in logits.iter_mut() {
        *logit = (*logit - max).exp();
        sum += f64::from(*logit);
    }
    let factor = (f64::from(scale) / sum) as f32;
    logits.iter_mut().for_each(|p| *p *= factor);
    logits[target] -= scale;
    (sum.ln() - target_logit) as f32
}
