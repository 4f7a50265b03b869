//! LayerNorm on the GPU: `shaders/layernorm.wgsl`, a workgroup for each row.

use super::buffer::{Buffer, row_chunks};
use super::pipelines::Kernel;
use super::reduce::{lanes, most_parts, part_rows};
use super::tuning::Tuning;
use super::{Wgpu, add_word};
use crate::backend::{Affine, LayerNorm, Normed, NormedInput, Write};
use crate::error::Result;
use crate::shapes::Span;

/// Lanes of a row that a thread keeps in registers before the workgroup is made larger.
const FEW_SLOTS: usize = 4;

/// The kernel `entry` for rows of `channels`, and how many lanes a row has.
fn kernel(tuning: &Tuning, entry: &'static str, channels: usize) -> (Kernel, usize) {
    let (vec, lanes) = lanes(channels);
    let threads: usize =
        [tuning.row_threads, 32, 64].into_iter().find(|threads| lanes <= threads * FEW_SLOTS).unwrap_or(256);
    let slots = lanes.div_ceil(threads);
    let variables = [("lanes", 1), ("sums", 1), ("vec", vec), ("threads", threads as u32), ("slots", slots as u32)];
    (Kernel::new("layernorm", entry, &variables), lanes)
}

/// Instantiations for the presets' channels and some that are no multiple of 4.
pub(super) fn kernels(tuning: &Tuning) -> Vec<Kernel> {
    let of = |channels| {
        let (forward, _) = kernel(tuning, "layernorm_forward", channels);
        let residual = forward.clone().with(&[("residual", 1)]);
        [forward, residual, kernel(tuning, "layernorm_backward", channels).0, affine_kernel(channels)]
    };
    [30, 128, 257, 512, 768, 1024, 1280, 1600].into_iter().flat_map(of).collect()
}

fn affine_kernel(channels: usize) -> Kernel {
    let (vec, _) = lanes(channels);
    Kernel::new("layernorm", "layernorm_affine", &[("lanes", 1), ("vec", vec), ("threads", AFFINE_THREADS as u32)])
}

/// Threads of a workgroup that sums columns.
const AFFINE_THREADS: usize = 64;

impl Wgpu {
    /// LayerNorm of `x`, or of `residual = x + branch`.
    fn normalize(
        &mut self,
        normed: Normed<'_, Buffer>,
        x: &Buffer,
        addition: Option<(&Buffer, &Buffer)>,
        params: &Buffer,
        affine: Affine,
        rows: usize,
    ) -> Result<()> {
        let c = affine.weight.len;
        let (mut kernel, lanes) = kernel(&self.tuning, "layernorm_forward", c);
        if addition.is_some() {
            kernel = kernel.with(&[("residual", 1)]);
        }
        for (first, count) in row_chunks(rows, c, self.binding_len()) {
            let (matrix, column) = (Span { offset: first * c, len: count * c }, Span { offset: first, len: count });
            let mut binds = vec![
                x.read(matrix),
                params.read(affine.weight),
                params.read(affine.bias),
                normed.out.write(matrix),
                normed.mean.write(column),
                normed.rstd.write(column),
            ];
            if let Some((branch, residual)) = addition {
                binds.extend([branch.read(matrix), residual.write(matrix)]);
            }
            let words = [count, c, lanes, 0, 0, 0].map(|word| word as u32);
            self.dispatch(&kernel, &binds, &words, count, 16.0 * c as f64)?;
        }
        Ok(())
    }
}

impl LayerNorm for Wgpu {
    fn layernorm_forward(
        &mut self,
        normed: Normed<'_, Buffer>,
        x: &Buffer,
        params: &Buffer,
        affine: Affine,
        rows: usize,
    ) -> Result<()> {
        self.op = "layernorm_forward";
        self.normalize(normed, x, None, params, affine, rows)
    }

    fn residual_layernorm_forward(
        &mut self,
        residual: &mut Buffer,
        normed: Normed<'_, Buffer>,
        x: &Buffer,
        branch: &Buffer,
        params: &Buffer,
        affine: Affine,
        rows: usize,
    ) -> Result<()> {
        self.op = "residual_layernorm_forward";
        self.normalize(normed, x, Some((branch, residual)), params, affine, rows)
    }

    fn layernorm_backward(
        &mut self,
        dresidual: &mut Buffer,
        grads: &mut Buffer,
        dout: &Buffer,
        input: NormedInput<'_, Buffer>,
        params: &Buffer,
        affine: Affine,
        rows: usize,
        residual_write: Write,
        write: Write,
    ) -> Result<()> {
        self.op = "layernorm_backward";
        let c = affine.weight.len;
        let (backward, lanes) = kernel(&self.tuning, "layernorm_backward", c);
        let affine_kernel = affine_kernel(c);
        for (first, count) in row_chunks(rows, c, self.binding_len()) {
            let (matrix, column) = (Span { offset: first * c, len: count * c }, Span { offset: first, len: count });
            let inputs = [input.x.read(matrix), dout.read(matrix), input.mean.read(column), input.rstd.read(column)];
            let (part_rows, across) = (part_rows(count), lanes.div_ceil(AFFINE_THREADS));
            let words = |write| [count, c, lanes, part_rows, across, add_word(write) as usize].map(|word| word as u32);

            let binds = [&inputs[..], &[params.read(affine.weight), dresidual.write(matrix)]].concat();
            self.dispatch(&backward, &binds, &words(residual_write), count, 24.0 * c as f64)?;

            let count_parts = count.div_ceil(part_rows);
            let parts = self.scratch("parts of sums", most_parts(2 * c))?;
            let binds = [&inputs[..], &[parts.write(Span { offset: 0, len: 2 * c * count_parts })]].concat();
            let flops = (8 * 4 * AFFINE_THREADS * part_rows) as f64;
            self.dispatch(&affine_kernel, &binds, &words(write), count_parts * across, flops)?;
            let write = if first == 0 { write } else { Write::Add };
            self.add_parts(grads.write(affine.weight), &parts, 0, 2 * c, count_parts, write)?;
            self.add_parts(grads.write(affine.bias), &parts, c, 2 * c, count_parts, write)?;
        }
        Ok(())
    }
}
