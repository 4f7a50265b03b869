//! Trains, evaluates and samples GPT-2 language models whose MLP layers are banded.
pub mod band;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod error;
pub mod shapes;
pub mod weights;

pub use error::{Error, Result};
