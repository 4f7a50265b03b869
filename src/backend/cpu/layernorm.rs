//! LayerNorm on the CPU: statistics in f64, one row after the other.

use super::{Cpu, ROW_CHUNK, sum_rows};
use crate::backend::{Affine, LayerNorm, Normed, NormedInput, Write};
use crate::error::Result;
use rayon::prelude::*;

/// Added to the variance, as in GPT-2.
const EPS: f64 = 1e-5;

impl LayerNorm for Cpu {
    fn layernorm_forward(
        &mut self,
        normed: Normed<'_, Vec<f32>>,
        x: &Vec<f32>,
        params: &Vec<f32>,
        affine: Affine,
        rows: usize,
    ) -> Result<()> {
        let (weight, bias) = (&params[affine.weight.range()], &params[affine.bias.range()]);
        let c = weight.len();
        let (out, mean, rstd) = (&mut normed.out[..rows * c], &mut normed.mean[..rows], &mut normed.rstd[..rows]);
        (out.par_chunks_mut(c), x[..rows * c].par_chunks(c), mean, rstd)
            .into_par_iter()
            .with_min_len(ROW_CHUNK)
            .for_each(|(out, x, mean, rstd)| {
                (*mean, *rstd) = statistics(x);
                for (((out, x), weight), bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
                    *out = (x - *mean) * *rstd * weight + bias;
                }
            });
        Ok(())
    }

    fn residual_layernorm_forward(
        &mut self,
        residual: &mut Vec<f32>,
        normed: Normed<'_, Vec<f32>>,
        x: &Vec<f32>,
        branch: &Vec<f32>,
        params: &Vec<f32>,
        affine: Affine,
        rows: usize,
    ) -> Result<()> {
        let len = rows * affine.weight.len;
        let chunk = ROW_CHUNK * affine.weight.len;
        (residual[..len].par_chunks_mut(chunk), x[..len].par_chunks(chunk), branch[..len].par_chunks(chunk))
            .into_par_iter()
            .for_each(|(residual, x, branch)| {
                for ((residual, x), branch) in residual.iter_mut().zip(x).zip(branch) {
                    *residual = x + branch;
                }
            });
        self.layernorm_forward(normed, residual, params, affine, rows)
    }

    fn layernorm_backward(
        &mut self,
        dresidual: &mut Vec<f32>,
        grads: &mut Vec<f32>,
        dout: &Vec<f32>,
        input: NormedInput<'_, Vec<f32>>,
        params: &Vec<f32>,
        affine: Affine,
        rows: usize,
        residual_write: Write,
        write: Write,
    ) -> Result<()> {
        let weight = &params[affine.weight.range()];
        let c = weight.len();
        let NormedInput { x, mean, rstd } = input;
        let row_of = |row: usize| (&x[row * c..][..c], &dout[row * c..][..c]);
        dresidual[..rows * c].par_chunks_mut(c).with_min_len(ROW_CHUNK).enumerate().for_each(|(row, dresidual)| {
            let (x, dout) = row_of(row);
            let (mean, rstd) = (mean[row], rstd[row]);
            // With n = (x - mean) * rstd and dn = dout * weight: dx = rstd * (dn - mean(dn) - n * mean(dn * n)).
            let (mut sum_dn, mut sum_dn_n) = (0.0f64, 0.0f64);
            for ((x, dout), weight) in x.iter().zip(dout).zip(weight) {
                let dn = f64::from(dout * weight);
                sum_dn += dn;
                sum_dn_n += dn * f64::from((x - mean) * rstd);
            }
            let (mean_dn, mean_dn_n) = ((sum_dn / c as f64) as f32, (sum_dn_n / c as f64) as f32);
            for (((dresidual, x), dout), weight) in dresidual.iter_mut().zip(x).zip(dout).zip(weight) {
                let dx = rstd * (dout * weight - mean_dn - (x - mean) * rstd * mean_dn_n);
                match residual_write {
                    Write::Set => *dresidual = dx,
                    Write::Add => *dresidual += dx,
                }
            }
        });
        sum_rows(&mut grads[affine.bias.range()], rows, write, |row, partial| {
            for (sum, dout) in partial.iter_mut().zip(row_of(row).1) {
                *sum += dout;
            }
        });
        sum_rows(&mut grads[affine.weight.range()], rows, write, |row, partial| {
            let (x, dout) = row_of(row);
            for ((sum, x), dout) in partial.iter_mut().zip(x).zip(dout) {
                *sum += dout * ((x - mean[row]) * rstd[row]);
            }
        });
        Ok(())
    }
}

/// Mean and 1 / sqrt(variance + eps) of a row.
fn statistics(x: &[f32]) -> (f32, f32) {
    let n = x.len() as f64;
    let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
    (mean as f32, (1.0 / (variance + EPS).sqrt()) as f32)
}
