//! `bandtrain band`: what a bandwidth, or a pattern in its place, means.

use super::parse;
use crate::band::Band;
use crate::bandwidths::{Bandwidths, Connections};
use crate::error::{Error, Result};
use crate::output::grouped;
use crate::say;
use std::path::PathBuf;

/// Shows a band or a pattern: exact density, memory and picture
///
/// Narrow element i and wide element j are connected exactly when |j - i*W/N| <= bandwidth/2. A pattern keeps blocks of 128
/// wide x 64 narrow elements: random ones, strided ones, on diagonals evenly apart, or those that learned ones start from. Every
/// layer of a model has random blocks of its own; shown are those of the first layer's FC1.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  bandtrain band -w 1024 -C 512\n  bandtrain band -w random:0.438 -C 512")]
pub struct BandArgs {
    /// The bandwidth, in wide elements, or a pattern like random:0.438, random:0.438:7 with seed 7, strided:0.438, or
    /// learned:0.438:band
    #[arg(long, short = 'w', value_parser = parse::connections, value_name = "N", allow_negative_numbers = true)]
    bandwidth: Connections,
    /// N, the narrow axis: the model's channels
    #[arg(long, short = 'C', default_value = "512", value_parser = parse::positive, value_name = "N")]
    channels: usize,
    /// W, the wide axis [default: 4N]
    #[arg(long, value_parser = parse::positive, value_name = "N")]
    wide: Option<usize>,
    /// Also draw the picture into an SVG file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON object instead of table and picture
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Sizes that are no band; an SVG file that cannot be written.
pub fn run(args: BandArgs) -> Result<()> {
    let (n, w) = (args.channels, args.wide.unwrap_or(4 * args.channels));
    let band = Band::of(args.bandwidth, n, w, 0)?;
    if let Some(path) = &args.svg {
        std::fs::write(path, band.svg()).map_err(Error::io("write", path))?;
    }
    if args.json {
        let json = serde_json::json!({
            "narrow": n,
            "wide": w,
            "bandwidth": Bandwidths::from(args.bandwidth),
            "connections": band.count(),
            "dense_connections": n * w,
            "density": band.density(),
            "packed_elements": band.packed_len(),
        });
        return say!("{json}");
    }
    say!("N = {n} narrow, W = {w} wide: {} connections when dense", grouped(n * w))?;
    match args.bandwidth {
        Connections::Band(bandwidth) => print_table(bandwidth, n, w)?,
        Connections::Pattern(pattern) => say!(
            "{pattern} keeps {}: {} connections, {:.3} %, {} stored slots",
            band.title(),
            grouped(band.count()),
            100.0 * band.density(),
            grouped(band.packed_len())
        )?,
    }
    if band.cuts_nothing() {
        say!("note: {} keeps every connection; this is a dense layer", Bandwidths::from(args.bandwidth).title())?;
    }
    say!("\nnarrow axis to the right, wide axis down; # kept, + partly, . cut\n{}", band.ascii(64))
}

/// The bandwidth asked for beside others.
fn print_table(asked: usize, narrow: usize, wide: usize) -> Result<()> {
    say!("{:>12} {:>14} {:>10} {:>14}", "bandwidth", "connections", "density", "stored slots")?;
    for bandwidth in table_rows(asked, wide) {
        let row = Band::new(narrow, wide, bandwidth)?;
        let mark = if bandwidth == asked { "*" } else { " " };
        let (count, stored) = (grouped(row.count()), grouped(row.packed_len()));
        say!("{mark}{bandwidth:>11} {count:>14} {:>8.3} % {stored:>14}", 100.0 * row.density())?;
    }
    Ok(())
}

/// The bandwidth asked for among the wide axis and its halvings.
fn table_rows(asked: usize, wide: usize) -> Vec<usize> {
    let halvings = std::iter::successors(Some(wide), |&width| (width > 1).then_some(width / 2));
    let mut rows: Vec<_> = halvings.take(6).chain([asked]).collect();
    rows.sort_unstable_by(|a, b| b.cmp(a));
    rows.dedup();
    rows
}
