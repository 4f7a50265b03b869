//! Dense linear layers.

use crate::harness::{
    GELU, Objective, Random, equals, gelu_definition, layout, nan, product, sums, unit_scale, written,
};
use bandtrain::backend::cpu::{Cpu, gelu::gelu};
use bandtrain::backend::{Affine, Linear, LinearDims};

/// Rows, inputs and outputs.
const LINEARS: [LinearDims; 4] = [
    LinearDims { rows: 1, inputs: 3, outputs: 2 },
    LinearDims { rows: 5, inputs: 7, outputs: 11 },
    LinearDims { rows: 130, inputs: 48, outputs: 20 },
    LinearDims { rows: 64, inputs: 33, outputs: 96 },
];

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
