//! Values to run with, definitions to hold results against, finite differences to hold gradients against.

use bandtrain::backend::Write;
use bandtrain::shapes::Span;
use bandtrain::tolerance::{self, Difference, Slope, Tolerance, UNIT_F32, Worst, root_mean_square};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Random directions of a derivative, besides which single coordinates are tried.
const DIRECTIONS: usize = 4;
/// Single coordinates, besides the first and the last.
const COORDINATES: usize = 10;
/// The largest tolerance a derivative may need, in units of the gradient along its direction: a check that cannot tell
/// an error of half a percent is none.
const RESOLUTION: f64 = 5e-3;

/// Inputs that are the same in each run.
pub struct Random(ChaCha8Rng);

impl Random {
    /// Of a seed; each test has its own.
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Uniform multiples of `scale` / 4096 from -scale to scale, a power of two.
    pub fn values(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.0.random_range(-4096..=4096) as f32 / 4096.0 * scale).collect()
    }

    /// Ids below `count`.
    pub fn tokens(&mut self, len: usize, count: usize) -> Vec<u32> {
        (0..len).map(|_| self.0.random_range(0..count as u32)).collect()
    }

    /// A flat buffer with random values in `spans`, and NaN between them.
    pub fn flat(&mut self, len: usize, spans: &[(Span, f32)]) -> Vec<f32> {
        let mut flat = nan(len);
        for &(span, scale) in spans {
            flat[span.range()].copy_from_slice(&self.values(span.len, scale));
        }
        flat
    }
}

/// A buffer that nothing has been written to.
pub fn nan(len: usize) -> Vec<f32> {
    vec![f32::NAN; len]
}

/// Spans of these lengths in a flat buffer, with gaps between them, and the buffer's length.
pub fn layout<const K: usize>(lengths: [usize; K]) -> ([Span; K], usize) {
    let mut end = 3;
    let spans = lengths.map(|len| {
        let span = Span { offset: end, len };
        end = span.range().end + 5;
        span
    });
    (spans, end)
}

/// The tolerance of a chain of sums of these lengths in f32.
pub fn sums(lengths: &[usize]) -> Tolerance {
    Tolerance::of_sums(UNIT_F32, lengths.iter().copied())
}

/// The same values, exactly.
pub fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// The exact product.
pub fn product(a: f32, b: f32) -> f64 {
    f64::from(a) * f64::from(b)
}

/// The power of two at or below 1/sqrt(n): weights of this scale keep a sum of n products near 1.
pub fn unit_scale(n: usize) -> f32 {
    (-((n as f32).sqrt().log2().ceil())).exp2()
}

/// Holds what an operation computed against its definition.
pub fn equals(name: &str, actual: &[f32], expected: &[f64], tolerance: Tolerance) {
    let expected: Vec<f32> = expected.iter().map(|&value| value as f32).collect();
    let worst = tolerance::compare(actual, &expected, tolerance);
    println!("{name}: {:.3} of the tolerance", worst.ratio());
    assert!(worst.ratio() <= 1.0, "{name}, {worst}");
}

/// An objective sum(forward(x) * r) whose outputs and gradient err by `tolerance`.
pub struct Objective<'a, F> {
    /// Outputs of inputs.
    pub forward: F,
    /// What the gradient of the outputs is.
    pub r: &'a [f32],
    pub tolerance: Tolerance,
}

impl<F: Fn(&[f32]) -> Vec<f32>> Objective<'_, F> {
    /// Holds `gradient`, at x = `at`, against finite differences along random directions over the elements `part`, and
    /// along some of these alone.
    pub fn confirm(&self, name: &str, at: &[f32], gradient: &[f32], part: &[usize]) {
        assert!(part.iter().all(|&index| gradient[index].is_finite()), "{name}: the gradient is not finite");
        let mut random = Random::new(part.len() as u64);
        let mut directions: Vec<Vec<(usize, f32)>> = Vec::new();
        for _ in 0..DIRECTIONS {
            directions.push(part.iter().map(|&index| (index, if random.0.random() { 1.0 } else { -1.0 })).collect());
        }
        let some: Vec<_> = (0..COORDINATES).map(|_| part[random.0.random_range(0..part.len())]).collect();
        directions.extend([part[0], part[part.len() - 1]].iter().chain(&some).map(|&index| vec![(index, 1.0)]));
        let rms = root_mean_square(&part.iter().map(|&index| gradient[index]).collect::<Vec<_>>());
        let (mut highest, mut coarsest) = (0.0f64, 0.0f64);
        for direction in &directions {
            let moved = |h: f64| {
                let mut x = at.to_vec();
                direction.iter().for_each(|&(index, sign)| x[index] += sign * h as f32);
                (self.forward)(&x)
            };
            let slope = Slope::along(|h| Difference::new(&moved(h), &moved(-h), self.r, self.tolerance));
            let along: f64 = direction.iter().map(|&(index, sign)| f64::from(gradient[index] * sign)).sum();
            let square = |&(index, _): &(usize, f32)| (f64::from(gradient[index]).abs() + rms).powi(2);
            let size = direction.iter().map(square).sum::<f64>().sqrt();
            let allowed = slope.error + self.tolerance.0 * size;
            let worst = Worst { index: direction[0].0, actual: along, expected: slope.value, allowed };
            assert!(worst.ratio() <= 1.0, "{name}, along {} coordinates from {worst}", direction.len());
            assert!(allowed <= RESOLUTION * size, "{name}: a tolerance of {allowed:e} tells nothing about {size:e}");
            highest = highest.max(worst.ratio());
            coarsest = coarsest.max(allowed / size);
        }
        println!("{name}: {highest:.3} of the tolerance, which is {coarsest:.1e} of the gradient or less");
    }
}

/// Runs an operation that writes gradients into the spans `owned` of a flat buffer; returns what it sets. What it adds
/// must be the same, and nothing else may change. Zeros that it sets, such as a band's empty slots, get added to zeros.
pub fn written(name: &str, len: usize, owned: &[Span], terms: usize, run: impl Fn(&mut Vec<f32>, Write)) -> Vec<f32> {
    let mut set = nan(len);
    run(&mut set, Write::Set);
    let inside = |index: usize| owned.iter().any(|span| span.range().contains(&index));
    for (index, value) in set.iter().enumerate() {
        assert_eq!(value.is_nan(), !inside(index), "{name}: {value} at {index}");
    }
    let old: Vec<f32> = Random::new(1).values(len, 4.0);
    let old: Vec<f32> = old.iter().zip(&set).map(|(&old, set)| if set.to_bits() == 0 { 0.0 } else { old }).collect();
    let mut added = old.clone();
    run(&mut added, Write::Add);
    for span in owned {
        let expected: Vec<f64> = span.range().map(|index| f64::from(old[index]) + f64::from(set[index])).collect();
        equals(&format!("{name}, added"), &added[span.range()], &expected, sums(&[terms]));
    }
    assert!((0..len).all(|index| inside(index) || added[index] == old[index]), "{name} added outside");
    set
}

/// GELU in its tanh form.
pub fn gelu_definition(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
}

/// The roundings of a GELU count like those of a sum of this length.
pub const GELU: usize = 16;
