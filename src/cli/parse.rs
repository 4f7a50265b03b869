//! Values on the command line, each with a sentence for what it must not be.

use crate::bandwidths::{Bandwidths, Connections};
use crate::blocks::BlockPattern;

/// What no count on the command line exceeds: an honest run is far below, a slip of the keyboard far above.
const MOST: u64 = 1 << 31;

fn whole(text: &str) -> Result<u64, String> {
    let value: u64 = text.parse().map_err(|_| {
        if text.starts_with('-') {
            "it must not be negative".to_string()
        } else if text.parse::<f64>().is_ok() {
            "it must be a whole number".to_string()
        } else {
            "it must be a whole number, digits only".to_string()
        }
    })?;
    if value > MOST { Err(format!("it must be at most {MOST}")) } else { Ok(value) }
}

/// A count that may be 0.
pub fn count(text: &str) -> Result<usize, String> {
    whole(text).map(|value| value as usize)
}

/// A count of at least 1.
pub fn positive(text: &str) -> Result<usize, String> {
    match count(text)? {
        0 => Err("it must be at least 1".to_string()),
        value => Ok(value),
    }
}

/// A number of steps that may be 0.
pub fn steps(text: &str) -> Result<u64, String> {
    whole(text)
}

/// A number of steps of at least 1.
pub fn positive_steps(text: &str) -> Result<u64, String> {
    positive(text).map(|value| value as u64)
}

/// A seed.
pub fn seed(text: &str) -> Result<u64, String> {
    text.parse::<u32>().map(u64::from).map_err(|_| format!("it must be a whole number from 0 to {}", u32::MAX))
}

/// A switch as the experiment writes it.
pub fn switch(text: &str) -> Result<bool, String> {
    match text {
        "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err("it must be 1 (on) or 0 (off)".to_string()),
    }
}

/// A bandwidth: 0 is dense.
pub fn bandwidth(text: &str) -> Result<usize, String> {
    count(text).map_err(|problem| format!("a bandwidth counts connections: {problem} (0 is dense)"))
}

/// What one layer keeps: a bandwidth, or a pattern like random:0.438.
pub fn connections(text: &str) -> Result<Connections, String> {
    match BlockPattern::is_meant_by(text) {
        true => text.parse(),
        false => bandwidth(text).map(Connections::Band),
    }
}

/// What a layer keeps that is not dense: a bandwidth of at least 1, or a pattern.
pub fn some_connections(text: &str) -> Result<Connections, String> {
    match BlockPattern::is_meant_by(text) {
        true => text.parse(),
        false => positive(text).map(Connections::Band),
    }
}

/// Bandwidths over the depth: one, a ramp 1024..256, a pattern random:0.438, or a list 1024,512,random:0.25.
pub fn bandwidths(text: &str) -> Result<Bandwidths, String> {
    match text.contains(',') || text.contains("..") {
        true => text.parse(),
        false => connections(text).map(Bandwidths::from),
    }
}

fn finite(text: &str) -> Result<f64, String> {
    text.parse::<f64>().ok().filter(|value| value.is_finite()).ok_or_else(|| "it must be a number".to_string())
}

fn number(text: &str, holds: impl Fn(f64) -> bool, problem: &str) -> Result<f64, String> {
    let value = finite(text)?;
    if holds(value) { Ok(value) } else { Err(problem.to_string()) }
}

/// A number of 0 or more.
pub fn not_negative(text: &str) -> Result<f64, String> {
    number(text, |value| value >= 0.0, "it must be 0 or more")
}

/// A number above 0.
pub fn above_zero(text: &str) -> Result<f64, String> {
    number(text, |value| value > 0.0, "it must be above 0")
}

/// A number of at least 0 and below 1: the decay of a running average.
pub fn below_one(text: &str) -> Result<f64, String> {
    number(text, |value| (0.0..1.0).contains(&value), "it must be at least 0 and below 1")
}

/// A share between 0 and 1, neither of them.
pub fn share(text: &str) -> Result<f64, String> {
    number(text, |value| value > 0.0 && value < 1.0, "it must lie between 0 and 1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_bandwidth_is_told() {
        assert_eq!(bandwidth("1024"), Ok(1024));
        assert!(bandwidth("-5").unwrap_err().contains("negative"));
        assert!(bandwidth("1.5").unwrap_err().contains("whole"));
        assert!(bandwidth("wide").unwrap_err().contains("digits"));
        assert!(bandwidth("99999999999").unwrap_err().contains("at most"));
    }

    #[test]
    fn ranges_hold() {
        assert!(positive("0").is_err() && below_one("1").is_err() && share("0").is_err() && above_zero("0").is_err());
        assert!(not_negative("nan").is_err() && not_negative("-1").is_err() && not_negative("inf").is_err());
        assert_eq!((positive("7"), below_one("0.95"), not_negative("0")), (Ok(7), Ok(0.95), Ok(0.0)));
    }
}
