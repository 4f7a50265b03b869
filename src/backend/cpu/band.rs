//! The band's three products on the CPU: one small product per panel, nothing for what lies outside the windows.

use super::gelu::{gelu_of, scale_by_gelu_derivative};
use super::linear::fill_rows;
use super::matrix::{Into, Mat, MatMut, Threads, multiply};
use super::{Cpu, sum_columns};
use crate::backend::{BandLinear, BiasGrad, Expansion, Write};
use crate::band::{Band, Panel};
use crate::error::Result;
use crate::shapes::Span;
use rayon::prelude::*;

/// Rows of the batch that one thread takes through all panels: few enough to share the work, enough for each panel's
/// product to be worth its packing.
const BATCH_ROWS: usize = 256;

impl BandLinear for Cpu {
    type Table = Band;

    fn band_table(&mut self, band: &Band) -> Result<Band> {
        Ok(band.clone())
    }

    fn band_expand(
        &mut self,
        y: &mut Vec<f32>,
        x: &Vec<f32>,
        params: &Vec<f32>,
        panels: Span,
        table: &Band,
        rows: usize,
        expansion: Expansion<'_, Vec<f32>>,
    ) -> Result<()> {
        let packed = &params[panels.range()];
        let (n, w) = (table.narrow(), table.wide());
        let (ys, xs) = (y[..rows * w].par_chunks_mut(BATCH_ROWS * w), x[..rows * n].par_chunks(BATCH_ROWS * n));
        match expansion {
            Expansion::BiasGelu { bias, pre } => {
                let bias = &params[bias.range()];
                let pres = pre[..rows * w].par_chunks_mut(BATCH_ROWS * w);
                (ys, xs, pres).into_par_iter().for_each(|(y, x, pre)| {
                    pre.chunks_mut(w).for_each(|row| row.copy_from_slice(bias));
                    expand(pre, x, packed, table, Into::Add);
                    gelu_of(y, pre);
                });
            }
            Expansion::GeluBackward { pre } => {
                (ys, xs, pre[..rows * w].par_chunks(BATCH_ROWS * w)).into_par_iter().for_each(|(y, x, pre)| {
                    expand(y, x, packed, table, Into::Set);
                    scale_by_gelu_derivative(y, pre);
                });
            }
        }
        Ok(())
    }

    fn band_contract(
        &mut self,
        y: &mut Vec<f32>,
        x: &Vec<f32>,
        params: &Vec<f32>,
        panels: Span,
        table: &Band,
        rows: usize,
        bias: Option<Span>,
    ) -> Result<()> {
        let (n, w) = (table.narrow(), table.wide());
        let packed = &params[panels.range()];
        let y = &mut y[..rows * n];
        match bias {
            Some(bias) => fill_rows(y, &params[bias.range()], rows),
            None => y.fill(0.0),
        }
        (y.par_chunks_mut(BATCH_ROWS * n), x[..rows * w].par_chunks(BATCH_ROWS * w)).into_par_iter().for_each(
            |(y, x)| {
                let rows = y.len() / n;
                for panel in table.panels().iter().filter(|panel| !panel.is_empty()) {
                    let window = table.window(panel);
                    let y = MatMut::new(&mut y[window.start..], rows, window.len(), n);
                    let x = Mat::new(&x[panel.row_start..], rows, panel.rows, w);
                    multiply(y, x, weights(packed, panel, table), Into::Add, Threads::One);
                }
            },
        );
        Ok(())
    }

    fn band_outer(
        &mut self,
        grads: &mut Vec<f32>,
        panels: Span,
        bias: BiasGrad,
        wide: &Vec<f32>,
        narrow: &Vec<f32>,
        table: &Band,
        rows: usize,
        write: Write,
    ) -> Result<()> {
        match bias {
            BiasGrad::Wide(span) => sum_columns(&mut grads[span.range()], wide, rows, write),
            BiasGrad::Narrow(span) => sum_columns(&mut grads[span.range()], narrow, rows, write),
        }
        let (n, w) = (table.narrow(), table.wide());
        let mut rest = &mut grads[panels.range()];
        let mut gradients = Vec::with_capacity(table.panels().len());
        for panel in table.panels() {
            let (gradient, others) = std::mem::take(&mut rest).split_at_mut(panel.len());
            gradients.push((panel, gradient));
            rest = others;
        }
        gradients.retain(|(panel, _)| !panel.is_empty());
        let batches = wide[..rows * w].chunks(BATCH_ROWS * w).zip(narrow[..rows * n].chunks(BATCH_ROWS * n));
        for (batch, (wide, narrow)) in batches.enumerate() {
            let into = if batch == 0 { write.into() } else { Into::Add };
            gradients.par_iter_mut().for_each(|(panel, gradient)| outer(gradient, wide, narrow, panel, table, into));
        }
        gradients.par_iter_mut().for_each(|(panel, gradient)| clear_outside(gradient, panel, table));
        Ok(())
    }
}

/// Adds to a panel's gradient the product of some rows' wide and narrow elements.
fn outer(gradient: &mut [f32], wide: &[f32], narrow: &[f32], panel: &Panel, band: &Band, into: Into) {
    let (n, w, window) = (band.narrow(), band.wide(), band.window(panel));
    let rows = narrow.len() / n;
    let wide = Mat::new(&wide[panel.row_start..], rows, panel.rows, w);
    let narrow = Mat::new(&narrow[window.start..], rows, window.len(), n);
    let out = &mut gradient[window.start - panel.col_start..];
    multiply(MatMut::new(out, panel.rows, window.len(), panel.cols), wide.t(), narrow, into, Threads::One);
}

/// `y[:, panel rows] (+)= x[:, window] P^T` for every panel; where a panel is empty y becomes (stays) 0.
fn expand(y: &mut [f32], x: &[f32], packed: &[f32], band: &Band, into: Into) {
    let (n, w) = (band.narrow(), band.wide());
    let rows = y.len() / w;
    // A band's panels each have their own rows of y; of blocks several add to the same, or none at all.
    let into = match (into, band.blocks()) {
        (Into::Set, Some(_)) => {
            y.fill(0.0);
            Into::Add
        }
        (into, _) => into,
    };
    for panel in band.panels().iter().filter(|panel| panel.rows > 0) {
        let y = MatMut::new(&mut y[panel.row_start..], rows, panel.rows, w);
        let window = band.window(panel);
        let x = Mat::new(&x[window.start..], rows, window.len(), n);
        multiply(y, x, weights(packed, panel, band).t(), into, Threads::One);
    }
}

/// A panel's weights [rows, columns of its window].
fn weights<'a>(packed: &'a [f32], panel: &Panel, band: &Band) -> Mat<'a> {
    let window = band.window(panel);
    let start = if window.is_empty() { panel.offset } else { panel.offset + window.start - panel.col_start };
    Mat::new(&packed[start..], panel.rows, window.len(), panel.cols)
}

/// Zeroes the slots of a panel's gradient that lie outside the exact band.
fn clear_outside(gradient: &mut [f32], panel: &Panel, band: &Band) {
    for (slots, j) in gradient.chunks_mut(panel.cols).zip(panel.row_range()) {
        let kept = band.kept(panel, j);
        slots[..kept.start - panel.col_start].fill(0.0);
        slots[kept.end - panel.col_start..].fill(0.0);
    }
}
