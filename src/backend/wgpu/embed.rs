//! Token and position embeddings on the GPU: `shaders/embed.wgsl`, the token embedding in chunks of rows.

use super::buffer::{Buffer, aligned, row_chunks};
use super::pipelines::Kernel;
use super::reduce::lanes;
use super::{Wgpu, add_word};
use crate::backend::{Embed, Embeddings, SequenceDims, Write, sorted_places};
use crate::error::{Error, Result};
use crate::shapes::Span;

const THREADS: usize = 64;

/// Token ids on the device, with the order that the embedding's gradient is summed in.
pub struct Tokens {
    ids: Buffer,
    order: Buffer,
    runs: Buffer,
    /// The different tokens, ascending: one run each.
    run_tokens: Vec<u32>,
    count: usize,
}

impl Tokens {
    pub(super) fn new(gpu: &mut Wgpu, name: &str, len: usize) -> Result<Self> {
        Ok(Self {
            ids: gpu.create(name, len)?,
            order: gpu.create(&format!("order of {name}"), len)?,
            runs: gpu.create(&format!("runs of {name}"), 2 * (len + 1))?,
            run_tokens: Vec::new(),
            count: 0,
        })
    }

    pub(super) fn ids(&self) -> &Buffer {
        &self.ids
    }

    pub(super) fn upload(&mut self, gpu: &mut Wgpu, tokens: &[u32]) -> Result<()> {
        let (order, runs) = sorted_places(tokens);
        gpu.write_words(&self.ids, 0, tokens)?;
        gpu.write_words(&self.order, 0, &order)?;
        gpu.write_words(&self.runs, 0, &runs)?;
        self.run_tokens = runs.chunks(2).take(runs.len() / 2 - 1).map(|run| run[0]).collect();
        self.count = tokens.len();
        Ok(())
    }
}

fn kernel(entry: &'static str, vec: u32) -> Kernel {
    Kernel::new("embed", entry, &[("lanes", 1), ("vec", vec), ("threads", THREADS as u32)])
}

/// Every instantiation.
pub(super) fn kernels() -> Vec<Kernel> {
    ["embed_forward", "embed_tokens", "embed_positions"]
        .into_iter()
        .flat_map(|entry| [kernel(entry, 0), kernel(entry, 1)])
        .collect()
}

/// The kernels' parameters that not every one needs.
#[derive(Default)]
struct Words {
    past: usize,
    batch: usize,
    token_first: usize,
    token_end: usize,
    run_first: usize,
    row_first: usize,
    rows: usize,
    dout_at: usize,
    add: u32,
}

impl Words {
    fn all(self, lanes: usize, tokens: usize) -> Vec<u32> {
        let Words { past, batch, token_first, token_end, run_first, row_first, rows, dout_at, add } = self;
        [lanes, tokens, past, batch, token_first, token_end, run_first, row_first, rows, dout_at, add as usize]
            .map(|word| word as u32)
            .to_vec()
    }
}

impl Wgpu {
    /// `dwte[token] += ...`, one group per different token, for the tokens and the rows of dout that fit a binding.
    fn embed_tokens(
        &mut self,
        grads: &Buffer,
        dout: &Buffer,
        tokens: &Tokens,
        wte: Span,
        dims: SequenceDims,
    ) -> Result<()> {
        let (c, limit) = (dims.channels, self.binding_len());
        let (vec, lanes) = lanes(c);
        for (token_first, token_count) in row_chunks(wte.len / c, c, limit) {
            let token_end = token_first + token_count;
            let run_first = tokens.run_tokens.partition_point(|&token| (token as usize) < token_first);
            let run_end = tokens.run_tokens.partition_point(|&token| (token as usize) < token_end);
            for (row_first, rows) in row_chunks(dims.rows(), c, limit) {
                let binds = [
                    tokens.order.read(tokens.order.all()),
                    tokens.runs.read(tokens.runs.all()),
                    dout.read(Span { offset: row_first * c, len: rows * c }),
                    grads.write(Span { offset: wte.offset + token_first * c, len: token_count * c }),
                ];
                let words = Words { token_first, token_end, run_first, row_first, rows, ..Words::default() };
                let groups = run_end - run_first;
                let flops = (rows * c / groups.max(1)) as f64;
                self.dispatch(&kernel("embed_tokens", vec), &binds, &words.all(lanes, dims.tokens), groups, flops)?;
            }
        }
        Ok(())
    }
}

impl Embed for Wgpu {
    fn embed_forward(
        &mut self,
        out: &mut Buffer,
        tokens: &Tokens,
        params: &Buffer,
        embeddings: Embeddings,
        dims: SequenceDims,
        past: usize,
    ) -> Result<()> {
        self.op = "embed_forward";
        let (c, limit) = (dims.channels, self.binding_len());
        let (vec, lanes) = lanes(c);
        let wte = embeddings.tokens;
        for (row_first, rows) in row_chunks(dims.rows(), c, limit) {
            for (token_first, token_count) in row_chunks(wte.len / c, c, limit) {
                let binds = [
                    tokens.ids.read(tokens.ids.all()),
                    params.read(Span { offset: wte.offset + token_first * c, len: token_count * c }),
                    params.read(embeddings.positions),
                    out.write(Span { offset: row_first * c, len: rows * c }),
                ];
                let token_end = token_first + token_count;
                let words = Words { past, token_first, token_end, row_first, ..Words::default() };
                self.dispatch(&kernel("embed_forward", vec), &binds, &words.all(lanes, dims.tokens), rows, c as f64)?;
            }
        }
        Ok(())
    }

    fn embed_backward(
        &mut self,
        grads: &mut Buffer,
        dout: &Buffer,
        tokens: &Tokens,
        embeddings: Embeddings,
        dims: SequenceDims,
        write: Write,
    ) -> Result<()> {
        self.op = "embed_backward";
        if tokens.count != dims.rows() {
            return Err(Error::Internal(format!("{} tokens for {} rows", tokens.count, dims.rows())));
        }
        self.embed_tokens(grads, dout, tokens, embeddings.tokens, dims)?;
        let SequenceDims { batch, tokens: t, channels: c, .. } = dims;
        let (vec, lanes) = lanes(c);
        let positions = embeddings.positions.len / c;
        let most = (self.binding_len() / (t * c)).saturating_sub(1).max(1);
        for first in (0..batch).step_by(most) {
            let count = most.min(batch - first);
            let (span, at) = aligned(Span { offset: first * t * c, len: count * t * c });
            let add = add_word(if first == 0 { write } else { Write::Add });
            let words = Words { batch: count, dout_at: at as usize * lanes / c, add, ..Words::default() };
            let binds = [dout.read(span), grads.write(embeddings.positions)];
            let flops = (count * c) as f64;
            self.dispatch(&kernel("embed_positions", vec), &binds, &words.all(lanes, t), positions, flops)?;
        }
        Ok(())
    }
}
