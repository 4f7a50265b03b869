//! What a test does that needs something this machine lacks: a line that is visible although the test passes.

use std::io::Write;

/// Whether `BANDTRAIN_REQUIRE` (names, separated by commas) lists `need`.
pub fn is_required(need: &str) -> bool {
    std::env::var("BANDTRAIN_REQUIRE").is_ok_and(|names| names.split(',').any(|name| name == need))
}

/// Says that a test is skipped because `need` is missing.
///
/// # Panics
/// When `BANDTRAIN_REQUIRE` lists it.
pub fn skip(need: &str, why: &str) {
    assert!(!is_required(need), "BANDTRAIN_REQUIRE asks for {need}, but {why}");
    // Not by a print macro: the test harness keeps those to itself when a test passes.
    let _ = writeln!(std::io::stderr(), "skipped, for want of {need}: {why}");
}
