//! Dense products on the GPU: `shaders/linear.wgsl` in three orientations, rows in chunks that fit a binding.

use super::Wgpu;
use super::buffer::{Buffer, row_chunks};
use super::gelu::Gelu;
use super::matrix::{Epilogue, Matrix, Operand, PLAIN, kernel};
use super::pipelines::Kernel;
use super::tuning::Tuning;
use crate::backend::{Affine, Linear, LinearDims, Write};
use crate::error::Result;
use crate::shapes::Span;

impl Linear for Wgpu {
    fn linear_forward(
        &mut self,
        out: &mut Buffer,
        pre: Option<&mut Buffer>,
        inp: &Buffer,
        params: &Buffer,
        affine: Affine,
        dims: LinearDims,
    ) -> Result<()> {
        self.op = "linear_forward";
        let LinearDims { rows, inputs, outputs } = dims;
        let gelu = pre.as_deref().map_or(Gelu::None, Gelu::Forward);
        let epilogue = Epilogue { bias: Some((params, affine.bias)), gelu };
        let (out, inp) = (Matrix::new(out, 0, rows, outputs), Matrix::new(inp, 0, rows, inputs));
        let weight = Operand::Along(Matrix::new(params, affine.weight.offset, outputs, inputs));
        for (first, count) in row_chunks(rows, inputs.max(outputs), self.binding_len()) {
            let inp = Operand::Along(inp.rows(first, count));
            self.product(out.rows(first, count), inp, weight, epilogue, Write::Set)?;
        }
        Ok(())
    }

    fn linear_backward_input(
        &mut self,
        dinp: &mut Buffer,
        dout: &Buffer,
        params: &Buffer,
        weight: Span,
        pre: Option<&Buffer>,
        dims: LinearDims,
    ) -> Result<()> {
        self.op = "linear_backward_input";
        let LinearDims { rows, inputs, outputs } = dims;
        let epilogue = Epilogue { gelu: pre.map_or(Gelu::None, Gelu::Backward), ..PLAIN };
        let (dinp, dout) = (Matrix::new(dinp, 0, rows, inputs), Matrix::new(dout, 0, rows, outputs));
        let weight = Operand::Across(Matrix::new(params, weight.offset, outputs, inputs));
        for (first, count) in row_chunks(rows, inputs.max(outputs), self.binding_len()) {
            let dout = Operand::Along(dout.rows(first, count));
            self.product(dinp.rows(first, count), dout, weight, epilogue, Write::Set)?;
        }
        Ok(())
    }

    fn linear_backward_weight(
        &mut self,
        grads: &mut Buffer,
        affine: Affine,
        dout: &Buffer,
        inp: &Buffer,
        dims: LinearDims,
        write: Write,
    ) -> Result<()> {
        self.op = "linear_backward_weight";
        let LinearDims { rows, inputs, outputs } = dims;
        self.column_sums(grads.write(affine.bias), dout, rows, write)?;
        let dweight = Matrix::new(grads, affine.weight.offset, outputs, inputs);
        let (dout, inp) = (Matrix::new(dout, 0, rows, outputs), Matrix::new(inp, 0, rows, inputs));
        for (first, count) in row_chunks(rows, inputs.max(outputs), self.binding_len()) {
            let (dout, inp) = (Operand::Across(dout.rows(first, count)), Operand::Across(inp.rows(first, count)));
            let write = if first == 0 { write } else { Write::Add };
            self.deep_product(dweight, dout, inp, write)?;
        }
        Ok(())
    }
}

/// Every instantiation, the head's included.
pub(super) fn kernels(tuning: &Tuning) -> Vec<Kernel> {
    const PLAIN: (bool, (&str, u32)) = (false, ("gelu", 0));
    let forward = [PLAIN, (true, ("gelu", 0)), (true, ("gelu", 1))].map(|epilogue| ([0, 0], epilogue, [false; 2]));
    let backward = [PLAIN, (false, ("gelu_backward", 1))].map(|epilogue| ([0, 1], epilogue, [false; 2]));
    let deep = [[false; 2], [true, false], [true; 2]].map(|deal| ([1, 1], PLAIN, deal));
    let mut kernels = Vec::new();
    for (across, (bias, gelu), deal) in forward.into_iter().chain(backward).chain(deep) {
        for tile in tuning.dense {
            for fit in [[true; 3], [true, true, false], [true, false, false], [false, true, false], [false; 3]] {
                kernels.push(kernel(tuning, tile, across, fit, bias, gelu, deal));
            }
        }
    }
    kernels
}
