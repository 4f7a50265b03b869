//! LayerNorm on the card: `kernels/layernorm.cu`.

use super::buffer::{Buffer, Element};
use super::reduce::Parts;
use super::{Cuda, Unit, args, unit};
use crate::backend::{Affine, Arithmetic, LayerNorm, Normed, NormedInput, Write};
use crate::error::{Error, Result};

/// Columns of a row that a thread keeps in registers at most.
const THREAD_COLUMNS: usize = 16;
/// Threads of a block that takes several rows.
const BLOCK: usize = 256;
/// Blocks of the backward kernel: enough for every multiprocessor, few enough that their sums are quickly added.
const BACKWARD_BLOCKS_PER_MULTIPROCESSOR: usize = 2;
/// The widest row there are threads, and shared memory, for.
const MAX_CHANNELS: usize = 8192;

/// How a row is cut into threads' pieces.
#[derive(Clone, Copy)]
struct Cut {
    threads: usize,
    rows: usize,
}

/// The unit for rows of `channels`, and its cut.
fn cut(arithmetic: Arithmetic, channels: usize, backward: bool) -> (Unit, Cut) {
    let lanes = Element::of(arithmetic).lanes();
    let aligned = channels.is_multiple_of(lanes);
    let width = if aligned { lanes } else { 1 };
    let slots = |threads: usize| channels.div_ceil(threads * width);
    let threads = [32, 64, 128, 256].into_iter().find(|&t| slots(t) * width <= THREAD_COLUMNS).unwrap_or(512);
    // Rows of one warp each share a block; a longer row has the block to itself, for its threads meet at barriers.
    let rows = if threads == 32 { BLOCK / 32 } else { 1 };
    let unit = unit("layernorm", arithmetic, aligned).with(&[
        ("CHANNELS", channels.into()),
        ("ROW_THREADS", threads.into()),
        ("SLOTS", slots(threads).into()),
        ("ROWS", rows.into()),
    ]);
    let unit = if backward { unit.with(&[("BACKWARD", 1usize.into())]) } else { unit };
    (unit, Cut { threads, rows })
}

fn check(channels: usize) -> Result<()> {
    match channels <= MAX_CHANNELS {
        true => Ok(()),
        false => Err(Error::Device(format!(
            "the cuda backend has LayerNorm for up to {MAX_CHANNELS} channels, not {channels}; use another backend"
        ))),
    }
}

impl Cuda {
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
        check(c)?;
        let (unit, Cut { threads, rows: block_rows }) = cut(self.arithmetic, c, false);
        let (out, x) = (self.activation(normed.out, rows * c)?, self.activation(x, rows * c)?);
        let (mean, rstd) = (normed.mean.f32s(rows)?, normed.rstd.f32s(rows)?);
        let (weight, bias) = (params.part(Element::F32, affine.weight)?, params.part(Element::F32, affine.bias)?);
        let (grid, block) = ([rows.div_ceil(block_rows), 1, 1], threads * block_rows);
        match addition {
            None => {
                let args = args![out, mean, rstd, x, weight, bias, rows];
                self.launch("layernorm_forward", &unit, "layernorm_forward", grid, block, 0, args);
            }
            Some((branch, residual)) => {
                let (branch, residual) = (self.activation(branch, rows * c)?, self.activation(residual, rows * c)?);
                let args = args![residual, out, mean, rstd, x, branch, weight, bias, rows];
                let entry = "residual_layernorm_forward";
                self.launch(entry, &unit, entry, grid, block, 0, args);
            }
        }
        Ok(())
    }
}

impl LayerNorm for Cuda {
    fn layernorm_forward(
        &mut self,
        normed: Normed<'_, Buffer>,
        x: &Buffer,
        params: &Buffer,
        affine: Affine,
        rows: usize,
    ) -> Result<()> {
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
        const OP: &str = "layernorm_backward";
        let c = affine.weight.len;
        check(c)?;
        let (unit, Cut { threads, rows: block_rows }) = cut(self.arithmetic, c, true);
        let (dx, dout) = (self.activation(dresidual, rows * c)?, self.activation(dout, rows * c)?);
        let (x, mean, rstd) = (self.activation(input.x, rows * c)?, input.mean.f32s(rows)?, input.rstd.f32s(rows)?);
        let weight = params.part(Element::F32, affine.weight)?;
        let (dweight, dbias) = (grads.part(Element::F32, affine.weight)?, grads.part(Element::F32, affine.bias)?);
        let blocks = rows.div_ceil(block_rows).min(BACKWARD_BLOCKS_PER_MULTIPROCESSOR * self.card().multiprocessors);
        let parts = self.scratch("parts of sums", Element::F32, blocks * 2 * c)?;
        let args = args![dx, parts, dout, x, mean, rstd, weight, rows, residual_write];
        self.launch(OP, &unit, OP, [blocks, 1, 1], threads * block_rows, 0, args);
        self.add_parts(OP, &[dweight, dbias], c, Parts { at: parts, stride: 2 * c, count: blocks }, write);
        Ok(())
    }
}

/// Instantiations for the presets' channels and some that fit no vector.
pub(super) fn units(arithmetic: Arithmetic) -> Vec<(Unit, &'static str, usize, usize)> {
    let of = |channels| {
        let (forward, cut_forward) = cut(arithmetic, channels, false);
        let (backward, _) = cut(arithmetic, channels, true);
        let block = cut_forward.threads * cut_forward.rows;
        [
            (forward.clone(), "layernorm_forward", block, 0),
            (forward, "residual_layernorm_forward", block, 0),
            (backward, "layernorm_backward", block, 0),
        ]
    };
    [7, 30, 128, 512, 768, 1024, 1030, 1280, 1600, MAX_CHANNELS].into_iter().flat_map(of).collect()
}
