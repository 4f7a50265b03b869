//! `--dashboard`: on a terminal only, and the terminal is given back however the training ends.

use crate::common::Place;

const RUN: &str = "-e tiny.bin -i train.bin -b 2 -t 16 -v 0 -s 0 --schedule constant -c m.safetensors";

#[test]
fn a_pipe_gets_no_dashboard() {
    let place = Place::with_model_and_data();
    place.mistake(&format!("{RUN} -n 2 --dashboard"), "--dashboard draws on a terminal, and standard output is none");
    place.mistake(&format!("{RUN} -n 2 --dashboard --quiet"), "cannot be used with");
}

#[cfg(target_os = "linux")]
mod on_a_terminal {
    use super::*;
    use crate::skip::skip;
    use std::io::{Read, Write};
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    const ENTERED: &str = "\u{1b}[?1049h";
    const LEFT: &str = "\u{1b}[?1049l";

    /// Starts a training under `script`, which gives it a terminal, hands it what is written to its own standard input, and
    /// exits as it does.
    fn start(place: &Place, options: &str) -> Option<Child> {
        let before = "stty cols 120 rows 40; trap '' XFSZ; ulimit -f 400";
        let line = format!("{before}; exec {} {RUN} {options}", env!("CARGO_BIN_EXE_bandtrain"));
        let mut script = Command::new("script");
        script.args(["--quiet", "--return", "--command", &line, "/dev/null"]).current_dir(place.path("."));
        script.env("TERM", "xterm").env("XDG_RUNTIME_DIR", place.path(".")).env("CUDA_VISIBLE_DEVICES", "");
        let started = script.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        if started.is_err() {
            skip("script", "util-linux's script, which makes a terminal, is not installed");
        }
        started.ok()
    }

    /// A loss curve is there: a step is done.
    fn is_curve(c: char) -> bool {
        ('\u{2801}'..='\u{28ff}').contains(&c)
    }

    /// What the terminal shows until the training ends, cut where the dashboard leaves it; and the exit code. The keys are
    /// pressed once a character that is waited for is there.
    fn end(mut child: Child, awaited: fn(char) -> bool, keys: &[&str]) -> (String, String, i32) {
        let mut stdin = child.stdin.take().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let (mut shown, mut buffer) = (Vec::new(), [0; 4096]);
        while !String::from_utf8_lossy(&shown).contains(awaited) {
            let count = stdout.read(&mut buffer).unwrap();
            assert!(count > 0, "ended by itself: {}", String::from_utf8_lossy(&shown));
            shown.extend(&buffer[..count]);
        }
        for key in keys {
            std::thread::sleep(Duration::from_millis(700));
            stdin.write_all(key.as_bytes()).unwrap();
        }
        stdout.read_to_end(&mut shown).unwrap();
        let code = child.wait().unwrap().code().unwrap();
        let shown = String::from_utf8_lossy(&shown).into_owned();
        let (drawn, after) = shown.split_once(LEFT).expect(&shown);
        assert!(drawn.contains(ENTERED), "{drawn}");
        assert!(!after.contains(ENTERED), "{after}");
        (drawn.to_string(), after.to_string(), code)
    }

    #[test]
    fn a_whole_run_is_drawn_and_its_messages_stay() {
        let place = Place::with_model_and_data();
        let Some(child) = start(&place, "-n 3000 --dashboard") else { return };
        let (drawn, after, code) = end(child, is_curve, &[]);
        assert_eq!(code, 0, "{after}");
        for part in ["threads,", "loss:", "memory", "tok/s", "messages"] {
            assert!(drawn.contains(part), "'{part}' is missing");
        }
        assert!(after.contains("step 3000/3000 | checkpoint written to m.safetensors\r\n"), "{after}");
        assert!(after.contains("try: bandtrain generate"), "{after}");
    }

    #[test]
    fn ctrl_c_saves_and_gives_the_terminal_back() {
        let place = Place::with_model_and_data();
        let Some(child) = start(&place, "-n 2000000000 --dashboard") else { return };
        let (_, after, code) = end(child, is_curve, &["\u{3}"]);
        assert_eq!(code, 130, "{after}");
        assert!(after.contains("bandtrain: interrupted; the checkpoint after step "), "{after}");
        assert!(place.path("m.safetensors").exists());
    }

    #[test]
    fn a_second_ctrl_c_gives_it_back_at_once() {
        let place = Place::with_model_and_data();
        let Some(child) = start(&place, "-n 2 --grad-accum 10000000 --dashboard") else { return };
        let (_, after, code) = end(child, |c| c == '┌', &["\u{3}", "\u{3}"]);
        assert_eq!(code, 130, "{after}");
        assert!(after.contains("bandtrain: stopped at once, the step under way is lost"), "{after}");
    }

    #[test]
    fn an_error_is_read_on_the_ordinary_screen() {
        let place = Place::with_model_and_data();
        // No file may grow beyond a few thousand lines.
        let Some(child) = start(&place, "-n 2000000000 --metrics m.jsonl --dashboard") else { return };
        let (_, after, code) = end(child, is_curve, &[]);
        assert_eq!(code, 2, "{after}");
        assert!(after.contains("bandtrain: cannot write m.jsonl: "), "{after}");
    }
}
