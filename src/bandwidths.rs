//! The bandwidths of one of the MLP's two layers over the depth of a model: one for all blocks, a ramp, or a list.

use crate::error::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::str::FromStr;

/// The longest list; deeper models take one bandwidth or a ramp.
const MOST_LISTED: usize = 64;
/// No bandwidth in a ramp or a list is larger.
const MOST: u32 = 1 << 30;

/// Bandwidths by block. In text and in files: `1024`, a ramp from the first block to the last `1024..256`, or one for each
/// block `1024,512,512,0`. 0 is dense.
// Inline and not on the heap: a model's sizes are copied as plain values everywhere.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Bandwidths {
    /// The same in every block; 0 is dense.
    Same(usize),
    /// From the first block's to the last block's in equal steps, rounded; neither is 0.
    Ramp(u32, u32),
    /// One for each block.
    List(List),
}

/// A bandwidth for each of up to 64 blocks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct List {
    len: u8,
    values: [u32; MOST_LISTED],
}

impl List {
    fn values(&self) -> &[u32] {
        &self.values[..usize::from(self.len)]
    }
}

impl Bandwidths {
    /// Dense in every block.
    pub const DENSE: Bandwidths = Bandwidths::Same(0);

    /// The bandwidth of a block of a model of `blocks` blocks.
    pub fn of(self, block: usize, blocks: usize) -> usize {
        match self {
            Bandwidths::Same(bandwidth) => bandwidth,
            Bandwidths::List(list) => list.values().get(block).map_or(0, |&bandwidth| bandwidth as usize),
            Bandwidths::Ramp(first, last) => {
                let (first, last) = (first as usize, last as usize);
                let steps = blocks.saturating_sub(1).max(1);
                // The mean of both ends, weighted by the distance to the other; half a step rounds up.
                (2 * (first * (steps - block.min(steps)) + last * block.min(steps)) + steps) / (2 * steps)
            }
        }
    }

    /// Whether every block is dense.
    pub fn is_dense(self) -> bool {
        match self {
            Bandwidths::Same(bandwidth) => bandwidth == 0,
            Bandwidths::Ramp(..) => false,
            Bandwidths::List(list) => list.values().iter().all(|&bandwidth| bandwidth == 0),
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

impl fmt::Display for Bandwidths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bandwidths::Same(bandwidth) => write!(f, "{bandwidth}"),
            Bandwidths::Ramp(first, last) => write!(f, "{first}..{last}"),
            Bandwidths::List(list) => {
                let texts: Vec<String> = list.values().iter().map(u32::to_string).collect();
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
        let number = |text: &str| {
            let value: Option<u32> = text.trim().parse().ok().filter(|value| *value <= MOST);
            value.ok_or_else(|| {
                format!("it must consist of whole numbers of at most {MOST}, as in 1024..256 or 1024,512,256")
            })
        };
        if let Some((first, last)) = text.split_once("..") {
            let (first, last) = (number(first)?, number(last)?);
            return match first == 0 || last == 0 {
                true => {
                    Err("a ramp runs between bandwidths of at least 1; a list like 512,0 has dense blocks".to_string())
                }
                false => Ok(Bandwidths::Ramp(first, last)),
            };
        }
        if !text.contains(',') {
            return number(text).map(|bandwidth| Bandwidths::Same(bandwidth as usize));
        }
        let listed = text.split(',').map(number).collect::<std::result::Result<Vec<_>, _>>()?;
        if listed.len() > MOST_LISTED {
            return Err(format!("a list has at most {MOST_LISTED} bandwidths; give a ramp like 1024..256"));
        }
        let mut values = [0; MOST_LISTED];
        values[..listed.len()].copy_from_slice(&listed);
        Ok(Bandwidths::List(List { len: listed.len() as u8, values }))
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
                f.write_str("a bandwidth like 1024, a ramp like \"1024..256\", or a list like \"1024,512,256\"")
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
        (0..blocks).map(|block| bandwidths.of(block, blocks)).collect()
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
    fn what_makes_no_bandwidths_is_told() {
        for (text, words) in [
            ("1024..", "whole numbers"),
            ("0..5", "a ramp runs between"),
            ("1,,2", "whole numbers"),
            ("-1,2", "whole numbers"),
            ("", "whole numbers"),
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
        fn text_and_json_say_the_same(values in proptest::collection::vec(0u32..3000, 1..64), ramp: bool) {
            let text = match (ramp, values.as_slice()) {
                (true, [first, .., last]) => format!("{}..{}", first + 1, last + 1),
                _ => values.iter().map(u32::to_string).collect::<Vec<_>>().join(","),
            };
            let bandwidths: Bandwidths = text.parse().unwrap();
            prop_assert_eq!(bandwidths.to_string(), text);
            let json = serde_json::to_string(&bandwidths).unwrap();
            prop_assert_eq!(serde_json::from_str::<Bandwidths>(&json).unwrap(), bandwidths);
        }
    }
}
