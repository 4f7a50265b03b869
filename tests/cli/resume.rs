//! `--resume`: a run that was interrupted, however rudely, ends with the same bits as one that was not.

use crate::common::{Place, json_lines};
use std::fs;
use std::process::Stdio;
use std::time::Duration;

/// A run with everything that has to be carried on: accumulation, a schedule, validations, samples, reports.
const RUN: &str = "-e tiny.bin -i train.bin -j val.bin -b 2 -t 16 -n 300 -k 7 -v 50 -m 1 -s 100 -g 4 --grad-accum 2 \
                   --schedule cosine --warmup 3 --metrics m.jsonl -o log -c m.safetensors";

fn short(steps: usize) -> String {
    RUN.replace("-n 300", &format!("-n {steps}")).replace("cosine", "constant")
}

/// What a run leaves: checkpoint, log, and the metrics without times.
fn results(place: &Place) -> (Vec<u8>, Vec<u8>, Vec<String>) {
    let timeless = json_lines(&place.path("m.jsonl")).into_iter().map(|mut record| {
        record.retain(|key, _| key != "tok_per_s" && key != "step_ms");
        serde_json::to_string(&record).unwrap()
    });
    (place.bytes("m.safetensors"), place.bytes("log"), timeless.collect())
}

#[test]
fn killed_runs_end_like_uninterrupted_ones() {
    let (whole, killed) = (Place::with_model_and_data(), Place::with_model_and_data());
    whole.ok(RUN);
    let mut kills = 0;
    // Each run lives a little longer than the last, so that the loop ends on any machine.
    for life in 1.. {
        let mut command = killed.command(&format!("{RUN} --resume"));
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(40 * life));
        let finished = child.try_wait().unwrap().is_some();
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        if finished {
            assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
            break;
        }
        kills += 1;
        if killed.path("m.safetensors").exists() {
            killed.ok("generate -e m.safetensors -n 2");
        }
    }
    assert!(kills > 0, "the first run ended before it could be killed");
    assert_eq!(results(&killed), results(&whole));
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_goes_on_where_it_stopped() {
    let (whole, stopped) = (Place::with_model_and_data(), Place::with_model_and_data());
    whole.ok(RUN);
    let mut child = stopped.command(RUN).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !stopped.path("m.safetensors").exists() {
        std::thread::sleep(Duration::from_millis(2));
    }
    std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    child.wait().unwrap();
    stopped.ok(&format!("{RUN} --resume"));
    assert_eq!(results(&stopped), results(&whole));
}

#[test]
fn a_finished_run_can_be_prolonged() {
    let (whole, prolonged) = (Place::with_model_and_data(), Place::with_model_and_data());
    whole.ok(&short(20));
    let fresh = prolonged.ok(&format!("{} --resume", short(10)));
    assert!(fresh.contains("nothing to resume from: there is no m.safetensors yet; starting fresh"), "{fresh}");
    let done = prolonged.ok(&format!("{} --resume", short(10)));
    assert!(done.contains("resuming after step 10") && done.contains("all 10 steps are done"), "{done}");
    assert!(!done.contains("--force") && !done.contains("done: validation"), "{done}");
    prolonged.ok(&format!("{} --resume", short(20)));
    // The validation and the sample at the end of the shorter run are its own.
    let train = |place: &Place| {
        let records = json_lines(&place.path("m.jsonl")).into_iter();
        records.filter_map(|record| record.get("train_loss")?.as_f64()).collect::<Vec<_>>()
    };
    assert_eq!(train(&prolonged), train(&whole));
    assert_eq!(prolonged.bytes("m.safetensors"), whole.bytes("m.safetensors"));
}

/// A schedule that ends with the last step is another one when that moves, and whoever is told to ask for more is told so.
#[test]
fn a_finished_schedule_is_prolonged_by_force() {
    let place = Place::with_model_and_data();
    let run = |steps: usize| short(steps).replace("constant", "wsd");
    let first = place.ok(&run(4));
    assert_eq!(first.matches("done: validation loss").count(), 1);
    assert!(first.lines().any(|line| line.starts_with("done: validation loss ") && line.contains(" -> ")), "{first}");
    let done = place.ok(&format!("{} --resume", run(4)));
    assert!(done.contains("all 4 steps are done; ask for more with -n (and --force"), "{done}");
    place.mistake(&format!("{} --resume", run(6)), "steps was 4 and is now 6");
    let forced = place.ok(&format!("{} --resume --force", run(6)));
    // There was but one since the start.
    assert!(forced.lines().any(|line| line.starts_with("done: validation loss ") && !line.contains("->")), "{forced}");
}

#[test]
fn a_changed_run_is_refused_with_the_difference() {
    let place = Place::with_model_and_data();
    place.ok(&short(4));
    let resume = format!("{} --resume", short(8));
    for (change, difference) in [
        ("-l 0.5", "learning-rate was 0.003 and is now 0.5"),
        ("-b 1", "batch-size was 2 and is now 1"),
        ("--seed 7", "seed was 42 and is now 7"),
        ("--shuffle none", "shuffle was \"llmc\" and is now \"none\""),
        ("--beta2 0.9", "beta2 was 0.95 and is now 0.9"),
        ("--schedule wsd", "schedule was \"constant\" and is now \"wsd\""),
        ("-w 8", "its model has other sizes or bandwidths"),
    ] {
        let line = match change.split_once(' ').unwrap().0 {
            "-b" => resume.replace("-b 2", change),
            "--schedule" => resume.replace("--schedule constant", change),
            _ => format!("{resume} {change}"),
        };
        place.mistake(&line, difference);
    }
    let forced = place.ok(&format!("{} --force", resume.replace("-b 2", "-b 1")));
    assert!(forced.contains("forced to change batch-size was 2 and is now 1"), "{forced}");
    place.mistake(&format!("{} --force", short(9)), "give it together with --resume");
}

#[test]
fn other_data_are_refused() {
    let place = Place::with_model_and_data();
    place.ok(&short(4));
    let mut data = place.bytes("train.bin");
    data[1100] ^= 1;
    place.write("train.bin", data);
    place.mistake(&format!("{} --resume", short(8)), "train-data was train.bin (");
}

#[test]
fn what_cannot_be_resumed_is_told() {
    let place = Place::with_model_and_data();
    place.ok(&short(4));
    let whole = place.bytes("m.safetensors");
    for length in [0, 5, 200, whole.len() / 3, whole.len() - 1] {
        place.write("m.safetensors", &whole[..length]);
        place.mistake(&format!("{} --resume", short(8)), "m.safetensors");
    }
    place.write("m.safetensors", &whole);
    place.ok("convert --input m.safetensors --output weights.safetensors --to safetensors");
    assert!(place.bytes("weights.safetensors").len() < whole.len() / 2, "convert keeps moments");
    fs::rename(place.path("weights.safetensors"), place.path("m.safetensors")).unwrap();
    place.mistake(&format!("{} --resume", short(8)), "holds weights but no moments");
}

/// A checkpoint of one backend goes on on another: not bit for bit, but with the same losses to five digits.
#[test]
fn another_backend_takes_over() {
    if bandtrain::backend::wgpu::adapters().is_empty() {
        return crate::skip::skip("wgpu", "this machine has no adapter for Vulkan, Metal or DirectX 12");
    }
    let (whole, handed) = (Place::with_model_and_data(), Place::with_model_and_data());
    whole.ok(&short(10));
    handed.ok(&short(5));
    handed.ok(&format!("{} --resume --backend wgpu", short(10)));
    let last = |place: &Place| json_lines(&place.path("m.jsonl")).last().unwrap()["val_loss"].as_f64().unwrap();
    assert!((last(&whole) / last(&handed) - 1.0).abs() < 1e-5, "{} {}", last(&whole), last(&handed));
}
