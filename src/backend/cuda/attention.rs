//! Causal attention on the card: `kernels/attention.cu`, and on Hopper, where it can, `kernels/attention_hopper.cu`.

use super::buffer::{Buffer, Element};
use super::{Cuda, Unit, args, attention_hopper, unit};
use crate::backend::{Arithmetic, Attention, KeyValues, SequenceDims};
use crate::error::{Error, Result};

/// Threads of the kernels that take blocks of queries or keys, and such a block.
const THREADS: usize = 128;
const BLOCK: usize = 64;
const WARPS: usize = THREADS / 32;
/// Threads of the kernels that work element by element, and those that share a head.
const ELEMENT_THREADS: usize = 256;
const HEAD_LANES: usize = 8;
/// The largest head there are registers and shared memory for.
const MAX_HEAD_SIZE: usize = 128;
/// Heads in shared memory are as wide as a multiple of this.
const DIM_ALIGN: usize = 16;
/// Bytes of a row of a tile in shared memory.
const TILE_ROW: usize = 128;

/// The unit of the forward or the backward kernels for a head size, and the dynamic shared memory of each.
struct Cut {
    unit: Unit,
    shared: usize,
}

/// What a tile of the other axis holds, and how many are on their way: what registers and shared memory leave room for.
fn tile_and_stages(arithmetic: Arithmetic, dim: usize, backward: bool) -> (usize, usize) {
    match (arithmetic, backward) {
        (Arithmetic::Bf16, false) => (if dim <= 96 { 64 } else { 32 }, 2),
        (Arithmetic::Bf16, true) => (if dim <= 64 { 64 } else { 32 }, 2),
        (_, false) if dim <= 64 => (64, 2),
        (_, false) => (32, 1),
        (_, true) if dim <= 64 => (32, 2),
        (_, true) => (16, 1),
    }
}

fn cut(arithmetic: Arithmetic, head_size: usize, backward: bool) -> Cut {
    let dim = head_size.next_multiple_of(DIM_ALIGN);
    let bytes = Element::of(arithmetic).bytes();
    let (tile, stages) = tile_and_stages(arithmetic, dim, backward);
    let mut unit =
        head_unit(arithmetic, head_size).with(&[("DIM", dim.into()), ("TILE", tile.into()), ("STAGES", stages.into())]);
    if !backward {
        unit = unit.with(&[("FORWARD", 1usize.into())]);
    }
    if arithmetic == Arithmetic::Fp32 && dim > 96 {
        unit = unit.with(&[("STEP_UNROLL", 1usize.into())]);
    }
    let rows = |count: usize| (dim * bytes).next_multiple_of(TILE_ROW) * count;
    // Results turn into operands in registers for bf16, in shared memory else: 16 rows of a tile for each warp.
    let scratch =
        if arithmetic == Arithmetic::Bf16 { 0 } else { WARPS * 16 * (tile * bytes).next_multiple_of(TILE_ROW) };
    let blocks = if backward { 2 } else { 1 };
    Cut { unit, shared: blocks * rows(BLOCK) + stages * 2 * rows(tile) + scratch }
}

/// The unit of the kernels that work element by element.
fn head_unit(arithmetic: Arithmetic, head_size: usize) -> Unit {
    let aligned = head_size.is_multiple_of(Element::of(arithmetic).lanes());
    unit("attention", arithmetic, aligned).with(&[("HEAD_SIZE", head_size.into())])
}

/// Where keys and values lie: elements from one to the next and from one sequence's first to the next one's.
#[derive(Clone, Copy)]
struct Keys {
    keys: u64,
    values: u64,
    stride: usize,
    batch_stride: usize,
    past: usize,
}

impl Cuda {
    fn check_heads(dims: SequenceDims) -> Result<()> {
        match dims.head_size() <= MAX_HEAD_SIZE {
            true => Ok(()),
            false => Err(Error::Device(format!(
                "the cuda backend has attention for head sizes C/NH up to {MAX_HEAD_SIZE}, not {}; use more heads or \
                 another backend",
                dims.head_size()
            ))),
        }
    }

    fn attend(&mut self, op: &'static str, out: u64, log_sum_exp: u64, queries: u64, keys: Keys, dims: SequenceDims) {
        let SequenceDims { batch, tokens, channels, heads } = dims;
        let Cut { unit, shared } = cut(self.arithmetic, dims.head_size(), false);
        let args = args![
            out,
            log_sum_exp,
            queries,
            keys.keys,
            keys.values,
            3 * channels,
            keys.stride,
            keys.batch_stride,
            batch,
            tokens,
            keys.past,
            channels,
            scale(dims),
        ];
        self.launch(op, &unit, "attention_forward", [blocks(dims), heads, 1], THREADS, shared, args);
    }

    /// The address `elements` further.
    fn further(&self, at: u64, elements: usize) -> u64 {
        at + (elements * self.element().bytes()) as u64
    }
}

/// Blocks of queries (or keys) of all sequences.
fn blocks(dims: SequenceDims) -> usize {
    dims.batch * dims.tokens.div_ceil(BLOCK)
}

pub(super) fn scale(dims: SequenceDims) -> f32 {
    1.0 / (dims.head_size() as f32).sqrt()
}

impl Attention for Cuda {
    fn attention_forward(
        &mut self,
        out: &mut Buffer,
        log_sum_exp: &mut Buffer,
        qkv: &Buffer,
        dims: SequenceDims,
    ) -> Result<()> {
        Self::check_heads(dims)?;
        let (rows, c) = (dims.rows(), dims.channels);
        let (out, qkv) = (self.activation(out, rows * c)?, self.activation(qkv, rows * 3 * c)?);
        let log_sum_exp = log_sum_exp.f32s(rows * dims.heads)?;
        if self.has_hopper_attention(dims) {
            return self.hopper_attention_forward([out, log_sum_exp, qkv], dims);
        }
        let keys = Keys {
            keys: self.further(qkv, c),
            values: self.further(qkv, 2 * c),
            stride: 3 * c,
            batch_stride: dims.tokens * 3 * c,
            past: 0,
        };
        self.attend("attention_forward", out, log_sum_exp, qkv, keys, dims);
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
        const OP: &str = "attention_backward";
        Self::check_heads(dims)?;
        let SequenceDims { batch, tokens, channels: c, heads } = dims;
        let rows = dims.rows();
        let (dqkv, qkv) = (self.activation(dqkv, rows * 3 * c)?, self.activation(qkv, rows * 3 * c)?);
        let (dout, out) = (self.activation(dout, rows * c)?, self.activation(out, rows * c)?);
        let log_sum_exp = log_sum_exp.f32s(rows * heads)?;
        let delta = self.scratch("attention delta", Element::F32, rows * heads)?;
        if self.has_hopper_attention(dims) {
            return self.hopper_attention_backward([dqkv, dout, out, log_sum_exp, qkv, delta], dims);
        }
        let unit = head_unit(self.arithmetic, dims.head_size());
        let grid = [(rows * heads * HEAD_LANES).div_ceil(ELEMENT_THREADS), 1, 1];
        self.launch(
            OP,
            &unit,
            "attention_delta",
            grid,
            ELEMENT_THREADS,
            0,
            args![delta, dout, out, rows, tokens, heads],
        );
        let Cut { unit, shared } = cut(self.arithmetic, dims.head_size(), true);
        for entry in ["attention_backward_query", "attention_backward_key"] {
            let args = args![dqkv, dout, log_sum_exp, delta, qkv, batch, tokens, c, scale(dims)];
            self.launch(OP, &unit, entry, [blocks(dims), heads, 1], THREADS, shared, args);
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
        const OP: &str = "attention_cached";
        Self::check_heads(dims)?;
        let KeyValues { keys, values, capacity, past } = cache;
        let SequenceDims { batch, tokens, channels: c, .. } = dims;
        let rows = dims.rows();
        if past + tokens > capacity {
            return Err(Error::Internal(format!("{} tokens in a cache of {capacity}", past + tokens)));
        }
        let (out, qkv) = (self.activation(out, rows * c)?, self.activation(qkv, rows * 3 * c)?);
        let [keys, values] = [keys, values].map(|buffer| self.activation(buffer, batch * capacity * c));
        let (keys, values) = (keys?, values?);
        let lanes = self.element().lanes();
        let width = if dims.head_size().is_multiple_of(lanes) { lanes } else { 1 };
        let unit = head_unit(self.arithmetic, dims.head_size());
        let grid = [rows, (c / width).div_ceil(ELEMENT_THREADS), 1];
        let args = args![keys, values, qkv, tokens, c, past, capacity];
        self.launch(OP, &unit, "attention_append", grid, ELEMENT_THREADS, 0, args);
        let keys = Keys { keys, values, stride: c, batch_stride: capacity * c, past };
        self.attend(OP, out, 0, qkv, keys, dims);
        Ok(())
    }
}

/// Instantiations for the presets' heads, small and odd ones, and the largest.
pub(super) fn units(arithmetic: Arithmetic, warpgroups: bool) -> Vec<(Unit, &'static str, usize, usize)> {
    let of = |head_size| {
        let (forward, backward) = (cut(arithmetic, head_size, false), cut(arithmetic, head_size, true));
        let elements = head_unit(arithmetic, head_size);
        [
            (forward.unit, "attention_forward", THREADS, forward.shared),
            (backward.unit.clone(), "attention_backward_query", THREADS, backward.shared),
            (backward.unit, "attention_backward_key", THREADS, backward.shared),
            (elements.clone(), "attention_delta", ELEMENT_THREADS, 0),
            (elements, "attention_append", ELEMENT_THREADS, 0),
        ]
    };
    let hopper = if warpgroups && arithmetic == Arithmetic::Bf16 { attention_hopper::units() } else { Vec::new() };
    [5, 16, 32, 48, 64, 80, 96, 112, 128].into_iter().flat_map(of).chain(hopper).collect()
}
