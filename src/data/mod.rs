//! From text to batches: tokenizers, token files, the loader, the hub and TinyStories on it, the built-in toy corpus, and HellaSwag's questions.
pub mod hellaswag;
pub mod hub;
pub mod loader;
mod paths;
pub mod shard;
pub mod tinystories;
pub mod tokenize;
pub mod tokenizer;
pub mod toy;

pub use loader::{Loader, Position, Shuffle};
pub use paths::text_files;
pub(crate) use paths::{matching_files, same_file};
pub use shard::{TokenFile, TokenWriter};
pub use tokenizer::{StreamDecoder, Tokenizer};
