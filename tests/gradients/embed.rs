//! Embeddings, and their gradients.

use crate::harness::{Objective, Random, equals, layout, nan, sums};
use bandtrain::backend::cpu::Cpu;
use bandtrain::backend::{Embed, Embeddings, SequenceDims, Write};
use bandtrain::shapes::Span;

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
