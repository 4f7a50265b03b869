//! Blocks of connections, kept or cut as wholes: the patterns beside the band.
//!
//! A layer of W wide and N narrow elements is cut into blocks of [`BLOCK_ROWS`] wide rows x [`BLOCK_COLS`] narrow columns,
//! those at the two far edges smaller where the axes do not divide. [`Blocks`] is any set of them; [`BlockPattern`] names
//! the sets that can be told in a word and a number. How the blocks' weights lie in memory is the band module's affair.

use crate::output::quoted;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fmt;
use std::str::FromStr;

/// Wide rows of a block: what the kernels' tiles take at once, two panels.
pub const BLOCK_ROWS: usize = 128;
/// Narrow columns of a block: whole stages of every kernel.
pub const BLOCK_COLS: usize = 64;

/// A set of blocks of a layer, by block row (along the wide axis) and block column (along the narrow axis).
#[derive(Clone, PartialEq, Eq)]
pub struct Blocks {
    down: usize,
    across: usize,
    /// By rows.
    kept: Vec<bool>,
}

impl Blocks {
    /// No block of a layer of `narrow` = N and `wide` = W elements.
    pub fn none(narrow: usize, wide: usize) -> Self {
        let (down, across) = grid(narrow, wide);
        Self { down, across, kept: vec![false; down * across] }
    }

    /// The blocks that a pattern keeps of a layer of N x W elements, of a learned one those that it starts from; `stream` tells
    /// apart the layers that share a seed.
    ///
    /// The pattern's density is that of blocks: the nearest whole number of them, but at least one in each block row and
    /// each block column. (The share of the connections is the same where both axes divide into blocks.)
    pub fn of(pattern: BlockPattern, narrow: usize, wide: usize, stream: u64) -> Self {
        let mut blocks = Self::none(narrow, wide);
        let longer = blocks.down.max(blocks.across);
        let count = pattern.density().of(blocks.kept.len()).max(longer);
        match pattern {
            BlockPattern::Random { seed, .. } | BlockPattern::Learned { start: Start::Random(seed), .. } => {
                blocks.scatter(count, seed, stream)
            }
            BlockPattern::Strided { .. } => blocks.stride(count),
            BlockPattern::Learned { start: Start::Band, .. } => blocks.band(count),
        }
        blocks
    }

    /// Keeps `count` blocks by lot: first one in each row and each column, along a diagonal of shuffled rows and columns,
    /// then any others.
    fn scatter(&mut self, count: usize, seed: u32, stream: u64) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed.into());
        rng.set_stream(stream);
        let (rows, cols) = (shuffled(0..self.down, &mut rng), shuffled(0..self.across, &mut rng));
        let diagonal = self.down.max(self.across);
        for at in 0..diagonal {
            self.keep(rows[at % self.down], cols[at % self.across]);
        }
        let others = (0..self.kept.len()).filter(|&index| !self.kept[index]);
        for index in shuffled(others, &mut rng).into_iter().take(count - diagonal) {
            self.kept[index] = true;
        }
    }

    /// Keeps `count` blocks on diagonals that lie evenly apart, the main one among them: a band with gaps. Where the diagonals do not
    /// come out even, rows (or columns, where there are more of these) with one block more lie evenly among the others.
    fn stride(&mut self, count: usize) {
        let (longer, shorter) = (self.down.max(self.across), self.down.min(self.across));
        for at in 0..longer {
            let taps = (at + 1) * count / longer - at * count / longer;
            for tap in 0..taps {
                let other = (at * shorter / longer + tap * shorter / taps) % shorter;
                if self.down >= self.across { self.keep(at, other) } else { self.keep(other, at) }
            }
        }
    }

    /// Keeps `count` blocks in a diagonal band without gaps: at each place of the longer axis those around the diagonal. Near the
    /// ends the window moves inwards, so that it has as many blocks as elsewhere.
    fn band(&mut self, count: usize) {
        let (longer, shorter) = (self.down.max(self.across), self.down.min(self.across));
        for at in 0..longer {
            let taps = (at + 1) * count / longer - at * count / longer;
            // The middle of the place, in blocks of the shorter axis, lies in the middle of the window.
            let first = ((2 * at + 1) * shorter).saturating_sub((taps - 1) * longer) / (2 * longer);
            for other in (0..taps).map(|tap| first.min(shorter - taps) + tap) {
                if self.down >= self.across { self.keep(at, other) } else { self.keep(other, at) }
            }
        }
    }

    /// Keeps a block.
    ///
    /// # Panics
    /// When there is no such block: a fault of the caller.
    pub fn keep(&mut self, row: usize, col: usize) {
        assert!(row < self.down && col < self.across, "there is no block {row}, {col}");
        self.kept[row * self.across + col] = true;
    }

    /// Whether a block exists and is kept.
    pub fn contains(&self, row: usize, col: usize) -> bool {
        row < self.down && col < self.across && self.kept[row * self.across + col]
    }

    /// For each block whether it is kept, by rows.
    pub fn flags(&self) -> &[bool] {
        &self.kept
    }

    /// The same, to keep others.
    pub fn flags_mut(&mut self) -> &mut [bool] {
        &mut self.kept
    }

    /// Blocks that are kept.
    pub fn count(&self) -> usize {
        self.kept.iter().filter(|kept| **kept).count()
    }

    /// Blocks that are kept here and not among `others`, of the same layer.
    pub fn count_beside(&self, others: &Blocks) -> usize {
        self.kept.iter().zip(&others.kept).filter(|(kept, other)| **kept && !**other).count()
    }

    /// Block rows: blocks along the wide axis.
    pub fn down(&self) -> usize {
        self.down
    }

    /// Block columns: blocks along the narrow axis.
    pub fn across(&self) -> usize {
        self.across
    }

    /// The block columns kept in a block row, ascending.
    pub fn row(&self, row: usize) -> impl DoubleEndedIterator<Item = usize> + '_ {
        (0..self.across).filter(move |&col| self.contains(row, col))
    }

    /// The block rows kept in a block column, ascending.
    pub fn column(&self, col: usize) -> impl DoubleEndedIterator<Item = usize> + '_ {
        (0..self.down).filter(move |&row| self.contains(row, col))
    }

    /// A text of one character for each block, `1` kept and `0` cut, a word for each row.
    pub fn to_text(&self) -> String {
        let row = |kept: &[bool]| kept.iter().map(|&kept| if kept { '1' } else { '0' }).collect::<String>();
        self.kept.chunks(self.across).map(row).collect::<Vec<_>>().join(" ")
    }

    /// The blocks that a text of [`Blocks::to_text`] means in a layer of N x W elements; `None` for any other text.
    pub fn from_text(text: &str, narrow: usize, wide: usize) -> Option<Self> {
        let mut blocks = Self::none(narrow, wide);
        let rows: Vec<&str> = text.split(' ').collect();
        if rows.len() != blocks.down || rows.iter().any(|row| row.len() != blocks.across) {
            return None;
        }
        for (kept, character) in blocks.kept.iter_mut().zip(rows.into_iter().flat_map(str::chars)) {
            *kept = character.to_digit(2)? == 1;
        }
        Some(blocks)
    }
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blocks({})", self.to_text())
    }
}

/// Blocks down the wide and across the narrow axis of a layer.
pub fn grid(narrow: usize, wide: usize) -> (usize, usize) {
    (wide.div_ceil(BLOCK_ROWS), narrow.div_ceil(BLOCK_COLS))
}

/// These indices by lot. Written out, since what a seed means must stay, whatever a crate makes of it.
fn shuffled(indices: impl Iterator<Item = usize>, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let mut indices: Vec<usize> = indices.collect();
    for last in (1..indices.len()).rev() {
        let lot = (u128::from(rng.next_u64()) * (last as u128 + 1)) >> 64;
        indices.swap(last, lot as usize);
    }
    indices
}

/// A set of blocks by its rule: in text and in files `random:0.438`, `random:0.438:7` with a seed, `strided:0.438`, or
/// `learned:0.438`, `learned:0.438:7`, `learned:0.438:band` with what they start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum BlockPattern {
    /// Blocks by lot, other ones in every layer.
    Random {
        /// Their share of all blocks.
        density: Density,
        /// Same seed, same blocks.
        seed: u32,
    },
    /// Blocks on diagonals that lie evenly apart, the same ones in every layer.
    Strided {
        /// Their share of all blocks.
        density: Density,
    },
    /// Blocks that a training exchanges for others, as many of them at all times ([`crate::learn`]).
    Learned {
        /// Their share of all blocks.
        density: Density,
        /// Which ones they are at first.
        start: Start,
    },
}

/// What learned blocks start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Start {
    /// The random blocks of this seed ([`BlockPattern::Random`]).
    Random(u32),
    /// A diagonal band of blocks without gaps.
    Band,
}

impl BlockPattern {
    /// Whether a text means a pattern, a wrong one perhaps, and not a bandwidth.
    pub fn is_meant_by(text: &str) -> bool {
        text.contains(':') || matches!(text.trim(), "random" | "strided" | "learned")
    }

    /// Whether a training exchanges its blocks for others.
    pub fn is_learned(self) -> bool {
        matches!(self, BlockPattern::Learned { .. })
    }

    /// The share of all blocks that it keeps.
    pub fn density(self) -> Density {
        match self {
            BlockPattern::Random { density, .. }
            | BlockPattern::Strided { density }
            | BlockPattern::Learned { density, .. } => density,
        }
    }
}

impl fmt::Display for BlockPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BlockPattern::Random { density, seed: 0 } => write!(f, "random:{density}"),
            BlockPattern::Random { density, seed } => write!(f, "random:{density}:{seed}"),
            BlockPattern::Strided { density } => write!(f, "strided:{density}"),
            BlockPattern::Learned { density, start: Start::Random(0) } => write!(f, "learned:{density}"),
            BlockPattern::Learned { density, start: Start::Random(seed) } => write!(f, "learned:{density}:{seed}"),
            BlockPattern::Learned { density, start: Start::Band } => write!(f, "learned:{density}:band"),
        }
    }
}

impl FromStr for BlockPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.trim().splitn(3, ':');
        let (name, density, last) = (parts.next().unwrap_or(""), parts.next(), parts.next());
        if !matches!(name, "random" | "strided" | "learned") {
            let name = quoted(name);
            return Err(format!("there is no pattern {name}; choose random, strided or learned, as in random:0.438"));
        }
        let density = density.ok_or_else(|| format!("{name} lacks its density, as in {name}:0.438"))?.parse()?;
        let seed = |also: &str| match last {
            None => Ok(0),
            Some(seed) => seed.parse().map_err(|_| {
                format!("the seed of a {name} pattern must be a whole number from 0 to {}{also}", u32::MAX)
            }),
        };
        match (name, last) {
            ("random", _) => Ok(BlockPattern::Random { density, seed: seed("")? }),
            ("learned", Some("band")) => Ok(BlockPattern::Learned { density, start: Start::Band }),
            ("learned", _) => {
                let start = Start::Random(seed(", or band in its place for a diagonal start")?);
                Ok(BlockPattern::Learned { density, start })
            }
            (_, None) => Ok(BlockPattern::Strided { density }),
            (_, Some(_)) => Err("a strided pattern has no seed; write it as in strided:0.438".to_string()),
        }
    }
}

/// A share between 0 and 1, neither of them, in millionths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Density(u32);

impl Density {
    const WHOLE: u32 = 1_000_000;

    /// The density nearest to a share; `None` when that does not lie between 0 and 1 or is nearest to one of them.
    pub fn new(share: f64) -> Option<Self> {
        let millionths = (share * f64::from(Self::WHOLE)).round();
        (millionths >= 1.0 && millionths < f64::from(Self::WHOLE)).then_some(Self(millionths as u32))
    }

    /// This share of a number, rounded.
    fn of(self, count: usize) -> usize {
        let whole = u128::from(Self::WHOLE);
        ((count as u128 * u128::from(self.0) + whole / 2) / whole) as usize
    }
}

impl fmt::Display for Density {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.0) / f64::from(Self::WHOLE))
    }
}

impl FromStr for Density {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let share: Option<f64> = text.parse().ok();
        let density = share.and_then(Density::new);
        // What has more decimals would come back as another number.
        density.filter(|density| density.to_string().parse().ok() == share).ok_or_else(|| {
            format!("the density {} must lie between 0 and 1 and have at most six decimals", quoted(text))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn blocks(text: &str, narrow: usize, wide: usize, stream: u64) -> Blocks {
        Blocks::of(text.parse().unwrap(), narrow, wide, stream)
    }

    fn all(density: Density, seed: u32) -> [BlockPattern; 4] {
        let learned = [Start::Random(seed), Start::Band].map(|start| BlockPattern::Learned { density, start });
        [BlockPattern::Random { density, seed }, BlockPattern::Strided { density }, learned[0], learned[1]]
    }

    #[test]
    fn a_seed_means_these_blocks_for_ever() {
        let found = blocks("random:0.4:7", 256, 1024, 3).to_text();
        assert_eq!(found, "1010 0100 0010 1000 1101 1011 0001 0001");
        assert_ne!(blocks("random:0.4:7", 256, 1024, 2).to_text(), found);
        assert_ne!(blocks("random:0.4:8", 256, 1024, 3).to_text(), found);
        assert_eq!(blocks("random:0.4", 256, 1024, 3), blocks("random:0.4:0", 256, 1024, 3));
    }

    #[test]
    fn strides_are_diagonals_evenly_apart() {
        let expected = "1010 1010 0101 0101 1010 1010 0101 0101";
        assert_eq!(blocks("strided:0.5", 256, 1024, 0).to_text(), expected);
        assert_eq!(blocks("strided:0.25", 256, 512, 0).to_text(), "1000 0100 0010 0001");
        // Half a diagonal more.
        assert_eq!(blocks("strided:0.375", 256, 512, 0).to_text(), "1000 0101 0010 0101");
    }

    #[test]
    fn learned_blocks_start_from_random_ones_or_from_a_band() {
        let learned = blocks("learned:0.4:7", 256, 1024, 3);
        assert_eq!(learned, blocks("random:0.4:7", 256, 1024, 3));
        let band = |density: &str, narrow, wide| blocks(&format!("learned:{density}:band"), narrow, wide, 3).to_text();
        assert_eq!(band("0.5", 256, 1024), "1100 1100 1100 0110 0110 0011 0011 0011");
        assert_eq!(band("0.25", 256, 512), "1000 0100 0010 0001");
        // Half a diagonal more.
        assert_eq!(band("0.375", 256, 512), "1000 0110 0010 0011");
    }

    #[test]
    fn small_layers_are_one_block() {
        let whole = blocks("random:0.1", 30, 120, 0);
        assert_eq!((whole.down(), whole.across(), whole.count()), (1, 1, 1));
    }

    #[test]
    fn what_makes_no_pattern_is_told() {
        for (text, words) in [
            ("chess:0.5", "there is no pattern 'chess'; choose random, strided or learned"),
            ("random", "random lacks its density, as in random:0.438"),
            ("random:", "the density '' must lie between 0 and 1"),
            ("random:0", "must lie between 0 and 1"),
            ("strided:1", "must lie between 0 and 1"),
            ("strided:-0.5", "must lie between 0 and 1"),
            ("strided:nan", "must lie between 0 and 1"),
            ("random:0.1234567", "at most six decimals"),
            ("random:0.5:x", "the seed of a random pattern must be a whole number from 0"),
            ("random:0.5:1:2", "the seed of a random pattern"),
            ("strided:0.5:1", "a strided pattern has no seed"),
            ("learned", "learned lacks its density, as in learned:0.438"),
            ("learned:0.5:bands", "the seed of a learned pattern must be a whole number from 0"),
            ("learned:0.5:bands", "or band in its place"),
        ] {
            let what = text.parse::<BlockPattern>().unwrap_err();
            assert!(what.contains(words), "{text}: {what}");
        }
    }

    proptest! {
        #[test]
        fn blocks_are_as_many_as_the_density_says_and_leave_no_row_or_column_out(
            narrow in 1usize..1000, extra in 0usize..4000, millionths in 1u32..1_000_000, seed: u32, stream in 0u64..100,
        ) {
            let (wide, density) = (narrow + extra, Density(millionths));
            for pattern in all(density, seed) {
                let blocks = Blocks::of(pattern, narrow, wide, stream);
                let all = blocks.down() * blocks.across();
                let asked = all as f64 * f64::from(millionths) / 1e6;
                let least = blocks.down().max(blocks.across());
                prop_assert!(blocks.count() == least || (blocks.count() as f64 - asked).abs() <= 0.5);
                prop_assert!(blocks.count() >= least);
                prop_assert!((0..blocks.down()).all(|row| blocks.row(row).next().is_some()));
                prop_assert!((0..blocks.across()).all(|col| blocks.column(col).next().is_some()));
                prop_assert_eq!(&Blocks::of(pattern, narrow, wide, stream), &blocks);
                prop_assert_eq!(Blocks::from_text(&blocks.to_text(), narrow, wide), Some(blocks));
            }
        }

        #[test]
        fn any_set_of_blocks_has_its_text(
            narrow in 1usize..500, extra in 0usize..900, lots in proptest::collection::vec(any::<(u8, u8)>(), 0..40),
        ) {
            let mut blocks = Blocks::none(narrow, narrow + extra);
            for (row, col) in lots {
                blocks.keep(usize::from(row) % blocks.down(), usize::from(col) % blocks.across());
            }
            prop_assert_eq!(Blocks::from_text(&blocks.to_text(), narrow, narrow + extra), Some(blocks));
        }

        #[test]
        fn patterns_come_back_from_their_text(millionths in 1u32..1_000_000, seed: u32) {
            let density = Density(millionths);
            for pattern in all(density, seed) {
                prop_assert_eq!(pattern.to_string().parse(), Ok(pattern));
            }
        }

        #[test]
        fn no_text_brings_it_down(text in ".{0,40}") {
            let _ = (text.parse::<BlockPattern>(), Blocks::from_text(&text, 100, 400));
        }
    }
}
