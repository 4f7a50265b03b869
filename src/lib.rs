//! Trains, evaluates and samples GPT-2 language models whose MLP layers are banded.
pub mod backend;
pub mod band;
pub mod config;
pub mod data;
pub mod error;
pub mod model;
pub mod optim;
pub mod parity;
pub mod shapes;
pub mod tolerance;
pub mod weights;

pub use error::{Error, Result};
