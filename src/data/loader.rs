//! Batches from token files or memory, in llm.c's order, so that loss curves compare with llm.c's step by step.

use crate::data::paths::matching_files;
use crate::data::shard::TokenFile;
use crate::error::{Error, Result};
use rand_mt::Mt;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// llm.c's seed for the order of batches.
pub const DEFAULT_SEED: u32 = 42;

/// The furthest [`Position`] that [`Loader::seek`] goes to, since going there replays the shuffles on the way.
const MAX_POSITION: u64 = 1 << 32;

/// The order of batches within an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Shuffle {
    /// llm.c's: shards in random order, and within each shard its batches in random order.
    Llmc,
    /// Shards by name, batches from first to last.
    None,
}

/// How far a loader has come: all that a resumed run needs to go on with the same batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Batches served since the beginning of the first epoch.
    pub batches: u64,
}

/// Where a shard's tokens are.
#[derive(Debug)]
enum Shard {
    Mapped(TokenFile),
    Memory(Vec<u16>),
}

impl Shard {
    fn tokens(&self) -> &[u16] {
        match self {
            Shard::Mapped(file) => file.tokens(),
            Shard::Memory(tokens) => tokens,
        }
    }
}

/// Serves batches of B rows of T tokens, epoch after epoch.
///
/// A batch is B*T consecutive tokens of one shard; its targets are the same tokens one place further on. A shard of n
/// tokens has (n - 1) div (B*T) batches, and the tokens after its last whole batch are never served.
///
/// The order is llm.c's (`dataloader.h`): at the start of each epoch a Fisher-Yates shuffle of the list of shards, which
/// stays shuffled from epoch to epoch; then, for each shard as it is opened, one of the identity permutation of its
/// batches. Both draw from one MT19937.
pub struct Loader {
    shards: Vec<Shard>,
    batch_size: usize,
    seq_len: usize,
    shuffle: Shuffle,
    seed: u32,
    rng: Mt,
    /// The order of the shards in this epoch, and the place in it of the open shard.
    shard_order: Vec<u32>,
    shard_place: usize,
    /// The order of the batches in the open shard, and the place in it of the next batch.
    batch_order: Vec<u32>,
    batch_place: usize,
    batches_served: u64,
}

impl Loader {
    /// Opens and checks every token file that `pattern` (a path or a glob) names; `batch_size` is B, `seq_len` is T.
    ///
    /// # Errors
    /// [`Error::File`] when nothing matches, when a file is damaged or holds a token of `vocab_size` or above, or when all
    /// of them together hold no whole batch; [`Error::Usage`] for sizes of zero.
    pub fn open(
        pattern: &str,
        vocab_size: usize,
        batch_size: usize,
        seq_len: usize,
        shuffle: Shuffle,
        seed: u32,
    ) -> Result<Self> {
        let paths = matching_files(pattern)?;
        let shards =
            paths.iter().map(|path| TokenFile::open(path, vocab_size).map(Shard::Mapped)).collect::<Result<_>>()?;
        Self::new(shards, pattern, batch_size, seq_len, shuffle, seed)
    }

    /// Serves tokens held in memory as one shard. `name` stands for them in errors.
    ///
    /// # Errors
    /// [`Error::File`] when they hold no whole batch, [`Error::Usage`] for sizes of zero.
    pub fn from_tokens(
        tokens: Vec<u16>,
        name: &str,
        batch_size: usize,
        seq_len: usize,
        shuffle: Shuffle,
        seed: u32,
    ) -> Result<Self> {
        Self::new(vec![Shard::Memory(tokens)], name, batch_size, seq_len, shuffle, seed)
    }

    fn new(
        shards: Vec<Shard>,
        name: &str,
        batch_size: usize,
        seq_len: usize,
        shuffle: Shuffle,
        seed: u32,
    ) -> Result<Self> {
        let batch_tokens = batch_size.checked_mul(seq_len).filter(|&tokens| tokens > 0 && tokens < isize::MAX as usize);
        let Some(batch_tokens) = batch_tokens else {
            return Err(Error::usage(format!(
                "a batch of B = {batch_size} rows of T = {seq_len} tokens is not possible; choose both at least 1"
            )));
        };
        let mut loader = Loader {
            shard_order: identity(shards.len()),
            shards,
            batch_size,
            seq_len,
            shuffle,
            seed,
            rng: Mt::new(seed),
            shard_place: 0,
            batch_order: Vec::new(),
            batch_place: 0,
            batches_served: 0,
        };
        if loader.batches_per_epoch() == 0 {
            let most = loader.shards.iter().map(|shard| shard.tokens().len()).max().unwrap_or(0);
            return Err(Error::file(
                Path::new(name),
                format!(
                    "has {most} tokens{}, but one batch of B = {batch_size} rows of T = {seq_len} tokens takes \
                     B*T+1 = {}; choose a smaller --batch-size or --seq-len, or more text",
                    if loader.shards.len() > 1 { " in its largest file" } else { "" },
                    batch_tokens + 1
                ),
            ));
        }
        loader.reset();
        Ok(loader)
    }

    /// Fills `inputs` and `targets`, B*T tokens each in rows of T, with the next batch. Never runs out: after the last batch
    /// of an epoch comes the first of the next.
    ///
    /// # Errors
    /// [`Error::Internal`] when a slice has another length than B*T.
    pub fn next_batch(&mut self, inputs: &mut [u32], targets: &mut [u32]) -> Result<()> {
        let length = self.batch_tokens();
        if inputs.len() != length || targets.len() != length {
            let (inputs, targets) = (inputs.len(), targets.len());
            return Err(Error::Internal(format!(
                "a batch of {length} tokens was asked into {inputs} and {targets} places"
            )));
        }
        while self.batch_place == self.batch_order.len() {
            self.open_next_shard();
        }
        let start = self.batch_order[self.batch_place] as usize * length;
        let tokens = &self.shards[self.shard_order[self.shard_place] as usize].tokens()[start..=start + length];
        for (target, &token) in inputs.iter_mut().zip(&tokens[..length]) {
            *target = token.into();
        }
        for (target, &token) in targets.iter_mut().zip(&tokens[1..]) {
            *target = token.into();
        }
        self.batch_place += 1;
        self.batches_served += 1;
        Ok(())
    }

    /// Tokens in all shards.
    pub fn num_tokens(&self) -> usize {
        self.shards.iter().map(|shard| shard.tokens().len()).sum()
    }

    /// Batches in all shards; at least 1.
    pub fn batches_per_epoch(&self) -> usize {
        (0..self.shards.len()).map(|shard| self.batches_of_shard(shard)).sum()
    }

    /// Goes back to the very beginning: the next batch is the first one ever served. A validation starts like this.
    pub fn reset(&mut self) {
        self.rng = Mt::new(self.seed);
        self.shard_order = identity(self.shards.len());
        self.batches_served = 0;
        self.start_epoch();
    }

    /// What tells these data from others cheaply: every shard's length and at most 4096 of its tokens, by FNV-1a.
    pub fn fingerprint(&self) -> u64 {
        const SAMPLED: usize = 4096;
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        let mut add = |value: u64| hash = (hash ^ value).wrapping_mul(0x0100_0000_01b3);
        for tokens in self.shards.iter().map(Shard::tokens) {
            add(tokens.len() as u64);
            tokens.iter().step_by(tokens.len() / SAMPLED + 1).for_each(|&token| add(token.into()));
        }
        hash
    }

    /// How far the loader has come.
    pub fn position(&self) -> Position {
        Position { batches: self.batches_served }
    }

    /// Goes to a position that [`Loader::position`] gave, with the same data, sizes, shuffle and seed.
    ///
    /// # Errors
    /// [`Error::Usage`] for a position that no run reaches.
    pub fn seek(&mut self, position: Position) -> Result<()> {
        if position.batches > MAX_POSITION {
            return Err(Error::usage(format!(
                "cannot go on after {} batches of data, at most {MAX_POSITION}; the saved position is damaged, \
                 start from another checkpoint",
                position.batches
            )));
        }
        self.reset();
        let mut left = position.batches;
        while left > self.batch_order.len() as u64 {
            left -= self.batch_order.len() as u64;
            self.open_next_shard();
        }
        self.batch_place = left as usize;
        self.batches_served = position.batches;
        Ok(())
    }

    fn batch_tokens(&self) -> usize {
        self.batch_size * self.seq_len
    }

    fn batches_of_shard(&self, shard: usize) -> usize {
        self.shards[shard].tokens().len().saturating_sub(1) / self.batch_tokens()
    }

    fn start_epoch(&mut self) {
        if self.shuffle == Shuffle::Llmc {
            permute(&mut self.shard_order, &mut self.rng);
        }
        self.open_shard(0);
    }

    fn open_next_shard(&mut self) {
        if self.shard_place + 1 == self.shards.len() {
            self.start_epoch();
        } else {
            self.open_shard(self.shard_place + 1);
        }
    }

    fn open_shard(&mut self, place: usize) {
        self.shard_place = place;
        self.batch_place = 0;
        self.batch_order = identity(self.batches_of_shard(self.shard_order[place] as usize));
        if self.shuffle == Shuffle::Llmc {
            permute(&mut self.batch_order, &mut self.rng);
        }
    }
}

/// 0, 1, ..., length - 1. A shard has fewer than 2^31 tokens and so fewer batches.
fn identity(length: usize) -> Vec<u32> {
    (0..length as u32).collect()
}

/// Fisher-Yates from the last item down, as llm.c's `random_permutation`.
fn permute(items: &mut [u32], rng: &mut Mt) {
    for last in (1..items.len()).rev() {
        items.swap(last, (rng.next_u32() % (last as u32 + 1)) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::shard::TokenWriter;
    use proptest::prelude::*;

    fn counting(length: usize) -> Vec<u16> {
        (0..length).map(|index| index as u16).collect()
    }

    fn memory(shards: &[usize], batch_size: usize, seq_len: usize, shuffle: Shuffle) -> Loader {
        let shards = shards.iter().map(|&length| Shard::Memory(counting(length))).collect();
        Loader::new(shards, "memory", batch_size, seq_len, shuffle, DEFAULT_SEED).unwrap()
    }

    fn batch(loader: &mut Loader) -> (Vec<u32>, Vec<u32>) {
        let mut inputs = vec![0; loader.batch_tokens()];
        let mut targets = inputs.clone();
        loader.next_batch(&mut inputs, &mut targets).unwrap();
        (inputs, targets)
    }

    #[test]
    fn targets_are_one_place_further_and_epochs_follow_each_other() {
        let mut loader = memory(&[10], 2, 2, Shuffle::None);
        assert_eq!((loader.num_tokens(), loader.batches_per_epoch()), (10, 2));
        assert_eq!(batch(&mut loader), (vec![0, 1, 2, 3], vec![1, 2, 3, 4]));
        assert_eq!(batch(&mut loader), (vec![4, 5, 6, 7], vec![5, 6, 7, 8]));
        assert_eq!(batch(&mut loader).0, [0, 1, 2, 3]);
        loader.reset();
        assert_eq!(batch(&mut loader).0, [0, 1, 2, 3]);
    }

    #[test]
    fn too_few_tokens_say_how_many_are_needed() {
        let few = |shards: Vec<usize>| {
            let shards = shards.into_iter().map(|length| Shard::Memory(counting(length))).collect();
            Loader::new(shards, "x.bin", 2, 4, Shuffle::None, 0).err().unwrap().to_string()
        };
        assert!(
            few(vec![8])
                .starts_with("x.bin: has 8 tokens, but one batch of B = 2 rows of T = 4 tokens takes B*T+1 = 9")
        );
        assert!(few(vec![8, 5]).contains("8 tokens in its largest file"));
        assert!(few(vec![0]).contains("has 0 tokens"));
        for (batch_size, seq_len) in [(0, 1), (1, 0), (usize::MAX, 2), (usize::MAX, 1)] {
            assert!(Loader::from_tokens(counting(9), "x", batch_size, seq_len, Shuffle::None, 0).is_err());
        }
    }

    #[test]
    fn wrong_slices_and_absurd_positions_are_errors() {
        let mut loader = memory(&[10], 2, 2, Shuffle::Llmc);
        assert!(loader.next_batch(&mut [0; 3], &mut [0; 4]).is_err());
        assert!(loader.seek(Position { batches: u64::MAX }).is_err());
    }

    #[test]
    fn files_are_served_in_the_order_of_their_names() {
        let folder = tempfile::tempdir().unwrap();
        for (name, first) in [("b_2.bin", 20), ("b_1.bin", 10)] {
            let mut writer = TokenWriter::create(&folder.path().join(name)).unwrap();
            writer.write(&[first, first + 1, first + 2]).unwrap();
            writer.finish().unwrap();
        }
        let pattern = folder.path().join("b_*.bin").display().to_string();
        let mut loader = Loader::open(&pattern, 100, 1, 2, Shuffle::None, 0).unwrap();
        assert_eq!(batch(&mut loader).0, [10, 11]);
        assert_eq!(batch(&mut loader).0, [20, 21]);
        assert!(Loader::open(&pattern, 22, 1, 2, Shuffle::None, 0).is_err());
    }

    proptest! {
        #[test]
        fn seeking_goes_on_exactly(
            shards in proptest::collection::vec(0usize..40, 1..5),
            batches in 0u64..60,
            shuffled in any::<bool>(),
        ) {
            prop_assume!(shards.iter().any(|&length| length > 4));
            let shuffle = if shuffled { Shuffle::Llmc } else { Shuffle::None };
            let mut straight = memory(&shards, 2, 2, shuffle);
            for _ in 0..batches {
                batch(&mut straight);
            }
            let mut sought = memory(&shards, 2, 2, shuffle);
            batch(&mut sought);
            sought.seek(straight.position()).unwrap();
            prop_assert_eq!(sought.position(), straight.position());
            for _ in 0..20 {
                prop_assert_eq!(batch(&mut sought), batch(&mut straight));
            }
        }
    }
}
