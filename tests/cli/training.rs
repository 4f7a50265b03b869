//! What a training writes, and that it means what the options say.

use crate::common::{Place, json_lines, losses, one_sentence};
use bandtrain::checkpoint::load;
use bandtrain::shapes::Param;

/// A training of a tiny model on a repeated sentence.
const TINY_RUN: &str =
    "-e tiny.bin -i train.bin -j val.bin -b 2 -t 16 -m 1 --warmup 0 -c m.safetensors --metrics m.jsonl";

#[test]
fn a_training_writes_everything_it_promises() {
    let place = Place::new();
    let line = "--preset toy -n 3 -b 2 -t 16 -v 1 -m 1 -s 2 -g 5 -c runs/m.safetensors -o log.txt --metrics m.jsonl";
    let stdout = place.ok(line);
    for part in [
        "model toy: C=128 L=4 NH=4 T=128 V=257, ",
        "  FC1 bandwidth 256: 43.896 % of its connections",
        "  FC2 dense",
        "device: CPU, ",
        "step 0/3 | validation loss ",
        "step 1/3 | train loss ",
        "step 2/3 | sample: ",
        "step 3/3 | checkpoint written to runs/m.safetensors",
        "try: bandtrain generate -e runs/m.safetensors -n 100",
    ] {
        assert!(stdout.contains(part), "'{part}' is missing:\n{stdout}");
    }
    assert!(!stdout.contains(['\r', '\u{1b}']), "a pipe gets plain lines:\n{stdout}");
    let checkpoint = load(&place.path("runs/m.safetensors")).unwrap();
    assert_eq!((checkpoint.meta.step, checkpoint.meta.tokenizer.as_deref()), (3, Some("bytes")));
    assert_eq!(checkpoint.weights.config().fc1_bandwidth, 256.into());
    assert!(place.read("runs/m.toml").contains("fc1-bandwidth = 256"));

    let records = json_lines(&place.path("m.jsonl"));
    let keys = |record: &serde_json::Map<_, _>| record.keys().cloned().collect::<Vec<String>>();
    let (validations, steps): (Vec<_>, Vec<_>) = records.iter().partition(|record| record.contains_key("val_loss"));
    for record in &validations {
        assert_eq!(sorted(keys(record)), ["step", "val_loss"]);
    }
    for record in &steps {
        let contract = ["grad_norm", "lr", "step", "step_ms", "tok_per_s", "tokens", "train_loss"];
        assert_eq!(sorted(keys(record)), contract);
    }
    let numbers = |records: &[&serde_json::Map<_, _>], key: &str| -> Vec<u64> {
        records.iter().map(|record| serde_json::Value::as_u64(&record[key]).unwrap()).collect()
    };
    assert_eq!(numbers(&validations, "step"), [0, 1, 2, 3]);
    assert_eq!(numbers(&steps, "step"), [1, 2, 3]);
    assert_eq!(numbers(&steps, "tokens"), [32, 64, 96]);

    let log = place.read("log.txt");
    let log: Vec<_> = log.lines().map(|line| line.split_once(':').unwrap().1.split_once(' ').unwrap()).collect();
    let order = ["0 tel", "1 trl", "1 tel", "2 trl", "2 tel", "3 trl", "3 tel"];
    for ((&(step, loss), expected), record) in log.iter().zip(order).zip(&records) {
        let (kind, loss) = loss.split_once(':').unwrap();
        assert_eq!(format!("{step} {kind}"), expected);
        assert!(loss.chars().filter(char::is_ascii_digit).count() >= 6, "{loss}");
        let exact = record[if kind == "tel" { "val_loss" } else { "train_loss" }].as_f64().unwrap();
        assert!((loss.parse::<f64>().unwrap() - exact).abs() < 1e-6, "{loss} {exact}");
    }
    assert_eq!(log.len(), order.len());
}

fn sorted(mut keys: Vec<String>) -> Vec<String> {
    keys.sort();
    keys
}

#[test]
fn the_resolved_options_repeat_the_run_bit_for_bit() {
    let place = Place::new();
    place.ok("--preset toy -n 3 -b 2 -t 16 -v 2 -m 2 -s 0 --seed 7 -w 64 -2 128 -c m.safetensors --metrics m.jsonl");
    let (model, train, val) = results(&place);
    let options = place.read("m.toml");
    place.ok("--config m.toml");
    assert!(results(&place) == (model, train, val) && place.read("m.toml") == options);
}

/// Checkpoint and losses of a run.
fn results(place: &Place) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
    let metrics = place.path("m.jsonl");
    (place.bytes("m.safetensors"), losses(&metrics, "train_loss"), losses(&metrics, "val_loss"))
}

#[test]
fn two_runs_are_equal_and_other_seeds_are_not() {
    let runs = ["", "", "--seed 43"].map(|options| {
        let place = Place::new();
        place.ok(&format!("--preset toy -n 2 -b 2 -t 16 -v 0 -s 0 -c m.safetensors --metrics m.jsonl {options}"));
        results(&place)
    });
    assert!(runs[0] == runs[1] && runs[0].1 != runs[2].1);
}

#[test]
fn the_command_line_wins_over_the_file() {
    let place = Place::with_model_and_data();
    let resolved = |file: &str, line: &str| {
        place.write("o.toml", format!("steps = 1\nval-every = 0\nsample-every = 0\n{file}"));
        place.ok(&format!("{TINY_RUN} --quiet --config o.toml {line}"));
        place.read("m.toml")
    };
    let toml = resolved("learning-rate = 0.5\nseed = 9", "-l 0.001");
    assert!(
        toml.contains("learning-rate = 0.001") && toml.contains("seed = 9") && toml.contains("steps = 1"),
        "{toml}"
    );
    // A recipe or a bandwidth on the command line is not undone by what the file says in more detail.
    let toml = resolved("recipe = \"stable\"\nbeta2 = 0.95\ngrad-clip = 1.0", "--recipe experiment");
    assert!(toml.contains("beta2 = 0.999") && toml.contains("grad-clip = 0.0"), "{toml}");
    let toml = resolved("dense = true\nfc1-bandwidth = 8", "-w 16");
    assert!(toml.contains("fc1-bandwidth = 16") && !toml.contains("dense = true"), "{toml}");
    let toml = resolved("dense = true\nfc1-bandwidth = 8", "");
    assert!(toml.contains("fc1-bandwidth = 0"), "{toml}");
    // A model named on the command line replaces the file's.
    let toml = resolved("preset = \"gpt2-xl\"", "");
    assert!(toml.contains("init = \"tiny.bin\"") && !toml.contains("preset"), "{toml}");
}

#[test]
fn the_experiments_flags_all_work() {
    let place = Place::with_model_and_data();
    place.ok(
        "-e tiny.bin -c out.bin -k 2 -i tr*.bin -j v*.bin -o log.txt -n 5 -b 2 -t 8 -l 1e-3 -v 2 -m 3 -s 4 -g 6 -w 24 -2 16",
    );
    let toml = place.read("out.toml");
    for line in [
        "init = \"tiny.bin\"",
        "checkpoint = \"out.bin\"",
        "checkpoint-every = 2",
        "train-data = \"tr*.bin\"",
        "val-data = \"v*.bin\"",
        "log = \"log.txt\"",
        "steps = 5",
        "batch-size = 2",
        "seq-len = 8",
        "learning-rate = 0.001",
        "val-every = 2",
        "val-batches = 3",
        "sample-every = 4",
        "sample-tokens = 6",
        "fc1-bandwidth = 24",
        "fc2-bandwidth = 16",
    ] {
        assert!(toml.lines().any(|found| found == line), "'{line}' is missing:\n{toml}");
    }
    let stdout = place.ok("-e tiny.bin -c out.bin -k 2 -i train.bin -n 1 -b 1 -s 0 -1 24 -d 0");
    assert!(stdout.contains("FC1 bandwidth 24: ") && stdout.contains("FC2 dense"), "{stdout}");
    assert!(stdout.contains("note: no validation: name validation data with -j"), "{stdout}");
}

#[test]
fn reports_come_at_the_steps_asked_for() {
    let place = Place::with_model_and_data();
    let stdout = place.ok(&format!("{TINY_RUN} -n 7 -k 3 -v 4 -s 5 -g 2"));
    let steps_of = |what: &str| -> Vec<String> {
        let lines = stdout.lines().filter(|line| line.contains(what));
        lines.map(|line| line.split(['/', ' ']).nth(1).unwrap().to_string()).collect()
    };
    assert_eq!(steps_of("| checkpoint written"), ["3", "6", "7"]);
    assert_eq!(steps_of("| validation loss"), ["0", "4", "7"]);
    assert_eq!(steps_of("| sample"), ["5", "7"]);
    assert_eq!(steps_of("| train loss").len(), 7);
    let stdout = place.ok(&format!("{TINY_RUN} -n 2 -k 0 -v 0 -s 0"));
    assert!(!stdout.contains("validation") && !stdout.contains("sample"), "0 is never:\n{stdout}");
    assert!(stdout.contains("step 2/2 | checkpoint written"), "{stdout}");
    assert_eq!(place.ok(&format!("{TINY_RUN} -n 2 --quiet")), "");
}

#[test]
fn dense_makes_everything_dense() {
    let place = Place::new();
    let stdout = place.ok("--preset toy -d 1 -w 64 -n 1 -b 1 -t 8 -v 0 -s 0 -c m.safetensors");
    assert!(stdout.contains("FC1 dense") && stdout.contains("FC2 dense"), "{stdout}");
    let config = *load(&place.path("m.safetensors")).unwrap().weights.config();
    assert_eq!((config.fc1_bandwidth, config.fc2_bandwidth), (0.into(), 0.into()));
}

#[test]
fn a_dense_model_is_banded_and_stays_so() {
    let place = Place::with_model_and_data();
    let stdout = place.ok(&format!("{TINY_RUN} -n 3 -v 0 -s 0 -w 28"));
    let note = stdout.lines().find(|line| line.starts_with("note: banding FC1 cut ")).expect("a note");
    let weights = load(&place.path("m.safetensors")).unwrap().weights;
    let (band, _) = weights.table().band(Param::Fcw, 0).unwrap();
    // Random weights: their squared norm is cut like their number.
    let cut: f64 = note.split_whitespace().nth(4).unwrap().parse().unwrap();
    assert!((cut / 100.0 - (1.0 - band.density())).abs() < 0.1, "{note} {}", band.density());
    assert!(!stdout.contains("banding FC2"), "{stdout}");
    for (index, &weight) in weights.dense(Param::Fcw, 0).iter().enumerate() {
        assert!(band.contains(index / 16, index % 16) || weight.to_bits() == 0, "weight {index} is {weight}");
    }
}

#[test]
fn a_band_that_cuts_nothing_is_noted() {
    let place = Place::with_model_and_data();
    let stdout = place.ok(&format!("{TINY_RUN} -n 1 -v 0 -s 0 -w 2147483648"));
    assert!(stdout.contains("FC1 bandwidth 2147483648 keeps every connection: the same as dense"), "{stdout}");
}

#[test]
fn one_batch_is_learnt_by_heart() {
    let place = Place::with_model_and_data();
    let one = [&place.bytes("train.bin")[..1024], &place.bytes("train.bin")[1024..1024 + 2 * 33]].concat();
    let mut one = one;
    one[8..12].copy_from_slice(&33i32.to_le_bytes());
    place.write("one.bin", one);
    place.ok(
        "-e tiny.bin -i one.bin -b 2 -n 300 -l 1e-2 --warmup 10 -s 0 -w 28 -2 28 -c m.safetensors --metrics m.jsonl",
    );
    let losses = losses(&place.path("m.jsonl"), "train_loss");
    assert!(losses[0] > 5.0 && losses[299] < 0.1, "{} -> {}", losses[0], losses[299]);
}

#[test]
fn accumulated_half_batches_are_whole_ones() {
    let place = Place::with_model_and_data();
    let curve = |sizes: &str| {
        let common =
            "-e tiny.bin -i train.bin -j val.bin -m 1 -v 1 -n 6 -s 0 --shuffle none -c m.bin --metrics m.jsonl";
        place.ok(&format!("{common} {sizes}"));
        (losses(&place.path("m.jsonl"), "train_loss"), json_lines(&place.path("m.jsonl")))
    };
    let ((whole, records), (halves, half_records)) = (curve("-b 4"), curve("-b 2 --grad-accum 2"));
    for (whole, half) in whole.iter().zip(&halves) {
        assert!((whole - half).abs() <= 2e-5 * whole, "{whole} {half}");
    }
    let tokens = |records: &[serde_json::Map<_, serde_json::Value>]| records[1]["tokens"].as_u64();
    assert_eq!((whole.len(), tokens(&records)), (6, tokens(&half_records)));
}

#[test]
fn a_training_goes_on_from_its_own_checkpoint() {
    let place = Place::with_model_and_data();
    place.ok(&format!("{TINY_RUN} -n 20 -l 1e-2 -v 20 -s 0"));
    let last = *losses(&place.path("m.jsonl"), "val_loss").last().unwrap();
    place.ok("-e m.safetensors -c m.safetensors -i train.bin -j val.bin -b 2 -m 1 -v 1 -n 1 -s 0 --metrics m.jsonl");
    assert_eq!(losses(&place.path("m.jsonl"), "val_loss")[0], last);
}

#[test]
fn the_written_toy_corpus_trains_like_the_built_in_one() {
    let place = Place::new();
    let options = "--preset toy -n 2 -b 2 -t 16 -v 1 -m 2 -s 0 -c m.safetensors --metrics m.jsonl";
    place.ok(options);
    // Not the files' bytes: each names the data it was trained on.
    let outcome = || {
        let (_, train, val) = results(&place);
        (load(&place.path("m.safetensors")).unwrap().weights.values().to_vec(), train, val)
    };
    let built_in = outcome();
    place.ok("data toy --output corpus");
    place.ok(&format!("{options} -i corpus/toy_train.bin -j corpus/toy_val.bin"));
    assert!(outcome() == built_in);
}

/// Endless: only Ctrl-C or a closed pipe ends it.
#[cfg(unix)]
const ENDLESS: &str = "-e tiny.bin -i train.bin -b 2 -v 0 -s 0 -n 2147483648 -c m.safetensors";

#[cfg(unix)]
#[test]
fn interrupting_writes_a_checkpoint_and_says_where() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::{Command, Stdio};
    let place = Place::with_model_and_data();
    let mut child = place.command(ENDLESS).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("step ") {
        line.clear();
        assert!(stdout.read_line(&mut line).unwrap() > 0, "the training ended by itself");
    }
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    stdout.read_to_string(&mut String::new()).unwrap();
    let sentence = one_sentence(&child.wait_with_output().unwrap(), 130);
    let step: u64 = sentence.split_whitespace().nth(6).unwrap().parse().expect(&sentence);
    assert_eq!(sentence, format!("bandtrain: interrupted; the checkpoint after step {step} is in m.safetensors\n"));
    assert_eq!(load(&place.path("m.safetensors")).unwrap().meta.step, step);
    place.ok("generate -e m.safetensors -n 5");
}

/// `bandtrain | tee log` must not lose the training when tee dies.
#[cfg(unix)]
#[test]
fn a_pipe_closed_during_training_leaves_a_checkpoint() {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;
    let place = Place::with_model_and_data();
    let mut child = place.command(ENDLESS).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("step ") {
        line.clear();
        assert!(stdout.read_line(&mut line).unwrap() > 0, "the training ended by itself");
    }
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
    assert!(load(&place.path("m.safetensors")).unwrap().meta.step >= 1);
}

#[cfg(unix)]
#[test]
fn a_closed_pipe_ends_the_program_quietly() {
    use std::process::Stdio;
    let place = Place::with_model_and_data();
    for line in [ENDLESS, "generate -e tiny.bin -n 2147483648 --samples 2147483648", "band -w 1024", "--help"] {
        let mut child = place.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""), "{line}");
    }
}
