//! Dense products on the CPU.

use super::gelu::{gelu_of, scale_by_gelu_derivative};
use super::matrix::{Into, Mat, MatMut, Threads, multiply};
use super::{Cpu, ROW_CHUNK, sum_columns};
use crate::backend::{Affine, Linear, LinearDims, Write};
use crate::error::Result;
use crate::shapes::Span;
use rayon::prelude::*;

/// Elements whose GELU one thread evaluates at once.
const GELU_CHUNK: usize = 1 << 12;

impl Linear for Cpu {
    fn linear_forward(
        &mut self,
        out: &mut Vec<f32>,
        pre: Option<&mut Vec<f32>>,
        inp: &Vec<f32>,
        params: &Vec<f32>,
        affine: Affine,
        dims: LinearDims,
    ) -> Result<()> {
        let LinearDims { rows, inputs, outputs } = dims;
        let product = |target: &mut Vec<f32>| {
            fill_rows(target, &params[affine.bias.range()], rows);
            let weight = Mat::new(&params[affine.weight.range()], outputs, inputs, inputs);
            let inp = Mat::new(inp, rows, inputs, inputs);
            multiply(MatMut::new(target, rows, outputs, outputs), inp, weight.t(), Into::Add, Threads::All);
        };
        match pre {
            None => product(out),
            Some(pre) => {
                product(pre);
                let len = rows * outputs;
                (out[..len].par_chunks_mut(GELU_CHUNK), pre[..len].par_chunks(GELU_CHUNK))
                    .into_par_iter()
                    .for_each(|(out, pre)| gelu_of(out, pre));
            }
        }
        Ok(())
    }

    fn linear_backward_input(
        &mut self,
        dinp: &mut Vec<f32>,
        dout: &Vec<f32>,
        params: &Vec<f32>,
        weight: Span,
        pre: Option<&Vec<f32>>,
        dims: LinearDims,
    ) -> Result<()> {
        let LinearDims { rows, inputs, outputs } = dims;
        let weight = Mat::new(&params[weight.range()], outputs, inputs, inputs);
        let dout = Mat::new(dout, rows, outputs, outputs);
        multiply(MatMut::new(dinp, rows, inputs, inputs), dout, weight, Into::Set, Threads::All);
        if let Some(pre) = pre {
            let len = rows * inputs;
            (dinp[..len].par_chunks_mut(GELU_CHUNK), pre[..len].par_chunks(GELU_CHUNK))
                .into_par_iter()
                .for_each(|(dinp, pre)| scale_by_gelu_derivative(dinp, pre));
        }
        Ok(())
    }

    fn linear_backward_weight(
        &mut self,
        grads: &mut Vec<f32>,
        affine: Affine,
        dout: &Vec<f32>,
        inp: &Vec<f32>,
        dims: LinearDims,
        write: Write,
    ) -> Result<()> {
        let LinearDims { rows, inputs, outputs } = dims;
        sum_columns(&mut grads[affine.bias.range()], dout, rows, write);
        let dweight = MatMut::new(&mut grads[affine.weight.range()], outputs, inputs, inputs);
        let dout = Mat::new(dout, rows, outputs, outputs);
        let inp = Mat::new(inp, rows, inputs, inputs);
        multiply(dweight, dout.t(), inp, write.into(), Threads::All);
        Ok(())
    }
}

impl From<Write> for Into {
    fn from(write: Write) -> Self {
        match write {
            Write::Set => Into::Set,
            Write::Add => Into::Add,
        }
    }
}

/// Sets each of the first `rows` rows to `row`.
pub(super) fn fill_rows(matrix: &mut [f32], row: &[f32], rows: usize) {
    let cols = row.len();
    matrix[..rows * cols].par_chunks_mut(cols).with_min_len(ROW_CHUNK).for_each(|out| out.copy_from_slice(row));
}
