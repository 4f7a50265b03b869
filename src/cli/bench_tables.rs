//! The tables of `bandtrain bench`.

use super::bench::{KernelsReport, StepBesideDense, StepsReport};
use crate::backend::{OpTime, Part};
use crate::bench::{BreakEven, BreakEvenOf, Ceilings, KernelTime, OperationTime, Rotation, StepTime, Timing};
use crate::error::Result;
use crate::output::{bytes, grouped};
use crate::say;

/// A unit that suits a device's arithmetic.
#[derive(Clone, Copy)]
struct Unit {
    name: &'static str,
    gflop: f64,
}

impl Unit {
    fn suiting(ceilings: &Ceilings) -> Self {
        match ceilings.gflop_per_s >= 1e4 {
            true => Self { name: "TFLOP/s", gflop: 1e3 },
            false => Self { name: "GFLOP/s", gflop: 1.0 },
        }
    }

    /// A rate, or a dash where nothing is multiplied.
    fn show(self, gflop_per_s: f64) -> String {
        if gflop_per_s == 0.0 { "-".to_string() } else { format!("{:.1}", gflop_per_s / self.gflop) }
    }
}

fn print_ceilings(ceilings: &Ceilings, unit: Unit) -> Result<()> {
    let Ceilings { gflop_per_s, gflop_per_s_of, gb_per_s, gb_per_s_of } = ceilings;
    say!("this device, measured: {} {} ({gflop_per_s_of})", unit.show(*gflop_per_s), unit.name)?;
    say!("                       {gb_per_s:.2} GB/s ({gb_per_s_of})")
}

/// Prints what 'bench kernels' measured.
pub(super) fn print_kernels(report: &KernelsReport) -> Result<()> {
    let KernelsReport { device, precision, mlp_width, rows, sizes, repeats, kernels } = report;
    say!("C={} W={mlp_width} M={rows} in {precision} on {device}, medians of {repeats} runs", sizes.channels)?;
    let unit = Unit::suiting(&kernels.ceilings);
    print_ceilings(&kernels.ceilings, unit)?;
    say!("\nproducts of the MLP, on {}", rotation(kernels.product_buffers))?;
    let all = || kernels.kernels.iter().chain(&kernels.sums);
    let header = "bandwidth";
    let width = all().map(|time| kept(time).len()).fold(header.len(), usize::max);
    say!(
        "{:<27} {header:>width$} {:>10} {:>10} {:>10} {} {:>8} {:>6}",
        "product",
        "density",
        "stored",
        "ms",
        rates_header(unit),
        "speed-up",
        "ideal"
    )?;
    all().try_for_each(|time| print_kernel(time, width, unit))?;
    print_break_even(&kernels.break_even)?;
    say!(
        "\nother operations, B={} T={} NH={} V={}, on {}",
        sizes.sequences,
        sizes.tokens_per_sequence,
        sizes.heads,
        sizes.vocab_size,
        rotation(kernels.operation_buffers)
    )?;
    say!("{:<48} {:>10} {}", "operation", "ms", rates_header(unit))?;
    kernels.operations.iter().try_for_each(|time| print_operation(time, unit))?;
    let parameters = grouped(kernels.optimizer_parameters);
    say!("gradient norm and AdamW run over the {parameters} parameters of a model with a block for each set of buffers")
}

fn rotation(Rotation { sets, least_bytes }: Rotation) -> String {
    match sets {
        1 => format!("one set of buffers, {:.1} MB of operands or more", least_bytes / 1e6),
        _ => format!("{sets} sets of buffers in turn, {:.1} MB of operands or more", least_bytes / 1e6),
    }
}

fn rates_header(unit: Unit) -> String {
    format!("{:>9} {:>8} {:>8}", unit.name, "GB/s", "of floor")
}

fn rates(timing: &Timing, unit: Unit) -> String {
    let Timing { gflop_per_s, gb_per_s, fraction_of_floor, .. } = timing;
    format!("{:>9} {gb_per_s:>8.2} {fraction_of_floor:>8.3}", unit.show(*gflop_per_s))
}

/// What the layer kept.
fn kept(time: &KernelTime) -> String {
    if time.bandwidth.is_dense() { "dense".to_string() } else { time.bandwidth.to_string() }
}

fn print_kernel(time: &KernelTime, width: usize, unit: Unit) -> Result<()> {
    let KernelTime { product, density, stored, timing, speed_up, ideal_speed_up, .. } = time;
    let [density, stored] = [density, stored].map(|share| 100.0 * share);
    let (kept, ms, rates) = (kept(time), timing.milliseconds, rates(timing, unit));
    say!(
        "{product:<27} {kept:>width$} {density:>8.2} % {stored:>8.2} % {ms:>10.3} {rates} {speed_up:>8.3} \
         {ideal_speed_up:>6.2}"
    )
}

fn print_operation(time: &OperationTime, unit: Unit) -> Result<()> {
    let OperationTime { operation, timing } = time;
    say!("{operation:<48} {:>10.3} {}", timing.milliseconds, rates(timing, unit))
}

fn print_break_even(densities: &[BreakEvenOf]) -> Result<()> {
    if densities.is_empty() {
        return Ok(());
    }
    say!("\nthe band is faster than the dense product")?;
    densities.iter().try_for_each(|BreakEvenOf { product, at }| say!("  {product:<27} {}", break_even(*at)))
}

fn break_even(at: BreakEven) -> String {
    match at {
        BreakEven::Between { density } => format!("below a density of {:.1} %", 100.0 * density),
        BreakEven::Above { density } => format!("at every density measured, up to {:.1} %", 100.0 * density),
        BreakEven::Below { density } => format!("at no density measured, down to {:.1} %", 100.0 * density),
    }
}

/// Prints what 'bench step' measured.
pub(super) fn print_steps(report: &StepsReport) -> Result<()> {
    let StepsReport { device, precision, preset, sequences, tokens_per_sequence, repeats, .. } = report;
    say!(
        "{preset}: B={sequences} T={tokens_per_sequence} in {precision} on {device}, medians of {repeats} steps in a row"
    )?;
    let unit = Unit::suiting(&report.ceilings);
    print_ceilings(&report.ceilings, unit)?;
    let peak = report.peak_tflop_per_s.map_or(String::new(), |_| format!(" {:>8}", "of peak"));
    say!(
        "\n{:<14} {:>12} {:>10} {:>12} {:>9} {:>7}{peak} {:>8} {:>11} {:>11}",
        "MLP",
        "parameters",
        "ms",
        "tok/s",
        unit.name,
        "MFU",
        "speed-up",
        "estimated",
        "measured"
    )?;
    report.steps.iter().try_for_each(|step| print_step(step, unit))?;
    say!("MFU: of the {} {} measured above", unit.show(report.ceilings.gflop_per_s), unit.name)?;
    if let Some(peak) = report.peak_tflop_per_s {
        say!("of peak: of the {peak} TFLOP/s given with --peak-tflops")?;
    }
    say!("estimated, measured: memory by the shape tables, and by how much the device's free memory fell")?;
    print_groups(&report.steps)?;
    report.steps.iter().try_for_each(|step| print_ops(&step.time))
}

fn print_step(StepBesideDense { time, speed_up }: &StepBesideDense, unit: Unit) -> Result<()> {
    let StepTime { parameters, milliseconds, tok_per_s, gflop_per_s, mfu, mfu_of_peak, .. } = time;
    let (name, parameters, tok_per_s) = (mlp_name(time), grouped(*parameters), grouped(*tok_per_s as usize));
    let (rate, mfu) = (unit.show(*gflop_per_s), 100.0 * mfu);
    let peak = mfu_of_peak.map_or(String::new(), |mfu| format!(" {:>6.1} %", 100.0 * mfu));
    let (estimated, measured) = (bytes(time.estimated_bytes), time.measured_bytes.map_or("-".to_string(), bytes));
    say!(
        "{name:<14} {parameters:>12} {milliseconds:>10.2} {tok_per_s:>12} {rate:>9} {mfu:>5.1} %{peak} {speed_up:>8.3} \
         {estimated:>11} {measured:>11}"
    )
}

fn mlp_name(time: &StepTime) -> String {
    match time.fc1_bandwidth {
        dense if dense.is_dense() => "dense".to_string(),
        pattern if pattern.has_patterns() => pattern.to_string(),
        bandwidth => format!("banded {bandwidth}"),
    }
}

/// What each group of operations takes, a column for each step.
fn print_groups(steps: &[StepBesideDense]) -> Result<()> {
    let Some(first) = steps.first() else { return Ok(()) };
    say!("\none step by groups, ms and share, timed by the {}", first.time.timed_by)?;
    let row = |cells: Vec<String>| cells.iter().map(|cell| format!(" {cell:>20}")).collect::<String>();
    say!("{:<20}{}", "", row(steps.iter().map(|step| mlp_name(&step.time)).collect()))?;
    for (index, group) in first.time.groups.iter().enumerate() {
        let cell = |step: &StepBesideDense| {
            let time = step.time.groups[index];
            format!("{:.3} {:>5.1} %", time.milliseconds, 100.0 * time.share)
        };
        say!("{:<20}{}", group.group.name(), row(steps.iter().map(cell).collect()))?;
    }
    let all = |step: &StepBesideDense| {
        format!("{:.3}        ", step.time.groups.iter().map(|group| group.milliseconds).sum::<f64>())
    };
    say!("{:<20}{}", "together", row(steps.iter().map(all).collect()))
}

/// What each kernel takes in a step.
fn print_ops(time: &StepTime) -> Result<()> {
    let all: f64 = time.ops.iter().map(|op| op.seconds).sum();
    say!("\n{}: {:.2} ms of a step, timed by the {}", mlp_name(time), 1e3 * all, time.timed_by)?;
    say!("{:>7} {:>10} {:>7}  {:<34} kernel", "count", "ms", "share", "operation")?;
    for OpTime { op, part, kernel, count, seconds } in &time.ops {
        let op = match part {
            Part::Model => (*op).to_string(),
            Part::Attention => format!("{op}, attention"),
            Part::Mlp => format!("{op}, MLP"),
        };
        say!("{count:>7} {:>10.3} {:>5.1} %  {op:<34} {kernel}", 1e3 * seconds, 100.0 * seconds / all)?;
    }
    Ok(())
}
