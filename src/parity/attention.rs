//! Cases of attention: forward, backward, and over a cache.

use super::{Allowed, Case, Inputs, Output, Suite, fetch, unwritten, unwritten_statistics, upload};
use crate::backend::{Arithmetic, Backend, KeyValues, Role, SequenceDims};
use crate::error::Result;
use crate::tolerance::{Tolerance, cancelled_bounds, cancelling_scores};

/// Scores of the inputs here lie within this of each other, nearly always.
const SCORES: f64 = 16.0;

pub(super) fn cases<A: Backend, R: Backend>(suite: &mut Suite<'_, A, R>) -> Result<()> {
    for (batch, tokens, channels, heads) in [
        (1, 1, 8, 1),
        (2, 13, 40, 5),
        (3, 33, 32, 4),
        (1, 65, 64, 1),
        (2, 70, 30, 6),
        (1, 130, 96, 1),
        (1, 97, 256, 2),
        (2, 160, 64, 2),
        (2, 192, 128, 2),
    ] {
        let dims = SequenceDims { batch, tokens, channels, heads };
        suite.check(&AttentionCase(dims))?;
        suite.check(&CachedCase(dims))?;
    }
    Ok(())
}

fn shape(dims: SequenceDims) -> String {
    let SequenceDims { batch, tokens, channels, heads } = dims;
    format!("B={batch} T={tokens} C={channels} NH={heads}")
}

/// Forward and backward.
struct AttentionCase(SequenceDims);

impl Case for AttentionCase {
    fn op(&self) -> &'static str {
        "attention"
    }

    fn shape(&self) -> String {
        shape(self.0)
    }

    fn run<B: Backend>(&self, backend: &mut B, arithmetic: Arithmetic) -> Result<Vec<Output>> {
        let dims = self.0;
        let (t, c) = (dims.tokens, dims.channels);
        let (len, statistics) = (dims.rows() * c, dims.rows() * dims.heads);
        let mut random = Inputs::new(4, arithmetic);
        let (qkv_values, dout_values) = (random.normal(3 * len, 1.0), random.normal(len, 1.0));
        let qkv = upload(backend, Role::Activations, &qkv_values)?;
        let dout = upload(backend, Role::Activations, &dout_values)?;
        let (mut out, mut dqkv) = (unwritten(backend, len)?, unwritten(backend, 3 * len)?);
        let mut log_sum_exp = unwritten_statistics(backend, statistics)?;
        backend.attention_forward(&mut out, &mut log_sum_exp, &qkv, dims)?;
        backend.attention_backward(&mut dqkv, &dout, &out, &log_sum_exp, &qkv, dims)?;
        let sums = Tolerance::of_sums(arithmetic.sum_unit(), [dims.head_size(), t, 8]).with_exp(SCORES);
        // P is rounded to an operand; on the way back dS too, and delta comes from a stored output.
        let (operand, stored) = (arithmetic.operand_unit(), arithmetic.stored_unit());
        let forward = sums.with_roundings(operand, 1).with_stored(arithmetic);
        let backward = Tolerance::of_sums(arithmetic.sum_unit(), [3 * dims.head_size(), 3 * t, 16]).with_exp(SCORES);
        let backward = backward.with_roundings(operand, 2).with_roundings(stored, 1).with_stored(arithmetic);
        let dqkv = fetch(backend, &dqkv, 3 * len)?;
        let part =
            |of: &[f32], which: usize| of.chunks(c).skip(which).step_by(3).flatten().copied().collect::<Vec<_>>();
        let [queries, keys, values] = [0, 1, 2].map(|which| part(&qkv_values, which));
        let cancelling = |name, which, others: &[f32]| {
            let gradient = part(&dqkv, which);
            let terms: Vec<f64> =
                (0..t).map(|row| cancelling_scores(&dout_values, &values, others, dims.head_size(), row)).collect();
            let bounds = cancelled_bounds(&gradient, backward, |index| terms[index / c % t]);
            Output { allowed: Allowed::Each(bounds), ..Output::new(name, gradient, backward) }
        };
        Ok(vec![
            Output::new("out", fetch(backend, &out, len)?, forward),
            Output::new("log_sum_exp", fetch(backend, &log_sum_exp, statistics)?, sums),
            cancelling("dq", 0, &keys),
            cancelling("dk", 1, &queries),
            Output::new("dv", part(&dqkv, 2), backward),
        ])
    }
}

/// T tokens, then one, then a few, over a cache.
struct CachedCase(SequenceDims);

impl Case for CachedCase {
    fn op(&self) -> &'static str {
        "attention_cached"
    }

    fn shape(&self) -> String {
        shape(self.0)
    }

    fn run<B: Backend>(&self, backend: &mut B, arithmetic: Arithmetic) -> Result<Vec<Output>> {
        let SequenceDims { batch, tokens: t, channels: c, .. } = self.0;
        let capacity = t + 7;
        let mut random = Inputs::new(5, arithmetic);
        let (mut keys, mut values) =
            (unwritten(backend, batch * capacity * c)?, unwritten(backend, batch * capacity * c)?);
        let mut outs = Vec::new();
        let mut past = 0;
        for tokens in [t, 1, 5] {
            let dims = SequenceDims { tokens, ..self.0 };
            let qkv = upload(backend, Role::Activations, &random.normal(3 * dims.rows() * c, 1.0))?;
            let mut out = unwritten(backend, dims.rows() * c)?;
            let cache = KeyValues { keys: &mut keys, values: &mut values, capacity, past };
            backend.attention_cached(&mut out, cache, &qkv, dims)?;
            outs.extend(fetch(backend, &out, dims.rows() * c)?);
            past += tokens;
        }
        let tolerance = Tolerance::of_sums(arithmetic.sum_unit(), [self.0.head_size(), capacity, 8]).with_exp(SCORES);
        let tolerance = tolerance.with_roundings(arithmetic.operand_unit(), 1).with_stored(arithmetic);
        let exact = Tolerance(0.0);
        Ok(vec![
            Output::new("out", outs, tolerance),
            Output::new("keys", fetch(backend, &keys, batch * capacity * c)?, exact),
            Output::new("values", fetch(backend, &values, batch * capacity * c)?, exact),
        ])
    }
}
