//! The head: logits, cross-entropy and its gradients.

use crate::harness::{Objective, Random, equals, f64s, layout, nan, product, sums, unit_scale, written};
use bandtrain::backend::cpu::Cpu;
use bandtrain::backend::{HeadDims, Loss, Write};

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
