//! Ctrl-C: a validation or a sample that would take minutes is stopped at once and made up for later; a second Ctrl-C does
//! not even wait for the step.
#![cfg(unix)]

use crate::common::{Place, TINY, one_sentence, token_file};
use bandtrain::checkpoint::{Checkpoint, Format, Meta, load, save};
use bandtrain::shapes::Param;
use bandtrain::weights::Weights;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Validation data that take the tiny model minutes.
fn place() -> Place {
    let place = Place::with_model_and_data();
    let text: Vec<u16> = "A dog ran to the sun and sat in it for a day. ".bytes().map(u16::from).collect();
    place.write("long.bin", token_file(&text.repeat(1 << 20)));
    place
}

const RUN: &str =
    "-e tiny.bin -i train.bin -j long.bin -b 2 -t 16 --schedule constant -c m.safetensors --metrics m.jsonl";

fn start(place: &Place, options: &str) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child =
        place.command(&format!("{RUN} {options}")).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    (child, stdout)
}

/// Reads up to the line that begins with `start`, and a little beyond.
fn wait_for(stdout: &mut BufReader<std::process::ChildStdout>, start: &str) {
    let mut line = String::new();
    while !line.starts_with(start) {
        line.clear();
        assert!(stdout.read_line(&mut line).unwrap() > 0, "the training ended by itself");
    }
    std::thread::sleep(Duration::from_millis(300));
}

fn press_ctrl_c(child: &Child) {
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
}

/// Interrupts and returns the program's last words, which must come soon.
fn interrupt(child: Child) -> String {
    press_ctrl_c(&child);
    let started = Instant::now();
    let sentence = one_sentence(&child.wait_with_output().unwrap(), 130);
    assert!(started.elapsed() < Duration::from_secs(5), "{sentence}");
    sentence
}

#[test]
fn a_validation_is_stopped_at_once_and_made_up_for() {
    let place = place();
    // The first validation, before any step.
    let (child, mut stdout) = start(&place, "-n 6 -v 4 -m 0 -s 0");
    wait_for(&mut stdout, "device: ");
    let sentence = interrupt(child);
    assert_eq!(sentence, "bandtrain: interrupted; no step was done yet, so nothing was written\n");
    assert!(!place.path("m.safetensors").exists());
    // One in the middle of the run.
    place.ok(&format!("{RUN} -n 2 -v 0 -s 0"));
    let (child, mut stdout) = start(&place, "-n 6 -v 4 -m 0 -s 0 --resume");
    wait_for(&mut stdout, "step 4/6 | train loss ");
    let sentence = interrupt(child);
    assert_eq!(sentence, "bandtrain: interrupted; the checkpoint after step 4 is in m.safetensors\n");
    assert_eq!(load(&place.path("m.safetensors")).unwrap().meta.step, 4);
    let stdout = place.ok(&format!("{RUN} -n 6 -v 4 -m 2 -s 0 --resume"));
    let steps: Vec<_> = stdout.lines().filter(|line| line.starts_with("step ") && !line.contains("written")).collect();
    let starts = ["step 4/6 | validation", "step 5/6 | train", "step 6/6 | train", "step 6/6 | validation"];
    assert!(steps.len() == 4 && steps.iter().zip(starts).all(|(line, start)| line.starts_with(start)), "{steps:#?}");
}

#[test]
fn the_last_validation_too() {
    let place = place();
    place.ok(&format!("{RUN} -n 2 -v 0 -s 0"));
    let (child, mut stdout) = start(&place, "-n 3 -v 4 -m 0 -s 0 --resume");
    wait_for(&mut stdout, "step 3/3 | train loss ");
    interrupt(child);
    let stdout = place.ok(&format!("{RUN} -n 3 -v 4 -m 2 -s 0 --resume"));
    assert!(stdout.contains("step 3/3 | validation loss ") && stdout.contains("done: validation loss"), "{stdout}");
    // Once made up for it is done.
    assert!(!place.ok(&format!("{RUN} -n 3 -v 4 -m 2 -s 0 --resume")).contains("validation loss"));
}

/// A model that hardly ever ends its text makes up a sample of a billion tokens.
#[test]
fn a_sample_is_stopped_at_once_and_made_up_for() {
    let place = place();
    let mut weights = Weights::init(&TINY, 5).unwrap();
    weights.stored_mut(Param::Lnfw, 0).fill(0.0);
    weights.stored_mut(Param::Lnfb, 0)[0] = 30.0;
    for (token, row) in weights.stored_mut(Param::Wte, 0).chunks_mut(TINY.channels).take(TINY.vocab_size).enumerate() {
        row[0] = if token == TINY.vocab_size - 1 { -1.0 } else { 1.0 };
    }
    let path = place.path("tiny.bin");
    save(&path, &Checkpoint { weights, meta: Meta::default() }, Format::of_path(&path).unwrap()).unwrap();
    let run = "-n 3 -v 0 -l 1e-6".to_string();
    let (child, mut stdout) = start(&place, &format!("{run} -s 2 -g 1000000000"));
    wait_for(&mut stdout, "step 2/3 | train loss ");
    assert_eq!(interrupt(child), "bandtrain: interrupted; the checkpoint after step 2 is in m.safetensors\n");
    let stdout = place.ok(&format!("{RUN} {run} -s 2 -g 4 --resume"));
    let samples = ["step 2/3 | sample: ", "step 3/3 | sample: "].map(|start| stdout.matches(start).count());
    assert_eq!(samples, [1, 1], "{stdout}");
}

#[test]
fn a_second_ctrl_c_stops_at_once_and_leaves_the_checkpoint() {
    let place = place();
    place.ok(&format!("{RUN} -n 2 -v 0 -s 0"));
    let before = place.bytes("m.safetensors");
    // A step of minutes.
    let (mut child, mut stdout) = start(&place, "-n 3 -v 0 -s 0 --grad-accum 10000000 --resume --force");
    wait_for(&mut stdout, "device: ");
    press_ctrl_c(&child);
    std::thread::sleep(Duration::from_millis(500));
    assert!(child.try_wait().unwrap().is_none(), "the step under way is finished first");
    let sentence = interrupt(child);
    let words = "stopped at once, the step under way is lost; --resume goes on from the last checkpoint";
    assert_eq!(sentence, format!("bandtrain: {words}\n"));
    assert!(place.bytes("m.safetensors") == before);
    place.ok(&format!("{RUN} -n 3 -v 0 -s 0 --resume"));
}
