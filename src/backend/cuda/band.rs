//! The band's three products on the card: `kernels/band.cu` over the panels of the band's table, or on Hopper, where that
//! can, `kernels/band_hopper.cu`.

use super::band_hopper::{self, Sides};
use super::buffer::{Buffer, Element};
use super::outer::{self, Deal, Tiling};
use super::{Cuda, Unit, args, unit};
use crate::backend::{Arithmetic, BandLinear, BiasGrad, Expansion, Write};
use crate::band::{Band, Panel};
use crate::blocks::{BLOCK_COLS, BLOCK_ROWS, Blocks};
use crate::error::Result;
use crate::shapes::Span;

/// Bytes of a row of a tile in shared memory.
const TILE_ROW: usize = 128;
/// Groups of 8 columns that a block adds up the pieces of.
const SUM_GROUPS: usize = 4;

/// How the sizes of a product fit its kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fit {
    /// Every tile is whole: none is asked how many rows it has.
    Whole,
    /// Rows start at 16-byte boundaries.
    Aligned,
    /// Elements are copied one by one.
    Any,
}

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

    /// The same by smaller warps where a thread of a larger one lacks registers for the rows that tiles have.
    fn fitted(self, fit: Fit) -> Self {
        if fit == Fit::Whole || self.warp_rows < 64 { self } else { Self { warp_rows: 32, blocks: 1, ..self } }
    }

    fn threads(self) -> usize {
        32 * (self.rows / self.warp_rows) * (self.cols / self.warp_cols)
    }

    /// The unit of one product.
    fn unit(self, arithmetic: Arithmetic, fit: Fit, product: &'static str) -> Unit {
        unit("band", arithmetic, fit != Fit::Any).with(&[
            (product, 1usize.into()),
            ("BLOCK_ROWS", self.rows.into()),
            ("BLOCK_COLS", self.cols.into()),
            ("WARP_ROWS", self.warp_rows.into()),
            ("WARP_COLS", self.warp_cols.into()),
            ("DEPTH", self.depth.into()),
            ("STAGES", self.stages.into()),
            ("MIN_BLOCKS", self.blocks.into()),
            ("WHOLE", (fit == Fit::Whole).into()),
        ])
    }

    /// Shared memory of expand and contract, whose stages are one row of a tile deep.
    fn product_shared(self) -> usize {
        self.stages * (self.rows + self.cols) * TILE_ROW
    }

    /// The outer product's tiles. A multiprocessor of an H100 was through with 45 KB of its stages in a microsecond, in bf16; in
    /// other arithmetics, where all stages take longer, that still tells one cut from another.
    fn tiling(self, element: Element) -> Tiling {
        let tile = |cols: usize| (cols * element.bytes()).next_multiple_of(TILE_ROW) * self.depth;
        let stage_bytes = tile(self.rows) + tile(self.cols);
        let Self { rows, cols, depth, .. } = self;
        Tiling { rows, cols, depth, stage_bytes, stage_rate: 45_000, parts_each: 2 }
    }

    /// Shared memory of outer.
    fn outer_shared(self, element: Element) -> usize {
        self.stages * self.tiling(element).stage_bytes
    }
}

/// How each product is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cuts {
    expand: Cut,
    contract: Cut,
    /// Of blocks, each of which then fills a tile's columns: half as wide as of a band, and twice as high.
    contract_blocks: Cut,
    /// Of several for the outer product, the one that takes least: wide tiles fetch less, narrow ones fit a band's windows.
    outer: [Cut; 2],
}

impl Cuts {
    /// What suits an arithmetic. A stage of expand and contract is one row of a tile deep.
    pub(super) fn of(arithmetic: Arithmetic) -> Self {
        match arithmetic {
            Arithmetic::Bf16 => Self {
                expand: Cut::new([128, 128], [64, 64], 64, 3, 2),
                contract: Cut::new([128, 128], [64, 64], 64, 3, 2),
                contract_blocks: Cut::new([256, BLOCK_COLS], [64, 64], 64, 2, 2),
                outer: [128, 64].map(|cols| Cut::new([128, cols], [64, cols / 2], 64, 3, 2)),
            },
            _ => Self {
                expand: Cut::new([128, 128], [32, 64], 32, 3, 1),
                contract: Cut::new([128, 128], [32, 64], 32, 3, 1),
                contract_blocks: Cut::new([256, BLOCK_COLS], [32, 64], 32, 2, 1),
                outer: [128, 64].map(|cols| Cut::new([128, cols], [32, cols / 2], 32, 3, 1)),
            },
        }
    }
}

/// A band's geometry on the device: [`Band::table`]; of blocks, for each row of them the number of the first one, and in the end
/// how many there are; for each tile of narrow columns of contract the place and the number of the panels that touch it, and those
/// panels; then for each cut the tiles of the outer product.
pub struct Table {
    words: Buffer,
    narrow: usize,
    wide: usize,
    lists: Lists,
    /// Whether blocks stand in the band's place.
    blocks: bool,
    hopper: Option<band_hopper::Lists>,
}

/// Where the lists that follow the table start in words.
struct Lists {
    contract: Cut,
    contract_at: usize,
    /// Each cut, where its tiles are, and how many.
    outer: Vec<(Cut, usize, usize)>,
}

impl Lists {
    /// Adds the lists of `band` to its words.
    fn new(band: &Band, cuts: &Cuts, words: &mut Vec<u32>) -> Self {
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
        // A tile of the outer product has the columns of one block.
        let cuts = cuts.outer.into_iter().filter(|cut| band.blocks().is_none() || cut.cols == BLOCK_COLS);
        let listed = cuts.map(|cut| {
            // Where tiles lie does not depend on the elements.
            let (at, tiles) = (words.len(), cut.tiling(Element::F32).tiles(band));
            words.extend(tiles.iter().flatten());
            (cut, at, tiles.len())
        });
        let outer = listed.collect();
        Self { contract, contract_at, outer }
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

/// The most memory that the pieces of an outer product take, whatever the band.
pub(super) fn most_piece_bytes(arithmetic: Arithmetic, multiprocessors: usize) -> usize {
    let element = Element::of(arithmetic);
    let own = Cuts::of(arithmetic).outer.map(|cut| cut.tiling(element).most_piece_bytes(multiprocessors));
    own.into_iter().fold(band_hopper::most_piece_bytes(multiprocessors), usize::max)
}

/// How the sizes of a product fit tiles whose rows are multiples of `tile_rows` rows of the batch.
fn fit(arithmetic: Arithmetic, [narrow, wide]: [usize; 2], rows: usize, tile_rows: usize) -> Fit {
    let lanes = Element::of(arithmetic).lanes();
    if !narrow.is_multiple_of(lanes) || !wide.is_multiple_of(lanes) {
        Fit::Any
    } else if arithmetic == Arithmetic::Bf16 && rows.is_multiple_of(tile_rows) && wide.is_multiple_of(BLOCK_ROWS) {
        Fit::Whole
    } else {
        Fit::Aligned
    }
}

impl Table {
    fn words(&self) -> Result<u64> {
        self.words.f32s(self.words.len())
    }

    fn sides<'a>(&self, lists: &'a band_hopper::Lists, rows: usize) -> Result<Sides<'a>> {
        Ok(Sides { lists, words: self.words()?, narrow: self.narrow, wide: self.wide, rows })
    }
}

impl Cuda {
    /// Memory for the parts of an outer product until they are added; 0 if there are none.
    pub(super) fn pieces(&mut self, tiling: Tiling, deal: Deal) -> Result<u64> {
        match deal.pieces() {
            0 => Ok(0),
            pieces => self.scratch("pieces of a product", Element::F32, pieces * tiling.piece()),
        }
    }
}

impl BandLinear for Cuda {
    type Table = Table;

    fn band_table(&mut self, band: &Band) -> Result<Table> {
        let mut words = band.table();
        let lists = Lists::new(band, &self.band_cuts, &mut words);
        let whole_chunks = [band.narrow(), band.wide()].iter().all(|side| side.is_multiple_of(self.element().lanes()));
        let hopper = self.arithmetic == Arithmetic::Bf16 && self.kernels.target().has_warpgroup_products();
        let hopper = (hopper && whole_chunks).then(|| band_hopper::Lists::new(band, &mut words));
        let buffer = self.create(Element::F32, "band table", words.len())?;
        let to = buffer.f32s(words.len())?;
        self.copy_words(to, &words)?;
        let (narrow, wide, blocks) = (band.narrow(), band.wide(), band.blocks().is_some());
        Ok(Table { words: buffer, narrow, wide, lists, blocks, hopper })
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
        let fit = fit(self.arithmetic, [n, w], rows, cut.rows);
        let (cut, unit) = (cut.fitted(fit), expand_unit(cut, self.arithmetic, fit, epilogue, table.blocks));
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
        let cut = table.lists.contract;
        let fit = fit(self.arithmetic, [n, w], rows, cut.rows);
        let cut = cut.fitted(fit);
        let unit = cut.unit(self.arithmetic, fit, "CONTRACT");
        let grid = [rows.div_ceil(cut.rows) * n.div_ceil(cut.cols), 1, 1];
        let args = args![y, x, weights, bias, table.words()?, table.lists.contract_at, rows];
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
        let (n, w) = (table.narrow, table.wide);
        let (wide, narrow) = (self.activation(wide, rows * w)?, self.activation(narrow, rows * n)?);
        let bias = match bias {
            BiasGrad::Wide(span) => grads.part(Element::F32, span)?,
            BiasGrad::Narrow(span) => {
                self.column_sums(OP, grads, span, narrow, rows, write)?;
                0
            }
        };
        let out = grads.part(Element::F32, panels)?;
        if let Some(lists) = &table.hopper {
            return self.hopper_outer(&table.sides(lists, rows)?, [out, bias, wide, narrow], write);
        }
        let (arithmetic, element) = (self.arithmetic, self.element());
        let tiling = |cut: Cut| cut.tiling(element);
        let (cut, at, deal) = outer::fastest(&table.lists.outer, tiling, rows, self.card().multiprocessors);
        let fit = fit(arithmetic, [n, w], rows, cut.depth);
        let cut = cut.fitted(fit);
        let pieces = self.pieces(cut.tiling(element), deal)?;
        let (unit, threads, shared) = (cut.unit(arithmetic, fit, "OUTER"), cut.threads(), cut.outer_shared(element));
        let Deal { whole, cut: cut_tiles, parts } = deal;
        let (words, tiles) = (table.words()?, whole + cut_tiles);
        let args = args![out, bias, pieces, wide, narrow, words, at, tiles, whole, parts, rows, write];
        self.launch(OP, &unit, OP, [deal.items(), 1, 1], threads, shared, args);
        if parts > 1 {
            let grid = [cut_tiles, cut.warp_cols / (8 * SUM_GROUPS), cut.warp_rows / 16];
            let args = args![out, bias, pieces, words, at, tiles, whole, parts, write];
            self.launch(OP, &unit, "band_outer_sum", grid, threads, 0, args);
        }
        Ok(())
    }
}

fn expand_unit(cut: Cut, arithmetic: Arithmetic, fit: Fit, epilogue: usize, blocks: bool) -> Unit {
    let unit = cut.fitted(fit).unit(arithmetic, fit, "EXPAND");
    unit.with(&[("EPILOGUE", epilogue.into()), ("BLOCKS", blocks.into())])
}

/// Every instantiation.
pub(super) fn units(arithmetic: Arithmetic, warpgroups: bool) -> Vec<(Unit, &'static str, usize, usize)> {
    let Cuts { expand, contract, contract_blocks, outer } = Cuts::of(arithmetic);
    let element = Element::of(arithmetic);
    let mut units = if warpgroups && arithmetic == Arithmetic::Bf16 { band_hopper::units() } else { Vec::new() };
    let fits = if arithmetic == Arithmetic::Bf16 {
        &[Fit::Whole, Fit::Aligned, Fit::Any][..]
    } else {
        &[Fit::Aligned, Fit::Any]
    };
    for &fit in fits {
        for (epilogue, blocks) in [(1, false), (1, true), (2, false), (2, true)] {
            let (unit, cut) = (expand_unit(expand, arithmetic, fit, epilogue, blocks), expand.fitted(fit));
            units.push((unit, "band_expand", cut.threads(), cut.product_shared()));
        }
        for cut in [contract, contract_blocks].map(|cut| cut.fitted(fit)) {
            let unit = cut.unit(arithmetic, fit, "CONTRACT");
            units.push((unit, "band_contract", cut.threads(), cut.product_shared()));
        }
        for cut in outer.map(|cut| cut.fitted(fit)) {
            let unit = cut.unit(arithmetic, fit, "OUTER");
            units.push((unit.clone(), "band_outer", cut.threads(), cut.outer_shared(element)));
            units.push((unit, "band_outer_sum", cut.threads(), 0));
        }
    }
    units
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lists(narrow: usize, wide: usize, kept: &str) -> (Band, Lists, Vec<u32>) {
        let band = Band::of(kept.parse().unwrap(), narrow, wide, 1).unwrap();
        let mut words = band.table();
        let lists = Lists::new(&band, &Cuts::of(Arithmetic::Bf16), &mut words);
        (band, lists, words)
    }

    #[test]
    fn every_panel_is_listed_for_each_tile_that_it_touches() {
        for (kept, cols) in [("257", 128), ("random:0.4", 64), ("strided:0.3", 64)] {
            let (band, lists, words) = lists(300, 1200, kept);
            assert_eq!(lists.contract.cols, cols);
            for (tile, start) in (0..300).step_by(cols).enumerate() {
                let (at, count) = (words[lists.contract_at + 2 * tile], words[lists.contract_at + 2 * tile + 1]);
                let listed = &words[at as usize..][..count as usize];
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
        let (band, lists, words) = lists(300, 1200, "random:0.4");
        let (blocks, at) = (band.blocks().unwrap(), band.table().len());
        let mut end = 0;
        for row in 0..blocks.down() {
            assert_eq!(words[at + row], end);
            end = words[at + row + 1];
            for block in words[at + row]..end {
                let panel = band.panels()[2 * block as usize];
                assert!(panel.row_start == 128 * row && blocks.contains(row, panel.col_start / 64));
            }
        }
        assert_eq!((end as usize, at + blocks.down() + 1), (blocks.count(), lists.contract_at));
    }

    #[test]
    fn a_block_fills_a_tile_and_a_band_has_the_tiles_that_take_least() {
        let cols = |kept, narrow| {
            let (_, lists, _) = lists(narrow, 4 * narrow, kept);
            let (cut, _, deal) = outer::fastest(&lists.outer, |cut: Cut| cut.tiling(Element::Bf16), 8192, 132);
            (cut.cols, deal.items())
        };
        assert_eq!(cols("random:0.438", 512), (64, 56 * 2));
        // As measured on an H100: 42 us (with 68 tiles of 64 columns in five parts each 42), 120 (122), 242 (268).
        assert_eq!([512, 1024, 1600].map(|n| cols("1024", n).0), [128, 128, 128]);
    }

    #[test]
    fn whole_tiles_need_whole_rows_and_columns() {
        let fit = |narrow, wide, rows| fit(Arithmetic::Bf16, [narrow, wide], rows, 128);
        assert_eq!(fit(512, 2048, 8192), Fit::Whole);
        assert_eq!([fit(512, 2048, 100), fit(504, 2016, 8192)], [Fit::Aligned; 2]);
        assert_eq!(fit(300, 1204, 128), Fit::Any);
    }
}
