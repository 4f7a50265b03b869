//! Causal attention on the CPU: blocks of queries against all keys they may see, sequences in parallel.

use super::Cpu;
use super::matrix::{Into, Mat, MatMut, Threads, multiply};
use crate::backend::{Attention, KeyValues, SequenceDims};
use crate::error::Result;
use rayon::prelude::*;

/// Queries handled at once: their scores against all keys are the largest matrix there is.
const QUERY_BLOCK: usize = 64;

/// Elements of one thread's block of scores.
pub(super) fn scratch_len(dims: SequenceDims) -> usize {
    QUERY_BLOCK.min(dims.tokens) * dims.tokens
}

impl Attention for Cpu {
    fn attention_forward(
        &mut self,
        out: &mut Vec<f32>,
        log_sum_exp: &mut Vec<f32>,
        qkv: &Vec<f32>,
        dims: SequenceDims,
    ) -> Result<()> {
        let SequenceDims { tokens: t, channels: c, heads: nh, .. } = dims;
        let rows = dims.rows();
        let outs = out[..rows * c].par_chunks_mut(t * c);
        let sums = log_sum_exp[..rows * nh].par_chunks_mut(t * nh);
        (outs, sums, qkv[..rows * 3 * c].par_chunks(t * 3 * c)).into_par_iter().for_each(|(out, sums, qkv)| {
            for (head, sums) in sums.chunks_mut(t).enumerate() {
                let parts = Heads::of_qkv(qkv, head, dims);
                attend(&mut out[head * dims.head_size()..], c, sums, parts, 0);
            }
        });
        Ok(())
    }

    fn attention_backward(
        &mut self,
        dqkv: &mut Vec<f32>,
        dout: &Vec<f32>,
        out: &Vec<f32>,
        log_sum_exp: &Vec<f32>,
        qkv: &Vec<f32>,
        dims: SequenceDims,
    ) -> Result<()> {
        let SequenceDims { tokens: t, channels: c, heads: nh, .. } = dims;
        let rows = dims.rows();
        let gradients = dqkv[..rows * 3 * c].par_chunks_mut(t * 3 * c);
        let outs = (out[..rows * c].par_chunks(t * c), dout[..rows * c].par_chunks(t * c));
        let sums = log_sum_exp[..rows * nh].par_chunks(t * nh);
        (gradients, outs.0, outs.1, sums, qkv[..rows * 3 * c].par_chunks(t * 3 * c)).into_par_iter().for_each(
            |(dqkv, out, dout, sums, qkv)| {
                dqkv.fill(0.0);
                for (head, sums) in sums.chunks(t).enumerate() {
                    let offset = head * dims.head_size();
                    let parts = Heads::of_qkv(qkv, head, dims);
                    attend_backward(&mut dqkv[offset..], &out[offset..], &dout[offset..], sums, parts, c);
                }
            },
        );
        Ok(())
    }

    fn attention_cached(
        &mut self,
        out: &mut Vec<f32>,
        cache: KeyValues<'_, Vec<f32>>,
        qkv: &Vec<f32>,
        dims: SequenceDims,
    ) -> Result<()> {
        let SequenceDims { tokens: t, channels: c, heads: nh, .. } = dims;
        let KeyValues { keys, values, capacity, past } = cache;
        let rows = dims.rows();
        (
            out[..rows * c].par_chunks_mut(t * c),
            qkv[..rows * 3 * c].par_chunks(t * 3 * c),
            keys.par_chunks_mut(capacity * c),
            values.par_chunks_mut(capacity * c),
        )
            .into_par_iter()
            .for_each(|(out, qkv, keys, values)| {
                for (row, qkv) in qkv.chunks(3 * c).enumerate() {
                    keys[(past + row) * c..][..c].copy_from_slice(&qkv[c..2 * c]);
                    values[(past + row) * c..][..c].copy_from_slice(&qkv[2 * c..]);
                }
                let mut sums = vec![0.0; t];
                for head in 0..nh {
                    let offset = head * dims.head_size();
                    let parts = Heads {
                        queries: &qkv[offset..],
                        keys: &keys[offset..],
                        values: &values[offset..],
                        query_stride: 3 * c,
                        key_stride: c,
                        head_size: dims.head_size(),
                    };
                    attend(&mut out[offset..], c, &mut sums, parts, past);
                }
            });
        Ok(())
    }
}

/// Queries, keys and values of one head of one sequence, inside larger matrices.
#[derive(Clone, Copy)]
struct Heads<'a> {
    queries: &'a [f32],
    keys: &'a [f32],
    values: &'a [f32],
    query_stride: usize,
    key_stride: usize,
    head_size: usize,
}

impl<'a> Heads<'a> {
    /// One head of a sequence's qkv [T, 3C].
    fn of_qkv(qkv: &'a [f32], head: usize, dims: SequenceDims) -> Self {
        let (c, head_size) = (dims.channels, dims.head_size());
        let part = |which: usize| &qkv[which * c + head * head_size..];
        let (queries, keys, values) = (part(0), part(1), part(2));
        Self { queries, keys, values, query_stride: 3 * c, key_stride: 3 * c, head_size }
    }

    fn queries(&self, first: usize, rows: usize) -> Mat<'a> {
        Mat::new(&self.queries[first * self.query_stride..], rows, self.head_size, self.query_stride)
    }

    fn keys(&self, rows: usize) -> Mat<'a> {
        Mat::new(self.keys, rows, self.head_size, self.key_stride)
    }

    fn values(&self, rows: usize) -> Mat<'a> {
        Mat::new(self.values, rows, self.head_size, self.key_stride)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_size as f32).sqrt()
    }
}

/// One head: out [T, HS] (rows `out_stride` apart) and log-sum-exps [T] of T = `sums.len()` queries that follow `past`
/// tokens.
fn attend(out: &mut [f32], out_stride: usize, sums: &mut [f32], parts: Heads<'_>, past: usize) {
    let t = sums.len();
    let mut scores = vec![0.0; QUERY_BLOCK.min(t) * (past + t)];
    for first in (0..t).step_by(QUERY_BLOCK) {
        let rows = QUERY_BLOCK.min(t - first);
        let seen = past + first + rows;
        let block = &mut scores[..rows * seen];
        let products = MatMut::new(block, rows, seen, seen);
        multiply(products, parts.queries(first, rows), parts.keys(seen).t(), Into::Set, Threads::One);
        for (row, scores) in block.chunks_mut(seen).enumerate() {
            let (visible, hidden) = scores.split_at_mut(past + first + row + 1);
            sums[first + row] = softmax(visible, parts.scale());
            hidden.fill(0.0);
        }
        let out = MatMut::new(&mut out[first * out_stride..], rows, parts.head_size, out_stride);
        multiply(out, Mat::new(block, rows, seen, seen), parts.values(seen), Into::Set, Threads::One);
    }
}

/// One head: adds to dqkv (its queries' columns first, keys' C further, values' 2C further; rows 3C apart) from zero.
fn attend_backward(dqkv: &mut [f32], out: &[f32], dout: &[f32], sums: &[f32], parts: Heads<'_>, c: usize) {
    let (t, hs, stride) = (sums.len(), parts.head_size, 3 * c);
    let mut scratch = vec![0.0; 2 * QUERY_BLOCK.min(t) * t];
    let (scores, dscores) = scratch.split_at_mut(QUERY_BLOCK.min(t) * t);
    for first in (0..t).step_by(QUERY_BLOCK) {
        let rows = QUERY_BLOCK.min(t - first);
        let seen = first + rows;
        let (p, ds) = (&mut scores[..rows * seen], &mut dscores[..rows * seen]);
        let queries = parts.queries(first, rows);
        let dout_block = Mat::new(&dout[first * c..], rows, hs, c);
        multiply(MatMut::new(p, rows, seen, seen), queries, parts.keys(seen).t(), Into::Set, Threads::One);
        multiply(MatMut::new(ds, rows, seen, seen), dout_block, parts.values(seen).t(), Into::Set, Threads::One);
        for (row, (p, ds)) in p.chunks_mut(seen).zip(ds.chunks_mut(seen)).enumerate() {
            let at = (first + row) * c;
            let dot: f64 = out[at..][..hs].iter().zip(&dout[at..][..hs]).map(|(o, d)| f64::from(o * d)).sum();
            softmax_backward(p, ds, first + row + 1, sums[first + row], dot as f32, parts.scale());
        }
        let (p, ds) = (Mat::new(p, rows, seen, seen), Mat::new(ds, rows, seen, seen));
        let dqueries = MatMut::new(&mut dqkv[first * stride..], rows, hs, stride);
        multiply(dqueries, ds, parts.keys(seen), Into::Set, Threads::One);
        let dkeys = MatMut::new(&mut dqkv[c..], seen, hs, stride);
        multiply(dkeys, ds.t(), queries, Into::Add, Threads::One);
        let dvalues = MatMut::new(&mut dqkv[2 * c..], seen, hs, stride);
        multiply(dvalues, p.t(), dout_block, Into::Add, Threads::One);
    }
}

/// Turns raw scores into probabilities of the scaled scores; returns the log of the sum of their exponentials.
fn softmax(scores: &mut [f32], scale: f32) -> f32 {
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, &score| max.max(score)) * scale;
    let mut sum = 0.0f64;
    for score in scores.iter_mut() {
        *score = (*score * scale - max).exp();
        sum += f64::from(*score);
    }
    let inverse = (1.0 / sum) as f32;
    scores.iter_mut().for_each(|score| *score *= inverse);
    max + sum.ln() as f32
}

/// From raw scores `p` and dP `ds` of a row: P and dS = P * (dP - dot) * scale; what lies beyond `visible` is 0.
fn softmax_backward(p: &mut [f32], ds: &mut [f32], visible: usize, log_sum_exp: f32, dot: f32, scale: f32) {
    for (p, ds) in p[..visible].iter_mut().zip(&mut ds[..visible]) {
        *p = (*p * scale - log_sum_exp).exp();
        *ds = *p * (*ds - dot) * scale;
    }
    p[visible..].fill(0.0);
    ds[visible..].fill(0.0);
}
