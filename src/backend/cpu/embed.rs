//! Token and position embeddings on the CPU.

use super::{Cpu, ROW_CHUNK};
use crate::backend::{Embed, Embeddings, SequenceDims, Write};
use crate::error::Result;
use rayon::prelude::*;

impl Embed for Cpu {
    fn embed_forward(
        &mut self,
        out: &mut Vec<f32>,
        tokens: &Vec<u32>,
        params: &Vec<f32>,
        embeddings: Embeddings,
        dims: SequenceDims,
        past: usize,
    ) -> Result<()> {
        let c = dims.channels;
        let (wte, wpe) = (&params[embeddings.tokens.range()], &params[embeddings.positions.range()]);
        out[..dims.rows() * c].par_chunks_mut(c).with_min_len(ROW_CHUNK).enumerate().for_each(|(row, out)| {
            let token = &wte[tokens[row] as usize * c..][..c];
            let position = &wpe[(past + row % dims.tokens) * c..][..c];
            for ((out, token), position) in out.iter_mut().zip(token).zip(position) {
                *out = token + position;
            }
        });
        Ok(())
    }

    fn embed_backward(
        &mut self,
        grads: &mut Vec<f32>,
        dout: &Vec<f32>,
        tokens: &Vec<u32>,
        embeddings: Embeddings,
        dims: SequenceDims,
        write: Write,
    ) -> Result<()> {
        let (c, t) = (dims.channels, dims.tokens);
        // Rows in order: two tokens of a kind add to the same row of dwte, and the order must not depend on threads.
        let dwte = &mut grads[embeddings.tokens.range()];
        for (dout, &token) in dout[..dims.rows() * c].chunks(c).zip(tokens) {
            for (sum, value) in dwte[token as usize * c..][..c].iter_mut().zip(dout) {
                *sum += value;
            }
        }
        let dwpe = &mut grads[embeddings.positions.range()];
        dwpe.par_chunks_mut(c).enumerate().for_each(|(position, dwpe)| {
            if write == Write::Set {
                dwpe.fill(0.0);
            }
            if position < t {
                for b in 0..dims.batch {
                    for (sum, value) in dwpe.iter_mut().zip(&dout[(b * t + position) * c..][..c]) {
                        *sum += value;
                    }
                }
            }
        });
        Ok(())
    }
}
