//! The band's three products on the GPU: `shaders/band.wgsl` over the panels of the band's table.

use super::buffer::{Buffer, row_chunks};
use super::gelu::Gelu;
use super::pipelines::Kernel;
use super::tuning::{Tile, Tuning};
use super::{Wgpu, add_word};
use crate::backend::{BandLinear, BiasGrad, Expansion, Write};
use crate::band::{ALIGN, Band, PANEL_ROWS, Panel};
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
}

/// Where a list of tiles, of four words each, starts in the table, and how many there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct List {
    at: usize,
    count: usize,
}

impl List {
    /// Appends tiles to the table.
    fn new(words: &mut Vec<u32>, tiles: Vec<[usize; 4]>) -> Self {
        let at = words.len();
        words.extend(tiles.iter().flatten().map(|&word| word as u32));
        Self { at, count: tiles.len() }
    }
}

/// Tiles of expand, one or two panels each: first wide row, 0, and the narrow columns that the panels' windows span.
fn expand_tiles(band: &Band, tile: Tile) -> Vec<[usize; 4]> {
    let group = |(index, panels): (usize, &[Panel])| {
        let Range { start, end } = windows(panels);
        [index * tile.bn, 0, start, end]
    };
    band.panels().chunks(tile.bn / PANEL_ROWS).enumerate().map(group).collect()
}

/// Tiles of contract: 0, first narrow column, and the wide rows that the band joins to the tile's columns, rounded to steps.
fn contract_tiles(band: &Band, tile: Tile) -> Vec<[usize; 4]> {
    let columns = |start: usize| {
        let rows = band.rows_of(start..(start + tile.bn).min(band.narrow()));
        [0, start, rows.start / tile.bk * tile.bk, rows.end.next_multiple_of(tile.bk)]
    };
    (0..band.narrow()).step_by(tile.bn).map(columns).collect()
}

/// Tiles of outer: first wide row, first narrow column, 0, 0.
fn outer_tiles(band: &Band, tile: Tile) -> Vec<[usize; 4]> {
    let group = |(index, panels): (usize, &[Panel])| {
        windows(panels).step_by(tile.bn).map(move |column| [index * tile.bm, column, 0, 0])
    };
    band.panels().chunks(tile.bm / PANEL_ROWS).enumerate().flat_map(group).collect()
}

/// The columns that the windows of these panels, which follow each other, span.
fn windows(panels: &[Panel]) -> Range<usize> {
    let mut filled = panels.iter().filter(|panel| !panel.is_empty());
    let Some(first) = filled.next() else { return 0..0 };
    let last = filled.next_back().unwrap_or(first);
    first.col_start..last.col_start + last.cols
}

/// Whether activations are handled by vec4s, and whether the depth is a multiple of every step.
type Fit = [bool; 2];

fn product_kernel(
    tuning: &Tuning,
    entry: &'static str,
    tile: Tile,
    [vec, whole]: Fit,
    bias: bool,
    gelu: (&'static str, u32),
) -> Kernel {
    let flags = [("vec", u32::from(vec)), ("whole", u32::from(whole)), ("bias", u32::from(bias)), gelu];
    Kernel::new("band", entry, &tuning.variables(tile)).with(&flags)
}

fn outer_kernel(tuning: &Tuning, [vec, whole]: Fit) -> Kernel {
    let flags = [("vec", u32::from(vec)), ("whole", u32::from(whole))];
    Kernel::new("band", "band_outer", &tuning.variables(tuning.outer)).with(&flags)
}

/// Every instantiation.
pub(super) fn kernels(tuning: &Tuning) -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for fit in [[true, true], [true, false], [false, false]] {
        for tile in tuning.expand {
            kernels.push(product_kernel(tuning, "band_expand", tile, fit, true, ("gelu", 1)));
            kernels.push(product_kernel(tuning, "band_expand", tile, fit, false, ("gelu_backward", 1)));
        }
        for tile in tuning.contract {
            kernels.push(product_kernel(tuning, "band_contract", tile, fit, true, ("gelu", 0)));
            kernels.push(product_kernel(tuning, "band_contract", tile, fit, false, ("gelu", 0)));
        }
        kernels.push(outer_kernel(tuning, fit));
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
    /// For many rows, and for few.
    tiles: [Tile; 2],
    lists: [List; 2],
    rows: usize,
}

impl Table {
    /// The kernels' parameters but for the grid: `tiles` of rows, or of outer, and what only outer has.
    fn words(&self, rows: usize, list: List, tiles: usize, outer: [usize; 3]) -> Vec<u32> {
        let sizes = [rows, self.narrow, self.wide, self.panels, list.at, tiles];
        sizes.iter().chain(&outer).map(|&word| word as u32).collect()
    }

    fn by_fours(&self) -> bool {
        self.narrow.is_multiple_of(4) && self.wide.is_multiple_of(4)
    }
}

impl Wgpu {
    fn band_product(&mut self, table: &Table, product: Product<'_>) -> Result<()> {
        let Product { y, x, y_cols, x_cols, params, rows, gelu, .. } = product;
        let size = usize::from(rows <= product.tiles[1].bm);
        let (tile, list) = (product.tiles[size], product.lists[size]);
        // Windows are rounded to multiples of 16, ranges of wide rows to multiples of a step.
        let fit = [table.by_fours(), table.by_fours() && x_cols.is_multiple_of(ALIGN)];
        let kernel = product_kernel(&self.tuning, product.entry, tile, fit, product.bias.is_some(), gelu.flag());
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
            let row_tiles = count.div_ceil(tile.bm);
            let words = table.words(count, list, row_tiles, [0; 3]);
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
        let expand = tuning.expand.map(|tile| List::new(&mut words, expand_tiles(band, tile)));
        let contract = tuning.contract.map(|tile| List::new(&mut words, contract_tiles(band, tile)));
        let outer = List::new(&mut words, outer_tiles(band, tuning.outer));
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
            entry: "band_expand",
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
            entry: "band_contract",
            y,
            x,
            y_cols: table.narrow,
            x_cols: table.wide,
            params,
            panels,
            bias,
            gelu: Gelu::None,
            tiles: self.tuning.contract,
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
        match bias {
            BiasGrad::Wide(span) => self.column_sums(grads.write(span), wide, rows, write)?,
            BiasGrad::Narrow(span) => self.column_sums(grads.write(span), narrow, rows, write)?,
        }
        let (tile, list) = (self.tuning.outer, table.outer);
        for (first, count) in row_chunks(rows, table.wide, self.binding_len()) {
            let write = if first == 0 { write } else { Write::Add };
            let part = |cols: usize| Span { offset: first * cols, len: count * cols };
            let (share_count, depth) = self.tuning.shares(tile, list.count, count);
            let kernel = outer_kernel(&self.tuning, [table.by_fours(), table.by_fours() && count % tile.bk == 0]);
            let stride = if share_count > 1 { table.packed_len } else { 0 };
            let parts = match share_count {
                1 => None,
                _ => Some(self.scratch("shares of a product", share_count * table.packed_len)?),
            };
            let (target, target_write) = match &parts {
                None => (grads.write(panels), write),
                Some(parts) => (parts.write(Span { offset: 0, len: share_count * table.packed_len }), Write::Set),
            };
            let binds = [
                table.words.read(table.words.all()),
                wide.read(part(table.wide)),
                narrow.read(part(table.narrow)),
                target,
            ];
            let words = table.words(count, list, list.count, [depth, stride, add_word(target_write) as usize]);
            self.dispatch(&kernel, &binds, &words, share_count * list.count, tile.flops(depth.min(count)))?;
            if let Some(parts) = &parts {
                self.add_parts(grads.write(panels), parts, 0, table.packed_len, share_count, write)?;
            }
        }
        Ok(())
    }
}
