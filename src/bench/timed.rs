//! A backend whose operations can all be told apart and timed: by the device's own clock where it has one, else by the host's.

use crate::backend::{
    AdamW, AdamWStep, Affine, Arithmetic, Attention, Backend, BandLinear, BiasGrad, Device, Embed, Embeddings,
    Expansion, HeadDims, KeyValues, LayerNorm, Linear, LinearDims, Loss, Normed, NormedInput, OpTime, OptimizerState,
    Part, Role, SequenceDims, Write,
};
use crate::band::Band;
use crate::config::GptConfig;
use crate::error::Result;
use crate::shapes::Span;
use std::time::Instant;

/// Another backend, which it hands everything on to. Its profile always works, and says for dense products which part of the
/// model they belong to.
pub(super) struct Timed<B> {
    inner: B,
    clock: Clock,
    narrow: usize,
    wide: usize,
}

enum Clock {
    Off,
    /// The backend's own profile is running.
    Device,
    /// Every operation is waited for; what they took so far.
    Host(Vec<OpTime>),
}

/// What stands for the kernels' names when only whole operations are timed.
pub(super) const HOST_CLOCK: &str = "(whole operation, by the host's clock)";

impl<B: Backend> Timed<B> {
    /// A backend for models of these sizes.
    pub fn new(inner: B, config: &GptConfig) -> Self {
        Self { inner, clock: Clock::Off, narrow: config.channels, wide: config.mlp_width() }
    }

    /// The part of the model that a dense product of these sizes belongs to.
    fn part(&self, product: Option<LinearDims>) -> Part {
        match product {
            None => Part::Model,
            Some(LinearDims { inputs, outputs, .. }) => {
                let is_mlp = [(self.narrow, self.wide), (self.wide, self.narrow)].contains(&(inputs, outputs));
                if is_mlp { Part::Mlp } else { Part::Attention }
            }
        }
    }

    /// Runs an operation, timing it where that is asked for.
    fn op(
        &mut self,
        op: &'static str,
        product: Option<LinearDims>,
        run: impl FnOnce(&mut B) -> Result<()>,
    ) -> Result<()> {
        let part = self.part(product);
        match &mut self.clock {
            Clock::Off => run(&mut self.inner),
            Clock::Device => {
                self.inner.profile_part(part);
                run(&mut self.inner)
            }
            Clock::Host(times) => {
                self.inner.sync()?;
                let start = Instant::now();
                run(&mut self.inner)?;
                self.inner.sync()?;
                add(times, op, part, start.elapsed().as_secs_f64());
                Ok(())
            }
        }
    }
}

fn add(times: &mut Vec<OpTime>, op: &'static str, part: Part, seconds: f64) {
    match times.iter_mut().find(|time| (time.op, time.part) == (op, part)) {
        Some(time) => {
            time.count += 1;
            time.seconds += seconds;
        }
        None => times.push(OpTime { op, part, kernel: HOST_CLOCK.to_string(), count: 1, seconds }),
    }
}

impl<B: Backend> Device for Timed<B> {
    type Buffer = B::Buffer;
    type Tokens = B::Tokens;
    type Pending = B::Pending;

    const SYNCHRONOUS: bool = B::SYNCHRONOUS;

    fn description(&self) -> String {
        self.inner.description()
    }

    fn arithmetic(&self) -> Arithmetic {
        self.inner.arithmetic()
    }

    fn free_bytes(&self) -> Option<usize> {
        self.inner.free_bytes()
    }

    fn max_buffer_bytes(&self) -> Option<usize> {
        self.inner.max_buffer_bytes()
    }

    fn element_bytes(&self, role: Role) -> usize {
        self.inner.element_bytes(role)
    }

    fn scratch_bytes(&self, dims: HeadDims, sequence: SequenceDims) -> usize {
        self.inner.scratch_bytes(dims, sequence)
    }

    fn alloc(&mut self, role: Role, name: &str, len: usize) -> Result<B::Buffer> {
        self.inner.alloc(role, name, len)
    }

    fn alloc_tokens(&mut self, name: &str, len: usize) -> Result<B::Tokens> {
        self.inner.alloc_tokens(name, len)
    }

    fn upload(&mut self, buffer: &mut B::Buffer, offset: usize, values: &[f32]) -> Result<()> {
        self.inner.upload(buffer, offset, values)
    }

    fn upload_tokens(&mut self, buffer: &mut B::Tokens, tokens: &[u32]) -> Result<()> {
        self.inner.upload_tokens(buffer, tokens)
    }

    fn download(&mut self, buffer: &B::Buffer, span: Span) -> Result<Vec<f32>> {
        self.inner.download(buffer, span)
    }

    fn request(&mut self, buffer: &B::Buffer, span: Span) -> Result<B::Pending> {
        self.inner.request(buffer, span)
    }

    fn collect(&mut self, pending: B::Pending) -> Result<Vec<f32>> {
        self.inner.collect(pending)
    }

    fn sync(&mut self) -> Result<()> {
        self.inner.sync()
    }

    fn profile_start(&mut self) -> Result<bool> {
        self.clock = if self.inner.profile_start()? { Clock::Device } else { Clock::Host(Vec::new()) };
        Ok(true)
    }

    fn profile_finish(&mut self) -> Result<Vec<OpTime>> {
        match std::mem::replace(&mut self.clock, Clock::Off) {
            Clock::Off => Ok(Vec::new()),
            Clock::Device => self.inner.profile_finish(),
            Clock::Host(times) => Ok(times),
        }
    }
}

/// Operations that are handed on; before the arguments stand the sizes of a dense product.
macro_rules! handed_on {
    ($($op:ident($product:expr; $($arg:ident: $type:ty),* $(,)?);)*) => {$(
        #[allow(clippy::too_many_arguments)]
        fn $op(&mut self, $($arg: $type),*) -> Result<()> {
            self.op(stringify!($op), $product, |inner| inner.$op($($arg),*))
        }
    )*};
}

impl<B: Backend> Embed for Timed<B> {
    handed_on! {
        embed_forward(None; out: &mut B::Buffer, tokens: &B::Tokens, params: &B::Buffer, embeddings: Embeddings,
            dims: SequenceDims, past: usize);
        embed_backward(None; grads: &mut B::Buffer, dout: &B::Buffer, tokens: &B::Tokens, embeddings: Embeddings,
            dims: SequenceDims, write: Write);
    }
}

impl<B: Backend> LayerNorm for Timed<B> {
    handed_on! {
        layernorm_forward(None; normed: Normed<'_, B::Buffer>, x: &B::Buffer, params: &B::Buffer, affine: Affine,
            rows: usize);
        residual_layernorm_forward(None; residual: &mut B::Buffer, normed: Normed<'_, B::Buffer>, x: &B::Buffer,
            branch: &B::Buffer, params: &B::Buffer, affine: Affine, rows: usize);
        layernorm_backward(None; dresidual: &mut B::Buffer, grads: &mut B::Buffer, dout: &B::Buffer,
            input: NormedInput<'_, B::Buffer>, params: &B::Buffer, affine: Affine, rows: usize, residual_write: Write,
            write: Write);
    }
}

impl<B: Backend> Linear for Timed<B> {
    handed_on! {
        linear_forward(Some(dims); out: &mut B::Buffer, pre: Option<&mut B::Buffer>, inp: &B::Buffer, params: &B::Buffer,
            affine: Affine, dims: LinearDims);
        linear_backward_input(Some(dims); dinp: &mut B::Buffer, dout: &B::Buffer, params: &B::Buffer, weight: Span,
            pre: Option<&B::Buffer>, dims: LinearDims);
        linear_backward_weight(Some(dims); grads: &mut B::Buffer, affine: Affine, dout: &B::Buffer, inp: &B::Buffer,
            dims: LinearDims, write: Write);
    }
}

impl<B: Backend> BandLinear for Timed<B> {
    type Table = B::Table;

    fn band_table(&mut self, band: &Band) -> Result<B::Table> {
        self.inner.band_table(band)
    }

    handed_on! {
        band_expand(None; y: &mut B::Buffer, x: &B::Buffer, params: &B::Buffer, panels: Span, table: &B::Table, rows: usize,
            expansion: Expansion<'_, B::Buffer>);
        band_contract(None; y: &mut B::Buffer, x: &B::Buffer, params: &B::Buffer, panels: Span, table: &B::Table,
            rows: usize, bias: Option<Span>);
        band_outer(None; grads: &mut B::Buffer, panels: Span, bias: BiasGrad, wide: &B::Buffer, narrow: &B::Buffer,
            table: &B::Table, rows: usize, write: Write);
    }
}

impl<B: Backend> Attention for Timed<B> {
    handed_on! {
        attention_forward(None; out: &mut B::Buffer, log_sum_exp: &mut B::Buffer, qkv: &B::Buffer, dims: SequenceDims);
        attention_backward(None; dqkv: &mut B::Buffer, dout: &B::Buffer, out: &B::Buffer, log_sum_exp: &B::Buffer,
            qkv: &B::Buffer, dims: SequenceDims);
        attention_cached(None; out: &mut B::Buffer, cache: KeyValues<'_, B::Buffer>, qkv: &B::Buffer, dims: SequenceDims);
    }
}

impl<B: Backend> Loss for Timed<B> {
    handed_on! {
        loss_forward(None; losses: &mut B::Buffer, x: &B::Buffer, params: &B::Buffer, wte: Span, targets: &B::Tokens,
            dims: HeadDims);
        loss_forward_backward(None; losses: &mut B::Buffer, dx: &mut B::Buffer, grads: &mut B::Buffer, x: &B::Buffer,
            params: &B::Buffer, wte: Span, targets: &B::Tokens, dims: HeadDims, scale: f32, write: Write);
        head_logits(None; logits: &mut B::Buffer, x: &B::Buffer, params: &B::Buffer, wte: Span, first_row: usize,
            dims: HeadDims);
        loss_sum(None; total: &mut B::Buffer, losses: &B::Buffer, rows: usize, scale: f32, write: Write);
    }
}

impl<B: Backend> AdamW for Timed<B> {
    type Plan = B::Plan;

    fn adamw_plan(&mut self, decayed: &[Span], len: usize) -> Result<B::Plan> {
        self.inner.adamw_plan(decayed, len)
    }

    handed_on! {
        grad_norm(None; norm: &mut B::Buffer, grads: &B::Buffer);
        adamw_step(None; state: OptimizerState<'_, B::Buffer>, grads: &B::Buffer, norm: &B::Buffer, plan: &B::Plan,
            step: &AdamWStep);
    }
}
