//! Every operation of a training step at one size, beside its floor, and each band product beside the dense one.

use super::Ceilings;
use super::operations::{self, OPERATIONS, Shape};
use super::products::{self, Axes, PRODUCTS};
use super::turns::Rotation;
use super::work::Work;
use crate::backend::{Backend, HeadDims, SequenceDims};
use crate::bandwidths::{Bandwidths, Connections};
use crate::config::padded_vocab;
use crate::error::{Error, Result};
use crate::output;
use crate::shapes::ParamTable;
use serde::Serialize;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// C; the MLP is 4C wide.
    pub channels: usize,
    /// B, sequences.
    pub sequences: usize,
    /// T, tokens of each.
    pub tokens_per_sequence: usize,
    /// NH.
    pub heads: usize,
    /// V.
    pub vocab_size: usize,
}

impl Sizes {
    /// M = `rows` tokens, in sequences of T (by default the most that divide M, up to 512), and as few heads of at most 64
    /// channels as share C equally.
    ///
    /// # Errors
    /// [`Error::Usage`] when T does not divide M.
    pub fn new(channels: usize, rows: usize, tokens: Option<usize>, vocab_size: usize) -> Result<Self> {
        let largest_divisor = |of: usize, most: usize| (1..=most.min(of)).rev().find(|&size| of.is_multiple_of(size));
        let tokens = tokens.or(largest_divisor(rows, 512)).unwrap_or(1);
        if !rows.is_multiple_of(tokens) {
            return Err(Error::usage(format!(
                "{rows} rows are no whole number of sequences of {tokens} tokens; choose --rows as a multiple of -t"
            )));
        }
        let head_size = largest_divisor(channels, 64).unwrap_or(1);
        let (sequences, heads) = (rows / tokens, channels / head_size);
        Ok(Self { channels, sequences, tokens_per_sequence: tokens, heads, vocab_size })
    }

    /// M = B * T.
    pub fn rows(self) -> usize {
        self.sequences * self.tokens_per_sequence
    }

    fn axes(self) -> Axes {
        Axes { rows: self.rows(), narrow: self.channels, wide: 4 * self.channels }
    }

    fn shape(self) -> Shape {
        let Self { channels, sequences: batch, tokens_per_sequence: tokens, heads, vocab_size: vocab } = self;
        Shape {
            sequence: SequenceDims { batch, tokens, channels, heads },
            head: HeadDims { rows: self.rows(), channels, vocab, padded_vocab: padded_vocab(vocab) },
        }
    }

    /// Refuses sizes that the device's free memory cannot hold.
    fn check<B: Backend>(self, backend: &B, densities: usize) -> Result<()> {
        // In f64, which no size on a command line overflows. The host keeps a copy of a buffer while it is filled.
        let (shape, products) = (self.shape(), self.axes().set_elements(densities));
        let operations = shape.stream_elements() + shape.block_elements() + shape.embedding_elements();
        let needed = 4.0 * products.max(operations);
        match backend.free_bytes() {
            Some(free) if needed > free as f64 => Err(Error::Device(format!(
                "timing {} rows of {} channels takes {} of memory, but {} are free on {}; choose a smaller \
                 --rows or --channels",
                self.rows(),
                self.channels,
                // A size beyond 64 bits is shown as the largest.
                output::bytes(needed as usize),
                output::bytes(free),
                backend.description()
            ))),
            _ => Ok(()),
        }
    }
}

/// How long something takes, and how that compares with what the device can do.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Timing {
    /// Median time of one run.
    pub milliseconds: f64,
    /// Arithmetic of products, [`Work::flops`], per time; 0 for what has none.
    pub gflop_per_s: f64,
    /// Memory read and written, [`Work::bytes`], per time.
    pub gb_per_s: f64,
    /// The time below which no implementation gets: [`Ceilings::floor_seconds`].
    pub floor_milliseconds: f64,
    /// The floor's share of the time.
    pub fraction_of_floor: f64,
}

impl Timing {
    fn new(seconds: f64, work: Work, floor: f64) -> Self {
        Self {
            milliseconds: 1e3 * seconds,
            gflop_per_s: work.flops / seconds / 1e9,
            gb_per_s: work.bytes / seconds / 1e9,
            floor_milliseconds: 1e3 * floor,
            fraction_of_floor: floor / seconds,
        }
    }
}

/// One of the MLP's products, dense or banded.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KernelTime {
    /// FC1 or FC2, and which of its products.
    pub product: &'static str,
    /// The band's bandwidth, 0 for dense, or the pattern in its place.
    pub bandwidth: Bandwidths,
    /// Share of the dense layer's connections.
    pub density: f64,
    /// Share of the dense layer's weights that are stored and multiplied: the panels or blocks that the connections lie in.
    pub stored: f64,
    /// Its time.
    #[serde(flatten)]
    pub timing: Timing,
    /// Time over the dense product's time.
    pub of_dense: f64,
    /// The dense product's time over this one's.
    pub speed_up: f64,
    /// The dense product's floor over this one's: the speed-up if both were as good as this device allows.
    pub ideal_speed_up: f64,
}

/// An operation that a band does not change.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OperationTime {
    /// Which.
    pub operation: &'static str,
    /// Its time.
    #[serde(flatten)]
    pub timing: Timing,
}

/// The density below which a banded product is faster than the dense one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "break_even", rename_all = "snake_case")]
pub enum BreakEven {
    /// Between two measured densities, where a straight line between their times meets the dense time.
    Between {
        /// That density.
        density: f64,
    },
    /// Even the densest band that was measured is faster.
    Above {
        /// Its density.
        density: f64,
    },
    /// Even the sparsest is not faster.
    Below {
        /// Its density.
        density: f64,
    },
}

impl BreakEven {
    /// From (density, time over the dense time) of each band; `None` without any.
    fn of(mut bands: Vec<(f64, f64)>) -> Option<Self> {
        bands.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let slower = bands.iter().position(|&(_, of_dense)| of_dense >= 1.0);
        Some(match slower {
            None => BreakEven::Above { density: bands.last()?.0 },
            Some(0) => BreakEven::Below { density: bands[0].0 },
            Some(index) => {
                let ((d0, t0), (d1, t1)) = (bands[index - 1], bands[index]);
                BreakEven::Between { density: d0 + (d1 - d0) * (1.0 - t0) / (t1 - t0) }
            }
        })
    }
}

/// Where the band begins to pay in one product.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct BreakEvenOf {
    /// Which, or "all six".
    pub product: &'static str,
    /// Where.
    #[serde(flatten)]
    pub at: BreakEven,
}

/// Everything that was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Kernels {
    /// What floors refer to.
    pub ceilings: Ceilings,
    /// The buffers that the products took turns on.
    pub product_buffers: Rotation,
    /// The buffers that the other operations took turns on.
    pub operation_buffers: Rotation,
    /// Every product of the MLP in every density.
    pub kernels: Vec<KernelTime>,
    /// The six products together in every density, times and floors added up.
    pub sums: Vec<KernelTime>,
    /// Where the band begins to pay: for each product, and for all six together.
    pub break_even: Vec<BreakEvenOf>,
    /// The other operations.
    pub operations: Vec<OperationTime>,
    /// Weights that the gradient norm and AdamW ran over: those of a model with a block for each set of buffers.
    pub optimizer_parameters: usize,
}

const ALL_SIX: &str = "all six";

/// Times each product of an MLP, dense and with each of `kept` in turns so that all see the same state of the machine, then the
/// other operations of a step. `progress` is told the share done.
///
/// # Errors
/// Sizes that are no band or no model, or that the device's memory cannot hold; the device fails.
pub fn kernels<B: Backend>(
    backend: &mut B,
    sizes: Sizes,
    kept: &[Connections],
    repeats: usize,
    progress: impl Fn(f64),
) -> Result<Kernels> {
    sizes.check(backend, 1 + kept.len())?;
    time_all(backend, sizes, kept, repeats, progress)
        .map_err(|error| error.with_memory_advice("choose a smaller --rows or --channels"))
}

fn time_all<B: Backend>(
    backend: &mut B,
    sizes: Sizes,
    kept: &[Connections],
    repeats: usize,
    progress: impl Fn(f64),
) -> Result<Kernels> {
    let axes = sizes.axes();
    ParamTable::new(&sizes.shape().config(1))?;
    let ceilings = Ceilings::measure(backend)?;
    let parts = (PRODUCTS.len() + OPERATIONS.len()) as f64;
    let done = |count: usize| progress(count as f64 / parts);
    let (product_buffers, products) = products::time(backend, axes, kept, repeats, done)?;
    let after_products = |count| done(PRODUCTS.len() + count);
    let (operation_buffers, optimizer_parameters, others) =
        operations::time(backend, sizes.shape(), repeats, after_products)?;
    let operation = |other: operations::Measured| OperationTime {
        operation: other.operation,
        timing: Timing::new(other.seconds, other.work, ceilings.floor_seconds(other.work)),
    };
    let operations = others.into_iter().map(operation).collect();
    let (kernels, sums) = (product_times(&products, &ceilings), sum_times(&products, &ceilings, 1 + kept.len()));
    Ok(Kernels {
        break_even: break_even(&kernels, &sums),
        ceilings,
        product_buffers,
        operation_buffers,
        kernels,
        sums,
        operations,
        optimizer_parameters,
    })
}

/// Where each product, and their sum, breaks even; nothing where no band was measured. Patterns are no points of that line.
fn break_even(kernels: &[KernelTime], sums: &[KernelTime]) -> Vec<BreakEvenOf> {
    let of = |product| {
        let bands = kernels.iter().chain(sums).filter(|time| time.product == product && is_band(time));
        let at = BreakEven::of(bands.map(|time| (time.density, time.of_dense)).collect())?;
        Some(BreakEvenOf { product, at })
    };
    PRODUCTS.into_iter().chain([ALL_SIX]).filter_map(of).collect()
}

/// Whether it was a band's, and neither a pattern's nor the dense layer's.
fn is_band(time: &KernelTime) -> bool {
    matches!(time.bandwidth, Bandwidths::Same(bandwidth) if bandwidth > 0)
}

/// Each product beside the dense one, which comes first among those of its index.
fn product_times(products: &[products::Measured], ceilings: &Ceilings) -> Vec<KernelTime> {
    let of_index = products.chunk_by(|a, b| a.index == b.index);
    let beside_dense = |same: &[products::Measured]| {
        let floor = |product: &products::Measured| ceilings.floor_seconds(product.work);
        let dense = (same[0].seconds, floor(&same[0]));
        let beside = |product| beside(PRODUCTS[same[0].index], product, floor(product), dense);
        same.iter().map(beside).collect::<Vec<_>>()
    };
    of_index.flat_map(beside_dense).collect()
}

/// All six products together in each of `densities` densities.
fn sum_times(products: &[products::Measured], ceilings: &Ceilings, densities: usize) -> Vec<KernelTime> {
    let sums: Vec<(products::Measured, f64)> = (0..densities)
        .map(|density| {
            let same = || products.iter().skip(density).step_by(densities);
            let first = &products[density];
            let sum = products::Measured {
                index: 0,
                keeps: first.keeps,
                density: first.density,
                stored: first.stored,
                seconds: same().map(|product| product.seconds).sum(),
                work: same().map(|product| product.work).sum(),
            };
            (sum, same().map(|product| ceilings.floor_seconds(product.work)).sum())
        })
        .collect();
    let dense = (sums[0].0.seconds, sums[0].1);
    sums.iter().map(|(sum, floor)| beside(ALL_SIX, sum, *floor, dense)).collect()
}

/// A time beside the dense one's seconds and floor.
fn beside(product: &'static str, measured: &products::Measured, floor: f64, dense: (f64, f64)) -> KernelTime {
    KernelTime {
        product,
        bandwidth: measured.keeps.into(),
        density: measured.density,
        stored: measured.stored,
        timing: Timing::new(measured.seconds, measured.work, floor),
        of_dense: measured.seconds / dense.0,
        speed_up: dense.0 / measured.seconds,
        ideal_speed_up: dense.1 / floor,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_band_breaks_even_where_its_time_meets_the_dense_one() {
        assert_eq!(BreakEven::of(vec![]), None);
        assert_eq!(BreakEven::of(vec![(0.75, 1.5), (0.25, 0.5)]), Some(BreakEven::Between { density: 0.5 }));
        assert_eq!(BreakEven::of(vec![(0.5, 0.9), (0.25, 0.5)]), Some(BreakEven::Above { density: 0.5 }));
        assert_eq!(BreakEven::of(vec![(0.5, 2.0), (0.25, 1.0)]), Some(BreakEven::Below { density: 0.25 }));
        // What is slower at a small density cannot be relied on above it.
        let uneven = vec![(0.1, 0.8), (0.2, 1.2), (0.3, 0.9)];
        assert!(
            matches!(BreakEven::of(uneven), Some(BreakEven::Between { density }) if (density - 0.15).abs() < 1e-12)
        );
    }

    #[test]
    fn products_stand_beside_their_dense_one_and_sums_add_up() {
        let ceilings =
            Ceilings { gflop_per_s: 1.0, gflop_per_s_of: String::new(), gb_per_s: 1.0, gb_per_s_of: String::new() };
        let measured = |index, bandwidth, seconds, flops, bytes| products::Measured {
            index,
            keeps: Connections::Band(bandwidth),
            density: if bandwidth == 0 { 1.0 } else { 0.25 },
            stored: 1.0,
            seconds,
            work: Work { flops, bytes },
        };
        let products = [
            measured(0, 0, 8.0, 4e9, 1e9),
            measured(0, 9, 4.0, 1e9, 2e9),
            measured(1, 0, 2.0, 1e9, 1e9),
            measured(1, 9, 1.0, 0.5e9, 0.5e9),
        ];
        let times = product_times(&products, &ceilings);
        // Of 4e9 FLOPs there remain a quarter, but 2e9 bytes: counting allows a factor of 2.
        assert_eq!((times[1].speed_up, times[1].ideal_speed_up, times[1].of_dense), (2.0, 2.0, 0.5));
        assert_eq!((times[1].timing.fraction_of_floor, times[1].timing.gb_per_s), (0.5, 0.5));
        assert_eq!((times[0].speed_up, times[0].ideal_speed_up, times[2].product), (1.0, 1.0, PRODUCTS[1]));
        let sums = sum_times(&products, &ceilings, 2);
        assert_eq!((sums[0].timing.milliseconds, sums[1].timing.milliseconds), (10e3, 5e3));
        assert_eq!((sums[0].timing.floor_milliseconds, sums[1].timing.floor_milliseconds), (5e3, 2.5e3));
        assert_eq!((sums[1].ideal_speed_up, sums[1].bandwidth, sums[1].product), (2.0, 9.into(), ALL_SIX));
        let pattern = KernelTime { bandwidth: "random:0.25".parse().unwrap(), ..sums[1].clone() };
        assert_eq!((is_band(&sums[0]), is_band(&sums[1]), is_band(&pattern)), (false, true, false));
    }

    #[test]
    fn rows_are_cut_into_sequences_and_channels_into_heads() {
        let sizes = |channels, rows, tokens| {
            Sizes::new(channels, rows, tokens, 100).map(|s| (s.sequences, s.tokens_per_sequence, s.heads))
        };
        assert_eq!(sizes(512, 8192, None).unwrap(), (16, 512, 8));
        assert_eq!(sizes(1600, 8, None).unwrap(), (1, 8, 25));
        assert_eq!(sizes(100, 1000, Some(10)).unwrap(), (100, 10, 2));
        assert_eq!(sizes(67, 521, None).unwrap(), (521, 1, 67));
        assert!(sizes(512, 100, Some(30)).unwrap_err().to_string().contains("choose --rows as a multiple of -t"));
    }
}
