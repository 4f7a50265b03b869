//! Timing a backend's operations and whole steps: medians of repeated runs beside what the device itself can do.
//!
//! [`Ceilings`] are measured in the same run: how fast the device multiplies and how fast it moves memory. From them every
//! operation has a *floor*, the time below which no implementation gets on this device (see [`Work`]); the share of the
//! time that is floor says how much is left to gain.

mod ceilings;
mod groups;
mod kernels;
mod operations;
mod products;
mod step;
mod timed;
mod turns;
mod work;

pub use ceilings::Ceilings;
pub use groups::{Group, GroupTime};
pub use kernels::{BreakEven, BreakEvenOf, KernelTime, Kernels, OperationTime, Sizes, Timing, kernels};
pub use step::{StepTime, Steps, model_flops, step};
pub use turns::{ROTATION_BYTES, Rotation};
pub use work::{Stored, Work};

use crate::backend::{Device, Role};
use crate::error::Result;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A buffer of `len` small random values.
fn filled<D: Device>(device: &mut D, role: Role, name: &str, len: usize) -> Result<D::Buffer> {
    /// As many are drawn, and repeated; a power of two would repeat row by row.
    const DRAWN: usize = 1_000_003;
    let mut rng = ChaCha8Rng::seed_from_u64(len as u64);
    let drawn: Vec<f32> = (0..len.min(DRAWN)).map(|_| rng.random_range(-0.1..0.1)).collect();
    let mut buffer = device.alloc(role, name, len)?;
    for offset in (0..len).step_by(DRAWN) {
        device.upload(&mut buffer, offset, &drawn[..drawn.len().min(len - offset)])?;
    }
    Ok(buffer)
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_unstable_by(f64::total_cmp);
    samples[samples.len() / 2]
}
