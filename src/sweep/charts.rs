//! The charts of a sweep's page, as SVG that takes its colours from the page.

use crate::error::{Error, Result};
use crate::plot::{Axis, LOG_FROM};
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;
use std::ops::Range;

/// The colours of the groups on a light and on a dark page: Okabe and Ito's, which colour-blind readers can tell apart, and
/// three more. Drawings name the light ones, which the page's style sheet replaces.
pub const PALETTE: [(&str, &str); 10] = [
    ("#0072B2", "#4DA9E0"),
    ("#D55E00", "#FF8A3D"),
    ("#009E73", "#2CCFA2"),
    ("#CC79A7", "#E79AC6"),
    ("#B8860B", "#F0C04A"),
    ("#3E9FD8", "#8FD0F7"),
    ("#666666", "#A8A8A8"),
    ("#7B3FA0", "#B98AE0"),
    ("#8B4513", "#D09A6A"),
    ("#A01F3C", "#F07A92"),
];
/// How opaque the groups beyond the palette are, which repeat its colours.
pub const PALE: f64 = 0.45;

const SIZE: (u32, u32) = (520, 340);
const AXIS: RGBColor = RGBColor(136, 136, 136);

/// Points of a group.
pub struct Series {
    /// The group's number.
    pub group: usize,
    /// Joined by a line; otherwise each is a dot.
    pub line: bool,
    /// Drawn strongly.
    pub strong: bool,
    /// Where they are.
    pub points: Vec<(f64, f64)>,
}

/// One chart.
pub struct Chart {
    /// What the horizontal axis tells.
    pub x: &'static str,
    /// Whether the horizontal axis begins at 0.
    pub from_zero: bool,
    /// Whether the vertical axis may be logarithmic.
    pub may_be_log: bool,
    /// What it shows.
    pub series: Vec<Series>,
}

impl Chart {
    /// The chart as SVG; `None` when it has no points.
    ///
    /// # Errors
    /// [`Error::Internal`] when it cannot be drawn.
    pub fn svg(&self) -> Result<Option<String>> {
        let points = || self.series.iter().flat_map(|series| series.points.iter());
        if points().next().is_none() {
            return Ok(None);
        }
        let span = |of: fn(&(f64, f64)) -> f64| {
            points().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
        };
        let ((left, right), (low, high)) = (span(|point| point.0), span(|point| point.1));
        let x = Axis::new(if self.from_zero { 0.0 } else { left }, right, false);
        let y = Axis::new(low, high, self.may_be_log && low > 0.0 && high / low >= LOG_FROM);
        let mut svg = String::new();
        self.draw(&mut svg, &x, &y).map_err(|error| Error::Internal(format!("a chart cannot be drawn: {error}")))?;
        Ok(Some(svg))
    }

    fn draw(&self, svg: &mut String, x: &Axis, y: &Axis) -> std::result::Result<(), Box<dyn std::error::Error>> {
        // Both axes are drawn from 0 to 1, and their labels say what that means.
        let place = |axis: &Axis, value: f64| axis.place(value, &(0.0..1.0));
        let ticks = |axis: &Axis| -> Vec<(f64, String)> {
            axis.ticks().into_iter().map(|(value, label)| (place(axis, value), label)).collect()
        };
        let (x_ticks, y_ticks) = (ticks(x), ticks(y));
        let keys = |ticks: &[(f64, String)]| Share { ticks: ticks.iter().map(|(at, _)| *at).collect() };
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(6)
            .margin_right(20)
            .x_label_area_size(46)
            .y_label_area_size(58)
            .build_cartesian_2d(keys(&x_ticks), keys(&y_ticks))?;
        chart
            .configure_mesh()
            .axis_style(AXIS)
            .bold_line_style(AXIS.mix(0.25))
            .label_style(("sans-serif", 17))
            .x_desc(self.x)
            .x_label_formatter(&|at: &f64| label(&x_ticks, *at))
            .y_label_formatter(&|at: &f64| label(&y_ticks, *at))
            .draw()?;
        for series in &self.series {
            let colour = colour(series.group);
            let points = series.points.iter().map(|&(at, value)| (place(x, at), place(y, value)));
            match (series.line, series.strong) {
                (true, strong) => {
                    let style = colour.stroke_width(if strong { 2 } else { 1 });
                    chart.draw_series(LineSeries::new(points, style))?;
                }
                (false, true) => {
                    chart.draw_series(points.map(|point| Circle::new(point, 6, colour.filled())))?;
                }
                (false, false) => {
                    chart.draw_series(points.map(|point| Circle::new(point, 3, colour.stroke_width(1))))?;
                }
            }
        }
        root.present()?;
        Ok(())
    }
}

/// An axis from 0 to 1 with ticks where they are wanted.
struct Share {
    ticks: Vec<f64>,
}

impl Ranged for Share {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (start, end): (i32, i32)) -> i32 {
        start + (f64::from(end - start) * value).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // There are no lines between the ticks'.
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.clone() }
    }

    fn range(&self) -> Range<f64> {
        0.0..1.0
    }
}

/// The colour of a group.
fn colour(group: usize) -> RGBAColor {
    let (light, _) = PALETTE[group % PALETTE.len()];
    let part = |at: usize| u8::from_str_radix(&light[at..at + 2], 16).unwrap_or_default();
    RGBColor(part(1), part(3), part(5)).mix(if group < PALETTE.len() { 1.0 } else { PALE })
}

/// The label of the tick at a place.
fn label(ticks: &[(f64, String)], at: f64) -> String {
    ticks.iter().find(|(tick, _)| (tick - at).abs() < 1e-9).map(|(_, label)| label.clone()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_names_its_ticks_and_its_groups_colours() {
        let points = vec![(0.0, 8.0), (50.0, 4.0), (100.0, 1.0)];
        let series = vec![Series { group: 1, line: true, strong: true, points }];
        let chart = Chart { x: "step", from_zero: true, may_be_log: true, series };
        let svg = chart.svg().unwrap().unwrap();
        assert!(svg.contains("stroke=\"#D55E00\"") && svg.contains("step"), "{svg}");
        for tick in ["20", "100", "1", "2", "5"] {
            assert!(svg.lines().any(|line| line == tick), "{tick} is missing: {svg}");
        }
        let empty = Chart { x: "step", from_zero: true, may_be_log: true, series: Vec::new() };
        assert_eq!(empty.svg().unwrap(), None);
    }
}
