//! The inputs that fuzzing kept, each read as its target reads it, without a fuzzer, and some thousands made of them by
//! chance, the same in every run: whatever they hold, no panic, and no more memory than `fuzz/src/lib.rs` allows.

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::env;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

/// Inputs made of each target's kept ones.
const CHANGED_INPUTS: usize = 5000;
/// Bytes of a span that is moved, doubled or dropped, at most.
const SPAN: usize = 64;
/// What headers are likely to be computed with wrongly.
const NUMBERS: [u64; 8] = [0, 1, 0x7f, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 40, u64::MAX];

/// A folder in memory where the system has one: what the targets write is synced, file by file.
fn folder() -> fuzz::Folder {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { memory.to_path_buf() } else { env::temp_dir() };
    fuzz::Folder::create(&place)
}

/// What lies in a folder of the fuzz crate.
fn entries(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(folder);
    let mut entries: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    entries
}

fn kept(target: &str) -> Vec<Vec<u8>> {
    entries(&format!("corpus/{target}")).iter().map(|path| fs::read(path).unwrap()).collect()
}

/// One of the inputs with one to four changes.
fn changed(inputs: &[Vec<u8>], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = inputs[rng.random_range(0..inputs.len())].clone();
    for _ in 0..rng.random_range(1..=4) {
        change(&mut bytes, &inputs[rng.random_range(0..inputs.len())], rng);
    }
    bytes
}

/// Changes some bytes, or takes a span of another input in.
fn change(bytes: &mut Vec<u8>, other: &[u8], rng: &mut ChaCha8Rng) {
    let span = |len: usize, rng: &mut ChaCha8Rng| {
        let start = rng.random_range(0..=len);
        start..rng.random_range(start..=len.min(start + SPAN))
    };
    let here = span(bytes.len(), rng);
    match rng.random_range(0..6) {
        0 => bytes[here].iter_mut().take(1).for_each(|byte| *byte ^= 1 << rng.random_range(0..8)),
        1 => bytes.truncate(here.start),
        2 => drop(bytes.drain(here)),
        3 => bytes.extend_from_within(here),
        4 => drop(bytes.splice(here, other[span(other.len(), rng)].iter().copied())),
        // At a multiple of four, where the headers of binary files have their words.
        _ => {
            let number = NUMBERS[rng.random_range(0..NUMBERS.len())].to_le_bytes();
            let words = bytes.iter_mut().skip(here.start / 4 * 4).zip(number);
            words.take(4 << rng.random_range(0..2)).for_each(|(to, from)| *to = from);
        }
    }
}

/// Hands an input to a target; after a panic the input is shown, so that it can be kept.
fn read(name: &str, target: fuzz::Target, folder: &fuzz::Folder, input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(folder, input))) {
        println!("{name} fails on: {}", input.escape_ascii());
        resume_unwind(panic);
    }
}

#[test]
fn every_kept_input_is_read_or_refused() {
    let folder = folder();
    for (name, target) in fuzz::TARGETS {
        kept(name).iter().for_each(|input| read(name, target, &folder, input));
    }
}

#[test]
fn inputs_made_of_the_kept_ones_are_read_or_refused() {
    let folder = folder();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (name, target) in fuzz::TARGETS {
        let inputs = kept(name);
        (0..CHANGED_INPUTS).for_each(|_| read(name, target, &folder, &changed(&inputs, &mut rng)));
    }
}

#[test]
fn every_target_has_its_program_and_its_inputs() {
    let mut names = fuzz::TARGETS.map(|(name, _)| name);
    names.sort();
    for folder in ["fuzz_targets", "corpus"] {
        let there: Vec<_> = entries(folder).iter().map(|path| path.file_stem().unwrap().to_owned()).collect();
        assert_eq!(there, names, "{folder}");
    }
}
