//! The readable reference: every operation in f32 on host memory, one file per stem, threads by rayon.
//!
//! Work is divided into pieces of fixed size, whatever the number of threads, and every sum runs in a fixed order, so two
//! runs give the same bits. Long sums that are not products of matrices accumulate in f64.

mod adamw;
mod attention;
mod band;
mod embed;
pub mod gelu;
mod layernorm;
mod linear;
mod loss;
mod matrix;

use super::{Device, HeadDims, Role, SequenceDims, Write};
use crate::error::{Error, Result};
use crate::shapes::Span;
use rayon::prelude::*;

/// The CPU as a device.
#[derive(Debug, Default)]
pub struct Cpu;

impl Cpu {
    /// The CPU backend; always available.
    pub fn new() -> Self {
        Self
    }
}

impl Device for Cpu {
    type Buffer = Vec<f32>;
    type Tokens = Vec<u32>;
    type Pending = Vec<f32>;

    const SYNCHRONOUS: bool = true;

    fn description(&self) -> String {
        format!("CPU, {} threads", rayon::current_num_threads())
    }

    fn free_bytes(&self) -> Option<usize> {
        let mut system = sysinfo::System::new().ok()?;
        system.refresh_memory();
        // A container may use less than its machine has.
        let limit = system.cgroup_limits().map_or(u64::MAX, |limits| limits.total_memory.saturating_sub(limits.rss));
        usize::try_from(system.available_memory().min(limit)).ok()
    }

    fn element_bytes(&self, _role: Role) -> usize {
        size_of::<f32>()
    }

    fn scratch_bytes(&self, dims: HeadDims, sequence: SequenceDims) -> usize {
        let logits = loss::CHUNK_ROWS.min(dims.rows) * dims.vocab;
        let scores = rayon::current_num_threads() * 2 * attention::scratch_len(sequence);
        (logits.max(scores)) * size_of::<f32>()
    }

    fn alloc(&mut self, _role: Role, name: &str, len: usize) -> Result<Vec<f32>> {
        zeros(name, len)
    }

    fn alloc_tokens(&mut self, name: &str, len: usize) -> Result<Vec<u32>> {
        zeros(name, len)
    }

    fn upload(&mut self, buffer: &mut Vec<f32>, offset: usize, values: &[f32]) -> Result<()> {
        buffer[offset..offset + values.len()].copy_from_slice(values);
        Ok(())
    }

    fn upload_tokens(&mut self, buffer: &mut Vec<u32>, tokens: &[u32]) -> Result<()> {
        buffer[..tokens.len()].copy_from_slice(tokens);
        Ok(())
    }

    fn download(&mut self, buffer: &Vec<f32>, span: Span) -> Result<Vec<f32>> {
        Ok(buffer[span.range()].to_vec())
    }

    fn request(&mut self, buffer: &Vec<f32>, span: Span) -> Result<Vec<f32>> {
        self.download(buffer, span)
    }

    fn collect(&mut self, pending: Vec<f32>) -> Result<Vec<f32>> {
        Ok(pending)
    }

    fn sync(&mut self) -> Result<()> {
        Ok(())
    }
}

/// `len` zeros, or a sentence instead of an abort when the memory is not there.
fn zeros<T: Clone + Default>(name: &str, len: usize) -> Result<Vec<T>> {
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(len).map_err(|_| {
        let mib = (len as f64 * size_of::<T>() as f64) / f64::from(1 << 20);
        Error::Device(format!("out of memory: {name} needs {mib:.1} MiB; use a smaller batch (-b) or sequence (-t)"))
    })?;
    buffer.resize(len, T::default());
    Ok(buffer)
}

/// Rows a thread takes at once where rows are independent.
const ROW_CHUNK: usize = 64;

/// `sums[c] (+)= sum over rows of term(row)[c]`, where `term` adds one row's terms to its accumulators: partial sums over
/// chunks of [`ROW_CHUNK`] rows, added up in order and in f64.
fn sum_rows(sums: &mut [f32], rows: usize, write: Write, term: impl Fn(usize, &mut [f32]) + Sync) {
    let partials: Vec<Vec<f32>> = (0..rows.div_ceil(ROW_CHUNK))
        .into_par_iter()
        .map(|chunk| {
            let mut partial = vec![0.0; sums.len()];
            (chunk * ROW_CHUNK..((chunk + 1) * ROW_CHUNK).min(rows)).for_each(|row| term(row, &mut partial));
            partial
        })
        .collect();
    let mut totals = vec![0.0f64; sums.len()];
    for partial in &partials {
        totals.iter_mut().zip(partial).for_each(|(total, &value)| *total += f64::from(value));
    }
    for (sum, total) in sums.iter_mut().zip(totals) {
        *sum = match write {
            Write::Set => total as f32,
            Write::Add => (f64::from(*sum) + total) as f32,
        };
    }
}

/// Column sums of a matrix with `cols` columns: the gradient of a bias.
fn sum_columns(sums: &mut [f32], matrix: &[f32], rows: usize, write: Write) {
    let cols = sums.len();
    sum_rows(sums, rows, write, |row, partial| {
        partial.iter_mut().zip(&matrix[row * cols..][..cols]).for_each(|(sum, &value)| *sum += value);
    });
}

/// The sum of `values`, in f64, by chunks of fixed size added up in order.
fn sum_of(values: &[f32], term: impl Fn(f32) -> f64 + Sync) -> f64 {
    let partials: Vec<f64> =
        values.par_chunks(1 << 14).map(|chunk| chunk.iter().map(|&value| term(value)).sum()).collect();
    partials.iter().sum()
}
