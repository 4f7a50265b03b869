//! The command line program: parse, run, print the error, exit with its code.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    match bandtrain::cli::run(std::env::args_os()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !matches!(error, bandtrain::Error::StdoutClosed) {
                // Always a single line, whatever a file is called; and nobody is left to tell when stderr is closed.
                let sentence = error.to_string().replace(char::is_control, "?");
                let _ = writeln!(std::io::stderr(), "bandtrain: {sentence}");
            }
            ExitCode::from(error.exit_code())
        }
    }
}
