//! The GELU after a product: fused by whoever can, else by `kernels/gelu.cu`.

use super::product::Matrix;
use super::{Cuda, Unit, args, unit};
use crate::backend::Arithmetic;

const THREADS: usize = 256;

/// The GELU that may follow a product, with where the values before it lie.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Gelu {
    /// None.
    None,
    /// The sum goes there, its GELU to the output.
    Forward(u64),
    /// The sum is multiplied with the derivative there.
    Backward(u64),
}

impl Cuda {
    /// The GELU by a kernel of its own, on a product's output.
    pub(super) fn unfused_gelu(&mut self, op: &'static str, out: Matrix, gelu: Gelu) {
        let (entry, pre) = match gelu {
            Gelu::None => return,
            Gelu::Forward(pre) => ("gelu_forward", pre),
            Gelu::Backward(pre) => ("gelu_backward", pre),
        };
        let count = out.rows * out.cols;
        let aligned = count.is_multiple_of(out.element.lanes());
        let pieces = if aligned { count / out.element.lanes() } else { count };
        let unit = self.unit("gelu", aligned);
        self.launch(op, &unit, entry, [pieces.div_ceil(THREADS), 1, 1], THREADS, 0, args![out.at, pre, count]);
    }
}

/// Every instantiation.
pub(super) fn units(arithmetic: Arithmetic) -> Vec<(Unit, &'static str, usize, usize)> {
    let of =
        |aligned| ["gelu_forward", "gelu_backward"].map(|entry| (unit("gelu", arithmetic, aligned), entry, THREADS, 0));
    [true, false].into_iter().flat_map(of).collect()
}
