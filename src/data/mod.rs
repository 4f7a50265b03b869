//! From text to batches: tokenizers, token files, the loader, TinyStories and the built-in toy corpus.
