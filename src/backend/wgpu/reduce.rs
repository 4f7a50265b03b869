//! Sums over rows and over parts: the gradients of biases, and the end of every sum that was shared out.

use super::buffer::{Bind, Buffer, row_chunks};
use super::pipelines::Kernel;
use super::{Wgpu, add_word};
use crate::backend::Write;
use crate::error::Result;
use crate::shapes::Span;

/// Threads of a workgroup.
pub(super) const THREADS: usize = 64;
/// Parts that rows are summed in at most, and rows of a part at least.
const MAX_PARTS: usize = 256;
const MIN_PART_ROWS: usize = 16;
/// Threads that share a column's parts when there are many.
const SHARE: usize = 16;

/// Rows of each part of `rows` rows.
pub(super) fn part_rows(rows: usize) -> usize {
    rows.div_ceil(MAX_PARTS).max(MIN_PART_ROWS)
}

/// The most elements that parts of sums over `columns` columns take.
pub(super) fn most_parts(columns: usize) -> usize {
    MAX_PARTS * columns
}

/// Whether rows of `len` elements are handled by vec4s, and how many lanes that makes.
pub(super) fn lanes(len: usize) -> (u32, usize) {
    if len.is_multiple_of(4) { (1, len / 4) } else { (0, len) }
}

fn add_parts_kernel(vec: u32, share: usize) -> Kernel {
    Kernel::new(
        "reduce",
        "add_parts",
        &[("lanes", 1), ("vec", vec), ("threads", THREADS as u32), ("share", share as u32)],
    )
}

fn column_sums_kernel(vec: u32) -> Kernel {
    Kernel::new("reduce", "column_sums", &[("lanes", 1), ("vec", vec), ("threads", THREADS as u32)])
}

/// Every instantiation.
pub(super) fn kernels() -> Vec<Kernel> {
    [0, 1]
        .into_iter()
        .flat_map(|vec| [column_sums_kernel(vec), add_parts_kernel(vec, 1), add_parts_kernel(vec, SHARE)])
        .collect()
}

impl Wgpu {
    /// `out[c] (+)= sum over part of parts[at + part * stride + c]`, in order of the parts.
    pub(super) fn add_parts(
        &mut self,
        out: Bind<'_>,
        parts: &Buffer,
        at: usize,
        stride: usize,
        count: usize,
        write: Write,
    ) -> Result<()> {
        let len = out.span.len;
        let by_fours = [len, at, stride].iter().all(|size| size.is_multiple_of(4));
        let (vec, lane) = if by_fours { (1, 4) } else { (0, 1) };
        let share = if count > SHARE { SHARE } else { 1 };
        let span = Span { offset: 0, len: at + (count - 1) * stride + len };
        let words = [0, len / lane, 0, 0, count, stride / lane, at / lane, add_word(write) as usize];
        let groups = (len / lane).div_ceil(THREADS / share);
        let flops = (THREADS / share * lane * count) as f64;
        let binds = [parts.read(span), out];
        self.dispatch(&add_parts_kernel(vec, share), &binds, &words.map(|word| word as u32), groups, flops)
    }

    /// `out[c] (+)= sum over the rows of matrix[r, c]`: the gradient of a bias.
    pub(super) fn column_sums(&mut self, out: Bind<'_>, matrix: &Buffer, rows: usize, write: Write) -> Result<()> {
        let columns = out.span.len;
        let (vec, lanes) = lanes(columns);
        let across = lanes.div_ceil(THREADS);
        let limit = self.binding_len();
        for (first, count) in row_chunks(rows, columns, limit) {
            let part_rows = part_rows(count);
            let parts_count = count.div_ceil(part_rows);
            let parts = self.scratch("parts of sums", most_parts(columns))?;
            let words = [count, lanes, part_rows, across, parts_count, 0, 0, 0].map(|word| word as u32);
            let source = matrix.read(Span { offset: first * columns, len: count * columns });
            let into = parts.write(Span { offset: 0, len: parts_count * columns });
            let flops = (THREADS * 4 * part_rows) as f64;
            self.dispatch(&column_sums_kernel(vec), &[source, into], &words, parts_count * across, flops)?;
            let write = if first == 0 { write } else { Write::Add };
            self.add_parts(out, &parts, 0, columns, parts_count, write)?;
        }
        Ok(())
    }
}
