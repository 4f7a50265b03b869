//! Checkpoints over a long run: which are kept, and that the last whole one is always found, whatever happened to it.

use crate::common::{Place, one_sentence};
use crate::skip::skip;
use bandtrain::Error;
use bandtrain::checkpoint::load_with_moments;
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A run that checkpoints after each step.
const RUN: &str = "-e tiny.bin -i train.bin -b 2 -t 16 -v 0 -s 0 --schedule constant -c m.safetensors";

/// The checkpoints of a place, by name; each of them must be whole.
fn checkpoints(place: &Place) -> Vec<String> {
    let names = fs::read_dir(place.path(".")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.ends_with(".safetensors")).collect();
    names.sort();
    for name in &names {
        load_with_moments(&place.path(name)).unwrap();
    }
    names
}

#[test]
fn the_last_checkpoints_and_the_milestones_are_kept() {
    let place = Place::with_model_and_data();
    place.ok(&format!("{RUN} -n 25 -k 2 --keep 3 --milestone-every 10"));
    let milestones = ["m-milestone-00000010.safetensors", "m-milestone-00000020.safetensors"];
    let last = ["m-00000022.safetensors", "m-00000024.safetensors"];
    assert_eq!(checkpoints(&place), [&last[..], &milestones, &["m.safetensors"]].concat());
    let step = |name: &str| load_with_moments(&place.path(name)).unwrap().0.meta.step;
    assert_eq!((step("m-00000022.safetensors"), step(milestones[1]), step("m.safetensors")), (22, 20, 25));
    // Gone on with, the series goes on.
    place.ok(&format!("{RUN} -n 27 -k 1 --keep 2 --milestone-every 10 --resume"));
    assert_eq!(checkpoints(&place), [&["m-00000026.safetensors"], &milestones[..], &["m.safetensors"]].concat());
    // Without --keep nothing older is touched, as for those who never asked for it.
    place.ok(&format!("{RUN} -n 29 -k 1 --resume"));
    assert_eq!(checkpoints(&place), [&["m-00000026.safetensors"], &milestones[..], &["m.safetensors"]].concat());
    place.mistake(
        &format!("{RUN} -n 2"),
        "m-00000026.safetensors: is left from an earlier run of this name; go on from it",
    );
}

#[test]
fn checkpoints_come_by_the_clock() {
    let place = Place::with_model_and_data();
    let run = |every: &str| place.ok(&format!("{RUN} -n 400 -k {every}")).matches("checkpoint written").count();
    assert_eq!(run("1h"), 1);
    assert!((2..=400).contains(&run("1ms")));
    assert!(place.read("m.toml").contains("checkpoint-every = \"1ms\""));
    for (every, part) in [
        ("soon", "it must be a number of steps, or a time such as 90s, 10m or 1h"),
        ("1.5", "it must be a number of steps"),
        ("0m", "a time must be above 0"),
        ("3000y", "it must be at most a year"),
        ("-5m", "it must not be negative"),
    ] {
        place.mistake(&format!("{RUN} -n 2 -k={every}"), part);
    }
    place.write("o.toml", "checkpoint-every = \"soon\"");
    place.mistake("--config o.toml", "o.toml: line 1: it must be a number of steps, or a time such as");
    place.mistake(&format!("{RUN} --keep -1"), "it must not be negative");
    place.mistake(&format!("{RUN} --milestone-every x"), "it must be a whole number");
}

/// A place with two checkpoints, after steps 4 and 6, and the plain one's bytes.
fn with_two_checkpoints() -> (Place, Vec<u8>) {
    let place = Place::with_model_and_data();
    place.ok(&format!("{RUN} -n 6 -k 2 --keep 2"));
    let newest = place.bytes("m.safetensors");
    (place, newest)
}

#[test]
fn a_damaged_newest_checkpoint_gives_way_to_the_one_before() {
    let (place, newest) = with_two_checkpoints();
    let older = place.bytes("m-00000004.safetensors");
    let whole = Place::with_model_and_data();
    whole.ok(&format!("{RUN} -n 8 -k 2 --keep 2"));
    let header = 8 + u64::from_le_bytes(newest[..8].try_into().unwrap()) as usize;
    let data = newest.len() - header;
    let cuts =
        [0, 1, 7, 8, 9, 100, header - 1, header, header + 1, header + 64, header + data / 3, header + 2 * data / 3];
    let cut = cuts.into_iter().chain([newest.len() - 4, newest.len() - 1]).map(|length| newest[..length].to_vec());
    let flipped = [0, 5, 20, header - 30, header, header + data / 2, newest.len() - 1].map(|at| {
        let mut bytes = newest.clone();
        bytes[at] ^= 0x10;
        bytes
    });
    let longer = [&newest[..], b"!"].concat();
    for damaged in cut.chain(flipped).chain([longer, vec![0; newest.len()]]) {
        place.write("m.safetensors", damaged);
        place.write("m-00000004.safetensors", &older);
        let stdout = place.ok(&format!("{RUN} -n 8 -k 2 --keep 2 --resume"));
        assert!(
            stdout.contains("note: m.safetensors: ") && stdout.contains("looking for the checkpoint before it"),
            "{stdout}"
        );
        assert!(stdout.contains("resuming after step 4 from m-00000004.safetensors"), "{stdout}");
        assert!(place.bytes("m.safetensors") == whole.bytes("m.safetensors"));
        assert_eq!(checkpoints(&place), ["m-00000006.safetensors", "m.safetensors"]);
        fs::remove_file(place.path("m-00000006.safetensors")).unwrap();
    }
}

#[test]
fn a_lost_newest_checkpoint_gives_way_too() {
    let (place, newest) = with_two_checkpoints();
    fs::remove_file(place.path("m.safetensors")).unwrap();
    place.ok(&format!("{RUN} -n 6 -k 2 --keep 2 --resume"));
    assert!(place.bytes("m.safetensors") == newest);
    for name in checkpoints(&place) {
        place.write(&name, &newest[..newest.len() / 2]);
    }
    place.mistake(&format!("{RUN} -n 8 --keep 2 --resume"), "m.safetensors: is ");
}

/// Whatever length a copy that broke off has, it is taken for damaged, so that the checkpoint before it is looked for.
#[test]
fn a_checkpoint_cut_at_any_byte_is_noticed() {
    let place = Place::with_model_and_data();
    place.ok(&format!("{RUN} -n 1"));
    let path = place.path("m.safetensors");
    let file = fs::File::options().write(true).open(&path).unwrap();
    for length in (0..file.metadata().unwrap().len()).rev() {
        file.set_len(length).unwrap();
        let cut = load_with_moments(&path);
        assert!(matches!(cut, Err(Error::File { .. })), "{length} bytes: {:?}", cut.err());
    }
}

#[test]
fn numbers_changed_in_a_checkpoint_are_noticed() {
    let place = Place::with_model_and_data();
    place.ok(&format!("{RUN} -n 2"));
    let mut bytes = place.bytes("m.safetensors");
    let middle = bytes.len() - 5000;
    bytes[middle] ^= 1;
    place.write("m.safetensors", &bytes);
    place.mistake(&format!("{RUN} -n 3 --resume"), "does not hold the numbers that were written to it");
}

#[test]
fn llmc_checkpoints_are_resumed_from_the_state_beside_them() {
    let (whole, resumed) = (Place::with_model_and_data(), Place::with_model_and_data());
    let run = RUN.replace("m.safetensors", "m.bin");
    whole.ok(&format!("{run} -n 9"));
    resumed.ok(&format!("{run} -n 4 --resume"));
    let stdout = resumed.ok(&format!("{run} -n 9 -k 3 --keep 2 --resume"));
    assert!(stdout.contains("resuming after step 4 from m.state.safetensors"), "{stdout}");
    assert!(resumed.bytes("m.bin") == whole.bytes("m.bin"));
    assert!(resumed.bytes("m.state.safetensors") == whole.bytes("m.state.safetensors"));
    assert_eq!(checkpoints(&resumed), ["m.state-00000006.safetensors", "m.state.safetensors"]);
    resumed.ok("generate -e m.bin -n 3");
    resumed.write("log", "");
    resumed.mistake(&format!("{run} -n 9 -o m.state.safetensors --resume"), "would be written twice");
}

/// `kill -9` again and again while checkpoints are written: each time every file is whole, and the run ends as if nothing had
/// happened.
#[test]
fn killed_while_writing_the_last_checkpoint_loads() {
    let (whole, killed) = (Place::with_model_and_data(), Place::with_model_and_data());
    let run = format!("{RUN} -n 150 -k 1 --keep 3 --milestone-every 40");
    whole.ok(&run);
    let mut kills = 0;
    for life in 0.. {
        let mut child = killed.command(&format!("{run} --resume")).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(15 + 13 * life));
        let finished = child.try_wait().unwrap().is_some();
        child.kill().unwrap();
        assert!(!finished || child.wait().unwrap().success());
        child.wait().unwrap();
        // One more than asked for, when the kill fell between the new one and the removal of the oldest.
        let names = checkpoints(&killed);
        assert!(names.iter().filter(|name| !name.contains("milestone")).count() <= 4, "{names:?}");
        if finished {
            break;
        }
        kills += 1;
    }
    assert!(kills > 2, "the run ended before it could be killed");
    assert_eq!(checkpoints(&killed), checkpoints(&whole));
    assert!(killed.bytes("m.safetensors") == whole.bytes("m.safetensors"));
}

/// No file may grow beyond what the first half of a checkpoint takes.
#[cfg(unix)]
#[test]
fn a_file_size_limit_leaves_the_checkpoint_before() {
    let place = Place::with_model_and_data();
    place.ok(&format!("{RUN} -n 2"));
    let before = place.bytes("m.safetensors");
    let program = env!("CARGO_BIN_EXE_bandtrain");
    // Without the trap the signal ends the program; either way nothing is lost.
    for trap in ["trap '' XFSZ; ", ""] {
        let script = format!("{trap}ulimit -f 50; exec {program} {RUN} -n 4 -k 1 --keep 2 --resume");
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).current_dir(place.path(".")).env("XDG_RUNTIME_DIR", place.path("."));
        let output = shell.output().unwrap();
        if !trap.is_empty() {
            let sentence = one_sentence(&output, 2);
            assert!(sentence.contains("cannot write ") && sentence.contains("m.safetensors"), "{sentence}");
        }
        assert!(place.bytes("m.safetensors") == before);
        checkpoints(&place);
    }
    place.ok(&format!("{RUN} -n 4 -k 1 --keep 2 --resume"));
}

/// Mounts a disk in memory on a folder of the place; false where this user may not.
#[cfg(target_os = "linux")]
fn mounted(place: &Place, folder: &str, options: &str) -> bool {
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", options, "tmpfs", folder]).current_dir(place.path("."));
    mount.output().is_ok_and(|output| output.status.success())
}

#[cfg(target_os = "linux")]
fn unmount(place: &Place, folder: &str) {
    assert!(Command::new("umount").arg(folder).current_dir(place.path(".")).status().unwrap().success());
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_the_checkpoint_before() {
    let place = Place::with_model_and_data();
    fs::create_dir(place.path("disk")).unwrap();
    // Room for one checkpoint and a half.
    if !mounted(&place, "disk", "size=160k") {
        return skip("tmpfs", "this user may not mount a small disk to fill");
    }
    let run = RUN.replace("m.safetensors", "disk/m.safetensors");
    let output = place.command(&format!("{run} -n 4 -k 1 --metrics disk/m.jsonl")).output().unwrap();
    let sentence = one_sentence(&output, 2);
    let loaded = load_with_moments(&place.path("disk/m.safetensors")).map(|(checkpoint, _)| checkpoint.meta.step);
    let left: Vec<_> = fs::read_dir(place.path("disk")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    unmount(&place, "disk");
    assert!(sentence.contains("free some space or choose another disk"), "{sentence}");
    assert_eq!(loaded.unwrap(), 1);
    assert_eq!(left.len(), 3, "{left:?}");
}

#[cfg(unix)]
#[test]
fn a_folder_that_cannot_be_written_is_told_before_the_training() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::with_model_and_data();
    let folder = place.path("locked");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(folder.join("probe"), "").is_ok() {
        return skip("ordinary user", "root may write into a folder without write permission");
    }
    refused_soon(&place, "locked");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn a_read_only_disk_is_told_before_the_training() {
    let place = Place::with_model_and_data();
    fs::create_dir(place.path("locked")).unwrap();
    if !mounted(&place, "locked", "ro") {
        return skip("tmpfs", "this user may not mount a read-only disk");
    }
    refused_soon(&place, "locked");
    unmount(&place, "locked");
}

/// A long training into a folder that cannot be written is refused before it begins.
#[cfg(unix)]
fn refused_soon(place: &Place, folder: &str) {
    let started = Instant::now();
    let run = RUN.replace("m.safetensors", &format!("{folder}/m.safetensors"));
    place.mistake(&format!("{run} -n 100000"), &format!("cannot write to {folder}"));
    assert!(started.elapsed() < Duration::from_secs(20));
}
