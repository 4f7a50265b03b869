//! The products of an MLP, dense and in bands.

use super::turns::{Needed, Rotation, in_turns, rotation};
use super::work::{Matrix, Stored, Work};
use super::{filled, median};
use crate::backend::{Affine, Backend, BiasGrad, Expansion, LinearDims, Role, Write};
use crate::band::Band;
use crate::bandwidths::Connections;
use crate::error::Result;
use crate::shapes::{Span, TENSOR_ALIGN};

/// The products of FC1 and FC2 in the order they are measured.
pub(super) const PRODUCTS: [&str; 6] = [
    "FC1 forward + GELU",
    "FC1 input gradient",
    "FC1 weight gradient",
    "FC2 forward",
    "FC2 input gradient x GELU'",
    "FC2 weight gradient",
];

/// M rows of N narrow and W wide elements.
#[derive(Clone, Copy)]
pub(super) struct Axes {
    pub rows: usize,
    pub narrow: usize,
    pub wide: usize,
}

impl Axes {
    /// What product `index` of [`PRODUCTS`] has to do, with so many weights that exist and that are stored.
    pub fn work(self, stored: Stored, index: usize, kept: usize, stored_weights: usize) -> Work {
        let Self { rows, narrow, wide } = self;
        let fc1 = Matrix { inputs: narrow, outputs: wide, kept, stored: stored_weights };
        let fc2 = Matrix { inputs: wide, outputs: narrow, ..fc1 };
        match index {
            0 => stored.forward(rows, fc1, true),
            1 => stored.input_gradient(rows, fc1, false),
            2 => stored.weight_gradient(rows, fc1),
            3 => stored.forward(rows, fc2, false),
            4 => stored.input_gradient(rows, fc2, true),
            _ => stored.weight_gradient(rows, fc2),
        }
    }

    /// Elements of one set: two narrow and three wide activations; and for each density weights and gradients of both.
    pub fn set_elements(self, densities: usize) -> f64 {
        let [rows, n, w] = [self.rows, self.narrow, self.wide].map(|size| size as f64);
        rows * (2.0 * n + 3.0 * w) + 2.0 * densities as f64 * (n * w + n + w)
    }
}

/// The activations of one set.
struct Streams<B: Backend> {
    narrow: B::Buffer,
    narrow_out: B::Buffer,
    wide: B::Buffer,
    wide_out: B::Buffer,
    pre: B::Buffer,
}

impl<B: Backend> Streams<B> {
    fn new(backend: &mut B, axes: Axes) -> Result<Self> {
        let (narrow, wide) = (axes.rows * axes.narrow, axes.rows * axes.wide);
        let mut activations = |len| filled(backend, Role::Activations, "activations", len);
        Ok(Self {
            narrow: activations(narrow)?,
            narrow_out: activations(narrow)?,
            wide: activations(wide)?,
            wide_out: activations(wide)?,
            pre: activations(wide)?,
        })
    }
}

/// A layer's place in a flat buffer.
#[derive(Clone, Copy)]
struct Place {
    weight: Span,
    wide_bias: Span,
    narrow_bias: Span,
}

/// The weights of one density, once for each set, with their gradients.
pub(super) struct Weights<B: Backend> {
    params: B::Buffer,
    grads: B::Buffer,
    places: Vec<Place>,
    keeps: Connections,
    /// `None` for the dense layer.
    band: Option<(Band, B::Table)>,
}

impl<B: Backend> Weights<B> {
    fn new(backend: &mut B, axes: Axes, sets: usize, keeps: Connections) -> Result<Self> {
        let band = match keeps {
            Connections::DENSE => None,
            keeps => Some(Band::of(keeps, axes.narrow, axes.wide, 0)?),
        };
        let len = band.as_ref().map_or(axes.narrow * axes.wide, Band::packed_len);
        let mut end = 0;
        let mut span = |len: usize| {
            let offset = end;
            end = (offset + len).next_multiple_of(TENSOR_ALIGN);
            Span { offset, len }
        };
        let mut place = || Place { weight: span(len), wide_bias: span(axes.wide), narrow_bias: span(axes.narrow) };
        let places = (0..sets).map(|_| place()).collect();
        Ok(Self {
            params: filled(backend, Role::Parameters, "parameters", end)?,
            grads: filled(backend, Role::Gradients, "gradients", end)?,
            places,
            keeps,
            band: match band {
                None => None,
                Some(band) => {
                    let table = backend.band_table(&band)?;
                    Some((band, table))
                }
            },
        })
    }

    /// Weights that exist, and that are stored.
    fn counts(&self, axes: Axes) -> (usize, usize) {
        let all = axes.narrow * axes.wide;
        self.band.as_ref().map_or((all, all), |(band, _)| (band.count(), band.packed_len()))
    }

    /// Records product `index` of [`PRODUCTS`] of one set.
    fn record(
        &mut self,
        backend: &mut B,
        index: usize,
        set: usize,
        streams: &mut Streams<B>,
        axes: Axes,
    ) -> Result<()> {
        let place = self.places[set];
        match self.band.as_ref() {
            None => dense(backend, index, &self.params, &mut self.grads, place, streams, axes),
            Some((_, table)) => banded(backend, index, &self.params, &mut self.grads, place, table, streams, axes.rows),
        }
    }
}

fn dense<B: Backend>(
    backend: &mut B,
    index: usize,
    params: &B::Buffer,
    grads: &mut B::Buffer,
    place: Place,
    streams: &mut Streams<B>,
    axes: Axes,
) -> Result<()> {
    let Axes { rows, narrow: n, wide: w } = axes;
    let (fc1, fc2) = (LinearDims { rows, inputs: n, outputs: w }, LinearDims { rows, inputs: w, outputs: n });
    let Place { weight, wide_bias, narrow_bias } = place;
    let (affine1, affine2) = (Affine { weight, bias: wide_bias }, Affine { weight, bias: narrow_bias });
    let Streams { narrow, narrow_out, wide, wide_out, pre } = streams;
    match index {
        0 => backend.linear_forward(wide_out, Some(pre), narrow, params, affine1, fc1),
        1 => backend.linear_backward_input(narrow_out, wide, params, weight, None, fc1),
        2 => backend.linear_backward_weight(grads, affine1, wide, narrow, fc1, Write::Set),
        3 => backend.linear_forward(narrow_out, None, wide, params, affine2, fc2),
        4 => backend.linear_backward_input(wide_out, narrow, params, weight, Some(pre), fc2),
        _ => backend.linear_backward_weight(grads, affine2, narrow, wide, fc2, Write::Set),
    }
}

#[allow(clippy::too_many_arguments)]
fn banded<B: Backend>(
    backend: &mut B,
    index: usize,
    params: &B::Buffer,
    grads: &mut B::Buffer,
    place: Place,
    table: &B::Table,
    streams: &mut Streams<B>,
    rows: usize,
) -> Result<()> {
    let Place { weight: panels, wide_bias, narrow_bias } = place;
    let Streams { narrow, narrow_out, wide, wide_out, pre } = streams;
    match index {
        0 => {
            let expansion = Expansion::BiasGelu { bias: wide_bias, pre };
            backend.band_expand(wide_out, narrow, params, panels, table, rows, expansion)
        }
        1 => backend.band_contract(narrow_out, wide, params, panels, table, rows, None),
        2 => backend.band_outer(grads, panels, BiasGrad::Wide(wide_bias), wide, narrow, table, rows, Write::Set),
        3 => backend.band_contract(narrow_out, wide, params, panels, table, rows, Some(narrow_bias)),
        4 => {
            let expansion = Expansion::GeluBackward { pre };
            backend.band_expand(wide_out, narrow, params, panels, table, rows, expansion)
        }
        _ => backend.band_outer(grads, panels, BiasGrad::Narrow(narrow_bias), wide, narrow, table, rows, Write::Set),
    }
}

/// One product in one density.
pub(super) struct Measured {
    pub index: usize,
    pub keeps: Connections,
    pub density: f64,
    /// Share of the dense layer's weights that are stored and multiplied.
    pub stored: f64,
    pub seconds: f64,
    pub work: Work,
}

/// Times every product, dense and with each of `kept`, and says over how many sets of buffers. `progress` is told how many of
/// [`PRODUCTS`] are done.
///
/// # Errors
/// The device has not enough memory or fails.
pub(super) fn time<B: Backend>(
    backend: &mut B,
    axes: Axes,
    kept: &[Connections],
    repeats: usize,
    mut progress: impl FnMut(usize),
) -> Result<(Rotation, Vec<Measured>)> {
    let stored = Stored::of(backend);
    let densities = 1 + kept.len();
    let all = axes.narrow * axes.wide;
    let least = (0..PRODUCTS.len()).map(|index| axes.work(stored, index, all, all).bytes).fold(f64::INFINITY, f64::min);
    let set_bytes = axes.set_elements(densities) * stored.activation.max(4) as f64;
    let weights = (4 * (all + axes.narrow + axes.wide)) as f64;
    let [sets, largest] = [set_bytes, weights].map(|set| Needed { set, once: 0.0 });
    let rotation = rotation(backend, least, sets, largest)?;
    let sets = rotation.sets;
    let mut streams = (0..sets).map(|_| Streams::new(backend, axes)).collect::<Result<Vec<_>>>()?;
    let mut weights = Vec::with_capacity(densities);
    for keeps in std::iter::once(Connections::DENSE).chain(kept.iter().copied()) {
        weights.push(Weights::new(backend, axes, sets, keeps)?);
    }
    let mut measured = Vec::with_capacity(PRODUCTS.len() * densities);
    for index in 0..PRODUCTS.len() {
        let samples = in_turns(backend, repeats, densities, sets, |backend, piece, set| {
            weights[piece].record(backend, index, set, &mut streams[set], axes)
        })?;
        for (weights, samples) in weights.iter().zip(samples) {
            let (kept, stored_weights) = weights.counts(axes);
            let work = axes.work(stored, index, kept, stored_weights);
            let [density, stored] = [kept, stored_weights].map(|count| count as f64 / all as f64);
            measured.push(Measured { index, keeps: weights.keeps, density, stored, seconds: median(samples), work });
        }
        progress(index + 1);
    }
    Ok((rotation, measured))
}
