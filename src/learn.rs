//! Learned blocks: which ones a training drops and which it grows in their place, by RigL's rule (Evci et al. 2020, "Rigging the
//! Lottery: Making All Tickets Winners", algorithm 1) with blocks for its connections.
//!
//! Of a layer's n kept blocks the f(t) n of least weight norm are dropped, and as many of the largest gradient norm are grown
//! among all those that are not kept then, so that the density stays. As there, what was just dropped may be grown at once: it then
//! stays as it was. Rows and columns of blocks may come to have none; their biases remain, and blocks may grow there again.

use crate::band::Dense;
use crate::blocks::{BLOCK_COLS, BLOCK_ROWS, Blocks, grid};
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// When blocks are exchanged, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LearnRule {
    /// Steps between exchanges; 0 exchanges none.
    pub every: u64,
    /// The share of a layer's blocks that an exchange at the beginning would drop, 0..1.
    pub fraction: f64,
    /// The step from which blocks stay as they are.
    pub until: u64,
}

impl LearnRule {
    /// A rule, with defaults for what is not given: every 100 steps, 0.3, and three quarters of a training of `steps` steps.
    pub fn new(every: Option<u64>, fraction: Option<f64>, until: Option<u64>, steps: u64) -> Self {
        let most = steps - steps / 4;
        Self { every: every.unwrap_or(100), fraction: fraction.unwrap_or(0.3), until: until.unwrap_or(most) }
    }

    /// Whether blocks are exchanged after this step.
    pub fn is_due(&self, step: u64) -> bool {
        self.every > 0 && step.is_multiple_of(self.every) && step < self.until
    }

    /// Whether blocks may be exchanged after a later step than this.
    pub fn goes_on_after(&self, step: u64) -> bool {
        self.every > 0 && step < self.until
    }

    /// The share of blocks dropped after a step: f/2 (1 + cos(pi t / T)), from f at the beginning to 0 at the end.
    pub fn fraction_after(&self, step: u64) -> f64 {
        let done = if step < self.until { step as f64 / self.until as f64 } else { 1.0 };
        self.fraction / 2.0 * (1.0 + (PI * done).cos())
    }
}

/// The blocks after an exchange of a share of them, rounded to whole ones. Norms are given of all blocks, by rows; of equal ones the
/// first counts as the better.
///
/// # Panics
/// When norms are missing: a fault of the caller.
pub fn exchanged(blocks: &Blocks, fraction: f64, weight_norms: &[f64], gradient_norms: &[f64]) -> Blocks {
    let count = (fraction * blocks.count() as f64).round() as usize;
    let mut exchanged = blocks.clone();
    let kept = exchanged.flags_mut();
    assert!(weight_norms.len() == kept.len() && gradient_norms.len() == kept.len(), "a block has no norm");
    let mut least: Vec<usize> = (0..kept.len()).filter(|&index| kept[index]).collect();
    least.sort_unstable_by(|&a, &b| weight_norms[a].total_cmp(&weight_norms[b]).then(b.cmp(&a)));
    least.into_iter().take(count).for_each(|index| kept[index] = false);
    let mut largest: Vec<usize> = (0..kept.len()).filter(|&index| !kept[index]).collect();
    largest.sort_unstable_by(|&a, &b| gradient_norms[b].total_cmp(&gradient_norms[a]).then(a.cmp(&b)));
    largest.into_iter().take(count).for_each(|index| kept[index] = true);
    exchanged
}

/// The norm of each block, by rows, of a dense matrix of N = `narrow` and W = `wide` elements.
///
/// # Panics
/// When the matrix does not hold N*W elements: a fault of the caller.
pub fn block_norms(matrix: &[f32], layout: Dense, narrow: usize, wide: usize) -> Vec<f64> {
    assert_eq!(matrix.len(), narrow * wide);
    let (down, across) = grid(narrow, wide);
    let mut squares = vec![0.0; down * across];
    let (cols, row_size, col_size) = match layout {
        Dense::WideByNarrow => (narrow, BLOCK_ROWS, BLOCK_COLS),
        Dense::NarrowByWide => (wide, BLOCK_COLS, BLOCK_ROWS),
    };
    for (row, values) in matrix.chunks(cols).enumerate() {
        for (part, values) in values.chunks(col_size).enumerate() {
            let (j, i) = match layout {
                Dense::WideByNarrow => (row / row_size, part),
                Dense::NarrowByWide => (part, row / row_size),
            };
            squares[j * across + i] += values.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>();
        }
    }
    squares.into_iter().map(f64::sqrt).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn blocks(text: &str) -> Blocks {
        Blocks::from_text(text, 192, 256).unwrap()
    }

    #[test]
    fn the_least_weights_go_and_the_largest_gradients_come() {
        let weights = [5.0, 1.0, 0.0, 2.0, 0.0, 4.0];
        let gradients = [9.0, 0.0, 1.0, 0.0, 2.0, 9.0];
        let of = |fraction| exchanged(&blocks("110 101"), fraction, &weights, &gradients).to_text();
        assert_eq!(of(0.0), "110 101");
        // One of four: block 1 for block 4.
        assert_eq!(of(0.25), "100 111");
        assert_eq!(of(0.37), "100 111");
        // Two: blocks 1 and 3 for 4 and 2, of which the gradient is less than that of kept ones.
        assert_eq!(of(0.5), "101 011");
        // All of them: the kept ones of large gradients come back.
        assert_eq!(of(1.0), "101 011");
    }

    #[test]
    fn what_was_dropped_may_come_back() {
        let found =
            exchanged(&blocks("110 000"), 0.5, &[1.0, 2.0, 0.0, 0.0, 0.0, 0.0], &[7.0, 8.0, 3.0, 1.0, 1.0, 1.0]);
        assert_eq!(found.to_text(), "110 000");
    }

    #[test]
    fn of_equal_norms_the_first_is_the_better() {
        assert_eq!(exchanged(&blocks("011 110"), 0.5, &[1.0; 6], &[0.0; 6]).to_text(), "111 100");
    }

    #[test]
    fn the_share_falls_as_half_a_cosine() {
        let rule = LearnRule::new(Some(10), Some(0.4), None, 400);
        assert_eq!(
            (rule.until, LearnRule::new(None, None, None, 1000)),
            (300, LearnRule { every: 100, fraction: 0.3, until: 750 })
        );
        for (step, fraction) in [(0, 0.4), (100, 0.3), (150, 0.2), (200, 0.1), (300, 0.0), (500, 0.0)] {
            assert!((rule.fraction_after(step) - fraction).abs() < 1e-12, "{step}");
        }
        let due: Vec<u64> = (1..=400).filter(|&step| rule.is_due(step)).collect();
        assert_eq!((due.len(), due[0], due[28]), (29, 10, 290));
        assert!(rule.goes_on_after(299) && !rule.goes_on_after(300));
        let never = LearnRule::new(Some(0), None, Some(0), 400);
        assert!(
            (0..=400)
                .all(|step| !never.is_due(step) && !never.goes_on_after(step) && never.fraction_after(step) == 0.0)
        );
    }

    #[test]
    fn norms_are_those_of_blocks() {
        let (narrow, wide) = (70, 200);
        let value = |j: usize, i: usize| ((j * 7 + i * 3) % 11) as f32 - 5.0;
        let mut expected = [0.0; 4];
        for (j, i) in (0..wide).flat_map(|j| (0..narrow).map(move |i| (j, i))) {
            expected[j / 128 * 2 + i / 64] += f64::from(value(j, i)).powi(2);
        }
        let expected = expected.map(f64::sqrt).to_vec();
        let fc1: Vec<f32> = (0..narrow * wide).map(|k| value(k / narrow, k % narrow)).collect();
        let fc2: Vec<f32> = (0..narrow * wide).map(|k| value(k % wide, k / wide)).collect();
        assert_eq!(block_norms(&fc1, Dense::WideByNarrow, narrow, wide), expected);
        assert_eq!(block_norms(&fc2, Dense::NarrowByWide, narrow, wide), expected);
    }

    proptest! {
        #[test]
        fn the_count_stays_whatever_the_norms(
            density in 1u32..100, seed: u32, fraction in 0.0..1.0, norms in proptest::collection::vec(0u8..9, 2 * 8 * 4),
        ) {
            let pattern = format!("learned:0.{density:02}1:{seed}").parse().unwrap();
            let start = Blocks::of(pattern, 256, 1024, 0);
            let norms: Vec<f64> = norms.into_iter().map(f64::from).collect();
            let after = exchanged(&start, fraction, &norms[..32], &norms[32..]);
            prop_assert_eq!(after.count(), start.count());
            prop_assert!(after.count_beside(&start) as f64 <= fraction * start.count() as f64 + 0.5);
        }
    }
}
