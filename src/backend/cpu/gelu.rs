//! The tanh form of GELU, as GPT-2 uses it (Hendrycks & Gimpel 2016):
//! gelu(x) = x/2 * (1 + tanh(u)), u = sqrt(2/pi) * (x + 0.044715 x^3).
//! A product's epilogue on every backend, hence no operation of its own.

/// sqrt(2 / pi).
const SQRT_2_OVER_PI: f32 = 0.797_884_6;
/// The cubic term's factor.
const CUBIC: f32 = 0.044715;

/// exp(x) for x <= 0, within 2 ULP, without a branch or a call, so that loops over it become vector code: GELU is
/// evaluated 8*M*C times a layer and would otherwise outweigh the products. x = n ln 2 + r with |r| <= ln 2 / 2, and
/// exp(r) by its Taylor polynomial, whose remainder r^8/8! is below 6e-9.
#[inline]
fn exp_of_negative(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer that then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts, the first with so few bits that its product with n is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Below -87 the result would be subnormal; 1.6e-38 and 0 are the same to every sum it enters.
    let x = x.max(-87.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let taylor = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let power = taylor.into_iter().fold(0.0, |sum, coefficient| sum * r + coefficient);
    let exponent = rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    power * f32::from_bits(exponent)
}

/// tanh from exp(-2|x|), which neither overflows nor divides by zero, on any backend.
#[inline]
fn tanh(x: f32) -> f32 {
    let t = exp_of_negative(-2.0 * x.abs());
    ((1.0 - t) / (1.0 + t)).copysign(x)
}

/// GELU of x.
#[inline]
pub fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x)))
}

/// Derivative of GELU at x.
#[inline]
pub fn gelu_derivative(x: f32) -> f32 {
    let t = tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
    let du = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
    0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * du
}

/// `out = gelu(pre)`, element by element.
pub(super) fn gelu_of(out: &mut [f32], pre: &[f32]) {
    out.iter_mut().zip(pre).for_each(|(out, &pre)| *out = gelu(pre));
}

/// `gradient *= gelu'(pre)`, element by element.
pub(super) fn scale_by_gelu_derivative(gradient: &mut [f32], pre: &[f32]) {
    gradient.iter_mut().zip(pre).for_each(|(gradient, &pre)| *gradient *= gelu_derivative(pre));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gelu_and_its_derivative_agree_with_f64() {
        for step in -1200..=1200 {
            let x = f64::from(step) / 100.0;
            let c = (2.0 / std::f64::consts::PI).sqrt();
            let exact = |x: f64| 0.5 * x * (1.0 + (c * (x + 0.044715 * x * x * x)).tanh());
            let slope = (exact(x + 1e-5) - exact(x - 1e-5)) / 2e-5;
            // Near -3 the sum 1 + tanh cancels: the error is an ulp of 1 times |x|.
            let tolerance = 4.0 * f64::from(f32::EPSILON) * (1.0 + x.abs());
            assert!((f64::from(gelu(x as f32)) - exact(x)).abs() <= tolerance, "gelu({x})");
            assert!((f64::from(gelu_derivative(x as f32)) - slope).abs() <= 4.0 * tolerance + 1e-9, "gelu'({x})");
        }
    }

    #[test]
    fn the_exponential_is_within_two_ulps() {
        for step in 0..870_000 {
            let x = -f64::from(step) / 1e4;
            let (actual, exact) = (f64::from(exp_of_negative(x as f32)), f64::from(x as f32).exp());
            assert!(
                (actual / exact - 1.0).abs() <= 2.0 * f64::from(f32::EPSILON),
                "exp({x}) = {actual:e}, not {exact:e}"
            );
        }
        assert!(exp_of_negative(-1e30) < 2e-38 && exp_of_negative(f32::NEG_INFINITY) < 2e-38);
    }

    #[test]
    fn extremes_stay_finite() {
        for x in [f32::MAX.sqrt(), 1e10, 100.0] {
            assert_eq!(gelu(x), x);
            assert_eq!(gelu(-x), -0.0);
            assert!(gelu_derivative(x).is_finite() || x > 1e9, "{x}");
        }
    }
}
