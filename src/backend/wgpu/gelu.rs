//! The GELU as a product's epilogue: which template flag asks for it, and which buffer it takes. The function itself is
//! `shaders/gelu.wgsl`.

use super::buffer::{Bind, Buffer};
use crate::shapes::Span;

/// The GELU that may follow a product.
#[derive(Clone, Copy)]
pub(super) enum Gelu<'a> {
    /// None.
    None,
    /// The sum goes to `pre`, its GELU to the output.
    Forward(&'a Buffer),
    /// The sum is multiplied with the derivative at `pre`.
    Backward(&'a Buffer),
}

impl<'a> Gelu<'a> {
    /// The template's flag.
    pub(super) fn flag(self) -> (&'static str, u32) {
        match self {
            Gelu::None => ("gelu", 0),
            Gelu::Forward(_) => ("gelu", 1),
            Gelu::Backward(_) => ("gelu_backward", 1),
        }
    }

    /// The buffer of values before the GELU, `span` of it.
    pub(super) fn bind(self, span: Span) -> Option<Bind<'a>> {
        match self {
            Gelu::None => None,
            Gelu::Forward(pre) => Some(pre.write(span)),
            Gelu::Backward(pre) => Some(pre.read(span)),
        }
    }
}
