//! `sweep`: grids of runs that go on after whatever stopped them, and what they leave.

use crate::common::{Place, json_lines, one_sentence};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Five runs of a blink on the toy preset.
const GRID: &str = r#"
[train]
preset = "toy"
backend = "cpu"
batch-size = 1
seq-len = 16
steps = 4
warmup = 1
val-every = 2
val-batches = 1
sample-tokens = 3
checkpoint-every = 1

[[grid]]
pattern = ["dense", "band"]
bandwidth = [64, 128]
layers = ["fc1"]
seed = [1, 2]
"#;
const NAMES: [&str; 6] =
    ["dense-s1", "dense-s2", "band-fc1-64-s1", "band-fc1-64-s2", "band-fc1-128-s1", "band-fc1-128-s2"];

fn place(text: &str) -> Place {
    let place = Place::new();
    place.write("grid.toml", text);
    place
}

/// The rows of a CSV file without quoted commas, each with its header's names.
fn rows(place: &Place, name: &str) -> Vec<BTreeMap<String, String>> {
    let mut reader = csv::Reader::from_path(place.path(name)).unwrap();
    let header = reader.headers().unwrap().clone();
    let row = |record: csv::StringRecord| header.iter().zip(record.iter()).map(|(k, v)| (k.into(), v.into())).collect();
    reader.records().map(|record| row(record.unwrap())).collect()
}

fn number(row: &BTreeMap<String, String>, key: &str) -> f64 {
    row[key].parse().unwrap_or_else(|_| panic!("{key} is '{}'", row[key]))
}

#[test]
fn a_grid_becomes_tables_and_is_not_done_again() {
    let place = place(GRID);
    let stdout = place.ok("sweep grid.toml");
    let runs = rows(&place, "runs/grid/results.csv");
    assert_eq!(runs.iter().map(|row| row["name"].as_str()).collect::<Vec<_>>(), NAMES);
    for row in &runs {
        assert_eq!((row["status"].as_str(), row["error"].as_str(), row["joules"].as_str()), ("done", "", ""));
        assert_eq!(row["joules_note"], "a processor's energy is not measured");
        let metrics = json_lines(&place.path(&format!("runs/grid/runs/{}/metrics.jsonl", row["name"])));
        let last = metrics.last().unwrap();
        assert_eq!(
            (last["step"].as_u64(), last["val_loss"].as_f64().unwrap() as f32),
            (Some(4), number(row, "val_loss") as f32)
        );
        let seconds: f64 = metrics.iter().filter_map(|record| record.get("step_ms")?.as_f64()).sum();
        assert!((number(row, "seconds") - seconds / 1e3).abs() < 1e-9);
        assert_eq!((number(row, "tokens"), number(row, "steps")), (64.0, 4.0));
    }
    // C = 128, W = 512: the band of 128 keeps 128 of 512 wide elements of an inner column.
    assert_eq!((number(&runs[0], "mlp_density"), number(&runs[0], "fc1_density")), (1.0, 1.0));
    let (narrow, wide) = (number(&runs[2], "fc1_density"), number(&runs[4], "fc1_density"));
    assert!(narrow > 0.12 && narrow < wide && wide < 0.26, "{narrow} {wide}");
    let less = number(&runs[0], "parameters") - number(&runs[2], "parameters");
    assert_eq!(less, 4.0 * 128.0 * 512.0 - 4.0 * 128.0 * 512.0 * narrow);
    let groups = rows(&place, "runs/grid/summary.csv");
    assert_eq!(groups.len(), 3);
    let (a, b) = (number(&runs[2], "val_loss"), number(&runs[3], "val_loss"));
    assert!((number(&groups[1], "val_loss_mean") - (a + b) / 2.0).abs() < 1e-12 && a != b);
    assert!((number(&groups[1], "val_loss_deviation") - (a - b).abs() / 2f64.sqrt()).abs() < 1e-12);
    let json: Value = serde_json::from_str(&place.read("runs/grid/results.json")).unwrap();
    assert_eq!(
        (json["runs"][5]["val_loss"].as_f64(), json["groups"][2]["done"].as_u64()),
        (Some(number(&runs[5], "val_loss")), Some(2))
    );
    assert!(stdout.contains("[6/6] band-fc1-128-s2: ") && stdout.contains("2/2"), "{stdout}");

    // Every run is an ordinary run; nothing is done twice.
    place.ok("plot runs/grid/runs/dense-s1 runs/grid/runs/band-fc1-64-s1 -o both.svg");
    place.ok("generate -e runs/grid/runs/band-fc1-64-s1/model.safetensors -n 2");
    let again = place.ok("sweep grid.toml");
    assert!(again.contains("0 of 6 runs to do") && !again.contains("[1/"), "{again}");
    assert_eq!(rows(&place, "runs/grid/results.csv"), runs);
    // A longer list adds its runs to what is there.
    place.write("grid.toml", GRID.replace("seed = [1, 2]", "seed = [1, 2, 3]"));
    assert!(place.ok("sweep grid.toml --only dense").contains("1 of 9 runs to do"));
    place.mistake("sweep grid.toml -n 5", "runs/grid: holds runs of other settings (steps was 4 and is now 5)");
}

#[test]
fn a_list_of_runs_is_shown_without_running_any() {
    let place = place(GRID);
    let list = place.ok("sweep grid.toml --dry-run --output out");
    assert!(NAMES.iter().all(|name| list.contains(name)), "{list}");
    assert!(list.contains("6 of 6 runs to do; how long they take is known once one is done"), "{list}");
    assert!(!place.path("out").exists());
    place.ok("sweep grid.toml --limit 1 --output out");
    let list = place.ok("sweep grid.toml --dry-run --output out --only s1");
    assert!(list.contains("2 of 3 runs to do, about ") && list.lines().nth(1).unwrap().contains("done"), "{list}");
}

#[test]
fn the_same_bits_come_out_of_a_sweep_that_was_killed() {
    let grid = GRID.replace("steps = 4", "steps = 300").replace("val-every = 2", "val-every = 150");
    let grid = grid.replace("checkpoint-every = 1", "checkpoint-every = 50");
    let (whole, killed) = (place(&grid), place(&grid));
    let only = "sweep grid.toml --only s1";
    whole.ok(only);
    for (run, step) in [("dense-s1", 20), ("band-fc1-64-s1", 120)] {
        let mut sweep = killed.command(only).stdout(Stdio::null()).spawn().unwrap();
        let metrics = killed.path(&format!("runs/grid/runs/{run}/metrics.jsonl"));
        wait_for(&metrics, &format!("\"step\":{step},"));
        sweep.kill().unwrap();
        sweep.wait().unwrap();
        let over = killed.path(&format!("runs/grid/runs/{run}/outcome.json")).exists();
        assert!(!over, "{run} was over before it was killed");
    }
    let outcome = killed.bytes("runs/grid/runs/dense-s1/outcome.json");
    let stdout = killed.ok(only);
    assert!(stdout.contains("2 of 6 runs to do") && stdout.contains("resuming after step"), "{stdout}");
    assert_eq!(killed.bytes("runs/grid/runs/dense-s1/outcome.json"), outcome);
    for run in ["dense-s1", "band-fc1-64-s1", "band-fc1-128-s1"] {
        let file = format!("runs/grid/runs/{run}/model.safetensors");
        assert!(whole.bytes(&file) == killed.bytes(&file), "{run}");
    }
    let losses =
        |place| rows(place, "runs/grid/results.csv").iter().map(|row| row["val_loss"].clone()).collect::<Vec<_>>();
    assert_eq!(losses(&whole), losses(&killed));
}

fn wait_for(file: &Path, text: &str) {
    let start = Instant::now();
    while !fs::read_to_string(file).is_ok_and(|found| found.contains(text)) {
        assert!(start.elapsed() < Duration::from_secs(60), "{} never held {text}", file.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_sweep_says_how_to_go_on_and_keeps_others_out() {
    let place = place(&GRID.replace("steps = 4", "steps = 4000"));
    let sweep = place.command("sweep grid.toml").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&place.path("runs/grid/runs/dense-s1/metrics.jsonl"), "\"step\":5,");
    let other = place.command("sweep grid.toml").output().unwrap();
    assert!(one_sentence(&other, 2).contains("another sweep is at work in this folder"));
    assert!(Command::new("kill").args(["-INT", &sweep.id().to_string()]).status().unwrap().success());
    let output = sweep.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("the checkpoint after step") && stderr.contains("goes on with the sweep"), "{stderr}");
    assert!(place.ok("sweep grid.toml --dry-run").contains("begun"));
}

#[test]
fn a_run_that_fails_is_kept_and_the_others_go_on() {
    let grid = GRID.replace("seed = [1, 2]", "learning-rate = [1e38, 1e-3]").replace("warmup = 1", "warmup = 0");
    let place = place(&grid);
    let run = |line| place.command(line).output().unwrap();
    let stderr = one_sentence(&run("sweep grid.toml"), 2);
    assert!(stderr.contains("3 of 6 runs failed (dense-lr1e38-s42, ") && stderr.contains("--retry-failed"), "{stderr}");
    let runs = rows(&place, "runs/grid/results.csv");
    let of = |status: &str| runs.iter().filter(|row| row["status"] == status).count();
    assert_eq!((of("failed"), of("done")), (3, 3));
    assert!(runs[0]["error"].contains("diverged") && runs[0]["val_loss"].is_empty(), "{:?}", runs[0]);
    let again = run("sweep grid.toml");
    assert!(String::from_utf8_lossy(&again.stdout).contains("0 of 6 runs to do"));
    let retried = run("sweep grid.toml --retry-failed --limit 1");
    assert!(String::from_utf8_lossy(&retried.stdout).contains("[1/1] dense-lr1e38-s42"));
}

#[test]
fn checkpoints_go_where_they_are_not_kept() {
    let place = place(&GRID.replace("[train]", "keep-checkpoints = false\n[train]\nkeep = 3"));
    place.ok("sweep grid.toml --only dense-s1");
    let names = fs::read_dir(place.path("runs/grid/runs/dense-s1")).unwrap();
    let names: Vec<String> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.iter().all(|name| !name.ends_with(".safetensors")), "{names:?}");
    assert!(names.iter().any(|name| name == "samples.jsonl"), "{names:?}");
    assert!(place.ok("sweep grid.toml --only dense-s1").contains("0 of 6 runs to do"));
}

/// Learned blocks beside random ones: how they are learned varies too, and the page shows what they came to.
#[test]
fn learned_blocks_are_swept() {
    let grid = GRID
        .replace("[train]", "keep-checkpoints = false\n[train]\nlearn-every = 1\nlearn-until = 4")
        .replace("[\"dense\", \"band\"]", "[\"random\", \"learned\", \"learned-band\"]")
        .replace("bandwidth = [64, 128]", "density = [0.5]\nlearn-fraction = [0.9]")
        .replace("layers = [\"fc1\"]", "layers = [\"both\"]")
        .replace("seed = [1, 2]", "seed = [1]");
    let place = place(&grid);
    let stdout = place.ok("sweep grid.toml");
    let runs = rows(&place, "runs/grid/results.csv");
    let names = [
        "random-both-density0.5-s1",
        "learned-both-density0.5-fraction0.9-s1",
        "learned-band-both-density0.5-fraction0.9-s1",
    ];
    assert_eq!(runs.iter().map(|row| row["name"].as_str()).collect::<Vec<_>>(), names, "{stdout}");
    let learn =
        |row: &BTreeMap<String, String>| ["learn_every", "learn_fraction", "learn_until"].map(|key| row[key].clone());
    assert_eq!(learn(&runs[0]), [""; 3]);
    assert_eq!(learn(&runs[1]), ["1", "0.9", "4"]);
    assert!(runs.iter().all(|row| row["status"] == "done" && row["mlp_density"] == "0.5"));
    let json: Value = serde_json::from_str(&place.read("runs/grid/results.json")).unwrap();
    assert_eq!(json["runs"][1]["blocks"].as_object().unwrap().len(), 8);
    let page = place.read("runs/grid/report.html");
    for name in &names[1..] {
        assert!(page.contains(&format!("{name}: FC1 after training")), "{name}");
        assert!(page.contains(&format!("{name}: FC2 after training")), "{name}");
    }
    // The page is made again of the tables alone.
    place.ok("report runs/grid --output again.html");
    assert!(place.read("again.html").contains("FC2 after training"));
    place.write("grid.toml", grid.replace("learn-until = 4", "learn-fraction = 0.2"));
    place.mistake("sweep grid.toml", "[train] and [[grid]] both give learn-fraction");
}

#[test]
fn mistakes_in_the_file_are_told() {
    let changes = [
        ("pattern = [\"dense\", \"band\"]", "", "it lacks its patterns"),
        (
            "\"band\"]",
            "\"bands\"]",
            "line 15: unknown variant `bands`, expected one of `dense`, `band`, `random`, `strided`, `learned`, `learned-band`, `small-dense`",
        ),
        ("bandwidth = [64, 128]", "", "it cuts layers, but not to what; give bandwidth = [...]"),
        ("bandwidth = [64, 128]", "bandwidth = [0]", "bandwidth holds 0, which means dense"),
        (
            "bandwidth = [64, 128]",
            "bandwidth = [2000]",
            "the run band-fc1-2000-s1 is not possible: bandwidth 2000 cuts nothing",
        ),
        ("bandwidth = [64, 128]", "density = [1.5]", "density holds 1.5, but it must lie between 0 and 1"),
        ("bandwidth = [64, 128]", "bandwidth = [64]\ndensity = [0.5]", "bandwidth and density; leave one of them out"),
        ("layers = [\"fc1\"]", "", "it cuts layers, but not which"),
        ("pattern = [\"dense\", \"band\"]", "pattern = [\"dense\"]", "it cuts nothing"),
        ("seed = [1, 2]", "seed = [1, 1]", "seed holds 1 twice"),
        ("seed = [1, 2]", "learning-rate = [-1.0]", "learning-rate holds -1, but it must be above 0"),
        ("seed = [1, 2]", "seeds = [1]", "line 18: unknown field `seeds`"),
        ("preset = \"toy\"", "preset = \"toys\"", "there is no preset 'toys'"),
        ("preset = \"toy\"", "seed = 3", "[train] sets seed, but list it under [[grid]]"),
        ("preset = \"toy\"", "run = \"a\"", "[train] sets run, but every run has a folder of its own"),
        ("val-every = 2", "val-every = 0", "a sweep compares validation losses"),
        ("steps = 4", "steps = 0", "it must be at least 1"),
        ("preset = \"toy\"", "train-data = \"x.bin\"", "but not the val-data"),
        ("[[grid]]", "[[grids]]", "unknown field `grids`"),
        ("preset = \"toy\"", "learn-every = 3", "[train] sets learn-every, but no grid has the pattern learned"),
        ("seed = [1, 2]", "learn-until = [3]", "learn-until is for the patterns learned and learned-band"),
    ];
    for (old, new, words) in changes {
        assert!(GRID.contains(old), "{old}");
        let place = place(&GRID.replace(old, new));
        place.mistake("sweep grid.toml", words);
    }
    let place = place(GRID);
    place.mistake("sweep grid.toml --only nothing", "--only leaves nothing to run");
    place.mistake("sweep no.toml", "cannot open no.toml");
}

#[test]
fn the_files_of_the_repository_are_sweeps() {
    let place = Place::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/sweeps");
    let mut count = 0;
    for file in fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path()) {
        let list = place.ok(&format!("sweep {} --dry-run", file.display()));
        assert!(list.contains("runs to do"), "{}: {list}", file.display());
        count += 1;
    }
    assert!(count >= 4, "{count}");
}
