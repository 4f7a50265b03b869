//! `bandtrain report`: the page of a sweep, made again.

use crate::error::Result;
use crate::say;
use crate::sweep::{self, PAGE_FILE, Results};
use std::path::PathBuf;

/// Makes the page of a sweep again from what its folder holds
///
/// One HTML file that needs nothing else: loss curves, loss against density and time, the table, the patterns, samples and the
/// configuration. 'bandtrain sweep' writes it after each run.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  bandtrain report runs/fc1-bandwidth --output fc1.html")]
pub struct ReportArgs {
    /// Folder of a sweep
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Page to write [default: report.html in the folder]
    #[arg(long, short = 'o', value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// A folder without results; a page that cannot be written.
pub fn run(args: ReportArgs) -> Result<()> {
    let output = args.output.unwrap_or_else(|| args.folder.join(PAGE_FILE));
    let results = Results::read(&args.folder)?;
    sweep::write_page(&results, &args.folder, &output)?;
    say!("{}: {} runs", output.display(), results.runs.len())
}
