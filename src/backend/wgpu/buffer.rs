//! Device memory, and the parts of it that kernels are given.

use crate::error::{Error, Result};
use crate::shapes::{Span, TENSOR_ALIGN};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

/// Ids of buffers that no one holds any more: their bind groups are to be forgotten.
pub(super) type Graveyard = Arc<Mutex<Vec<u64>>>;

/// A buffer of f32 (or, for tokens, u32) in device memory. Clones are the same memory.
#[derive(Clone)]
pub struct Buffer(Rc<Inner>);

struct Inner {
    raw: wgpu::Buffer,
    id: u64,
    len: usize,
    name: String,
    graveyard: Graveyard,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.graveyard.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(self.id);
    }
}

impl Buffer {
    pub(super) fn new(raw: wgpu::Buffer, id: u64, len: usize, name: &str, graveyard: Graveyard) -> Self {
        Self(Rc::new(Inner { raw, id, len, name: name.to_string(), graveyard }))
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn name(&self) -> &str {
        &self.0.name
    }

    pub(super) fn raw(&self) -> &wgpu::Buffer {
        &self.0.raw
    }

    pub(super) fn id(&self) -> u64 {
        self.0.id
    }

    /// All of it.
    pub(super) fn all(&self) -> Span {
        Span { offset: 0, len: self.len() }
    }

    /// `span` of it to read.
    pub(super) fn read(&self, span: Span) -> Bind<'_> {
        Bind { buffer: self, span, writes: false }
    }

    /// `span` of it to write, and perhaps read.
    pub(super) fn write(&self, span: Span) -> Bind<'_> {
        Bind { buffer: self, span, writes: true }
    }

    /// Fails, as a fault of the caller, when `span` does not lie inside.
    pub(super) fn check(&self, span: Span) -> Result<()> {
        match span.offset.checked_add(span.len) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(Error::Internal(format!("{span:?} is not a part of {}, which has {}", self.name(), self.len()))),
        }
    }
}

/// A part of a buffer that a kernel reads or writes.
#[derive(Clone, Copy)]
pub(super) struct Bind<'a> {
    pub(super) buffer: &'a Buffer,
    pub(super) span: Span,
    pub(super) writes: bool,
}

/// The bind that holds `span`, starting where a binding may start, and where the span starts in it.
pub(super) fn aligned(span: Span) -> (Span, u32) {
    let at = span.offset % TENSOR_ALIGN;
    (Span { offset: span.offset - at, len: span.len + at }, at as u32)
}

/// Cuts `rows` rows, of at most `row_len` elements in any buffer, into chunks that fit a binding of `limit` elements and
/// start where a binding may: (first row, rows).
pub(super) fn row_chunks(rows: usize, row_len: usize, limit: usize) -> impl Iterator<Item = (usize, usize)> {
    let fitting = limit / row_len.max(1);
    let chunk = if fitting >= rows { rows } else { (fitting / TENSOR_ALIGN).max(1) * TENSOR_ALIGN };
    (0..rows).step_by(chunk.max(1)).map(move |first| (first, chunk.min(rows - first)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_all_rows_in_aligned_pieces() {
        assert_eq!(row_chunks(100, 10, 1000).collect::<Vec<_>>(), [(0, 100)]);
        assert_eq!(row_chunks(101, 10, 1000).collect::<Vec<_>>(), [(0, 64), (64, 37)]);
        assert_eq!(row_chunks(130, 10, 100).collect::<Vec<_>>(), [(0, 64), (64, 64), (128, 2)]);
        assert_eq!(row_chunks(0, 10, 100).count(), 0);
    }
}
