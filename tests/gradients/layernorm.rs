//! LayerNorm, alone and after a residual.

use crate::harness::{Objective, Random, equals, f64s, layout, nan, sums, written};
use bandtrain::backend::cpu::Cpu;
use bandtrain::backend::{Affine, LayerNorm, Normed, NormedInput, Write};

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
