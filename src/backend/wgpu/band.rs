//! The band's three products on the GPU: `shaders/band.wgsl` over the panels of the band's table.

use super::buffer::{Buffer, row_chunks};
use super::gelu::Gelu;
use super::pipelines::Kernel;
use super::tuning::{TUNINGS, Tile};
use super::{Wgpu, add_word};
use crate::backend::{BandLinear, BiasGrad, Expansion, Write};
use crate::band::Band;
use crate::error::Result;
use crate::shapes::Span;

/// A band's geometry on the device: [`Band::table`], and after it the tiles of the outer product as pairs of a panel and
/// the tile's first column in the panel's window.
pub struct Table {
    words: Buffer,
    narrow: usize,
    wide: usize,
    panels: usize,
    column_tiles: usize,
    packed_len: usize,
    outer_at: usize,
    outer_tiles: usize,
}

impl Table {
    /// 1 when rows of both sides are handled by vec4s, else 0.
    fn by_fours(&self) -> u32 {
        u32::from(self.narrow.is_multiple_of(4) && self.wide.is_multiple_of(4))
    }
}

fn product_kernel(entry: &'static str, tile: Tile, vec: u32, bias: bool, gelu: (&'static str, u32)) -> Kernel {
    Kernel::new("band", entry, &tile.variables()).with(&[("vec", vec), ("bias", u32::from(bias)), gelu])
}

fn outer_kernel(tile: Tile, vec: u32) -> Kernel {
    Kernel::new("band", "band_outer", &tile.variables()).with(&[("vec", vec)])
}

/// Every instantiation.
pub(super) fn kernels() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for (tuning, vec) in TUNINGS.iter().flat_map(|tuning| [(tuning, 0), (tuning, 1)]) {
        for tile in tuning.band {
            kernels.push(product_kernel("band_expand", tile, vec, true, ("gelu", 1)));
            kernels.push(product_kernel("band_expand", tile, vec, false, ("gelu_backward", 1)));
            kernels.push(product_kernel("band_contract", tile, vec, true, ("gelu", 0)));
            kernels.push(product_kernel("band_contract", tile, vec, false, ("gelu", 0)));
        }
        kernels.push(outer_kernel(tuning.outer, vec));
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
    column_groups: usize,
    rows: usize,
}

impl Wgpu {
    fn band_product(&mut self, table: &Table, product: Product<'_>) -> Result<()> {
        let Product { y, x, y_cols, x_cols, params, rows, .. } = product;
        let [many, few] = self.tuning.band;
        let tile = if rows <= few.bm { few } else { many };
        let (vec, gelu) = (table.by_fours(), product.gelu);
        let kernel = product_kernel(product.entry, tile, vec, product.bias.is_some(), gelu.flag());
        // The work of a group on average.
        let flops = 2.0 * (table.packed_len * tile.bm) as f64 / product.column_groups as f64;
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
            let words = [count, row_tiles, 0, 0, 0, 0].map(|word| word as u32);
            self.dispatch(&kernel, &binds, &words, row_tiles * product.column_groups, flops)?;
        }
        Ok(())
    }
}

impl BandLinear for Wgpu {
    type Table = Table;

    fn band_table(&mut self, band: &Band) -> Result<Table> {
        let mut words = band.table();
        let outer_at = words.len();
        for (index, panel) in band.panels().iter().enumerate() {
            for col in (0..panel.cols).step_by(self.tuning.outer.bn) {
                words.extend([index as u32, col as u32]);
            }
        }
        let buffer = self.create("band table", words.len())?;
        self.write_words(&buffer, 0, &words)?;
        Ok(Table {
            narrow: band.narrow(),
            wide: band.wide(),
            panels: band.panels().len(),
            column_tiles: band.column_tiles().len(),
            packed_len: band.packed_len(),
            outer_at,
            outer_tiles: (words.len() - outer_at) / 2,
            words: buffer,
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
            column_groups: table.panels,
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
            column_groups: table.column_tiles,
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
        match bias {
            BiasGrad::Wide(span) => self.column_sums(grads.write(span), wide, rows, write)?,
            BiasGrad::Narrow(span) => self.column_sums(grads.write(span), narrow, rows, write)?,
        }
        let tile = self.tuning.outer;
        let kernel = outer_kernel(tile, table.by_fours());
        for (first, count) in row_chunks(rows, table.wide, self.binding_len()) {
            let write = if first == 0 { write } else { Write::Add };
            let part = |cols: usize| Span { offset: first * cols, len: count * cols };
            let (share_count, depth) = self.tuning.shares(table.outer_tiles, count);
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
            let words = [count, table.outer_tiles, table.outer_at, depth, stride, 0].map(|word| word as u32);
            let words = [&words[..5], &[add_word(target_write)]].concat();
            self.dispatch(&kernel, &binds, &words, share_count * table.outer_tiles, tile.flops(depth.min(count)))?;
            if let Some(parts) = &parts {
                self.add_parts(grads.write(panels), parts, 0, table.packed_len, share_count, write)?;
            }
        }
        Ok(())
    }
}
