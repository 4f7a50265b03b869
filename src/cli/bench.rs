//! `bandtrain bench`: what the device can do, what this program makes of it, and what the band gains.

use super::bench_tables::{print_kernels, print_steps};
use super::device::{DeviceArgs, Task, with_backend};
use super::eval::check_seq_len;
use super::parse;
use crate::backend::Backend;
use crate::bandwidths::{Bandwidths, Connections};
use crate::bench::{Ceilings, Kernels, Sizes, StepTime, Steps, kernels, step};
use crate::config::{GPT2_VOCAB, GptConfig, preset};
use crate::error::{Error, Result};
use crate::say;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Times every operation, or whole steps, banded beside dense
///
/// kernels: every product of FC1 and FC2 at several bandwidths, or patterns of blocks, beside the dense one in the same run, and the other operations
/// of a training step. step: whole training steps of a preset, dense and with FC1 and FC2 banded, one recorded while the one
/// before it is running, as in a training. Medians of repeated runs; those that compile kernels or warm up are not counted.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  bandtrain bench kernels --backend cpu -C 512 --rows 2048
  bandtrain bench kernels --backend cuda --rows 8192 -w 1024 random:0.438 strided:0.438
  bandtrain bench step --preset tinystories-51m -w 1024 --peak-tflops 165.2
  BANDTRAIN_WGPU_TUNING='dense=128x64x8:8x8;unroll=4' bandtrain bench step --backend wgpu

What the device can do is measured first, in the same run: the rate of products by dense products of square matrices of \
growing size (the fastest run counts), the rate of memory by an optimizer's update and by residual additions with LayerNorm over up \
to 1 GB (the fastest run of the faster one counts); both are printed with the size they were measured at. What the numbers mean:
  GFLOP/s    two for each pair of factors of a product: the exact band, under the diagonal only in causal attention
  GB/s       every tensor read and every tensor written once, in the size it is stored in
  of floor   floor over time; the floor is the longer of what the bytes and what the FLOPs take at the measured rates;
             above 1 where a cache held what is counted as memory
  stored     the share of the dense weights that are stored and multiplied: those of the panels or blocks that hold connections
  speed-up   the dense product's time over the band's
  ideal      the dense product's floor over the band's: 1 / density where products bound both, less where memory does
  break-even the density below which the band is faster: where a straight line between two measured bandwidths meets the \
dense time, or a bound where none does; patterns are left out
  MFU        a step's products (forward once, backward twice) over its time, as a share of the measured rate of products
Operations run over several sets of buffers in turn, so many that their operands exceed 134 MB, more than a cache holds (at most \
16, and at most half of the free memory); how many is printed. A step's memory is estimated from the shape tables and, where \
the device tells, measured by how much its free memory fell.

BANDTRAIN_WGPU_TUNING holds KEY=VALUE pairs, separated by semicolons, that replace what the wgpu backend has for the \
adapter's kind, in every command. Tiles are ROWSxCOLUMNSxDEPTH:RxC, with R x C results for a thread; several are separated \
by commas.
  dense      up to three tiles of dense products, by falling size
  expand     FC1 forward, FC2 input gradient: for much work, for little; 64 or 128 columns
  contract   FC2 forward, FC1 input gradient: for much work, for little
  outer      weight gradients; 64 or 128 rows
  attention  64xSPAN:RxC, R x C scores for a thread: forward, backward for queries, for keys; SPAN 32 or 64
  held       of the same three, 1 where a block's operands stay in workgroup memory, else 0
  busy       threads that keep the adapter busy: tiles shrink, deep sums are shared out
  unroll     steps of the depth that loops are unrolled by
  buffers    of a product's operands: 1, or 2 where there is room
  slice      columns of a band's tile that are skipped together: 32, 64 or 128
  logits     MiB of logits at a time")]
pub struct BenchArgs {
    /// What to time
    #[arg(value_enum, default_value = "kernels")]
    what: What,
    /// kernels: C, the channels of the model [default: 512]
    #[arg(long, short = 'C', value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    channels: Option<usize>,
    /// kernels: M, the rows (tokens) [default: 2048]
    #[arg(long, value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    rows: Option<usize>,
    /// kernels: V, the vocabulary of the head [default: 50257]
    #[arg(long, value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    vocab_size: Option<usize>,
    /// Bandwidths, or patterns like random:0.438, to compare with dense [default: 4C, 2C, C and C/2; for step 2C]
    #[arg(long, short = 'w', value_parser = parse::some_connections, num_args = 1.., value_name = "N", allow_negative_numbers = true)]
    bandwidth: Vec<Connections>,
    /// step: the model [default: toy]
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// step: sequences per batch [default: the preset's]
    #[arg(long, short = 'b', value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    batch_size: Option<usize>,
    /// Tokens per sequence [default: the model's longest; for kernels the most up to 512 that divide the rows]
    #[arg(long, short = 't', value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    seq_len: Option<usize>,
    /// step: the device's peak rate by its data sheet, in TFLOP/s, for an MFU beside the one of the measured rate
    #[arg(long, value_parser = parse::above_zero, value_name = "N", allow_negative_numbers = true)]
    peak_tflops: Option<f64>,
    /// Runs that count
    #[arg(long, default_value = "9", value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    repeats: usize,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    Kernels,
    Step,
}

impl BenchArgs {
    /// Refuses what only the other of the two listens to.
    fn check(&self) -> Result<()> {
        let (of_kernels, of_step) = (What::Kernels, What::Step);
        let given = [
            ("--channels", of_kernels, self.channels.is_some()),
            ("--rows", of_kernels, self.rows.is_some()),
            ("--vocab-size", of_kernels, self.vocab_size.is_some()),
            ("--preset", of_step, self.preset.is_some()),
            ("--batch-size", of_step, self.batch_size.is_some()),
            ("--peak-tflops", of_step, self.peak_tflops.is_some()),
        ];
        let name = |what| if what == What::Kernels { "kernels" } else { "step" };
        match given.into_iter().find(|&(_, of, given)| given && of != self.what) {
            None => Ok(()),
            Some((flag, of, _)) => Err(Error::usage(format!(
                "{flag} means nothing to 'bench {}'; leave it out or use 'bench {}'",
                name(self.what),
                name(of)
            ))),
        }
    }
}

/// Runs the command.
///
/// # Errors
/// A flag of the other kind; an unknown preset; sizes that do not fit; the device fails.
pub fn run(args: BenchArgs) -> Result<()> {
    args.check()?;
    match args.what {
        What::Kernels => run_kernels(args),
        What::Step => run_steps(args),
    }
}

/// What 'bench kernels' measured, and of what.
#[derive(Serialize)]
pub(super) struct KernelsReport {
    pub device: String,
    pub precision: &'static str,
    pub mlp_width: usize,
    pub rows: usize,
    #[serde(flatten)]
    pub sizes: Sizes,
    pub repeats: usize,
    #[serde(flatten)]
    pub kernels: Kernels,
}

fn run_kernels(args: BenchArgs) -> Result<()> {
    let channels = args.channels.unwrap_or(512);
    let vocab_size = args.vocab_size.unwrap_or(GPT2_VOCAB);
    let sizes = Sizes::new(channels, args.rows.unwrap_or(2048), args.seq_len, vocab_size)?;
    let kept = match args.bandwidth.is_empty() {
        true => [4 * channels, 2 * channels, channels, channels.div_ceil(2)].map(Connections::Band).to_vec(),
        false => args.bandwidth,
    };
    let task = KernelsTask { sizes, kept, repeats: args.repeats, quiet: args.json };
    let report = with_backend(&args.device, task)?;
    if args.json { print_json(&report) } else { print_kernels(&report) }
}

struct KernelsTask {
    sizes: Sizes,
    kept: Vec<Connections>,
    repeats: usize,
    quiet: bool,
}

impl Task for KernelsTask {
    type Output = KernelsReport;

    fn run<B: Backend>(self, mut backend: B) -> Result<KernelsReport> {
        let Self { sizes, kept, repeats, quiet } = self;
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(100) };
        bar.set_style(ProgressStyle::with_template("{bar:32} {percent} %").expect("the template is well formed"));
        let done = |share: f64| bar.set_position((100.0 * share) as u64);
        let kernels = kernels(&mut backend, sizes, &kept, repeats, done)?;
        bar.finish_and_clear();
        let (device, precision) = (backend.description(), backend.arithmetic().name());
        let (mlp_width, rows) = (4 * sizes.channels, sizes.rows());
        Ok(KernelsReport { device, precision, mlp_width, rows, sizes, repeats, kernels })
    }
}

/// What 'bench step' measured, and of what.
#[derive(Serialize)]
pub(super) struct StepsReport {
    pub device: String,
    pub precision: &'static str,
    pub preset: String,
    pub sequences: usize,
    pub tokens_per_sequence: usize,
    pub repeats: usize,
    pub ceilings: Ceilings,
    pub peak_tflop_per_s: Option<f64>,
    pub steps: Vec<StepBesideDense>,
}

/// A step with its gain.
#[derive(Serialize)]
pub(super) struct StepBesideDense {
    #[serde(flatten)]
    pub time: StepTime,
    /// The dense step's time over this one's.
    pub speed_up: f64,
}

fn run_steps(args: BenchArgs) -> Result<()> {
    let preset = preset(args.preset.as_deref().unwrap_or("toy"))?;
    let dense = GptConfig { fc1_bandwidth: 0.into(), fc2_bandwidth: 0.into(), ..preset.model };
    check_seq_len(args.seq_len.unwrap_or(1), dense.max_seq_len)?;
    let kept = if args.bandwidth.is_empty() { vec![Connections::Band(2 * dense.channels)] } else { args.bandwidth };
    let (batch, tokens) = (args.batch_size.unwrap_or(preset.batch_size), args.seq_len.unwrap_or(dense.max_seq_len));
    let (device, precision, ceilings) = with_backend(&args.device, CeilingsTask)?;
    let mut steps: Vec<StepBesideDense> = Vec::new();
    for keeps in std::iter::once(Connections::DENSE).chain(kept) {
        let both = Bandwidths::from(keeps);
        let config = GptConfig { fc1_bandwidth: both, fc2_bandwidth: both, ..dense };
        let what = Steps { config, batch, tokens, repeats: args.repeats };
        let task = StepTask { what, ceilings: &ceilings, peak_flop_per_s: args.peak_tflops.map(|peak| 1e12 * peak) };
        let time = with_backend(&args.device, task)?;
        let dense_milliseconds = steps.first().map_or(time.milliseconds, |dense| dense.time.milliseconds);
        steps.push(StepBesideDense { speed_up: dense_milliseconds / time.milliseconds, time });
    }
    let report = StepsReport {
        device,
        precision,
        preset: preset.name.to_string(),
        sequences: batch,
        tokens_per_sequence: tokens,
        repeats: args.repeats,
        ceilings,
        peak_tflop_per_s: args.peak_tflops,
        steps,
    };
    if args.json { print_json(&report) } else { print_steps(&report) }
}

struct CeilingsTask;

impl Task for CeilingsTask {
    type Output = (String, &'static str, Ceilings);

    fn run<B: Backend>(self, mut backend: B) -> Result<Self::Output> {
        let ceilings = Ceilings::measure(&mut backend)?;
        Ok((backend.description(), backend.arithmetic().name(), ceilings))
    }
}

struct StepTask<'a> {
    what: Steps,
    ceilings: &'a Ceilings,
    peak_flop_per_s: Option<f64>,
}

impl Task for StepTask<'_> {
    type Output = StepTime;

    fn run<B: Backend>(self, backend: B) -> Result<StepTime> {
        step(backend, self.what, self.ceilings, self.peak_flop_per_s)
    }
}

fn print_json(report: &impl Serialize) -> Result<()> {
    let json = serde_json::to_string(report).map_err(|error| Error::Internal(error.to_string()))?;
    say!("{json}")
}
