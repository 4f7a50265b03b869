//! `bandtrain bench`: what the band gains on this machine.

use super::device::{DeviceArgs, Task, with_backend};
use super::eval::check_seq_len;
use super::parse;
use crate::backend::{Backend, OpTime};
use crate::bench::{KernelTime, StepTime, kernels, step};
use crate::config::{GptConfig, preset};
use crate::error::Result;
use crate::output::grouped;
use crate::say;
use indicatif::{ProgressBar, ProgressStyle};

/// Times the MLP's products, or whole steps, banded beside dense
///
/// kernels: every product of FC1 and FC2 at several bandwidths beside the dense one in the same run. step: whole training
/// steps of a preset, dense and with FC1 and FC2 banded. Medians of repeated runs; the first is not counted.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  bandtrain bench kernels --backend cpu -C 512 --rows 2048
  BANDTRAIN_WGPU_TUNING='dense=128x64x8:8x8;unroll=4' bandtrain bench step --backend wgpu

BANDTRAIN_WGPU_TUNING holds KEY=VALUE pairs, separated by semicolons, that replace what the wgpu backend has for the \
adapter's kind, in every command. Tiles are ROWSxCOLUMNSxDEPTH:RxC, with R x C results for a thread; several are separated \
by commas.
  dense      up to three tiles of dense products, by falling size
  expand     FC1 forward, FC2 input gradient: for much work, for little; 64 or 128 columns
  contract   FC2 forward, FC1 input gradient: for much work, for little
  outer      weight gradients; 64 or 128 rows
  attention  64xSPAN:RxC, R x C scores for a thread: forward, backward; SPAN 32 or 64
  busy       threads that keep the adapter busy: tiles shrink, deep sums are shared out
  unroll     steps of the depth that loops are unrolled by
  buffers    of a product's operands: 1, or 2 where there is room
  slice      columns of a band's tile that are skipped together: 32, 64 or 128")]
pub struct BenchArgs {
    /// What to time
    #[arg(value_enum, default_value = "kernels")]
    what: What,
    /// kernels: C, the channels of the MLP
    #[arg(long, short = 'C', default_value = "512", value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    channels: usize,
    /// kernels: M, the rows (tokens)
    #[arg(long, default_value = "2048", value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    rows: usize,
    /// Bandwidths to compare with dense [default: 2C, C and C/2; for step 2C]
    #[arg(long, short = 'w', value_parser = parse::positive, num_args = 1.., value_name = "N", allow_negative_numbers = true)]
    bandwidth: Vec<usize>,
    /// step: the model
    #[arg(long, default_value = "toy", value_name = "NAME")]
    preset: String,
    /// step: sequences per batch [default: the preset's]
    #[arg(long, short = 'b', value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    batch_size: Option<usize>,
    /// step: tokens per sequence [default: the model's longest]
    #[arg(long, short = 't', value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    seq_len: Option<usize>,
    /// Runs that count
    #[arg(long, default_value = "9", value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    repeats: usize,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum What {
    Kernels,
    Step,
}

/// Runs the command.
///
/// # Errors
/// An unknown preset; sizes that do not fit; the device fails.
pub fn run(args: BenchArgs) -> Result<()> {
    match args.what {
        What::Kernels => with_backend(&args.device.clone(), Kernels(args)),
        What::Step => {
            let preset = preset(&args.preset)?;
            let dense = GptConfig { fc1_bandwidth: 0.into(), fc2_bandwidth: 0.into(), ..preset.model };
            check_seq_len(args.seq_len.unwrap_or(1), dense.max_seq_len)?;
            let bandwidths = if args.bandwidth.is_empty() { vec![2 * dense.channels] } else { args.bandwidth.clone() };
            let mut times = Vec::new();
            for bandwidth in std::iter::once(0).chain(bandwidths) {
                let config = GptConfig { fc1_bandwidth: bandwidth.into(), fc2_bandwidth: bandwidth.into(), ..dense };
                let batch = args.batch_size.unwrap_or(preset.batch_size);
                let tokens = args.seq_len.unwrap_or(dense.max_seq_len);
                let (description, time) =
                    with_backend(&args.device, Step { config, batch, tokens, repeats: args.repeats })?;
                if times.is_empty() && !args.json {
                    say!("{}: B={batch} T={tokens} on {description}, medians of {} runs", args.preset, args.repeats)?;
                }
                times.push(time);
            }
            if args.json {
                return say!("{}", serde_json::json!({ "steps": times }));
            }
            print_steps(&times)?;
            times.iter().try_for_each(print_ops)
        }
    }
}

struct Kernels(BenchArgs);

impl Task for Kernels {
    type Output = ();

    fn run<B: Backend>(self, mut backend: B) -> Result<()> {
        let args = self.0;
        let c = args.channels;
        let bandwidths = if args.bandwidth.is_empty() { vec![2 * c, c, c.div_ceil(2)] } else { args.bandwidth };
        let bar = if args.json { ProgressBar::hidden() } else { ProgressBar::new(100) };
        bar.set_style(ProgressStyle::with_template("{bar:32} {percent} %").expect("the template is well formed"));
        let done = |share: f64| bar.set_position((100.0 * share) as u64);
        let times = kernels(&mut backend, c, args.rows, &bandwidths, args.repeats, done)?;
        bar.finish_and_clear();
        let device = backend.description();
        if args.json {
            let json = serde_json::json!({ "device": device, "channels": c, "rows": args.rows, "kernels": times });
            return say!("{json}");
        }
        say!("C={c} W={} M={} on {device}, medians of {} runs", 4 * c, args.rows, args.repeats)?;
        print_kernels(&times)
    }
}

fn print_kernels(times: &[KernelTime]) -> Result<()> {
    say!("{:<27} {:>9} {:>10} {:>10} {:>10} {:>9}", "product", "bandwidth", "density", "ms", "GFLOP/s", "of dense")?;
    for KernelTime { product, bandwidth, density, milliseconds, gflop_per_s, of_dense } in times {
        let bandwidth = if *bandwidth == 0 { "dense".to_string() } else { bandwidth.to_string() };
        let density = 100.0 * density;
        say!("{product:<27} {bandwidth:>9} {density:>8.2} % {milliseconds:>10.3} {gflop_per_s:>10.1} {of_dense:>9.3}")?;
    }
    Ok(())
}

struct Step {
    config: GptConfig,
    batch: usize,
    tokens: usize,
    repeats: usize,
}

impl Task for Step {
    type Output = (String, StepTime);

    fn run<B: Backend>(self, backend: B) -> Result<(String, StepTime)> {
        let description = backend.description();
        Ok((description, step(backend, &self.config, self.batch, self.tokens, self.repeats)?))
    }
}

fn print_steps(times: &[StepTime]) -> Result<()> {
    say!("{:<14} {:>10} {:>12} {:>10} {:>9}", "MLP", "ms", "tok/s", "GFLOP/s", "speed-up")?;
    for time @ StepTime { milliseconds, tok_per_s, gflop_per_s, .. } in times {
        let name = mlp_name(time);
        let (rate, gain) = (grouped(*tok_per_s as usize), times[0].milliseconds / milliseconds);
        say!("{name:<14} {milliseconds:>10.2} {rate:>12} {gflop_per_s:>10.1} {gain:>9.3}")?;
    }
    Ok(())
}

fn mlp_name(time: &StepTime) -> String {
    if time.fc1_bandwidth.is_dense() { "dense".to_string() } else { format!("banded {}", time.fc1_bandwidth) }
}

/// What each kernel takes in a step.
fn print_ops(time: &StepTime) -> Result<()> {
    let name = mlp_name(time);
    let Some(ops) = &time.ops else { return say!("{name}: this device does not time its kernels") };
    let all: f64 = ops.iter().map(|op| op.seconds).sum();
    say!("\n{name}: {:.2} ms of a step on the device", 1e3 * all)?;
    say!("{:>7} {:>10} {:>7}  {:<27} kernel", "count", "ms", "share", "operation")?;
    for OpTime { op, kernel, count, seconds } in ops {
        say!("{count:>7} {:>10.3} {:>5.1} %  {op:<27} {kernel}", 1e3 * seconds, 100.0 * seconds / all)?;
    }
    Ok(())
}
