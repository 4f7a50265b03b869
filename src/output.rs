//! Standard output that may be closed at any time by its reader.

use crate::error::{Error, Result};
use std::fmt::Arguments;
use std::io::{self, Write};

/// Writes to standard output; a reader who left ends the program quietly (see [`Error::StdoutClosed`]).
///
/// # Errors
/// [`Error::StdoutClosed`], or [`Error::Io`] when the output cannot be written (a full disk behind a redirection).
pub fn write(text: Arguments<'_>) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_fmt(text).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Error::StdoutClosed,
        _ => Error::io("write to", "standard output")(error),
    })
}

/// `println!` that returns a [`Result`](crate::error::Result) instead of panicking when standard output is closed.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => { $crate::output::write(format_args!("{}\n", format_args!($($arg)*))) };
}

/// Text from a file (or an error that may cite one), fit to be shown: cut short and without control characters.
pub fn quoted(text: &str) -> String {
    format!("'{}'", shortened(text, 60))
}

/// Words that may cite a file at length: cut after `most` characters and without control characters.
pub fn shortened(text: &str, most: usize) -> String {
    let shown = |character: char| match character.is_control() {
        true => character.escape_debug().to_string(),
        false => character.to_string(),
    };
    let dots = if text.chars().nth(most).is_some() { "..." } else { "" };
    text.chars().take(most).map(shown).chain([dots.to_string()]).collect()
}

/// A count with commas between the thousands.
pub fn grouped(count: usize) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A loss with six decimals, or more where that is fewer than six significant digits.
pub fn loss(value: f32) -> String {
    let zeros = if value == 0.0 { 0.0 } else { -value.abs().log10().floor() - 1.0 };
    format!("{value:.*}", 6 + zeros.clamp(0.0, 12.0) as usize)
}

/// Bytes in the unit that suits them.
pub fn bytes(count: usize) -> String {
    let mut value = count as f64;
    for unit in ["B", "KiB", "MiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.2} GiB")
}

/// Joules in the unit that suits them.
pub fn joules(value: f64) -> String {
    if value < 1e3 { format!("{value:.0} J") } else { format!("{:.1} kJ", value / 1e3) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_losses_keep_their_digits() {
        assert_eq!([5.5, 0.25, 0.1, 0.0].map(loss), ["5.500000", "0.250000", "0.100000", "0.000000"]);
        assert_eq!([0.012345678, 0.000123456].map(loss), ["0.0123457", "0.000123456"]);
        assert_eq!(loss(f32::NAN), "NaN");
    }

    #[test]
    fn text_from_files_is_cut_short() {
        assert_eq!(quoted("a\n\u{1b}"), r"'a\n\u{1b}'");
        assert_eq!(quoted(&"ä".repeat(60)), format!("'{}'", "ä".repeat(60)));
        assert_eq!(quoted(&"ä".repeat(61)), format!("'{}...'", "ä".repeat(60)));
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!([0, 999, 1000, 51_237_888].map(grouped), ["0", "999", "1,000", "51,237,888"]);
        assert_eq!([512, 1536, 5 << 20, 3 << 30].map(bytes), ["512 B", "1.5 KiB", "5.0 MiB", "3.00 GiB"]);
    }
}
