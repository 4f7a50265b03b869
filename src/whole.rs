//! Whole gradients of learned layers: also those of the connections that do not exist, by which a training judges which ones it
//! lacks.
//!
//! A layer's gradient is the product of what came in and what goes back, whichever of its connections exist. So the backward pass
//! of a step gives all of it by one dense product more for each learned layer ([`crate::backend::Linear::linear_backward_weight`]).

use crate::backend::{Affine, Backend, Role};
use crate::config::GptConfig;
use crate::error::Result;
use crate::model::Model;
use crate::shapes::{Param, Span, TENSOR_ALIGN, learned_tensors};

/// Whole gradients on a device.
pub struct WholeGradients<B: Backend> {
    /// The gradients, one after the other as [`Layout`] says.
    pub(crate) buffer: B::Buffer,
    layout: Layout,
}

/// Where the gradients of learned tensors lie, dense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    tensors: Vec<(Param, usize, Span)>,
    /// The product brings a bias's gradient along, which is known already: all have the same place for it.
    biases: usize,
    len: usize,
}

impl Layout {
    /// That of a model of these sizes; [`Layout::len`] is 0 where it learns no blocks.
    pub fn new(config: &GptConfig) -> Self {
        let mut end = 0;
        let mut place = |(param, layer, _)| {
            let span = Span { offset: end, len: config.channels * config.mlp_width() };
            end = (end + span.len).next_multiple_of(TENSOR_ALIGN);
            (param, layer, span)
        };
        let tensors: Vec<_> = learned_tensors(config).into_iter().map(&mut place).collect();
        let bias = if tensors.is_empty() { 0 } else { config.mlp_width().max(config.channels) };
        Self { tensors, biases: end, len: end + bias }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the model learns no blocks.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }
}

impl<B: Backend> WholeGradients<B> {
    /// Room for them; `None` when the model learns no blocks.
    ///
    /// # Errors
    /// The device has not enough memory.
    pub fn new(model: &mut Model<B>) -> Result<Option<Self>> {
        let layout = Layout::new(model.config());
        if layout.is_empty() {
            return Ok(None);
        }
        let buffer = model.backend().alloc(Role::Gradients, "whole gradients", layout.len())?;
        Ok(Some(Self { buffer, layout }))
    }

    /// Where the gradient of a tensor lies, and a bias's of `outputs` elements; `None` when it is not learned.
    pub(crate) fn place(&self, param: Param, layer: usize, outputs: usize) -> Option<Affine> {
        let (.., weight) = *self.layout.tensors.iter().find(|tensor| (tensor.0, tensor.1) == (param, layer))?;
        Some(Affine { weight, bias: Span { offset: self.layout.biases, len: outputs } })
    }

    /// One tensor's gradient in host memory, a dense matrix; `None` when it is not learned.
    ///
    /// # Errors
    /// The device failed.
    pub fn of(&self, model: &mut Model<B>, param: Param, layer: usize) -> Result<Option<Vec<f32>>> {
        let place = self.place(param, layer, 0);
        place.map(|place| model.backend().download(&self.buffer, place.weight)).transpose()
    }
}
