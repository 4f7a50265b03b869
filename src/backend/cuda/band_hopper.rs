//! The band's three products on Hopper, `kernels/band_hopper.cu`: for bf16 whose rows start at 16-byte boundaries.

use super::compiler::{Unit, Value};
use super::driver::TensorMap;
use super::outer::{self, Deal, Tiling};
use super::{Cuda, args, unit};
use crate::backend::{Arithmetic, Write};
use crate::band::{Band, PANEL_ROWS, Panel};
use crate::blocks::BLOCK_COLS;
use crate::error::Result;

/// Rows and columns of a tile of results of expand and contract.
const ROWS: usize = 256;
const COLS: usize = 128;
/// Of the depth, in a stage.
const DEPTH: usize = 64;
/// Stages of expand and contract, 48 KiB each; expand has room for four boxes of results besides.
const EXPAND_STAGES: usize = 3;
const CONTRACT_STAGES: usize = 4;
/// Rows of a box of results, 64 columns wide.
const RESULT_ROWS: usize = 128;
/// Threads that multiply; those that fetch for expand and for contract, that store for expand, and of whom one fetches for the
/// outer product.
const CONSUMERS: usize = 256;
const EXPAND_FILLERS: usize = 64;
const CONTRACT_FILLERS: usize = 128;
const STORERS: usize = 64;
const OUTER_FILLERS: usize = 128;
/// How the outer product may be cut. Of a band's and a batch's size depends which cut fetches least and keeps all busy.
const OUTER_CUTS: [OuterCut; 4] =
    [OuterCut::new(1, 96, 6), OuterCut::new(2, 128, 4), OuterCut::new(2, 160, 4), OuterCut::new(2, 192, 4)];
/// How that of blocks is cut: a tile for each.
const OUTER_OF_BLOCKS: OuterCut = OuterCut::new(1, BLOCK_COLS, 8);
/// Groups of 8 columns that a block adds up the pieces of.
const SUM_GROUPS: usize = 4;
/// Bytes of the eight columns of ones that sum the wide values.
const ONES: usize = 8 * TILE_ROW;
/// Bytes of a row of a tile in shared memory, which are the columns of a copied box.
const TILE_ROW: usize = 128;
const BOX_COLS: usize = TILE_ROW / 2;

/// Tiles of the outer product: `panels` panels for each of two warpgroups times `cols` columns, and the stages that fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct OuterCut {
    panels: usize,
    cols: usize,
    stages: usize,
}

impl OuterCut {
    const fn new(panels: usize, cols: usize, stages: usize) -> Self {
        Self { panels, cols, stages }
    }

    /// Whole boxes of both operands make a stage, of which a multiprocessor was seen to be brought 58 KB in a microsecond.
    fn tiling(self) -> Tiling {
        let group = 2 * self.panels;
        let stage_bytes = (group + self.cols.div_ceil(BOX_COLS)) * DEPTH * TILE_ROW;
        let rows = group * PANEL_ROWS;
        Tiling { rows, cols: self.cols, depth: DEPTH, stage_bytes, stage_rate: 58_000, parts_each: 1 }
    }
}

/// Lists for these kernels, behind a band's other words: for each tile of narrow columns where its panels are listed, how
/// many of them touch its left half alone and come first, and how many there are; for each cut the tiles of the outer product.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lists {
    contract_at: usize,
    /// Each cut, where its tiles are, and how many.
    outer: Vec<(OuterCut, usize, usize)>,
    /// Whether blocks stand in the band's place.
    blocks: bool,
}

impl Lists {
    /// Adds the lists of `band` to its words.
    pub(super) fn new(band: &Band, words: &mut Vec<u32>) -> Self {
        let contract_at = words.len();
        let lists: Vec<[Vec<u32>; 2]> =
            (0..band.narrow()).step_by(COLS).map(|start| touching_panels(band.panels(), start)).collect();
        let mut at = contract_at + 3 * lists.len();
        for [left, rest] in &lists {
            words.extend([at, left.len(), left.len() + rest.len()].map(|word| word as u32));
            at += left.len() + rest.len();
        }
        words.extend(lists.iter().flatten().flatten());
        let blocks = band.blocks().is_some();
        let cuts = if blocks { &[OUTER_OF_BLOCKS][..] } else { &OUTER_CUTS };
        let listed = |&cut: &OuterCut| {
            let (at, tiles) = (words.len(), cut.tiling().tiles(band));
            words.extend(tiles.iter().flatten());
            (cut, at, tiles.len())
        };
        let outer = cuts.iter().map(listed).collect();
        Self { contract_at, outer, blocks }
    }
}

/// The panels that touch the left half alone of the [`COLS`] columns from `start` on, and the others that touch these columns.
fn touching_panels(panels: &[Panel], start: usize) -> [Vec<u32>; 2] {
    let mut lists: [Vec<u32>; 2] = Default::default();
    for (index, panel) in panels.iter().enumerate().filter(|(_, panel)| !panel.is_empty()) {
        let touches = |start: usize| panel.col_start < start + COLS / 2 && panel.col_start + panel.cols > start;
        match (touches(start), touches(start + COLS / 2)) {
            (true, false) => lists[0].push(index as u32),
            (_, true) => lists[1].push(index as u32),
            (false, false) => {}
        }
    }
    lists
}

/// Shared memory of a kernel: its stages and their two barriers each.
fn shared(stages: usize, stage_bytes: usize) -> usize {
    stages * (stage_bytes + 2 * size_of::<u64>())
}

/// Shared memory of expand: also two boxes of results for each warpgroup, with two barriers each.
fn expand_shared() -> usize {
    shared(EXPAND_STAGES, (ROWS + COLS) * TILE_ROW) + 4 * (RESULT_ROWS * TILE_ROW + 2 * size_of::<u64>())
}

/// Shared memory of contract.
fn contract_shared() -> usize {
    shared(CONTRACT_STAGES, (ROWS + COLS) * TILE_ROW)
}

/// Shared memory of outer: also the ones.
fn outer_shared(cut: OuterCut) -> usize {
    shared(cut.stages, cut.tiling().stage_bytes) + ONES
}

fn product_unit(product: &'static str, stages: usize) -> Unit {
    let sizes: [(&'static str, Value); 4] =
        [(product, 1usize.into()), ("BLOCK_ROWS", ROWS.into()), ("BLOCK_COLS", COLS.into()), ("STAGES", stages.into())];
    unit("band_hopper", Arithmetic::Bf16, true).with(&sizes)
}

fn contract_unit() -> Unit {
    product_unit("CONTRACT", CONTRACT_STAGES)
}

fn expand_unit(epilogue: usize, blocks: bool) -> Unit {
    product_unit("EXPAND", EXPAND_STAGES).with(&[("EPILOGUE", epilogue.into()), ("BLOCKS", blocks.into())])
}

fn outer_unit(cut: OuterCut) -> Unit {
    let sizes: [(&'static str, Value); 4] = [
        ("OUTER", 1usize.into()),
        ("PANELS", cut.panels.into()),
        ("BLOCK_COLS", cut.cols.into()),
        ("STAGES", cut.stages.into()),
    ];
    unit("band_hopper", Arithmetic::Bf16, true).with(&sizes)
}

/// A product's operands and sizes, as the kernels take them.
pub(super) struct Sides<'a> {
    pub(super) lists: &'a Lists,
    /// The table's words on the card.
    pub(super) words: u64,
    pub(super) narrow: usize,
    pub(super) wide: usize,
    /// Rows of the batch.
    pub(super) rows: usize,
}

impl Cuda {
    /// Activations [rows, cols] at `address`, to be copied in boxes of `box_rows` rows.
    fn map(&self, address: u64, rows: usize, cols: usize, box_rows: usize) -> Result<TensorMap> {
        self.driver.tensor_map(address, [rows, cols], [box_rows, BOX_COLS])
    }

    /// y, and pre with `epilogue` 1 (bias and GELU) or from it with 2 (GELU's derivative).
    pub(super) fn hopper_expand(
        &mut self,
        sides: &Sides<'_>,
        epilogue: usize,
        [y, pre, x, weights, bias]: [u64; 5],
    ) -> Result<()> {
        const OP: &str = "band_expand";
        let tiles = sides.rows.div_ceil(ROWS) * sides.wide.div_ceil(2 * PANEL_ROWS);
        let grid = [tiles.min(self.card().multiprocessors), 1, 1];
        let result = |address| self.map(address, sides.rows, sides.wide, RESULT_ROWS);
        let maps = vec![self.map(x, sides.rows, sides.narrow, ROWS)?, result(y)?, result(pre)?];
        let args = args![weights, bias, sides.words, sides.rows];
        let (unit, threads) = (expand_unit(epilogue, sides.lists.blocks), CONSUMERS + EXPAND_FILLERS + STORERS);
        self.launch_with_maps(OP, &unit, OP, grid, threads, expand_shared(), maps, args);
        Ok(())
    }

    /// y, plus the bias unless that is 0.
    pub(super) fn hopper_contract(&mut self, sides: &Sides<'_>, [y, x, weights, bias]: [u64; 4]) -> Result<()> {
        const OP: &str = "band_contract";
        let tiles = sides.rows.div_ceil(ROWS) * sides.narrow.div_ceil(COLS);
        let grid = [tiles.min(self.card().multiprocessors), 1, 1];
        let maps = vec![self.map(x, sides.rows, sides.wide, ROWS)?];
        let args = args![y, weights, bias, sides.words, sides.lists.contract_at, sides.rows];
        let threads = CONSUMERS + CONTRACT_FILLERS;
        self.launch_with_maps(OP, &contract_unit(), OP, grid, threads, contract_shared(), maps, args);
        Ok(())
    }

    /// The gradient of the panels, and that of the wide side's bias unless its place is 0.
    pub(super) fn hopper_outer(
        &mut self,
        sides: &Sides<'_>,
        [out, bias, wide, narrow]: [u64; 4],
        write: Write,
    ) -> Result<()> {
        const OP: &str = "band_outer";
        let blocks = self.card().multiprocessors;
        let (cut, at, deal) = outer::fastest(&sides.lists.outer, OuterCut::tiling, sides.rows, blocks);
        let Deal { whole, cut: cut_tiles, parts } = deal;
        let tiles = whole + cut_tiles;
        let pieces = self.pieces(cut.tiling(), deal)?;
        let maps =
            vec![self.map(wide, sides.rows, sides.wide, DEPTH)?, self.map(narrow, sides.rows, sides.narrow, DEPTH)?];
        let (unit, threads) = (outer_unit(cut), CONSUMERS + OUTER_FILLERS);
        let grid = [blocks.min(deal.items()), 1, 1];
        let args = args![out, bias, pieces, sides.words, at, tiles, whole, parts, sides.rows, write];
        self.launch_with_maps(OP, &unit, OP, grid, threads, outer_shared(cut), maps, args);
        if parts > 1 {
            let grid = [cut_tiles, cut.cols / (8 * SUM_GROUPS), cut.panels];
            let args = args![out, bias, pieces, sides.words, at, tiles, whole, parts, write];
            self.launch(OP, &unit, "band_outer_sum", grid, CONSUMERS, 0, args);
        }
        Ok(())
    }
}

/// The most memory that the pieces of an outer product take, whatever the band.
pub(super) fn most_piece_bytes(multiprocessors: usize) -> usize {
    let most = |cut: &OuterCut| cut.tiling().most_piece_bytes(multiprocessors);
    OUTER_CUTS.iter().chain([&OUTER_OF_BLOCKS]).map(most).max().unwrap_or(0)
}

/// Every instantiation.
pub(super) fn units() -> Vec<(Unit, &'static str, usize, usize)> {
    let expand_threads = CONSUMERS + EXPAND_FILLERS + STORERS;
    let mut units = vec![(contract_unit(), "band_contract", CONSUMERS + CONTRACT_FILLERS, contract_shared())];
    for (epilogue, blocks) in [(1, false), (1, true), (2, false), (2, true)] {
        units.push((expand_unit(epilogue, blocks), "band_expand", expand_threads, expand_shared()));
    }
    for cut in OUTER_CUTS.into_iter().chain([OUTER_OF_BLOCKS]) {
        units.push((outer_unit(cut), "band_outer", CONSUMERS + OUTER_FILLERS, outer_shared(cut)));
        units.push((outer_unit(cut), "band_outer_sum", CONSUMERS, 0));
    }
    units
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_are_listed_by_the_halves_that_they_touch() {
        for (narrow, wide, bandwidth) in [(300, 1200, 257), (512, 2048, 1024), (512, 2048, 1), (128, 512, 1024)] {
            let band = Band::new(narrow, wide, bandwidth).unwrap();
            for start in (0..narrow).step_by(COLS) {
                let [left, rest] = touching_panels(band.panels(), start);
                for (index, panel) in band.panels().iter().enumerate() {
                    let touched = [start, start + COLS / 2].map(|half| {
                        (half..half + COLS / 2)
                            .any(|col| (panel.col_start..panel.col_start + panel.cols).contains(&col))
                    });
                    assert_eq!(left.contains(&(index as u32)), touched == [true, false], "{start}, panel {index}");
                    assert_eq!(rest.contains(&(index as u32)), touched[1], "{start}, panel {index}");
                }
            }
        }
    }

    #[test]
    fn cuts_follow_the_shape() {
        let cut = |narrow, bandwidth| {
            let band = Band::new(narrow, 4 * narrow, bandwidth).unwrap();
            let lists = Lists::new(&band, &mut Vec::new());
            outer::fastest(&lists.outer, OuterCut::tiling, 8192, 132).0.cols
        };
        // As measured on an H100: 29 us, 68 us (the next best 75), 132 us (146), 104 us (122).
        assert_eq!([cut(512, 1024), cut(1024, 2048), cut(1600, 3200), cut(1600, 1600)], [96, 192, 160, 128]);
    }
}
