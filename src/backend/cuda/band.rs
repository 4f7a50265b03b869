//! The band's three products on the card: `kernels/band.cu` over the panels of the band's table, or on Hopper, where that
//! can, `kernels/band_hopper.cu`.

use super::band_hopper::{self, Sides};
use super::buffer::{Buffer, Element};
use super::{Cuda, Unit, args, unit};
use crate::backend::{Arithmetic, BandLinear, BiasGrad, Expansion, Write};
use crate::band::{Band, PANEL_ROWS, Panel};
use crate::blocks::{BLOCK_COLS, Blocks};
use crate::error::Result;
use crate::shapes::Span;

/// Bytes of a row of a tile in shared memory.
const TILE_ROW: usize = 128;
/// Rows of results that lie in shared memory at one time, each with so many floats more than columns.
const RESULT_ROWS: usize = 128;
const RESULT_PADDING: usize = 8;
/// Threads that sum a wide row's shares.
const SUM_THREADS: usize = 128;
/// Rows of the batch that a share of the outer product has at least.
const MIN_SHARE_ROWS: usize = 256;
/// Shares at most.
const MAX_SHARES: usize = 8;
/// Shares have a multiple of so many rows: of every depth of a stage.
const SHARE_ALIGN: usize = 64;

/// How a product is cut; see the header of `kernels/band.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Cut {
    rows: usize,
    cols: usize,
    warp_rows: usize,
    warp_cols: usize,
    depth: usize,
    stages: usize,
    /// Blocks that a multiprocessor should hold at once: what registers are dealt out by.
    blocks: usize,
}

impl Cut {
    const fn new(
        [rows, cols]: [usize; 2],
        [warp_rows, warp_cols]: [usize; 2],
        depth: usize,
        stages: usize,
        blocks: usize,
    ) -> Self {
        Self { rows, cols, warp_rows, warp_cols, depth, stages, blocks }
    }

    fn threads(self) -> usize {
        32 * (self.rows / self.warp_rows) * (self.cols / self.warp_cols)
    }

    /// The unit of one product.
    fn unit(self, arithmetic: Arithmetic, aligned: bool, product: &'static str) -> Unit {
        unit("band", arithmetic, aligned).with(&[
            (product, 1usize.into()),
            ("BLOCK_ROWS", self.rows.into()),
            ("BLOCK_COLS", self.cols.into()),
            ("WARP_ROWS", self.warp_rows.into()),
            ("WARP_COLS", self.warp_cols.into()),
            ("DEPTH", self.depth.into()),
            ("STAGES", self.stages.into()),
            ("MIN_BLOCKS", self.blocks.into()),
            ("WGMMA", false.into()),
        ])
    }

    /// Shared memory of expand and contract: the stages, or the results that follow them.
    fn product_shared(self) -> usize {
        let stages = self.stages * (self.rows + self.cols) * TILE_ROW;
        stages.max(4 * self.rows.min(RESULT_ROWS) * (self.cols + RESULT_PADDING))
    }

    /// Shared memory of outer.
    fn outer_shared(self, element: Element) -> usize {
        let tile = |cols: usize| (cols * element.bytes()).next_multiple_of(TILE_ROW) * self.depth;
        self.stages * (tile(self.rows) + tile(self.cols))
    }
}

/// How each product is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cuts {
    expand: Cut,
    contract: Cut,
    /// Of blocks, each of which then fills a tile's columns: half as wide as of a band, and twice as high.
    contract_blocks: Cut,
    /// Of several for the outer product, the one that fetches the least: wide tiles fetch less, narrow ones fit a band's windows.
    outer: [Cut; 3],
}

impl Cuts {
    /// What suits an arithmetic. A stage of expand and contract is one row of a tile deep.
    pub(super) fn of(arithmetic: Arithmetic) -> Self {
        match arithmetic {
            Arithmetic::Bf16 => Self {
                expand: Cut::new([128, 128], [32, 64], 64, 3, 2),
                contract: Cut::new([128, 128], [64, 64], 64, 3, 2),
                contract_blocks: Cut::new([256, BLOCK_COLS], [64, 64], 64, 2, 2),
                outer: [128, 96, 64].map(|cols| Cut::new([128, cols], [64, cols / 2], 64, 3, 2)),
            },
            _ => Self {
                expand: Cut::new([128, 128], [32, 64], 32, 3, 1),
                contract: Cut::new([128, 128], [32, 64], 32, 3, 1),
                contract_blocks: Cut::new([256, BLOCK_COLS], [32, 64], 32, 2, 1),
                outer: [128, 96, 64].map(|cols| Cut::new([128, cols], [32, cols / 2], 32, 3, 1)),
            },
        }
    }
}

/// A band's geometry on the device: [`Band::table`]; of blocks, for each row of them the number of the first one, and in the end
/// how many there are; for each tile of narrow columns of contract the place and the number of the panels that touch it, and those
/// panels; then the tiles of the outer product, as pairs of panels and first columns.
pub struct Table {
    words: Buffer,
    narrow: usize,
    wide: usize,
    panels: usize,
    packed_len: usize,
    contract_at: usize,
    contract: Cut,
    outer_at: usize,
    outer_tiles: usize,
    outer: Cut,
    /// Whether blocks stand in the band's place.
    blocks: bool,
    hopper: Option<band_hopper::Lists>,
}

/// Lists that follow the table, with where they start in words.
struct Lists {
    words: Vec<u32>,
    contract_at: usize,
    contract: Cut,
    outer_at: usize,
    outer_tiles: usize,
    outer: Cut,
}

impl Lists {
    fn new(band: &Band, cuts: &Cuts) -> Self {
        let mut words = band.table();
        words.extend(band.blocks().into_iter().flat_map(first_blocks));
        let contract_at = words.len();
        let contract = if band.blocks().is_some() { cuts.contract_blocks } else { cuts.contract };
        let cols = contract.cols;
        let panels_of = |start: usize| -> Vec<u32> {
            let touches =
                |(_, p): &(usize, &Panel)| !p.is_empty() && p.col_start < start + cols && p.col_start + p.cols > start;
            band.panels().iter().enumerate().filter(touches).map(|(index, _)| index as u32).collect()
        };
        let lists: Vec<Vec<u32>> = (0..band.narrow()).step_by(cols).map(panels_of).collect();
        let mut at = contract_at + 2 * lists.len();
        for list in &lists {
            words.extend([at as u32, list.len() as u32]);
            at += list.len();
        }
        words.extend(lists.into_iter().flatten());
        let outer_at = words.len();
        // What all blocks fetch together for a row of the batch.
        let fetched = |cut: &Cut| outer_tiles(band, *cut).len() * (cut.rows + cut.cols);
        let outer = cuts.outer.into_iter().min_by_key(fetched).unwrap_or(cuts.outer[0]);
        let tiles = outer_tiles(band, outer);
        words.extend(tiles.iter().flatten());
        Self { words, contract_at, contract, outer_at, outer_tiles: tiles.len(), outer }
    }
}

/// For each block row the number of its first block, and that of all of them.
fn first_blocks(blocks: &Blocks) -> Vec<u32> {
    let mut count = 0;
    let mut firsts = vec![0];
    firsts.extend((0..blocks.down()).map(|row| {
        count += blocks.row(row).count() as u32;
        count
    }));
    firsts
}

/// Groups of panels and first columns of the outer product's tiles.
fn outer_tiles(band: &Band, cut: Cut) -> Vec<[u32; 2]> {
    let groups = band.panels().chunks(cut.rows / PANEL_ROWS).enumerate();
    groups
        .flat_map(|(group, panels)| {
            let touched = panels.iter().filter(|panel| !panel.is_empty());
            let first = touched.clone().map(|panel| panel.col_start).min().unwrap_or(0);
            let end = touched.map(|panel| panel.col_start + panel.cols).max().unwrap_or(0);
            (first..end).step_by(cut.cols).map(move |col| [group as u32, col as u32])
        })
        .collect()
}

/// Shares of the batch's rows, each worked through by `tiles` blocks: (shares, rows of each). The last round of blocks over the
/// multiprocessors should leave few idle, and a share costs its sums a way to memory and back, about a twentieth of the
/// product of 8192 rows.
fn shares(tiles: usize, rows: usize, multiprocessors: usize) -> (usize, usize) {
    const SHARE_COST: f64 = 0.05;
    let cost = |&count: &usize| {
        let blocks = (tiles * count).max(1);
        let rounds = blocks.div_ceil(multiprocessors) * multiprocessors;
        rounds as f64 / blocks as f64 + SHARE_COST * count as f64
    };
    let most = (rows / MIN_SHARE_ROWS).clamp(1, MAX_SHARES);
    let wanted = (1..=most).min_by(|a, b| cost(a).total_cmp(&cost(b))).unwrap_or(1);
    let share_rows = rows.div_ceil(wanted).next_multiple_of(SHARE_ALIGN);
    (rows.div_ceil(share_rows).max(1), share_rows)
}

/// The most memory that the shares of an outer product over `narrow` channels and `rows` rows take, whatever the band.
pub(super) fn most_share_bytes(narrow: usize, rows: usize, multiprocessors: usize) -> usize {
    let pieces = band_hopper::most_piece_bytes(multiprocessors);
    let most_tiles = (4 * narrow).div_ceil(128) * narrow.div_ceil(64);
    let tiles = (1..=most_tiles).map(|tiles| tiles * shares(tiles, rows, multiprocessors).0).max().unwrap_or(0);
    pieces.max(4 * (128 * 128 * tiles).min(MAX_SHARES * 4 * narrow * narrow))
}

impl Table {
    /// Whether rows of both sides start at 16-byte boundaries.
    fn is_aligned(&self, element: Element) -> bool {
        self.narrow.is_multiple_of(element.lanes()) && self.wide.is_multiple_of(element.lanes())
    }

    fn words(&self) -> Result<u64> {
        self.words.f32s(self.words.len())
    }

    fn sides<'a>(&self, lists: &'a band_hopper::Lists, rows: usize) -> Result<Sides<'a>> {
        Ok(Sides { lists, words: self.words()?, narrow: self.narrow, wide: self.wide, rows })
    }
}

impl BandLinear for Cuda {
    type Table = Table;

    fn band_table(&mut self, band: &Band) -> Result<Table> {
        let Lists { mut words, contract_at, contract, outer_at, outer_tiles, outer } =
            Lists::new(band, &self.band_cuts);
        let whole_chunks = [band.narrow(), band.wide()].iter().all(|side| side.is_multiple_of(self.element().lanes()));
        let hopper = self.arithmetic == Arithmetic::Bf16 && self.kernels.target().has_warpgroup_products();
        let hopper = (hopper && whole_chunks).then(|| band_hopper::Lists::new(band, &mut words));
        let buffer = self.create(Element::F32, "band table", words.len())?;
        let to = buffer.f32s(words.len())?;
        self.copy_words(to, &words)?;
        Ok(Table {
            words: buffer,
            narrow: band.narrow(),
            wide: band.wide(),
            panels: band.panels().len(),
            packed_len: band.packed_len(),
            contract_at,
            contract,
            outer_at,
            outer_tiles,
            outer,
            blocks: band.blocks().is_some(),
            hopper,
        })
    }

    fn band_expand(
        &mut self,
        y: &mut Buffer,
        x: &Buffer,
        params: &Buffer,
        panels: Span,
        table: &Table,
        rows: usize,
        expansion: Expansion<'_, Buffer>,
    ) -> Result<()> {
        let (n, w) = (table.narrow, table.wide);
        let (epilogue, pre, bias) = match &expansion {
            Expansion::BiasGelu { bias, pre } => {
                (1, self.activation(pre, rows * w)?, params.part(Element::F32, *bias)?)
            }
            Expansion::GeluBackward { pre } => (2, self.activation(pre, rows * w)?, 0),
        };
        let (y, x) = (self.activation(y, rows * w)?, self.activation(x, rows * n)?);
        let weights = self.operand(params, panels)?;
        if let Some(lists) = &table.hopper {
            return self.hopper_expand(&table.sides(lists, rows)?, epilogue, [y, pre, x, weights, bias]);
        }
        let cut = self.band_cuts.expand;
        let unit = expand_unit(cut, self.arithmetic, table.is_aligned(self.element()), epilogue);
        let unit = if table.blocks { of_blocks(unit) } else { unit };
        let grid = [rows.div_ceil(cut.rows) * w.div_ceil(cut.cols), 1, 1];
        let args = args![y, pre, x, weights, bias, table.words()?, rows];
        self.launch("band_expand", &unit, "band_expand", grid, cut.threads(), cut.product_shared(), args);
        Ok(())
    }

    fn band_contract(
        &mut self,
        y: &mut Buffer,
        x: &Buffer,
        params: &Buffer,
        panels: Span,
        table: &Table,
        rows: usize,
        bias: Option<Span>,
    ) -> Result<()> {
        let (n, w) = (table.narrow, table.wide);
        let (y, x) = (self.activation(y, rows * n)?, self.activation(x, rows * w)?);
        let weights = self.operand(params, panels)?;
        let bias = bias.map_or(Ok(0), |bias| params.part(Element::F32, bias))?;
        if let Some(lists) = &table.hopper {
            return self.hopper_contract(&table.sides(lists, rows)?, [y, x, weights, bias]);
        }
        let cut = table.contract;
        let unit = cut.unit(self.arithmetic, table.is_aligned(self.element()), "CONTRACT");
        let grid = [rows.div_ceil(cut.rows) * n.div_ceil(cut.cols), 1, 1];
        let args = args![y, x, weights, bias, table.words()?, table.contract_at, rows];
        self.launch("band_contract", &unit, "band_contract", grid, cut.threads(), cut.product_shared(), args);
        Ok(())
    }

    fn band_outer(
        &mut self,
        grads: &mut Buffer,
        panels: Span,
        bias: BiasGrad,
        wide: &Buffer,
        narrow: &Buffer,
        table: &Table,
        rows: usize,
        write: Write,
    ) -> Result<()> {
        const OP: &str = "band_outer";
        let (n, w, packed) = (table.narrow, table.wide, table.packed_len);
        let (wide, narrow) = (self.activation(wide, rows * w)?, self.activation(narrow, rows * n)?);
        if let Some(lists) = &table.hopper {
            let bias = match bias {
                BiasGrad::Wide(span) => grads.part(Element::F32, span)?,
                BiasGrad::Narrow(span) => {
                    self.column_sums(OP, grads, span, narrow, rows, write)?;
                    0
                }
            };
            let operands = [grads.part(Element::F32, panels)?, bias, wide, narrow];
            return self.hopper_outer(&table.sides(lists, rows)?, operands, write);
        }
        match bias {
            BiasGrad::Wide(span) => self.column_sums(OP, grads, span, wide, rows, write)?,
            BiasGrad::Narrow(span) => self.column_sums(OP, grads, span, narrow, rows, write)?,
        }
        let out = grads.part(Element::F32, panels)?;
        let (count, share_rows) = shares(table.outer_tiles, rows, self.card().multiprocessors);
        let target = match count {
            1 => out,
            _ => self.scratch("shares of a product", Element::F32, count * packed)?,
        };
        let unit = table.outer.unit(self.arithmetic, table.is_aligned(self.element()), "OUTER");
        let (threads, shared) = (table.outer.threads(), table.outer.outer_shared(self.element()));
        let grid = [table.outer_tiles, count, 1];
        let args = args![target, wide, narrow, table.words()?, table.outer_at, rows, share_rows, packed, write];
        self.launch(OP, &unit, "band_outer", grid, threads, shared, args);
        if count > 1 {
            let args = args![out, target, table.words()?, count, packed, write];
            let (unit, rows, threads) = match table.blocks {
                true => (of_blocks(unit), table.panels * PANEL_ROWS, BLOCK_COLS),
                false => (unit, w, SUM_THREADS),
            };
            self.launch(OP, &unit, "band_outer_sum", [rows, 1, 1], threads, 0, args);
        }
        Ok(())
    }
}

fn expand_unit(cut: Cut, arithmetic: Arithmetic, aligned: bool, epilogue: usize) -> Unit {
    cut.unit(arithmetic, aligned, "EXPAND").with(&[("EPILOGUE", epilogue.into())])
}

/// The same for blocks in a band's place.
fn of_blocks(unit: Unit) -> Unit {
    unit.with(&[("BLOCKS", true.into())])
}

/// Every instantiation.
pub(super) fn units(arithmetic: Arithmetic, warpgroups: bool) -> Vec<(Unit, &'static str, usize, usize)> {
    let Cuts { expand, contract, contract_blocks, outer } = Cuts::of(arithmetic);
    let mut units = if warpgroups && arithmetic == Arithmetic::Bf16 { band_hopper::units() } else { Vec::new() };
    for aligned in [true, false] {
        for epilogue in [1, 2] {
            let unit = expand_unit(expand, arithmetic, aligned, epilogue);
            for unit in [unit.clone(), of_blocks(unit)] {
                units.push((unit, "band_expand", expand.threads(), expand.product_shared()));
            }
        }
        for cut in [contract, contract_blocks] {
            let unit = cut.unit(arithmetic, aligned, "CONTRACT");
            units.push((unit, "band_contract", cut.threads(), cut.product_shared()));
        }
        for cut in outer {
            let unit = cut.unit(arithmetic, aligned, "OUTER");
            units.push((unit.clone(), "band_outer", cut.threads(), cut.outer_shared(Element::of(arithmetic))));
            // Of blocks the tiles that they fill fetch the least.
            if cut.cols == BLOCK_COLS {
                units.push((of_blocks(unit.clone()), "band_outer_sum", BLOCK_COLS, 0));
            }
            units.push((unit, "band_outer_sum", SUM_THREADS, 0));
        }
    }
    units
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lists(narrow: usize, wide: usize, kept: &str) -> (Band, Lists) {
        let band = Band::of(kept.parse().unwrap(), narrow, wide, 1).unwrap();
        let lists = Lists::new(&band, &Cuts::of(Arithmetic::Bf16));
        (band, lists)
    }

    #[test]
    fn every_panel_is_listed_for_each_tile_that_it_touches() {
        for (kept, cols) in [("257", 128), ("random:0.4", 64), ("strided:0.3", 64)] {
            let (band, lists) = lists(300, 1200, kept);
            assert_eq!(lists.contract.cols, cols);
            for (tile, start) in (0..300).step_by(cols).enumerate() {
                let (at, count) =
                    (lists.words[lists.contract_at + 2 * tile], lists.words[lists.contract_at + 2 * tile + 1]);
                let listed = &lists.words[at as usize..][..count as usize];
                for (index, panel) in band.panels().iter().enumerate() {
                    let kept = |i: usize| panel.row_range().any(|j| band.kept(panel, j).contains(&i));
                    let touches = (start..(start + cols).min(300)).any(kept);
                    assert!(
                        !touches || listed.contains(&(index as u32)),
                        "{} tile {tile}, panel {index}",
                        band.title()
                    );
                }
            }
        }
    }

    #[test]
    fn the_blocks_of_a_row_follow_its_first_one() {
        let (band, lists) = lists(300, 1200, "random:0.4");
        let (blocks, at) = (band.blocks().unwrap(), band.table().len());
        let mut end = 0;
        for row in 0..blocks.down() {
            assert_eq!(lists.words[at + row], end);
            end = lists.words[at + row + 1];
            for block in lists.words[at + row]..end {
                let panel = band.panels()[2 * block as usize];
                assert!(panel.row_start == 128 * row && blocks.contains(row, panel.col_start / 64));
            }
        }
        assert_eq!((end as usize, at + blocks.down() + 1), (blocks.count(), lists.contract_at));
    }

    #[test]
    fn the_outer_tiles_cover_every_window() {
        assert_eq!(["1024", "random:0.438"].map(|kept| lists(512, 2048, kept).1.outer.cols), [96, 64]);
        assert_eq!(lists(512, 2048, "random:0.438").1.outer_tiles, 56);
        for kept in ["1024", "random:0.438"] {
            let (band, lists) = lists(512, 2048, kept);
            for (index, panel) in band.panels().iter().enumerate() {
                let tiles = lists.words[lists.outer_at..].chunks(2).filter(|tile| tile[0] as usize == index / 2);
                let (first, last) = tiles.fold((usize::MAX, 0), |(first, last), tile| {
                    (first.min(tile[1] as usize), last.max(tile[1] as usize + lists.outer.cols))
                });
                assert!(first <= panel.col_start && last >= panel.col_start + panel.cols);
            }
        }
    }

    #[test]
    fn shares_cover_the_rows_and_no_more() {
        for (tiles, rows) in [(44, 8192), (1, 8192), (1000, 8192), (4, 100), (1, 1)] {
            let (count, share_rows) = shares(tiles, rows, 132);
            assert!(share_rows % SHARE_ALIGN == 0 && count * share_rows >= rows && (count - 1) * share_rows < rows);
        }
        // Of so many rounds over 132 processors, 48 tiles in 5 shares leave 24 places empty, 160 in 4 leave 20, 350 in 3 leave 6;
        // 1000 leave 56 of 1056 as they are.
        assert_eq!([48, 160, 350, 1000].map(|tiles| shares(tiles, 8192, 132).0), [5, 4, 3, 1]);
    }
}
