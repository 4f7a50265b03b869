//! The bandwidths of one of the MLP's two layers over the depth of a model: one for all blocks, a ramp, or a list. Patterns of
//! blocks of weights may stand in a bandwidth's place.

use crate::blocks::BlockPattern;
use crate::error::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::str::FromStr;

/// The longest list; deeper models take one bandwidth or a ramp.
const MOST_LISTED: usize = 64;
/// No bandwidth in a ramp or a list is larger.
const MOST: u32 = 1 << 30;

/// Bandwidths by block. In text and in files: `1024`, a ramp from the first block to the last `1024..256`, a pattern
/// `random:0.438`, or one of them for each block `1024,512,strided:0.25,0`. 0 is dense.
// Inline and not on the heap: a model's sizes are copied as plain values everywhere.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Bandwidths {
    /// The same in every block; 0 is dense.
    Same(usize),
    /// From the first block's to the last block's in equal steps, rounded; neither is 0.
    Ramp(u32, u32),
    /// The same pattern in every block.
    Pattern(BlockPattern),
    /// One for each block.
    List(List),
}

/// What one layer keeps of its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Connections {
    /// Those of a bandwidth, in wide elements; 0 is dense.
    Band(usize),
    /// Those of a pattern of blocks.
    Pattern(BlockPattern),
}

impl Connections {
    /// All of them.
    pub const DENSE: Connections = Connections::Band(0);

    /// Whether a training exchanges them for others.
    pub fn is_learned(self) -> bool {
        matches!(self, Connections::Pattern(pattern) if pattern.is_learned())
    }
}

impl fmt::Display for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Connections::Band(bandwidth) => write!(f, "{bandwidth}"),
            Connections::Pattern(pattern) => write!(f, "{pattern}"),
        }
    }
}

impl FromStr for Connections {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match BlockPattern::is_meant_by(text) {
            true => text.parse().map(Connections::Pattern),
            false => number(text).map(|bandwidth| Connections::Band(bandwidth as usize)),
        }
    }
}

/// A bandwidth of a ramp or a list.
fn number(text: &str) -> std::result::Result<u32, String> {
    let value: Option<u32> = text.trim().parse().ok().filter(|value| *value <= MOST);
    value.ok_or_else(|| format!("it must consist of whole numbers of at most {MOST}, as in 1024..256 or 1024,512,256"))
}

/// One for each of up to 64 blocks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct List {
    len: u8,
    values: [Connections; MOST_LISTED],
}

impl List {
    fn new(listed: &[Connections]) -> std::result::Result<Self, String> {
        if listed.len() > MOST_LISTED {
            return Err(format!("a list has at most {MOST_LISTED} bandwidths; give a ramp like 1024..256"));
        }
        let mut values = [Connections::DENSE; MOST_LISTED];
        values[..listed.len()].copy_from_slice(listed);
        Ok(List { len: listed.len() as u8, values })
    }

    fn values(&self) -> &[Connections] {
        &self.values[..usize::from(self.len)]
    }
}

impl Bandwidths {
    /// Dense in every block.
    pub const DENSE: Bandwidths = Bandwidths::Same(0);

    /// What a block of a model of `blocks` blocks keeps.
    pub fn of(self, block: usize, blocks: usize) -> Connections {
        match self {
            Bandwidths::Same(bandwidth) => Connections::Band(bandwidth),
            Bandwidths::Pattern(pattern) => Connections::Pattern(pattern),
            Bandwidths::List(list) => list.values().get(block).copied().unwrap_or(Connections::DENSE),
            Bandwidths::Ramp(first, last) => {
                let (first, last) = (first as usize, last as usize);
                let steps = blocks.saturating_sub(1).max(1);
                // The mean of both ends, weighted by the distance to the other; half a step rounds up.
                let twice = 2 * (first * (steps - block.min(steps)) + last * block.min(steps));
                Connections::Band((twice + steps) / (2 * steps))
            }
        }
    }

    /// Whether every block is dense.
    pub fn is_dense(self) -> bool {
        match self {
            Bandwidths::Same(bandwidth) => bandwidth == 0,
            Bandwidths::Ramp(..) | Bandwidths::Pattern(_) => false,
            Bandwidths::List(list) => list.values().iter().all(|connections| *connections == Connections::DENSE),
        }
    }

    /// Whether any block has a pattern.
    pub fn has_patterns(self) -> bool {
        self.patterns(MOST_LISTED) > 0
    }

    /// How many blocks of a model of `blocks` blocks have a pattern.
    pub fn patterns(self, blocks: usize) -> usize {
        (0..blocks).filter(|&block| matches!(self.of(block, blocks), Connections::Pattern(_))).count()
    }

    /// Whether any block has a pattern that is learned.
    pub fn has_learned(self) -> bool {
        (0..MOST_LISTED).any(|block| self.of(block, MOST_LISTED).is_learned())
    }

    /// What they are called where it says what a layer keeps: `bandwidth 1024`, `pattern random:0.438`.
    pub fn title(self) -> String {
        match self {
            Bandwidths::Pattern(pattern) => format!("pattern {pattern}"),
            list if list.has_patterns() => format!("patterns {list}"),
            bandwidths => format!("bandwidth {bandwidths}"),
        }
    }

    /// Returns them when they fit a model of `blocks` blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] for a list of another length.
    pub fn checked(self, blocks: usize) -> Result<Self> {
        match self {
            Bandwidths::List(list) if list.values().len() != blocks => Err(Error::usage(format!(
                "the list of bandwidths {self} has {} entries, but the model has {blocks} blocks; give one for each, or a \
                 ramp like 1024..256",
                list.values().len()
            ))),
            _ => Ok(self),
        }
    }
}

impl From<usize> for Bandwidths {
    fn from(bandwidth: usize) -> Self {
        Bandwidths::Same(bandwidth)
    }
}

impl From<Connections> for Bandwidths {
    fn from(connections: Connections) -> Self {
        match connections {
            Connections::Band(bandwidth) => Bandwidths::Same(bandwidth),
            Connections::Pattern(pattern) => Bandwidths::Pattern(pattern),
        }
    }
}

impl fmt::Display for Bandwidths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bandwidths::Same(bandwidth) => write!(f, "{bandwidth}"),
            Bandwidths::Ramp(first, last) => write!(f, "{first}..{last}"),
            Bandwidths::Pattern(pattern) => write!(f, "{pattern}"),
            Bandwidths::List(list) => {
                let texts: Vec<String> = list.values().iter().map(Connections::to_string).collect();
                f.write_str(&texts.join(","))
            }
        }
    }
}

impl fmt::Debug for Bandwidths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Bandwidths {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text.contains(',') {
            return text
                .split(',')
                .map(str::parse)
                .collect::<std::result::Result<Vec<_>, _>>()
                .and_then(|listed| List::new(&listed).map(Bandwidths::List));
        }
        if BlockPattern::is_meant_by(text) {
            return text.parse().map(Bandwidths::Pattern);
        }
        if let Some((first, last)) = text.split_once("..") {
            let (first, last) = (number(first)?, number(last)?);
            return match first == 0 || last == 0 {
                true => {
                    Err("a ramp runs between bandwidths of at least 1; a list like 512,0 has dense blocks".to_string())
                }
                false => Ok(Bandwidths::Ramp(first, last)),
            };
        }
        number(text).map(|bandwidth| Bandwidths::Same(bandwidth as usize))
    }
}

impl Serialize for Bandwidths {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Bandwidths::Same(bandwidth) => serializer.serialize_u64(*bandwidth as u64),
            several => serializer.collect_str(several),
        }
    }
}

impl<'de> Deserialize<'de> for Bandwidths {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Bandwidths;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a bandwidth like 1024, a ramp like \"1024..256\", a list like \"1024,512,256\", or a pattern like \
                     \"random:0.438\"",
                )
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> std::result::Result<Bandwidths, E> {
                usize::try_from(value).map(Bandwidths::Same).map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> std::result::Result<Bandwidths, E> {
                let value = u64::try_from(value).map_err(|_| E::custom("a bandwidth must not be negative"))?;
                self.visit_u64(value)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<Bandwidths, E> {
                text.parse().map_err(|what| E::custom(format!("bandwidths of '{text}': {what}")))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(text: &str, blocks: usize) -> Vec<usize> {
        let bandwidths: Bandwidths = text.parse().unwrap();
        let bandwidth = |connections| match connections {
            Connections::Band(bandwidth) => bandwidth,
            Connections::Pattern(pattern) => panic!("{pattern}"),
        };
        (0..blocks).map(|block| bandwidth(bandwidths.of(block, blocks))).collect()
    }

    #[test]
    fn ramps_and_lists_give_each_block_its_own() {
        assert_eq!(of("1024", 3), [1024, 1024, 1024]);
        assert_eq!(of("1024..256", 4), [1024, 768, 512, 256]);
        assert_eq!(of("1..2", 4), [1, 1, 2, 2]);
        assert_eq!(of("7..9", 1), [7]);
        assert_eq!(of("8, 0,3", 3), [8, 0, 3]);
    }

    #[test]
    fn patterns_stand_where_bandwidths_do() {
        let pattern = |text: &str| Connections::Pattern(text.parse().unwrap());
        let all: Bandwidths = "random:0.25:3".parse().unwrap();
        assert_eq!((all.of(0, 2), all.of(1, 2)), (pattern("random:0.25:3"), pattern("random:0.25:3")));
        let list: Bandwidths = "64,strided:0.5,0".parse().unwrap();
        let expected = [Connections::Band(64), pattern("strided:0.5"), Connections::DENSE];
        assert_eq!([0, 1, 2].map(|block| list.of(block, 3)), expected);
        assert_eq!((all.patterns(5), list.patterns(3), Bandwidths::Ramp(1, 2).patterns(4)), (5, 1, 0));
        assert!(!all.is_dense() && !list.is_dense());
        assert_eq!([all.title(), list.title()], ["pattern random:0.25:3", "patterns 64,strided:0.5,0"]);
        assert_eq!(Bandwidths::Ramp(5, 6).title(), "bandwidth 5..6");
        let learned: Bandwidths = "64,learned:0.5:band".parse().unwrap();
        assert!(learned.has_learned() && !list.has_learned() && !all.has_learned() && !Bandwidths::DENSE.has_learned());
    }

    #[test]
    fn what_makes_no_bandwidths_is_told() {
        for (text, words) in [
            ("1024..", "whole numbers"),
            ("0..5", "a ramp runs between"),
            ("1,,2", "whole numbers"),
            ("-1,2", "whole numbers"),
            ("", "whole numbers"),
            ("64,chess:1", "there is no pattern 'chess'"),
            ("random:0.2..0.5", "the density '0.2..0.5' must lie between 0 and 1"),
            ("random", "random lacks its density"),
        ] {
            let what = text.parse::<Bandwidths>().unwrap_err();
            assert!(what.contains(words), "{text}: {what}");
        }
        assert!(vec!["1"; 65].join(",").parse::<Bandwidths>().unwrap_err().contains("at most 64"));
        let list: Bandwidths = "1,2".parse().unwrap();
        assert!(list.checked(3).unwrap_err().to_string().contains("has 2 entries, but the model has 3 blocks"));
        assert!(list.checked(2).is_ok());
    }

    proptest! {
        #[test]
        fn text_and_json_say_the_same(values in proptest::collection::vec(0u32..3000, 1..64), ramp: bool, patterns: bool) {
            let entry = |&value: &u32| match patterns && value % 2 == 1 {
                true => format!("random:0.{value}1:{value}"),
                false => value.to_string(),
            };
            let text = match (ramp, values.as_slice()) {
                (true, [first, .., last]) => format!("{}..{}", first + 1, last + 1),
                _ => values.iter().map(entry).collect::<Vec<_>>().join(","),
            };
            let bandwidths: Bandwidths = text.parse().unwrap();
            prop_assert_eq!(bandwidths.to_string(), text);
            let json = serde_json::to_string(&bandwidths).unwrap();
            prop_assert_eq!(serde_json::from_str::<Bandwidths>(&json).unwrap(), bandwidths);
        }
    }
}
