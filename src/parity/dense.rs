//! Cases of the operations around the band: products, LayerNorm, embeddings.

use super::{Case, Inputs, Output, Suite, after_gelu, fetch, layout, unwritten, unwritten_statistics, upload};
use crate::backend::{
    Affine, Arithmetic, Backend, Embeddings, LinearDims, Normed, NormedInput, Role, SequenceDims, Write,
};
use crate::error::Result;
use crate::tolerance::Tolerance;

pub(super) fn cases<A: Backend, R: Backend>(suite: &mut Suite<'_, A, R>) -> Result<()> {
    for (rows, inputs, outputs) in
        [(1, 1, 1), (3, 5, 7), (65, 33, 130), (130, 64, 203), (64, 128, 128), (100, 36, 52), (1030, 12, 20)]
    {
        suite.check(&LinearCase(LinearDims { rows, inputs, outputs }))?;
    }
    for (rows, channels) in [(1, 1), (5, 7), (33, 64), (70, 100), (3, 1030), (300, 36), (2, 2052)] {
        suite.check(&LayerNormCase { rows, channels })?;
    }
    for (batch, tokens, channels, vocab) in [(1, 1, 1, 1), (3, 13, 40, 101), (2, 70, 7, 13), (5, 33, 64, 700)] {
        let dims = SequenceDims { batch, tokens, channels, heads: 1 };
        suite.check(&EmbedCase { dims, vocab })?;
    }
    Ok(())
}

/// All three orientations, with and without GELU, set and added.
struct LinearCase(LinearDims);

impl Case for LinearCase {
    fn op(&self) -> &'static str {
        "linear"
    }

    fn shape(&self) -> String {
        let LinearDims { rows, inputs, outputs } = self.0;
        format!("M={rows} K={inputs} O={outputs}")
    }

    fn run<B: Backend>(&self, backend: &mut B, arithmetic: Arithmetic) -> Result<Vec<Output>> {
        let dims = self.0;
        let LinearDims { rows, inputs, outputs } = dims;
        let mut random = Inputs::new(1, arithmetic);
        let ([weight, bias], len) = layout([outputs * inputs, outputs]);
        let affine = Affine { weight, bias };
        let params = upload(backend, Role::Parameters, &random.normal(len, 0.5))?;
        let inp = upload(backend, Role::Activations, &random.normal(rows * inputs, 1.0))?;
        let dout = upload(backend, Role::Activations, &random.normal(rows * outputs, 1.0))?;
        let at = upload(backend, Role::Activations, &random.normal(rows * inputs, 2.0))?;
        let mut grads = upload(backend, Role::Gradients, &random.normal(len, 1.0))?;

        let (mut out, mut pre) = (unwritten(backend, rows * outputs)?, unwritten(backend, rows * outputs)?);
        let mut activated = unwritten(backend, rows * outputs)?;
        backend.linear_forward(&mut out, None, &inp, &params, affine, dims)?;
        backend.linear_forward(&mut activated, Some(&mut pre), &inp, &params, affine, dims)?;
        let (mut dinp, mut dpre) = (unwritten(backend, rows * inputs)?, unwritten(backend, rows * inputs)?);
        backend.linear_backward_input(&mut dinp, &dout, &params, weight, None, dims)?;
        backend.linear_backward_input(&mut dpre, &dout, &params, weight, Some(&at), dims)?;
        backend.linear_backward_weight(&mut grads, affine, &dout, &inp, dims, Write::Add)?;
        let added = fetch(backend, &grads, len)?;
        backend.linear_backward_weight(&mut grads, affine, &dout, &inp, dims, Write::Set)?;
        let set = fetch(backend, &grads, len)?;

        let sums = |n: usize| Tolerance::of_sums(arithmetic.sum_unit(), [n, 2]);
        let stored = |n: usize| sums(n).with_stored(arithmetic);
        // A library's GELU is no more exact than what is stored.
        let gelu = |n: usize| sums(n).with_gelu().with_roundings(arithmetic.stored_unit(), 1).with_stored(arithmetic);
        let (pre, dinp) = (fetch(backend, &pre, rows * outputs)?, fetch(backend, &dinp, rows * inputs)?);
        Ok(vec![
            Output::new("out", fetch(backend, &out, rows * outputs)?, stored(inputs)),
            after_gelu("gelu", fetch(backend, &activated, rows * outputs)?, gelu(inputs), &pre),
            Output::new("pre", pre, stored(inputs)),
            after_gelu("dinp*gelu'", fetch(backend, &dpre, rows * inputs)?, gelu(outputs), &dinp),
            Output::new("dinp", dinp, stored(outputs)),
            Output::new("dweight", set[weight.range()].to_vec(), sums(rows)),
            Output::new("dbias", set[bias.range()].to_vec(), sums(rows)),
            Output::new("dweight added", added[weight.range()].to_vec(), sums(rows)),
            Output::new("dbias added", added[bias.range()].to_vec(), sums(rows)),
        ])
    }
}

/// Forward alone and with the residual, backward set and added.
struct LayerNormCase {
    rows: usize,
    channels: usize,
}

impl Case for LayerNormCase {
    fn op(&self) -> &'static str {
        "layernorm"
    }

    fn shape(&self) -> String {
        format!("M={} C={}", self.rows, self.channels)
    }

    fn run<B: Backend>(&self, backend: &mut B, arithmetic: Arithmetic) -> Result<Vec<Output>> {
        let (rows, c) = (self.rows, self.channels);
        let mut random = Inputs::new(2, arithmetic);
        let ([weight, bias], len) = layout([c, c]);
        let affine = Affine { weight, bias };
        let params = upload(backend, Role::Parameters, &random.normal(len, 1.0))?;
        let x = upload(backend, Role::Activations, &random.normal(rows * c, 1.0))?;
        let branch = upload(backend, Role::Activations, &random.normal(rows * c, 1.0))?;
        let dout = upload(backend, Role::Activations, &random.normal(rows * c, 1.0))?;
        let mut dx = upload(backend, Role::Activations, &random.normal(rows * c, 1.0))?;
        let mut grads = upload(backend, Role::Gradients, &random.normal(len, 1.0))?;

        let mut out = unwritten(backend, rows * c)?;
        let (mut mean, mut rstd) = (unwritten_statistics(backend, rows)?, unwritten_statistics(backend, rows)?);
        let normed = Normed { out: &mut out, mean: &mut mean, rstd: &mut rstd };
        backend.layernorm_forward(normed, &x, &params, affine, rows)?;
        let alone = fetch(backend, &out, rows * c)?;
        let mut residual = unwritten(backend, rows * c)?;
        let normed = Normed { out: &mut out, mean: &mut mean, rstd: &mut rstd };
        backend.residual_layernorm_forward(&mut residual, normed, &x, &branch, &params, affine, rows)?;
        let input = || NormedInput { x: &residual, mean: &mean, rstd: &rstd };
        let (add, set) = (Write::Add, Write::Set);
        backend.layernorm_backward(&mut dx, &mut grads, &dout, input(), &params, affine, rows, add, add)?;
        let (dx_added, added) = (fetch(backend, &dx, rows * c)?, fetch(backend, &grads, len)?);
        backend.layernorm_backward(&mut dx, &mut grads, &dout, input(), &params, affine, rows, set, set)?;
        let grads = fetch(backend, &grads, len)?;

        // A row of one channel has no spread: its reciprocal deviation, 316, magnifies every rounding.
        let magnified = if c == 1 { 1000 * 1000 } else { 0 };
        let row = Tolerance::of_sums(arithmetic.sum_unit(), [c, c, 8, magnified]);
        let column = Tolerance::of_sums(arithmetic.sum_unit(), [rows, c, c, 8, magnified]);
        // The residual is rounded where it is stored, and all that follows comes from what is stored.
        let stored = arithmetic.stored_unit();
        let (row, of_sum) = (row.with_stored(arithmetic), row.with_roundings(stored, 1).with_stored(arithmetic));
        let column = column.with_roundings(stored, 1);
        let once = Tolerance::of_sums(arithmetic.sum_unit(), [1]).with_stored(arithmetic);
        Ok(vec![
            Output::new("out", alone, row),
            Output::new("residual", fetch(backend, &residual, rows * c)?, once),
            Output::new("out of sum", fetch(backend, &out, rows * c)?, of_sum),
            Output::new("mean", fetch(backend, &mean, rows)?, of_sum),
            Output::new("rstd", fetch(backend, &rstd, rows)?, of_sum),
            Output::new("dx", fetch(backend, &dx, rows * c)?, of_sum),
            Output::new("dx added", dx_added, of_sum),
            Output::new("dweight", grads[weight.range()].to_vec(), column),
            Output::new("dbias", grads[bias.range()].to_vec(), column),
            Output::new("dweight added", added[weight.range()].to_vec(), column),
            Output::new("dbias added", added[bias.range()].to_vec(), column),
        ])
    }
}

/// Embeddings at a past of some tokens, and their gradients, set and added.
struct EmbedCase {
    dims: SequenceDims,
    vocab: usize,
}

impl Case for EmbedCase {
    fn op(&self) -> &'static str {
        "embed"
    }

    fn shape(&self) -> String {
        let SequenceDims { batch, tokens, channels, .. } = self.dims;
        format!("B={batch} T={tokens} C={channels} V={}", self.vocab)
    }

    fn run<B: Backend>(&self, backend: &mut B, arithmetic: Arithmetic) -> Result<Vec<Output>> {
        const PAST: usize = 3;
        let (dims, c) = (self.dims, self.dims.channels);
        let mut random = Inputs::new(3, arithmetic);
        let ([tokens, positions], len) = layout([self.vocab * c, (dims.tokens + PAST + 1) * c]);
        let embeddings = Embeddings { tokens, positions };
        let params = upload(backend, Role::Parameters, &random.normal(len, 1.0))?;
        let dout = upload(backend, Role::Activations, &random.normal(dims.rows() * c, 1.0))?;
        let mut grads = upload(backend, Role::Gradients, &random.normal(len, 1.0))?;
        let mut ids = backend.alloc_tokens("tokens", dims.rows())?;
        backend.upload_tokens(&mut ids, &random.tokens(dims.rows(), self.vocab))?;

        let mut out = unwritten(backend, dims.rows() * c)?;
        backend.embed_forward(&mut out, &ids, &params, embeddings, dims, PAST)?;
        backend.embed_backward(&mut grads, &dout, &ids, embeddings, dims, Write::Add)?;
        let added = fetch(backend, &grads, len)?;
        backend.embed_backward(&mut grads, &dout, &ids, embeddings, dims, Write::Set)?;
        let set = fetch(backend, &grads, len)?;
        let sums = Tolerance::of_sums(arithmetic.sum_unit(), [2 * dims.rows(), 2]);
        let once = Tolerance::of_sums(arithmetic.sum_unit(), [1]).with_stored(arithmetic);
        Ok(vec![
            Output::new("out", fetch(backend, &out, dims.rows() * c)?, once),
            Output::new("dwte", set[tokens.range()].to_vec(), sums),
            Output::new("dwpe", set[positions.range()].to_vec(), sums),
            Output::new("dwpe added", added[positions.range()].to_vec(), sums),
        ])
    }
}
