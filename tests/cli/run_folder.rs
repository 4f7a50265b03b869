//! `--run`: a folder with everything about a run, which other programs read too.

use crate::common::{Place, json_lines};
use crate::skip::{is_required, skip};
use bandtrain::checkpoint::load_with_moments;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const RUN: &str =
    "-e tiny.bin -i train.bin -j val.bin -b 2 -t 16 --schedule constant -v 2 -m 1 -s 2 -g 4 -k 2 --keep 2";

/// The names in a folder of the place, TensorBoard's files without their times.
fn names(place: &Place, folder: &str) -> Vec<String> {
    let entries = fs::read_dir(place.path(folder)).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names.iter().map(|name| name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.').to_string()).collect()
}

#[test]
fn a_folder_holds_everything_about_a_run() {
    let place = Place::with_model_and_data();
    let stdout = place.ok(&format!("{RUN} -n 5 --run runs/a"));
    let files = [
        "events.out.tfevents",
        "metrics.jsonl",
        "model-00000004.safetensors",
        "model.safetensors",
        "run.toml",
        "samples.jsonl",
        "starts.jsonl",
    ];
    assert_eq!(names(&place, "runs/a"), files);
    assert_eq!(load_with_moments(&place.path("runs/a/model.safetensors")).unwrap().0.meta.step, 5);
    let steps = |file: &str| -> Vec<u64> {
        json_lines(&place.path(file)).iter().map(|record| record["step"].as_u64().unwrap()).collect()
    };
    assert_eq!(steps("runs/a/metrics.jsonl"), [0, 1, 2, 2, 3, 4, 4, 5, 5]);
    assert_eq!(steps("runs/a/samples.jsonl"), [2, 4, 5]);
    for sample in json_lines(&place.path("runs/a/samples.jsonl")) {
        let text = sample["sample"].as_str().unwrap().replace('\n', "\n    ");
        assert!(stdout.contains(&format!("step {}/5 | sample: {text}\n", sample["step"])), "{stdout}");
    }
    let start = &json_lines(&place.path("runs/a/starts.jsonl"))[0];
    let version = place.ok("--version");
    assert_eq!(format!("bandtrain {}\n", start["version"].as_str().unwrap()), version);
    assert!(start["device"].as_str().unwrap().starts_with("CPU, ") && start["time"].as_str().unwrap().ends_with('Z'));
    assert!(stdout.contains("see: bandtrain plot runs/a --output runs/a/plot.svg"), "{stdout}");
    place.ok("plot runs/a --output runs/a/plot.svg");
    let picture = place.read("runs/a/plot.svg");
    assert!(picture.contains(">a</text>") && !picture.contains("not in these files"), "{picture}");
}

#[test]
fn a_run_goes_on_in_its_folder_and_in_no_other_way() {
    let (whole, resumed) = (Place::with_model_and_data(), Place::with_model_and_data());
    whole.ok(&format!("{RUN} -n 8 --run a"));
    whole.mistake("--config a/run.toml", "a: holds a run already");
    resumed.ok(&format!("{RUN} -n 8 --run a --resume"));
    // As if it had been killed after step 6: what came later is void.
    for name in ["model.safetensors", "run.toml"] {
        fs::remove_file(resumed.path("a").join(name)).unwrap();
    }
    resumed.ok(&format!("{RUN} -n 8 --run a --resume"));
    assert!(resumed.bytes("a/model.safetensors") == whole.bytes("a/model.safetensors"));
    assert_eq!(resumed.read("a/samples.jsonl"), whole.read("a/samples.jsonl"));
    let losses = |place: &Place| -> Vec<(u64, Option<f64>, Option<f64>)> {
        let number = |record: &serde_json::Map<String, Value>, key: &str| record.get(key).and_then(Value::as_f64);
        let records = json_lines(&place.path("a/metrics.jsonl"));
        let losses = |record| (number(record, "train_loss"), number(record, "val_loss"));
        records.iter().map(|record| (record["step"].as_u64().unwrap(), losses(record).0, losses(record).1)).collect()
    };
    assert_eq!(losses(&resumed), losses(&whole));
    let starts: Vec<_> =
        json_lines(&resumed.path("a/starts.jsonl")).iter().map(|start| start["step"].clone()).collect();
    assert_eq!(starts, [0, 6]);
    assert_eq!(names(&resumed, "a").iter().filter(|name| name.contains("tfevents")).count(), 2);
    // The resolved options name the folder, and that the run was asked to go on.
    let stdout = resumed.ok("--config a/run.toml");
    assert!(stdout.contains("resuming after step 8 from a/model.safetensors"), "{stdout}");
    resumed.mistake(&format!("{RUN} -n 8 --run a"), "a: holds a run already; go on with it with --resume");
    resumed.ok("--config a/run.toml --run b");
    assert!(resumed.bytes("b/model.safetensors") == whole.bytes("a/model.safetensors"));
    resumed.ok("--config a/run.toml -c alone.safetensors");
    assert!(!resumed.path("alone.jsonl").exists() && resumed.path("alone.toml").exists());
}

#[test]
fn the_folder_stands_for_its_newest_checkpoint() {
    let place = Place::with_model_and_data();
    place.ok(&format!("{RUN} -n 5 --run a"));
    let said = |model: &str| place.ok(&format!("generate -e {model} -n 9 --seed 3"));
    assert_eq!(said("a"), said("a/model.safetensors"));
    place.ok("convert -i a -o a-hf --to hf");
    assert_eq!(said("a-hf"), said("a"));
    // The moments would be lost with it.
    place.mistake("convert -i a/model.safetensors -o a --to hf", "a: holds a run, whose model.safetensors would be");
    place.mistake("convert -i tiny.bin -o tiny.bin --to llmc-bf16", "tiny.bin: is the input and would be overwritten");
}

#[test]
fn the_folder_has_its_own_names() {
    let place = Place::with_model_and_data();
    for other in ["-c m.safetensors", "--metrics m.jsonl"] {
        place.mistake(&format!("{RUN} -n 2 --run a {other}"), "cannot be used with");
    }
    place.write("o.toml", "run = \"a\"\nmetrics = \"m.jsonl\"");
    place.mistake("--config o.toml", "o.toml: ");
    place.write("file", "");
    place.mistake(&format!("{RUN} -n 2 --run file"), "file");
    fs::create_dir(place.path("a")).unwrap();
    fs::rename(place.path("train.bin"), place.path("a/metrics.jsonl")).unwrap();
    let line = format!("{RUN} -n 2 --run a").replace("train.bin", "a/metrics.jsonl");
    place.mistake(&line, "a/metrics.jsonl: is an input of the training and would be overwritten");
}

/// Values as TensorBoard's reader finds them, after a run that lost steps and went on.
#[test]
fn tensorboard_reads_the_events() {
    let Some(python) = tensorboard() else { return };
    let place = Place::with_model_and_data();
    place.ok(&format!("{RUN} -n 9 --run a"));
    fs::remove_file(place.path("a/model.safetensors")).unwrap();
    // What the lost steps had told is told again, and counts once.
    place.ok(&format!("{RUN} -n 9 --run a --resume"));
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tensorboard/reader.py");
    let output = Command::new(python).arg(script).arg(place.path("a")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read: Value = serde_json::from_slice(&output.stdout).unwrap();
    let metrics = json_lines(&place.path("a/metrics.jsonl"));
    for (tag, key) in [
        ("loss/train", "train_loss"),
        ("loss/validation", "val_loss"),
        ("learning_rate", "lr"),
        ("gradient_norm", "grad_norm"),
        ("tokens_per_second", "tok_per_s"),
    ] {
        let values = metrics.iter().filter_map(|record| Some((record["step"].as_u64()?, record.get(key)?.as_f64()?)));
        let expected: Vec<(u64, f32)> = values.map(|(step, value)| (step, value as f32)).collect();
        let pairs = read["scalars"][tag].as_array().unwrap().iter();
        let found: Vec<(u64, f32)> =
            pairs.map(|pair| (pair[0].as_u64().unwrap(), pair[1].as_f64().unwrap() as f32)).collect();
        assert_eq!(found, expected, "{tag}");
    }
    let samples = json_lines(&place.path("a/samples.jsonl")).into_iter();
    let samples: Vec<_> = samples.map(|sample| (sample["step"].clone(), sample["sample"].clone())).collect();
    let texts = read["texts"].as_array().unwrap().iter().map(|text| (text[0].clone(), text[1].clone()));
    assert_eq!(texts.collect::<Vec<_>>(), samples);
}

/// The Python that has TensorBoard; installed first when it is demanded.
fn tensorboard() -> Option<PathBuf> {
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tensorboard");
    let python = venv.join("bin/python");
    let run = |program: &Path, arguments: &[&str]| {
        Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
    };
    let has_it = || run(&python, &["-c", "import tensorboard"]);
    if is_required("tensorboard") && !has_it() {
        assert!(run(Path::new("python3"), &["-m", "venv", venv.to_str().unwrap()]), "python3 -m venv failed");
        assert!(run(&python, &["-m", "pip", "install", "-q", "--no-cache-dir", "tensorboard"]), "pip failed");
    }
    if !has_it() {
        let why = "it is not in target/tensorboard; BANDTRAIN_REQUIRE=tensorboard installs it";
        skip("tensorboard", why);
        return None;
    }
    Some(python)
}

/// Who reads only what `bandtrain train --help` says about long runs can follow it word for word.
#[test]
fn the_help_on_long_runs_works() {
    let place = Place::with_model_and_data();
    let help = place.ok("train --help");
    let (_, long_runs) = help.split_once("Long runs:").unwrap();
    let commands: Vec<_> = long_runs.lines().filter_map(|line| line.strip_prefix("  bandtrain ")).collect();
    assert_eq!(commands.len(), 3, "{long_runs}");
    let train = commands[0].replace("-n 100000", "-n 3 --preset toy -b 2 -t 16 -m 1");
    place.ok(&train);
    let stdout = place.ok(&train);
    assert!(stdout.contains("resuming after step 3 from runs/a/model.safetensors"), "{stdout}");
    place.ok(commands[1]);
    place.ok(commands[2]);
    assert!(place.path("a.png").exists() && place.path("a-hf/config.json").exists());
    assert!(
        place.ok("--help").contains("'bandtrain train --help' shows how to start, interrupt, resume, plot and export")
    );
}
