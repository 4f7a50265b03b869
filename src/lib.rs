//! Trains, evaluates and samples GPT-2 language models whose MLP layers are banded.
//!
//! The program `bandtrain` is a thin layer over this library. A model is a [`config::GptConfig`], its
//! [`weights::Weights`] in host memory and a [`model::Model`] on a [`backend::Backend`]:
//!
//! ```
//! use bandtrain::backend::cpu::Cpu;
//! use bandtrain::config::preset;
//! use bandtrain::model::{Activations, Model};
//! use bandtrain::optim::{Optimizer, Recipe};
//! use bandtrain::weights::Weights;
//!
//! # fn main() -> bandtrain::Result<()> {
//! let weights = Weights::init(&preset("toy")?.model, 42)?;
//! let mut model = Model::new(Cpu::new(), &weights)?;
//! let mut acts = Activations::new(&mut model, 1, 4, true)?;
//! let mut optimizer = Optimizer::new(&mut model)?;
//! model.upload_batch(&mut acts, &[72, 101, 108, 108], &[101, 108, 108, 111])?;
//! optimizer.micro_step(&mut model, &mut acts, 0, 1)?;
//! let step = optimizer.update(&mut model, &Recipe::Stable.hyperparameters(), 3e-4)?;
//! let (loss, _norm) = step.collect(&mut model)?;
//! assert!((loss - 257f32.ln()).abs() < 1.0); // a fresh model knows nothing
//! # Ok(())
//! # }
//! ```
//!
//! ARCHITECTURE.md is the map of the code.

pub mod atomic;
pub mod backend;
pub mod band;
pub mod bandwidths;
pub mod bench;
pub mod blocks;
pub(crate) mod cache;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod data;
pub mod energy;
pub mod error;
pub mod every;
pub mod generate;
pub mod hellaswag;
pub mod interrupt;
pub mod learn;
pub mod memory;
pub mod model;
pub mod optim;
pub mod output;
pub mod parity;
pub mod plot;
pub mod report;
pub mod shapes;
pub mod sweep;
pub mod tolerance;
pub mod train;
pub mod weights;
pub mod whole;

pub use error::{Error, Result};

/// The program's version, with the commit it is built from where that is known.
pub const VERSION: &str = env!("BANDTRAIN_VERSION");
