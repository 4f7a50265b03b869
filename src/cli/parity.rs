//! `bandtrain parity`: does a backend compute what the reference computes, on this machine?

use super::device::{BackendName, DeviceArgs, Precision, Task, with_backend};
use crate::backend::{Arithmetic, Backend};
use crate::error::{Error, Result};
use crate::parity::{self, Row};
use crate::say;

/// Holds a backend against the reference, operation by operation
///
/// Every operation runs forward and backward, and the optimizer on packed weights, at odd and at tile-unfriendly sizes and
/// several bandwidths. A row names the operation, its shape, the worst error, the tolerance (derived from precision, depth of
/// the sums and norms) and where the worst element is. Exits with 1 when a row fails.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  bandtrain parity --backend wgpu\n  bandtrain parity --backend cuda --only attention --only band"
)]
pub struct ParityArgs {
    #[command(flatten)]
    device: DeviceArgs,
    /// The backend to hold it against
    #[arg(long, value_enum, default_value = "cpu", value_name = "NAME")]
    against: BackendName,
    /// Only the cases that have this in their operation or shape, as a row prints them; may be given more than once
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Print failures and the count only
    #[arg(long)]
    quiet: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// A backend is missing or fails; [`Error::Internal`] when the backends disagree.
pub fn run(args: ParityArgs) -> Result<()> {
    let against = DeviceArgs { backend: args.against, adapter: None, precision: Precision::Auto };
    let device = args.device.clone();
    with_backend(&device, Device { args, against })
}

/// The backend to be tested is chosen; the reference is not yet.
struct Device {
    args: ParityArgs,
    against: DeviceArgs,
}

impl Task for Device {
    type Output = ();

    fn run<B: Backend>(self, device: B) -> Result<()> {
        with_backend(&self.against, Both { device, args: self.args })
    }
}

/// Both backends are chosen.
struct Both<B> {
    device: B,
    args: ParityArgs,
}

impl<A: Backend> Task for Both<A> {
    type Output = ();

    fn run<B: Backend>(mut self, mut reference: B) -> Result<()> {
        let named = |description, arithmetic: Arithmetic| format!("{description}, {}", arithmetic.name());
        let names = (
            named(self.device.description(), self.device.arithmetic()),
            named(reference.description(), reference.arithmetic()),
        );
        let rows = parity::run(&mut self.device, &mut reference, &self.args.only)?;
        if rows.is_empty() {
            let what = "no case of the parity suite has any --only text in its operation or shape; without --only, all are run and printed";
            return Err(Error::Usage(what.into()));
        }
        let failed = rows.iter().filter(|row| !row.passes()).count();
        if self.args.json {
            let rows: Vec<_> = rows.iter().map(json).collect();
            say!("{}", serde_json::json!({ "device": names.0, "against": names.1, "failed": failed, "rows": rows }))?;
        } else {
            say!("{} against {}", names.0, names.1)?;
            for row in rows.iter().filter(|row| !self.args.quiet || !row.passes()) {
                say!("{row}")?;
            }
            say!("{} of {} rows pass", rows.len() - failed, rows.len())?;
            for summary in parity::summaries(&rows) {
                say!("{summary}")?;
            }
        }
        match failed {
            0 => Ok(()),
            _ => Err(Error::Internal(format!("{failed} rows of the parity suite fail on {}", names.0))),
        }
    }
}

fn json(row: &Row) -> serde_json::Value {
    let Row { op, shape, output, worst, not_zero } = row;
    serde_json::json!({
        "op": op,
        "shape": shape,
        "output": output,
        "passes": row.passes(),
        "error": (worst.actual - worst.expected).abs(),
        "tolerance": worst.allowed,
        "index": worst.index,
        "outside_band": not_zero.map(|(index, value)| serde_json::json!({ "index": index, "value": value })),
    })
}
