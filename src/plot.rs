//! Pictures of metrics files: loss, learning rate, throughput and gradient norm of one or many runs, as SVG or PNG.
//!
//! The four charts share their horizontal axis, the step. A PNG is the SVG rendered with a font that the program carries,
//! so that it looks the same on a machine without fonts.

use crate::atomic::AtomicFile;
use crate::error::{Error, Result};
use crate::output::quoted;
use resvg::{tiny_skia, usvg};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Okabe and Ito's palette, which colour-blind readers can tell apart, without the yellow that white swallows.
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666"];
/// Runs beyond the palette repeat its colours with another dash.
const DASHES: [&str; 3] = ["", "7 3", "2 3"];
const WIDTH: f64 = 1200.0;
const CHART: (f64, f64) = (WIDTH / 2.0, 330.0);
/// Pixels of a PNG per unit of the SVG.
const SCALE: f32 = 2.0;
/// Values beyond are not drawn: no honest measurement, and their differences would overflow.
const ABSURD: f64 = 1e30;
/// A chart whose largest value is this many times its smallest has a logarithmic axis, where that makes sense.
pub(crate) const LOG_FROM: f64 = 5.0;

/// A quantity over the steps. A step that a file tells twice, as after a resume, counts as told last.
pub type Curve = BTreeMap<u64, f64>;

/// The curves of one metrics file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Run {
    /// What the legend calls it.
    pub name: String,
    /// Mean loss of each step's batch.
    pub train_loss: Curve,
    /// Mean loss on the validation data.
    pub val_loss: Curve,
    /// The learning rate.
    pub lr: Curve,
    /// Tokens per second.
    pub tok_per_s: Curve,
    /// Gradient norm before clipping.
    pub grad_norm: Curve,
    /// Milliseconds that each step took.
    pub step_ms: Curve,
}

/// One line of a metrics file; null stands for a number that was not finite.
#[derive(Deserialize)]
struct Line {
    step: u64,
    train_loss: Option<f64>,
    val_loss: Option<f64>,
    lr: Option<f64>,
    tok_per_s: Option<f64>,
    grad_norm: Option<f64>,
    step_ms: Option<f64>,
}

impl Run {
    /// Reads a metrics file, or that of a folder: its `metrics.jsonl`, else its only `.jsonl` file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read; [`Error::File`] naming the line that is no metrics record, or a file without
    /// any.
    pub fn read(path: &Path) -> Result<Run> {
        let file = metrics_file(path)?;
        let named = if path.is_dir() { path.file_name() } else { path.file_stem() };
        let name = named.map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
        let mut run = Run { name, ..Run::default() };
        let reader = BufReader::new(File::open(&file).map_err(Error::io("open", &file))?);
        for (index, line) in reader.split(b'\n').enumerate() {
            let line = line.map_err(Error::io("read", &file))?;
            if !line.trim_ascii().is_empty() {
                let record = serde_json::from_slice(&line).map_err(|error| malformed(&file, index + 1, &error))?;
                run.add(&record);
            }
        }
        match run.train_loss.is_empty() && run.val_loss.is_empty() {
            true => Err(Error::file(&file, "holds no losses; name a file that training wrote with --metrics")),
            false => Ok(run),
        }
    }

    fn add(&mut self, line: &Line) {
        let Self { name: _, train_loss, val_loss, lr, tok_per_s, grad_norm, step_ms } = self;
        let values = [line.train_loss, line.val_loss, line.lr, line.tok_per_s, line.grad_norm, line.step_ms];
        let curves = [train_loss, val_loss, lr, tok_per_s, grad_norm, step_ms];
        for (curve, value) in curves.into_iter().zip(values) {
            if let Some(value) = value.filter(|value| value.abs() < ABSURD) {
                curve.insert(line.step, value);
            }
        }
    }
}

fn malformed(file: &Path, line: usize, error: &serde_json::Error) -> Error {
    let what = error.to_string();
    let what = what.split(" at line").next().unwrap_or_default();
    Error::file(
        file,
        format!("line {line} is no metrics record: {}; name a file that training wrote with --metrics", quoted(what)),
    )
}

fn metrics_file(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_path_buf());
    }
    let of_run = path.join("metrics.jsonl");
    if of_run.is_file() {
        return Ok(of_run);
    }
    let entries = std::fs::read_dir(path).map_err(Error::io("read", path))?;
    let files: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|file| file.extension().is_some_and(|ending| ending == "jsonl"))
        .collect();
    match files.as_slice() {
        [only] => Ok(only.clone()),
        _ => Err(Error::file(path, format!("holds {} .jsonl files; name the metrics file itself", files.len()))),
    }
}

/// What a picture is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Picture {
    /// Text, sharp at every size.
    Svg,
    /// Pixels.
    Png,
}

impl Picture {
    /// The kind that a file's name asks for.
    ///
    /// # Errors
    /// [`Error::Usage`] for an ending other than `.svg` and `.png`.
    pub fn of_path(path: &Path) -> Result<Picture> {
        match path.extension().and_then(|ending| ending.to_str()).map(str::to_ascii_lowercase).as_deref() {
            Some("svg") => Ok(Picture::Svg),
            Some("png") => Ok(Picture::Png),
            _ => Err(Error::usage(format!("{} must end in .svg or .png", path.display()))),
        }
    }
}

/// Draws the runs into the file at `path`.
///
/// # Errors
/// [`Error::Io`] and [`Error::File`] when it cannot be written.
pub fn write(runs: &[Run], path: &Path, picture: Picture) -> Result<()> {
    let svg = svg(runs);
    let bytes = match picture {
        Picture::Svg => svg.into_bytes(),
        Picture::Png => png(&svg)?,
    };
    let mut file = AtomicFile::create(path)?;
    file.append(&bytes)?;
    file.seal()?.publish()
}

/// Renders an SVG picture to PNG.
fn png(svg: &str) -> Result<Vec<u8>> {
    let fault = |what: String| Error::Internal(format!("the picture cannot be rendered: {what}"));
    let mut options = usvg::Options::default();
    let fonts = Arc::make_mut(&mut options.fontdb);
    fonts.load_font_data(epaint_default_fonts::UBUNTU_LIGHT.to_vec());
    let family = fonts.faces().next().and_then(|face| face.families.first()).map(|(name, _)| name.clone());
    fonts.set_sans_serif_family(family.unwrap_or_default());
    let tree = usvg::Tree::from_str(svg, &options).map_err(|error| fault(error.to_string()))?;
    let size = tree.size().to_int_size().scale_by(SCALE).ok_or_else(|| fault("it has no size".to_string()))?;
    let mut pixels =
        tiny_skia::Pixmap::new(size.width(), size.height()).ok_or_else(|| fault("it is too large".to_string()))?;
    resvg::render(&tree, tiny_skia::Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
    pixels.encode_png().map_err(|error| fault(error.to_string()))
}

/// How a curve is drawn.
#[derive(Clone, Copy, PartialEq)]
enum Stroke {
    Plain,
    /// A pale line behind the others.
    Pale,
    /// A line with a dot at each value, for the few values of a validation.
    Dotted,
}

/// One chart: curves of every run.
struct Chart<'a> {
    title: &'a str,
    may_be_log: bool,
    /// With the number of the run.
    curves: Vec<(usize, Stroke, &'a Curve)>,
}

/// The picture as SVG.
pub fn svg(runs: &[Run]) -> String {
    let pick = |stroke, curve: fn(&Run) -> &Curve| {
        runs.iter().enumerate().map(move |(index, run)| (index, stroke, curve(run))).collect::<Vec<_>>()
    };
    let losses = [pick(Stroke::Pale, |run| &run.train_loss), pick(Stroke::Dotted, |run| &run.val_loss)].concat();
    let rates = pick(Stroke::Plain, |run| &run.tok_per_s);
    let charts = [
        Chart { title: "loss: pale training, dotted validation", may_be_log: true, curves: losses },
        Chart { title: "gradient norm", may_be_log: true, curves: pick(Stroke::Plain, |run| &run.grad_norm) },
        Chart { title: "learning rate", may_be_log: false, curves: pick(Stroke::Plain, |run| &run.lr) },
        Chart { title: "tokens per second", may_be_log: false, curves: rates },
    ];
    let steps = charts.iter().flat_map(|chart| &chart.curves).flat_map(|(_, _, curve)| curve.last_key_value());
    let last = steps.map(|(&step, _)| step).max().unwrap_or(0);
    let mut body = String::new();
    let top = legend(&mut body, runs);
    for (index, chart) in charts.iter().enumerate() {
        let (x, y) = ((index % 2) as f64 * CHART.0, top + (index / 2) as f64 * CHART.1);
        chart.draw(&mut body, (x, y), Axis::new(0.0, last.max(1) as f64, false));
    }
    let height = top + 2.0 * CHART.1 + 8.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"13\" fill=\"#222222\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n{body}</svg>\n"
    )
}

/// Draws the runs' names and returns how much height they take.
fn legend(out: &mut String, runs: &[Run]) -> f64 {
    let (mut x, mut y) = (64.0, 26.0);
    for (index, run) in runs.iter().enumerate() {
        let name: String = run.name.chars().take(60).collect();
        let width = 54.0 + 7.5 * name.chars().count() as f64;
        if x > 64.0 && x + width > WIDTH {
            (x, y) = (64.0, y + 22.0);
        }
        let style = style(index, 3.0);
        put(out, format_args!("<path d=\"M{x} {y}h24\" {style}/><text x=\"{}\" y=\"{}\">", x + 32.0, y + 4.5));
        put(out, format_args!("{}</text>\n", escaped(&name)));
        x += width;
    }
    y + 14.0
}

/// The stroke that belongs to a run.
fn style(run: usize, width: f64) -> String {
    let colour = COLOURS[run % COLOURS.len()];
    let dash = match DASHES[run / COLOURS.len() % DASHES.len()] {
        "" => String::new(),
        dash => format!(" stroke-dasharray=\"{dash}\""),
    };
    format!("fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\" stroke-linejoin=\"round\"{dash}")
}

impl Chart<'_> {
    /// Draws the chart with its upper left corner at `corner`.
    fn draw(&self, out: &mut String, corner: (f64, f64), steps: Axis) {
        let x = corner.0 + 64.0..corner.0 + CHART.0 - 20.0;
        let y = corner.1 + CHART.1 - 44.0..corner.1 + 34.0;
        let values = || self.curves.iter().flat_map(|(_, _, curve)| curve.values().copied());
        let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
        let left = x.start;
        put(out, format_args!("<text x=\"{left}\" y=\"{}\" font-size=\"15\">{}", y.end - 12.0, self.title));
        if low > high {
            return put(out, format_args!(": not in these files</text>\n"));
        }
        let log = self.may_be_log && low > 1.0 / ABSURD && high / low >= LOG_FROM;
        put(out, format_args!("{}</text>\n", if log { " (log)" } else { "" }));
        let axis = Axis::new(low, high, log);
        grid(out, &steps, &axis, &x, &y);
        for &(run, stroke, curve) in &self.curves {
            let points = curve.iter().map(|(&step, &value)| (steps.place(step as f64, &x), axis.place(value, &y)));
            polyline(out, run, stroke, &thinned(points));
        }
    }
}

/// Ticks, their labels and faint lines.
fn grid(out: &mut String, steps: &Axis, values: &Axis, x: &Range<f64>, y: &Range<f64>) {
    let (left, right, bottom) = (x.start, x.end, y.start);
    for (value, label) in values.ticks() {
        let at = values.place(value, y);
        put(out, format_args!("<path d=\"M{left} {at:.1}H{right}\" stroke=\"#dddddd\"/>"));
        put(out, format_args!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>\n", left - 8.0, at + 4.5));
    }
    put(out, format_args!("<path d=\"M{left} {bottom}H{right}\" stroke=\"#888888\"/>\n"));
    for (step, label) in steps.ticks() {
        let at = steps.place(step, x);
        put(out, format_args!("<path d=\"M{at:.1} {bottom}v5\" stroke=\"#888888\"/>"));
        put(out, format_args!("<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>\n", bottom + 20.0));
    }
    put(out, format_args!("<text x=\"{right}\" y=\"{}\" text-anchor=\"end\">step</text>\n", bottom + 36.0));
}

fn polyline(out: &mut String, run: usize, stroke: Stroke, points: &[(f64, f64)]) {
    let (width, opacity) = match stroke {
        Stroke::Plain => (1.4, 0.9),
        Stroke::Pale => (1.2, 0.4),
        Stroke::Dotted => (2.0, 1.0),
    };
    put(out, format_args!("<g opacity=\"{opacity}\"><polyline {} points=\"", style(run, width)));
    for (x, y) in points {
        put(out, format_args!("{x:.1},{y:.1} "));
    }
    put(out, format_args!("\"/>"));
    // A single value is a dot too: a line of one point cannot be seen.
    if points.len() == 1 || stroke == Stroke::Dotted && points.len() <= 60 {
        for (x, y) in points {
            let colour = COLOURS[run % COLOURS.len()];
            put(out, format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"));
        }
    }
    put(out, format_args!("</g>\n"));
}

/// Of the points in one column of half a unit (a pixel of a PNG) only the first, lowest, highest and last: what is left
/// out could not be seen.
fn thinned(points: impl Iterator<Item = (f64, f64)>) -> Vec<(f64, f64)> {
    let mut kept: Vec<(f64, f64)> = Vec::new();
    let mut column: Vec<(f64, f64)> = Vec::new();
    let column_of = |point: &(f64, f64)| (point.0 * f64::from(SCALE)) as i64;
    for point in points {
        if column.first().is_some_and(|first| column_of(first) != column_of(&point)) {
            kept.append(&mut column);
        }
        column.push(point);
        if column.len() > 4 {
            let (low, high) = if column[1].1 <= column[2].1 { (1, 2) } else { (2, 1) };
            // The new last point pushes out whichever inner one is no extreme.
            let inner = column[3].1;
            match () {
                () if inner < column[low].1 => drop(column.remove(low)),
                () if inner > column[high].1 => drop(column.remove(high)),
                () => drop(column.remove(3)),
            }
        }
    }
    kept.append(&mut column);
    kept
}

/// An axis from a smallest to a largest value, linear or logarithmic.
pub(crate) struct Axis {
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    pub(crate) fn new(low: f64, high: f64, log: bool) -> Axis {
        if log {
            return Axis { low: low / 1.1, high: high * 1.1, log };
        }
        // The step's axis, and a chart of equal values, need some width as well.
        let least = (1e-3 * high.abs().max(low.abs())).max(1e-9);
        let pad = 0.04 * (high - low).max(least);
        let floor = if low == 0.0 { 0.0 } else { low - pad };
        Axis { low: floor, high: high + pad, log }
    }

    /// Where `value` lies in `room`, whose start belongs to the smallest value.
    pub(crate) fn place(&self, value: f64, room: &Range<f64>) -> f64 {
        let share = match self.log {
            true => (value / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        room.start + share * (room.end - room.start)
    }

    /// Round values on the axis with their labels.
    pub(crate) fn ticks(&self) -> Vec<(f64, String)> {
        if self.log {
            return self.log_ticks();
        }
        let rough = (self.high - self.low) / 6.0;
        let power = 10f64.powf(rough.log10().floor());
        let spacing = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|&s| s >= rough);
        let spacing = spacing.unwrap_or(rough);
        let (first, last) = ((self.low / spacing).ceil(), (self.high / spacing).floor());
        let count = (last - first).clamp(0.0, 12.0) as usize;
        (0..=count).map(|index| (first + index as f64) * spacing).map(|value| (value, label(value, spacing))).collect()
    }

    fn log_ticks(&self) -> Vec<(f64, String)> {
        let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let all = |factors: &[f64]| {
            let values = decades.clone().flat_map(|decade| factors.iter().map(move |f| f * 10f64.powi(decade)));
            values.filter(|value| (self.low..=self.high).contains(value)).collect::<Vec<_>>()
        };
        let fine = all(&[1.0, 2.0, 5.0]);
        let values = if fine.len() <= 9 { fine } else { all(&[1.0]) };
        let every = values.len().div_ceil(9).max(1);
        values.into_iter().step_by(every).map(|value| (value, label(value, value))).collect()
    }
}

/// A tick's value with as many digits as ticks `spacing` apart need.
fn label(value: f64, spacing: f64) -> String {
    let decimals = |unit: f64| (-(spacing / unit * 1.0001).log10().floor()).clamp(0.0, 9.0) as usize;
    let size = value.abs();
    if size < spacing * 1e-6 {
        "0".to_string()
    } else if !(1e-3..1e10).contains(&size) {
        let digits = (size.log10().floor() - (spacing * 1.0001).log10().floor()).clamp(0.0, 9.0) as usize;
        format!("{value:.digits$e}")
    } else if size >= 1e6 {
        format!("{:.*}M", decimals(1e6), value / 1e6)
    } else if size >= 1e4 {
        format!("{:.*}k", decimals(1e3), value / 1e3)
    } else {
        format!("{value:.*}", decimals(1.0))
    }
}

/// Text as XML holds it; control characters, which XML forbids, become spaces.
fn escaped(text: &str) -> String {
    let clean = text.replace(|c: char| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}'), " ");
    clean.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    // A string takes whatever is written.
    let _ = out.write_fmt(text);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &[u8]) -> Result<Run> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.jsonl");
        std::fs::write(&path, text).unwrap();
        Run::read(&path)
    }

    #[test]
    fn files_and_folders_become_runs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let text = "{\"step\":0,\"val_loss\":5.5}\n{\"step\":1,\"train_loss\":5,\"lr\":1e-3,\"grad_norm\":null}\n";
        std::fs::write(&path, text).unwrap();
        let run = Run::read(&path).unwrap();
        assert_eq!((run.name.as_str(), &run.val_loss), ("a", &Curve::from([(0, 5.5)])));
        assert_eq!((&run.train_loss, run.grad_norm.len()), (&Curve::from([(1, 5.0)]), 0));
        assert_eq!(Run::read(folder.path()).unwrap().train_loss, run.train_loss);
        std::fs::write(folder.path().join("b.jsonl"), text).unwrap();
        assert!(Run::read(folder.path()).unwrap_err().to_string().contains("holds 2 .jsonl files"));
    }

    #[test]
    fn a_malformed_line_is_named() {
        let error = read(b"{\"step\":0,\"val_loss\":5.5}\n\nnonsense\n").unwrap_err().to_string();
        assert!(error.contains("run.jsonl: line 3 is no metrics record: 'expected ident';"), "{error}");
        assert!(read(b"{\"val_loss\":5.5}").unwrap_err().to_string().contains("missing field `step`"));
        assert!(read(b"").unwrap_err().to_string().contains("holds no losses"));
    }

    #[test]
    fn labels_have_the_digits_they_need() {
        let labels =
            [(0.5, 0.5), (3e-4, 1e-4), (1.5e-4, 5e-5), (12000.0, 2000.0), (2.5e6, 5e5), (0.0, 1.0), (7.0, 1.0)];
        let expected = ["0.5", "3e-4", "1.5e-4", "12k", "2.5M", "0", "7"];
        assert_eq!(labels.map(|(value, spacing)| label(value, spacing)), expected);
    }

    #[test]
    fn thinning_keeps_what_can_be_seen() {
        let noise = |index: u64| ((index * 2654435761) % 1000) as f64;
        let points = thinned((0..100_000).map(|index| (index as f64 / 1e3, noise(index))));
        assert!(points.len() <= 201 * 4, "{}", points.len());
        assert_eq!(points.iter().fold(0.0, |max: f64, point| max.max(point.1)), 999.0);
        assert_eq!((points[0].0, points[points.len() - 1].0), (0.0, 99.999));
    }

    #[test]
    fn names_cannot_break_the_picture() {
        let mut run = read(b"{\"step\":0,\"val_loss\":5.5}").unwrap();
        run.name = "<a & \"b\">\u{1}".to_string();
        let svg = svg(&[run]);
        assert!(svg.contains("&lt;a &amp; \"b\"&gt; </text>"));
        assert!(png(&svg).unwrap().starts_with(b"\x89PNG"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_numbers_make_a_picture(lines in proptest::collection::vec((any::<u64>(), any::<f64>(), 0usize..5), 1..20)) {
            let key = ["train_loss", "val_loss", "lr", "grad_norm", "tok_per_s"];
            let text: String = lines
                .iter()
                .map(|&(step, value, field)| serde_json::json!({ "step": step, key[field]: value }).to_string() + "\n")
                .collect();
            if let Ok(run) = read(text.as_bytes()) {
                let svg = svg(&[run]);
                prop_assert!(!svg.contains("NaN") && !svg.contains("inf"));
                prop_assert!(usvg::Tree::from_str(&svg, &usvg::Options::default()).is_ok());
            }
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
        }
    }
}
