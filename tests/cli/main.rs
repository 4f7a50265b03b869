//! The command line, end to end: the real program in folders of its own.

mod checkpoints;
mod commands;
mod common;
mod dashboard;
mod interrupts;
mod learned;
mod mistakes;
mod mistakes_files;
mod patterns;
mod random;
mod report;
mod resume;
mod run_folder;
#[path = "../skip/mod.rs"]
mod skip;
mod spikes;
mod sweep;
mod training;
mod widths;
