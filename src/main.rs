//! The command line program: parse, run, print the error, exit with its code.

use std::process::ExitCode;

fn main() -> ExitCode {
    match bandtrain::cli::run(std::env::args_os()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !matches!(error, bandtrain::Error::StdoutClosed) {
                eprintln!("bandtrain: {error}");
            }
            ExitCode::from(error.exit_code())
        }
    }
}
