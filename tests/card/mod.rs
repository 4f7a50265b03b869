//! The card that the CUDA backend's tests run on.

use crate::skip;
use bandtrain::backend::Arithmetic;
use bandtrain::backend::cuda::{self, Cuda, Options};

/// The card, or `None` with a visible line when there is none.
pub fn device(options: Options) -> Option<Cuda> {
    if !cuda::is_usable() {
        skip::skip("cuda", "this machine has no NVIDIA card with its driver, NVRTC and cuBLASLt");
        return None;
    }
    Some(Cuda::new(options).unwrap())
}

/// In this arithmetic.
pub fn of(arithmetic: Arithmetic) -> Options {
    Options { arithmetic, ..Options::default() }
}
