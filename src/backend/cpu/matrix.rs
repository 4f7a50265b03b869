//! Products of strided matrices, through the `gemm` crates: the one of f32 by itself, since the others take a minute to build.

use gemm_common::Parallelism;

/// A matrix of f32 in borrowed memory: element (r, c) is `data[r * row_stride + c * col_stride]`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major matrix whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// When the memory is too short: a fault of the caller.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, row_stride), "a {rows}x{cols} matrix of stride {row_stride} overruns");
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The same matrix transposed; no element moves.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// A row-major matrix of f32 to be written.
pub struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// A row-major matrix whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// When the memory is too short: a fault of the caller.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, row_stride), "a {rows}x{cols} matrix of stride {row_stride} overruns");
        Self { data, rows, cols, row_stride }
    }
}

fn fits(len: usize, rows: usize, cols: usize, row_stride: usize) -> bool {
    rows == 0 || cols == 0 || (rows == 1 || row_stride >= cols) && (rows - 1) * row_stride + cols <= len
}

/// Whether a product may use all threads, or runs inside a thread that is one of them.
#[derive(Clone, Copy)]
pub enum Threads {
    /// All threads of the pool.
    All,
    /// The calling one.
    One,
}

/// What becomes of the values that stand in the output.
#[derive(Clone, Copy)]
pub enum Into {
    /// They are overwritten.
    Set,
    /// The product is added to them.
    Add,
}

/// `out = a b` or `out += a b`.
///
/// # Panics
/// When the shapes do not match: a fault of the caller.
#[allow(unsafe_code)]
pub fn multiply(out: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, into: Into, threads: Threads) {
    assert_eq!((out.rows, out.cols, a.cols), (a.rows, b.cols, b.rows), "shapes of a product do not match");
    if out.rows == 0 || out.cols == 0 {
        return;
    }
    let parallelism = match threads {
        Threads::All => Parallelism::Rayon(0),
        Threads::One => Parallelism::None,
    };
    let (read_out, alpha) = match into {
        Into::Set => (false, 0.0),
        Into::Add => (true, 1.0),
    };
    // SAFETY: the constructors of Mat and MatMut checked that every (row, column) lies inside the borrowed slice, the
    // shapes match, and `out` is borrowed mutably, so it overlaps neither `a` nor `b`.
    // Transposed, since the kernels want contiguous columns, which is what the rows of `out` are then.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            out.cols,
            out.rows,
            a.cols,
            out.data.as_mut_ptr(),
            out.row_stride as isize,
            1,
            read_out,
            b.data.as_ptr(),
            b.row_stride as isize,
            b.col_stride as isize,
            a.data.as_ptr(),
            a.row_stride as isize,
            a.col_stride as isize,
            alpha,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_follow_the_definition_in_every_orientation() {
        let (m, n, k) = (5, 7, 3);
        let a: Vec<f32> = (0..m * k).map(|v| v as f32 - 4.0).collect();
        let b: Vec<f32> = (0..n * k).map(|v| 0.5 * v as f32).collect();
        let mut expected = vec![1.0; m * n];
        for r in 0..m {
            for c in 0..n {
                expected[r * n + c] += (0..k).map(|i| a[r * k + i] * b[c * k + i]).sum::<f32>();
            }
        }
        let mut out = vec![1.0; m * n];
        let (a, b) = (Mat::new(&a, m, k, k), Mat::new(&b, n, k, k));
        multiply(MatMut::new(&mut out, m, n, n), a, b.t(), Into::Add, Threads::One);
        assert_eq!(out, expected);
        let mut transposed = vec![f32::NAN; m * n];
        multiply(MatMut::new(&mut transposed, n, m, m), b, a.t(), Into::Set, Threads::All);
        for r in 0..m {
            for c in 0..n {
                assert_eq!(transposed[c * m + r] + 1.0, expected[r * n + c]);
            }
        }
    }

    #[test]
    fn an_empty_inner_axis_gives_zeros() {
        let mut out = vec![f32::NAN; 6];
        multiply(
            MatMut::new(&mut out, 2, 3, 3),
            Mat::new(&[], 2, 0, 0),
            Mat::new(&[], 0, 3, 3),
            Into::Set,
            Threads::One,
        );
        assert_eq!(out, [0.0; 6]);
    }
}
