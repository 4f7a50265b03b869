//! The tanh form of GELU, as GPT-2 uses it (Hendrycks & Gimpel 2016):
//! gelu(x) = x/2 * (1 + tanh(u)), u = sqrt(2/pi) * (x + 0.044715 x^3).
//! A product's epilogue on every backend, hence no operation of its own.

/// sqrt(2 / pi).
const SQRT_2_OVER_PI: f32 = 0.797_884_6;
/// The cubic term's factor.
const CUBIC: f32 = 0.044715;

/// tanh from exp(-2|x|), which neither overflows nor divides by zero, on any backend.
fn tanh(x: f32) -> f32 {
    let t = (-2.0 * x.abs()).exp();
    ((1.0 - t) / (1.0 + t)).copysign(x)
}

/// GELU of x.
pub fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x)))
}

/// Derivative of GELU at x.
pub fn gelu_derivative(x: f32) -> f32 {
    let t = tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
    let du = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
    0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * du
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
    fn extremes_stay_finite() {
        for x in [f32::MAX.sqrt(), 1e10, 100.0] {
            assert_eq!(gelu(x), x);
            assert_eq!(gelu(-x), -0.0);
            assert!(gelu_derivative(x).is_finite() || x > 1e9, "{x}");
        }
    }
}
