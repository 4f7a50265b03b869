//! Cases of the output head, its loss, and AdamW.

use super::{Case, Inputs, Output, Suite, fetch, layout, unwritten, unwritten_statistics, upload};
use crate::backend::{AdamWStep, Arithmetic, Backend, HeadDims, OptimizerState, Role, Write};
use crate::error::Result;
use crate::tolerance::{Tolerance, UNIT_F32};

/// Logits of the inputs here lie within this of each other, nearly always.
const LOGITS: f64 = 24.0;

pub(super) fn cases<A: Backend, R: Backend>(suite: &mut Suite<'_, A, R>) -> Result<()> {
    // The last one's rows are too long for a multiprocessor of Ada to hold.
    for (rows, channels, vocab, padded_vocab) in [
        (1, 1, 1, 1),
        (5, 8, 11, 64),
        (70, 12, 101, 128),
        (3, 6, 257, 320),
        (33, 20, 1001, 1001),
        (150, 36, 300, 320),
        (3, 4, 40_000, 40_064),
    ] {
        suite.check(&HeadCase(HeadDims { rows, channels, vocab, padded_vocab }))?;
    }
    for len in [1, 64, 5000, 70_001] {
        suite.check(&AdamWCase { len, clip: 0.0 })?;
        suite.check(&AdamWCase { len, clip: 1.0 })?;
    }
    Ok(())
}

/// Losses, their sum, their gradients set and added, and logits of some rows.
struct HeadCase(HeadDims);

impl Case for HeadCase {
    fn op(&self) -> &'static str {
        "loss"
    }

    fn shape(&self) -> String {
        let HeadDims { rows, channels, vocab, padded_vocab } = self.0;
        format!("M={rows} C={channels} V={vocab} Vp={padded_vocab}")
    }

    fn run<B: Backend>(&self, backend: &mut B, arithmetic: Arithmetic) -> Result<Vec<Output>> {
        let dims = self.0;
        let HeadDims { rows, channels: c, vocab, padded_vocab } = dims;
        let mut random = Inputs::new(6, arithmetic);
        let ([_, wte], len) = layout([7, padded_vocab * c]);
        let mut weights = random.normal(len, 1.0);
        weights[wte.offset + vocab * c..].fill(0.0);
        let params = upload(backend, Role::Parameters, &weights)?;
        let x = upload(backend, Role::Activations, &random.normal(rows * c, 1.0))?;
        let mut grads = upload(backend, Role::Gradients, &random.normal(len, 1.0))?;
        let mut targets = backend.alloc_tokens("targets", rows)?;
        backend.upload_tokens(&mut targets, &random.tokens(rows, vocab))?;

        let (mut losses, mut dx) = (unwritten_statistics(backend, rows)?, unwritten(backend, rows * c)?);
        backend.loss_forward(&mut losses, &x, &params, wte, &targets, dims)?;
        let forward = fetch(backend, &losses, rows)?;
        let scale = 1.0 / rows as f32;
        for write in [Write::Set, Write::Add] {
            let (losses, dx) = (&mut losses, &mut dx);
            backend.loss_forward_backward(losses, dx, &mut grads, &x, &params, wte, &targets, dims, scale, write)?;
        }
        let mut total = unwritten_statistics(backend, 1)?;
        backend.loss_sum(&mut total, &losses, rows, scale, Write::Set)?;
        backend.loss_sum(&mut total, &losses, rows, 0.5 * scale, Write::Add)?;
        let first_row = rows / 2;
        let some = HeadDims { rows: rows - first_row, ..dims };
        let mut logits = unwritten_statistics(backend, some.rows * vocab)?;
        backend.head_logits(&mut logits, &x, &params, wte, first_row, some)?;

        let forward_tolerance = Tolerance::of_sums(arithmetic.sum_unit(), [c, vocab, 8]).with_exp(LOGITS);
        // Stored logits are rounded, which their exponentials magnify; so is their gradient, as an operand (that the library
        // may cut off instead).
        let (stored, operand) = (arithmetic.stored_unit(), arithmetic.operand_unit());
        let forward_tolerance = forward_tolerance.with_roundings(stored, 2);
        let backward = Tolerance::of_sums(arithmetic.sum_unit(), [2 * c, 2 * vocab, rows, 8]).with_exp(LOGITS);
        let backward = backward.with_roundings(LOGITS * stored, 1).with_roundings(2.0 * operand, 1);
        let dwte = fetch(backend, &grads, len)?[wte.range()].to_vec();
        let padding = (0..padded_vocab * c).map(|index| index >= vocab * c).collect();
        Ok(vec![
            Output::new("losses", forward, forward_tolerance),
            Output::new("losses again", fetch(backend, &losses, rows)?, forward_tolerance),
            Output::new("dx", fetch(backend, &dx, rows * c)?, backward.with_stored(arithmetic)),
            Output { zero: padding, ..Output::new("dwte", dwte, backward) },
            Output::new("loss_sum", fetch(backend, &total, 1)?, forward_tolerance),
            Output::new(
                "logits",
                fetch(backend, &logits, some.rows * vocab)?,
                Tolerance::of_sums(arithmetic.sum_unit(), [c]),
            ),
        ])
    }
}

/// Five steps of AdamW, the middle third of the parameters decaying, with the norm of every gradient.
struct AdamWCase {
    len: usize,
    clip: f64,
}

impl Case for AdamWCase {
    fn op(&self) -> &'static str {
        "adamw"
    }

    fn shape(&self) -> String {
        format!("len={} clip={}", self.len, self.clip)
    }

    fn run<B: Backend>(&self, backend: &mut B, _: Arithmetic) -> Result<Vec<Output>> {
        const STEPS: u64 = 5;
        let len = self.len;
        let mut random = Inputs::new(7, Arithmetic::Fp32);
        let (tensors, padded) = layout([len / 3, len / 3, len - 2 * (len / 3)]);
        // The gaps between tensors hold zeros, as a model's do.
        let mut values = || {
            let mut values = vec![0.0; padded];
            tensors.iter().for_each(|span| values[span.range()].copy_from_slice(&random.normal(span.len, 1.0)));
            values
        };
        let mut params = upload(backend, Role::Parameters, &values())?;
        let mut m = upload(backend, Role::Moments, &vec![0.0; padded])?;
        let mut v = upload(backend, Role::Moments, &vec![0.0; padded])?;
        let mut norm = unwritten_statistics(backend, 1)?;
        let plan = backend.adamw_plan(&[tensors[1]], padded)?;
        let mut norms = Vec::new();
        for step in 1..=STEPS {
            let grads = upload(backend, Role::Gradients, &values())?;
            backend.grad_norm(&mut norm, &grads)?;
            norms.extend(fetch(backend, &norm, 1)?);
            let step = AdamWStep {
                step,
                learning_rate: 1e-2,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                grad_clip: self.clip,
            };
            let state = OptimizerState { params: &mut params, m: &mut m, v: &mut v };
            backend.adamw_step(state, &grads, &norm, &plan, &step)?;
        }
        // A dozen roundings a step, quotient and root of up to 3 ULP among them; the norm's sum besides.
        let update = Tolerance::of_sums(UNIT_F32, [STEPS as usize * 64]);
        Ok(vec![
            Output::new("norm", norms, Tolerance::of_sums(UNIT_F32, [len, 8])),
            Output::new("params", fetch(backend, &params, padded)?, update),
            Output::new("m", fetch(backend, &m, padded)?, update),
            Output::new("v", fetch(backend, &v, padded)?, update),
        ])
    }
}
