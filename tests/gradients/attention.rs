//! Causal attention, of whole sequences and of one token after a cache.

use crate::harness::{Objective, Random, equals, f64s, nan, sums};
use bandtrain::backend::cpu::Cpu;
use bandtrain::backend::{Attention, KeyValues, SequenceDims};
use bandtrain::tolerance::root_mean_square;

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
