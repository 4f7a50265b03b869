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
/// Threads that multiply, those that fetch for expand and contract, those that store for expand, and those that fetch and add
/// for the outer product.
const CONSUMERS: usize = 256;
const FILLERS: usize = 64;
const STORERS: usize = 64;
const OUTER_OTHERS: usize = 128;
/// Columns of the tiles of the outer product, with the stages that fit.
const OUTER_CUTS: [(usize, usize); 5] = [(128, 6), (192, 5), (256, 4), (288, 4), (320, 4)];
/// Groups of 8 columns that a block adds up the pieces of.
const SUM_GROUPS: usize = 4;
/// Wide rows of a tile of the outer product.
const OUTER_ROWS: usize = 2 * PANEL_ROWS;
/// Bytes of a row of a tile in shared memory, which are the columns of a copied box.
const TILE_ROW: usize = 128;
const BOX_COLS: usize = TILE_ROW / 2;

/// Blocks of a cluster, where a card has them.
const CLUSTER: usize = 2;

/// Lists for these kernels, behind a band's other words: for the tiles of narrow columns of each cluster where their panels are
/// listed and how many there are, and for each of its blocks how many of them it passes over at first, and how many then
/// touch the left half of its columns alone, both halves, the right half alone; the outer product's tiles as groups of pairs of
/// panels (a pair for each block of a cluster), first columns, and whether they add up the wide values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lists {
    /// Blocks of a cluster.
    cluster: usize,
    contract_at: usize,
    outer_at: usize,
    outer_tiles: usize,
    outer: (usize, usize),
}

impl Lists {
    /// Adds the lists of `band` to its words, for a card that has clusters or one that has none.
    pub(super) fn new(band: &Band, words: &mut Vec<u32>, has_clusters: bool) -> Self {
        let cluster = if has_clusters { CLUSTER } else { 1 };
        let contract_at = words.len();
        let lists: Vec<ContractList> = (0..band.narrow())
            .step_by(cluster * COLS)
            .map(|start| ContractList::new(band.panels(), start, cluster))
            .collect();
        let mut at = contract_at + lists.iter().map(|list| 2 + list.counts.len()).sum::<usize>();
        for list in &lists {
            words.extend([at as u32, list.panels.len() as u32]);
            words.extend(&list.counts);
            at += list.panels.len();
        }
        words.extend(lists.iter().flat_map(|list| &list.panels));
        let outer_at = words.len();
        // What all tiles fetch together for a row of the batch; of equals the one with the fewest columns to multiply.
        let fetched = |&(cols, _): &(usize, usize)| {
            let tiles = outer_tiles(band, cols, cluster).len();
            (tiles * (cluster * OUTER_ROWS + cols.next_multiple_of(BOX_COLS)), tiles * cols)
        };
        let outer = OUTER_CUTS.into_iter().min_by_key(fetched).unwrap_or(OUTER_CUTS[0]);
        let tiles = outer_tiles(band, outer.0, cluster);
        words.extend(tiles.iter().flatten());
        Self { cluster, contract_at, outer_at, outer_tiles: tiles.len(), outer }
    }
}

/// What a cluster's tiles of narrow columns visit.
struct ContractList {
    /// Every panel that touches one of them, in order.
    panels: Vec<u32>,
    /// Four counts for each block: see [`Lists`].
    counts: Vec<u32>,
}

impl ContractList {
    /// The list of the `cluster` tiles from column `start` on.
    fn new(panels: &[Panel], start: usize, cluster: usize) -> Self {
        let touches = |panel: &Panel, start: usize, cols: usize| {
            !panel.is_empty() && panel.col_start < start + cols && panel.col_start + panel.cols > start
        };
        let listed = panels.iter().enumerate().filter(|(_, panel)| touches(panel, start, cluster * COLS));
        let counts = (0..cluster).flat_map(|rank| {
            // Windows move to the right panel by panel, so that what is alike follows one another.
            let halves = [start + rank * COLS, start + rank * COLS + COLS / 2];
            let kinds = listed.clone().map(|(_, panel)| halves.map(|half| touches(panel, half, COLS / 2)));
            let before = kinds.clone().take_while(|kind| *kind == [false, false]).count();
            let count = |kind| kinds.clone().filter(|other| *other == kind).count();
            [before, count([true, false]), count([true, true]), count([false, true])].map(|count| count as u32)
        });
        let counts = counts.collect();
        Self { panels: listed.map(|(index, _)| index as u32).collect(), counts }
    }
}

/// Groups of panels, two for each block of a cluster, first columns, and 1 for the first of a group. Each group has a tile, even
/// if it has no connection: it adds up the group's bias gradient.
fn outer_tiles(band: &Band, cols: usize, cluster: usize) -> Vec<[u32; 3]> {
    let groups = band.panels().chunks(2 * cluster).enumerate();
    groups
        .flat_map(|(group, panels)| {
            let touched = panels.iter().filter(|panel| !panel.is_empty());
            let first = touched.clone().map(|panel| panel.col_start).min().unwrap_or(0);
            let end = touched.map(|panel| panel.col_start + panel.cols).max().unwrap_or(0);
            let columns = (first..end.max(first + 1)).step_by(cols);
            columns.map(move |col| [group as u32, col as u32, u32::from(col == first)])
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

fn product_unit(product: &'static str, stages: usize, cluster: usize) -> Unit {
    let sizes: [(&'static str, Value); 6] = [
        (product, 1usize.into()),
        ("BLOCK_ROWS", ROWS.into()),
        ("BLOCK_COLS", COLS.into()),
        ("STAGES", stages.into()),
        ("CLUSTER", cluster.into()),
        ("WGMMA", true.into()),
    ];
    unit("band_hopper", Arithmetic::Bf16, true).with(&sizes)
}

fn contract_unit(cluster: usize) -> Unit {
    product_unit("CONTRACT", CONTRACT_STAGES, cluster)
}

fn expand_unit(epilogue: usize) -> Unit {
    product_unit("EXPAND", EXPAND_STAGES, 1).with(&[("EPILOGUE", epilogue.into())])
}

fn outer_unit((cols, stages): (usize, usize), cluster: usize) -> Unit {
    let sizes: [(&'static str, Value); 5] = [
        ("OUTER", 1usize.into()),
        ("BLOCK_COLS", cols.into()),
        ("STAGES", stages.into()),
        ("CLUSTER", cluster.into()),
        ("WGMMA", true.into()),
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
        let (unit, threads) = (expand_unit(epilogue), CONSUMERS + FILLERS + STORERS);
        self.launch_with_maps(OP, &unit, OP, grid, threads, expand_shared(), maps, args);
        Ok(())
    }

    /// y, plus the bias unless that is 0.
    pub(super) fn hopper_contract(&mut self, sides: &Sides<'_>, [y, x, weights, bias]: [u64; 4]) -> Result<()> {
        const OP: &str = "band_contract";
        let Lists { cluster, contract_at, .. } = *sides.lists;
        let tiles = sides.rows.div_ceil(ROWS) * sides.narrow.div_ceil(cluster * COLS);
        let grid = [cluster * self.clusters(tiles, cluster), 1, 1];
        let maps = vec![self.map(x, sides.rows, sides.wide, ROWS / cluster)?];
        let args = args![y, weights, bias, sides.words, contract_at, sides.rows];
        let (unit, threads) = (contract_unit(cluster), CONSUMERS + FILLERS);
        self.launch_with_maps(OP, &unit, OP, grid, threads, contract_shared(), maps, args);
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
        let Lists { cluster, outer_at, outer_tiles: tiles, outer, .. } = *sides.lists;
        let clusters = self.clusters(tiles * sides.rows.div_ceil(DEPTH), cluster);
        let parts = self.scratch("shares of a product", Element::F32, cluster * (clusters + tiles) * piece(outer.0))?;
        let maps =
            vec![self.map(wide, sides.rows, sides.wide, DEPTH)?, self.map(narrow, sides.rows, sides.narrow, DEPTH)?];
        let unit = outer_unit(outer, cluster);
        let (grid, threads) = ([cluster * clusters, 1, 1], CONSUMERS + OUTER_OTHERS);
        let args = args![out, bias, parts, sides.words, outer_at, tiles, sides.rows, write];
        self.launch_with_maps(OP, &unit, OP, grid, threads, outer_shared(outer), maps, args);
        let grid = [cluster * tiles, outer.0 / (8 * SUM_GROUPS), 1];
        let args = args![out, bias, parts, sides.words, outer_at, tiles, clusters, sides.rows, write];
        self.launch(OP, &unit, "band_outer_sum", grid, CONSUMERS, 0, args);
        Ok(())
    }

    /// How many clusters stay on the card for so much work.
    fn clusters(&self, work: usize, cluster: usize) -> usize {
        work.min(self.card().multiprocessors / cluster).max(1)
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

/// Every instantiation, for a card that has clusters.
pub(super) fn units() -> Vec<(Unit, &'static str, usize, usize)> {
    let threads = CONSUMERS + FILLERS;
    let mut units = vec![(contract_unit(CLUSTER), "band_contract", threads, contract_shared())];
    units.extend([1, 2].map(|epilogue| (expand_unit(epilogue), "band_expand", threads + STORERS, expand_shared())));
    for cut in OUTER_CUTS {
        let unit = outer_unit(cut, CLUSTER);
        units.push((unit.clone(), "band_outer", CONSUMERS + OUTER_OTHERS, outer_shared(cut)));
        units.push((unit, "band_outer_sum", CONSUMERS, 0));
    }
    units
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_are_listed_by_the_halves_that_they_touch() {
        for (narrow, wide, bandwidth) in [(300, 1200, 257), (512, 2048, 1024), (512, 2048, 1), (128, 512, 1024)] {
            for cluster in [1, CLUSTER] {
                let band = Band::new(narrow, wide, bandwidth).unwrap();
                for start in (0..narrow).step_by(cluster * COLS) {
                    let list = ContractList::new(band.panels(), start, cluster);
                    let touches = |panel: &Panel, start: usize, cols: usize| {
                        (start..start + cols).any(|col| (panel.col_start..panel.col_start + panel.cols).contains(&col))
                    };
                    let all = band.panels().iter().filter(|panel| touches(panel, start, cluster * COLS));
                    assert_eq!(all.count(), list.panels.len());
                    for (rank, counts) in list.counts.chunks(4).enumerate() {
                        let own = start + rank * COLS;
                        let kind = |index: &u32| {
                            let panel = &band.panels()[*index as usize];
                            [own, own + COLS / 2].map(|half| touches(panel, half, COLS / 2))
                        };
                        let mut kinds = list.panels.iter().map(kind);
                        let runs = [[false, false], [true, false], [true, true], [false, true]];
                        for (run, count) in runs.into_iter().zip(counts) {
                            assert!(kinds.by_ref().take(*count as usize).all(|kind| kind == run));
                        }
                        assert!(kinds.all(|kind| kind == [false, false]));
                    }
                }
            }
        }
    }

    #[test]
    fn outer_tiles_cover_every_window_and_every_group() {
        for (narrow, wide, bandwidth) in [(512, 2048, 1024), (1024, 4096, 2048), (8, 4096, 1), (300, 1200, 257)] {
            for cluster in [1, CLUSTER] {
                let band = Band::new(narrow, wide, bandwidth).unwrap();
                let tiles = outer_tiles(&band, 192, cluster);
                for (index, panel) in band.panels().iter().enumerate() {
                    let own = tiles.iter().filter(|tile| tile[0] as usize == index / (2 * cluster));
                    let first = own.clone().map(|tile| tile[1] as usize).min().unwrap();
                    let end = own.clone().map(|tile| tile[1] as usize + 192).max().unwrap();
                    assert!(panel.is_empty() || first <= panel.col_start && end >= panel.col_start + panel.cols);
                    assert_eq!(own.filter(|tile| tile[2] == 1).count(), 1);
                }
            }
        }
        let cut = |narrow, bandwidth| {
            let band = Band::new(narrow, 4 * narrow, bandwidth).unwrap();
            Lists::new(&band, &mut Vec::new(), true).outer.0
        };
        assert_eq!([cut(512, 1024), cut(512, 512), cut(1024, 2048)], [320, 192, 288]);
    }
}
