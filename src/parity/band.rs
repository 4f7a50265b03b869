//! Cases of the band: its three products as FC1 and as FC2, and masked training for several steps.

use super::{
    Allowed, Case, Inputs, Output, Suite, UNWRITTEN, after_gelu, fetch, layout, unwritten, unwritten_statistics, upload,
};
use crate::backend::{AdamWStep, Arithmetic, Backend, BiasGrad, Expansion, OptimizerState, Role, Write};
use crate::band::{Band, Panel};
use crate::blocks::Blocks;
use crate::error::{Error, Result};
use crate::tolerance::{self, Tolerance, UNIT_F32};

/// (rows, N, W): of one panel and of many, fitting tiles and not, W other than 4N.
const SHAPES: [(usize, usize, usize); 6] =
    [(5, 7, 28), (64, 64, 256), (70, 40, 160), (130, 96, 384), (33, 50, 131), (70, 272, 1088)];

pub(super) fn cases<A: Backend, R: Backend>(suite: &mut Suite<'_, A, R>) -> Result<()> {
    for (rows, narrow, wide) in SHAPES {
        // One connection each, an odd width, 23.5 %, 43.8 % and all of the connections.
        for bandwidth in [1, (wide / 5) | 1, wide / 4, wide / 2, 2 * wide] {
            let band = Band::new(narrow, wide, bandwidth)?;
            suite.check(&ProductsCase { rows, band: &band })?;
            suite.check(&TrainingCase { rows, band: &band })?;
        }
    }
    // Many rows; whole tiles alone, deeper than what is on its way at a time.
    for (rows, narrow, bandwidth) in [(1100, 16, 32), (256, 320, 960)] {
        let band = Band::new(narrow, 4 * narrow, bandwidth)?;
        suite.check(&ProductsCase { rows, band: &band })?;
    }
    block_cases(suite)
}

/// (rows, N, W, pattern): one block and many, whole ones and parts, half of one at the end, more across than down.
const PATTERNS: [(usize, usize, usize, &str); 9] = [
    (5, 7, 28, "random:0.5"),
    (256, 128, 512, "random:0.6:5"),
    (70, 128, 512, "strided:0.5"),
    (70, 200, 800, "random:0.438:6"),
    (130, 192, 448, "random:0.9:7"),
    (33, 131, 517, "random:0.5:8"),
    (20, 260, 264, "strided:0.6"),
    (36, 272, 1088, "random:0.1:9"),
    (68, 272, 1088, "strided:0.3"),
];

fn block_cases<A: Backend, R: Backend>(suite: &mut Suite<'_, A, R>) -> Result<()> {
    for (rows, narrow, wide, pattern) in PATTERNS {
        let connections = pattern.parse().map_err(Error::Internal)?;
        let band = Band::of(connections, narrow, wide, 3)?;
        suite.check(&ProductsCase { rows, band: &band })?;
        suite.check(&TrainingCase { rows, band: &band })?;
    }
    // Rows and columns without any block, of which only the biases remain.
    let mut blocks = Blocks::none(256, 1024);
    [(1, 3), (5, 0), (5, 3)].into_iter().for_each(|(row, col)| blocks.keep(row, col));
    let band = Band::of_blocks(256, 1024, blocks)?;
    suite.check(&ProductsCase { rows: 300, band: &band })
}

fn shape(rows: usize, band: &Band) -> String {
    let title = if band.blocks().is_some() { band.title() } else { format!("w={}", band.bandwidth()) };
    format!("M={rows} N={} W={} {title} ({:.1} %)", band.narrow(), band.wide(), 100.0 * band.density())
}

/// Which packed slots lie outside the exact band.
fn outside(band: &Band) -> Vec<bool> {
    let slots = |panel: &Panel| (0..panel.len()).map(|slot| band.slot(panel, slot).is_none()).collect::<Vec<_>>();
    band.panels().iter().flat_map(slots).collect()
}

/// Packed values, zero outside the band.
fn packed(random: &mut Inputs, band: &Band, deviation: f32) -> Vec<f32> {
    let mut values = random.normal(band.packed_len(), deviation);
    for (value, outside) in values.iter_mut().zip(outside(band)) {
        if outside {
            *value = 0.0;
        }
    }
    values
}

/// Expand, contract and outer, with everything that may follow them.
struct ProductsCase<'a> {
    rows: usize,
    band: &'a Band,
}

impl Case for ProductsCase<'_> {
    fn op(&self) -> &'static str {
        "band"
    }

    fn shape(&self) -> String {
        shape(self.rows, self.band)
    }

    fn run<B: Backend>(&self, backend: &mut B, arithmetic: Arithmetic) -> Result<Vec<Output>> {
        let (rows, band) = (self.rows, self.band);
        let (n, w) = (band.narrow(), band.wide());
        let mut random = Inputs::new(8, arithmetic);
        let ([panels, wide_bias, narrow_bias], len) = layout([band.packed_len(), w, n]);
        let mut weights = random.normal(len, 0.5);
        weights[panels.range()].copy_from_slice(&packed(&mut random, band, 0.5));
        let mut gradient = random.normal(len, 1.0);
        gradient[panels.range()].copy_from_slice(&packed(&mut random, band, 1.0));
        let params = upload(backend, Role::Parameters, &weights)?;
        let mut grads = upload(backend, Role::Gradients, &gradient)?;
        let narrow = upload(backend, Role::Activations, &random.normal(rows * n, 1.0))?;
        let wide = upload(backend, Role::Activations, &random.normal(rows * w, 1.0))?;
        let table = backend.band_table(band)?;

        let (mut pre, mut gelu_out, mut dpre) =
            (unwritten(backend, rows * w)?, unwritten(backend, rows * w)?, unwritten(backend, rows * w)?);
        let (mut out, mut dinp) = (unwritten(backend, rows * n)?, unwritten(backend, rows * n)?);
        let fc1 = Expansion::BiasGelu { bias: wide_bias, pre: &mut pre };
        backend.band_expand(&mut gelu_out, &narrow, &params, panels, &table, rows, fc1)?;
        let fc2 = Expansion::GeluBackward { pre: &wide };
        backend.band_expand(&mut dpre, &narrow, &params, panels, &table, rows, fc2)?;
        backend.band_contract(&mut out, &wide, &params, panels, &table, rows, Some(narrow_bias))?;
        backend.band_contract(&mut dinp, &wide, &params, panels, &table, rows, None)?;
        let (fc1, fc2) = (BiasGrad::Wide(wide_bias), BiasGrad::Narrow(narrow_bias));
        backend.band_outer(&mut grads, panels, fc1, &wide, &narrow, &table, rows, Write::Add)?;
        let added = fetch(backend, &grads, len)?;
        // What stands in the gradients before they are set must not matter, outside the band neither.
        backend.upload(&mut grads, 0, &vec![UNWRITTEN; len])?;
        backend.band_outer(&mut grads, panels, fc2, &wide, &narrow, &table, rows, Write::Set)?;
        let set = fetch(backend, &grads, len)?;

        let widest = (0..w).map(|j| band.row_slots(j)).max().unwrap_or(1);
        let longest = (0..n).map(|i| band.column_len(i)).max().unwrap_or(1);
        let sums = |n: usize| Tolerance::of_sums(arithmetic.sum_unit(), [n, 2]);
        let stored = |tolerance: Tolerance| tolerance.with_stored(arithmetic);
        // A GELU may be no more exact than what is stored.
        let gelu = |n: usize| stored(sums(n).with_gelu().with_roundings(arithmetic.stored_unit(), 1));
        let masked = |name, values| Output { zero: outside(band), ..Output::new(name, values, sums(rows)) };
        let pre = fetch(backend, &pre, rows * w)?;
        Ok(vec![
            after_gelu("FC1 gelu", fetch(backend, &gelu_out, rows * w)?, gelu(widest), &pre),
            Output::new("FC1 pre", pre, stored(sums(widest))),
            Output::new("FC1 dinput", fetch(backend, &dinp, rows * n)?, stored(sums(longest))),
            masked("FC1 dweight", added[panels.range()].to_vec()),
            Output::new("FC1 dbias", added[wide_bias.range()].to_vec(), sums(rows)),
            Output::new("FC2 out", fetch(backend, &out, rows * n)?, stored(sums(longest))),
            Output::new("FC2 dinput", fetch(backend, &dpre, rows * w)?, gelu(widest)),
            masked("FC2 dweight", set[panels.range()].to_vec()),
            Output::new("FC2 dbias", set[narrow_bias.range()].to_vec(), sums(rows)),
        ])
    }
}

/// Masked weights after several steps of gradient and AdamW: close in the band, exactly zero outside.
struct TrainingCase<'a> {
    rows: usize,
    band: &'a Band,
}

const STEPS: usize = 4;
const LEARNING_RATE: f64 = 1e-2;

impl Case for TrainingCase<'_> {
    fn op(&self) -> &'static str {
        "band_outer, adamw"
    }

    fn shape(&self) -> String {
        shape(self.rows, self.band)
    }

    fn run<B: Backend>(&self, backend: &mut B, arithmetic: Arithmetic) -> Result<Vec<Output>> {
        let (rows, band) = (self.rows, self.band);
        let mut random = Inputs::new(9, arithmetic);
        let ([panels, bias], len) = layout([band.packed_len(), band.wide()]);
        let mut weights = vec![0.0; len];
        weights[panels.range()].copy_from_slice(&packed(&mut random, band, 1.0));
        let mut params = upload(backend, Role::Parameters, &weights)?;
        let mut m = upload(backend, Role::Moments, &vec![0.0; len])?;
        let mut v = upload(backend, Role::Moments, &vec![0.0; len])?;
        let mut grads = upload(backend, Role::Gradients, &vec![0.0; len])?;
        let mut norm = unwritten_statistics(backend, 1)?;
        let table = backend.band_table(band)?;
        let plan = backend.adamw_plan(&[panels], len)?;
        let mut first = Vec::new();
        for step in 1..=STEPS {
            let wide = upload(backend, Role::Activations, &random.normal(rows * band.wide(), 1.0))?;
            let narrow = upload(backend, Role::Activations, &random.normal(rows * band.narrow(), 1.0))?;
            let bias = BiasGrad::Wide(bias);
            backend.band_outer(&mut grads, panels, bias, &wide, &narrow, &table, rows, Write::Set)?;
            backend.grad_norm(&mut norm, &grads)?;
            if step == 1 {
                first = fetch(backend, &grads, len)?[panels.range()].to_vec();
            }
            let step = AdamWStep {
                step: step as u64,
                learning_rate: LEARNING_RATE,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                grad_clip: 1.0,
            };
            let state = OptimizerState { params: &mut params, m: &mut m, v: &mut v };
            backend.adamw_step(state, &grads, &norm, &plan, &step)?;
        }
        let fetched = [&params, &m, &v].map(|buffer| fetch(backend, buffer, len));
        let [params, m, v] = fetched;
        let masked = |name, values: Result<Vec<f32>>, allowed| {
            Ok(Output { name, values: values?[panels.range()].to_vec(), allowed, zero: outside(band) })
        };
        let relative = || Allowed::Relative(Tolerance::of_sums(arithmetic.sum_unit(), [rows, STEPS * 64]));
        Ok(vec![
            masked("masked params", params, Allowed::Each(carried(&first, rows, arithmetic)))?,
            masked("masked m", m, relative())?,
            masked("masked v", v, relative())?,
        ])
    }
}

/// How far each parameter may be carried by errors of gradients of which `first` were the first.
fn carried(first: &[f32], rows: usize, arithmetic: Arithmetic) -> Vec<f64> {
    let tolerance = Tolerance::of_sums(arithmetic.sum_unit(), [rows, 64]).0;
    let rms = tolerance::root_mean_square(first);
    let bound = |&g: &f32| {
        let g = f64::from(g);
        let error = tolerance * (g.abs() + rms);
        Tolerance::of_adamw(LEARNING_RATE, STEPS, g, error) + 4.0 * UNIT_F32 * STEPS as f64 * 4.0
    };
    first.iter().map(bound).collect()
}
