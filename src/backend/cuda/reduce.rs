//! Sums over rows and over parts: `kernels/reduce.cu`.

use super::buffer::{Buffer, Element};
use super::{Cuda, Unit, args, unit};
use crate::backend::{Arithmetic, Write};
use crate::error::Result;
use crate::shapes::Span;

const COLUMN_SUMS_THREADS: usize = 256;
const ADD_PARTS_THREADS: usize = 512;
/// Columns of a block of `add_parts`, groups of columns of one of `column_sums`.
const GROUPS: usize = 32;
/// Parts that rows are summed in at most, and rows of a part at least.
const MAX_PARTS: usize = 128;
const MIN_PART_ROWS: usize = 64;

/// The most bytes that parts of sums over `columns` columns take.
pub(super) fn most_part_bytes(columns: usize) -> usize {
    4 * MAX_PARTS * columns
}

/// Parts of sums: `count` of them, each `stride` floats behind the one before.
#[derive(Clone, Copy)]
pub(super) struct Parts {
    pub(super) at: u64,
    pub(super) stride: usize,
    pub(super) count: usize,
}

impl Cuda {
    /// `out[c] (+)= sum over parts of parts[part * stride + c]` for each of one or two outputs; the second one's parts lie
    /// `columns` behind the first one's.
    pub(super) fn add_parts(&mut self, op: &'static str, outs: &[u64], columns: usize, parts: Parts, write: Write) {
        let Parts { at, stride, count } = parts;
        let unit = self.unit("reduce", true);
        let grid = [columns.div_ceil(GROUPS), outs.len(), 1];
        let args = args![outs[0], outs[outs.len() - 1], at, columns, stride, count, write];
        self.launch(op, &unit, "add_parts", grid, ADD_PARTS_THREADS, 0, args);
    }

    /// `out[c] (+)= sum over the rows of matrix[r, c]`: the gradient of a bias.
    pub(super) fn column_sums(
        &mut self,
        op: &'static str,
        grads: &Buffer,
        span: Span,
        matrix: u64,
        rows: usize,
        write: Write,
    ) -> Result<()> {
        let columns = span.len;
        let out = grads.part(Element::F32, span)?;
        let lanes = self.element().lanes();
        let aligned = columns.is_multiple_of(lanes);
        let pieces = if aligned { columns / lanes } else { columns };
        let part_rows = rows.div_ceil(MAX_PARTS).max(MIN_PART_ROWS);
        let count = rows.div_ceil(part_rows);
        let parts = self.scratch("parts of sums", Element::F32, MAX_PARTS * columns)?;
        let unit = self.unit("reduce", aligned);
        let grid = [pieces.div_ceil(GROUPS), count, 1];
        self.launch(
            op,
            &unit,
            "column_sums",
            grid,
            COLUMN_SUMS_THREADS,
            0,
            args![parts, matrix, rows, columns, part_rows],
        );
        self.add_parts(op, &[out], columns, Parts { at: parts, stride: columns, count }, write);
        Ok(())
    }
}

/// Every instantiation.
pub(super) fn units(arithmetic: Arithmetic) -> Vec<(Unit, &'static str, usize, usize)> {
    let entries = [("column_sums", COLUMN_SUMS_THREADS), ("add_parts", ADD_PARTS_THREADS)];
    let of = |aligned| entries.map(|(entry, threads)| (unit("reduce", arithmetic, aligned), entry, threads, 0));
    [true, false].into_iter().flat_map(of).collect()
}
