//! Trains, evaluates and samples GPT-2 language models whose MLP layers are banded.
pub mod atomic;
pub mod backend;
pub mod band;
pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod data;
pub mod error;
pub mod generate;
pub mod memory;
pub mod metrics;
pub mod model;
pub mod optim;
pub mod output;
pub mod shapes;
pub mod tolerance;
pub mod train;
pub mod weights;

pub use error::{Error, Result};
