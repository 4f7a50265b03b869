//! From text to batches: tokenizers, token files, the loader, TinyStories and the built-in toy corpus.
mod atomic;
pub mod shard;
pub mod tokenizer;

pub use shard::{TokenFile, TokenWriter};
pub use tokenizer::{StreamDecoder, Tokenizer};
