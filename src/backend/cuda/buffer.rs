//! Device memory and the element types in it.

use super::driver::Graveyard;
use crate::backend::Arithmetic;
use crate::error::{Error, Result};
use crate::shapes::Span;
use std::cell::RefCell;
use std::rc::Rc;

/// The type of a buffer's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32-bit floating point (or, for tokens, integer).
    F32,
    /// bfloat16.
    Bf16,
}

impl Element {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::Bf16 => 2,
        }
    }

    /// How many make the 16 bytes of a vector.
    pub(super) fn lanes(self) -> usize {
        16 / self.bytes()
    }

    /// What activations are stored in.
    pub(super) fn of(arithmetic: Arithmetic) -> Self {
        match arithmetic {
            Arithmetic::Fp32 | Arithmetic::Tf32 => Element::F32,
            Arithmetic::Bf16 => Element::Bf16,
        }
    }
}

/// Memory that goes to the graveyard when its last holder is gone: recorded work may still need it.
pub(super) struct Memory {
    pub(super) at: u64,
    graveyard: Graveyard,
}

impl Memory {
    pub(super) fn new(at: u64, graveyard: Graveyard) -> Self {
        Self { at, graveyard }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.graveyard.bury(self.at);
    }
}

/// A buffer in device memory. Clones are the same memory.
#[derive(Clone)]
pub struct Buffer(Rc<Inner>);

struct Inner {
    memory: Memory,
    element: Element,
    len: usize,
    name: String,
    /// A bf16 copy of the whole buffer, made when it is first an operand of a product.
    copy: RefCell<Option<Buffer>>,
}

impl Buffer {
    pub(super) fn new(memory: Memory, element: Element, len: usize, name: &str) -> Self {
        Self(Rc::new(Inner { memory, element, len, name: name.to_string(), copy: RefCell::new(None) }))
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn element(&self) -> Element {
        self.0.element
    }

    /// The bf16 copy, if there is one.
    pub(super) fn copy(&self) -> Option<Buffer> {
        self.0.copy.borrow().clone()
    }

    pub(super) fn set_copy(&self, copy: Buffer) {
        *self.0.copy.borrow_mut() = Some(copy);
    }

    /// Where `span` of it lies, as elements of this type.
    ///
    /// # Errors
    /// [`Error::Internal`], a fault of the caller, when it has other elements or not so many.
    pub(super) fn part(&self, element: Element, span: Span) -> Result<u64> {
        let Inner { memory, len, name, .. } = &*self.0;
        if element != self.0.element {
            return Err(Error::Internal(format!("{name} holds {:?}, not {element:?}", self.0.element)));
        }
        match span.offset.checked_add(span.len) {
            Some(end) if end <= *len => Ok(memory.at + (span.offset * element.bytes()) as u64),
            _ => Err(Error::Internal(format!("{span:?} is not a part of {name}, which has {len}"))),
        }
    }

    /// The first `len` elements as f32.
    pub(super) fn f32s(&self, len: usize) -> Result<u64> {
        self.part(Element::F32, Span { offset: 0, len })
    }
}
