//! The band's three products on the GPU: `shaders/band.wgsl` over the panels of the band's table.

use super::buffer::{Buffer, row_chunks};
use super::gelu::Gelu;
use super::pipelines::Kernel;
use super::reduce::most_parts;
use super::tuning::{Tile, Tuning};
use super::{Wgpu, add_word};
use crate::backend::{BandLinear, BiasGrad, Expansion, Write};
use crate::band::{ALIGN, Band, PANEL_ROWS, Panel};
use crate::blocks::{BLOCK_COLS, BLOCK_ROWS, Blocks};
use crate::error::Result;
use crate::shapes::Span;
use std::ops::Range;

/// A band's geometry on the device: [`Band::table`], and after it lists of the tiles that each kernel computes.
pub struct Table {
    words: Buffer,
    narrow: usize,
    wide: usize,
    panels: usize,
    packed_len: usize,
    expand: [List; 2],
    contract: [List; 2],
    outer: List,
    /// Whether blocks stand in the band's place.
    blocks: bool,
    /// Whether outer's tiles have all columns of the wide side, and of the narrow one: what none has they do not sum up.
    covers: [bool; 2],
}

/// Where a list of tiles starts in the table, and how many there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct List {
    at: usize,
    count: usize,
}

/// A tile of a product: its place, and the depths that the band joins to it, and to each slice of its columns; see the header of
/// `shaders/band.wgsl`.
struct Area {
    row: usize,
    col: usize,
    depth: Range<usize>,
    /// Of outer over blocks, the first panel of its rows.
    panel: Option<usize>,
    slices: Vec<Range<usize>>,
}

impl List {
    /// Appends tiles of `slices` slices to the table. Along the band the first and the last ones are the shallowest: what is
    /// left for the end is short.
    fn new(words: &mut Vec<u32>, slices: usize, areas: Vec<Area>) -> Self {
        let list = Self { at: words.len(), count: areas.len() };
        for mut area in areas {
            area.slices.resize(slices, 0..0);
            let slices = area.slices.into_iter().flat_map(|depth| [depth.start, depth.end]);
            let whole = [area.row, area.col, area.depth.start, area.depth.end].into_iter().chain(area.panel);
            words.extend(whole.chain(slices).map(|word| word as u32));
        }
        list
    }
}

/// Tiles of expand, one or two panels each: the depth is the narrow columns that the panels' windows span.
fn expand_areas(band: &Band, tile: Tile, slice: usize) -> Vec<Area> {
    let area = |(index, panels): (usize, &[Panel])| Area {
        row: index * tile.bn,
        col: 0,
        depth: windows(panels),
        panel: None,
        slices: panels.chunks(slice / PANEL_ROWS).map(windows).collect(),
    };
    band.panels().chunks(tile.bn / PANEL_ROWS).enumerate().map(area).collect()
}

/// Tiles of contract: the depth is the wide rows that the band joins to their columns, rounded to steps.
fn contract_areas(band: &Band, tile: Tile, slice: usize) -> Vec<Area> {
    let depth = |columns: Range<usize>| {
        let rows = band.rows_of(columns.start..columns.end.min(band.narrow()));
        rows.start / tile.bk * tile.bk..rows.end.next_multiple_of(tile.bk)
    };
    let area = |col: usize| {
        let end = (col + tile.bn).min(band.narrow());
        let slices = (col..end).step_by(slice).map(|at| depth(at..at + slice)).collect();
        Area { row: 0, col, depth: depth(col..end), panel: None, slices }
    };
    (0..band.narrow()).step_by(tile.bn).map(area).collect()
}

/// Tiles of outer: what stands for their depth are the narrow columns that a tile sums up for a bias gradient; a slice has one
/// where the window reaches it.
fn outer_areas(band: &Band, tile: Tile, slice: usize) -> Vec<Area> {
    let areas = |(panel, panels): (usize, &[Panel])| {
        let window = windows(panels);
        let row = panels[0].row_start;
        let area = move |col: usize| Area {
            row,
            col,
            depth: col..window.end.min(col + tile.bn),
            panel: band.blocks().map(|_| panel),
            slices: (col..window.end.min(col + tile.bn)).step_by(slice).map(|_| 0..1).collect(),
        };
        window.clone().step_by(tile.bn).map(area)
    };
    let of_a_tile = tile.bm / PANEL_ROWS;
    let groups = band.panels().chunks(of_a_tile).enumerate().map(|(index, panels)| (index * of_a_tile, panels));
    let mut areas: Vec<Area> = groups.flat_map(areas).collect();
    // Tiles of the same rows follow each other. (Of blocks those of their upper halves take turns with those of their lower ones.)
    areas.sort_by_key(|area| area.row);
    share_columns(&mut areas);
    areas
}

/// Tiles of expand where blocks stand in a band's place: the blocks of their rows, which follow each other.
fn block_expand_areas(band: &Band, blocks: &Blocks, tile: Tile) -> Vec<Area> {
    let area = |row: usize| {
        let before = (0..row / BLOCK_ROWS).map(|row| blocks.row(row).count()).sum();
        let depth = before..before + blocks.row(row / BLOCK_ROWS).count();
        Area { row, col: 0, depth, panel: None, slices: Vec::new() }
    };
    (0..band.wide()).step_by(tile.bn).map(area).collect()
}

/// Tiles of contract where blocks stand in a band's place: where the blocks of their columns are listed, which `words` receive.
fn block_contract_areas(band: &Band, blocks: &Blocks, tile: Tile, words: &mut Vec<u32>) -> Vec<Area> {
    let kept = |row| blocks.row(row).map(move |col| (row, col));
    let all: Vec<(usize, usize)> = (0..blocks.down()).flat_map(kept).collect();
    let mut area = |start: usize| {
        let touched = start / BLOCK_COLS..(start + tile.bn).div_ceil(BLOCK_COLS);
        let from = words.len();
        words.extend((0..).zip(&all).filter(|(_, (_, col))| touched.contains(col)).map(|(block, _)| block));
        Area { row: 0, col: start, depth: from..words.len(), panel: None, slices: Vec::new() }
    };
    (0..band.narrow()).step_by(tile.bn).map(&mut area).collect()
}

/// Leaves each narrow column to one of the tiles that have it.
fn share_columns(areas: &mut [Area]) {
    let mut by_column: Vec<&mut Area> = areas.iter_mut().collect();
    by_column.sort_by_key(|area| area.col);
    let mut next = 0;
    for area in by_column {
        area.depth.start = area.depth.start.max(next).min(area.depth.end);
        next = next.max(area.depth.end);
    }
}

/// Whether tiles of outer have every column of the wide side, and of the narrow one.
fn covered(band: &Band, tile: Tile, areas: &[Area]) -> [bool; 2] {
    let wide = areas.chunk_by(|a, b| a.row == b.row).count() * tile.bm >= band.wide();
    let narrow: usize = areas.iter().map(|area| area.depth.len()).sum();
    [wide, narrow >= band.narrow()]
}

/// The columns that the windows of these panels, which follow each other, span.
fn windows(panels: &[Panel]) -> Range<usize> {
    let mut filled = panels.iter().filter(|panel| !panel.is_empty());
    let Some(first) = filled.next() else { return 0..0 };
    let last = filled.next_back().unwrap_or(first);
    first.col_start..last.col_start + last.cols
}

const EXPAND: &str = "band_expand";
const CONTRACT: &str = "band_contract";
const OUTER: &str = "band_outer";

/// Whether activations are handled by vec4s, and whether operands are walked through.
type Fit = [bool; 2];

/// Columns of a tile's slices. Expand's are panels, for all rows of a panel have one window.
fn slice_of(tuning: &Tuning, entry: &str, tile: Tile) -> usize {
    tuning.slice_of(tile, if entry == EXPAND { PANEL_ROWS } else { 1 })
}

/// Tiles of contract over blocks are no wider than these: of a wider one, each block would have a part.
fn block_contract(tuning: &Tuning) -> [Tile; 2] {
    let fits = |tile: &Tile| tile.bn > BLOCK_COLS && BLOCK_COLS.is_multiple_of(tile.tn);
    tuning.contract.map(|tile| if fits(&tile) { Tile { bn: BLOCK_COLS, ..tile } } else { tile })
}

fn kernel(tuning: &Tuning, entry: &'static str, tile: Tile, slice: usize, [vec, whole]: Fit) -> Kernel {
    let flags = [("slice", slice as u32), ("vec", u32::from(vec)), ("whole", u32::from(whole))];
    Kernel::new("band", entry, &tuning.variables(tile)).with(&flags)
}

fn product_kernel(
    tuning: &Tuning,
    entry: &'static str,
    tile: Tile,
    fit: Fit,
    blocks: bool,
    bias: bool,
    gelu: (&'static str, u32),
) -> Kernel {
    let epilogue = [("bias", u32::from(bias)), gelu];
    match blocks {
        false => kernel(tuning, entry, tile, slice_of(tuning, entry, tile), fit).with(&epilogue),
        // A block touches all of a tile, or a depth of it.
        true => kernel(tuning, entry, tile, tile.bn, fit).with(&epilogue).with(&[("blocks", 1)]),
    }
}

/// Which operand's columns outer sums up on their way: the template's flag.
type Summed = Option<&'static str>;

const SUM_WIDE: &str = "sum_wide";
const SUM_NARROW: &str = "sum_narrow";

fn outer_kernel(tuning: &Tuning, fit: Fit, blocks: bool, even: bool, summed: Summed) -> Kernel {
    let tile = tuning.outer;
    let kernel = kernel(tuning, OUTER, tile, slice_of(tuning, OUTER, tile), fit).with(&[("even", u32::from(even))]);
    let kernel = if blocks { kernel.with(&[("blocks", 1)]) } else { kernel };
    match summed {
        Some(flag) => kernel.with(&[(flag, 1)]),
        None => kernel,
    }
}

/// Whether outer can sum up columns: what goes from memory to its registers straight does not pass all threads.
fn sums_columns(tuning: &Tuning) -> bool {
    tuning.subgroup == 0
}

/// Every instantiation.
pub(super) fn kernels(tuning: &Tuning) -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for fit in [[true, true], [true, false], [false, false]] {
        for (blocks, contract) in [(false, tuning.contract), (true, block_contract(tuning))] {
            if blocks && fit == [true, false] {
                continue;
            }
            for tile in tuning.expand {
                kernels.push(product_kernel(tuning, EXPAND, tile, fit, blocks, true, ("gelu", 1)));
                kernels.push(product_kernel(tuning, EXPAND, tile, fit, blocks, false, ("gelu_backward", 1)));
            }
            for tile in contract {
                kernels.push(product_kernel(tuning, CONTRACT, tile, fit, blocks, true, ("gelu", 0)));
                kernels.push(product_kernel(tuning, CONTRACT, tile, fit, blocks, false, ("gelu", 0)));
            }
        }
        let summed = if sums_columns(tuning) { &[None, Some(SUM_WIDE), Some(SUM_NARROW)][..] } else { &[None] };
        for &summed in summed {
            for (blocks, even) in [(false, false), (false, true), (true, false), (true, true)] {
                kernels.push(outer_kernel(tuning, fit, blocks, even, summed));
            }
        }
    }
    kernels
}

/// One of the two products with the weights.
struct Product<'a> {
    entry: &'static str,
    y: &'a Buffer,
    x: &'a Buffer,
    y_cols: usize,
    x_cols: usize,
    params: &'a Buffer,
    panels: Span,
    bias: Option<Span>,
    gelu: Gelu<'a>,
    /// For much work, and for little.
    tiles: [Tile; 2],
    lists: [List; 2],
    rows: usize,
}

impl Table {
    /// The kernels' parameters but for the grid and how outer's tiles are dealt out.
    fn words(&self, rows: usize, list: List, dealt: [usize; 5], write: Write) -> Vec<u32> {
        let sizes = [rows, self.narrow, self.wide, self.panels, list.at];
        sizes.into_iter().chain(dealt).chain([add_word(write) as usize]).map(|word| word as u32).collect()
    }

    /// What expand or contract can do with so many rows of `x_cols` columns: windows are rounded to multiples of 16, ranges of wide
    /// rows to multiples of a step. Of blocks there are no kernels for what fits in part: such sizes are rare.
    fn product_fit(&self, rows: usize, x_cols: usize) -> Fit {
        let [vec, whole] = self.fit(rows, x_cols.is_multiple_of(ALIGN));
        [vec && (whole || !self.blocks), whole]
    }

    /// What a kernel can do with so many rows if a depth, too, `fits` its steps.
    fn fit(&self, rows: usize, fits: bool) -> Fit {
        let by_fours = self.narrow.is_multiple_of(4) && self.wide.is_multiple_of(4);
        [by_fours, by_fours && rows.is_multiple_of(4) && fits]
    }
}

impl Wgpu {
    fn band_product(&mut self, table: &Table, product: Product<'_>) -> Result<()> {
        let Product { y, x, y_cols, x_cols, params, rows, gelu, .. } = product;
        let groups = rows.div_ceil(product.tiles[0].bm) * product.lists[0].count;
        let size = usize::from(!self.tuning.is_busy_with(product.tiles[0], groups));
        let (tile, list) = (product.tiles[size], product.lists[size]);
        // The work of a group on average.
        let flops = 2.0 * (table.packed_len * tile.bm) as f64 / list.count as f64;
        for (first, count) in row_chunks(rows, y_cols.max(x_cols), self.binding_len()) {
            let part = |cols: usize| Span { offset: first * cols, len: count * cols };
            let mut binds = vec![
                table.words.read(table.words.all()),
                x.read(part(x_cols)),
                params.read(product.panels),
                y.write(part(y_cols)),
            ];
            binds.extend(product.bias.map(|bias| params.read(bias)));
            binds.extend(gelu.bind(part(y_cols)));
            let fit = table.product_fit(count, x_cols);
            let (tuning, bias) = (&self.tuning, product.bias.is_some());
            let kernel = product_kernel(tuning, product.entry, tile, fit, table.blocks, bias, gelu.flag());
            let row_tiles = count.div_ceil(tile.bm);
            let words = table.words(count, list, [row_tiles, 0, 0, 0, 0], Write::Set);
            self.dispatch(&kernel, &binds, &words, row_tiles * list.count, flops)?;
        }
        Ok(())
    }
}

impl BandLinear for Wgpu {
    type Table = Table;

    fn band_table(&mut self, band: &Band) -> Result<Table> {
        let mut words = band.table();
        let tuning = self.tuning;
        let mut list = |entry, tile: Tile, areas: fn(&Band, Tile, usize) -> Vec<Area>| {
            let slice = slice_of(&tuning, entry, tile);
            List::new(&mut words, tile.bn / slice, areas(band, tile, slice))
        };
        let covers = covered(band, tuning.outer, &outer_areas(band, tuning.outer, tuning.outer.bn));
        let outer = list(OUTER, tuning.outer, outer_areas);
        let (expand, contract) = match band.blocks() {
            None => (
                tuning.expand.map(|tile| list(EXPAND, tile, expand_areas)),
                tuning.contract.map(|tile| list(CONTRACT, tile, contract_areas)),
            ),
            Some(blocks) => {
                let expand = tuning.expand.map(|tile| block_expand_areas(band, blocks, tile));
                let contract = block_contract(&tuning).map(|tile| block_contract_areas(band, blocks, tile, &mut words));
                (
                    expand.map(|areas| List::new(&mut words, 1, areas)),
                    contract.map(|areas| List::new(&mut words, 1, areas)),
                )
            }
        };
        let buffer = self.create("band table", words.len())?;
        self.write_words(&buffer, 0, &words)?;
        Ok(Table {
            words: buffer,
            narrow: band.narrow(),
            wide: band.wide(),
            panels: band.panels().len(),
            packed_len: band.packed_len(),
            expand,
            contract,
            outer,
            blocks: band.blocks().is_some(),
            covers,
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
        self.op = "band_expand";
        let (bias, gelu) = match &expansion {
            Expansion::BiasGelu { bias, pre } => (Some(*bias), Gelu::Forward(pre)),
            Expansion::GeluBackward { pre } => (None, Gelu::Backward(pre)),
        };
        let product = Product {
            entry: EXPAND,
            y,
            x,
            y_cols: table.wide,
            x_cols: table.narrow,
            params,
            panels,
            bias,
            gelu,
            tiles: self.tuning.expand,
            lists: table.expand,
            rows,
        };
        self.band_product(table, product)
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
        self.op = "band_contract";
        let product = Product {
            entry: CONTRACT,
            y,
            x,
            y_cols: table.narrow,
            x_cols: table.wide,
            params,
            panels,
            bias,
            gelu: Gelu::None,
            tiles: if table.blocks { block_contract(&self.tuning) } else { self.tuning.contract },
            lists: table.contract,
            rows,
        };
        self.band_product(table, product)
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
        self.op = "band_outer";
        let (span, operand, summed, covered) = match bias {
            BiasGrad::Wide(span) => (span, wide, SUM_WIDE, table.covers[0]),
            BiasGrad::Narrow(span) => (span, narrow, SUM_NARROW, table.covers[1]),
        };
        let summed = (covered && sums_columns(&self.tuning)).then_some(summed);
        if summed.is_none() {
            self.column_sums(grads.write(span), operand, rows, write)?;
        }
        let (tile, list) = (self.tuning.outer, table.outer);
        for (first, count) in row_chunks(rows, table.wide, self.binding_len()) {
            let write = if first == 0 { write } else { Write::Add };
            let part = |cols: usize| Span { offset: first * cols, len: count * cols };
            let deal = self.tuning.deal(tile, list.count, count);
            let fit = table.fit(count, count.is_multiple_of(tile.bk));
            let kernel = outer_kernel(&self.tuning, fit, table.blocks, deal.even, summed);
            let parts = match deal.shares {
                1 => None,
                shares => Some(self.scratch("parts of a product", shares * table.packed_len)?),
            };
            let (target, target_write) = match &parts {
                None => (grads.write(panels), write),
                Some(parts) => (parts.write(Span { offset: 0, len: deal.shares * table.packed_len }), Write::Set),
            };
            let mut binds = vec![
                table.words.read(table.words.all()),
                wide.read(part(table.wide)),
                narrow.read(part(table.narrow)),
                target,
            ];
            // A part of the sums for each of the product's.
            let stride = span.len.next_multiple_of(4);
            let sums = match summed {
                Some(_) => Some(self.scratch("parts of sums", (deal.shares * stride).max(most_parts(span.len)))?),
                None => None,
            };
            binds.extend(sums.as_ref().map(|sums| sums.write(Span { offset: 0, len: deal.shares * stride })));
            let words = table.words(count, list, deal.words(table.packed_len), target_write);
            let groups = deal.groups();
            let flops = tile.flops(count) * list.count as f64 / groups.max(1) as f64;
            self.dispatch(&kernel, &binds, &words, groups, flops)?;
            if let Some(parts) = &parts {
                self.add_parts(grads.write(panels), parts, 0, table.packed_len, deal.shares, write)?;
            }
            if let Some(sums) = &sums {
                self.add_parts(grads.write(span), sums, 0, stride, deal.shares, write)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::wgpu::tuning::TUNINGS;

    fn bands() -> Vec<Band> {
        let sizes = [
            (512, 2048, "1024"),
            (50, 131, "33"),
            (16, 64, "1"),
            (272, 1088, "2176"),
            (96, 384, "7"),
            (512, 2048, "random:0.438"),
            (131, 517, "random:0.4"),
            (200, 808, "strided:0.3"),
        ];
        let band =
            |(narrow, wide, kept): (usize, usize, &str)| Band::of(kept.parse().unwrap(), narrow, wide, 1).unwrap();
        sizes.into_iter().map(band).collect()
    }

    #[test]
    fn every_narrow_column_that_a_window_has_is_summed_up_by_one_tile_of_outer() {
        for band in bands() {
            let (narrow, wide, width) = (band.narrow(), band.wide(), band.title());
            for tile in TUNINGS.map(|tuning| tuning.outer) {
                let areas = outer_areas(&band, tile, tile.bn);
                assert!(areas.iter().all(|area| area.col <= area.depth.start && area.depth.end <= area.col + tile.bn));
                let mut columns: Vec<usize> = areas.iter().flat_map(|area| area.depth.clone()).collect();
                columns.sort_unstable();
                assert!(columns.windows(2).all(|pair| pair[0] < pair[1]), "{narrow} {wide} {width}");
                let all = (0..narrow).all(|column| columns.binary_search(&column).is_ok());
                let rows = (0..wide).all(|row| areas.iter().any(|area| (area.row..area.row + tile.bm).contains(&row)));
                assert_eq!(covered(&band, tile, &areas), [rows, all], "{narrow} {wide} {width}");
            }
        }
    }

    #[test]
    fn every_panel_is_in_tiles_of_outer_and_rows_follow_each_other() {
        for band in bands() {
            for tile in TUNINGS.map(|tuning| tuning.outer) {
                let areas = outer_areas(&band, tile, tile.bn);
                assert!(areas.is_sorted_by_key(|area| area.row), "{}", band.title());
                for (index, panel) in band.panels().iter().enumerate().filter(|(_, panel)| !panel.is_empty()) {
                    let first = |area: &Area| area.panel.unwrap_or(area.row / PANEL_ROWS);
                    let has = |area: &&Area| (first(area)..first(area) + tile.bm / PANEL_ROWS).contains(&index);
                    let own: Vec<&Area> = areas.iter().filter(has).collect();
                    assert!(own.iter().all(|area| (area.row..area.row + tile.bm).contains(&panel.row_start)));
                    let all = |col: usize| own.iter().any(|area| (area.col..area.col + tile.bn).contains(&col));
                    assert!((panel.col_start..panel.col_start + panel.cols).all(all), "{} {index}", band.title());
                }
            }
        }
    }

    #[test]
    fn every_block_is_in_the_tiles_of_its_rows_and_of_its_columns() {
        for band in bands() {
            let Some(blocks) = band.blocks() else { continue };
            let upper: Vec<Panel> = band.panels().iter().copied().step_by(2).collect();
            for tuning in TUNINGS {
                for tile in tuning.expand {
                    for area in block_expand_areas(&band, blocks, tile) {
                        let rows = area.row / BLOCK_ROWS * BLOCK_ROWS;
                        let own = |block: &usize| upper[*block].row_start == rows;
                        assert!(area.depth.eq((0..upper.len()).filter(own)), "{} row {}", band.title(), area.row);
                    }
                }
                for tile in block_contract(&tuning) {
                    let mut words = Vec::new();
                    for area in block_contract_areas(&band, blocks, tile, &mut words) {
                        let touches = |panel: &Panel| {
                            panel.col_start < area.col + tile.bn && panel.col_start + BLOCK_COLS > area.col
                        };
                        let own = (0..).zip(&upper).filter(|(_, panel)| touches(panel)).map(|(block, _)| block);
                        assert!(own.eq(words[area.depth].iter().copied()), "{} column {}", band.title(), area.col);
                    }
                }
            }
        }
    }
}
