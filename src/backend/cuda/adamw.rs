//! AdamW on the card: `kernels/adamw.cu` over the flat buffers.

use super::buffer::{Buffer, Element};
use super::{Cuda, Unit, args, unit};
use crate::backend::{AdamW, AdamWStep, Arithmetic, OptimizerState};
use crate::error::Result;
use crate::shapes::{Span, TENSOR_ALIGN};

const THREADS: usize = 256;
/// Threads of the block that adds the parts of the norm.
const SUM_THREADS: usize = 1024;
/// Elements that a block squares and sums.
const NORM_ELEMENTS: usize = 16 * 4 * THREADS;
/// Elements that a block updates.
const BLOCK_ELEMENTS: usize = 4 * THREADS;

/// Which parameters decay: a byte for each [`TENSOR_ALIGN`] of them.
pub struct Plan {
    decays: Buffer,
}

fn adamw_unit(arithmetic: Arithmetic) -> Unit {
    unit("adamw", arithmetic, true)
}

impl Cuda {
    /// Brings the bf16 copy of parameters up to date within `span`.
    pub(super) fn round_params(&mut self, params: &Buffer, span: Span) -> Result<()> {
        let Some(copy) = params.copy() else { return Ok(()) };
        // Whole vectors of 4 around the span, which stay inside the buffer: its memory is cut in vectors.
        let offset = span.offset / 4 * 4;
        let len = (span.offset + span.len).next_multiple_of(4).min(params.len()) - offset;
        let span = Span { offset, len };
        let (copy, params) = (copy.part(Element::Bf16, span)?, params.part(Element::F32, span)?);
        let unit = adamw_unit(self.arithmetic);
        let grid = [span.len.div_ceil(BLOCK_ELEMENTS), 1, 1];
        self.launch("round_params", &unit, "round_params", grid, THREADS, 0, args![copy, params, span.len]);
        Ok(())
    }
}

impl AdamW for Cuda {
    type Plan = Plan;

    fn adamw_plan(&mut self, decayed: &[Span], len: usize) -> Result<Plan> {
        // Tensors start at multiples of TENSOR_ALIGN, and the gaps behind them hold zeros that stay zeros.
        let mut bytes = vec![0u8; len.div_ceil(TENSOR_ALIGN).next_multiple_of(4)];
        for span in decayed {
            bytes[span.offset / TENSOR_ALIGN..span.range().end.div_ceil(TENSOR_ALIGN)].fill(1);
        }
        let words: Vec<u32> = bytes.chunks(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let decays = self.create(Element::F32, "the optimizer's plan", words.len())?;
        let to = decays.f32s(words.len())?;
        self.copy_words(to, &words)?;
        Ok(Plan { decays })
    }

    fn grad_norm(&mut self, norm: &mut Buffer, grads: &Buffer) -> Result<()> {
        const OP: &str = "grad_norm";
        let len = grads.len();
        let (norm, grads) = (norm.f32s(1)?, grads.f32s(len)?);
        let count = len.div_ceil(NORM_ELEMENTS);
        let parts = self.scratch("parts of the norm", Element::F32, count)?;
        let unit = adamw_unit(self.arithmetic);
        self.launch(OP, &unit, "norm_parts", [count, 1, 1], THREADS, 0, args![parts, grads, len]);
        self.launch(OP, &unit, OP, [1, 1, 1], SUM_THREADS, 0, args![norm, parts, count]);
        Ok(())
    }

    fn adamw_step(
        &mut self,
        state: OptimizerState<'_, Buffer>,
        grads: &Buffer,
        norm: &Buffer,
        plan: &Plan,
        step: &AdamWStep,
    ) -> Result<()> {
        const OP: &str = "adamw_step";
        // The constants change with each step, so they lie on the device: a step's recording is always the same. They may
        // not change before an update that is recorded with the ones there.
        if self.constants_recorded {
            self.submit()?;
        }
        let constants = step.constants();
        let words: &[u32] = bytemuck::cast_slice(bytemuck::bytes_of(&constants));
        let to = self.constants.f32s(words.len())?;
        self.copy_constants(to, words)?;
        self.constants_recorded = true;
        let len = state.params.len();
        let copy = match state.params.copy() {
            Some(copy) => copy.part(Element::Bf16, Span { offset: 0, len })?,
            None => 0,
        };
        let args = args![
            state.params.f32s(len)?,
            state.m.f32s(len)?,
            state.v.f32s(len)?,
            copy,
            grads.f32s(len)?,
            norm.f32s(1)?,
            plan.decays.f32s(plan.decays.len())?,
            to,
            len,
        ];
        let unit = adamw_unit(self.arithmetic);
        self.launch(OP, &unit, OP, [len.div_ceil(BLOCK_ELEMENTS), 1, 1], THREADS, 0, args);
        Ok(())
    }
}

/// Every instantiation.
pub(super) fn units(arithmetic: Arithmetic) -> Vec<(Unit, &'static str, usize, usize)> {
    let entries =
        [("norm_parts", THREADS), ("grad_norm", SUM_THREADS), ("adamw_step", THREADS), ("round_params", THREADS)];
    entries.map(|(entry, threads)| (adamw_unit(arithmetic), entry, threads, 0)).to_vec()
}
