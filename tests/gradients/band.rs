//! Banded layers, as FC1 and as FC2.

use crate::harness::{GELU, Objective, Random, equals, gelu_definition, layout, nan, product, sums, written};
use bandtrain::backend::cpu::{Cpu, gelu::gelu};
use bandtrain::backend::{BandLinear, BiasGrad, Expansion, Write};
use bandtrain::band::{Band, Dense};
use bandtrain::blocks::Blocks;
use bandtrain::shapes::Span;

/// A band, random weights in it, and a bias on either side, with the weights also dense.
struct BandCase {
    name: String,
    band: Band,
    rows: usize,
    panels: Span,
    wide_bias: Span,
    narrow_bias: Span,
    params: Vec<f32>,
    /// [W, N], with zeros outside the band.
    dense: Vec<f32>,
    /// Activations [M, N] and [M, W].
    narrow: Vec<f32>,
    wide: Vec<f32>,
}

impl BandCase {
    fn all() -> Vec<Self> {
        [
            (16, 64, 1, 5),       // the diagonal alone
            (24, 96, 13, 9),      // odd; windows reach beyond N
            (37, 148, 20, 7),     // N no multiple of 16, W none of 64
            (20, 50, 9, 6),       // W is not 4N
            (33, 33, 3, 4),       // W = N
            (3, 300, 1, 3),       // panels without any connection
            (48, 192, 33, 300),   // more rows than one thread takes at once
            (21, 84, 100_000, 5), // all connections
            (64, 256, 256, 65),
        ]
        .map(|(n, w, bandwidth, rows)| Self::new(n, w, bandwidth, rows))
        .into_iter()
        .chain(Self::patterns())
        .collect()
    }

    /// Layers of blocks: one, and some of several whole and cut ones, with a row and a column of blocks that has none.
    fn patterns() -> Vec<Self> {
        type Kept = &'static [(usize, usize)];
        let some: [(usize, usize, usize, Kept); 4] = [
            (20, 30, 260, &[(0, 0)]),
            (70, 140, 3, &[(1, 0)]),
            (130, 140, 2, &[(0, 2), (1, 0)]),
            (64, 130, 2, &[(0, 0)]),
        ];
        some.map(|(n, w, rows, kept)| {
            let mut blocks = Blocks::none(n, w);
            kept.iter().for_each(|&(row, col)| blocks.keep(row, col));
            let connected = |j: usize, i: usize| kept.contains(&(j / 128, i / 64));
            Self::of(Band::of_blocks(n, w, blocks).unwrap(), format!("blocks {kept:?}"), connected, rows)
        })
        .into()
    }

    fn new(n: usize, w: usize, bandwidth: usize, rows: usize) -> Self {
        // The band by its definition, |j - i*W/N| <= bandwidth/2, not by what the crate makes of it.
        let connected = |j: usize, i: usize| 2 * (j * n).abs_diff(i * w) <= bandwidth * n;
        Self::of(Band::new(n, w, bandwidth).unwrap(), format!("band {bandwidth}"), connected, rows)
    }

    fn of(band: Band, title: String, connected: impl Fn(usize, usize) -> bool, rows: usize) -> Self {
        let (n, w) = (band.narrow(), band.wide());
        let mut random = Random::new((n * w + band.count()) as u64);
        let ([wide_bias, panels, narrow_bias], len) = layout([w, band.packed_len(), n]);
        let mut params = random.flat(len, &[(wide_bias, 1.0), (narrow_bias, 1.0)]);
        let mut dense = random.values(w * n, 0.25);
        dense.iter_mut().enumerate().filter(|(k, _)| !connected(k / n, k % n)).for_each(|(_, weight)| *weight = 0.0);
        band.pack(&dense, Dense::WideByNarrow, &mut params[panels.range()]);
        Self {
            name: format!("{title} of {n}x{w}, {rows} rows"),
            rows,
            panels,
            wide_bias,
            narrow_bias,
            params,
            dense,
            narrow: random.values(rows * n, 1.0),
            wide: random.values(rows * w, 2.0),
            band,
        }
    }

    /// N, W.
    fn axes(&self) -> (usize, usize) {
        (self.band.narrow(), self.band.wide())
    }

    /// `y[m, j] = sum over i of x[m, i] * P[j, i]` (+ bias), by definition.
    fn expanded(&self, bias: &[f32]) -> Vec<f64> {
        let (n, w) = self.axes();
        let term = |m: usize, j: usize, i: usize| product(self.narrow[m * n + i], self.dense[j * n + i]);
        let dot = |m: usize, j: usize| (0..n).map(|i| term(m, j, i)).sum::<f64>();
        (0..self.rows * w).map(|k| f64::from(bias[k % w]) + dot(k / w, k % w)).collect()
    }

    /// `y[m, i] = sum over j of x[m, j] * P[j, i]` (+ bias), by definition.
    fn contracted(&self, bias: &[f32]) -> Vec<f64> {
        let (n, w) = self.axes();
        let term = |m: usize, i: usize, j: usize| product(self.wide[m * w + j], self.dense[j * n + i]);
        let dot = |m: usize, i: usize| (0..w).map(|j| term(m, i, j)).sum::<f64>();
        (0..self.rows * n).map(|k| f64::from(bias[k % n]) + dot(k / n, k % n)).collect()
    }

    fn expand(&self, x: &[f32], params: &[f32], expansion: Expansion<'_, Vec<f32>>) -> Vec<f32> {
        let mut y = nan(self.rows * self.band.wide());
        let table = Cpu.band_table(&self.band).unwrap();
        Cpu.band_expand(&mut y, &x.to_vec(), &params.to_vec(), self.panels, &table, self.rows, expansion).unwrap();
        y
    }

    fn contract(&self, x: &[f32], params: &[f32], bias: Option<Span>) -> Vec<f32> {
        let mut y = nan(self.rows * self.band.narrow());
        let table = Cpu.band_table(&self.band).unwrap();
        Cpu.band_contract(&mut y, &x.to_vec(), &params.to_vec(), self.panels, &table, self.rows, bias).unwrap();
        y
    }

    /// The weights' and one bias's gradients, exact zeros outside the band.
    fn outer(&self, bias: BiasGrad, wide: &Vec<f32>, narrow: &Vec<f32>) -> Vec<f32> {
        let span = match bias {
            BiasGrad::Wide(span) | BiasGrad::Narrow(span) => span,
        };
        let table = Cpu.band_table(&self.band).unwrap();
        let run = |grads: &mut Vec<f32>, write: Write| {
            Cpu.band_outer(grads, self.panels, bias, wide, narrow, &table, self.rows, write).unwrap();
        };
        let grads = written(&self.name, self.params.len(), &[self.panels, span], self.rows, run);
        let mut added = vec![1.0; self.params.len()];
        run(&mut added, Write::Add);
        let slots = self.slots();
        for slot in self.panels.range().filter(|slot| slots.binary_search(slot).is_err()) {
            assert_eq!((grads[slot].to_bits(), added[slot].to_bits()), (0, 0), "{}: slot {slot}", self.name);
        }
        grads
    }

    /// Places of the packed weights that exist, in the flat buffer.
    fn slots(&self) -> Vec<usize> {
        let slots = |panel| {
            let exists = move |slot: &usize| self.band.slot(panel, *slot).is_some();
            (0..panel.len()).filter(exists).map(|slot| self.panels.offset + panel.offset + slot)
        };
        self.band.panels().iter().flat_map(slots).collect()
    }
}

#[test]
fn band_as_fc1() {
    for case in BandCase::all() {
        let ((n, w), name) = (case.axes(), &case.name);
        let forward = |x: &[f32], params: &[f32]| {
            let mut pre = nan(case.rows * w);
            let y = case.expand(x, params, Expansion::BiasGelu { bias: case.wide_bias, pre: &mut pre });
            [pre, y]
        };
        let [pre, y] = forward(&case.narrow, &case.params);
        let expected = case.expanded(&case.params[case.wide_bias.range()]);
        equals(&format!("{name}, FC1 before GELU"), &pre, &expected, sums(&[n, 1]));
        let expected: Vec<f64> = expected.into_iter().map(gelu_definition).collect();
        equals(&format!("{name}, FC1"), &y, &expected, sums(&[n, GELU]));

        let r = Random::new(50).values(case.rows * w, 1.0);
        let dx = case.contract(&r, &case.params, None);
        let grads = case.outer(BiasGrad::Wide(case.wide_bias), &r, &case.narrow);
        let forward_x = |x: &[f32]| forward(x, &case.params)[0].clone();
        let objective = Objective { forward: forward_x, r: &r, tolerance: sums(&[n, 1, w]) };
        objective.confirm(
            &format!("{name}, FC1 input"),
            &case.narrow,
            &dx,
            &(0..case.narrow.len()).collect::<Vec<_>>(),
        );
        let forward_params = |params: &[f32]| forward(&case.narrow, params)[0].clone();
        let objective = Objective { forward: forward_params, r: &r, tolerance: sums(&[n, 1, case.rows]) };
        objective.confirm(&format!("{name}, FC1 weight"), &case.params, &grads, &case.slots());
        let bias: Vec<usize> = case.wide_bias.range().collect();
        objective.confirm(&format!("{name}, FC1 bias"), &case.params, &grads, &bias);
    }
}

#[test]
fn band_as_fc2() {
    for case in BandCase::all() {
        let ((n, w), name) = (case.axes(), &case.name);
        let bias = Some(case.narrow_bias);
        let expected = case.contracted(&case.params[case.narrow_bias.range()]);
        let y = case.contract(&case.wide, &case.params, bias);
        equals(&format!("{name}, FC2"), &y, &expected, sums(&[w, 1]));
        let y = case.contract(&case.wide, &case.params, None);
        equals(&format!("{name}, contraction"), &y, &case.contracted(&vec![0.0; n]), sums(&[w, 1]));

        let r = Random::new(60).values(case.rows * n, 1.0);
        let activate = |pre: &[f32]| pre.iter().map(|&pre| gelu(pre)).collect::<Vec<_>>();
        let dpre = case.expand(&r, &case.params, Expansion::GeluBackward { pre: &case.wide });
        let objective = Objective {
            forward: |pre: &[f32]| case.contract(&activate(pre), &case.params, bias),
            r: &r,
            tolerance: sums(&[w, GELU, n]),
        };
        // A wide element without connections has no gradient, and tells nothing when moved alone.
        let connected = |k: &usize| !case.band.row(k % w).is_empty();
        let (some, none): (Vec<usize>, Vec<usize>) = (0..case.wide.len()).partition(connected);
        assert!(none.iter().all(|&k| dpre[k] == 0.0), "{name}: gradient without a connection");
        objective.confirm(&format!("{name}, FC2 input through GELU"), &case.wide, &dpre, &some);

        let activated = activate(&case.wide);
        let grads = case.outer(BiasGrad::Narrow(case.narrow_bias), &activated, &r);
        let objective = Objective {
            forward: |params: &[f32]| case.contract(&activated, params, bias),
            r: &r,
            tolerance: sums(&[w, 1, case.rows]),
        };
        objective.confirm(&format!("{name}, FC2 weight"), &case.params, &grads, &case.slots());
        let bias: Vec<usize> = case.narrow_bias.range().collect();
        objective.confirm(&format!("{name}, FC2 bias"), &case.params, &grads, &bias);
    }
}
