//! Loss spikes: updates that are left out, told everywhere, and the same after a resume.

use crate::common::{Place, json_lines, one_sentence, token_file};
use std::fs;

const RUN: &str = "-e tiny.bin -i spiked.bin -b 2 -t 16 -v 0 -s 0 -l 1e-2 --schedule constant --shuffle none -c m.safetensors \
    --metrics m.jsonl";

/// Batches of a sentence, and as the 151st one of noise.
fn place() -> Place {
    let place = Place::with_model_and_data();
    let sentence: Vec<u16> = "One day a cat sat on a mat. It was ok. ".bytes().map(u16::from).collect();
    let mut tokens: Vec<u16> = sentence.iter().copied().cycle().take(32 * 180 + 1).collect();
    for (index, token) in tokens[32 * 150..32 * 151].iter_mut().enumerate() {
        *token = (index * 89 % 256) as u16;
    }
    place.write("spiked.bin", token_file(&tokens));
    place
}

/// The steps whose updates were skipped, with the reasons.
fn skipped(place: &Place) -> Vec<(u64, String)> {
    let records = json_lines(&place.path("m.jsonl")).into_iter();
    let skip = |record: serde_json::Map<String, serde_json::Value>| {
        Some((record["step"].as_u64()?, record.get("skipped")?.as_str()?.to_string()))
    };
    records.filter_map(skip).collect()
}

#[test]
fn a_spike_is_skipped_and_told_everywhere() {
    let place = place();
    let stdout = place.ok(&format!("{RUN} -n 170 --skip-loss-zscore 6"));
    let skips = skipped(&place);
    assert!(skips.len() == 1 && skips[0].0 == 151 && skips[0].1.starts_with("the loss's z-score is "), "{skips:?}");
    assert!(stdout.contains("step 151/170 | update skipped: the loss's z-score is "), "{stdout}");
    assert!(stdout.contains("\nskipped 1 of 170 updates as spikes\n"), "{stdout}");
    // The same by the gradient norm; and nothing by default.
    place.ok(&format!("{RUN} -n 151 --skip-grad-zscore 5"));
    assert!(skipped(&place)[0].1.starts_with("the gradient norm's z-score is "), "{:?}", skipped(&place));
    let stdout = place.ok(&format!("{RUN} -n 152 --skip-loss-zscore 0"));
    assert!(skipped(&place).is_empty() && !stdout.contains("skip"), "{stdout}");
}

#[test]
fn a_resumed_run_skips_the_same_updates() {
    let (whole, resumed) = (place(), place());
    let run = |steps: usize| format!("{RUN} -n {steps} --skip-loss-zscore 6 --skip-grad-zscore 8");
    whole.ok(&run(170));
    for steps in [60, 145, 151, 170] {
        resumed.ok(&format!("{} --resume", run(steps)));
    }
    assert!(skipped(&whole) == skipped(&resumed) && skipped(&whole).len() == 1);
    assert!(whole.bytes("m.safetensors") == resumed.bytes("m.safetensors"));
    resumed.mistake(&format!("{RUN} -n 171 --resume"), "skip-loss-zscore was 6.0 and is now nothing");
}

/// Weights that made every loss NaN cannot be skipped away.
#[test]
fn a_run_that_stays_broken_ends() {
    let place = place();
    let run = RUN.replace("-l 1e-2", "-l 1e30");
    let output = place.command(&format!("{run} -n 50 --skip-grad-zscore 5 --quiet")).output().unwrap();
    let sentence = one_sentence(&output, 2);
    assert!(sentence.contains("the training diverged: at step 12 "), "{sentence}");
    assert!(sentence.contains(", and 10 updates before it were skipped; "), "{sentence}");
    assert_eq!(skipped(&place).len(), 10);
    assert!(!fs::exists(place.path("m.safetensors")).unwrap());
}

#[test]
fn thresholds_are_numbers() {
    let place = place();
    place.mistake(&format!("{RUN} --skip-loss-zscore -1"), "it must be 0 or more");
    place.mistake(&format!("{RUN} --skip-grad-zscore high"), "it must be a number");
}
