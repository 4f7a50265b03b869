//! How far two computations of the same thing may differ: the one place where tolerances come from.
//!
//! A sum of n products in precision u (unit round-off) has, with overwhelming probability, a relative error below
//! lambda * sqrt(n) * u against the sum of absolute values (Higham & Mary 2019, "A new approach to probabilistic rounding
//! error analysis"). The roundings of a chain of sums are independent, so their errors add in quadrature: the chain errs
//! like one sum of as many terms. [`Tolerance`] carries that number; [`compare`] holds each
//! element against it, scaled with the element and with the tensor's root mean square (a cancelled sum keeps the error of
//! its terms), and names the worst one.

use crate::backend::Arithmetic;
use crate::config::GptConfig;

/// Unit round-off of f32.
pub const UNIT_F32: f64 = f32::EPSILON as f64 / 2.0;

/// lambda: with 4, one element in 15,000 would exceed its bound if every rounding were as large as it can be.
const LAMBDA: f64 = 4.0;

/// A relative tolerance with its derivation already done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance(pub f64);

impl Tolerance {
    /// The tolerance of a chain of sums of these lengths, in precision `unit`.
    pub fn of_sums(unit: f64, lengths: impl IntoIterator<Item = usize>) -> Self {
        Self(LAMBDA * unit * (lengths.into_iter().sum::<usize>() as f64).sqrt())
    }

    /// The same when the result besides goes through exponentials of arguments up to `argument` in magnitude, which a GPU
    /// may get wrong by 3 + 2 |x| ULP (WebGPU, "Accuracy of builtin functions"); a ULP is two round-offs.
    pub fn with_exp(self, argument: f64) -> Self {
        Self(self.0.hypot((3.0 + 2.0 * argument) * 2.0 * UNIT_F32))
    }

    /// The same when the result besides goes through GELU or its derivative. 1 + tanh(u), from exp(-2 |u|), is off by an
    /// exponential near |u| = 1 and a few quotients; where it cancels its error is one of 1, not of itself, and is
    /// multiplied with |x| up to 4, so it counts against the root mean square.
    pub fn with_gelu(self) -> Self {
        let Self(rest) = self.with_exp(2.0);
        Self(rest.hypot(16.0 * 2.0 * UNIT_F32))
    }

    /// The same when besides `count` values on the way are rounded with round-off `unit`, in factors of terms of the sums: the
    /// errors of the terms are independent, so relative to the sum's own size each rounding counts once, in quadrature.
    pub fn with_roundings(self, unit: f64, count: usize) -> Self {
        Self(self.0.hypot(LAMBDA * unit * (count as f64).sqrt()))
    }

    /// The same when the result is stored as an activation is: off by the round-off of itself at most.
    pub fn with_stored(self, arithmetic: Arithmetic) -> Self {
        Self(self.0 + arithmetic.stored_unit())
    }

    /// The tolerance of a model's forward pass over sequences of T tokens: every layer's five products and two
    /// LayerNorms, and the head.
    pub fn of_forward(unit: f64, config: &GptConfig, t: usize) -> Self {
        Self::of_sums(unit, forward_sums(config, t))
    }

    /// The tolerance of a parameter's gradient for M = `rows` tokens in sequences of T: the forward pass, the way back
    /// (each product's input gradient), and the parameter's own sum over the rows.
    pub fn of_gradient(unit: f64, config: &GptConfig, t: usize, rows: usize) -> Self {
        let there = forward_sums(config, t);
        let back = forward_sums(config, t).into_iter().chain([config.vocab_size]);
        Self::of_sums(unit, there.into_iter().chain(back).chain([rows]))
    }

    /// How far AdamW may carry a parameter in `steps` steps of `learning_rate` when its gradients err by `dg`, the first
    /// of them being `g1`.
    ///
    /// The second moment's root at step t is at least |g1| / sqrt(t) (for beta2 near 1), so one update of lr * m / sqrt(v)
    /// errs by at most 2.5 * lr * dg * sqrt(t) / |g1|: the quotient's two partial derivatives, with |m| / sqrt(v) <= 1.5.
    /// No update can be off by more than 3 lr, twice that bound.
    pub fn of_adamw(learning_rate: f64, steps: usize, g1: f64, dg: f64) -> f64 {
        let update = |t: usize| (2.5 * dg * (t as f64).sqrt() / g1.abs().max(f64::MIN_POSITIVE)).min(3.0);
        learning_rate * (1..=steps).map(update).sum::<f64>()
    }
}

/// Lengths of the sums a forward pass consists of.
fn forward_sums(config: &GptConfig, t: usize) -> Vec<usize> {
    let (c, w, hs) = (config.channels, config.mlp_width(), config.head_size());
    let layer = [c, c, hs, t, c, c, c, w];
    std::iter::repeat_n(layer, config.num_layers).flatten().chain([c, c]).collect()
}

/// The element that comes nearest to, or goes furthest beyond, its tolerance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Worst {
    /// Its index.
    pub index: usize,
    /// What was computed.
    pub actual: f64,
    /// What was expected.
    pub expected: f64,
    /// How far they may differ.
    pub allowed: f64,
}

impl Worst {
    /// Error over tolerance: at most 1 when all is well.
    pub fn ratio(&self) -> f64 {
        let error = (self.actual - self.expected).abs();
        if error == 0.0 {
            0.0
        } else if error.is_nan() {
            f64::INFINITY
        } else {
            error / self.allowed
        }
    }
}

impl std::fmt::Display for Worst {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Worst { index, actual, expected, allowed } = self;
        write!(
            f,
            "element {index}: {actual:e} where {expected:e} was expected, {:.2} of the tolerance {allowed:e}",
            self.ratio()
        )
    }
}

/// The worst element of `actual` against `expected`, with a tolerance for each.
///
/// # Panics
/// When the lengths differ: a fault of the caller.
pub fn worst(actual: &[f32], expected: &[f32], allowed: impl Fn(usize) -> f64) -> Worst {
    assert_eq!(actual.len(), expected.len(), "the lengths to compare differ");
    let at = |index: usize| Worst {
        index,
        actual: f64::from(actual[index]),
        expected: f64::from(expected[index]),
        allowed: allowed(index),
    };
    let zero = Worst { index: 0, actual: 0.0, expected: 0.0, allowed: 0.0 };
    (0..actual.len()).map(at).fold(zero, |worst, next| if next.ratio() > worst.ratio() { next } else { worst })
}

/// The worst element when each may err by the tolerance times its magnitude plus the tensor's root mean square.
pub fn compare(actual: &[f32], expected: &[f32], tolerance: Tolerance) -> Worst {
    compare_cancelled(actual, expected, tolerance, 0.0)
}

/// The same for a tensor that may cancel as a whole, so that its own root mean square tells nothing of the terms whose error
/// it keeps: `terms` is a lower bound of theirs.
pub fn compare_cancelled(actual: &[f32], expected: &[f32], tolerance: Tolerance, terms: f64) -> Worst {
    let bounds = cancelled_bounds(expected, tolerance, |_| terms);
    worst(actual, expected, |index| bounds[index])
}

/// How far each element may be from `expected` where it may cancel: as in [`compare_cancelled`], with a bound of its own.
pub fn cancelled_bounds(expected: &[f32], tolerance: Tolerance, terms: impl Fn(usize) -> f64) -> Vec<f64> {
    let rms = size(expected);
    let bound = |(index, &value): (usize, &f32)| tolerance.0 * (f64::from(value).abs() + rms.max(terms(index)));
    expected.iter().enumerate().map(bound).collect()
}

/// A lower bound of the size of the terms that cancel in attention's gradients of queries and keys, for the token `row` of a
/// sequence, the first being 0.
///
/// dQ = scale * sum over the keys of P (dP - delta) K, with dP = dout . V a sum of `head_size` products and delta its mean
/// over the keys, weighted with P. A single key has P = 1 and delta = dP: dQ is 0 and keeps the error of scale * dP * K,
/// whose root mean square is that of dout, V and K, times sqrt(head_size) for dP. Among n = `row` + 1 weights that add up to 1
/// the sum of squares is at least 1/n. dK is a sum over the queries from the n-th on, with Q for K: the i-th one's weight is 1/i on
/// average, and these squares add up to about 1/n, too.
pub fn cancelling_scores(dout: &[f32], values: &[f32], others: &[f32], head_size: usize, row: usize) -> f64 {
    let scale = 1.0 / (head_size as f64).sqrt();
    let dp = (head_size as f64).sqrt() * root_mean_square(dout) * root_mean_square(values);
    scale * dp * root_mean_square(others) / (row as f64 + 1.0).sqrt()
}

/// The root mean square of those values that are not zero: a result that is exactly zero had no terms (a row that a narrow
/// band leaves without connections), and tells nothing of how large terms are.
fn size(values: &[f32]) -> f64 {
    let count = values.iter().filter(|&&value| value != 0.0).count();
    root_mean_square(values) * (values.len() as f64 / count.max(1) as f64).sqrt()
}

/// sqrt(mean of squares).
pub fn root_mean_square(values: &[f32]) -> f64 {
    let sum: f64 = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    (sum / values.len().max(1) as f64).sqrt()
}

/// f(x + h d) - f(x - h d) for a sum f of outputs computed in floating point, with how far rounding may have carried it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// The difference.
    pub value: f64,
    /// What roundings may have added to it.
    pub noise: f64,
}

impl Difference {
    /// The difference of f = sum of `outputs * weights` between two points.
    ///
    /// An output errs by `tolerance` times its magnitude plus the root mean square of all; the errors of the outputs and
    /// of the two points are independent, so they add in quadrature. An output that is the same at both points does not
    /// depend on what was moved: whatever its error, it cancels.
    ///
    /// # Panics
    /// When the lengths differ: a fault of the caller.
    pub fn new(plus: &[f32], minus: &[f32], weights: &[f32], tolerance: Tolerance) -> Self {
        assert_eq!((plus.len(), minus.len()), (weights.len(), weights.len()), "outputs and weights differ in length");
        let rms = root_mean_square(plus);
        let (mut value, mut squares) = (0.0, 0.0);
        for ((&plus, &minus), &weight) in plus.iter().zip(minus).zip(weights).filter(|((plus, minus), _)| plus != minus)
        {
            let (plus, minus, weight) = (f64::from(plus), f64::from(minus), f64::from(weight));
            value += (plus - minus) * weight;
            squares += 2.0 * ((plus.abs().max(minus.abs()) + rms) * weight).powi(2);
        }
        Self { value, noise: tolerance.0 * squares.sqrt() }
    }
}

/// A directional derivative found from values of the function alone, with how far it may be off.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Slope {
    /// The derivative.
    pub value: f64,
    /// How far it may be off.
    pub error: f64,
}

impl Slope {
    /// The derivative at h = 0 of the function whose central differences are `difference(h)`.
    ///
    /// With D(h) = (f(h) - f(-h)) / 2h = f' + a h^2 + b h^4 + ..., Richardson's R(h) = (4 D(h) - D(2h)) / 3 errs by O(h^4).
    /// *Truncation*: from one halving of h to the next that error shrinks 16-fold, so R(2h) - R(h) is about 15 times the
    /// error of R(h); taken in full it leaves a margin, and a 16th of the difference before it guards against two values
    /// that agree by chance. *Round-off*: the noise of D(h) is that of the difference over 2h, and R adds 4/3 of one to
    /// 1/3 of another in quadrature. The first falls with h and the second grows: of the steps 1, 1/2, ... the one with
    /// the smallest sum is taken. Nothing in it depends on the derivative it will be compared with.
    pub fn along(mut difference: impl FnMut(f64) -> Difference) -> Self {
        const HALVINGS: i32 = 9;
        let central = |halvings: i32| {
            let h = 0.5f64.powi(halvings);
            let Difference { value, noise } = difference(h);
            Difference { value: value / (2.0 * h), noise: noise / (2.0 * h) }
        };
        let centrals: Vec<_> = (0..HALVINGS).map(central).collect();
        let extrapolate = |pair: &[Difference]| Difference {
            value: (4.0 * pair[1].value - pair[0].value) / 3.0,
            noise: (4.0 * pair[1].noise).hypot(pair[0].noise) / 3.0,
        };
        let extrapolated: Vec<_> = centrals.windows(2).map(extrapolate).collect();
        let slope = |three: &[Difference]| {
            let (last, before) = (three[2].value - three[1].value, three[1].value - three[0].value);
            Self { value: three[2].value, error: last.abs().max(before.abs() / 16.0) + three[2].noise }
        };
        extrapolated
            .windows(3)
            .map(slope)
            .min_by(|a, b| a.error.total_cmp(&b.error))
            .unwrap_or(Self { value: f64::NAN, error: f64::INFINITY })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_element_is_named() {
        let tolerance = Tolerance(1e-3);
        let worst = compare(&[1.0, 2.1, 3.0], &[1.0, 2.0, 3.0], tolerance);
        assert_eq!(worst.index, 1);
        assert!(worst.ratio() > 1.0);
        assert!(compare(&[1.0, 2.0], &[1.0, 2.0], tolerance).ratio() == 0.0);
    }

    #[test]
    fn a_tensor_that_cancels_keeps_the_error_of_its_terms_and_no_more() {
        let (error, tolerance) = ([1e-6], Tolerance(1e-5));
        assert!(compare(&error, &[0.0], tolerance).ratio() > 1.0);
        let terms = |row| cancelling_scores(&[1.0, -1.0], &[0.5, 0.5], &[2.0, -2.0], 2, row);
        assert!((terms(0) - 1.0).abs() < 1e-12 && (terms(3) - 0.5).abs() < 1e-12);
        let bounds = cancelled_bounds(&[0.0, 4.0, 0.0, 0.0], tolerance, |index| terms(index) * 8.0);
        let expected = [8.0, 4.0 + 8.0 / 2f64.sqrt(), 8.0 / 3f64.sqrt(), 4.0].map(|bound| bound * 1e-5);
        assert!(bounds.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{bounds:?}");
        let terms = terms(0);
        assert!(compare_cancelled(&error, &[0.0], tolerance, terms).ratio() < 1.0);
        assert!(compare_cancelled(&[1e-4], &[0.0], tolerance, terms).ratio() > 1.0);
        // Where little cancels the terms are no larger than the tensor, and nothing changes.
        assert_eq!(
            compare_cancelled(&[3.0, 4.1], &[3.0, 4.0], tolerance, 2.0),
            compare(&[3.0, 4.1], &[3.0, 4.0], tolerance)
        );
    }

    #[test]
    fn results_without_terms_do_not_count() {
        let tolerance = Tolerance(1e-3);
        let alone = compare(&[1.001, -1.0], &[1.0, -1.0], tolerance);
        let among_zeros = compare(&[0.0, 1.001, 0.0, 0.0, -1.0], &[0.0, 1.0, 0.0, 0.0, -1.0], tolerance);
        assert!((alone.ratio() - among_zeros.ratio()).abs() < 1e-9);
    }

    #[test]
    fn not_a_number_is_never_close() {
        assert!(compare(&[f32::NAN], &[1.0], Tolerance(1.0)).ratio() > 1.0);
    }

    #[test]
    fn a_vanishing_gradient_allows_a_full_update_and_a_clear_one_hardly_any() {
        assert_eq!(Tolerance::of_adamw(1e-3, 2, 0.0, 1e-9), 6e-3);
        assert!(Tolerance::of_adamw(1e-3, 1, 1.0, 1e-6) < 3e-9);
    }

    #[test]
    fn slopes_are_as_good_as_they_say_and_good() {
        for (function, slope) in [
            (f32::exp as fn(f32) -> f32, 0.5f64.exp()),
            (f32::tanh, 1.0 - 0.5f64.tanh().powi(2)),
            (|x| (8.0 * x).sin(), 8.0 * 4f64.cos()),
            (|x| 3.0 * x, 3.0),
        ] {
            let at = |h: f64| [function(0.5 + h as f32)];
            let found = Slope::along(|h| Difference::new(&at(h), &at(-h), &[1.0], Tolerance::of_sums(UNIT_F32, [1])));
            assert!((found.value - slope).abs() <= found.error, "{found:?}, not {slope}");
            assert!(found.error <= 2e-4 * slope.abs(), "{found:?}");
        }
    }
}
