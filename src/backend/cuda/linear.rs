//! Dense products of a layer on the card: three orientations, and the bias's gradient.

use super::Cuda;
use super::buffer::{Buffer, Element};
use super::gelu::Gelu;
use super::product::{Finish, Matrix, Operand, PLAIN};
use crate::backend::{Affine, Linear, LinearDims, Write};
use crate::error::Result;
use crate::shapes::Span;

impl Cuda {
    /// The first rows of an activation as a matrix.
    pub(super) fn matrix(&self, buffer: &Buffer, rows: usize, cols: usize) -> Result<Matrix> {
        Ok(Matrix { at: self.activation(buffer, rows * cols)?, element: self.element(), rows, cols })
    }

    /// A weight among the parameters as a matrix.
    pub(super) fn weight(&mut self, params: &Buffer, span: Span, rows: usize, cols: usize) -> Result<Matrix> {
        Ok(Matrix { at: self.operand(params, span)?, element: self.element(), rows, cols })
    }

    /// A weight's gradient as a matrix.
    pub(super) fn gradient(&self, grads: &Buffer, span: Span, rows: usize, cols: usize) -> Result<Matrix> {
        Ok(Matrix { at: grads.part(Element::F32, span)?, element: Element::F32, rows, cols })
    }
}

impl Linear for Cuda {
    fn linear_forward(
        &mut self,
        out: &mut Buffer,
        pre: Option<&mut Buffer>,
        inp: &Buffer,
        params: &Buffer,
        affine: Affine,
        dims: LinearDims,
    ) -> Result<()> {
        let LinearDims { rows, inputs, outputs } = dims;
        let (out, inp) = (self.matrix(out, rows, outputs)?, self.matrix(inp, rows, inputs)?);
        let weight = self.weight(params, affine.weight, outputs, inputs)?;
        let gelu = match pre {
            Some(pre) => Gelu::Forward(self.activation(pre, rows * outputs)?),
            None => Gelu::None,
        };
        let finish = Finish { bias: Some((params, affine.bias)), gelu };
        self.product("linear_forward", out, Operand::Along(inp), Operand::Along(weight), finish, Write::Set)
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
        let LinearDims { rows, inputs, outputs } = dims;
        let (dinp, dout) = (self.matrix(dinp, rows, inputs)?, self.matrix(dout, rows, outputs)?);
        let weight = self.weight(params, weight, outputs, inputs)?;
        let gelu = match pre {
            Some(pre) => Gelu::Backward(self.activation(pre, rows * inputs)?),
            None => Gelu::None,
        };
        let finish = Finish { bias: None, gelu };
        self.product("linear_backward_input", dinp, Operand::Along(dout), Operand::Across(weight), finish, Write::Set)
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
        const OP: &str = "linear_backward_weight";
        let LinearDims { rows, inputs, outputs } = dims;
        let (dout, inp) = (self.matrix(dout, rows, outputs)?, self.matrix(inp, rows, inputs)?);
        let dweight = self.gradient(grads, affine.weight, outputs, inputs)?;
        let dbias = grads.part(Element::F32, affine.bias)?;
        // The library's sums cannot be added to others.
        if write == Write::Set && self.product_with_sums(OP, dweight, dout, inp, dbias)? {
            return Ok(());
        }
        self.column_sums(OP, grads, affine.bias, dout.at, rows, write)?;
        self.product(OP, dweight, Operand::Across(dout), Operand::Across(inp), PLAIN, write)
    }
}
