//! AdamW on the GPU: `shaders/adamw.wgsl` over the flat buffers, in parts that fit a binding.

use super::Wgpu;
use super::buffer::Buffer;
use super::pipelines::Kernel;
use crate::backend::{AdamW, AdamWStep, OptimizerState};
use crate::error::Result;
use crate::shapes::{Span, TENSOR_ALIGN};

const THREADS: usize = 256;
/// Elements that a workgroup squares and sums.
const NORM_ELEMENTS: usize = 16 * 4 * THREADS;

/// A run of parameters that all decay, or none of them does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    span: Span,
    decays: bool,
}

fn kernel(entry: &'static str) -> Kernel {
    let sums = u32::from(entry != "adamw_step");
    Kernel::new("adamw", entry, &[("sums", sums), ("threads", THREADS as u32)])
}

/// Every instantiation.
pub(super) fn kernels() -> Vec<Kernel> {
    ["norm_parts", "grad_norm", "adamw_step"].map(kernel).to_vec()
}

/// Decayed and other parameters in turn, neighbours that decay alike together. Tensors are padded to [`TENSOR_ALIGN`] with
/// zeros that stay zeros, so each run starts where a binding may.
fn segments(decayed: &[Span], len: usize) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    let mut push = |start: usize, end: usize, decays: bool| match segments.last_mut() {
        _ if start >= end => {}
        Some(last) if last.decays == decays => last.span.len = end - last.span.offset,
        _ => segments.push(Segment { span: Span { offset: start, len: end - start }, decays }),
    };
    let mut done = 0;
    for span in decayed {
        let end = span.range().end.next_multiple_of(TENSOR_ALIGN).min(len);
        push(done, span.offset, false);
        push(span.offset, end, true);
        done = end;
    }
    push(done, len, false);
    segments
}

/// Parts of `span` that fit a binding of `limit` elements.
fn parts(span: Span, limit: usize) -> impl Iterator<Item = Span> {
    span.range().step_by(limit).map(move |offset| Span { offset, len: limit.min(span.range().end - offset) })
}

impl AdamW for Wgpu {
    type Plan = Vec<Segment>;

    fn adamw_plan(&mut self, decayed: &[Span], len: usize) -> Result<Vec<Segment>> {
        Ok(segments(decayed, len))
    }

    fn grad_norm(&mut self, norm: &mut Buffer, grads: &Buffer) -> Result<()> {
        self.op = "grad_norm";
        let limit = self.binding_len();
        let groups = |part: Span| part.len.div_ceil(NORM_ELEMENTS);
        let count = parts(grads.all(), limit).map(groups).sum();
        let sums = self.scratch("squares", count)?;
        let mut part_at = 0;
        for part in parts(grads.all(), limit) {
            let binds = [grads.read(part), sums.write(Span { offset: 0, len: count })];
            let words = [part.len.div_ceil(4) as u32, part_at as u32];
            self.dispatch(&kernel("norm_parts"), &binds, &words, groups(part), 2.0 * NORM_ELEMENTS as f64)?;
            part_at += groups(part);
        }
        let binds = [sums.read(Span { offset: 0, len: count }), norm.write(Span { offset: 0, len: 1 })];
        self.dispatch(&kernel("grad_norm"), &binds, &[count as u32, 0], 1, count as f64)
    }

    fn adamw_step(
        &mut self,
        state: OptimizerState<'_, Buffer>,
        grads: &Buffer,
        norm: &Buffer,
        plan: &Vec<Segment>,
        step: &AdamWStep,
    ) -> Result<()> {
        self.op = "adamw_step";
        let limit = self.binding_len();
        let k = step.constants();
        for segment in plan {
            let decay = if segment.decays { k.weight_decay } else { 0.0 };
            let constants = [
                k.learning_rate,
                k.beta1,
                k.one_minus_beta1,
                k.beta2,
                k.one_minus_beta2,
                k.unbias1,
                k.unbias2,
                k.eps,
                decay,
                k.grad_clip,
            ];
            for part in parts(segment.span, limit) {
                let binds = [
                    state.params.write(part),
                    state.m.write(part),
                    state.v.write(part),
                    grads.read(part),
                    norm.read(Span { offset: 0, len: 1 }),
                ];
                let vectors = part.len.div_ceil(4);
                let words = [&[vectors as u32, 0][..], &constants.map(f32::to_bits)].concat();
                self.dispatch(&kernel("adamw_step"), &binds, &words, vectors.div_ceil(THREADS), 64.0 * THREADS as f64)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_covers_every_parameter_once() {
        let decayed = [Span { offset: 0, len: 60 }, Span { offset: 64, len: 4 }, Span { offset: 256, len: 64 }];
        let plan: Vec<_> = segments(&decayed, 384).iter().map(|s| (s.span.range(), s.decays)).collect();
        assert_eq!(plan, [(0..128, true), (128..256, false), (256..320, true), (320..384, false)]);
    }

    #[test]
    fn parts_fit_a_binding() {
        let parts: Vec<_> = parts(Span { offset: 64, len: 300 }, 128).map(Span::range).collect();
        assert_eq!(parts, [64..192, 192..320, 320..364]);
    }
}
