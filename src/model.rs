//! GPT-2 with banded MLPs, forward and backward, written once over [`Backend`].
//!
//! Pre-LayerNorm blocks on a residual stream: x += attention(ln1(x)); x += fc2(gelu(fc1(ln2(x)))); the loss is the mean
//! cross-entropy of the tied head over lnf(x). FC1 and FC2 are dense or banded, each for itself.

use crate::backend::{
    Affine, Backend, BiasGrad, Device, Embeddings, Expansion, HeadDims, KeyValues, LinearDims, Normed, NormedInput,
    Role, SequenceDims, Write,
};
use crate::config::GptConfig;
use crate::error::Result;
use crate::shapes::{Act, Param, ParamTable, Span};
use crate::weights::Weights;
use crate::whole::WholeGradients;

/// A model on a device.
pub struct Model<B: Backend> {
    backend: B,
    config: GptConfig,
    table: ParamTable,
    params: B::Buffer,
    /// The bands' geometry, in the order of [`ParamTable::bands`].
    bands: Vec<B::Table>,
}

/// The activations of one batch of B sequences of T tokens, and the gradients of activations where there is a backward
/// pass. Tensors that each layer keeps for the backward pass are vectors of one buffer per layer; without a backward pass
/// all layers share one.
pub struct Activations<B: Device> {
    dims: SequenceDims,
    inputs: B::Tokens,
    targets: B::Tokens,
    embedded: B::Buffer,
    ln1: Vec<B::Buffer>,
    ln1_mean: Vec<B::Buffer>,
    ln1_rstd: Vec<B::Buffer>,
    qkv: Vec<B::Buffer>,
    attention: Vec<B::Buffer>,
    log_sum_exp: Vec<B::Buffer>,
    residual_mid: Vec<B::Buffer>,
    ln2: Vec<B::Buffer>,
    ln2_mean: Vec<B::Buffer>,
    ln2_rstd: Vec<B::Buffer>,
    pre_gelu: Vec<B::Buffer>,
    gelu: Vec<B::Buffer>,
    residual_out: Vec<B::Buffer>,
    lnf: B::Buffer,
    lnf_mean: B::Buffer,
    lnf_rstd: B::Buffer,
    branch: B::Buffer,
    losses: B::Buffer,
    backward: Option<BackwardActivations<B>>,
}

/// Gradients of activations; all layers share them.
struct BackwardActivations<B: Device> {
    residual: B::Buffer,
    layernorm: B::Buffer,
    attention: B::Buffer,
    qkv: B::Buffer,
    pre_gelu: B::Buffer,
}

impl<B: Backend> Activations<B> {
    /// Buffers for batches of B sequences of T tokens.
    ///
    /// # Errors
    /// The device has not enough memory.
    pub fn new(model: &mut Model<B>, batch: usize, tokens: usize, backward: bool) -> Result<Self> {
        let (config, device) = (model.config, &mut model.backend);
        let mut alloc = |act: Act| {
            let activation = act.describe(&config, batch, tokens);
            let role = if activation.statistic { Role::Statistics } else { Role::Activations };
            let copies = if activation.per_layer && backward { config.num_layers } else { 1 };
            (0..copies).map(|_| device.alloc(role, activation.name, activation.len)).collect::<Result<Vec<_>>>()
        };
        let mut one = |act: Act| alloc(act).map(|mut buffers| buffers.remove(0));
        let backward = match backward {
            false => None,
            true => Some(BackwardActivations {
                residual: one(Act::DResidual)?,
                layernorm: one(Act::DLayerNorm)?,
                attention: one(Act::DAttention)?,
                qkv: one(Act::DQkv)?,
                pre_gelu: one(Act::DPreGelu)?,
            }),
        };
        Ok(Self {
            dims: SequenceDims { batch, tokens, channels: config.channels, heads: config.num_heads },
            embedded: one(Act::Embedded)?,
            lnf: one(Act::Lnf)?,
            lnf_mean: one(Act::LnfMean)?,
            lnf_rstd: one(Act::LnfRstd)?,
            branch: one(Act::Branch)?,
            losses: one(Act::Losses)?,
            ln1: alloc(Act::Ln1)?,
            ln1_mean: alloc(Act::Ln1Mean)?,
            ln1_rstd: alloc(Act::Ln1Rstd)?,
            qkv: alloc(Act::Qkv)?,
            attention: alloc(Act::Attention)?,
            log_sum_exp: alloc(Act::LogSumExp)?,
            residual_mid: alloc(Act::ResidualMid)?,
            ln2: alloc(Act::Ln2)?,
            ln2_mean: alloc(Act::Ln2Mean)?,
            ln2_rstd: alloc(Act::Ln2Rstd)?,
            pre_gelu: alloc(Act::PreGelu)?,
            gelu: alloc(Act::Gelu)?,
            residual_out: alloc(Act::ResidualOut)?,
            backward,
            inputs: device.alloc_tokens("inputs", batch * tokens)?,
            targets: device.alloc_tokens("targets", batch * tokens)?,
        })
    }

    /// B, T, C, NH.
    pub fn dims(&self) -> SequenceDims {
        self.dims
    }

    /// Which buffer a layer uses.
    fn slot(&self, layer: usize) -> usize {
        layer.min(self.ln1.len() - 1)
    }
}

/// Keys and values of every layer for generation: each `[B, capacity, C]`.
pub struct KvCache<B: Device> {
    layers: Vec<(B::Buffer, B::Buffer)>,
    capacity: usize,
    past: usize,
}

impl<B: Backend> KvCache<B> {
    /// Room for `capacity` tokens of each of `batch` sequences.
    ///
    /// # Errors
    /// The device has not enough memory.
    pub fn new(model: &mut Model<B>, batch: usize, capacity: usize) -> Result<Self> {
        let len = batch * capacity * model.config.channels;
        let mut alloc = |name| model.backend.alloc(Role::Activations, name, len);
        let layers = (0..model.config.num_layers)
            .map(|_| Ok((alloc("key cache")?, alloc("value cache")?)))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { layers, capacity, past: 0 })
    }

    /// Tokens per sequence in the cache.
    pub fn past(&self) -> usize {
        self.past
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.past = 0;
    }

    fn layer(&mut self, layer: usize) -> KeyValues<'_, B::Buffer> {
        let (keys, values) = &mut self.layers[layer];
        KeyValues { keys, values, capacity: self.capacity, past: self.past }
    }
}

impl<B: Backend> Model<B> {
    /// Brings weights to a device.
    ///
    /// # Errors
    /// The device has not enough memory.
    pub fn new(mut backend: B, weights: &Weights) -> Result<Self> {
        let table = weights.table().clone();
        let mut params = backend
            .alloc(Role::Parameters, "parameters", table.len())
            .map_err(|error| error.with_memory_advice("the model itself does not fit, choose a smaller one"))?;
        backend.upload(&mut params, 0, weights.values())?;
        let bands = table.bands().iter().map(|band| backend.band_table(band)).collect::<Result<_>>()?;
        Ok(Self { backend, config: *weights.config(), table, params, bands })
    }

    /// The model's sizes.
    pub fn config(&self) -> &GptConfig {
        &self.config
    }

    /// Where the parameters lie.
    pub fn table(&self) -> &ParamTable {
        &self.table
    }

    /// The device.
    pub fn backend(&mut self) -> &mut B {
        &mut self.backend
    }

    /// The device and the parameters, for the optimizer.
    pub(crate) fn backend_and_params(&mut self) -> (&mut B, &mut B::Buffer) {
        (&mut self.backend, &mut self.params)
    }

    /// The weights back in host memory.
    ///
    /// # Errors
    /// The device failed.
    pub fn weights(&mut self) -> Result<Weights> {
        let mut weights = Weights::zeros_in(&self.config, self.table.clone())?;
        let all = Span { offset: 0, len: self.table.len() };
        weights.values_mut().copy_from_slice(&self.backend.download(&self.params, all)?);
        Ok(weights)
    }

    /// Takes other weights of the same sizes, whose learned blocks may be others. An [`crate::optim::Optimizer`] has to follow
    /// ([`crate::optim::Optimizer::follow`]).
    ///
    /// # Errors
    /// The device has not enough memory, or failed.
    pub fn set_weights(&mut self, weights: &Weights) -> Result<()> {
        let table = weights.table();
        if table.tensors() != self.table.tensors() {
            renew(&mut self.backend, &mut self.params, Role::Parameters, "parameters", table.len())?;
        }
        self.backend.upload(&mut self.params, 0, weights.values())?;
        self.bands = table.bands().iter().map(|band| self.backend.band_table(band)).collect::<Result<_>>()?;
        self.table = table.clone();
        Ok(())
    }

    /// Brings B*T input tokens and as many targets to the device. The caller has checked them against the vocabulary.
    ///
    /// # Errors
    /// The device failed.
    pub fn upload_batch(&mut self, acts: &mut Activations<B>, inputs: &[u32], targets: &[u32]) -> Result<()> {
        self.backend.upload_tokens(&mut acts.inputs, inputs)?;
        self.backend.upload_tokens(&mut acts.targets, targets)
    }

    /// The mean loss of the uploaded batch, on the device: `total[0] (+)= scale * sum of losses`.
    ///
    /// # Errors
    /// The device failed.
    pub fn evaluate(
        &mut self,
        acts: &mut Activations<B>,
        total: &mut B::Buffer,
        scale: f32,
        write: Write,
    ) -> Result<()> {
        self.loss_forward(acts)?;
        self.backend.loss_sum(total, &acts.losses, acts.dims.rows(), scale, write)
    }

    /// The loss of each of the uploaded batch's B*T rows.
    ///
    /// # Errors
    /// The device failed.
    pub fn losses(&mut self, acts: &mut Activations<B>) -> Result<Vec<f32>> {
        self.loss_forward(acts)?;
        self.backend.download(&acts.losses, Span { offset: 0, len: acts.dims.rows() })
    }

    /// Forward and backward of the uploaded batch: the gradients of `scale * sum of losses` are set in, or added to,
    /// `grads`, and `total[0] (+)= scale * sum of losses`. Where `whole` is given, those of learned layers go there as well, with
    /// those of the connections that do not exist.
    ///
    /// # Errors
    /// The device failed.
    pub fn forward_backward(
        &mut self,
        acts: &mut Activations<B>,
        grads: &mut B::Buffer,
        whole: Option<&mut WholeGradients<B>>,
        total: &mut B::Buffer,
        scale: f32,
        write: Write,
    ) -> Result<()> {
        self.forward(acts, None)?;
        let mut d = acts.backward.take().expect("activations were allocated with a backward pass");
        let result = self.backward(acts, &mut d, grads, whole, scale, write);
        acts.backward = Some(d);
        result?;
        self.backend.loss_sum(total, &acts.losses, acts.dims.rows(), scale, write)
    }

    /// Generation: runs T new tokens of each sequence through the model and appends them to the cache; `logits`
    /// `[rows, V]` receives the logits of the last `rows` of the B*T rows.
    ///
    /// # Errors
    /// The device failed.
    pub fn extend(
        &mut self,
        acts: &mut Activations<B>,
        cache: &mut KvCache<B>,
        tokens: &[u32],
        logits: &mut B::Buffer,
        rows: usize,
    ) -> Result<()> {
        self.backend.upload_tokens(&mut acts.inputs, tokens)?;
        self.forward(acts, Some(cache))?;
        cache.past += acts.dims.tokens;
        let wte = self.table.span(Param::Wte, 0);
        let first = acts.dims.rows() - rows;
        let dims = self.head_dims(rows);
        self.backend.head_logits(logits, &acts.lnf, &self.params, wte, first, dims)
    }

    /// Logits `[B*T, V]` of a whole batch of inputs, for tests and tools.
    ///
    /// # Errors
    /// The device failed or has not enough memory.
    pub fn logits(&mut self, acts: &mut Activations<B>, inputs: &[u32]) -> Result<Vec<f32>> {
        self.backend.upload_tokens(&mut acts.inputs, inputs)?;
        self.forward(acts, None)?;
        let dims = self.head_dims(acts.dims.rows());
        let len = dims.rows * dims.vocab;
        let mut logits = self.backend.alloc(Role::Statistics, "logits", len)?;
        let wte = self.table.span(Param::Wte, 0);
        self.backend.head_logits(&mut logits, &acts.lnf, &self.params, wte, 0, dims)?;
        self.backend.download(&logits, Span { offset: 0, len })
    }

    /// From the uploaded batch to the losses of its rows.
    fn loss_forward(&mut self, acts: &mut Activations<B>) -> Result<()> {
        self.forward(acts, None)?;
        let dims = self.head_dims(acts.dims.rows());
        let wte = self.table.span(Param::Wte, 0);
        self.backend.loss_forward(&mut acts.losses, &acts.lnf, &self.params, wte, &acts.targets, dims)
    }

    /// From tokens to the final LayerNorm, with attention over the batch alone or over a cache.
    fn forward(&mut self, acts: &mut Activations<B>, mut cache: Option<&mut KvCache<B>>) -> Result<()> {
        let (dims, rows) = (acts.dims, acts.dims.rows());
        let past = cache.as_ref().map_or(0, |cache| cache.past);
        self.backend.embed_forward(&mut acts.embedded, &acts.inputs, &self.params, self.embeddings(), dims, past)?;
        let ln1 = self.affine(Param::Ln1w, Param::Ln1b, 0);
        let normed = Normed { out: &mut acts.ln1[0], mean: &mut acts.ln1_mean[0], rstd: &mut acts.ln1_rstd[0] };
        self.backend.layernorm_forward(normed, &acts.embedded, &self.params, ln1, rows)?;
        for layer in 0..self.config.num_layers {
            let s = acts.slot(layer);
            let qkv = self.affine(Param::Qkvw, Param::Qkvb, layer);
            let qkv_dims = self.linear_dims(Param::Qkvw, rows);
            self.backend.linear_forward(&mut acts.qkv[s], None, &acts.ln1[s], &self.params, qkv, qkv_dims)?;
            match cache.as_deref_mut() {
                None => self.backend.attention_forward(
                    &mut acts.attention[s],
                    &mut acts.log_sum_exp[s],
                    &acts.qkv[s],
                    dims,
                )?,
                Some(cache) => {
                    self.backend.attention_cached(&mut acts.attention[s], cache.layer(layer), &acts.qkv[s], dims)?
                }
            }
            let proj = self.affine(Param::Attprojw, Param::Attprojb, layer);
            let proj_dims = self.linear_dims(Param::Attprojw, rows);
            self.backend.linear_forward(&mut acts.branch, None, &acts.attention[s], &self.params, proj, proj_dims)?;
            let ln2 = self.affine(Param::Ln2w, Param::Ln2b, layer);
            let x = match layer {
                0 => &acts.embedded,
                _ => &acts.residual_out[acts.slot(layer - 1)],
            };
            let normed = Normed { out: &mut acts.ln2[s], mean: &mut acts.ln2_mean[s], rstd: &mut acts.ln2_rstd[s] };
            let residual = &mut acts.residual_mid[s];
            self.backend.residual_layernorm_forward(residual, normed, x, &acts.branch, &self.params, ln2, rows)?;
            self.fc1_forward(acts, layer)?;
            self.fc2_forward(acts, layer)?;
            let last = layer + 1 == self.config.num_layers;
            let (normed, affine) = if last {
                let normed = Normed { out: &mut acts.lnf, mean: &mut acts.lnf_mean, rstd: &mut acts.lnf_rstd };
                (normed, self.affine(Param::Lnfw, Param::Lnfb, 0))
            } else {
                let n = acts.slot(layer + 1);
                let normed = Normed { out: &mut acts.ln1[n], mean: &mut acts.ln1_mean[n], rstd: &mut acts.ln1_rstd[n] };
                (normed, self.affine(Param::Ln1w, Param::Ln1b, layer + 1))
            };
            let (residual, x) = (&mut acts.residual_out[s], &acts.residual_mid[s]);
            self.backend.residual_layernorm_forward(residual, normed, x, &acts.branch, &self.params, affine, rows)?;
        }
        Ok(())
    }

    /// From the loss back to every parameter's gradient.
    fn backward(
        &mut self,
        acts: &mut Activations<B>,
        d: &mut BackwardActivations<B>,
        grads: &mut B::Buffer,
        mut whole: Option<&mut WholeGradients<B>>,
        scale: f32,
        write: Write,
    ) -> Result<()> {
        let (dims, rows) = (acts.dims, acts.dims.rows());
        self.backend.loss_forward_backward(
            &mut acts.losses,
            &mut d.layernorm,
            grads,
            &acts.lnf,
            &self.params,
            self.table.span(Param::Wte, 0),
            &acts.targets,
            self.head_dims(rows),
            scale,
            write,
        )?;
        let lnf = self.affine(Param::Lnfw, Param::Lnfb, 0);
        let last = self.config.num_layers - 1;
        let input = NormedInput { x: &acts.residual_out[last], mean: &acts.lnf_mean, rstd: &acts.lnf_rstd };
        let (dx, dout) = (&mut d.residual, &d.layernorm);
        self.backend.layernorm_backward(dx, grads, dout, input, &self.params, lnf, rows, Write::Set, write)?;
        for layer in (0..self.config.num_layers).rev() {
            self.fc2_backward(acts, d, grads, whole.as_deref_mut(), layer, write)?;
            self.fc1_backward(acts, d, grads, whole.as_deref_mut(), layer, write)?;
            let ln2 = self.affine(Param::Ln2w, Param::Ln2b, layer);
            let (mean, rstd) = (&acts.ln2_mean[layer], &acts.ln2_rstd[layer]);
            let input = NormedInput { x: &acts.residual_mid[layer], mean, rstd };
            let (dx, dout) = (&mut d.residual, &d.layernorm);
            self.backend.layernorm_backward(dx, grads, dout, input, &self.params, ln2, rows, Write::Add, write)?;

            let proj = self.affine(Param::Attprojw, Param::Attprojb, layer);
            let proj_dims = self.linear_dims(Param::Attprojw, rows);
            let (dout, inp) = (&d.residual, &acts.attention[layer]);
            self.backend.linear_backward_weight(grads, proj, dout, inp, proj_dims, write)?;
            let dinp = &mut d.attention;
            self.backend.linear_backward_input(dinp, dout, &self.params, proj.weight, None, proj_dims)?;
            self.backend.attention_backward(
                &mut d.qkv,
                &d.attention,
                &acts.attention[layer],
                &acts.log_sum_exp[layer],
                &acts.qkv[layer],
                dims,
            )?;
            let qkv = self.affine(Param::Qkvw, Param::Qkvb, layer);
            let qkv_dims = self.linear_dims(Param::Qkvw, rows);
            self.backend.linear_backward_weight(grads, qkv, &d.qkv, &acts.ln1[layer], qkv_dims, write)?;
            let dinp = &mut d.layernorm;
            self.backend.linear_backward_input(dinp, &d.qkv, &self.params, qkv.weight, None, qkv_dims)?;
            let ln1 = self.affine(Param::Ln1w, Param::Ln1b, layer);
            let x = if layer == 0 { &acts.embedded } else { &acts.residual_out[layer - 1] };
            let input = NormedInput { x, mean: &acts.ln1_mean[layer], rstd: &acts.ln1_rstd[layer] };
            let (dx, dout) = (&mut d.residual, &d.layernorm);
            self.backend.layernorm_backward(dx, grads, dout, input, &self.params, ln1, rows, Write::Add, write)?;
        }
        self.backend.embed_backward(grads, &d.residual, &acts.inputs, self.embeddings(), dims, write)
    }

    /// gelu(fc1(ln2)), dense or banded.
    fn fc1_forward(&mut self, acts: &mut Activations<B>, layer: usize) -> Result<()> {
        let (s, rows) = (acts.slot(layer), acts.dims.rows());
        let affine = self.affine(Param::Fcw, Param::Fcb, layer);
        let dims = self.linear_dims(Param::Fcw, rows);
        let (out, pre, inp) = (&mut acts.gelu[s], &mut acts.pre_gelu[s], &acts.ln2[s]);
        match self.table.band_index(Param::Fcw, layer).map(|index| &self.bands[index]) {
            None => self.backend.linear_forward(out, Some(pre), inp, &self.params, affine, dims),
            Some(table) => {
                let expansion = Expansion::BiasGelu { bias: affine.bias, pre };
                self.backend.band_expand(out, inp, &self.params, affine.weight, table, rows, expansion)
            }
        }
    }

    /// fc2(gelu), dense or banded, to the branch.
    fn fc2_forward(&mut self, acts: &mut Activations<B>, layer: usize) -> Result<()> {
        let (s, rows) = (acts.slot(layer), acts.dims.rows());
        let affine = self.affine(Param::Fcprojw, Param::Fcprojb, layer);
        let dims = self.linear_dims(Param::Fcprojw, rows);
        let (out, inp) = (&mut acts.branch, &acts.gelu[s]);
        match self.table.band_index(Param::Fcprojw, layer).map(|index| &self.bands[index]) {
            None => self.backend.linear_forward(out, None, inp, &self.params, affine, dims),
            Some(table) => {
                let bias = Some(affine.bias);
                self.backend.band_contract(out, inp, &self.params, affine.weight, table, rows, bias)
            }
        }
    }

    /// FC2's gradients from the residual's, and through the GELU to `d.pre_gelu`.
    fn fc2_backward(
        &mut self,
        acts: &Activations<B>,
        d: &mut BackwardActivations<B>,
        grads: &mut B::Buffer,
        whole: Option<&mut WholeGradients<B>>,
        layer: usize,
        write: Write,
    ) -> Result<()> {
        let rows = acts.dims.rows();
        let affine = self.affine(Param::Fcprojw, Param::Fcprojb, layer);
        let dims = self.linear_dims(Param::Fcprojw, rows);
        let (dinp, dout) = (&mut d.pre_gelu, &d.residual);
        let (inp, pre) = (&acts.gelu[layer], &acts.pre_gelu[layer]);
        match self.table.band_index(Param::Fcprojw, layer).map(|index| &self.bands[index]) {
            None => {
                self.backend.linear_backward_weight(grads, affine, dout, inp, dims, write)?;
                self.backend.linear_backward_input(dinp, dout, &self.params, affine.weight, Some(pre), dims)
            }
            Some(table) => {
                let (panels, bias) = (affine.weight, BiasGrad::Narrow(affine.bias));
                self.backend.band_outer(grads, panels, bias, inp, dout, table, rows, write)?;
                if let Some(whole) = whole
                    && let Some(place) = whole.place(Param::Fcprojw, layer, dims.outputs)
                {
                    self.backend.linear_backward_weight(&mut whole.buffer, place, dout, inp, dims, write)?;
                }
                let expansion = Expansion::GeluBackward { pre };
                self.backend.band_expand(dinp, dout, &self.params, panels, table, rows, expansion)
            }
        }
    }

    /// FC1's gradients from `d.pre_gelu`, and its input's to `d.layernorm`.
    fn fc1_backward(
        &mut self,
        acts: &Activations<B>,
        d: &mut BackwardActivations<B>,
        grads: &mut B::Buffer,
        whole: Option<&mut WholeGradients<B>>,
        layer: usize,
        write: Write,
    ) -> Result<()> {
        let rows = acts.dims.rows();
        let affine = self.affine(Param::Fcw, Param::Fcb, layer);
        let dims = self.linear_dims(Param::Fcw, rows);
        let (dinp, dout, inp) = (&mut d.layernorm, &d.pre_gelu, &acts.ln2[layer]);
        match self.table.band_index(Param::Fcw, layer).map(|index| &self.bands[index]) {
            None => {
                self.backend.linear_backward_weight(grads, affine, dout, inp, dims, write)?;
                self.backend.linear_backward_input(dinp, dout, &self.params, affine.weight, None, dims)
            }
            Some(table) => {
                let (panels, bias) = (affine.weight, BiasGrad::Wide(affine.bias));
                self.backend.band_outer(grads, panels, bias, dout, inp, table, rows, write)?;
                if let Some(whole) = whole
                    && let Some(place) = whole.place(Param::Fcw, layer, dims.outputs)
                {
                    self.backend.linear_backward_weight(&mut whole.buffer, place, dout, inp, dims, write)?;
                }
                self.backend.band_contract(dinp, dout, &self.params, panels, table, rows, None)
            }
        }
    }

    fn embeddings(&self) -> Embeddings {
        Embeddings { tokens: self.table.span(Param::Wte, 0), positions: self.table.span(Param::Wpe, 0) }
    }

    fn affine(&self, weight: Param, bias: Param, layer: usize) -> Affine {
        Affine { weight: self.table.span(weight, layer), bias: self.table.span(bias, layer) }
    }

    fn linear_dims(&self, weight: Param, rows: usize) -> LinearDims {
        let (outputs, inputs) = weight.shape(&self.config);
        LinearDims { rows, inputs, outputs }
    }

    fn head_dims(&self, rows: usize) -> HeadDims {
        HeadDims {
            rows,
            channels: self.config.channels,
            vocab: self.config.vocab_size,
            padded_vocab: self.config.padded_vocab_size,
        }
    }
}

/// Puts a buffer of zeros in another one's place, which is gone before it comes.
pub(crate) fn renew<B: Device>(
    device: &mut B,
    buffer: &mut B::Buffer,
    role: Role,
    name: &'static str,
    len: usize,
) -> Result<()> {
    *buffer = device.alloc(role, name, 1)?;
    // Only then is the memory of what was given up free.
    device.sync()?;
    *buffer = device.alloc(role, name, len)?;
    Ok(())
}
