//! Dense products of matrices that lie anywhere in device memory, tiled, and a deep one's sums shared out.

use super::buffer::{Buffer, aligned};
use super::gelu::Gelu;
use super::pipelines::Kernel;
use super::tuning::{Deal, Tile, Tuning};
use super::{Wgpu, add_word};
use crate::backend::Write;
use crate::error::{Error, Result};
use crate::shapes::Span;

/// A row-major matrix in a buffer: element (r, c) is `buffer[at + r * stride + c]`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) buffer: &'a Buffer,
    pub(super) at: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) stride: usize,
}

impl<'a> Matrix<'a> {
    /// A matrix whose rows follow each other without a gap.
    pub(super) fn new(buffer: &'a Buffer, at: usize, rows: usize, cols: usize) -> Self {
        Self { buffer, at, rows, cols, stride: cols }
    }

    /// `count` of its rows from `first`.
    pub(super) fn rows(self, first: usize, count: usize) -> Self {
        Self { at: self.at + first * self.stride, rows: count, ..self }
    }

    /// `count` of its columns from `first`.
    pub(super) fn cols(self, first: usize, count: usize) -> Self {
        Self { at: self.at + first, cols: count, ..self }
    }

    fn span(self) -> Span {
        Span { offset: self.at, len: (self.rows.max(1) - 1) * self.stride + self.cols }
    }

    /// Whether it can be handled by whole vec4s.
    fn by_fours(self) -> bool {
        [self.at, self.cols, self.stride].iter().all(|size| size.is_multiple_of(4))
    }
}

/// An operand of a product: as it is multiplied, or transposed.
#[derive(Clone, Copy)]
pub(super) enum Operand<'a> {
    /// Left: `[rows, depth]`; right: `[cols, depth]`. It lies along the depth.
    Along(Matrix<'a>),
    /// Left: `[depth, rows]`; right: `[depth, cols]`. It lies across the depth.
    Across(Matrix<'a>),
}

impl<'a> Operand<'a> {
    fn matrix(self) -> Matrix<'a> {
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

    fn is_across(self) -> u32 {
        u32::from(matches!(self, Operand::Across(_)))
    }
}

/// What follows a product.
#[derive(Clone, Copy)]
pub(super) struct Epilogue<'a> {
    /// A bias of as many elements as the result has columns.
    pub(super) bias: Option<(&'a Buffer, Span)>,
    /// The GELU; its buffer has the result's shape and place.
    pub(super) gelu: Gelu<'a>,
}

/// Nothing follows.
pub(super) const PLAIN: Epilogue<'static> = Epilogue { bias: None, gelu: Gelu::None };

impl Wgpu {
    /// `out (+)= left right`, then `epilogue`.
    pub(super) fn product(
        &mut self,
        out: Matrix<'_>,
        left: Operand<'_>,
        right: Operand<'_>,
        epilogue: Epilogue<'_>,
        write: Write,
    ) -> Result<()> {
        let tile = self.tuning.for_result(out.rows, out.cols);
        self.tiled_product(out, left, right, epilogue, write, tile, None)
    }

    /// `out (+)= left right` for a deep product: the depth is cut into parts when the result alone is small. `out`'s rows
    /// follow each other without a gap.
    pub(super) fn deep_product(
        &mut self,
        out: Matrix<'_>,
        left: Operand<'_>,
        right: Operand<'_>,
        write: Write,
    ) -> Result<()> {
        let tile = self.tuning.filled_by(out.rows, out.cols);
        let deal = self.tuning.deal(tile, tile.count(out.rows, out.cols), left.extents().1);
        if deal.shares == 1 {
            return self.tiled_product(out, left, right, PLAIN, write, tile, None);
        }
        let len = out.rows * out.cols;
        let parts = self.scratch("parts of a product", deal.shares * len.next_multiple_of(4))?;
        let into = Matrix::new(&parts, 0, out.rows, out.cols);
        self.tiled_product(into, left, right, PLAIN, Write::Set, tile, Some(deal))?;
        let target = Span { offset: out.at, len };
        self.add_parts(out.buffer.write(target), &parts, 0, len.next_multiple_of(4), deal.shares, write)
    }

    /// The product by tiles, a workgroup for each; or dealt out, its parts one after the other in `out`'s buffer.
    #[allow(clippy::too_many_arguments)]
    fn tiled_product(
        &mut self,
        out: Matrix<'_>,
        left: Operand<'_>,
        right: Operand<'_>,
        epilogue: Epilogue<'_>,
        write: Write,
        tile: Tile,
        deal: Option<Deal>,
    ) -> Result<()> {
        let ((rows, depth), (cols, right_depth)) = (left.extents(), right.extents());
        if (rows, cols, depth) != (out.rows, out.cols, right_depth) {
            return Err(Error::Internal("shapes of a product do not match".to_string()));
        }
        let share_stride = (rows * cols).next_multiple_of(4);
        let ((left_span, left_at), (right_span, right_at)) =
            (aligned(left.matrix().span()), aligned(right.matrix().span()));
        let (mut out_span, out_at) = aligned(out.span());
        out_span.len += deal.map_or(0, |deal| (deal.shares - 1) * share_stride);
        let mut binds = vec![
            left.matrix().buffer.read(left_span),
            right.matrix().buffer.read(right_span),
            out.buffer.write(out_span),
        ];
        binds.extend(epilogue.bias.map(|(buffer, span)| buffer.read(span)));
        let (pre_span, pre_at) = aligned(out.span());
        binds.extend(epilogue.gelu.bind(pre_span));
        let (tiles_down, tiles_across) = (rows.div_ceil(tile.bm), cols.div_ceil(tile.bn));
        let sizes = [
            rows,
            cols,
            depth,
            left_at as usize,
            left.matrix().stride,
            right_at as usize,
            right.matrix().stride,
            out_at as usize,
            out.stride,
            pre_at as usize,
            tiles_down,
            tiles_across,
            add_word(write) as usize,
        ];
        let dealt = deal.map(|deal| deal.words(share_stride)).unwrap_or_default();
        let words: Vec<u32> = sizes.into_iter().chain(dealt).map(|word| word as u32).collect();
        let vec = left.matrix().by_fours() && right.matrix().by_fours();
        let by_fours = |size: usize| size > 0 && size.is_multiple_of(4);
        let whole = vec && depth % tile.bk == 0 && by_fours(rows) && by_fours(cols);
        let across = [left.is_across(), right.is_across()];
        let fit = [vec, out.by_fours(), whole];
        let dealt = [deal.is_some(), deal.is_some_and(|deal| deal.even)];
        let kernel = kernel(&self.tuning, tile, across, fit, epilogue.bias.is_some(), epilogue.gelu.flag(), dealt);
        let groups = deal.map_or(tiles_down * tiles_across, Deal::groups);
        let flops = tile.flops(depth) * (tiles_down * tiles_across) as f64 / groups.max(1) as f64;
        self.dispatch(&kernel, &binds, &words, groups, flops)
    }
}

/// An instantiation of `shaders/linear.wgsl`: whether the operands lie across the depth (left, right); whether operands,
/// and results, are handled by vec4s, and operands are walked through; what follows; whether it is dealt out, and evenly.
pub(super) fn kernel(
    tuning: &Tuning,
    tile: Tile,
    across: [u32; 2],
    [vec, vec_out, whole]: [bool; 3],
    bias: bool,
    gelu: (&'static str, u32),
    [deal, even]: [bool; 2],
) -> Kernel {
    Kernel::new("linear", "linear", &tuning.variables(tile)).with(&[
        ("left_by_depth", across[0]),
        ("right_by_depth", across[1]),
        ("vec", u32::from(vec)),
        ("vec_out", u32::from(vec_out)),
        ("whole", u32::from(whole)),
        ("bias", u32::from(bias)),
        gelu,
        ("deal", u32::from(deal)),
        ("even", u32::from(even)),
    ])
}
