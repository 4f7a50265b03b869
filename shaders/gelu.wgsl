// The tanh form of GELU (Hendrycks & Gimpel 2016): gelu(x) = x/2 * (1 + tanh(u)), u = sqrt(2/pi) * (x + 0.044715 x^3).
//
// Shapes: element by element, four at once.
// Dtypes: f32.
// Grid: that of the product whose epilogue it is.
// Determinism: element by element.
// Caller: linear.wgsl and band.wgsl include it.

const SQRT_2_OVER_PI: f32 = 0.7978846;
const CUBIC: f32 = 0.044715;

// tanh from exp(-2|x|), which neither overflows nor divides by zero, whatever a driver makes of its own tanh.
fn safe_tanh(x: vec4<f32>) -> vec4<f32> {
    let t = exp(-2.0 * abs(x));
    return sign(x) * ((1.0 - t) / (1.0 + t));
}

fn gelu(x: vec4<f32>) -> vec4<f32> {
    return 0.5 * x * (1.0 + safe_tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x)));
}

fn gelu_derivative(x: vec4<f32>) -> vec4<f32> {
    let t = safe_tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
    let du = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * du;
}
