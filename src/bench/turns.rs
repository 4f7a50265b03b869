//! Pieces of work timed in turns, over sets of buffers that take turns too.

use crate::backend::Device;
use crate::error::Result;
use serde::Serialize;
use std::time::Instant;

/// The operands of an operation over all sets exceed this, more than the caches of today's graphics cards (72 MB on Ada, 50 MB
/// on Hopper): when a set's turn comes again, a cache has seen all others since, as it has in a training.
pub const ROTATION_BYTES: usize = 128 << 20;
/// Sets there are at most: in a training as small as to need more, a cache holds what is worked with, too.
const MOST_SETS: usize = 16;

/// Sets of buffers that take turns.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rotation {
    /// How many.
    pub sets: usize,
    /// Bytes of the operands of the operation that has the least, over all sets: so much passes before a run meets the
    /// operands of an earlier one.
    pub least_bytes: f64,
}

/// Bytes that sets of buffers take: for each set, and once for all of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Needed {
    pub set: f64,
    pub once: f64,
}

impl Needed {
    /// How many sets there is room for.
    fn sets_in(self, bytes: f64) -> usize {
        ((bytes - self.once) / self.set.max(1.0)) as usize
    }
}

/// How many sets of buffers exceed [`ROTATION_BYTES`] when an operation's operands take `operand_bytes` of one; fewer where half
/// of the device's free memory does not hold `all` of them, or a buffer not what sets share of the `largest` one.
///
/// # Errors
/// The device fails.
pub(super) fn rotation<D: Device>(
    device: &mut D,
    operand_bytes: f64,
    all: Needed,
    largest: Needed,
) -> Result<Rotation> {
    // Waiting gives back the memory that nothing uses any more.
    device.sync()?;
    let enough = (ROTATION_BYTES as f64 / operand_bytes.max(1.0)).floor() as usize + 1;
    let half_free = device.free_bytes().map_or(f64::INFINITY, |free| free as f64 / 2.0);
    let buffer = device.max_buffer_bytes().map_or(f64::INFINITY, |bytes| bytes as f64);
    let room = all.sets_in(half_free).min(largest.sets_in(buffer));
    let sets = enough.min(MOST_SETS).min(room).max(1);
    Ok(Rotation { sets, least_bytes: sets as f64 * operand_bytes })
}

/// The seconds that a run of each of `pieces` pieces of work takes, `repeats` samples of each. The pieces are run in turns, so that
/// all see the same state of the machine; `run` is told which piece it is and which of `sets` sets of buffers it works on.
///
/// # Errors
/// Whatever `run` returns; the device fails.
pub(super) fn in_turns<D: Device>(
    device: &mut D,
    repeats: usize,
    pieces: usize,
    sets: usize,
    mut run: impl FnMut(&mut D, usize, usize) -> Result<()>,
) -> Result<Vec<Vec<f64>>> {
    let mut set = vec![0; pieces];
    let mut sample = |device: &mut D, piece: usize, count: usize| -> Result<f64> {
        let start = Instant::now();
        for _ in 0..count {
            run(device, piece, set[piece])?;
            set[piece] = (set[piece] + 1) % sets;
        }
        device.sync()?;
        Ok(start.elapsed().as_secs_f64() / count as f64)
    };
    let mut counts = Vec::with_capacity(pieces);
    for piece in 0..pieces {
        // The first run compiles, the second tells how long one takes.
        sample(device, piece, 1)?;
        counts.push(runs_per_wait(sample(device, piece, 1)?, sets));
        if counts[piece] > 1 {
            // What is recorded a second time is made ready for being replayed from then on.
            sample(device, piece, counts[piece])?;
            sample(device, piece, counts[piece])?;
        }
    }
    let mut samples = vec![Vec::with_capacity(repeats); pieces];
    for _ in 0..repeats {
        for (piece, samples) in samples.iter_mut().enumerate() {
            samples.push(sample(device, piece, counts[piece])?);
        }
    }
    Ok(samples)
}

/// How often work that takes `seconds` is run before the device is waited for: a wait can take as long as a small kernel,
/// and a training does not wait for each. Whole rounds of the sets, so that the recorded work is the same each time.
fn runs_per_wait(seconds: f64, sets: usize) -> usize {
    const LEAST_SECONDS: f64 = 0.01;
    match seconds >= LEAST_SECONDS {
        true => 1,
        false => ((LEAST_SECONDS / seconds.max(1e-9)) as usize).clamp(1, 100).next_multiple_of(sets),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;

    #[test]
    fn sets_exceed_the_size_and_stay_within_memory() {
        let none = Needed { set: 0.0, once: 0.0 };
        let rotation = |operands, set, once| rotation(&mut Cpu::new(), operands, Needed { set, once }, none).unwrap();
        let sets = |operands, set| rotation(operands, set, 0.0).sets;
        assert_eq!((sets(ROTATION_BYTES as f64, 1.0), sets(ROTATION_BYTES as f64 / 4.5, 1.0)), (2, 5));
        assert_eq!((sets(0.0, 0.0), sets(1.0, 1e18)), (MOST_SETS, 1));
        assert_eq!(rotation(1e8, 1.0, 1e18), Rotation { sets: 1, least_bytes: 1e8 });
        assert_eq!(Needed { set: 10.0, once: 25.0 }.sets_in(60.0), 3);
    }

    #[test]
    fn short_work_runs_over_every_set_as_often() {
        assert_eq!((runs_per_wait(0.02, 7), runs_per_wait(0.01, 7)), (1, 1));
        assert_eq!((runs_per_wait(0.0026, 7), runs_per_wait(1e-5, 7), runs_per_wait(0.0, 16)), (7, 105, 112));
    }

    #[test]
    fn pieces_take_turns_and_so_do_their_sets() {
        let mut seen = vec![Vec::new(); 2];
        let times = in_turns(&mut Cpu::new(), 3, 2, 3, |_, piece, set| {
            seen[piece].push(set);
            std::thread::sleep(std::time::Duration::from_millis(11));
            Ok(())
        });
        let times = times.unwrap();
        assert!(times.iter().all(|samples| samples.len() == 3 && samples.iter().all(|&seconds| seconds >= 0.011)));
        assert_eq!(seen, [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]);
    }
}
