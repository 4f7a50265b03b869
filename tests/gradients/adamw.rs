//! The gradient's norm and AdamW.

use crate::harness::{Random, equals, f64s, sums};
use bandtrain::backend::cpu::Cpu;
use bandtrain::backend::{AdamW, AdamWStep, OptimizerState};
use bandtrain::shapes::Span;
use bandtrain::tolerance;

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
