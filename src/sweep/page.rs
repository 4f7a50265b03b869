//! A sweep as one HTML page that needs nothing else: curves, tables, patterns, samples and the configuration.

use super::charts::{Chart, PALE, PALETTE, Series};
use super::grid::Pattern;
use super::outcome::{Facts, Status};
use super::results::{Group, Results, Row};
use crate::VERSION;
use crate::atomic::AtomicFile;
use crate::band::Band;
use crate::bandwidths::Connections;
use crate::blocks::Blocks;
use crate::error::{Error, Result};
use crate::output::{bytes, grouped, joules, loss};
use crate::plot::{Curve, Run};
use crate::shapes::Param;
use minijinja::Environment;
use minijinja::value::Serde;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::Path;

/// The page's file in a sweep's folder.
pub const PAGE_FILE: &str = "report.html";
const TEMPLATE: &str = include_str!("page.html");
/// Means of training losses that a curve has at most; more could not be told apart.
const MOST_MEANS: u64 = 150;

/// What the template shows.
#[derive(Serialize)]
struct Page {
    name: String,
    version: &'static str,
    state: String,
    palette: Vec<Colour>,
    legend: Vec<Legend>,
    charts: Vec<Figure>,
    columns: Vec<&'static str>,
    rows: Vec<Vec<String>>,
    failures: Vec<Text>,
    pictures: Vec<Figure>,
    samples: Vec<Text>,
    settings: Vec<Text>,
}

#[derive(Serialize)]
struct Colour {
    light: &'static str,
    dark: &'static str,
}

#[derive(Serialize)]
struct Legend {
    name: String,
    colour: usize,
    opacity: f64,
}

#[derive(Serialize)]
struct Figure {
    title: String,
    note: String,
    svg: String,
}

#[derive(Serialize)]
struct Text {
    title: String,
    text: String,
}

/// The curves of a run.
struct Curves {
    group: usize,
    run: Run,
}

/// Writes the page of a sweep whose runs lie in `folder`.
///
/// # Errors
/// [`Error::Io`]; [`Error::Internal`] when the page cannot be made.
pub fn write(results: &Results, folder: &Path, output: &Path) -> Result<()> {
    let page = page(results, folder)?;
    let html = Environment::new()
        .render_named_str("page.html", TEMPLATE, Serde(page))
        .map_err(|error| Error::Internal(format!("the page cannot be made: {error:#}")))?;
    let mut file = AtomicFile::create(output)?;
    file.append(html.as_bytes())?;
    file.seal()?.publish()
}

fn page(results: &Results, folder: &Path) -> Result<Page> {
    let groups = results.groups();
    let number = |row: &Row| groups.iter().position(|group| group.group == row.facts.group).unwrap_or(0);
    let folder_of = |row: &Row| folder.join("runs").join(&row.facts.name);
    // A run that has not begun has no metrics yet, and the losses of one that diverged would leave no room for the others.
    let curves: Vec<Curves> = results
        .runs
        .iter()
        .filter(|row| row.status != Status::Failed)
        .filter_map(|row| Some(Curves { group: number(row), run: Run::read(&folder_of(row)).ok()? }))
        .collect();
    let count = |status| results.with(status).count();
    let (done, failed) = (count(Status::Done), count(Status::Failed));
    let failures = match failed {
        0 => String::new(),
        failed => format!(", {failed} failed"),
    };
    Ok(Page {
        name: results.name.clone(),
        version: VERSION,
        state: format!("{done} of {} runs done{failures}", results.runs.len()),
        palette: PALETTE.iter().map(|&(light, dark)| Colour { light, dark }).collect(),
        legend: groups.iter().enumerate().map(|(number, group)| legend(number, group)).collect(),
        charts: charts(results, &groups, &curves)?,
        columns: COLUMNS.to_vec(),
        rows: groups.iter().map(|group| table_row(group, &groups)).collect(),
        failures: results
            .with(Status::Failed)
            .map(|row| Text { title: row.facts.name.clone(), text: row.error.clone().unwrap_or_default() })
            .collect(),
        pictures: pictures(results)?,
        samples: groups.iter().filter_map(|group| sample(group, results, folder)).collect(),
        settings: settings(results),
    })
}

fn legend(number: usize, group: &Group) -> Legend {
    let opacity = if number < PALETTE.len() { 1.0 } else { PALE };
    Legend { name: group.group.clone(), colour: number % PALETTE.len(), opacity }
}

fn charts(results: &Results, groups: &[Group], curves: &[Curves]) -> Result<Vec<Figure>> {
    let lines = |points: fn(&Run) -> Vec<(f64, f64)>| -> Vec<Series> {
        let series =
            |curves: &Curves| Series { group: curves.group, line: true, strong: true, points: points(&curves.run) };
        curves.iter().map(series).collect()
    };
    let over_steps = |curve: &Curve| curve.iter().map(|(&step, &value)| (step as f64, value)).collect::<Vec<_>>();
    let density = |row: &Row| 100.0 * row.facts.mlp_density;
    let dot = |group, strong, point| Series { group, line: false, strong, points: vec![point] };
    let runs = results.runs.iter().filter_map(|row| {
        let group = groups.iter().position(|group| group.group == row.facts.group)?;
        Some(dot(group, false, (density(row), row.measured.as_ref()?.val_loss)))
    });
    let means = groups
        .iter()
        .enumerate()
        .filter_map(|(number, group)| Some(dot(number, true, (100.0 * group.mlp_density, group.val_loss?.mean))));
    let chart = |x, from_zero, may_be_log, series| Chart { x, from_zero, may_be_log, series };
    let charts = [
        (
            "Validation loss over steps",
            "A line for each run; those of one group share a colour.",
            chart(
                "step",
                true,
                true,
                lines(|run| run.val_loss.iter().map(|(&step, &loss)| (step as f64, loss)).collect()),
            ),
        ),
        (
            "Validation loss over time",
            "Time of the training steps alone, without validations, samples and checkpoints.",
            chart("seconds", true, true, lines(over_time)),
        ),
        (
            "Validation loss at the end over density",
            "The share of the MLP's weights (FC1 and FC2, of 2 x C x 4C) that exist. Large dots are means over the seeds.",
            chart("% of the MLP's weights", false, false, runs.chain(means).collect()),
        ),
        (
            "Training loss over steps",
            "Means of neighbouring steps.",
            chart(
                "step",
                true,
                true,
                curves
                    .iter()
                    .map(|Curves { group, run }| Series {
                        group: *group,
                        line: true,
                        strong: false,
                        points: over_steps_in_means(over_steps(&run.train_loss)),
                    })
                    .collect(),
            ),
        ),
    ];
    let mut figures = Vec::new();
    for (title, note, chart) in charts {
        if let Some(svg) = chart.svg()? {
            figures.push(Figure { title: title.to_string(), note: note.to_string(), svg });
        }
    }
    Ok(figures)
}

/// Validation losses over the seconds that the steps before them took.
fn over_time(run: &Run) -> Vec<(f64, f64)> {
    let mut times = run.step_ms.iter().peekable();
    let mut seconds = 0.0;
    let at = |(&step, &loss): (&u64, &f64)| {
        while let Some((_, ms)) = times.next_if(|(done, _)| **done <= step) {
            seconds += ms / 1e3;
        }
        (seconds, loss)
    };
    run.val_loss.iter().map(at).collect()
}

/// Points averaged so that there are not too many.
fn over_steps_in_means(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let each = (points.len() as u64).div_ceil(MOST_MEANS).max(1) as usize;
    let mean = |points: &[(f64, f64)]| {
        let sum = points.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / points.len() as f64, sum.1 / points.len() as f64)
    };
    points.chunks(each).map(mean).collect()
}

const COLUMNS: [&str; 9] = [
    "group",
    "MLP kept",
    "parameters",
    "weights",
    "runs",
    "validation loss",
    "against dense",
    "tokens/s",
    "time, energy",
];

fn table_row(group: &Group, groups: &[Group]) -> Vec<String> {
    let none = || "-".to_string();
    let dense = groups
        .iter()
        .find(|other| other.pattern == Pattern::Dense && other.learning_rate == group.learning_rate)
        .and_then(|dense| dense.val_loss);
    let against = match (group.val_loss, dense) {
        (Some(own), Some(dense)) if group.pattern != Pattern::Dense => format!("{:+.4}", own.mean - dense.mean),
        _ => none(),
    };
    let value = group.val_loss.map_or_else(none, |spread| match spread.deviation {
        Some(deviation) => format!("{} ± {deviation:.4}", loss(spread.mean as f32)),
        None => loss(spread.mean as f32),
    });
    let time = group.seconds.map(|seconds| format!("{seconds:.1} s"));
    let cost: Vec<String> = time.into_iter().chain(group.joules.map(joules)).collect();
    vec![
        group.group.clone(),
        format!("{:.2} %", 100.0 * group.mlp_density),
        grouped(group.parameters),
        bytes(group.weight_bytes),
        format!("{}/{}", group.done, group.runs),
        value,
        against,
        group.tok_per_s.map_or_else(none, |rate| grouped(rate as usize)),
        if cost.is_empty() { none() } else { cost.join(", ") },
    ]
}

/// Each different layer once: bands by their exact geometry, narrower MLPs by their width, and of random patterns, which are
/// others in every layer, the first layer's. Of learned blocks those that the first finished run of each group ended with, of the
/// first layer too.
fn pictures(results: &Results) -> Result<Vec<Figure>> {
    let (mut figures, mut seen) = (Vec::new(), BTreeSet::new());
    for row in &results.runs {
        let facts = &row.facts;
        let (narrow, wide, full) = (facts.channels, facts.mlp_width, 4 * facts.channels);
        let blocks = facts.num_layers;
        let bandwidths = [facts.fc1_bandwidth, facts.fc2_bandwidth].into_iter();
        for connections in bandwidths.flat_map(|all| (0..blocks).map(move |block| all.of(block, blocks))) {
            if connections.is_learned() || !seen.insert((wide, connections)) {
                continue;
            }
            let (title, svg, kept) = match connections {
                Connections::DENSE if wide == full => ("dense".to_string(), rectangle(1.0), 1.0),
                Connections::DENSE => (
                    format!("small-dense, width {wide} of {full}"),
                    rectangle(wide as f64 / full as f64),
                    wide as f64 / full as f64,
                ),
                Connections::Band(bandwidth) => {
                    let band = Band::new(narrow, wide, bandwidth)?;
                    (format!("band, bandwidth {bandwidth}"), band.svg(), band.density())
                }
                Connections::Pattern(pattern) => {
                    let band = Band::of(connections, narrow, wide, 0)?;
                    (pattern.to_string(), band.svg(), band.density())
                }
            };
            let note = note(kept, narrow, full);
            figures.push(Figure { title, note, svg });
        }
    }
    for group in results.groups() {
        if let Some(row) = results.with(Status::Done).find(|row| row.facts.group == group.group) {
            figures.extend(learned(row)?);
        }
    }
    Ok(figures)
}

/// The blocks that a run's first layers learned, FC1's and FC2's; none when it learned none.
fn learned(row: &Row) -> Result<Vec<Figure>> {
    let (Facts { name, channels: narrow, mlp_width: wide, .. }, mut figures) = (&row.facts, Vec::new());
    for (layer, kind) in [("FC1", Param::Fcw), ("FC2", Param::Fcprojw)] {
        let text = row
            .measured
            .as_ref()
            .and_then(|run| (0..row.facts.num_layers).find_map(|layer| run.blocks.get(&kind.name_in(layer))));
        if let Some(blocks) = text.and_then(|text| Blocks::from_text(text, *narrow, *wide)) {
            let band = Band::of_blocks(*narrow, *wide, blocks)?;
            let title = format!("{name}: {layer} after training");
            figures.push(Figure { title, note: note(band.density(), *narrow, 4 * narrow), svg: band.svg() });
        }
    }
    Ok(figures)
}

fn note(kept: f64, narrow: usize, full: usize) -> String {
    format!("{:.3} % of {narrow} x {full} connections", 100.0 * kept)
}

/// A layer of which the upper part of the wide axis exists, in the frame of [`Band::svg`].
fn rectangle(share: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"-24 -24 368 368\" width=\"368\" height=\"368\" \
         font-family=\"sans-serif\" font-size=\"12\"><rect width=\"320\" height=\"320\" fill=\"#8884\"/>\
         <rect width=\"320\" height=\"{:.3}\" fill=\"#2b7de9\"/><text x=\"0\" y=\"-8\" fill=\"#888\">narrow axis i</text>\
         <text x=\"-8\" y=\"0\" fill=\"#888\" transform=\"rotate(90 -8 0)\">wide axis j</text></svg>\n",
        320.0 * share
    )
}

/// The last text that a group's first finished run made up.
fn sample(group: &Group, results: &Results, folder: &Path) -> Option<Text> {
    #[derive(Deserialize)]
    struct Record {
        step: u64,
        sample: String,
    }
    let row = results.with(Status::Done).find(|row| row.facts.group == group.group)?;
    let name = &row.facts.name;
    let text = std::fs::read_to_string(folder.join("runs").join(name).join("samples.jsonl")).ok()?;
    let record: Record = text.lines().rev().find_map(|line| serde_json::from_str(line).ok())?;
    Some(Text { title: format!("{name}, step {}", record.step), text: record.sample })
}

fn settings(results: &Results) -> Vec<Text> {
    let settings = results.settings.iter().map(|(key, value)| Text { title: key.clone(), text: value.clone() });
    let measured = || results.runs.iter().filter_map(|row| row.measured.as_ref());
    let devices: BTreeSet<&str> = measured().map(|run| run.device.as_str()).collect();
    let versions: BTreeSet<&str> = measured().map(|run| run.version.as_str()).collect();
    let energy: BTreeSet<&str> = measured().filter_map(|run| run.energy.joules_note.as_deref()).collect();
    let several = |title: &str, texts: BTreeSet<&str>| {
        let text = texts.into_iter().collect::<Vec<_>>().join("; ");
        (!text.is_empty()).then(|| Text { title: title.to_string(), text })
    };
    let run = [several("device", devices), several("program", versions), several("energy not known", energy)];
    settings.chain(run.into_iter().flatten()).collect()
}
