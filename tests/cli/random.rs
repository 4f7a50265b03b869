//! Random words and files of options: an error of the user's kind, never a panic, never an internal fault.
//!
//! The parsers run inside this process. A precision that the CPU lacks keeps what happens to be valid from training; it is
//! asked for on the command line, which wins over every file.

use bandtrain::cli;
use proptest::prelude::*;
use std::ffi::OsString;
use std::fs;

/// What `bandtrain train` says of these words, which must not ask for help.
fn verdict(words: &[String]) -> String {
    let fixed = ["bandtrain", "train", "--backend=cpu", "--precision=bf16"].map(String::from);
    let error = cli::run(fixed.iter().chain(words).map(OsString::from)).expect_err("this precision does not exist");
    assert_eq!(error.exit_code(), 2, "{words:?}: {error}");
    error.to_string()
}

/// Whether the words got past the parser, to the device.
fn accepted(words: &[String]) -> bool {
    verdict(words).contains("computes in fp32 only")
}

const OPTIONS: &str = "preset = \"toy\"\nsteps = 3\nbatch-size = 2\nlearning-rate = 0.003\nschedule = \"wsd\"\nbeta1 = 0.9\n\
                       dense = true\ntrain-data = \"x*.bin\"\nlog = \"log\"\nseed = 7\n";

fn accepted_file(bytes: &[u8]) -> bool {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("o.toml");
    fs::write(&path, bytes).unwrap();
    accepted(&[format!("--config={}", path.display())])
}

#[test]
fn the_untouched_options_are_accepted() {
    assert!(accepted(&[]) && accepted_file(OPTIONS.as_bytes()) && !accepted_file(b"stepz = 3"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_words_never_panic(words in proptest::collection::vec("-{0,2}[a-gi-z0-9=.é\n-]{0,8}", 0..5)) {
        verdict(&words);
    }

    #[test]
    fn counts_are_what_they_say(text in "[0-9]{0,12}|-?[0-9.e+]{0,6}|\\PC{0,6}") {
        let valid = text.parse::<u64>().is_ok_and(|value| (1..=1 << 31).contains(&value));
        prop_assert_eq!(accepted(&[format!("--batch-size={text}")]), valid);
    }

    #[test]
    fn bandwidths_are_what_they_say(
        text in "[0-9]{0,12}|[0-9]{0,4}\\.\\.[0-9]{0,4}|-?[0-9.e,]{0,6}",
    ) {
        let count = |text: &str| text.parse::<u64>().is_ok_and(|value| value <= 1 << 31);
        let valid = match text.split_once("..") {
            // A ramp has no dense end.
            Some((first, last)) => [first, last].iter().all(|end| count(end) && !end.trim_start_matches('0').is_empty()),
            None => text.split(',').all(count),
        };
        prop_assert_eq!(accepted(&[format!("--fc1-bandwidth={text}")]), valid);
    }

    #[test]
    fn numbers_are_what_they_say(text in "-?[0-9]{0,3}(\\.[0-9]{0,3})?(e-?[0-9]{0,3})?|inf|NaN|\\PC{0,6}") {
        let valid = text.parse::<f64>().is_ok_and(|value| value.is_finite() && value > 0.0);
        prop_assert_eq!(accepted(&[format!("--learning-rate={text}")]), valid);
        let valid = text.parse::<f64>().is_ok_and(|value| (0.0..1.0).contains(&value));
        prop_assert_eq!(accepted(&[format!("--beta2={text}")]), valid);
    }

    #[test]
    fn values_in_files_obey_the_command_lines_rules(value in any::<i64>()) {
        let valid = (1..=1 << 31).contains(&value);
        prop_assert_eq!(accepted_file(format!("batch-size = {value}").as_bytes()), valid);
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        accepted_file(&bytes);
    }

    #[test]
    fn wounded_options_never_panic(at in 0..OPTIONS.len(), byte in any::<u8>(), cut in any::<bool>()) {
        let mut bytes = OPTIONS.as_bytes().to_vec();
        bytes[at] = byte;
        accepted_file(if cut { &bytes[..at] } else { &bytes });
    }
}
