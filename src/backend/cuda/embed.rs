//! Token and position embeddings on the card: `kernels/embed.cu`.

use super::buffer::{Buffer, Element};
use super::{Cuda, Unit, args, unit};
use crate::backend::{Arithmetic, Embed, Embeddings, SequenceDims, Write, sorted_places};
use crate::error::{Error, Result};
use crate::shapes::Span;

const THREADS: usize = 64;

/// Token ids on the device, with the order that the embedding's gradient is summed in: ids, then places sorted by token, then
/// runs of one token each, with room for as many as there are tokens.
pub struct Tokens {
    words: Buffer,
    capacity: usize,
    count: usize,
}

impl Tokens {
    pub(super) fn new(cuda: &mut Cuda, name: &str, len: usize) -> Result<Self> {
        let words = len.checked_mul(4).and_then(|words| words.checked_add(2));
        let words = words.ok_or_else(|| Error::Device(format!("{name} needs more memory than any card has")))?;
        Ok(Self { words: cuda.create(Element::F32, name, words)?, capacity: len, count: 0 })
    }

    pub(super) fn upload(&mut self, cuda: &mut Cuda, tokens: &[u32]) -> Result<()> {
        if tokens.len() > self.capacity {
            return Err(Error::Internal(format!("{} tokens for a buffer of {}", tokens.len(), self.capacity)));
        }
        let (order, runs) = sorted_places(tokens);
        let mut words = vec![u32::MAX; 4 * self.capacity + 2];
        words[..tokens.len()].copy_from_slice(tokens);
        words[self.capacity..][..order.len()].copy_from_slice(&order);
        words[2 * self.capacity..][..runs.len()].copy_from_slice(&runs);
        self.count = tokens.len();
        let to = self.words.f32s(words.len())?;
        cuda.copy_words(to, &words)
    }

    /// Where the ids lie.
    pub(super) fn ids(&self, rows: usize) -> Result<u64> {
        match rows <= self.capacity {
            true => self.words.f32s(rows),
            false => Err(Error::Internal(format!("{rows} tokens of a buffer of {}", self.capacity))),
        }
    }

    fn order_and_runs(&self) -> Result<[u64; 2]> {
        let at = self.words.f32s(4 * self.capacity + 2)?;
        Ok([at + 4 * self.capacity as u64, at + 8 * self.capacity as u64])
    }
}

/// The unit for rows of `channels`, threads of a block, and blocks of a row.
fn pieces(arithmetic: Arithmetic, channels: usize) -> (Unit, usize) {
    let lanes = Element::of(arithmetic).lanes();
    let aligned = channels.is_multiple_of(lanes);
    let pieces = if aligned { channels / lanes } else { channels };
    (unit("embed", arithmetic, aligned), pieces.div_ceil(THREADS))
}

impl Embed for Cuda {
    fn embed_forward(
        &mut self,
        out: &mut Buffer,
        tokens: &Tokens,
        params: &Buffer,
        embeddings: Embeddings,
        dims: SequenceDims,
        past: usize,
    ) -> Result<()> {
        let (rows, c) = (dims.rows(), dims.channels);
        let (unit, across) = pieces(self.arithmetic, c);
        if (past + dims.tokens) * c > embeddings.positions.len {
            return Err(Error::Internal(format!("positions up to {} of too few", past + dims.tokens)));
        }
        let (out, ids) = (self.activation(out, rows * c)?, tokens.ids(rows)?);
        let wte = self.operand(params, embeddings.tokens)?;
        let wpe = params.part(Element::F32, embeddings.positions)?;
        let args = args![out, ids, wte, wpe, c, dims.tokens, past];
        self.launch("embed_forward", &unit, "embed_forward", [rows, across, 1], THREADS, 0, args);
        Ok(())
    }

    fn embed_backward(
        &mut self,
        grads: &mut Buffer,
        dout: &Buffer,
        tokens: &Tokens,
        embeddings: Embeddings,
        dims: SequenceDims,
        write: Write,
    ) -> Result<()> {
        const OP: &str = "embed_backward";
        let (rows, c) = (dims.rows(), dims.channels);
        if tokens.count != rows {
            return Err(Error::Internal(format!("{} tokens for {rows} rows", tokens.count)));
        }
        let (unit, across) = pieces(self.arithmetic, c);
        let Span { len: positions, .. } = embeddings.positions;
        let (dout, [order, runs]) = (self.activation(dout, rows * c)?, tokens.order_and_runs()?);
        let (dwte, dwpe) =
            (grads.part(Element::F32, embeddings.tokens)?, grads.part(Element::F32, embeddings.positions)?);
        let args = args![dwte, dout, order, runs, c, rows];
        self.launch(OP, &unit, "embed_tokens", [rows, across, 1], THREADS, 0, args);
        let args = args![dwpe, dout, c, dims.tokens, dims.batch, write];
        self.launch(OP, &unit, "embed_positions", [positions / c, across, 1], THREADS, 0, args);
        Ok(())
    }
}

/// Every instantiation.
pub(super) fn units(arithmetic: Arithmetic) -> Vec<(Unit, &'static str, usize, usize)> {
    let of = |aligned| {
        let entries = ["embed_forward", "embed_tokens", "embed_positions"];
        entries.map(|entry| (unit("embed", arithmetic, aligned), entry, THREADS, 0))
    };
    [true, false].into_iter().flat_map(of).collect()
}
