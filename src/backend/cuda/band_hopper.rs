//! The band's three products on Hopper, `kernels/band_hopper.cu`: for bf16 whose rows start at 16-byte boundaries.

use super::buffer::Element;
use super::compiler::{Unit, Value};
use super::driver::TensorMap;
use super::{Cuda, args, unit};
use crate::backend::{Arithmetic, Write};
use crate::band::{Band, PANEL_ROWS, Panel};
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
/// Threads that multiply; those that fetch for expand and for contract, that store for expand, and that fetch and add for the
/// outer product.
const CONSUMERS: usize = 256;
const EXPAND_FILLERS: usize = 64;
const CONTRACT_FILLERS: usize = 128;
const STORERS: usize = 64;
const OUTER_OTHERS: usize = 128;
/// Columns of the tiles of the outer product, with the stages that fit.
const OUTER_CUTS: [(usize, usize); 4] = [(96, 6), (160, 5), (224, 4), (288, 4)];
/// Groups of 8 columns that a block adds up the pieces of.
const SUM_GROUPS: usize = 4;
/// Wide rows of a tile of the outer product.
const OUTER_ROWS: usize = 2 * PANEL_ROWS;
/// Bytes of a row of a tile in shared memory, which are the columns of a copied box.
const TILE_ROW: usize = 128;
const BOX_COLS: usize = TILE_ROW / 2;

/// Lists for these kernels, behind a band's other words: for each tile of narrow columns where its panels are listed, how
/// many of them touch its left half alone and come first, and how many there are; the tiles of the outer product as pairs of
/// panels and first columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lists {
    contract_at: usize,
    outer_at: usize,
    outer_tiles: usize,
    outer: (usize, usize),
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
        let outer_at = words.len();
        // What all tiles fetch together for a row of the batch; of equals the one with the fewest columns to multiply.
        let fetched = |&(cols, _): &(usize, usize)| {
            let tiles = outer_tiles(band, cols).len();
            (tiles * (OUTER_ROWS + cols.next_multiple_of(BOX_COLS)), tiles * cols)
        };
        let outer = OUTER_CUTS.into_iter().min_by_key(fetched).unwrap_or(OUTER_CUTS[0]);
        let tiles = outer_tiles(band, outer.0);
        words.extend(tiles.iter().flatten());
        Self { contract_at, outer_at, outer_tiles: tiles.len(), outer }
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

/// Pairs of panels and first columns. Each pair has a tile, even if it has no connection: it adds up the pair's bias gradient.
fn outer_tiles(band: &Band, cols: usize) -> Vec<[u32; 2]> {
    let pairs = band.panels().chunks(2).enumerate();
    pairs
        .flat_map(|(pair, panels)| {
            let touched = panels.iter().filter(|panel| !panel.is_empty());
            let first = touched.clone().map(|panel| panel.col_start).min().unwrap_or(0);
            let end = touched.map(|panel| panel.col_start + panel.cols).max().unwrap_or(0);
            (first..end.max(first + 1)).step_by(cols).map(move |col| [pair as u32, col as u32])
        })
        .collect()
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

/// Shared memory of outer.
fn outer_shared((cols, stages): (usize, usize)) -> usize {
    shared(stages, (OUTER_ROWS + cols.next_multiple_of(BOX_COLS)) / BOX_COLS * DEPTH * TILE_ROW)
}

fn product_unit(product: &'static str, stages: usize) -> Unit {
    let sizes: [(&'static str, Value); 5] = [
        (product, 1usize.into()),
        ("BLOCK_ROWS", ROWS.into()),
        ("BLOCK_COLS", COLS.into()),
        ("STAGES", stages.into()),
        ("WGMMA", true.into()),
    ];
    unit("band_hopper", Arithmetic::Bf16, true).with(&sizes)
}

fn contract_unit() -> Unit {
    product_unit("CONTRACT", CONTRACT_STAGES)
}

fn expand_unit(epilogue: usize) -> Unit {
    product_unit("EXPAND", EXPAND_STAGES).with(&[("EPILOGUE", epilogue.into())])
}

fn outer_unit((cols, stages): (usize, usize)) -> Unit {
    let sizes: [(&'static str, Value); 4] =
        [("OUTER", 1usize.into()), ("BLOCK_COLS", cols.into()), ("STAGES", stages.into()), ("WGMMA", true.into())];
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
        let (unit, threads) = (expand_unit(epilogue), CONSUMERS + EXPAND_FILLERS + STORERS);
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
        let Lists { outer_at, outer_tiles: tiles, outer, .. } = *sides.lists;
        let blocks = (tiles * sides.rows.div_ceil(DEPTH)).min(self.card().multiprocessors);
        let parts = self.scratch("shares of a product", Element::F32, (blocks + tiles) * piece(outer.0))?;
        let maps =
            vec![self.map(wide, sides.rows, sides.wide, DEPTH)?, self.map(narrow, sides.rows, sides.narrow, DEPTH)?];
        let (unit, threads) = (outer_unit(outer), CONSUMERS + OUTER_OTHERS);
        let args = args![narrow, out, bias, parts, sides.words, outer_at, tiles, sides.rows, write];
        self.launch_with_maps(OP, &unit, OP, [blocks, 1, 1], threads, outer_shared(outer), maps, args);
        let grid = [tiles, outer.0 / (8 * SUM_GROUPS), 1];
        let args = args![out, bias, parts, sides.words, outer_at, tiles, blocks, sides.rows, write];
        self.launch(OP, &unit, "band_outer_sum", grid, CONSUMERS, 0, args);
        Ok(())
    }
}

/// Floats of a piece of an outer product's tile: its results and the sums of its wide values.
fn piece(cols: usize) -> usize {
    OUTER_ROWS * cols + OUTER_ROWS
}

/// The most memory that the pieces of an outer product over `narrow` channels take, whatever the band.
pub(super) fn most_piece_bytes(narrow: usize, multiprocessors: usize) -> usize {
    let most = |&(cols, _): &(usize, usize)| {
        let tiles = (4 * narrow).div_ceil(OUTER_ROWS) * narrow.div_ceil(cols);
        4 * (multiprocessors + tiles) * piece(cols)
    };
    OUTER_CUTS.iter().map(most).max().unwrap_or(0)
}

/// Every instantiation.
pub(super) fn units() -> Vec<(Unit, &'static str, usize, usize)> {
    let expand_threads = CONSUMERS + EXPAND_FILLERS + STORERS;
    let mut units = vec![(contract_unit(), "band_contract", CONSUMERS + CONTRACT_FILLERS, contract_shared())];
    units.extend([1, 2].map(|epilogue| (expand_unit(epilogue), "band_expand", expand_threads, expand_shared())));
    for cut in OUTER_CUTS {
        units.push((outer_unit(cut), "band_outer", CONSUMERS + OUTER_OTHERS, outer_shared(cut)));
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
    fn outer_tiles_cover_every_window_and_every_pair() {
        for (narrow, wide, bandwidth) in [(512, 2048, 1024), (1024, 4096, 2048), (8, 4096, 1), (300, 1200, 257)] {
            let band = Band::new(narrow, wide, bandwidth).unwrap();
            let tiles = outer_tiles(&band, 160);
            for (index, panel) in band.panels().iter().enumerate() {
                let own = tiles.iter().filter(|tile| tile[0] as usize == index / 2);
                let first = own.clone().map(|tile| tile[1] as usize).min().unwrap();
                let end = own.map(|tile| tile[1] as usize + 160).max().unwrap();
                assert!(panel.is_empty() || first <= panel.col_start && end >= panel.col_start + panel.cols);
            }
        }
        let cut =
            |narrow, bandwidth| Lists::new(&Band::new(narrow, 4 * narrow, bandwidth).unwrap(), &mut Vec::new()).outer.0;
        assert_eq!([cut(512, 1024), cut(512, 512), cut(1024, 2048)], [288, 160, 288]);
    }
}
