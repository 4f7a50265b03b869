//! Ctrl-C and SIGTERM: the first asks a training to stop after its step, the second ends the program.

use crate::error::{Error, Result};
use crate::report;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

static INTERRUPT: AtomicBool = AtomicBool::new(false);

/// Listens to the signals from now on. The flag is raised by the first one.
///
/// # Errors
/// [`Error::Internal`] when the operating system refuses.
pub fn listen() -> Result<&'static AtomicBool> {
    match ctrlc::set_handler(interrupt) {
        // A program that trains more than once listens already.
        Ok(()) | Err(ctrlc::Error::MultipleHandlers) => Ok(&INTERRUPT),
        Err(error) => Err(Error::Internal(format!("cannot listen to Ctrl-C: {error}"))),
    }
}

/// Does what a signal does.
pub fn interrupt() {
    if INTERRUPT.swap(true, Ordering::Relaxed) {
        report::restore_terminal();
        let words = "stopped at once, the step under way is lost; --resume goes on from the last checkpoint";
        let _ = writeln!(std::io::stderr(), "bandtrain: {words}");
        std::process::exit(130);
    }
}
