//! Sweeps: many trainings that differ in which connections their MLPs keep, and what came of them.
//!
//! [`Grid`] says what varies, [`Facts`] what a run is before it runs, [`Outcome`] what came of it, and [`Results`] holds all
//! of a sweep's runs together and against each other. Running them is the command's matter (`bandtrain sweep`).

mod charts;
mod grid;
mod outcome;
mod page;
mod results;
mod segments;

pub use grid::{Amount, DEFAULT_SEED, Grid, Layers, Learn, Pattern, Point};
pub use outcome::{Energy, Facts, Measured, Outcome, Status};
pub use page::{PAGE_FILE, write as write_page};
pub use results::{Group, Results, Row, Spread};
pub use segments::{keep_energy, last_start, whole_energy};
