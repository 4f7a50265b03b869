//! AdamW on the CPU.

use super::{Cpu, sum_of};
use crate::backend::{AdamW, AdamWStep, OptimizerState};
use crate::error::Result;
use crate::shapes::Span;
use rayon::prelude::*;
use std::ops::Range;

/// Parameters that one thread updates at a time.
const CHUNK: usize = 1 << 14;

/// A run of parameters that all decay, or none of them does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    range: Range<usize>,
    decays: bool,
}

impl AdamW for Cpu {
    type Plan = Vec<Segment>;

    fn adamw_plan(&mut self, decayed: &[Span], len: usize) -> Result<Vec<Segment>> {
        let mut segments = Vec::new();
        let mut end = 0;
        for span in decayed {
            segments.push(Segment { range: end..span.offset, decays: false });
            segments.push(Segment { range: span.range(), decays: true });
            end = span.range().end;
        }
        segments.push(Segment { range: end..len, decays: false });
        segments.retain(|segment| !segment.range.is_empty());
        Ok(segments)
    }

    fn grad_norm(&mut self, norm: &mut Vec<f32>, grads: &Vec<f32>) -> Result<()> {
        if norm[0].is_finite() {
            norm[0] = sum_of(grads, |g| f64::from(g) * f64::from(g)).sqrt() as f32;
        }
        Ok(())
    }

    fn adamw_step(
        &mut self,
        state: OptimizerState<'_, Vec<f32>>,
        grads: &Vec<f32>,
        norm: &Vec<f32>,
        plan: &Vec<Segment>,
        step: &AdamWStep,
    ) -> Result<()> {
        if !norm[0].is_finite() {
            return Ok(());
        }
        let k = step.constants();
        let clip = if k.grad_clip > 0.0 && norm[0] > k.grad_clip { k.grad_clip / norm[0] } else { 1.0 };
        for Segment { range, decays } in plan {
            let decay = if *decays { k.weight_decay } else { 0.0 };
            (
                state.params[range.clone()].par_chunks_mut(CHUNK),
                state.m[range.clone()].par_chunks_mut(CHUNK),
                state.v[range.clone()].par_chunks_mut(CHUNK),
                grads[range.clone()].par_chunks(CHUNK),
            )
                .into_par_iter()
                .for_each(|(params, m, v, grads)| {
                    for (((p, m), v), g) in params.iter_mut().zip(m).zip(v).zip(grads) {
                        let g = g * clip;
                        *m = k.beta1 * *m + k.one_minus_beta1 * g;
                        *v = k.beta2 * *v + k.one_minus_beta2 * g * g;
                        let direction = *m * k.unbias1 / ((*v * k.unbias2).sqrt() + k.eps);
                        *p -= k.learning_rate * (direction + decay * *p);
                    }
                });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_covers_every_parameter_once() {
        let decayed = [Span { offset: 0, len: 5 }, Span { offset: 8, len: 4 }];
        let plan = Cpu::new().adamw_plan(&decayed, 20).unwrap();
        let ranges: Vec<_> = plan.iter().map(|segment| (segment.range.clone(), segment.decays)).collect();
        assert_eq!(ranges, [(0..5, true), (5..8, false), (8..12, true), (12..20, false)]);
    }
}
