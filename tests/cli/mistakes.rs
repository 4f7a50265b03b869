//! Mistakes on the command line and in files of options: exit code 2, one sentence, nothing left behind.

use crate::common::{Place, token_file};
use std::fs::File;

#[test]
fn unknown_words_get_a_suggestion() {
    let place = Place::new();
    place.mistake("--stepz 3", "unexpected argument '--stepz' found; a similar argument exists: '--steps'");
    place.mistake("genrate", "unrecognized subcommand 'genrate'; a similar subcommand exists: 'generate'");
    place.mistake("frobnicate", "unrecognized subcommand 'frobnicate'; --help lists what there is");
    place.mistake("--preset large", "there is no preset 'large'; choose one of toy, tinystories-7m");
    place.mistake("init --preset large --output m.bin", "there is no preset 'large'");
    place.mistake("info --preset large", "there is no preset 'large'");
    place.mistake(
        "convert --input a --output b --to onnx",
        "no checkpoint format 'onnx'; choose one of llmc, llmc-bf16",
    );
    place.mistake("tokenize --input a --output b --tokenizer words", "possible values: gpt2, bytes");
    place.mistake("data books --output d", "possible values: tinystories, toy");
    place.mistake("--shuffle cards", "possible values: llmc, none");
    place.mistake("--recipe cake", "possible values: stable, experiment");
    place.mistake("--schedule never", "possible values: constant, cosine, wsd");
    place.mistake("--backend abacus", "possible values: auto, cuda, wgpu, cpu");
    place.mistake("--precision fp8", "possible values: auto, fp32");
    place.mistake("generate", "required arguments were not provided: --init <FILE>");
    place.mistake("-n 1 -n 2", "'--steps <N>' cannot be used multiple times");
    place.mistake("-w 9 -1 8", "'--fc1-bandwidth <N>' cannot be used multiple times");
    place.mistake("--preset toy -e model.bin", "cannot be used with");
    place.mistake("eval -e model.bin", "were not provided: <--val-data <FILES>|--hellaswag <FILE>>");
    place.mistake("eval -e model.bin -j a.bin --hellaswag b.bin", "cannot be used with");
    place.mistake("eval -e model.bin --hellaswag b.bin -t 8", "cannot be used with '--seq-len <N>'");
    place.mistake(
        "tokenize --hellaswag --input a --output b --val-output c",
        "cannot be used with '--val-output <FILE>'",
    );
    place.mistake(
        "tokenize --hellaswag --input a --output b --shard-tokens 9",
        "cannot be used with '--shard-tokens <N>'",
    );
}

#[test]
fn words_that_a_shell_made_of_a_glob_are_explained() {
    let place = Place::new();
    place.mistake("-i data/a.bin data/b.bin", "'data/b.bin' belongs to no option; put globs in quotes");
    place.mistake("-n 3 eval", "the command eval must come before its options: bandtrain eval");
}

#[test]
fn bandwidths_are_whole_numbers() {
    let place = Place::new();
    for flag in ["-w ", "-1 ", "-2 ", "--fc1-bandwidth=", "--fc2-bandwidth="] {
        place.mistake(&format!("{flag}-5"), "a bandwidth counts connections: it must not be negative");
        place.mistake(&format!("{flag}1.5"), "a bandwidth counts connections: it must be a whole number");
        place.mistake(&format!("{flag}wide"), "it must be a whole number, digits only (0 is dense)");
        place.mistake(&format!("{flag}99999999999"), "it must be at most 2147483648");
    }
    place.mistake("band -w -5", "it must not be negative");
    place.mistake(
        "convert --input a --output b --to hf -w -5",
        "a bandwidth counts connections: it must not be negative",
    );
    place
        .mistake("convert --input a --output b --to hf -2 wide", "it must be a whole number, digits only (0 is dense)");
    place.mistake("band -w 0", "bandwidth 0 means a dense layer");
    place.mistake("band -w 8 -C 2147483648", "a band needs 1 <= N <= W <= 1048576");
    place.mistake("band -w 8 -C 10 --wide 5", "N (narrow) is 10 and W (wide) is 5");
    place.mistake("-d 2", "it must be 1 (on) or 0 (off)");
}

#[test]
fn zero_and_absurd_sizes_are_refused() {
    let place = Place::new();
    for flag in ["-b", "-t", "-n", "-g", "--grad-accum"] {
        place.mistake(&format!("{flag} 0"), "it must be at least 1");
        place.mistake(&format!("{flag} -3"), "it must not be negative");
        place.mistake(&format!("{flag} 99999999999"), "it must be at most 2147483648");
        place.mistake(&format!("{flag} 184467440737095516160"), "it must be a");
    }
    for flag in ["-k", "-v", "-m", "-s", "--warmup"] {
        place.mistake(&format!("{flag} -1"), "it must not be negative");
    }
    place.mistake("-b 2147483648 -t 2", "a step of 1 x 2147483648 x 2 tokens is absurd; choose a smaller -b");
    place.mistake("-b 2147483648 -t 1", "takes B*T+1 = 2147483649; choose a smaller --batch-size");
    place.mistake("-t 129", "a sequence of 129 tokens is longer than the 128 positions of this model; choose -t 128");
    place.mistake("info -t 513", "longer than the 512 positions");
    let place = Place::with_model_and_data();
    for batch in ["1", "6"] {
        let part = "sequences holds no whole number of HellaSwag's questions, four each; choose -b 4";
        place.mistake(&format!("eval -e tiny.bin --hellaswag q.bin -b {batch}"), part);
    }
    place.mistake("bench step -t 129", "longer than the 128 positions");
    place.mistake("--seed 4294967296", "it must be a whole number from 0 to 4294967295");
}

#[test]
fn numbers_out_of_range_are_refused() {
    let place = Place::new();
    place.mistake("-l 0", "it must be above 0");
    place.mistake("-l -0.001", "it must be above 0");
    place.mistake("-l nan", "it must be a number");
    place.mistake("-l 1e400", "it must be a number");
    place.mistake("--beta1 1", "it must be at least 0 and below 1");
    place.mistake("--beta2 -0.5", "it must be at least 0 and below 1");
    place.mistake("--weight-decay -1", "it must be 0 or more");
    place.mistake("--grad-clip inf", "it must be a number");
    place.mistake("tokenize --input a --output b --val-output c --val-fraction 1", "it must lie between 0 and 1");
}

#[test]
fn what_bench_does_not_listen_to_is_refused() {
    let place = Place::new();
    for flag in ["--preset toy", "-b 4", "--peak-tflops 165"] {
        place.mistake(
            &format!("bench kernels {flag}"),
            "means nothing to 'bench kernels'; leave it out or use 'bench step'",
        );
    }
    for flag in ["-C 64", "--rows 64", "--vocab-size 64"] {
        place.mistake(
            &format!("bench step {flag}"),
            "means nothing to 'bench step'; leave it out or use 'bench kernels'",
        );
    }
    place.mistake("bench step --preset nonesuch", "there is no preset 'nonesuch'");
    place.mistake("bench step --peak-tflops 0", "it must be above 0");
    place.mistake("bench step --peak-tflops nan", "it must be a number");
    place.mistake("bench kernels --vocab-size 0", "it must be at least 1");
    place.mistake("bench kernels -C 16 --rows 8 --vocab-size 100000", "the vocabulary size V is 100000");
    place.mistake("bench kernels --rows 100 -t 30", "100 rows are no whole number of sequences of 30 tokens");
    place.mistake("bench kernels -w 0", "it must be at least 1");
}

/// A pair of words that multiply beyond 64 bits, or to more memory than there is, must not get as far as allocating it.
#[test]
fn what_memory_cannot_hold_is_refused_before_it_is_asked_for() {
    let place = Place::new();
    place.mistake("bench kernels -C 2147483648", "choose a smaller --rows or --channels");
    place.mistake("bench kernels --rows 2147483648", "choose a smaller --rows or --channels");
    place.mistake("bench step -b 2147483648", "of memory, but ");
    // 2^26 tokens of nothing: a sparse file.
    place.write("huge.bin", token_file(&[]));
    let count = (1 << 26) + 1;
    let mut header = token_file(&[]);
    header[8..12].copy_from_slice(&i32::to_le_bytes(count));
    place.write("huge.bin", header);
    File::options().write(true).open(place.path("huge.bin")).unwrap().set_len(1024 + 2 * count as u64).unwrap();
    let line = "--preset toy -i huge.bin -t 128 -c m.safetensors";
    place.mistake(&format!("{line} -b 524288"), "training in batches of 524288 x 128 tokens takes ");
    place.mistake(&format!("{line} -b 524288"), "are free on CPU");
    place.mistake(&format!("{line} -b 524288"), "; choose -b ");
}

#[test]
fn devices_that_are_not_there_are_named() {
    let place = Place::new();
    for command in ["", "info ", "bench ", "parity "] {
        place.mistake(&format!("{command}--backend cuda"), "use --backend wgpu or cpu");
        place.mistake(&format!("{command}--backend wgpu --precision tf32"), "the wgpu backend computes in fp32 only");
        place.mistake(&format!("{command}--adapter nonesuch"), "there is no graphics adapter");
        place.mistake(&format!("{command}--backend cpu --adapter 0"), "--adapter chooses among wgpu's adapters");
    }
    for precision in ["bf16", "tf32", "f16"] {
        place.mistake(&format!("--backend cpu --precision {precision}"), "the cpu backend computes in fp32 only");
    }
}

/// Nothing that wgpu could take for an adapter: no driver where Vulkan's loader looks, then no loader either.
#[test]
#[cfg(target_os = "linux")]
fn a_machine_without_graphics_is_told_so() {
    let place = Place::new();
    let libraries = tempfile::tempdir().unwrap();
    std::fs::write(libraries.path().join("libvulkan.so.1"), "").unwrap();
    let without_driver = |line: &str| {
        let mut command = place.command(line);
        command.env("VK_DRIVER_FILES", "/nonexistent").env("VK_ICD_FILENAMES", "/nonexistent");
        command
    };
    let without_loader = |line: &str| {
        let mut command = place.command(line);
        command.env("LD_LIBRARY_PATH", libraries.path());
        command
    };
    let without: [&dyn Fn(&str) -> std::process::Command; 2] = [&without_driver, &without_loader];
    for command in without {
        for line in ["--backend wgpu", "info --backend wgpu", "bench --backend wgpu", "parity --backend wgpu"] {
            place.refuse(&mut command(line), "wgpu found no graphics adapter: install a driver for Vulkan");
        }
        place.refuse(&mut command("--adapter 0"), "there is no graphics adapter at all on this machine");
        let info = place.succeed(&mut command("info --preset toy"));
        assert!(info.contains("wgpu     no adapter: there is no driver for Vulkan, Metal or DirectX 12"), "{info}");
        // What asks for no device in particular goes on without one.
        assert!(place.succeed(&mut command("bench step -b 1 -t 4 --repeats 1")).contains("banded 256"));
    }
}

#[test]
fn broken_files_of_options_are_refused() {
    let place = Place::new();
    let refuse = |text: &[u8], part: &str| {
        place.write("o.toml", text);
        place.mistake("--config o.toml", part);
    };
    refuse(b"steps = 3\nstepz = 4", "o.toml: line 2: unknown field `stepz`");
    refuse(b"steps = \"three\"", "line 1: invalid type: string \"three\"");
    refuse(b"steps = 1.5", "line 1: invalid type: floating point");
    refuse(b"\nsteps = ", "o.toml: line 2: ");
    refuse(b"steps = -3", "line 1: invalid value: integer `-3`");
    refuse(b"dense = 1", "expected a boolean");
    refuse(b"backend = \"abacus\"", "unknown variant `abacus`");
    refuse(b"config = \"other.toml\"", "unknown field `config`");
    refuse(b"batch-size = 0", "o.toml: invalid value '0' for '--batch-size <N>': it must be at least 1");
    refuse(b"batch-size = 99999999999", "it must be at most 2147483648");
    refuse(b"learning-rate = nan", "it must be a number");
    refuse(b"beta1 = 2.0", "it must be at least 0 and below 1");
    refuse(b"train-data = \"\"", "a value is required for '--train-data <FILES>'");
    refuse(b"preset = \"toy\"\ninit = \"m.bin\"", "cannot be used with");
    refuse(b"steps = 3\n# \xff", "o.toml: is not UTF-8 text (byte 12)");
    refuse(&vec![b'#'; 2 << 20], "is larger than any file of options");
    place.mistake("--config no.toml", "cannot open no.toml: ");
    place.mistake("--config .", "name a file, not a folder");
}

#[test]
fn settings_of_generation_are_checked() {
    let place = Place::with_model_and_data();
    for (settings, part) in [
        ("--temperature -1", "it must be 0 or more"),
        ("--temperature nan", "it must be a number"),
        ("--temperature hot", "it must be a number"),
        ("--temperature 1e300", "--temperature inf must be 0 or more"),
        ("--top-p 0", "it must be above 0"),
        ("--top-p 1.5", "--top-p 1.5 must be above 0 and at most 1"),
        ("--top-k -1", "it must not be negative"),
        ("--samples 0", "it must be at least 1"),
        ("-n 0", "it must be at least 1"),
        ("--seed -1", "it must be a whole number from 0"),
    ] {
        place.mistake(&format!("generate -e tiny.bin {settings}"), part);
    }
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let mut command = place.command("generate -e tiny.bin --prompt");
        place.refuse(command.arg(std::ffi::OsStr::from_bytes(b"caf\xe9")), "invalid UTF-8");
    }
}
