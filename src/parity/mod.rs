//! Parity: every operation of one backend held against another's, forward, backward and optimizer.
//!
//! A [`Case`] is an operation at one shape: its body is written once over [`Backend`] and runs on both sides with the same
//! inputs. [`run`] compares what they return, element by element, with tolerances from [`crate::tolerance`], and holds
//! everything outside a band against exact zero. `bandtrain parity` prints the rows.

mod attention;
mod band;
mod dense;
mod head;

use crate::backend::{Arithmetic, Backend, Device, Role};
use crate::error::Result;
use crate::shapes::{Span, TENSOR_ALIGN};
use crate::tolerance::{self, Tolerance, Worst};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// How far one output may be from the reference's.
pub enum Allowed {
    /// Relative to the element and to the output's root mean square.
    Relative(Tolerance),
    /// The same for an output that may cancel as a whole, with the root mean square of what cancels.
    Cancelled(Tolerance, f64),
    /// A bound for each element.
    Each(Vec<f64>),
}

/// One thing that an operation computed.
pub struct Output {
    /// What it is.
    pub name: &'static str,
    /// Its elements.
    pub values: Vec<f32>,
    /// How far they may be from the reference's; the reference's own says.
    pub allowed: Allowed,
    /// Elements that must be exactly 0.0 (empty: none has to).
    pub zero: Vec<bool>,
}

impl Output {
    /// An output with a relative tolerance and no element that has to be zero.
    pub fn new(name: &'static str, values: Vec<f32>, tolerance: Tolerance) -> Self {
        Self { name, values, allowed: Allowed::Relative(tolerance), zero: Vec::new() }
    }
}

/// An output that a GELU, or its derivative, has made of values that it may nearly cancel: `before` is what it was applied to.
fn after_gelu(name: &'static str, values: Vec<f32>, tolerance: Tolerance, before: &[f32]) -> Output {
    let terms = tolerance::root_mean_square(before);
    Output { allowed: Allowed::Cancelled(tolerance, terms), ..Output::new(name, values, tolerance) }
}

/// An operation at one shape.
pub trait Case {
    /// The operation's name, as in the trait it belongs to.
    fn op(&self) -> &'static str;

    /// The shape in words.
    fn shape(&self) -> String;

    /// Runs it on inputs that are exact in `arithmetic`, that of the less precise of the two backends, from which the
    /// tolerances follow.
    ///
    /// # Errors
    /// The device failed.
    fn run<B: Backend>(&self, backend: &mut B, arithmetic: Arithmetic) -> Result<Vec<Output>>;
}

/// The comparison of one output of one case.
#[derive(Debug, Clone)]
pub struct Row {
    /// The operation.
    pub op: &'static str,
    /// Its shape.
    pub shape: String,
    /// Which of its outputs.
    pub output: &'static str,
    /// The worst element: where, what, what was expected and what was allowed.
    pub worst: Worst,
    /// An element that should be exactly 0.0 and is not.
    pub not_zero: Option<(usize, f32)>,
}

impl Row {
    /// Whether the backends agree.
    pub fn passes(&self) -> bool {
        self.worst.ratio() <= 1.0 && self.not_zero.is_none()
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Row { op, shape, output, worst, not_zero } = self;
        let error = (worst.actual - worst.expected).abs();
        let verdict = if self.passes() { "ok" } else { "FAILED" };
        write!(
            f,
            "{verdict:6} {op:26} {shape:38} {output:14} error {error:8.1e} of {:8.1e} at {}",
            worst.allowed, worst.index
        )?;
        match not_zero {
            None => Ok(()),
            Some((index, value)) => write!(f, "; {value:e} outside the band at {index}"),
        }
    }
}

/// What a user asks first, and the outputs that answer it.
const QUESTIONS: [(&str, &[&str]); 5] = [
    ("FC1 forward", &["FC1 pre", "FC1 gelu"]),
    ("FC1 backward", &["FC1 dinput", "FC1 dweight", "FC1 dbias"]),
    ("FC2 forward", &["FC2 out"]),
    ("FC2 backward", &["FC2 dinput", "FC2 dweight", "FC2 dbias"]),
    ("masked optimizer output", &["masked params", "masked m", "masked v"]),
];

/// The comparisons of one part of a banded layer.
#[derive(Debug, Clone)]
pub struct Summary<'a> {
    /// The part: "FC1 forward", "masked optimizer output".
    pub name: &'static str,
    /// How many comparisons there were.
    pub rows: usize,
    /// The one that came nearest to, or went furthest beyond, its tolerance.
    pub worst: &'a Row,
}

/// The banded layers' forward and backward pass and the masked optimizer's output, each by name.
pub fn summaries(rows: &[Row]) -> Vec<Summary<'_>> {
    let summary = |&(name, outputs): &(&'static str, &[&str])| {
        let of: Vec<&Row> = rows.iter().filter(|row| outputs.contains(&row.output)).collect();
        let badness = |row: &Row| if row.not_zero.is_some() { f64::INFINITY } else { row.worst.ratio() };
        let worst = of.iter().copied().max_by(|a, b| badness(a).total_cmp(&badness(b)))?;
        Some(Summary { name, rows: of.len(), worst })
    };
    QUESTIONS.iter().filter_map(summary).collect()
}

impl std::fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Summary { name, rows, worst: row } = self;
        let verdict = if row.passes() { "ok" } else { "FAILED" };
        let (ratio, shape) = (row.worst.ratio(), &row.shape);
        write!(
            f,
            "{verdict:6} {name}: {rows} comparisons, at worst {ratio:.2} of the tolerance ({shape}, {})",
            row.output
        )
    }
}

/// Runs every case on both backends; with words in `only`, the cases that have one of them in their operation or shape.
///
/// # Errors
/// A device failed; a disagreement is no error but a row that does not pass.
pub fn run<A: Backend, R: Backend, S: AsRef<str>>(device: &mut A, reference: &mut R, only: &[S]) -> Result<Vec<Row>> {
    let both = [device.arithmetic(), reference.arithmetic()];
    let arithmetic = if both[0].operand_unit() >= both[1].operand_unit() { both[0] } else { both[1] };
    let only = only.iter().map(AsRef::as_ref).collect();
    let mut suite = Suite { device, reference, arithmetic, only, rows: Vec::new() };
    dense::cases(&mut suite)?;
    attention::cases(&mut suite)?;
    head::cases(&mut suite)?;
    band::cases(&mut suite)?;
    Ok(suite.rows)
}

/// Two backends and what their comparison has shown so far.
struct Suite<'a, A, R> {
    device: &'a mut A,
    reference: &'a mut R,
    arithmetic: Arithmetic,
    only: Vec<&'a str>,
    rows: Vec<Row>,
}

impl<A: Backend, R: Backend> Suite<'_, A, R> {
    fn check(&mut self, case: &impl Case) -> Result<()> {
        let name = format!("{} {}", case.op(), case.shape());
        if !self.only.is_empty() && !self.only.iter().any(|word| name.contains(word)) {
            return Ok(());
        }
        let arithmetic = self.arithmetic;
        let (actual, expected) = (case.run(self.device, arithmetic)?, case.run(self.reference, arithmetic)?);
        for (actual, expected) in actual.iter().zip(&expected) {
            self.rows.push(compare(case, actual, expected));
        }
        Ok(())
    }
}

fn compare(case: &impl Case, actual: &Output, expected: &Output) -> Row {
    let worst = match &expected.allowed {
        Allowed::Relative(tolerance) => tolerance::compare(&actual.values, &expected.values, *tolerance),
        Allowed::Cancelled(tolerance, terms) => {
            tolerance::compare_cancelled(&actual.values, &expected.values, *tolerance, *terms)
        }
        Allowed::Each(bounds) => tolerance::worst(&actual.values, &expected.values, |index| bounds[index]),
    };
    let wrong = |&(index, &zero): &(usize, &bool)| zero && actual.values[index] != 0.0;
    let not_zero = expected.zero.iter().enumerate().find(wrong).map(|(index, _)| (index, actual.values[index]));
    Row { op: case.op(), shape: case.shape(), output: expected.name, worst, not_zero }
}

/// Reproducible inputs: normal values that are exact in an arithmetic, a stream of their own for each call.
struct Inputs {
    rng: ChaCha8Rng,
    arithmetic: Arithmetic,
}

impl Inputs {
    fn new(seed: u64, arithmetic: Arithmetic) -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(seed), arithmetic }
    }

    /// `len` values with this standard deviation.
    fn normal(&mut self, len: usize, deviation: f32) -> Vec<f32> {
        let mut draw = || deviation * <StandardNormal as Distribution<f32>>::sample(&StandardNormal, &mut self.rng);
        (0..len).map(|_| self.arithmetic.operand(draw())).collect()
    }

    /// `len` tokens below `vocab`, some of them often.
    fn tokens(&mut self, len: usize, vocab: usize) -> Vec<u32> {
        let draw = |x: f32| ((x.abs() / 3.0 * vocab as f32) as usize).min(vocab - 1) as u32;
        self.normal(len, 1.0).into_iter().map(draw).collect()
    }
}

/// A buffer of the role that holds `values`.
fn upload<D: Device>(device: &mut D, role: Role, values: &[f32]) -> Result<D::Buffer> {
    let mut buffer = device.alloc(role, "parity input", values.len())?;
    device.upload(&mut buffer, 0, values)?;
    Ok(buffer)
}

/// An activation buffer full of a value that no result is, so that what an operation does not write shows.
fn unwritten<D: Device>(device: &mut D, len: usize) -> Result<D::Buffer> {
    upload(device, Role::Activations, &vec![UNWRITTEN; len])
}

/// The same for means, log-sum-exps, losses and the like.
fn unwritten_statistics<D: Device>(device: &mut D, len: usize) -> Result<D::Buffer> {
    upload(device, Role::Statistics, &vec![UNWRITTEN; len])
}

/// See [`unwritten`].
const UNWRITTEN: f32 = 77.0;

/// A buffer's first `len` elements.
fn fetch<D: Device>(device: &mut D, buffer: &D::Buffer, len: usize) -> Result<Vec<f32>> {
    device.download(buffer, Span { offset: 0, len })
}

/// Places of tensors of these lengths in a flat buffer, aligned as a model's are; and the buffer's length.
fn layout<const N: usize>(lens: [usize; N]) -> ([Span; N], usize) {
    let mut end = 0;
    let spans = lens.map(|len| {
        let span = Span { offset: end, len };
        end = (end + len).next_multiple_of(TENSOR_ALIGN);
        span
    });
    (spans, end)
}
