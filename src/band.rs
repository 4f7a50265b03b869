//! The band, or the blocks in its place: which connections of an MLP layer exist, and how their weights lie in memory.
//!
//! A band joins a narrow axis i in [0, N) with a wide axis j in [0, W), W >= N. The connection (j, i) exists exactly when
//! |j - i*W/N| <= bandwidth/2, a closed interval in real arithmetic; multiplied by 2N it is decided in integers:
//! 2 * |j*N - i*W| <= bandwidth * N. FC1 (N -> W) and FC2 (W -> N) use the same band, one the other transposed.
//!
//! Weights lie packed by wide row. A *panel* is [`PANEL_ROWS`] consecutive wide rows times the window of narrow columns
//! that any of these rows touches, the window's start and width rounded to [`ALIGN`] columns so that every panel row
//! starts at a 16-byte boundary (8 bf16 or 4 f32) and holds whole steps of an MMA's depth (16). Slots of a window outside
//! the exact band hold 0.0 at all times.
//!
//! Where [`Blocks`] stand in a band's place, each of them is two panels, one below the other: its columns are their window. The two follow
//! each other in the list, the blocks of a block row from left to right after them, and block rows downwards; the second panel
//! of a block whose rows all lie in the first has no rows. What is true of a band's panels is true of these, but that
//! several share their wide rows.
//!
//! This module is the only place that knows the geometry: backends receive [`Band::table`] as a buffer.

use crate::bandwidths::Connections;
use crate::blocks::{self, BLOCK_COLS, BLOCK_ROWS, Blocks};
use crate::error::{Error, Result};
use std::fmt::Write;
use std::ops::Range;

/// Wide rows of one panel.
pub const PANEL_ROWS: usize = 64;
/// Windows start at, and are as wide as, a multiple of this many narrow columns.
pub const ALIGN: usize = 16;
/// Narrow columns of one tile of the contraction (see [`Band::column_tiles`]).
pub const COLUMN_TILE: usize = 64;

/// The largest axis; products of two axes and a bandwidth then stay far inside 64 bits.
const MAX_AXIS: usize = 1 << 20;

/// One panel of packed weights: rows [row_start, row_start + rows) x columns [col_start, col_start + cols).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Panel {
    /// First wide row.
    pub row_start: usize,
    /// Wide rows; [`PANEL_ROWS`] but for the last panel, or the last block row's.
    pub rows: usize,
    /// First narrow column of the window, a multiple of [`ALIGN`].
    pub col_start: usize,
    /// Width of the window and the panel's row stride, a multiple of [`ALIGN`]. The window may reach beyond N, where its
    /// slots are zero; 0 when no row of the panel has a connection.
    pub cols: usize,
    /// Where the panel starts in the packed buffer, in elements.
    pub offset: usize,
}

impl Panel {
    /// Wide rows of the panel.
    pub fn row_range(&self) -> Range<usize> {
        self.row_start..self.row_start + self.rows
    }

    /// Elements the panel takes in the packed buffer.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether the panel holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Which way round a dense weight matrix lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dense {
    /// FC1: [W, N], output j by input i.
    WideByNarrow,
    /// FC2: [N, W], output i by input j.
    NarrowByWide,
}

/// A band between a narrow axis of N and a wide axis of W elements, or blocks in its place, with its panels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Band {
    narrow: usize,
    wide: usize,
    shape: Shape,
    /// Per wide row: the columns in which a slot of a panel is a connection. A band's are exact; of blocks they are all.
    rows: Vec<Range<usize>>,
    panels: Vec<Panel>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Shape {
    /// The band of a bandwidth.
    Diagonal(usize),
    Blocks(Blocks),
}

impl Band {
    /// The band of `bandwidth` wide elements between `narrow` = N and `wide` = W.
    ///
    /// # Errors
    /// [`Error::Usage`] when the bandwidth is 0 (that means dense, which is no band), an axis is empty or longer than
    /// 2^20, or W < N.
    pub fn new(narrow: usize, wide: usize, bandwidth: usize) -> Result<Self> {
        if bandwidth == 0 {
            return Err(Error::usage("a band needs a bandwidth of at least 1; bandwidth 0 means a dense layer"));
        }
        check_axes(narrow, wide)?;
        // Anything from 2W on keeps everything; clamping keeps the arithmetic small without changing the band.
        let reach = bandwidth.min(2 * wide) as i64;
        let rows: Vec<_> = (0..wide).map(|j| columns_of_row(j as i64, narrow as i64, wide as i64, reach)).collect();
        let panels = panels(&rows, PANEL_ROWS, ALIGN);
        Ok(Self { narrow, wide, shape: Shape::Diagonal(bandwidth), rows, panels })
    }

    /// Blocks between `narrow` = N and `wide` = W elements in the place of a band. Any set will do that is not empty, though of
    /// rows and columns without blocks nothing is computed but biases.
    ///
    /// # Errors
    /// [`Error::Usage`] for axes that [`Band::new`] refuses, for blocks of other axes, and for none.
    pub fn of_blocks(narrow: usize, wide: usize, blocks: Blocks) -> Result<Self> {
        check_axes(narrow, wide)?;
        if (blocks.down(), blocks.across()) != blocks::grid(narrow, wide) {
            let (down, across) = (blocks.down(), blocks.across());
            return Err(Error::usage(format!("{down} x {across} blocks do not make a layer of {wide} x {narrow}")));
        }
        if blocks.count() == 0 {
            return Err(Error::usage("a layer keeps at least one block, but this one keeps none"));
        }
        let panels = block_panels(&blocks, narrow, wide);
        Ok(Self { narrow, wide, shape: Shape::Blocks(blocks), rows: vec![0..narrow; wide], panels })
    }

    /// What `connections` keep of a layer of `narrow` = N and `wide` = W elements; `stream` tells apart the layers of a model
    /// whose random patterns share a seed.
    ///
    /// # Errors
    /// As [`Band::new`].
    pub fn of(connections: Connections, narrow: usize, wide: usize, stream: u64) -> Result<Self> {
        match connections {
            Connections::Band(bandwidth) => Self::new(narrow, wide, bandwidth),
            Connections::Pattern(pattern) => {
                check_axes(narrow, wide)?;
                Self::of_blocks(narrow, wide, Blocks::of(pattern, narrow, wide, stream))
            }
        }
    }

    /// The bandwidth whose band between `narrow` = N and `wide` = W elements comes nearest to a share of all connections;
    /// the smaller one of two that are equally near.
    ///
    /// # Errors
    /// [`Error::Usage`] for a share that does not lie between 0 and 1; as [`Band::new`].
    pub fn bandwidth_of_density(narrow: usize, wide: usize, density: f64) -> Result<usize> {
        if !(density > 0.0 && density < 1.0) {
            return Err(Error::usage(format!("a density lies between 0 and 1, but it is {density}")));
        }
        let count = |bandwidth| Band::new(narrow, wide, bandwidth).map(|band| band.count());
        // Counts grow with the bandwidth, and 2W keeps everything.
        let least_with = |kept: usize| -> Result<usize> {
            let (mut below, mut enough) = (0, 2 * wide);
            while enough - below > 1 {
                let middle = below + (enough - below) / 2;
                if count(middle)? < kept { below = middle } else { enough = middle }
            }
            Ok(enough)
        };
        let asked = density * (narrow * wide) as f64;
        let enough = least_with(asked.ceil() as usize)?;
        if enough == 1 {
            return Ok(1);
        }
        let (over, under) = (count(enough)? as f64 - asked, count(enough - 1)?);
        if over < asked - under as f64 { Ok(enough) } else { least_with(under) }
    }

    /// N, the narrow axis.
    pub fn narrow(&self) -> usize {
        self.narrow
    }

    /// W, the wide axis.
    pub fn wide(&self) -> usize {
        self.wide
    }

    /// The bandwidth, in wide elements, as given; 0 of blocks, which have none.
    pub fn bandwidth(&self) -> usize {
        match self.shape {
            Shape::Diagonal(bandwidth) => bandwidth,
            Shape::Blocks(_) => 0,
        }
    }

    /// The blocks that stand in the band's place.
    pub fn blocks(&self) -> Option<&Blocks> {
        match &self.shape {
            Shape::Diagonal(_) => None,
            Shape::Blocks(blocks) => Some(blocks),
        }
    }

    /// What it is called: `bandwidth 1024`, `56 of 128 blocks`.
    pub fn title(&self) -> String {
        match &self.shape {
            Shape::Diagonal(bandwidth) => format!("bandwidth {bandwidth}"),
            Shape::Blocks(blocks) => format!("{} of {} blocks", blocks.count(), blocks.down() * blocks.across()),
        }
    }

    /// Whether wide element j and narrow element i are connected.
    pub fn contains(&self, j: usize, i: usize) -> bool {
        let kept = self.blocks().is_none_or(|blocks| blocks.contains(j / BLOCK_ROWS, i / BLOCK_COLS));
        kept && j < self.wide && self.rows[j].contains(&i)
    }

    /// Narrow elements from the first to the last one connected to wide element j; a band connects all of them.
    pub fn row(&self, j: usize) -> Range<usize> {
        match &self.shape {
            Shape::Diagonal(_) => self.rows[j].clone(),
            Shape::Blocks(blocks) => span(blocks.row(j / BLOCK_ROWS), BLOCK_COLS, self.narrow),
        }
    }

    /// Narrow elements connected to wide element j among the columns of one of its panels.
    pub fn kept(&self, panel: &Panel, j: usize) -> Range<usize> {
        let end = panel.col_start + panel.cols;
        let start = self.rows[j].start.clamp(panel.col_start, end);
        start..self.rows[j].end.clamp(start, end)
    }

    /// Packed slots of wide element j: the connections that are multiplied for it, and those that are stored as zeros.
    pub fn row_slots(&self, j: usize) -> usize {
        self.panels.iter().filter(|panel| panel.row_range().contains(&j)).map(|panel| panel.cols).sum()
    }

    /// How many wide elements are connected to narrow element i.
    pub fn column_len(&self, i: usize) -> usize {
        match &self.shape {
            Shape::Diagonal(_) => self.column(i).len(),
            Shape::Blocks(blocks) => {
                blocks.column(i / BLOCK_COLS).map(|row| part(row, BLOCK_ROWS, self.wide).len()).sum()
            }
        }
    }

    /// Wide elements from the first to the last one connected to narrow element i; a band connects all of them.
    pub fn column(&self, i: usize) -> Range<usize> {
        let bandwidth = match &self.shape {
            Shape::Diagonal(bandwidth) => *bandwidth,
            Shape::Blocks(blocks) => return span(blocks.column(i / BLOCK_COLS), BLOCK_ROWS, self.wide),
        };
        let (i, n, w) = (i as i64, self.narrow as i64, self.wide as i64);
        let reach = bandwidth.min(2 * self.wide) as i64;
        // |j - i*W/N| <= reach/2  <=>  (2iW - reach*N) / 2N <= j <= (2iW + reach*N) / 2N
        interval(div_ceil(2 * i * w - reach * n, 2 * n), (2 * i * w + reach * n).div_euclid(2 * n), w)
    }

    /// Wide elements connected to any of these narrow ones, of a band.
    pub fn rows_of(&self, columns: Range<usize>) -> Range<usize> {
        // Ranges move down column by column.
        let mut touched = columns.map(|i| self.column(i)).filter(|rows| !rows.is_empty());
        let Some(first) = touched.next() else { return 0..0 };
        let end = touched.next_back().map_or(first.end, |last| last.end);
        first.start..end
    }

    /// The panels, by ascending wide row.
    pub fn panels(&self) -> &[Panel] {
        &self.panels
    }

    /// The panels of a band as they would be with other constants than [`PANEL_ROWS`] and [`ALIGN`], for files packed with
    /// those; of blocks there are none but their own.
    ///
    /// # Panics
    /// When a constant is 0: a fault of the caller.
    pub fn panels_with(&self, panel_rows: usize, align: usize) -> Vec<Panel> {
        match self.shape {
            Shape::Diagonal(_) => panels(&self.rows, panel_rows, align),
            Shape::Blocks(_) => self.panels.clone(),
        }
    }

    /// Elements of the packed buffer, window padding included.
    pub fn packed_len(&self) -> usize {
        self.panels.last().map_or(0, |panel| panel.offset + panel.len())
    }

    /// Connections that exist.
    pub fn count(&self) -> usize {
        let of_panel = |panel: &Panel| panel.row_range().map(|j| self.kept(panel, j).len()).sum::<usize>();
        self.panels.iter().map(of_panel).sum()
    }

    /// Share of the dense layer's connections that exist, 0..=1.
    pub fn density(&self) -> f64 {
        self.count() as f64 / (self.narrow * self.wide) as f64
    }

    /// Whether the band keeps every connection.
    pub fn cuts_nothing(&self) -> bool {
        self.count() == self.narrow * self.wide
    }

    /// For each tile of [`COLUMN_TILE`] narrow columns, the panels from the first to the last one whose window touches it:
    /// what a contraction onto that tile has to visit (of blocks, some of them).
    pub fn column_tiles(&self) -> Vec<Range<usize>> {
        (0..self.narrow)
            .step_by(COLUMN_TILE)
            .map(|start| {
                let end = (start + COLUMN_TILE).min(self.narrow);
                let touches = |p: &Panel| !p.is_empty() && p.col_start < end && p.col_start + p.cols > start;
                let first = self.panels.iter().position(touches).unwrap_or(0);
                let last = self.panels.iter().rposition(touches).map_or(first, |last| last + 1);
                first..last
            })
            .collect()
    }

    /// The columns that any row of a panel touches: its window without the rounding to [`ALIGN`].
    pub fn window(&self, panel: &Panel) -> Range<usize> {
        match self.shape {
            Shape::Diagonal(_) => window(&self.rows[panel.row_range()]),
            Shape::Blocks(_) => panel.col_start..(panel.col_start + panel.cols).min(self.narrow),
        }
    }

    /// The (row j, column i) that packed slot `slot` of `panel` means; `None` for a slot outside the exact band.
    pub fn slot(&self, panel: &Panel, slot: usize) -> Option<(usize, usize)> {
        let (j, i) = (panel.row_start + slot / panel.cols, panel.col_start + slot % panel.cols);
        self.rows[j].contains(&i).then_some((j, i))
    }

    /// The whole geometry as one buffer of 32-bit words for the kernels:
    ///
    /// | words | meaning |
    /// |---|---|
    /// | 0..8 | N, W, panels, [`PANEL_ROWS`], column tiles, [`COLUMN_TILE`], offset of the rows, offset of the tiles |
    /// | 8.. | per panel: row_start, rows, col_start, cols, offset |
    /// | rows.. | per wide row: first column, end column of the exact band; of blocks 0 and N |
    /// | tiles.. | per column tile: first panel, end panel |
    ///
    /// Of blocks, panels 2k and 2k + 1 are those of block k.
    pub fn table(&self) -> Vec<u32> {
        let tiles = self.column_tiles();
        let rows_at = 8 + 5 * self.panels.len();
        let tiles_at = rows_at + 2 * self.wide;
        let header =
            [self.narrow, self.wide, self.panels.len(), PANEL_ROWS, tiles.len(), COLUMN_TILE, rows_at, tiles_at];
        let panels = self.panels.iter().flat_map(|p| [p.row_start, p.rows, p.col_start, p.cols, p.offset]);
        let ranges = self.rows.iter().chain(&tiles).flat_map(|range| [range.start, range.end]);
        header.into_iter().chain(panels).chain(ranges).map(|word| word as u32).collect()
    }

    /// Packs a dense matrix, dropping what lies outside the band.
    ///
    /// # Panics
    /// When `dense` does not hold N*W and `packed` not [`Band::packed_len`] elements: a fault of the caller.
    pub fn pack<T: Copy + Default>(&self, dense: &[T], layout: Dense, packed: &mut [T]) {
        assert_eq!((dense.len(), packed.len()), (self.narrow * self.wide, self.packed_len()));
        for panel in &self.panels {
            for (slot, value) in packed[panel.offset..][..panel.len()].iter_mut().enumerate() {
                *value = match self.slot(panel, slot) {
                    Some((j, i)) => dense[self.dense_index(layout, j, i)],
                    None => T::default(),
                };
            }
        }
    }

    /// Unpacks into a dense matrix; connections outside the band become 0.
    ///
    /// # Panics
    /// As [`Band::pack`].
    pub fn unpack<T: Copy + Default>(&self, packed: &[T], layout: Dense, dense: &mut [T]) {
        assert_eq!((dense.len(), packed.len()), (self.narrow * self.wide, self.packed_len()));
        dense.fill(T::default());
        for panel in &self.panels {
            for (slot, value) in packed[panel.offset..][..panel.len()].iter().enumerate() {
                if let Some((j, i)) = self.slot(panel, slot) {
                    dense[self.dense_index(layout, j, i)] = *value;
                }
            }
        }
    }

    fn dense_index(&self, layout: Dense, j: usize, i: usize) -> usize {
        match layout {
            Dense::WideByNarrow => j * self.narrow + i,
            Dense::NarrowByWide => i * self.wide + j,
        }
    }

    /// The band drawn with characters, at most `width` columns: the narrow axis runs right, the wide axis down. A cell is
    /// `#` when all of it is kept, `+` when a part is, `.` when none is.
    pub fn ascii(&self, width: usize) -> String {
        let across = width.clamp(1, self.narrow);
        // A character is about twice as high as wide, and W/N times as many rows would not fit a screen.
        let down = (across / 2).clamp(1, self.wide);
        let mut picture = String::with_capacity((across + 1) * down);
        for y in 0..down {
            for x in 0..across {
                let (kept, all) = self.count_in(cell(y, down, self.wide), cell(x, across, self.narrow));
                picture.push(if kept == 0 {
                    '.'
                } else if kept == all {
                    '#'
                } else {
                    '+'
                });
            }
            picture.push('\n');
        }
        picture
    }

    /// The band as an SVG picture, one polygon along the exact ranges, or one for each block; light and dark pages both suit
    /// it.
    pub fn svg(&self) -> String {
        let (n, w) = (self.narrow, self.wide);
        let height = 320.0;
        let (sx, sy) = (height / n as f64, height / w as f64);
        let mut path = String::new();
        for (rows, cols) in self.rectangles() {
            let (x, y) = (cols.start as f64 * sx, rows.start as f64 * sy);
            let (width, height) = (cols.len() as f64 * sx, rows.len() as f64 * sy);
            // Writing to a String cannot fail.
            let _ = write!(path, "M{x:.3} {y:.3}h{width:.3}v{height:.3}H{x:.3}z");
        }
        let title = format!("N={n} W={w} {}: {:.2} % of the connections", self.title(), 100.0 * self.density());
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"-24 -24 368 368\" width=\"368\" height=\"368\" \
             font-family=\"sans-serif\" font-size=\"12\"><title>{title}</title>\
             <rect width=\"320\" height=\"320\" fill=\"#8884\"/><path d=\"{path}\" fill=\"#2b7de9\"/>\
             <text x=\"0\" y=\"-8\" fill=\"#888\">narrow axis i, {n}</text>\
             <text x=\"-8\" y=\"0\" fill=\"#888\" transform=\"rotate(90 -8 0)\">wide axis j, {w}</text></svg>\n"
        )
    }

    /// Rows and columns that are kept as wholes and together are everything: a band's rows, or the blocks.
    fn rectangles(&self) -> Vec<(Range<usize>, Range<usize>)> {
        match &self.shape {
            Shape::Diagonal(_) => {
                let rows = self.rows.iter().enumerate().filter(|(_, row)| !row.is_empty());
                rows.map(|(j, row)| (j..j + 1, row.clone())).collect()
            }
            Shape::Blocks(blocks) => {
                let kept = (0..blocks.down()).flat_map(|row| blocks.row(row).map(move |col| (row, col)));
                kept.map(|(row, col)| (part(row, BLOCK_ROWS, self.wide), part(col, BLOCK_COLS, self.narrow))).collect()
            }
        }
    }

    /// Connections kept, and connections there are, in a rectangle.
    fn count_in(&self, rows: Range<usize>, cols: Range<usize>) -> (usize, usize) {
        let all = rows.len() * cols.len();
        let common = |row: &Range<usize>| row.end.min(cols.end).saturating_sub(row.start.max(cols.start));
        let of_row = |j: usize| match &self.shape {
            Shape::Diagonal(_) => common(&self.rows[j]),
            Shape::Blocks(blocks) => {
                blocks.row(j / BLOCK_ROWS).map(|col| common(&part(col, BLOCK_COLS, self.narrow))).sum()
            }
        };
        (rows.map(of_row).sum(), all)
    }
}

fn check_axes(narrow: usize, wide: usize) -> Result<()> {
    if narrow == 0 || wide < narrow || wide > MAX_AXIS {
        return Err(Error::usage(format!(
            "a band needs 1 <= N <= W <= {MAX_AXIS}, but N (narrow) is {narrow} and W (wide) is {wide}"
        )));
    }
    Ok(())
}

/// Part `index` of an axis that is cut into parts of `size`.
fn part(index: usize, size: usize, axis: usize) -> Range<usize> {
    index * size..((index + 1) * size).min(axis)
}

/// From the start of the first to the end of the last of these parts of an axis; 0..0 when there is none.
fn span(mut parts: impl DoubleEndedIterator<Item = usize>, size: usize, axis: usize) -> Range<usize> {
    let Some(first) = parts.next() else { return 0..0 };
    part(first, size, axis).start..part(parts.next_back().unwrap_or(first), size, axis).end
}

/// Part `index` of `parts` of an axis.
fn cell(index: usize, parts: usize, axis: usize) -> Range<usize> {
    index * axis / parts..(index + 1) * axis / parts
}

/// Narrow elements of wide element j: (2jN - reach*N) / 2W <= i <= (2jN + reach*N) / 2W.
fn columns_of_row(j: i64, n: i64, w: i64, reach: i64) -> Range<usize> {
    interval(div_ceil(2 * j * n - reach * n, 2 * w), (2 * j * n + reach * n).div_euclid(2 * w), n)
}

/// The closed interval [first, last] cut to [0, axis), as a range; empty ranges start where they would lie.
fn interval(first: i64, last: i64, axis: i64) -> Range<usize> {
    let start = first.clamp(0, axis);
    let end = (last + 1).clamp(start, axis);
    start as usize..end as usize
}

/// Division rounded towards positive infinity, for a positive divisor.
fn div_ceil(a: i64, b: i64) -> i64 {
    -(-a).div_euclid(b)
}

/// The columns that any of these rows touches; 0..0 when none touches one.
fn window(rows: &[Range<usize>]) -> Range<usize> {
    // Ranges move to the right row by row, so the first and the last that are not empty span all of them.
    let mut touched = rows.iter().filter(|row| !row.is_empty());
    let Some(first) = touched.next() else { return 0..0 };
    first.start..touched.next_back().unwrap_or(first).end
}

/// Cuts the wide axis into panels of `panel_rows` rows and finds each panel's window, rounded to `align` columns.
fn panels(rows: &[Range<usize>], panel_rows: usize, align: usize) -> Vec<Panel> {
    let mut offset = 0;
    rows.chunks(panel_rows)
        .enumerate()
        .map(|(index, chunk)| {
            let window = window(chunk);
            let col_start = window.start / align * align;
            let cols = window.end.next_multiple_of(align) - col_start;
            let panel = Panel { row_start: index * panel_rows, rows: chunk.len(), col_start, cols, offset };
            offset += panel.len();
            panel
        })
        .collect()
}

/// The two panels of each block.
fn block_panels(blocks: &Blocks, narrow: usize, wide: usize) -> Vec<Panel> {
    let kept = (0..blocks.down()).flat_map(|row| blocks.row(row).map(move |col| (row, col)));
    let halves = kept.flat_map(|(row, col)| {
        let (rows, cols) = (part(row, BLOCK_ROWS, wide), part(col, BLOCK_COLS, narrow));
        let middle = (rows.start + PANEL_ROWS).min(rows.end);
        [(rows.start..middle, cols.clone()), (middle..rows.end, cols)]
    });
    let mut offset = 0;
    halves
        .map(|(rows, cols)| {
            let (col_start, cols) = (cols.start, cols.len().next_multiple_of(ALIGN));
            let panel = Panel { row_start: rows.start, rows: rows.len(), col_start, cols, offset };
            offset += panel.len();
            panel
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, in exact rational arithmetic: |j*N - i*W| * 2 <= bandwidth * N.
    fn connected(n: usize, w: usize, bandwidth: usize, j: usize, i: usize) -> bool {
        2 * ((j * n) as i128 - (i * w) as i128).abs() <= (bandwidth * n) as i128
    }

    #[test]
    fn counts_at_512_are_the_designs() {
        for (bandwidth, count) in [(1024, 459_136), (512, 246_208), (256, 127_456)] {
            assert_eq!(Band::new(512, 2048, bandwidth).unwrap().count(), count);
        }
        assert!((Band::new(512, 2048, 2048).unwrap().density() - 0.7502).abs() < 5e-5);
    }

    #[test]
    fn packed_memory_is_at_most_1_15_times_the_band() {
        let band = Band::new(512, 2048, 1024).unwrap();
        let ratio = band.packed_len() as f64 / band.count() as f64;
        assert!(ratio <= 1.15, "{ratio}");
    }

    #[test]
    fn windows_are_aligned_for_sixteen_byte_loads() {
        let band = Band::new(512, 2048, 512).unwrap();
        for panel in band.panels() {
            assert!(panel.col_start % ALIGN == 0 && panel.cols % ALIGN == 0 && panel.offset % ALIGN == 0);
        }
    }

    #[test]
    fn the_bandwidth_of_a_density_is_the_nearest() {
        let density = |bandwidth| Band::new(24, 96, bandwidth).unwrap().density();
        for asked in [0.001, 0.1, 0.43787, 0.7, 0.999] {
            let found = Band::bandwidth_of_density(24, 96, asked).unwrap();
            let nearest = (1..=192).map(|bandwidth| (density(bandwidth) - asked).abs()).fold(f64::INFINITY, f64::min);
            assert_eq!((density(found) - asked).abs(), nearest, "{asked}");
        }
        assert_eq!(Band::bandwidth_of_density(512, 2048, 0.43787).unwrap(), 1024);
        assert!(Band::bandwidth_of_density(24, 96, 1.0).is_err() && Band::bandwidth_of_density(24, 96, 0.0).is_err());
    }

    #[test]
    fn a_bandwidth_of_one_connects_the_diagonal_only() {
        let band = Band::new(8, 32, 1).unwrap();
        for j in 0..32 {
            assert_eq!(band.row(j).len(), usize::from(j % 4 == 0), "row {j}");
        }
    }

    #[test]
    fn a_huge_bandwidth_keeps_everything() {
        let band = Band::new(7, 9, usize::MAX).unwrap();
        assert!(band.cuts_nothing());
        assert_eq!(band.column(3), 0..9);
    }

    #[test]
    fn what_is_no_band_is_refused() {
        for (n, w, bandwidth) in [(4, 16, 0), (0, 4, 1), (8, 7, 1), (4, MAX_AXIS + 1, 1)] {
            assert!(Band::new(n, w, bandwidth).is_err(), "{n} {w} {bandwidth}");
        }
    }

    #[test]
    fn pictures_show_the_diagonal() {
        let band = Band::new(16, 64, 8).unwrap();
        let picture = band.ascii(16);
        assert_eq!(picture.lines().count(), 8);
        assert!(picture.lines().next().unwrap().starts_with('+'), "{picture}");
        assert!(picture.lines().next().unwrap().ends_with('.'), "{picture}");
        assert!(band.svg().contains("<path d=\"M0.000 0.000h"));
    }

    /// Blocks by lot: each has a bit of `lots`, again and again; and the last one.
    fn some_blocks(n: usize, w: usize, lots: u64) -> Blocks {
        let mut blocks = Blocks::none(n, w);
        let (down, across) = (blocks.down(), blocks.across());
        for index in (0..down * across).filter(|&index| lots.rotate_right(index as u32) & 1 == 1) {
            blocks.keep(index / across, index % across);
        }
        blocks.keep(down - 1, across - 1);
        blocks
    }

    #[test]
    fn blocks_say_their_exact_density() {
        let of = |text: &str, n, w| Band::of(Connections::Pattern(text.parse().unwrap()), n, w, 0).unwrap();
        for text in ["random:0.438", "strided:0.438:"] {
            let band = of(text.trim_end_matches(':'), 512, 2048);
            assert_eq!((band.count(), band.packed_len()), (56 * 128 * 64, 56 * 128 * 64));
            assert_eq!((band.density(), band.title()), (0.4375, "56 of 128 blocks".to_string()));
        }
        // Rows and columns that make no whole block: one for each row and column at least.
        let band = of("strided:0.1", 70, 140);
        assert_eq!(band.count(), 128 * 64 + 12 * 6);
        assert!(of("random:0.9", 30, 60).cuts_nothing());
    }

    #[test]
    fn blocks_of_another_layer_are_refused() {
        assert!(Band::of_blocks(64, 128, Blocks::none(64, 129)).is_err());
        assert!(Band::of_blocks(64, 63, Blocks::none(64, 63)).is_err());
        assert!(Band::of_blocks(64, 128, Blocks::none(64, 128)).is_err());
    }

    #[test]
    fn pictures_show_blocks() {
        let mut blocks = Blocks::none(256, 512);
        [(0, 0), (1, 2), (3, 3)].into_iter().for_each(|(row, col)| blocks.keep(row, col));
        let band = Band::of_blocks(256, 512, blocks).unwrap();
        assert_eq!(band.ascii(8), "##......\n....##..\n........\n......##\n");
        assert!(
            band.svg().contains("<path d=\"M0.000 0.000h80.000v80.000H0.000zM160.000 80.000h80.000v80.000H160.000z")
        );
        assert!(band.svg().contains("3 of 16 blocks: 18.75 %"));
    }

    proptest! {
        #[test]
        fn every_connection_of_blocks_has_one_slot(n in 1usize..200, extra in 0usize..500, lots: u64) {
            let w = n + extra;
            let blocks = some_blocks(n, w, lots);
            let band = Band::of_blocks(n, w, blocks.clone()).unwrap();
            let mut seen = vec![0; n * w];
            let mut end = 0;
            for (index, panel) in band.panels().iter().enumerate() {
                prop_assert_eq!(panel.offset, end);
                end += panel.len();
                prop_assert_eq!(panel.row_start / BLOCK_ROWS, band.panels()[index / 2 * 2].row_start / BLOCK_ROWS);
                prop_assert_eq!(panel.col_start, band.panels()[index / 2 * 2].col_start);
                for (slot, kept) in (0..panel.len()).map(|slot| (slot, band.slot(panel, slot))) {
                    let (j, i) = (panel.row_start + slot / panel.cols, panel.col_start + slot % panel.cols);
                    prop_assert_eq!(kept, band.kept(panel, j).contains(&i).then_some((j, i)));
                    if let Some((j, i)) = kept {
                        seen[j * n + i] += 1;
                    }
                }
            }
            prop_assert_eq!(band.packed_len(), end);
            for j in 0..w {
                for i in 0..n {
                    let expected = blocks.contains(j / BLOCK_ROWS, i / BLOCK_COLS);
                    prop_assert_eq!((seen[j * n + i], band.contains(j, i)), (usize::from(expected), expected));
                    prop_assert!(!expected || band.row(j).contains(&i) && band.column(i).contains(&j));
                }
            }
            prop_assert_eq!(band.count(), seen.iter().sum::<usize>());
            for i in 0..n {
                prop_assert_eq!(band.column_len(i), (0..w).filter(|j| band.contains(*j, i)).count());
            }
        }

        #[test]
        fn blocks_come_back_from_their_packing(n in 1usize..150, extra in 0usize..300, lots: u64) {
            let w = n + extra;
            let band = Band::of_blocks(n, w, some_blocks(n, w, lots)).unwrap();
            let dense: Vec<f32> = (1..=n * w).map(|k| k as f32).collect();
            for layout in [Dense::WideByNarrow, Dense::NarrowByWide] {
                let (mut packed, mut back) = (vec![f32::NAN; band.packed_len()], vec![f32::NAN; n * w]);
                band.pack(&dense, layout, &mut packed);
                band.unpack(&packed, layout, &mut back);
                for (k, value) in back.into_iter().enumerate() {
                    let (j, i) = if layout == Dense::WideByNarrow { (k / n, k % n) } else { (k % w, k / w) };
                    prop_assert_eq!(value, if band.contains(j, i) { dense[k] } else { 0.0 });
                }
            }
        }

        #[test]
        fn ranges_equal_the_formula(n in 1usize..40, extra in 0usize..120, bandwidth in 1usize..300) {
            let w = n + extra;
            let band = Band::new(n, w, bandwidth).unwrap();
            let mut count = 0;
            for j in 0..w {
                for i in 0..n {
                    let expected = connected(n, w, bandwidth, j, i);
                    count += usize::from(expected);
                    prop_assert_eq!(band.contains(j, i), expected, "row {} column {}", j, i);
                    prop_assert_eq!(band.column(i).contains(&j), expected, "column range of {}, row {}", i, j);
                }
            }
            prop_assert_eq!(band.count(), count);
        }

        #[test]
        fn packed_slots_cover_the_band_once(n in 1usize..70, extra in 0usize..200, bandwidth in 1usize..300) {
            let w = n + extra;
            let band = Band::new(n, w, bandwidth).unwrap();
            let mut seen = vec![0; n * w];
            for panel in band.panels() {
                for slot in 0..panel.len() {
                    if let Some((j, i)) = band.slot(panel, slot) {
                        seen[j * n + i] += 1;
                    }
                }
            }
            for j in 0..w {
                for i in 0..n {
                    prop_assert_eq!(seen[j * n + i], usize::from(connected(n, w, bandwidth, j, i)));
                }
            }
        }

        #[test]
        fn packing_and_unpacking_masks_and_nothing_else(n in 1usize..40, extra in 0usize..90, bandwidth in 1usize..200) {
            let w = n + extra;
            let band = Band::new(n, w, bandwidth).unwrap();
            let dense: Vec<f32> = (1..=n * w).map(|k| k as f32).collect();
            let mut packed = vec![f32::NAN; band.packed_len()];
            for (layout, at) in [
                (Dense::WideByNarrow, (|_, n, j, i| j * n + i) as fn(usize, usize, usize, usize) -> usize),
                (Dense::NarrowByWide, |w, _, j, i| i * w + j),
            ] {
                band.pack(&dense, layout, &mut packed);
                let mut back = vec![f32::NAN; n * w];
                band.unpack(&packed, layout, &mut back);
                for j in 0..w {
                    for i in 0..n {
                        let k = at(w, n, j, i);
                        let expected = if connected(n, w, bandwidth, j, i) { dense[k] } else { 0.0 };
                        prop_assert_eq!(back[k], expected);
                    }
                }
                let mut again = vec![f32::NAN; band.packed_len()];
                band.pack(&back, layout, &mut again);
                prop_assert_eq!(&again, &packed);
            }
        }

        #[test]
        fn the_table_tells_the_same_as_the_band(n in 1usize..200, extra in 0usize..300, bandwidth in 1usize..400) {
            let band = Band::new(n, n + extra, bandwidth).unwrap();
            let table: Vec<usize> = band.table().into_iter().map(|word| word as usize).collect();
            prop_assert_eq!(&table[..3], &[n, n + extra, band.panels().len()]);
            for (words, panel) in table[8..].chunks(5).zip(band.panels()) {
                prop_assert_eq!(words, &[panel.row_start, panel.rows, panel.col_start, panel.cols, panel.offset]);
            }
            for j in 0..band.wide() {
                prop_assert_eq!(table[table[6] + 2 * j]..table[table[6] + 2 * j + 1], band.row(j));
            }
            for (t, panels) in band.column_tiles().into_iter().enumerate() {
                prop_assert_eq!(table[table[7] + 2 * t]..table[table[7] + 2 * t + 1], panels.clone());
                let columns = t * COLUMN_TILE..((t + 1) * COLUMN_TILE).min(n);
                for (p, panel) in band.panels().iter().enumerate().filter(|(p, _)| !panels.contains(p)) {
                    for j in panel.row_range() {
                        let row = band.row(j);
                        prop_assert!(row.end.min(columns.end) <= row.start.max(columns.start), "panel {} tile {}", p, t);
                    }
                }
            }
        }
    }
}
