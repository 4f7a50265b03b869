//! Loss spikes: which updates are left out because their loss or gradient norm is out of line with those before.
//!
//! The rule is that of llm.c's outlier detector: a value's z-score is its distance from the mean of the last 128 values, itself
//! among them, in their standard deviations. Until a window is full nothing is judged.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Values that a z-score is computed over.
pub const WINDOW: usize = 128;
/// Updates with a loss or gradient that is not finite are left out this often in a row; then the training has diverged.
pub const MOST_NOT_FINITE: u64 = 10;

/// Which updates are left out. Both thresholds 0: none.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SpikeRule {
    /// Those whose loss has a z-score above this; 0 is off.
    pub loss_zscore: f64,
    /// Those whose gradient norm has a z-score above this; 0 is off.
    pub grad_zscore: f64,
}

impl SpikeRule {
    /// Whether any update may be left out.
    pub fn is_on(&self) -> bool {
        self.loss_zscore > 0.0 || self.grad_zscore > 0.0
    }
}

/// What an update deserves.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// To be made.
    Update,
    /// To be left out, for this reason.
    Skip(String),
    /// The training has diverged.
    Diverged,
}

/// The updates so far, as the next one is judged by them: part of a run's state.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Spikes {
    losses: Window,
    norms: Window,
    not_finite_in_a_row: u64,
    skipped: u64,
}

impl Spikes {
    /// Updates left out so far.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Judges an update by its loss and gradient norm, which join the windows when they are finite.
    pub fn judge(&mut self, rule: &SpikeRule, loss: f32, norm: f32) -> Verdict {
        let verdict = self.verdict(rule, loss, norm);
        self.skipped += u64::from(matches!(verdict, Verdict::Skip(_)));
        verdict
    }

    fn verdict(&mut self, rule: &SpikeRule, loss: f32, norm: f32) -> Verdict {
        if !(loss.is_finite() && norm.is_finite()) {
            self.not_finite_in_a_row += 1;
            return match rule.is_on() && self.not_finite_in_a_row <= MOST_NOT_FINITE {
                true => Verdict::Skip(format!("loss {loss}, gradient norm {norm}")),
                false => Verdict::Diverged,
            };
        }
        self.not_finite_in_a_row = 0;
        let (loss_zscore, grad_zscore) = (self.losses.push(loss), self.norms.push(norm));
        let above = |zscore: Option<f64>, most: f64| zscore.filter(|&zscore| most > 0.0 && zscore > most);
        if let Some(zscore) = above(loss_zscore, rule.loss_zscore) {
            return Verdict::Skip(format!("the loss's z-score is {zscore:.2}"));
        }
        match above(grad_zscore, rule.grad_zscore) {
            Some(zscore) => Verdict::Skip(format!("the gradient norm's z-score is {zscore:.2}")),
            None => Verdict::Update,
        }
    }
}

/// The last values, the oldest first.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
struct Window {
    values: VecDeque<f32>,
}

impl Window {
    /// Takes a value in, in a full window for the oldest; its z-score if the window was full.
    fn push(&mut self, value: f32) -> Option<f64> {
        let full = self.values.len() >= WINDOW;
        self.values.push_back(value);
        if !full {
            return None;
        }
        self.values.pop_front();
        // Anew each time, so that no rounding piles up: what is resumed computes the same.
        let values = || self.values.iter().map(|&value| f64::from(value));
        let mean = values().sum::<f64>() / WINDOW as f64;
        let variance = values().map(|value| (value - mean).powi(2)).sum::<f64>() / WINDOW as f64;
        let deviation = variance.sqrt();
        Some(if deviation > 0.0 { (f64::from(value) - mean) / deviation } else { 0.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: SpikeRule = SpikeRule { loss_zscore: 4.0, grad_zscore: 5.0 };

    /// Losses and norms of an ordinary training.
    fn ordinary(spikes: &mut Spikes, count: usize) {
        for index in 0..count {
            let wobble = (index * 7 % 13) as f32 / 13.0;
            assert_eq!(spikes.judge(&RULE, 3.0 + wobble, 1.0 + wobble), Verdict::Update, "{index}");
        }
    }

    #[test]
    fn a_spike_is_skipped_once_the_window_is_full() {
        let mut spikes = Spikes::default();
        ordinary(&mut spikes, WINDOW - 1);
        assert_eq!(spikes.clone().judge(&RULE, 30.0, 1.0), Verdict::Update, "the window is not full");
        ordinary(&mut spikes, 1);
        // One value far from 127 others that are nearly equal: sqrt(127) deviations from the mean.
        let Verdict::Skip(reason) = spikes.judge(&RULE, 300.0, 1.0) else { panic!("no spike") };
        assert_eq!(reason, "the loss's z-score is 11.27");
        let Verdict::Skip(reason) = spikes.judge(&RULE, 3.0, 9.0) else { panic!("no spike") };
        assert!(reason.starts_with("the gradient norm's z-score is 1"), "{reason}");
        assert_eq!(spikes.skipped(), 2);
        let off = SpikeRule { grad_zscore: 0.0, ..RULE };
        assert_eq!(spikes.judge(&off, 3.0, 900.0), Verdict::Update);
        assert_eq!(spikes.judge(&RULE, -300.0, 1.0), Verdict::Update, "a good surprise");
    }

    #[test]
    fn equal_values_are_no_spikes() {
        let mut spikes = Spikes::default();
        for _ in 0..2 * WINDOW {
            assert_eq!(spikes.judge(&RULE, 2.0, 1.0), Verdict::Update);
        }
    }

    #[test]
    fn what_is_not_finite_is_skipped_a_few_times() {
        let mut spikes = Spikes::default();
        assert_eq!(spikes.judge(&SpikeRule::default(), f32::NAN, 1.0), Verdict::Diverged);
        let mut spikes = Spikes::default();
        for _ in 0..2 {
            for _ in 0..MOST_NOT_FINITE {
                assert_eq!(spikes.judge(&RULE, 1.0, f32::INFINITY), Verdict::Skip("loss 1, gradient norm inf".into()));
            }
            ordinary(&mut spikes, 1);
        }
        for _ in 0..MOST_NOT_FINITE {
            spikes.judge(&RULE, f32::NAN, 1.0);
        }
        assert_eq!(spikes.judge(&RULE, f32::NAN, 1.0), Verdict::Diverged);
    }

    #[test]
    fn the_state_comes_back_bit_for_bit() {
        let mut spikes = Spikes::default();
        for index in 0..300u32 {
            spikes.judge(&RULE, 3.0 + 1.0 / (index as f32 + 0.7), f32::from_bits(index * 977 + 12345));
        }
        let text = serde_json::to_string(&spikes).unwrap();
        assert_eq!(serde_json::from_str::<Spikes>(&text).unwrap(), spikes);
    }
}
