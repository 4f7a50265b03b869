//! The band's three products on the CPU: one small product per panel, nothing for what lies outside the windows.

use super::linear::{apply_gelu, apply_gelu_derivative, fill_rows};
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
        let len = rows * table.wide();
        match expansion {
            Expansion::BiasGelu { bias, pre } => {
                fill_rows(pre, &params[bias.range()], rows);
                expand(&mut pre[..len], x, packed, table, Into::Add);
                apply_gelu(&mut y[..len], &pre[..len]);
            }
            Expansion::GeluBackward { pre } => {
                expand(&mut y[..len], x, packed, table, Into::Set);
                apply_gelu_derivative(&mut y[..len], &pre[..len]);
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
                    let y = MatMut::new(&mut y[panel.col_start..], rows, panel.real_cols(n), n);
                    let x = Mat::new(&x[panel.row_start..], rows, panel.rows, w);
                    multiply(y, x, weights(packed, panel, n), Into::Add, Threads::One);
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
        gradients.into_par_iter().filter(|(panel, _)| !panel.is_empty()).for_each(|(panel, gradient)| {
            let wide = Mat::new(&wide[panel.row_start..], rows, panel.rows, w);
            let narrow = Mat::new(&narrow[panel.col_start..], rows, panel.real_cols(n), n);
            let out = MatMut::new(gradient, panel.rows, panel.real_cols(n), panel.cols);
            multiply(out, wide.t(), narrow, write.into(), Threads::One);
            clear_outside(gradient, panel, table);
        });
        Ok(())
    }
}

/// `y[:, panel rows] (+)= x[:, window] P^T` for every panel; columns of y whose panel is empty become (stay) 0.
fn expand(y: &mut [f32], x: &[f32], packed: &[f32], band: &Band, into: Into) {
    let (n, w) = (band.narrow(), band.wide());
    let rows = y.len() / w;
    (y.par_chunks_mut(BATCH_ROWS * w), x[..rows * n].par_chunks(BATCH_ROWS * n)).into_par_iter().for_each(|(y, x)| {
        let rows = y.len() / w;
        for panel in band.panels() {
            let y = MatMut::new(&mut y[panel.row_start..], rows, panel.rows, w);
            let x = Mat::new(&x[panel.col_start.min(x.len())..], rows, panel.real_cols(n), n);
            multiply(y, x, weights(packed, panel, n).t(), into, Threads::One);
        }
    });
}

/// A panel's weights [rows, columns that exist].
fn weights<'a>(packed: &'a [f32], panel: &Panel, narrow: usize) -> Mat<'a> {
    Mat::new(&packed[panel.offset..][..panel.len()], panel.rows, panel.real_cols(narrow), panel.cols)
}

/// Zeroes the slots of a panel's gradient that lie outside the exact band.
fn clear_outside(gradient: &mut [f32], panel: &Panel, band: &Band) {
    for (slots, j) in gradient.chunks_mut(panel.cols).zip(panel.row_range()) {
        let row = band.row(j);
        if row.is_empty() {
            slots.fill(0.0);
            continue;
        }
        slots[..row.start - panel.col_start].fill(0.0);
        slots[row.end - panel.col_start..].fill(0.0);
    }
}
