//! Causal attention on the GPU: `shaders/attention.wgsl`, sequences in chunks that fit a binding.

use super::Wgpu;
use super::buffer::{Buffer, aligned};
use super::pipelines::Kernel;
use super::tuning::Tuning;
use crate::backend::{Attention, KeyValues, SequenceDims};
use crate::error::{Error, Result};
use crate::shapes::{Span, TENSOR_ALIGN};

/// Queries (or keys) of a workgroup.
const BLOCK: usize = 64;
/// How many of the other axis it takes at a time, at least.
const LEAST_SPAN: usize = 32;
/// Threads of the kernels that work element by element.
const THREADS: usize = 64;
/// Elements of the head's results that a thread holds at most: with more, lavapipe compiles a kernel for many seconds instead of one
/// or two, which a short run never makes up for.
const MOST_RESULTS: usize = 128;
/// The largest head there is workgroup memory for.
const MAX_HEAD_SIZE: usize = 128;

/// Four elements of a head at a time, or one.
fn by_fours(head_size: usize) -> u32 {
    u32::from(head_size.is_multiple_of(4))
}

fn block_kernel(entry: &'static str, head_size: usize, cached: bool, tuning: &Tuning) -> Kernel {
    let dim = head_size.next_multiple_of(32);
    let which = match entry {
        "attention_forward" => 0,
        "attention_backward_query" => 1,
        _ => 2,
    };
    // Of the block: the queries, or two of queries, keys, values and gradients of the output.
    let (share, operands) = (tuning.attention[which], if which == 0 { 1 } else { 2 });
    // A thread's share of the results is whole fours of the head.
    let fours = |span: usize| dim.is_multiple_of(4 * (span / share.tn));
    let span = if fours(share.span) { share.span } else { LEAST_SPAN };
    let bytes = ((operands * BLOCK + span) * dim + span * BLOCK) * size_of::<f32>();
    let (held, span, spread) = match tuning.held[which] && bytes <= tuning.workgroup_bytes {
        true => (operands, span, span),
        // Rows of the tile staged at a time: 4 KiB of workgroup memory.
        false => (0, LEAST_SPAN, if dim <= 64 { 16 } else { 8 }),
    };
    let columns = dim / (span / share.tn);
    let tm = std::iter::successors(Some(share.tm), |tm| (tm * columns > MOST_RESULTS && *tm > 4).then_some(tm / 2));
    let tm = tm.last().unwrap_or(share.tm);
    let variables = [
        ("head_size", head_size),
        ("dim", dim),
        ("held", held),
        ("span", span),
        ("spread", spread),
        ("cached", usize::from(cached)),
        ("tm", tm),
        ("tn", share.tn),
        ("threads", (BLOCK / tm) * (span / share.tn)),
        ("unroll", tuning.unroll),
        ("subgroup", tuning.subgroup),
    ];
    Kernel::new("attention", entry, &variables.map(|(name, value)| (name, value as u32)))
        .with(&[("vec", by_fours(head_size))])
}

fn element_kernel(entry: &'static str, head_size: usize) -> Kernel {
    let variables = [
        ("head_size", head_size as u32),
        ("dim", 32),
        ("span", 32),
        ("tm", 4),
        ("tn", 4),
        ("vec", by_fours(head_size)),
        ("threads", THREADS as u32),
    ];
    Kernel::new("attention", entry, &variables)
}

/// Instantiations for the presets' heads, small and odd ones, and the largest.
pub(super) fn kernels(tuning: &Tuning) -> Vec<Kernel> {
    let of = |head_size| {
        [
            block_kernel("attention_forward", head_size, false, tuning),
            block_kernel("attention_forward", head_size, true, tuning),
            block_kernel("attention_backward_query", head_size, false, tuning),
            block_kernel("attention_backward_key", head_size, false, tuning),
            element_kernel("attention_delta", head_size),
            element_kernel("attention_append", head_size),
        ]
    };
    [5, 8, 32, 64, 80, 96, 128].into_iter().flat_map(of).collect()
}

/// Some of the sequences, the keys they see, and where they start in their bindings.
#[derive(Clone, Copy)]
struct Chunk {
    dims: SequenceDims,
    past: usize,
    keys: usize,
    capacity: usize,
    qkv: (Span, u32),
    out: (Span, u32),
    statistics: (Span, u32),
    cache: (Span, u32),
}

impl Chunk {
    /// Sequences [first, first + batch) of `dims`, with `capacity` places for keys of which `past` are taken.
    fn new(dims: SequenceDims, first: usize, batch: usize, past: usize, capacity: usize) -> Self {
        let SequenceDims { tokens: t, channels: c, heads, .. } = dims;
        let part = |len: usize| aligned(Span { offset: first * len, len: batch * len });
        let (qkv, out) = (part(t * 3 * c), part(t * c));
        let (statistics, cache) = (part(heads * t), part(capacity * c));
        Self { dims: SequenceDims { batch, ..dims }, past, keys: past + t, capacity, qkv, out, statistics, cache }
    }

    fn words(self) -> [u32; 15] {
        let SequenceDims { batch, tokens, channels, heads } = self.dims;
        let sizes = [batch, tokens, channels, heads, self.past, self.keys, channels, self.capacity * channels];
        let sizes = sizes.map(|word| word as u32);
        let places = [self.qkv.1, self.out.1, self.statistics.1, self.qkv.1, self.out.1, self.cache.1];
        let scale = 1.0 / (self.dims.head_size() as f32).sqrt();
        let mut words = [0; 15];
        words[..8].copy_from_slice(&sizes);
        words[8..14].copy_from_slice(&places);
        words[14] = scale.to_bits();
        words
    }

    /// Workgroups of a kernel that takes blocks of queries or keys.
    fn blocks(self) -> usize {
        self.dims.batch * self.dims.heads * self.dims.tokens.div_ceil(BLOCK)
    }

    /// FLOPs of `products` products of a block with all the keys.
    fn flops(self, products: usize) -> f64 {
        (2 * products * BLOCK * self.dims.head_size().next_multiple_of(32)) as f64 * self.keys as f64
    }
}

impl Wgpu {
    /// The sequences in chunks whose largest buffer, of `len` elements per sequence, fits a binding: (first, count).
    fn sequence_chunks(&self, dims: SequenceDims, len: usize) -> Result<impl Iterator<Item = (usize, usize)> + use<>> {
        if dims.head_size() > MAX_HEAD_SIZE {
            return Err(Error::Device(format!(
                "the wgpu backend has attention for head sizes C/NH up to {MAX_HEAD_SIZE}, not {}; use more heads or \
                 another backend",
                dims.head_size()
            )));
        }
        let most = (self.binding_len().saturating_sub(TENSOR_ALIGN) / len.max(1)).max(1);
        let batch = dims.batch;
        Ok((0..batch).step_by(most).map(move |first| (first, most.min(batch - first))))
    }
}

impl Attention for Wgpu {
    fn attention_forward(
        &mut self,
        out: &mut Buffer,
        log_sum_exp: &mut Buffer,
        qkv: &Buffer,
        dims: SequenceDims,
    ) -> Result<()> {
        self.op = "attention_forward";
        let kernel = block_kernel("attention_forward", dims.head_size(), false, &self.tuning);
        for (first, batch) in self.sequence_chunks(dims, dims.tokens * 3 * dims.channels)? {
            let chunk = Chunk::new(dims, first, batch, 0, 0);
            let binds = [qkv.read(chunk.qkv.0), out.write(chunk.out.0), log_sum_exp.write(chunk.statistics.0)];
            self.dispatch(&kernel, &binds, &chunk.words(), chunk.blocks(), chunk.flops(2))?;
        }
        Ok(())
    }

    fn attention_backward(
        &mut self,
        dqkv: &mut Buffer,
        dout: &Buffer,
        out: &Buffer,
        log_sum_exp: &Buffer,
        qkv: &Buffer,
        dims: SequenceDims,
    ) -> Result<()> {
        self.op = "attention_backward";
        let delta = self.scratch("attention delta", dims.rows() * dims.heads)?;
        let delta_kernel = element_kernel("attention_delta", dims.head_size());
        for (first, batch) in self.sequence_chunks(dims, dims.tokens * 3 * dims.channels)? {
            let chunk = Chunk::new(dims, first, batch, 0, 0);
            let binds = [out.read(chunk.out.0), dout.read(chunk.out.0), delta.write(chunk.statistics.0)];
            let groups = (chunk.dims.rows() * dims.heads).div_ceil(THREADS);
            let flops = (2 * THREADS * dims.head_size()) as f64;
            self.dispatch(&delta_kernel, &binds, &chunk.words(), groups, flops)?;
            let binds = [
                qkv.read(chunk.qkv.0),
                dout.read(chunk.out.0),
                log_sum_exp.read(chunk.statistics.0),
                delta.read(chunk.statistics.0),
                dqkv.write(chunk.qkv.0),
            ];
            for (entry, products) in [("attention_backward_query", 3), ("attention_backward_key", 4)] {
                let kernel = block_kernel(entry, dims.head_size(), false, &self.tuning);
                self.dispatch(&kernel, &binds, &chunk.words(), chunk.blocks(), chunk.flops(products))?;
            }
        }
        Ok(())
    }

    fn attention_cached(
        &mut self,
        out: &mut Buffer,
        cache: KeyValues<'_, Buffer>,
        qkv: &Buffer,
        dims: SequenceDims,
    ) -> Result<()> {
        self.op = "attention_cached";
        let KeyValues { keys, values, capacity, past } = cache;
        let append = element_kernel("attention_append", dims.head_size());
        let attend = block_kernel("attention_forward", dims.head_size(), true, &self.tuning);
        let largest = (dims.tokens * 3).max(capacity) * dims.channels;
        for (first, batch) in self.sequence_chunks(dims, largest)? {
            let chunk = Chunk::new(dims, first, batch, past, capacity);
            let binds = [qkv.read(chunk.qkv.0), keys.write(chunk.cache.0), values.write(chunk.cache.0)];
            let lanes = if by_fours(dims.head_size()) == 1 { 4 } else { 1 };
            let groups = (chunk.dims.rows() * dims.channels / lanes).div_ceil(THREADS);
            self.dispatch(&append, &binds, &chunk.words(), groups, (4 * THREADS) as f64)?;
            let binds =
                [qkv.read(chunk.qkv.0), keys.read(chunk.cache.0), values.read(chunk.cache.0), out.write(chunk.out.0)];
            self.dispatch(&attend, &binds, &chunk.words(), chunk.blocks(), chunk.flops(2))?;
        }
        Ok(())
    }
}
