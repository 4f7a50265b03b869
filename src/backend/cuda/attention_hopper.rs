//! Causal attention on Hopper, `kernels/attention_hopper.cu`: for bf16, heads of 64 and sequences of whole tiles.

use super::attention::scale;
use super::compiler::Unit;
use super::driver::TensorMap;
use super::{Cuda, args, unit};
use crate::backend::{Arithmetic, SequenceDims};
use crate::error::Result;

/// Threads of a block: a warpgroup.
const THREADS: usize = 128;
/// Tokens of a tile, and elements of a head.
const TILE: usize = 64;
/// Bytes of a tile in shared memory, of a stage, and of the statistics of its queries.
const TILE_BYTES: usize = TILE * TILE * 2;
const STAGE_BYTES: usize = 2 * TILE_BYTES;
const STATISTICS_BYTES: usize = 2 * TILE * size_of::<f32>();

/// One of the three kernels: how many stages it has, and how many of its blocks a multiprocessor holds.
#[derive(Debug, Clone, Copy)]
struct Cut {
    definition: &'static str,
    entry: &'static str,
    own_tiles: usize,
    stages: usize,
    resident: usize,
}

const FORWARD: Cut = Cut { definition: "FORWARD", entry: "attention_forward", own_tiles: 1, stages: 2, resident: 5 };
const QUERIES: Cut =
    Cut { definition: "QUERIES", entry: "attention_backward_query", own_tiles: 2, stages: 2, resident: 4 };
const KEYS: Cut = Cut { definition: "KEYS", entry: "attention_backward_key", own_tiles: 2, stages: 2, resident: 3 };

impl Cut {
    fn unit(self) -> Unit {
        unit("attention_hopper", Arithmetic::Bf16, true).with(&[
            (self.definition, 1usize.into()),
            ("STAGES", self.stages.into()),
            ("RESIDENT", self.resident.into()),
        ])
    }

    /// Its tiles, stages, barriers (in pairs) and statistics.
    fn shared(self) -> usize {
        let barriers = (1 + self.stages).next_multiple_of(2) * size_of::<u64>();
        let statistics = if self.definition == KEYS.definition { STATISTICS_BYTES } else { 0 };
        self.own_tiles * TILE_BYTES + self.stages * (STAGE_BYTES + statistics) + barriers
    }
}

/// Activations [rows, columns] at an address.
type Matrix = (u64, usize);

impl Cuda {
    /// Whether these kernels can do it.
    pub(super) fn has_hopper_attention(&self, dims: SequenceDims) -> bool {
        let hopper = self.arithmetic == Arithmetic::Bf16 && self.kernels.target().has_warpgroup_products();
        hopper && dims.head_size() == TILE && dims.tokens.is_multiple_of(TILE)
    }

    fn attention_maps<const N: usize>(&self, dims: SequenceDims, matrices: [Matrix; N]) -> Result<Vec<TensorMap>> {
        let map = |(address, columns)| self.driver.tensor_map(address, [dims.rows(), columns], [TILE, TILE]);
        matrices.into_iter().map(map).collect()
    }

    fn launch_hopper_attention(
        &mut self,
        op: &'static str,
        cut: Cut,
        maps: Vec<TensorMap>,
        statistics: &[u64],
        dims: SequenceDims,
    ) {
        let sizes = args![dims.batch, dims.tokens, dims.channels, scale(dims)];
        let args = statistics.iter().copied().chain(sizes).collect();
        let grid = [dims.batch * (dims.tokens / TILE), dims.heads, 1];
        self.launch_with_maps(op, &cut.unit(), cut.entry, grid, THREADS, cut.shared(), maps, args);
    }

    /// out and log_sum_exp from qkv.
    pub(super) fn hopper_attention_forward(&mut self, [out, lse, qkv]: [u64; 3], dims: SequenceDims) -> Result<()> {
        let c = dims.channels;
        let maps = self.attention_maps(dims, [(qkv, 3 * c), (out, c)])?;
        self.launch_hopper_attention("attention_forward", FORWARD, maps, &[lse], dims);
        Ok(())
    }

    /// dqkv; `delta` is memory for a float for each row and head.
    pub(super) fn hopper_attention_backward(
        &mut self,
        [dqkv, dout, out, lse, qkv, delta]: [u64; 6],
        dims: SequenceDims,
    ) -> Result<()> {
        const OP: &str = "attention_backward";
        let c = dims.channels;
        let maps = self.attention_maps(dims, [(dqkv, 3 * c), (qkv, 3 * c), (dout, c), (out, c)])?;
        self.launch_hopper_attention(OP, QUERIES, maps.clone(), &[lse, delta], dims);
        self.launch_hopper_attention(OP, KEYS, maps[..3].to_vec(), &[lse, delta], dims);
        Ok(())
    }
}

/// Every instantiation.
pub(super) fn units() -> Vec<(Unit, &'static str, usize, usize)> {
    [FORWARD, QUERIES, KEYS].map(|cut| (cut.unit(), cut.entry, THREADS, cut.shared())).to_vec()
}
