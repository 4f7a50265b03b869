//! Every operation of the CPU backend against its definition: forward passes against the formulas of their documentation
//! written out in f64, backward passes against finite differences of the forward passes.
//!
//! Inputs are multiples of 2^-12 or finer and of moderate size, and steps are powers of two, so moving an input is exact.
//! Buffers hold NaN wherever an operation must not read, or must overwrite.

use bandtrain::backend::cpu::{Cpu, gelu::gelu};
use bandtrain::backend::{
    AdamW, AdamWStep, Affine, Attention, BandLinear, BiasGrad, Embed, Embeddings, Expansion, HeadDims, KeyValues,
    LayerNorm, Linear, LinearDims, Loss, Normed, NormedInput, OptimizerState, SequenceDims, Write,
};
use bandtrain::band::{Band, Dense};
use bandtrain::blocks::Blocks;
use bandtrain::shapes::Span;
use bandtrain::tolerance::{self, Difference, Slope, Tolerance, UNIT_F32, Worst, root_mean_square};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

// ---------------------------------------------------------------------------------------------------- the harness

/// Random directions of a derivative, besides which single coordinates are tried.
const DIRECTIONS: usize = 4;
/// Single coordinates, besides the first and the last.
const COORDINATES: usize = 10;
/// The largest tolerance a derivative may need, in units of the gradient along its direction: a check that cannot tell
/// an error of half a percent is none.
const RESOLUTION: f64 = 5e-3;

struct Random(ChaCha8Rng);

impl Random {
    fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Uniform multiples of `scale` / 4096 from -scale to scale, a power of two.
    fn values(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.0.random_range(-4096..=4096) as f32 / 4096.0 * scale).collect()
    }

    /// Ids below `count`.
    fn tokens(&mut self, len: usize, count: usize) -> Vec<u32> {
        (0..len).map(|_| self.0.random_range(0..count as u32)).collect()
    }

    /// A flat buffer with random values in `spans`, and NaN between them.
    fn flat(&mut self, len: usize, spans: &[(Span, f32)]) -> Vec<f32> {
        let mut flat = nan(len);
        for &(span, scale) in spans {
            flat[span.range()].copy_from_slice(&self.values(span.len, scale));
        }
        flat
    }
}

fn nan(len: usize) -> Vec<f32> {
    vec![f32::NAN; len]
}

/// Spans of these lengths in a flat buffer, with gaps between them, and the buffer's length.
fn layout<const K: usize>(lengths: [usize; K]) -> ([Span; K], usize) {
    let mut end = 3;
    let spans = lengths.map(|len| {
        let span = Span { offset: end, len };
        end = span.range().end + 5;
        span
    });
    (spans, end)
}

fn sums(lengths: &[usize]) -> Tolerance {
    Tolerance::of_sums(UNIT_F32, lengths.iter().copied())
}

fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// The exact product.
fn product(a: f32, b: f32) -> f64 {
    f64::from(a) * f64::from(b)
}

/// The power of two at or below 1/sqrt(n): weights of this scale keep a sum of n products near 1.
fn unit_scale(n: usize) -> f32 {
    (-((n as f32).sqrt().log2().ceil())).exp2()
}

/// Holds what an operation computed against its definition.
fn equals(name: &str, actual: &[f32], expected: &[f64], tolerance: Tolerance) {
    let expected: Vec<f32> = expected.iter().map(|&value| value as f32).collect();
    let worst = tolerance::compare(actual, &expected, tolerance);
    println!("{name}: {:.3} of the tolerance", worst.ratio());
    assert!(worst.ratio() <= 1.0, "{name}, {worst}");
}

/// An objective sum(forward(x) * r) whose outputs and gradient err by `tolerance`.
struct Objective<'a, F> {
    forward: F,
    r: &'a [f32],
    tolerance: Tolerance,
}

impl<F: Fn(&[f32]) -> Vec<f32>> Objective<'_, F> {
    /// Holds `gradient`, at x = `at`, against finite differences along random directions over the elements `part`, and
    /// along some of these alone.
    fn confirm(&self, name: &str, at: &[f32], gradient: &[f32], part: &[usize]) {
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
fn written(name: &str, len: usize, owned: &[Span], terms: usize, run: impl Fn(&mut Vec<f32>, Write)) -> Vec<f32> {
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

// ------------------------------------------------------------------------------------------------------- embed

#[test]
fn embed() {
    let dims = SequenceDims { batch: 3, tokens: 5, channels: 7, heads: 1 };
    let (c, t, vocab, positions) = (dims.channels, dims.tokens, 6, 9);
    let ([wte, wpe], len) = layout([vocab * c, positions * c]);
    let embeddings = Embeddings { tokens: wte, positions: wpe };
    let mut random = Random::new(10);
    let params = random.flat(len, &[(wte, 1.0), (wpe, 1.0)]);
    // Fifteen tokens of five kinds: some repeat, and the last is never used.
    let tokens = random.tokens(dims.rows(), vocab - 1);
    let forward = |params: &[f32], past: usize| {
        let mut out = nan(dims.rows() * c);
        Cpu.embed_forward(&mut out, &tokens, &params.to_vec(), embeddings, dims, past).unwrap();
        out
    };
    for past in [0, 4] {
        let element = |k: usize| {
            let (row, channel) = (k / c, k % c);
            let token = params[wte.range()][tokens[row] as usize * c + channel];
            f64::from(token) + f64::from(params[wpe.range()][(past + row % t) * c + channel])
        };
        let expected: Vec<f64> = (0..dims.rows() * c).map(element).collect();
        equals("embed", &forward(&params, past), &expected, sums(&[1]));
    }

    let r = random.values(dims.rows() * c, 1.0);
    let backward = |mut grads: Vec<f32>, write: Write| {
        Cpu.embed_backward(&mut grads, &r, &tokens, embeddings, dims, write).unwrap();
        grads
    };
    let set = backward(vec![0.0; len], Write::Set);
    let tolerance = sums(&[dims.rows()]);
    let objective = Objective { forward: |params: &[f32]| forward(params, 0), r: &r, tolerance };
    objective.confirm("embed, tokens", &params, &set, &wte.range().collect::<Vec<_>>());
    objective.confirm("embed, positions", &params, &set, &wpe.range().collect::<Vec<_>>());

    let old = random.values(len, 4.0);
    let plus_set = |span: Span| span.range().map(|k| f64::from(old[k]) + f64::from(set[k])).collect::<Vec<_>>();
    for write in [Write::Set, Write::Add] {
        let grads = backward(old.clone(), write);
        equals("embed, tokens added", &grads[wte.range()], &plus_set(wte), tolerance);
        match write {
            Write::Set => assert_eq!(grads[wpe.range()], set[wpe.range()]),
            Write::Add => equals("embed, positions added", &grads[wpe.range()], &plus_set(wpe), tolerance),
        }
        let inside = |k: usize| wte.range().contains(&k) || wpe.range().contains(&k);
        assert!((0..len).all(|k| inside(k) || grads[k] == old[k]), "embed wrote outside");
    }
}

// --------------------------------------------------------------------------------------------------- layernorm

/// Rows and channels.
const NORMS: [(usize, usize); 4] = [(1, 5), (7, 16), (130, 33), (3, 200)];

/// Output, means and reciprocal standard deviations of a LayerNorm, by definition.
fn layernorm_definition(x: &[f64], weight: &[f32], bias: &[f32]) -> [Vec<f64>; 3] {
    let c = weight.len();
    let [mut out, mut means, mut rstds] = [const { Vec::new() }; 3];
    for row in x.chunks(c) {
        let mean = row.iter().sum::<f64>() / c as f64;
        let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / c as f64;
        let rstd = 1.0 / (variance + 1e-5).sqrt();
        out.extend((0..c).map(|i| (row[i] - mean) * rstd * f64::from(weight[i]) + f64::from(bias[i])));
        means.push(mean);
        rstds.push(rstd);
    }
    [out, means, rstds]
}

/// A LayerNorm's parameters in a flat buffer.
fn layernorm_params(random: &mut Random, c: usize) -> (Affine, Vec<f32>) {
    let ([weight, bias], len) = layout([c, c]);
    let mut params = random.flat(len, &[(weight, 0.5), (bias, 1.0)]);
    params[weight.range()].iter_mut().for_each(|weight| *weight += 1.0);
    (Affine { weight, bias }, params)
}

#[test]
fn layernorm() {
    for (rows, c) in NORMS {
        let name = format!("layernorm {rows}x{c}");
        let mut random = Random::new(20 + c as u64);
        let (affine, params) = layernorm_params(&mut random, c);
        let (x, r) = (random.values(rows * c, 2.0), random.values(rows * c, 1.0));
        let tolerance = sums(&[c, c]);
        let forward = |x: &[f32], params: &[f32]| {
            let [mut out, mut mean, mut rstd] = [nan(rows * c), nan(rows), nan(rows)];
            let normed = Normed { out: &mut out, mean: &mut mean, rstd: &mut rstd };
            Cpu.layernorm_forward(normed, &x.to_vec(), &params.to_vec(), affine, rows).unwrap();
            [out, mean, rstd]
        };
        let [out, mean, rstd] = forward(&x, &params);
        let expected = layernorm_definition(&f64s(&x), &params[affine.weight.range()], &params[affine.bias.range()]);
        equals(&name, &out, &expected[0], tolerance);
        equals(&format!("{name}, mean"), &mean, &expected[1], tolerance);
        equals(&format!("{name}, rstd"), &rstd, &expected[2], tolerance);

        let backward = |dx: &mut Vec<f32>, grads: &mut Vec<f32>, residual_write: Write, write: Write| {
            let input = NormedInput { x: &x, mean: &mean, rstd: &rstd };
            Cpu.layernorm_backward(dx, grads, &r, input, &params, affine, rows, residual_write, write).unwrap();
        };
        let mut dx = nan(rows * c);
        backward(&mut dx, &mut vec![0.0; params.len()], Write::Set, Write::Set);
        let grads = written(&name, params.len(), &[affine.weight, affine.bias], rows, |grads, write| {
            backward(&mut nan(rows * c), grads, Write::Set, write);
        });
        Objective { forward: |x: &[f32]| forward(x, &params)[0].clone(), r: &r, tolerance }.confirm(
            &format!("{name}, input"),
            &x,
            &dx,
            &(0..rows * c).collect::<Vec<_>>(),
        );
        let tolerance = sums(&[c, c, rows]);
        let objective = Objective { forward: |params: &[f32]| forward(&x, params)[0].clone(), r: &r, tolerance };
        objective.confirm(&format!("{name}, weight"), &params, &grads, &affine.weight.range().collect::<Vec<_>>());
        objective.confirm(&format!("{name}, bias"), &params, &grads, &affine.bias.range().collect::<Vec<_>>());
    }
}

/// The objective takes in the residual as well as its LayerNorm: the gradient of one is there before the other's is added.
#[test]
fn residual_layernorm() {
    for (rows, c) in NORMS {
        let name = format!("residual and layernorm {rows}x{c}");
        let mut random = Random::new(30 + c as u64);
        let (affine, params) = layernorm_params(&mut random, c);
        let (x, branch) = (random.values(rows * c, 1.0), random.values(rows * c, 1.0));
        let r = random.values(2 * rows * c, 1.0);
        let tolerance = sums(&[c, c]);
        let forward = |x: &[f32], branch: &[f32]| {
            let [mut residual, mut out, mut mean, mut rstd] = [nan(rows * c), nan(rows * c), nan(rows), nan(rows)];
            let normed = Normed { out: &mut out, mean: &mut mean, rstd: &mut rstd };
            let (x, branch) = (x.to_vec(), branch.to_vec());
            Cpu.residual_layernorm_forward(&mut residual, normed, &x, &branch, &params, affine, rows).unwrap();
            [residual, out, mean, rstd]
        };
        let [residual, out, mean, rstd] = forward(&x, &branch);
        let sum: Vec<f64> = x.iter().zip(&branch).map(|(&x, &branch)| f64::from(x) + f64::from(branch)).collect();
        equals(&format!("{name}, residual"), &residual, &sum, sums(&[1]));
        let expected = layernorm_definition(&sum, &params[affine.weight.range()], &params[affine.bias.range()]);
        equals(&name, &out, &expected[0], tolerance);

        let mut dx = r[..rows * c].to_vec();
        let dout = r[rows * c..].to_vec();
        let input = NormedInput { x: &residual, mean: &mean, rstd: &rstd };
        let grads = &mut vec![0.0; params.len()];
        Cpu.layernorm_backward(&mut dx, grads, &dout, input, &params, affine, rows, Write::Add, Write::Set).unwrap();
        let all: Vec<usize> = (0..rows * c).collect();
        let both = |x: &[f32], branch: &[f32]| forward(x, branch)[..2].concat();
        let objective = Objective { forward: |x: &[f32]| both(x, &branch), r: &r, tolerance };
        objective.confirm(&format!("{name}, stream"), &x, &dx, &all);
        let objective = Objective { forward: |branch: &[f32]| both(&x, branch), r: &r, tolerance };
        objective.confirm(&format!("{name}, branch"), &branch, &dx, &all);
    }
}

// ------------------------------------------------------------------------------------------------------ linear

/// Rows, inputs and outputs.
const LINEARS: [LinearDims; 4] = [
    LinearDims { rows: 1, inputs: 3, outputs: 2 },
    LinearDims { rows: 5, inputs: 7, outputs: 11 },
    LinearDims { rows: 130, inputs: 48, outputs: 20 },
    LinearDims { rows: 64, inputs: 33, outputs: 96 },
];

fn gelu_definition(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
}

/// The roundings of a GELU count like those of a sum of this length.
const GELU: usize = 16;

#[test]
fn linear() {
    for dims in LINEARS {
        let LinearDims { rows, inputs, outputs } = dims;
        let name = format!("linear {rows}x{inputs}x{outputs}");
        let mut random = Random::new(40 + inputs as u64);
        let ([weight, bias], len) = layout([outputs * inputs, outputs]);
        let affine = Affine { weight, bias };
        let params = random.flat(len, &[(weight, unit_scale(inputs)), (bias, 1.0)]);
        let (inp, r) = (random.values(rows * inputs, 2.0), random.values(rows * outputs, 1.0));
        let forward = |inp: &[f32], params: &[f32], pre: Option<&mut Vec<f32>>| {
            let mut out = nan(rows * outputs);
            Cpu.linear_forward(&mut out, pre, &inp.to_vec(), &params.to_vec(), affine, dims).unwrap();
            out
        };
        let mut expected = Vec::new();
        for m in 0..rows {
            for o in 0..outputs {
                let term = |k| product(inp[m * inputs + k], params[weight.range()][o * inputs + k]);
                expected.push(f64::from(params[bias.range()][o]) + (0..inputs).map(term).sum::<f64>());
            }
        }
        equals(&name, &forward(&inp, &params, None), &expected, sums(&[inputs, 1]));
        let mut pre = nan(rows * outputs);
        let activated = forward(&inp, &params, Some(&mut pre));
        equals(&format!("{name}, before GELU"), &pre, &expected, sums(&[inputs, 1]));
        let expected: Vec<f64> = expected.into_iter().map(gelu_definition).collect();
        equals(&format!("{name}, GELU"), &activated, &expected, sums(&[inputs, GELU]));

        let input_gradient = |pre: Option<&Vec<f32>>| {
            let mut dinp = nan(rows * inputs);
            Cpu.linear_backward_input(&mut dinp, &r, &params, weight, pre, dims).unwrap();
            dinp
        };
        let all: Vec<usize> = (0..rows * inputs).collect();
        let plain = Objective {
            forward: |inp: &[f32]| forward(inp, &params, None),
            r: &r,
            tolerance: sums(&[inputs, 1, outputs]),
        };
        plain.confirm(&format!("{name}, input"), &inp, &input_gradient(None), &all);
        let through_gelu = Objective {
            forward: |pre: &[f32]| forward(&pre.iter().map(|&pre| gelu(pre)).collect::<Vec<_>>(), &params, None),
            r: &r,
            tolerance: sums(&[inputs, GELU, outputs]),
        };
        through_gelu.confirm(&format!("{name}, input through GELU"), &inp, &input_gradient(Some(&inp)), &all);

        let grads = written(&name, len, &[weight, bias], rows, |grads, write| {
            Cpu.linear_backward_weight(grads, affine, &r, &inp, dims, write).unwrap();
        });
        let objective = Objective {
            forward: |params: &[f32]| forward(&inp, params, None),
            r: &r,
            tolerance: sums(&[inputs, 1, rows]),
        };
        objective.confirm(&format!("{name}, weight"), &params, &grads, &weight.range().collect::<Vec<_>>());
        objective.confirm(&format!("{name}, bias"), &params, &grads, &bias.range().collect::<Vec<_>>());
    }
}

// -------------------------------------------------------------------------------------------------------- band

/// A band, random weights in it, and a bias on either side, with the weights also dense.
struct BandCase {
    name: String,
    band: Band,
    rows: usize,
    panels: Span,
    wide_bias: Span,
    narrow_bias: Span,
    params: Vec<f32>,
    /// [W, N], with zeros outside the band.
    dense: Vec<f32>,
    /// Activations [M, N] and [M, W].
    narrow: Vec<f32>,
    wide: Vec<f32>,
}

impl BandCase {
    fn all() -> Vec<Self> {
        [
            (16, 64, 1, 5),       // the diagonal alone
            (24, 96, 13, 9),      // odd; windows reach beyond N
            (37, 148, 20, 7),     // N no multiple of 16, W none of 64
            (20, 50, 9, 6),       // W is not 4N
            (33, 33, 3, 4),       // W = N
            (3, 300, 1, 3),       // panels without any connection
            (48, 192, 33, 300),   // more rows than one thread takes at once
            (21, 84, 100_000, 5), // all connections
            (64, 256, 256, 65),
        ]
        .map(|(n, w, bandwidth, rows)| Self::new(n, w, bandwidth, rows))
        .into_iter()
        .chain(Self::patterns())
        .collect()
    }

    /// Layers of blocks: one, and some of several whole and cut ones, with a row and a column of blocks that has none.
    fn patterns() -> Vec<Self> {
        type Kept = &'static [(usize, usize)];
        let some: [(usize, usize, usize, Kept); 4] = [
            (20, 30, 260, &[(0, 0)]),
            (70, 140, 3, &[(1, 0)]),
            (130, 140, 2, &[(0, 2), (1, 0)]),
            (64, 130, 2, &[(0, 0)]),
        ];
        some.map(|(n, w, rows, kept)| {
            let mut blocks = Blocks::none(n, w);
            kept.iter().for_each(|&(row, col)| blocks.keep(row, col));
            let connected = |j: usize, i: usize| kept.contains(&(j / 128, i / 64));
            Self::of(Band::of_blocks(n, w, blocks).unwrap(), format!("blocks {kept:?}"), connected, rows)
        })
        .into()
    }

    fn new(n: usize, w: usize, bandwidth: usize, rows: usize) -> Self {
        // The band by its definition, |j - i*W/N| <= bandwidth/2, not by what the crate makes of it.
        let connected = |j: usize, i: usize| 2 * (j * n).abs_diff(i * w) <= bandwidth * n;
        Self::of(Band::new(n, w, bandwidth).unwrap(), format!("band {bandwidth}"), connected, rows)
    }

    fn of(band: Band, title: String, connected: impl Fn(usize, usize) -> bool, rows: usize) -> Self {
        let (n, w) = (band.narrow(), band.wide());
        let mut random = Random::new((n * w + band.count()) as u64);
        let ([wide_bias, panels, narrow_bias], len) = layout([w, band.packed_len(), n]);
        let mut params = random.flat(len, &[(wide_bias, 1.0), (narrow_bias, 1.0)]);
        let mut dense = random.values(w * n, 0.25);
        dense.iter_mut().enumerate().filter(|(k, _)| !connected(k / n, k % n)).for_each(|(_, weight)| *weight = 0.0);
        band.pack(&dense, Dense::WideByNarrow, &mut params[panels.range()]);
        Self {
            name: format!("{title} of {n}x{w}, {rows} rows"),
            rows,
            panels,
            wide_bias,
            narrow_bias,
            params,
            dense,
            narrow: random.values(rows * n, 1.0),
            wide: random.values(rows * w, 2.0),
            band,
        }
    }

    /// N, W.
    fn axes(&self) -> (usize, usize) {
        (self.band.narrow(), self.band.wide())
    }

    /// `y[m, j] = sum over i of x[m, i] * P[j, i]` (+ bias), by definition.
    fn expanded(&self, bias: &[f32]) -> Vec<f64> {
        let (n, w) = self.axes();
        let term = |m: usize, j: usize, i: usize| product(self.narrow[m * n + i], self.dense[j * n + i]);
        let dot = |m: usize, j: usize| (0..n).map(|i| term(m, j, i)).sum::<f64>();
        (0..self.rows * w).map(|k| f64::from(bias[k % w]) + dot(k / w, k % w)).collect()
    }

    /// `y[m, i] = sum over j of x[m, j] * P[j, i]` (+ bias), by definition.
    fn contracted(&self, bias: &[f32]) -> Vec<f64> {
        let (n, w) = self.axes();
        let term = |m: usize, i: usize, j: usize| product(self.wide[m * w + j], self.dense[j * n + i]);
        let dot = |m: usize, i: usize| (0..w).map(|j| term(m, i, j)).sum::<f64>();
        (0..self.rows * n).map(|k| f64::from(bias[k % n]) + dot(k / n, k % n)).collect()
    }

    fn expand(&self, x: &[f32], params: &[f32], expansion: Expansion<'_, Vec<f32>>) -> Vec<f32> {
        let mut y = nan(self.rows * self.band.wide());
        let table = Cpu.band_table(&self.band).unwrap();
        Cpu.band_expand(&mut y, &x.to_vec(), &params.to_vec(), self.panels, &table, self.rows, expansion).unwrap();
        y
    }

    fn contract(&self, x: &[f32], params: &[f32], bias: Option<Span>) -> Vec<f32> {
        let mut y = nan(self.rows * self.band.narrow());
        let table = Cpu.band_table(&self.band).unwrap();
        Cpu.band_contract(&mut y, &x.to_vec(), &params.to_vec(), self.panels, &table, self.rows, bias).unwrap();
        y
    }

    /// The weights' and one bias's gradients, exact zeros outside the band.
    fn outer(&self, bias: BiasGrad, wide: &Vec<f32>, narrow: &Vec<f32>) -> Vec<f32> {
        let span = match bias {
            BiasGrad::Wide(span) | BiasGrad::Narrow(span) => span,
        };
        let table = Cpu.band_table(&self.band).unwrap();
        let run = |grads: &mut Vec<f32>, write: Write| {
            Cpu.band_outer(grads, self.panels, bias, wide, narrow, &table, self.rows, write).unwrap();
        };
        let grads = written(&self.name, self.params.len(), &[self.panels, span], self.rows, run);
        let mut added = vec![1.0; self.params.len()];
        run(&mut added, Write::Add);
        let slots = self.slots();
        for slot in self.panels.range().filter(|slot| slots.binary_search(slot).is_err()) {
            assert_eq!((grads[slot].to_bits(), added[slot].to_bits()), (0, 0), "{}: slot {slot}", self.name);
        }
        grads
    }

    /// Places of the packed weights that exist, in the flat buffer.
    fn slots(&self) -> Vec<usize> {
        let slots = |panel| {
            let exists = move |slot: &usize| self.band.slot(panel, *slot).is_some();
            (0..panel.len()).filter(exists).map(|slot| self.panels.offset + panel.offset + slot)
        };
        self.band.panels().iter().flat_map(slots).collect()
    }
}

#[test]
fn band_as_fc1() {
    for case in BandCase::all() {
        let ((n, w), name) = (case.axes(), &case.name);
        let forward = |x: &[f32], params: &[f32]| {
            let mut pre = nan(case.rows * w);
            let y = case.expand(x, params, Expansion::BiasGelu { bias: case.wide_bias, pre: &mut pre });
            [pre, y]
        };
        let [pre, y] = forward(&case.narrow, &case.params);
        let expected = case.expanded(&case.params[case.wide_bias.range()]);
        equals(&format!("{name}, FC1 before GELU"), &pre, &expected, sums(&[n, 1]));
        let expected: Vec<f64> = expected.into_iter().map(gelu_definition).collect();
        equals(&format!("{name}, FC1"), &y, &expected, sums(&[n, GELU]));

        let r = Random::new(50).values(case.rows * w, 1.0);
        let dx = case.contract(&r, &case.params, None);
        let grads = case.outer(BiasGrad::Wide(case.wide_bias), &r, &case.narrow);
        let forward_x = |x: &[f32]| forward(x, &case.params)[0].clone();
        let objective = Objective { forward: forward_x, r: &r, tolerance: sums(&[n, 1, w]) };
        objective.confirm(
            &format!("{name}, FC1 input"),
            &case.narrow,
            &dx,
            &(0..case.narrow.len()).collect::<Vec<_>>(),
        );
        let forward_params = |params: &[f32]| forward(&case.narrow, params)[0].clone();
        let objective = Objective { forward: forward_params, r: &r, tolerance: sums(&[n, 1, case.rows]) };
        objective.confirm(&format!("{name}, FC1 weight"), &case.params, &grads, &case.slots());
        let bias: Vec<usize> = case.wide_bias.range().collect();
        objective.confirm(&format!("{name}, FC1 bias"), &case.params, &grads, &bias);
    }
}

#[test]
fn band_as_fc2() {
    for case in BandCase::all() {
        let ((n, w), name) = (case.axes(), &case.name);
        let bias = Some(case.narrow_bias);
        let expected = case.contracted(&case.params[case.narrow_bias.range()]);
        let y = case.contract(&case.wide, &case.params, bias);
        equals(&format!("{name}, FC2"), &y, &expected, sums(&[w, 1]));
        let y = case.contract(&case.wide, &case.params, None);
        equals(&format!("{name}, contraction"), &y, &case.contracted(&vec![0.0; n]), sums(&[w, 1]));

        let r = Random::new(60).values(case.rows * n, 1.0);
        let activate = |pre: &[f32]| pre.iter().map(|&pre| gelu(pre)).collect::<Vec<_>>();
        let dpre = case.expand(&r, &case.params, Expansion::GeluBackward { pre: &case.wide });
        let objective = Objective {
            forward: |pre: &[f32]| case.contract(&activate(pre), &case.params, bias),
            r: &r,
            tolerance: sums(&[w, GELU, n]),
        };
        // A wide element without connections has no gradient, and tells nothing when moved alone.
        let connected = |k: &usize| !case.band.row(k % w).is_empty();
        let (some, none): (Vec<usize>, Vec<usize>) = (0..case.wide.len()).partition(connected);
        assert!(none.iter().all(|&k| dpre[k] == 0.0), "{name}: gradient without a connection");
        objective.confirm(&format!("{name}, FC2 input through GELU"), &case.wide, &dpre, &some);

        let activated = activate(&case.wide);
        let grads = case.outer(BiasGrad::Narrow(case.narrow_bias), &activated, &r);
        let objective = Objective {
            forward: |params: &[f32]| case.contract(&activated, params, bias),
            r: &r,
            tolerance: sums(&[w, 1, case.rows]),
        };
        objective.confirm(&format!("{name}, FC2 weight"), &case.params, &grads, &case.slots());
        let bias: Vec<usize> = case.narrow_bias.range().collect();
        objective.confirm(&format!("{name}, FC2 bias"), &case.params, &grads, &bias);
    }
}

// --------------------------------------------------------------------------------------------------- attention

/// B, T, C and NH: one token; one query block of 64 and a bit more; two blocks and more; odd heads.
const ATTENTIONS: [(usize, usize, usize, usize); 6] =
    [(2, 1, 12, 3), (2, 5, 12, 4), (2, 70, 16, 2), (1, 64, 64, 1), (1, 65, 24, 1), (1, 130, 14, 2)];

fn attention_dims((batch, tokens, channels, heads): (usize, usize, usize, usize)) -> SequenceDims {
    SequenceDims { batch, tokens, channels, heads }
}

/// Output [B, T, C] and log-sum-exps [B, NH, T], by definition.
fn attention_definition(qkv: &[f32], dims: SequenceDims) -> [Vec<f64>; 2] {
    let SequenceDims { batch, tokens: t, channels: c, heads: nh } = dims;
    let hs = dims.head_size();
    let at = |b: usize, token: usize, which: usize, head: usize, i: usize| {
        f64::from(qkv[(b * t + token) * 3 * c + which * c + head * hs + i])
    };
    let (mut out, mut sums) = (vec![0.0; dims.rows() * c], Vec::new());
    for b in 0..batch {
        for head in 0..nh {
            for query in 0..t {
                let product = |key| (0..hs).map(|i| at(b, query, 0, head, i) * at(b, key, 1, head, i)).sum::<f64>();
                let weights: Vec<f64> = (0..=query).map(|key| (product(key) / (hs as f64).sqrt()).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for i in 0..hs {
                    let value: f64 = weights.iter().enumerate().map(|(key, p)| p / sum * at(b, key, 2, head, i)).sum();
                    out[(b * t + query) * c + head * hs + i] = value;
                }
                sums.push(sum.ln());
            }
        }
    }
    [out, sums]
}

fn attention_forward(qkv: &[f32], dims: SequenceDims) -> [Vec<f32>; 2] {
    let [mut out, mut log_sum_exp] = [nan(dims.rows() * dims.channels), nan(dims.rows() * dims.heads)];
    Cpu.attention_forward(&mut out, &mut log_sum_exp, &qkv.to_vec(), dims).unwrap();
    [out, log_sum_exp]
}

#[test]
fn attention() {
    for case in ATTENTIONS {
        let (name, dims) = (format!("attention {case:?}"), attention_dims(case));
        let (t, hs, c) = (dims.tokens, dims.head_size(), dims.channels);
        let mut random = Random::new(70 + t as u64);
        let (qkv, r) = (random.values(dims.rows() * 3 * c, 2.0), random.values(dims.rows() * c, 1.0));
        let [out, log_sum_exp] = attention_forward(&qkv, dims);
        let expected = attention_definition(&qkv, dims);
        equals(&name, &out, &expected[0], sums(&[hs, t]));
        equals(&format!("{name}, log-sum-exp"), &log_sum_exp, &expected[1], sums(&[hs, t]));

        let mut dqkv = nan(qkv.len());
        Cpu.attention_backward(&mut dqkv, &r, &out, &log_sum_exp, &qkv, dims).unwrap();
        let tolerance = sums(&[hs, t, hs, t]);
        let objective = Objective { forward: |qkv: &[f32]| attention_forward(qkv, dims)[0].clone(), r: &r, tolerance };
        objective.confirm(&name, &qkv, &dqkv, &(0..qkv.len()).collect::<Vec<_>>());
        for (which, part) in ["queries", "keys", "values"].into_iter().enumerate() {
            let columns = |k: &usize| k % (3 * c) / c == which;
            let part_of: Vec<usize> = (0..qkv.len()).filter(columns).collect();
            // A single token attends to itself whatever its query and key.
            if t > 1 || part == "values" {
                objective.confirm(&format!("{name}, {part}"), &qkv, &dqkv, &part_of);
            } else {
                // Two equal sums of HS products cancel, and what is left is multiplied by a key or query of at most 2.
                let left = 2.0 * tolerance.0 * root_mean_square(&dqkv);
                assert!(part_of.iter().all(|&k| f64::from(dqkv[k]).abs() <= left), "{name}, {part}");
            }
        }
    }
}

/// A prompt at once, then token by token, with room to spare in the cache.
#[test]
fn attention_cached() {
    for case in ATTENTIONS {
        let dims = attention_dims(case);
        let SequenceDims { batch, tokens: t, channels: c, .. } = dims;
        let qkv = Random::new(80 + t as u64).values(dims.rows() * 3 * c, 2.0);
        for prompt in [1, t.div_ceil(2), t] {
            let name = format!("cached attention {case:?}, prompt of {prompt}");
            let capacity = t + 3;
            let (mut keys, mut values) = (nan(batch * capacity * c), nan(batch * capacity * c));
            let mut out = nan(dims.rows() * c);
            let mut past = 0;
            for tokens in std::iter::once(prompt).chain(std::iter::repeat_n(1, t - prompt)) {
                let part = |b: usize| (b * t + past) * 3 * c..(b * t + past + tokens) * 3 * c;
                let new: Vec<f32> = (0..batch).flat_map(|b| &qkv[part(b)]).copied().collect();
                let mut new_out = nan(batch * tokens * c);
                let cache = KeyValues { keys: &mut keys, values: &mut values, capacity, past };
                Cpu.attention_cached(&mut new_out, cache, &new, SequenceDims { tokens, ..dims }).unwrap();
                for (b, rows) in new_out.chunks(tokens * c).enumerate() {
                    out[(b * t + past) * c..][..tokens * c].copy_from_slice(rows);
                }
                past += tokens;
            }
            let tolerance = sums(&[dims.head_size(), t]);
            equals(&name, &out, &f64s(&attention_forward(&qkv, dims)[0]), tolerance);
            equals(&name, &out, &attention_definition(&qkv, dims)[0], tolerance);
        }
    }
}

// -------------------------------------------------------------------------------------------------------- loss

/// One with more rows than have logits at one time.
const HEADS: [HeadDims; 3] = [
    HeadDims { rows: 1, channels: 4, vocab: 2, padded_vocab: 8 },
    HeadDims { rows: 40, channels: 33, vocab: 50, padded_vocab: 64 },
    HeadDims { rows: 300, channels: 12, vocab: 17, padded_vocab: 32 },
];

/// Logits [M, V], by definition.
fn logits_definition(x: &[f32], wte: &[f32], dims: HeadDims) -> Vec<f64> {
    let HeadDims { rows, channels: c, vocab: v, .. } = dims;
    let dot = |m: usize, v: usize| (0..c).map(|k| product(x[m * c + k], wte[v * c + k])).sum();
    (0..rows * v).map(|k| dot(k / v, k % v)).collect()
}

#[test]
fn loss() {
    for dims in HEADS {
        let HeadDims { rows, channels: c, vocab: v, padded_vocab } = dims;
        let name = format!("loss {rows}x{c}x{v}");
        let mut random = Random::new(90 + rows as u64);
        let ([wte], len) = layout([padded_vocab * c]);
        let params = random.flat(len, &[(wte, 2.0 * unit_scale(c))]);
        let x = random.values(rows * c, 1.0);
        let targets = random.tokens(rows, v);
        let forward = |x: &[f32], params: &[f32]| {
            let mut losses = nan(rows);
            Cpu.loss_forward(&mut losses, &x.to_vec(), &params.to_vec(), wte, &targets, dims).unwrap();
            losses
        };
        let loss = |(logits, &target): (&[f64], &u32)| {
            logits.iter().map(|logit| logit.exp()).sum::<f64>().ln() - logits[target as usize]
        };
        let logits = logits_definition(&x, &params[wte.range()], dims);
        let expected: Vec<f64> = logits.chunks(v).zip(&targets).map(loss).collect();
        let losses = forward(&x, &params);
        equals(&name, &losses, &expected, sums(&[c, v]));

        let scale = 0.375;
        let backward = |dx: &mut Vec<f32>, grads: &mut Vec<f32>, write: Write| {
            let mut again = nan(rows);
            Cpu.loss_forward_backward(&mut again, dx, grads, &x, &params, wte, &targets, dims, scale, write).unwrap();
            assert_eq!(again, losses, "{name}: the backward pass has other losses");
        };
        let mut dx = nan(rows * c);
        backward(&mut dx, &mut vec![0.0; len], Write::Set);
        let grads = written(&name, len, &[wte], rows, |grads, write| backward(&mut nan(rows * c), grads, write));
        assert!(grads[wte.range()][v * c..].iter().all(|g| g.to_bits() == 0), "{name}: padded rows have a gradient");
        let r = vec![scale; rows];
        let objective = Objective { forward: |x: &[f32]| forward(x, &params), r: &r, tolerance: sums(&[c, v, v]) };
        objective.confirm(&format!("{name}, input"), &x, &dx, &(0..x.len()).collect::<Vec<_>>());
        let objective =
            Objective { forward: |params: &[f32]| forward(&x, params), r: &r, tolerance: sums(&[c, v, rows]) };
        let real: Vec<usize> = wte.range().take(v * c).collect();
        objective.confirm(&format!("{name}, embedding"), &params, &grads, &real);
    }
}

#[test]
fn head_logits() {
    for dims in HEADS {
        let mut random = Random::new(100);
        let ([wte], len) = layout([dims.padded_vocab * dims.channels]);
        let params = random.flat(len, &[(wte, 1.0)]);
        let first = 2;
        let x = random.values((first + dims.rows) * dims.channels, 1.0);
        let mut logits = nan(dims.rows * dims.vocab);
        Cpu.head_logits(&mut logits, &x, &params, wte, first, dims).unwrap();
        let expected = logits_definition(&x[first * dims.channels..], &params[wte.range()], dims);
        equals(&format!("logits {dims:?}"), &logits, &expected, sums(&[dims.channels]));
    }
}

#[test]
fn loss_sum() {
    let losses = Random::new(110).values(40_000, 8.0);
    for rows in [1, 1000, losses.len()] {
        let sum = 0.25 * f64s(&losses[..rows]).iter().sum::<f64>();
        let mut total = nan(1);
        for (write, expected) in [(Write::Set, sum), (Write::Add, 2.0 * sum), (Write::Set, sum)] {
            Cpu.loss_sum(&mut total, &losses, rows, 0.25, write).unwrap();
            equals(&format!("loss sum of {rows}, {write:?}"), &total, &[expected], sums(&[2]));
        }
    }
}

// ------------------------------------------------------------------------------------------------------- adamw

#[test]
fn grad_norm() {
    for len in [1, 1000, 40_000] {
        let grads = Random::new(120).values(len, 1.0);
        let expected = f64s(&grads).iter().map(|g| g * g).sum::<f64>().sqrt();
        let mut norm = vec![1e30];
        Cpu.grad_norm(&mut norm, &grads).unwrap();
        equals(&format!("norm of {len}"), &norm, &[expected], sums(&[1]));
    }
}

/// A norm that is not finite outlasts finite gradients, and nothing is updated under it.
#[test]
fn a_norm_that_is_not_finite_stays_and_stops_the_optimizer() {
    let mut norm = vec![0.0];
    Cpu.grad_norm(&mut norm, &vec![1.0, f32::INFINITY]).unwrap();
    Cpu.grad_norm(&mut norm, &vec![1.0, 2.0]).unwrap();
    assert_eq!(norm, [f32::INFINITY]);
    let [mut params, mut m, mut v] = [vec![1.0, 2.0], vec![0.5, 0.5], vec![0.5, 0.5]];
    let plan = Cpu.adamw_plan(&[], 2).unwrap();
    let step = AdamWStep {
        step: 1,
        learning_rate: 0.1,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.0,
        grad_clip: 1.0,
    };
    let state = OptimizerState { params: &mut params, m: &mut m, v: &mut v };
    Cpu.adamw_step(state, &vec![1.0, 2.0], &norm, &plan, &step).unwrap();
    assert_eq!([params, m, v], [vec![1.0, 2.0], vec![0.5, 0.5], vec![0.5, 0.5]]);
}

/// Five steps, whose gradients are clipped, or would not need to be, or must not be.
#[test]
fn adamw() {
    const STEPS: usize = 5;
    let len = 40_000;
    let decayed = [Span { offset: 0, len: 20_000 }, Span { offset: 20_100, len: 700 }];
    let decays = |k: usize| decayed.iter().any(|span| span.range().contains(&k));
    // Every eighth element is one outside a band.
    let absent = |k: usize| k % 8 == 3;
    for (grad_clip, beta2) in [(0.0, 0.999), (1.0, 0.95), (1e6, 0.95)] {
        let name = format!("AdamW, clipped at {grad_clip}");
        let mut random = Random::new(130);
        let mut draw = |scale| {
            let mut values = random.values(len, scale);
            (0..len).filter(|&k| absent(k)).for_each(|k| values[k] = 0.0);
            values
        };
        let [mut params, mut m, mut v] = [draw(1.0), vec![0.0; len], vec![0.0; len]];
        let [mut params64, mut m64, mut v64] = [f64s(&params), vec![0.0; len], vec![0.0; len]];
        let plan = Cpu.adamw_plan(&decayed, len).unwrap();
        let (learning_rate, beta1, eps, weight_decay) = (0.01, 0.9, 1e-8, 0.1);
        for t in 1..=STEPS {
            let grads = draw(1.0);
            let mut norm = vec![0.0];
            Cpu.grad_norm(&mut norm, &grads).unwrap();
            let step = AdamWStep { step: t as u64, learning_rate, beta1, beta2, eps, weight_decay, grad_clip };
            let state = OptimizerState { params: &mut params, m: &mut m, v: &mut v };
            Cpu.adamw_step(state, &grads, &norm, &plan, &step).unwrap();

            let clip = if grad_clip > 0.0 { (grad_clip / f64::from(norm[0])).min(1.0) } else { 1.0 };
            for k in 0..len {
                let g = f64::from(grads[k]) * clip;
                m64[k] = beta1 * m64[k] + (1.0 - beta1) * g;
                v64[k] = beta2 * v64[k] + (1.0 - beta2) * g * g;
                let unbiased = (m64[k] / (1.0 - beta1.powi(t as i32)), v64[k] / (1.0 - beta2.powi(t as i32)));
                let decay = if decays(k) { weight_decay } else { 0.0 };
                params64[k] -= learning_rate * (unbiased.0 / (unbiased.1.sqrt() + eps) + decay * params64[k]);
            }
        }
        // A moment takes four roundings a step, an update of at most about learning_rate eight more.
        equals(&format!("{name}, m"), &m, &m64, sums(&[4 * STEPS]));
        equals(&format!("{name}, v"), &v, &v64, sums(&[4 * STEPS]));
        let allowed =
            |k: usize| sums(&[STEPS]).0 * params64[k].abs() + sums(&[12 * STEPS]).0 * learning_rate * STEPS as f64;
        let expected: Vec<f32> = params64.iter().map(|&p| p as f32).collect();
        let worst = tolerance::worst(&params, &expected, allowed);
        println!("{name}: {:.3} of the tolerance", worst.ratio());
        assert!(worst.ratio() <= 1.0, "{name}, {worst}");
        for k in (0..len).filter(|&k| absent(k)) {
            assert_eq!([params[k], m[k], v[k]].map(f32::to_bits), [0; 3], "{name}: element {k} came to life");
        }
    }
}
