//! How often something is done in a training: by steps or by time.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// No interval is longer: an honest run is far below, a slip of the keyboard far above.
const MOST_STEPS: u64 = 1 << 31;
const MOST_TIME: Duration = Duration::from_secs(366 * 24 * 3600);

/// An interval in steps or in time. In text and in TOML: `500`, or `90s`, `10m`, `1h 30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Every {
    /// After each multiple of this many steps; 0 is never.
    Steps(u64),
    /// After the first step that ends this long after the last time.
    Time(Duration),
}

impl Every {
    /// Whether it is time again after `step`, with `since` the time since the last time.
    pub fn is_due(self, step: u64, since: Duration) -> bool {
        match self {
            Every::Steps(0) => false,
            Every::Steps(steps) => step.is_multiple_of(steps),
            Every::Time(time) => since >= time,
        }
    }
}

impl fmt::Display for Every {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Every::Steps(steps) => steps.fmt(f),
            Every::Time(time) => humantime::format_duration(*time).fmt(f),
        }
    }
}

impl FromStr for Every {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "it must be a number of steps, or a time such as 90s, 10m or 1h";
        if text.starts_with('-') {
            return Err(format!("it must not be negative; {FORM}"));
        }
        if let Ok(steps) = text.parse() {
            let within = steps <= MOST_STEPS;
            return within.then_some(Every::Steps(steps)).ok_or(format!("it must be at most {MOST_STEPS} steps"));
        }
        match humantime::parse_duration(text) {
            Err(_) => Err(FORM.to_string()),
            Ok(time) if time.is_zero() => Err("a time must be above 0; for never give 0 steps".to_string()),
            Ok(time) if time > MOST_TIME => Err("it must be at most a year".to_string()),
            Ok(time) => Ok(Every::Time(time)),
        }
    }
}

impl Serialize for Every {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Every::Steps(steps) => serializer.serialize_u64(*steps),
            Every::Time(_) => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Every {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Visitor)
    }
}

struct Visitor;

impl de::Visitor<'_> for Visitor {
    type Value = Every;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of steps, or a time such as \"10m\"")
    }

    fn visit_u64<E: de::Error>(self, steps: u64) -> Result<Every, E> {
        steps.to_string().parse().map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, steps: i64) -> Result<Every, E> {
        steps.to_string().parse().map_err(E::custom)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Every, E> {
        text.parse().map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_times_are_read_and_written() {
        for (text, every) in [
            ("0", Every::Steps(0)),
            ("500", Every::Steps(500)),
            ("90s", Every::Time(Duration::from_secs(90))),
            ("10m", Every::Time(Duration::from_secs(600))),
            ("1h 30m", Every::Time(Duration::from_secs(5400))),
        ] {
            assert_eq!(text.parse(), Ok(every));
            assert_eq!(every.to_string().parse(), Ok(every));
        }
        for wrong in ["", "-1", "soon", "1.5", "10x", "0s", "99999999999", "2years", "18446744073709551616d"] {
            assert!(wrong.parse::<Every>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn due_by_steps_or_by_time() {
        let second = Duration::from_secs(1);
        let due = |every: Every| [4, 5, 6].map(|step| every.is_due(step, second));
        assert_eq!(due(Every::Steps(0)), [false; 3]);
        assert_eq!(due(Every::Steps(5)), [false, true, false]);
        assert_eq!(due(Every::Time(second)), [true; 3]);
        assert_eq!(due(Every::Time(2 * second)), [false; 3]);
    }
}
