//! Dense products of matrices that lie anywhere in device memory: by cuBLASLt, or, where rows do not start at 16-byte
//! boundaries, by `kernels/linear.cu`.

use super::blas::{Call, Epilogue, Shape};
use super::buffer::{Buffer, Element};
use super::gelu::Gelu;
use super::tape::Work;
use super::{Cuda, args, unit};
use crate::backend::{Arithmetic, Write};
use crate::error::{Error, Result};
use crate::shapes::Span;

/// Results that a block of `kernels/linear.cu` computes, each way; and its threads.
const TILE: usize = 32;
const THREADS: usize = 256;

/// A row-major matrix: element (r, c) is the one `r * stride + c` elements behind `at`.
#[derive(Clone, Copy)]
pub(super) struct Matrix {
    pub(super) at: u64,
    pub(super) element: Element,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl Matrix {
    /// Whether every row starts at a 16-byte boundary.
    fn is_aligned(self) -> bool {
        self.at.is_multiple_of(16) && self.cols.is_multiple_of(self.element.lanes())
    }

    /// `count` of its rows from `first`.
    pub(super) fn rows(self, first: usize, count: usize) -> Self {
        Self { at: self.at + (first * self.cols * self.element.bytes()) as u64, rows: count, ..self }
    }
}

/// An operand of a product: as it is multiplied, or transposed.
#[derive(Clone, Copy)]
pub(super) enum Operand {
    /// Left: `[rows, depth]`; right: `[cols, depth]`. It lies along the depth.
    Along(Matrix),
    /// Left: `[depth, rows]`; right: `[depth, cols]`. It lies across the depth.
    Across(Matrix),
}

impl Operand {
    fn matrix(self) -> Matrix {
        match self {
            Operand::Along(matrix) | Operand::Across(matrix) => matrix,
        }
    }

    /// (rows or columns of the result, depth)
    fn extents(self) -> (usize, usize) {
        match self {
            Operand::Along(matrix) => (matrix.rows, matrix.cols),
            Operand::Across(matrix) => (matrix.cols, matrix.rows),
        }
    }

    /// Elements to the next row or column of the result, and to the next step of the depth.
    fn steps(self) -> [usize; 2] {
        match self {
            Operand::Along(matrix) => [matrix.cols, 1],
            Operand::Across(matrix) => [1, matrix.cols],
        }
    }
}

/// What follows a product.
#[derive(Clone, Copy)]
pub(super) struct Finish<'a> {
    /// A bias, in the parameters.
    pub(super) bias: Option<(&'a Buffer, Span)>,
    /// The GELU.
    pub(super) gelu: Gelu,
}

/// Nothing follows.
pub(super) const PLAIN: Finish<'static> = Finish { bias: None, gelu: Gelu::None };

impl Cuda {
    /// `out (+)= left right`, then `finish`.
    pub(super) fn product(
        &mut self,
        op: &'static str,
        out: Matrix,
        left: Operand,
        right: Operand,
        finish: Finish<'_>,
        write: Write,
    ) -> Result<()> {
        let ((rows, depth), (cols, right_depth)) = (left.extents(), right.extents());
        if (rows, cols, depth) != (out.rows, out.cols, right_depth) {
            return Err(Error::Internal(format!("shapes of a product of {op} do not match")));
        }
        let aligned = [out, left.matrix(), right.matrix()].iter().all(|matrix| matrix.is_aligned());
        match aligned {
            true => self.library_product(op, out, left, right, finish, write),
            false => self.own_product(op, out, left, right, finish, write),
        }
    }

    /// `out = dout^T inp`, and at `bias` the sums of dout over its rows, if the library does both at once; else does nothing and
    /// returns false.
    pub(super) fn product_with_sums(
        &mut self,
        op: &'static str,
        out: Matrix,
        dout: Matrix,
        inp: Matrix,
        bias: u64,
    ) -> Result<bool> {
        let aligned = bias.is_multiple_of(16) && [out, dout, inp].iter().all(|matrix| matrix.is_aligned());
        if self.arithmetic != Arithmetic::Bf16 || !aligned {
            return Ok(false);
        }
        let (left, right) = (Operand::Across(dout), Operand::Across(inp));
        let shape = library_shape(out, left, right, Epilogue::BiasGradient, Write::Set);
        if !self.blas.can(shape, &self.driver)? {
            return Ok(false);
        }
        let call = Call { shape, a: inp.at, b: dout.at, d: out.at, bias, aux: 0 };
        self.tape.push(Work::Product { call, op });
        Ok(true)
    }

    /// By cuBLASLt.
    fn library_product(
        &mut self,
        op: &'static str,
        out: Matrix,
        left: Operand,
        right: Operand,
        finish: Finish<'_>,
        write: Write,
    ) -> Result<()> {
        // The library's GELU is exact enough for bf16 only.
        let fused = self.arithmetic == Arithmetic::Bf16;
        let (epilogue, aux) = match (finish.bias, finish.gelu) {
            (Some(_), Gelu::Forward(pre)) if fused => (Epilogue::BiasGelu, pre),
            (None, Gelu::Backward(pre)) if fused => (Epilogue::GeluBackward, pre),
            (Some(_), _) => (Epilogue::Bias, 0),
            (None, _) => (Epilogue::None, 0),
        };
        let unfused = if aux == 0 { finish.gelu } else { Gelu::None };
        let bias = match finish.bias {
            Some((params, span)) => self.operand(params, span)?,
            None => 0,
        };
        // Without fusion the sum goes to where the GELU's argument is kept.
        let target = if let Gelu::Forward(pre) = unfused { pre } else { out.at };
        let shape = library_shape(out, left, right, epilogue, write);
        self.blas.prepare(shape, &self.driver)?;
        let call = Call { shape, a: right.matrix().at, b: left.matrix().at, d: target, bias, aux };
        self.tape.push(Work::Product { call, op });
        self.unfused_gelu(op, out, unfused);
        Ok(())
    }

    /// By `kernels/linear.cu`, whatever the sizes.
    fn own_product(
        &mut self,
        op: &'static str,
        out: Matrix,
        left: Operand,
        right: Operand,
        finish: Finish<'_>,
        write: Write,
    ) -> Result<()> {
        let bias = match finish.bias {
            Some((params, span)) => params.part(Element::F32, span)?,
            None => 0,
        };
        let target = if let Gelu::Forward(pre) = finish.gelu { pre } else { out.at };
        let ([left_row, left_step], [right_row, right_step]) = (left.steps(), right.steps());
        let result = if out.element == self.element() { "Element" } else { "float" };
        let unit = unit("linear", self.arithmetic, false).with(&[("RESULT", result.into())]);
        let args = args![
            target,
            left.matrix().at,
            right.matrix().at,
            bias,
            out.rows,
            out.cols,
            left.extents().1,
            left_row,
            left_step,
            right_row,
            right_step,
            out.cols,
            write,
        ];
        let grid = [out.rows.div_ceil(TILE), out.cols.div_ceil(TILE), 1];
        self.launch(op, &unit, "linear", grid, THREADS, 0, args);
        self.unfused_gelu(op, out, finish.gelu);
        Ok(())
    }
}

/// A product as cuBLASLt has it, whose matrices are column-major: the transposed product, right times left.
fn library_shape(out: Matrix, left: Operand, right: Operand, epilogue: Epilogue, write: Write) -> Shape {
    Shape {
        m: out.cols,
        n: out.rows,
        k: left.extents().1,
        transpose: [matches!(right, Operand::Along(_)), matches!(left, Operand::Across(_))],
        strides: [right.matrix().cols, left.matrix().cols, out.cols],
        out: out.element,
        epilogue,
        add: write == Write::Add,
    }
}

/// Every instantiation.
pub(super) fn units(arithmetic: Arithmetic) -> Vec<(super::Unit, &'static str, usize, usize)> {
    let of = |result: &'static str| {
        (unit("linear", arithmetic, false).with(&[("RESULT", result.into())]), "linear", THREADS, 0)
    };
    vec![of("Element"), of("float")]
}
