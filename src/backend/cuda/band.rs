//! The band's three products on the card: `kernels/band.cu` over the panels of the band's table.

use super::buffer::{Buffer, Element};
use super::{Cuda, Unit, args, unit};
use crate::backend::{Arithmetic, BandLinear, BiasGrad, Expansion, Write};
use crate::band::Band;
use crate::error::Result;
use crate::shapes::Span;

const THREADS: usize = 256;
/// Rows and columns of a block's results; a row of results in shared memory has so many more floats.
const BLOCK: usize = 128;
const RESULT_PADDING: usize = 8;
/// Bytes of a row of a tile in shared memory.
const TILE_ROW: usize = 128;
/// Rows of the batch that a stage of the outer product holds.
const OUTER_DEPTH: usize = 32;
/// Columns that a block of the outer product may have, the widest first.
const OUTER_COLS: [usize; 3] = [128, 96, 64];
/// Tiles that are on their way to shared memory or there.
const STAGES: usize = 3;
/// Threads that sum a wide row's shares.
const SUM_THREADS: usize = 128;
/// Rows of the batch that a share of the outer product has at least.
const MIN_SHARE_ROWS: usize = 256;

/// A band's geometry on the device: [`Band::table`]; then for each tile of 128 narrow columns the place and the number of the
/// panels that touch it, and those panels; then the tiles of the outer product, as pairs of panels and first columns.
pub struct Table {
    words: Buffer,
    narrow: usize,
    wide: usize,
    panels: usize,
    packed_len: usize,
    contract_at: usize,
    outer_at: usize,
    outer_tiles: usize,
    outer_cols: usize,
}

/// Lists that follow the table, with where they start in words.
struct Lists {
    words: Vec<u32>,
    contract_at: usize,
    outer_at: usize,
    outer_tiles: usize,
    outer_cols: usize,
}

impl Lists {
    fn new(band: &Band) -> Self {
        let mut words = band.table();
        let contract_at = words.len();
        let panels_of = |start: usize| -> Vec<u32> {
            let touches = |(_, p): &(usize, &crate::band::Panel)| {
                !p.is_empty() && p.col_start < start + BLOCK && p.col_start + p.cols > start
            };
            band.panels().iter().enumerate().filter(touches).map(|(index, _)| index as u32).collect()
        };
        let lists: Vec<Vec<u32>> = (0..band.narrow()).step_by(BLOCK).map(panels_of).collect();
        let mut at = contract_at + 2 * lists.len();
        for list in &lists {
            words.extend([at as u32, list.len() as u32]);
            at += list.len();
        }
        words.extend(lists.into_iter().flatten());
        let outer_at = words.len();
        let outer_cols = OUTER_COLS.into_iter().min_by_key(|&cols| outer_tiles(band, cols).len() * cols).unwrap_or(BLOCK);
        let tiles = outer_tiles(band, outer_cols);
        words.extend(tiles.iter().flatten());
        Self { words, contract_at, outer_at, outer_tiles: tiles.len(), outer_cols }
    }
}

/// Pairs of panels and first columns of the outer product's tiles of `cols` columns.
fn outer_tiles(band: &Band, cols: usize) -> Vec<[u32; 2]> {
    let pairs = band.panels().chunks(2).enumerate();
    pairs
        .flat_map(|(pair, panels)| {
            let touched = panels.iter().filter(|panel| !panel.is_empty());
            let first = touched.clone().map(|panel| panel.col_start).min().unwrap_or(0);
            let end = touched.map(|panel| panel.col_start + panel.cols).max().unwrap_or(0);
            (first..end).step_by(cols).map(move |col| [pair as u32, col as u32])
        })
        .collect()
}

/// Shares of the batch's rows so that `tiles` blocks keep `multiprocessors` busy: (shares, rows of each).
fn shares(tiles: usize, rows: usize, multiprocessors: usize) -> (usize, usize) {
    let wanted = (2 * multiprocessors).div_ceil(tiles.max(1)).min(rows / MIN_SHARE_ROWS).max(1);
    let share_rows = rows.div_ceil(wanted).next_multiple_of(OUTER_DEPTH);
    (rows.div_ceil(share_rows).max(1), share_rows)
}

/// The most memory that the shares of an outer product over `narrow` channels take: fewer tiles than are wanted leave room for
/// at most as many shares again.
pub(super) fn most_share_bytes(narrow: usize, multiprocessors: usize) -> usize {
    let tiles = 2 * (2 * multiprocessors) * BLOCK * BLOCK;
    4 * tiles.max(4 * narrow * narrow)
}

impl Table {
    /// Whether rows of both sides start at 16-byte boundaries.
    fn is_aligned(&self, element: Element) -> bool {
        self.narrow.is_multiple_of(element.lanes()) && self.wide.is_multiple_of(element.lanes())
    }

    fn words(&self) -> Result<u64> {
        self.words.f32s(self.words.len())
    }
}

fn products_unit(arithmetic: Arithmetic, aligned: bool, outer_cols: usize) -> Unit {
    unit("band", arithmetic, aligned).with(&[("STAGES", STAGES.into()), ("OUTER_COLS", outer_cols.into())])
}

fn expand_unit(arithmetic: Arithmetic, aligned: bool, epilogue: usize) -> Unit {
    unit("band", arithmetic, aligned).with(&[("STAGES", STAGES.into()), ("EPILOGUE", epilogue.into())])
}

/// Bytes of a tile with `rows` rows of `cols` elements.
fn tile_bytes(arithmetic: Arithmetic, rows: usize, cols: usize) -> usize {
    (cols * Element::of(arithmetic).bytes()).next_multiple_of(TILE_ROW) * rows
}

/// Shared memory of expand and contract: the stages, or the results that follow them.
fn product_shared() -> usize {
    (STAGES * 2 * BLOCK * TILE_ROW).max(4 * BLOCK * (BLOCK + RESULT_PADDING))
}

fn outer_shared(arithmetic: Arithmetic, outer_cols: usize) -> usize {
    let tile = |cols| tile_bytes(arithmetic, OUTER_DEPTH, cols);
    STAGES * (tile(BLOCK) + tile(outer_cols))
}

impl BandLinear for Cuda {
    type Table = Table;

    fn band_table(&mut self, band: &Band) -> Result<Table> {
        let Lists { words, contract_at, outer_at, outer_tiles, outer_cols } = Lists::new(band);
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
            outer_at,
            outer_tiles,
            outer_cols,
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
        let unit = expand_unit(self.arithmetic, table.is_aligned(self.element()), epilogue);
        let grid = [rows.div_ceil(BLOCK) * table.panels.div_ceil(2), 1, 1];
        let args = args![y, pre, x, weights, bias, table.words()?, rows];
        self.launch("band_expand", &unit, "band_expand", grid, THREADS, product_shared(), args);
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
        let unit = products_unit(self.arithmetic, table.is_aligned(self.element()), table.outer_cols);
        let grid = [rows.div_ceil(BLOCK) * n.div_ceil(BLOCK), 1, 1];
        let args = args![y, x, weights, bias, table.words()?, table.contract_at, rows];
        self.launch("band_contract", &unit, "band_contract", grid, THREADS, product_shared(), args);
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
        let unit = products_unit(self.arithmetic, table.is_aligned(self.element()), table.outer_cols);
        let shared = outer_shared(self.arithmetic, table.outer_cols);
        let grid = [table.outer_tiles, count, 1];
        let args = args![target, wide, narrow, table.words()?, table.outer_at, rows, share_rows, packed, write];
        self.launch(OP, &unit, "band_outer", grid, THREADS, shared, args);
        if count > 1 {
            let args = args![out, target, table.words()?, count, packed, write];
            self.launch(OP, &unit, "band_outer_sum", [w, 1, 1], SUM_THREADS, 0, args);
        }
        Ok(())
    }
}

/// Every instantiation.
pub(super) fn units(arithmetic: Arithmetic) -> Vec<(Unit, &'static str, usize, usize)> {
    let mut units = Vec::new();
    for aligned in [true, false] {
        for epilogue in [1, 2] {
            units.push((expand_unit(arithmetic, aligned, epilogue), "band_expand", THREADS, product_shared()));
        }
        for outer_cols in OUTER_COLS {
            let unit = products_unit(arithmetic, aligned, outer_cols);
            units.push((unit.clone(), "band_contract", THREADS, product_shared()));
            units.push((unit.clone(), "band_outer", THREADS, outer_shared(arithmetic, outer_cols)));
            units.push((unit, "band_outer_sum", SUM_THREADS, 0));
        }
    }
    units
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_panel_is_listed_for_each_tile_that_it_touches() {
        let band = Band::new(300, 1200, 257).unwrap();
        let lists = Lists::new(&band);
        for (tile, start) in (0..300).step_by(BLOCK).enumerate() {
            let (at, count) = (lists.words[lists.contract_at + 2 * tile], lists.words[lists.contract_at + 2 * tile + 1]);
            let listed = &lists.words[at as usize..][..count as usize];
            for (index, panel) in band.panels().iter().enumerate() {
                let touches = (start..(start + BLOCK).min(300)).any(|i| panel.row_range().any(|j| band.contains(j, i)));
                assert!(!touches || listed.contains(&(index as u32)), "tile {tile}, panel {index}");
            }
        }
    }

    #[test]
    fn the_outer_tiles_cover_every_window() {
        let band = Band::new(512, 2048, 1024).unwrap();
        let lists = Lists::new(&band);
        assert_eq!((lists.outer_cols, lists.outer_tiles), (96, 48 - 2 - 2));
        for (index, panel) in band.panels().iter().enumerate() {
            let tiles = lists.words[lists.outer_at..].chunks(2).filter(|tile| tile[0] as usize == index / 2);
            let (first, last) = tiles.fold((usize::MAX, 0), |(first, last), tile| {
                (first.min(tile[1] as usize), last.max(tile[1] as usize + lists.outer_cols))
            });
            assert!(first <= panel.col_start && last >= panel.col_start + panel.cols);
        }
    }

    #[test]
    fn shares_cover_the_rows_and_no_more() {
        for (tiles, rows) in [(44, 8192), (1, 8192), (1000, 8192), (4, 100), (1, 1)] {
            let (count, share_rows) = shares(tiles, rows, 132);
            assert!(share_rows % OUTER_DEPTH == 0 && count * share_rows >= rows && (count - 1) * share_rows < rows);
        }
        assert_eq!(shares(44, 8192, 132).0, 6);
    }
}
