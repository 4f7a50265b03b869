//! Files that are missing, broken or in the way: exit code 2, one sentence that names the file, nothing left behind.

use crate::common::{Place, TINY, one_sentence, token_file, token_file_with};
use bandtrain::checkpoint::{Checkpoint, Format, Meta, save};
use bandtrain::config::GptConfig;
use bandtrain::weights::Weights;
use std::fs;

/// A short training on the files of [`Place::with_model_and_data`].
const TRAIN: &str = "-e tiny.bin -i train.bin -j val.bin -b 2 -n 2 -c out.safetensors";

#[test]
fn missing_files_are_named() {
    let place = Place::with_model_and_data();
    place.mistake("-e no.bin", "cannot open no.bin: ");
    place.mistake("-i no.bin", "no.bin: no such file, and no file matches it as a glob; check the path");
    place.mistake("-i no*.bin", "no*.bin: no such file");
    place.mistake("-i [x", "'[x' is not a valid glob");
    place.mistake("-i ./", "./: is not a regular file; name a token file");
    place.refuse(place.command("-i").arg(""), "a value is required for '--train-data <FILES>'");
    place.mistake("-e tiny.bin -i train.bin -j no.bin -b 2", "no.bin: no such file");
    place.mistake("eval -e no.bin -j val.bin", "cannot open no.bin");
    place.mistake("eval -e tiny.bin -j no.bin", "no.bin: no such file");
    place.mistake("generate -e no.bin", "cannot open no.bin");
    place.mistake("convert --input no.bin --output x.bin --to llmc", "cannot open no.bin");
    place.mistake("tokenize --input no.txt --output x.bin", "no.txt: no such file");
}

#[test]
fn broken_token_files_are_refused() {
    let place = Place::with_model_and_data();
    let good = place.bytes("train.bin");
    let tokens = (good.len() - 1024) / 2;
    let with = |words: [i32; 3]| [&token_file_with(words, &[])[..], &good[1024..]].concat();
    for (bytes, part) in [
        (good[..good.len() - 1].to_vec(), "bad.bin: is truncated"),
        (good[..1024].to_vec(), "bad.bin: is truncated"),
        (good[..100].to_vec(), "bad.bin: has 100 bytes, fewer than the 1024 of a token file's header"),
        (vec![], "bad.bin: has 0 bytes"),
        ([&good[..], b"!!"].concat(), "bad.bin: is longer than it says"),
        (with([12345, 1, tokens as i32]), "bad.bin: is not a token file"),
        (with([20240520, 2, tokens as i32]), "bad.bin: is a token file of version 2"),
        (with([20240520, 1, i32::MIN]), "bad.bin: claims -2147483648 tokens, a negative number"),
        (with([20240520, 1, i32::MAX]), "its header counts 2147483647 tokens, which take 4294968318 bytes"),
        (token_file(&[1, 2, 257, 3]), "token 257 at position 2 is outside the model's vocabulary of 257 tokens"),
        (token_file(&[7; 32]), "has 32 tokens, but one batch of B = 2 rows of T = 16 tokens takes B*T+1 = 33"),
        (token_file(&[]), "has 0 tokens"),
        (place.bytes("tiny.bin"), "it is an llm.c model (pass it with --init)"),
    ] {
        place.write("bad.bin", bytes);
        place.mistake("-e tiny.bin -i bad.bin -b 2", part);
        place.mistake("-e tiny.bin -i train.bin -j bad.bin -b 2", part);
        place.mistake("eval -e tiny.bin -j bad.bin -b 2", part);
    }
}

#[test]
fn broken_checkpoints_are_refused() {
    let place = Place::with_model_and_data();
    let good = place.bytes("tiny.bin");
    let with_word = |at: usize, word: i32| {
        let mut bytes = good.clone();
        bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
        bytes
    };
    let mut nan = good.clone();
    nan[1024..1028].copy_from_slice(&f32::NAN.to_le_bytes());
    for (bytes, part) in [
        (with_word(0, 7), "bad.bin: is no checkpoint"),
        (with_word(1, 2), "bad.bin: is an llm.c model of version 2"),
        (with_word(2, i32::MAX), "T is 2147483647"),
        (with_word(5, 3), "C = 16 channels cannot be shared equally by NH = 3 heads; choose NH that divides C"),
        (with_word(6, 0), "C is 0"),
        (good[..good.len() / 2].to_vec(), "it is truncated; copy or download it again"),
        (good[..500].to_vec(), "it is truncated"),
        ([&good[..], b"!"].concat(), "bytes were appended"),
        (nan, "weight 0 of tensor wte is NaN"),
        (vec![], "bad.bin: is empty"),
        (b"once upon a time".to_vec(), "bad.bin: is no checkpoint"),
        (place.bytes("train.bin"), "is a file of tokens, not a checkpoint"),
    ] {
        place.write("bad.bin", bytes);
        place.mistake("-e bad.bin", part);
        place.mistake("generate -e bad.bin", part);
        place.mistake("eval -e bad.bin -j val.bin", part);
        place.mistake("convert --input bad.bin --output x.safetensors --to safetensors", part);
    }
    place.mistake("generate -e .", "is a folder without model.safetensors");
    place.mistake("-e tiny.bin -t 17", "a sequence of 17 tokens is longer than the 16 positions of this model");
    place.mistake("eval -e tiny.bin -j val.bin -t 17", "longer than the 16 positions");
}

#[test]
fn native_checkpoints_cut_anywhere_are_refused() {
    let place = Place::new();
    place.save_model("good.safetensors", GptConfig { fc1_bandwidth: 16.into(), ..TINY }, Meta::default());
    let good = place.bytes("good.safetensors");
    for share in [1, 3, 7, 9] {
        place.write("bad.safetensors", &good[..good.len() * share / 10]);
        place.mistake("generate -e bad.safetensors", "bad.safetensors: ");
    }
    place.write("bad.safetensors", [&good[..], b"!"].concat());
    place.mistake("generate -e bad.safetensors", "it is damaged");
}

#[test]
fn models_without_a_tokenizer_cannot_write_text() {
    let place = Place::new();
    place.save_model("odd.bin", GptConfig { vocab_size: 300, padded_vocab_size: 320, ..TINY }, Meta::default());
    place.mistake("generate -e odd.bin", "odd.bin: no tokenizer has 300 tokens");
    place.mistake("-e odd.bin", "the built-in toy corpus has no tokenizer of 300 tokens; name data with -i");
    // Prompts of a larger tokenizer would reach beyond the embedding.
    let meta = Meta { tokenizer: Some("gpt2".to_string()), ..Meta::default() };
    place.save_model("liar.safetensors", TINY, meta);
    place.mistake("generate -e liar.safetensors", "names the tokenizer gpt2, but has 257 tokens");
}

#[test]
fn diverged_models_say_so() {
    let place = Place::with_model_and_data();
    let mut weights = Weights::init(&TINY, 1).unwrap();
    weights.values_mut().fill(3e38);
    let checkpoint = Checkpoint { weights, meta: Meta::default() };
    save(&place.path("wild.bin"), &checkpoint, Format::Llmc).unwrap();
    place.mistake("eval -e wild.bin -j val.bin -b 2", "it has diverged; go back to an earlier checkpoint");
    place.mistake("generate -e wild.bin", "it has diverged; use an earlier checkpoint");
    let output = place.command(&format!("{TRAIN} -v 0 -s 0 -l 1e30 --warmup 0")).output().unwrap();
    let sentence = one_sentence(&output, 2);
    assert!(
        sentence.contains("the training diverged: at step 2") && sentence.contains("--learning-rate"),
        "{sentence}"
    );
    assert!(sentence.contains("no checkpoint was written before") && sentence.contains("gradient"), "{sentence}");
    assert!(!place.path("out.safetensors").exists());
    let output = place.command(&format!("{TRAIN} -v 0 -s 0 -l 1e30 --warmup 0 -k 1")).output().unwrap();
    let sentence = one_sentence(&output, 2);
    assert!(sentence.contains("the last checkpoint, after step 1, is in out.safetensors"), "{sentence}");
}

#[test]
fn outputs_that_cannot_be_written_are_found_before_training() {
    let place = Place::with_model_and_data();
    fs::create_dir(place.path("folder.bin")).unwrap();
    place.write("file", "");
    let with = |options: &str, part: &str| place.mistake(&format!("{TRAIN} {options}"), part);
    let run = "-e tiny.bin -i train.bin -b 2 -n 2";
    place.mistake(&format!("{run} -c folder.bin"), "folder.bin: is a folder; name a file for the checkpoint");
    place.mistake(&format!("{run} -c file/m.bin"), "choose a path that leads through folders only");
    place.mistake(&format!("{run} -c file/deep/m.bin"), "choose a path that leads through folders only");
    place.mistake(&format!("{run} -c m.pt"), "end it in .safetensors (native) or .bin (llm.c)");
    place.mistake(&format!("{run} -c m"), "end it in .safetensors (native) or .bin (llm.c)");
    with("-o no/log.txt", "cannot create no/log.txt");
    with("-o folder.bin", "name a file, not a folder");
    with("-o file/log.txt", "cannot create file/log.txt");
    with("--metrics no/m.jsonl", "cannot create no/m.jsonl");
    place.mistake("init --preset toy --output file/m.bin", "file/m.bin");
    place.mistake("init --preset toy --output no/m.bin", "cannot create no/m.bin");
    place.mistake("init --preset toy --output folder.bin", "folder.bin: is a folder");
    place.mistake("init --preset toy --output m.pt", "end it in .safetensors");
    place.mistake("convert --input tiny.bin --output folder.bin --to llmc", "folder.bin: is a folder");
    place.mistake("convert --input tiny.bin --output file --to hf", "file");
    place.mistake("data toy --output file", "choose a path that leads through folders only");
    place.mistake("band -w 8 --svg no/x.svg", "cannot write no/x.svg");
}

#[test]
fn inputs_are_not_overwritten() {
    let place = Place::with_model_and_data();
    place.write("o.toml", "steps = 1");
    for options in ["-o train.bin", "--metrics val.bin", "-o tiny.bin", "-o o.toml"] {
        place.mistake(
            &format!("{TRAIN} --config o.toml {options}"),
            "is an input of the training and would be overwritten",
        );
    }
    place.mistake("-e tiny.bin -i train.bin -b 2 -c train.bin", "train.bin: is an input of the training");
    place.mistake(&format!("{TRAIN} -o x --metrics x"), "x: would be written twice");
    place.mistake(&format!("{TRAIN} -o out.toml"), "out.toml: would be written twice");
    place.mistake("tokenize --input train.bin --output train.bin", "is an input and would be overwritten");
}

#[test]
fn names_with_line_ends_still_make_one_sentence() {
    let place = Place::new();
    place.refuse(place.command("generate -e").arg("two\nlines.bin"), "cannot open two?lines.bin");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_standard_output_is_a_sentence() {
    let place = Place::new();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    place.refuse(place.command("band -w 8 -C 8").stdout(full), "cannot write to standard output");
}

/// What a process may have can be less than what its machine has free, which is all that can be asked beforehand.
#[cfg(target_os = "linux")]
#[test]
fn a_training_that_runs_out_of_memory_leaves_the_files_of_an_earlier_one() {
    let place = Place::with_model_and_data();
    place.write("long.bin", token_file(&[65; 2_000_000]));
    const REPORTS: &str = "-c out.safetensors --metrics m.jsonl -o log.txt";
    place.ok(&format!("-e tiny.bin -i train.bin -j val.bin -b 2 -n 2 -m 1 {REPORTS}"));
    let too_large = "-e tiny.bin -i long.bin -j long.bin -b 100000 -n 2";
    // The folder of a run is made beforehand, to find out whether it can be written to.
    fs::create_dir(place.path("run")).unwrap();
    for outputs in [REPORTS, "-c new.safetensors --metrics new.jsonl -o new.txt", "--run run"] {
        let program = place.command(&format!("{too_large} {outputs}"));
        let mut limited = place.program("sh", "-c");
        limited.arg("ulimit -v 600000 && exec \"$0\" \"$@\"").arg(program.get_program()).args(program.get_args());
        // Each thread takes some for its stack.
        place.refuse(limited.env("RAYON_NUM_THREADS", "2"), "out of memory: ");
    }
}

#[test]
fn broken_questions_are_refused() {
    let place = Place::with_model_and_data();
    place.write("q.jsonl", r#"{"ctx": "cat", "endings": ["a", "b", "c", "d"], "label": 3}"#);
    place.ok("tokenize --hellaswag --input q.jsonl --output q.bin --tokenizer bytes");
    place.ok("tokenize --hellaswag --input q.jsonl --output gpt2.bin");
    let good = place.bytes("q.bin");
    let with = |at: usize, bytes: &[u8]| {
        let mut broken = good.clone();
        broken[at..at + bytes.len()].copy_from_slice(bytes);
        broken
    };
    for (bytes, part) in [
        (vec![], "bad.bin: has 0 bytes, fewer than the 1024"),
        (good[..good.len() - 2].to_vec(), "bad.bin: question 0 is cut short"),
        ([&good[..], b"!!"].concat(), "has 2 bytes behind the 1 questions that it counts"),
        (with(8, &i32::MAX.to_le_bytes()), "counts 2147483647 questions"),
        (with(1024, b"xx"), "question 0 does not begin as one"),
        (place.bytes("train.bin"), "is a file of tokens, not of HellaSwag's questions; evaluate on it with -j"),
        (place.bytes("tiny.bin"), "starts with 20240326, but HellaSwag files start with 20240522"),
        (place.bytes("gpt2.bin"), "of question 0 is outside the model's vocabulary of 257 tokens"),
    ] {
        place.write("bad.bin", bytes);
        place.mistake("eval -e tiny.bin --hellaswag bad.bin", part);
    }
    place.mistake("eval -e tiny.bin --hellaswag no.bin", "cannot open no.bin");
    place.mistake("eval -e tiny.bin --hellaswag .", "is not a regular file; name a HellaSwag file");
    place.mistake("eval -e tiny.bin -j q.bin", "it is an llm.c multiple-choice evaluation file");
    let records = |text: &str, part: &str| {
        place.write("bad.jsonl", text);
        place.mistake("tokenize --hellaswag --input bad.jsonl --output x.bin --tokenizer bytes", part);
    };
    records("", "x.bin: would hold 0 questions");
    records("{\"ctx\": \"a\"}", "bad.jsonl: record 1 is none of HellaSwag's: 'missing field `endings`");
    records("once upon", "bad.jsonl: record 1 is none of HellaSwag's");
    let endings = r#""ctx": "a", "endings": ["a", "b", "c", "d"]"#;
    records(
        r#"{"ctx": "a", "endings": ["a", "b", "c"], "label": 0}"#,
        "record 1 is none of HellaSwag's: 'invalid length 3",
    );
    records(&format!("{{{endings}, \"label\": 1}}\n{{{endings}, \"label\": 4}}"), "record 2 has no label from 0 to 3");
    records(&format!("{{{endings}, \"label\": \"\"}}"), "test split keeps them secret");
    records(&format!("{{{endings}, \"label\": 1, \"ctx\": \"b\"}}"), "duplicate field `ctx`");
    records(r#"{"ctx": "", "endings": ["a", "b", "c", "d"], "label": 0}"#, "record 1 has an empty ctx");
    let long =
        |len: usize| format!(r#"{{"ctx": "{}", "endings": ["a", "b", "c", "d"], "label": 0}}"#, "a ".repeat(len));
    records(&long(1 << 20), "record 1 is longer than any question can be");
    records(&long(20_000), "x.bin: was not written: question 0 takes more than the 65534 bytes of the format");
    place.write("long.jsonl", long(8));
    place.ok("tokenize --hellaswag --input long.jsonl --output long.bin --tokenizer bytes");
    place.mistake("eval -e tiny.bin --hellaswag long.bin", "question 0 takes 17 positions, but the model has 16");
    place.mistake(
        "tokenize --hellaswag --input q.jsonl --output q.jsonl",
        "q.jsonl: is an input and would be overwritten",
    );
    place.mistake("tokenize --hellaswag --input q.jsonl --output no/q.bin", "cannot create no/q.bin");
}
