//! Every operation of the CPU backend against its definition: forward passes against the formulas of their documentation
//! written out in f64, backward passes against finite differences of the forward passes.
//!
//! Inputs are multiples of 2^-12 or finer and of moderate size, and steps are powers of two, so moving an input is exact.
//! Buffers hold NaN wherever an operation must not read, or must overwrite.

mod adamw;
mod attention;
mod band;
mod embed;
mod harness;
mod layernorm;
mod linear;
mod loss;
