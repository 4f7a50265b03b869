//! Text files to token files: formats, splits, shards, and what is refused.

mod skip;

use bandtrain::data::tokenize::{Summary, TokenizeOptions, ValidationSplit, tokenize};
use bandtrain::data::{TokenFile, Tokenizer};
use bandtrain::error::{Error, Result};
use proptest::prelude::*;
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};

/// A folder for one test's files.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        Bench(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn options(&self, name: &str, contents: &[u8]) -> TokenizeOptions {
        fs::write(self.path(name), contents).unwrap();
        TokenizeOptions {
            inputs: vec![self.path(name)],
            output: self.path("out.bin"),
            validation: None,
            shard_tokens: None,
            tokenizer: Tokenizer::Bytes,
        }
    }

    /// The documents that `contents` gives, as text.
    fn documents(&self, name: &str, contents: &[u8]) -> Result<Vec<String>> {
        run(&self.options(name, contents))?;
        Ok(documents(&self.path("out.bin")))
    }

    fn refusal(&self, name: &str, contents: &[u8]) -> String {
        let error = run(&self.options(name, contents)).unwrap_err();
        self.assert_clean();
        error.to_string()
    }

    /// Nothing but the inputs is there.
    fn assert_clean(&self) {
        for entry in fs::read_dir(self.0.path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(name.starts_with("in"), "{name} was left behind");
        }
    }
}

fn run(options: &TokenizeOptions) -> Result<Summary> {
    tokenize(options, &mut |_, _| Ok(()))
}

fn documents(path: &Path) -> Vec<String> {
    let file = TokenFile::open(path, 257).unwrap();
    let text = String::from_utf8(Tokenizer::Bytes.decode(file.tokens()).unwrap()).unwrap();
    text.split("<|endoftext|>").skip(1).map(str::to_owned).collect()
}

#[test]
fn text_is_split_at_separator_lines() {
    let bench = Bench::new();
    let text = "\n\none\ntwo\n\n<|endoftext|>\n<|endoftext|>\n\n\n<|endoftext|>\r\n  three \r\n<|endoftext|>x\n\n";
    // `<|endoftext|>x` is no separator, so its text is tokens of its own; the byte decoder shows both alike.
    fs::write(bench.path("in.txt"), text).unwrap();
    let summary = run(&bench.options("in.txt", text.as_bytes())).unwrap();
    assert_eq!(summary.documents, 2);
    assert_eq!(documents(&bench.path("out.bin")), ["one\ntwo", "  three \r\n", "x"]);
    assert_eq!(bench.documents("in.txt", b"\xef\xbb\xbfonly").unwrap(), ["only"]);
    assert_eq!(bench.documents("in.txt", b"a\n<|endoftext|>\nb\n<|endoftext|>\n").unwrap(), ["a", "b"]);
}

#[test]
fn json_comes_in_every_form() {
    let bench = Bench::new();
    let expected = ["one", "two"];
    for (name, json) in [
        ("in.json", r#"[{"story": "\none\n", "x": [1, {"y": null}]}, {"text": "two"}, {"text": "\n"}]"#),
        ("in.json", r#"["one", "two"]"#),
        ("in.jsonl", "{\"text\": \"one\"}\n\n{\"story\": \"two\", \"text\": \"other\"}\n"),
        ("in.JSONL", "\"one\"\n\"two\""),
        ("in.ndjson", "[\"one\"]\n[{\"story\":\"two\"}]\n"),
    ] {
        assert_eq!(bench.documents(name, json.as_bytes()).unwrap(), expected, "{json}");
    }
}

#[test]
fn bad_text_names_its_place() {
    let bench = Bench::new();
    let sentence = bench.refusal("in.txt", b"fine\nbad \xff\n");
    assert!(sentence.ends_with("in.txt: is not UTF-8 at byte 9, in line 2; convert it to UTF-8"), "{sentence}");
    assert!(bench.refusal("in.txt", b"cut \xe2\x82").contains("at byte 4, in line 1"));
    for (json, place) in [
        (&b"[\"a\",\n 7]"[..], "line 2 column 3"),
        (b"{\"text\": \"a\"}\n{\"title\": \"b\"}", "neither a `story` nor a `text`"),
        (b"[\"a\"", "EOF while parsing"),
        (b"[[\"a\"]]", "an array inside an array"),
        (b"{\"text\": \"\xff\"}", "line 1"),
        (b"{\"text\": 3}", "expected a string"),
        (b"[\"a\"] x", "expected value"),
        (&[b'['; 100_000], "array inside an array"),
    ] {
        let sentence = bench.refusal("in.json", json);
        assert!(sentence.contains(place), "{sentence}");
        assert!(sentence.contains("in.json: invalid record"), "{sentence}");
    }
    for nothing in ["", "\n\n", "<|endoftext|>\n\n<|endoftext|>"] {
        assert!(bench.refusal("in.txt", nothing.as_bytes()).contains("holds no document"));
    }
    assert!(bench.refusal("in.json", b"[]").contains("holds no document"));
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let bench = Bench::new();
    let options = bench.options("in.txt", b"text");
    let split = |output: &str, fraction| ValidationSplit { output: bench.path(output), fraction, seed: 0 };
    let refused = |options: TokenizeOptions| run(&options).unwrap_err().to_string();
    for fraction in [0.0, 1.0, -1.0, f64::NAN] {
        let sentence = refused(TokenizeOptions { validation: Some(split("val.bin", fraction)), ..options.clone() });
        assert!(sentence.contains("between 0 and 1"), "{sentence}");
    }
    let sentence = refused(TokenizeOptions { validation: Some(split("out.bin", 0.5)), ..options.clone() });
    assert!(sentence.contains("name two outputs"), "{sentence}");
    let sentence = refused(TokenizeOptions { validation: Some(split("val.bin", 0.5)), ..options.clone() });
    assert!(sentence.contains("fell to"), "{sentence}");
    let sentence = refused(TokenizeOptions { output: bench.path("in.txt"), ..options.clone() });
    assert!(sentence.contains("would be overwritten"), "{sentence}");
    assert!(refused(TokenizeOptions { shard_tokens: Some(0), ..options.clone() }).contains("at least 1"));
    assert!(refused(TokenizeOptions { inputs: vec![], ..options.clone() }).contains("--input"));
    assert!(
        refused(TokenizeOptions { inputs: vec![bench.path("none")], ..options.clone() }).contains("check the path")
    );
    assert!(
        refused(TokenizeOptions { inputs: vec![bench.0.path().into()], ..options.clone() }).contains("not a folder")
    );
    assert!(
        refused(TokenizeOptions { output: bench.path("none/out.bin"), ..options.clone() }).contains("check the path")
    );
    bench.assert_clean();
}

#[test]
fn progress_may_stop_the_work() {
    let bench = Bench::new();
    let options = bench.options("in.txt", b"text");
    let stopped = tokenize(&options, &mut |done, total| {
        assert_eq!((done, total), (4, 4));
        Err(Error::Interrupted("stop".into()))
    });
    assert!(matches!(stopped, Err(Error::Interrupted(_))));
    bench.assert_clean();
}

#[test]
fn held_out_documents_depend_on_the_seed_alone() {
    let bench = Bench::new();
    let text: String = (0..2000).map(|number| format!("document {number}\n<|endoftext|>\n")).collect();
    let split = |seed| {
        let mut options = bench.options("in.txt", text.as_bytes());
        options.validation = Some(ValidationSplit { output: bench.path("val.bin"), fraction: 0.1, seed });
        let summary = run(&options).unwrap();
        let (training, held_out) = (documents(&bench.path("out.bin")), documents(&bench.path("val.bin")));
        assert_eq!(summary.validation_documents as usize, held_out.len());
        assert_eq!(summary.tokens(), summary.outputs[0].tokens + summary.outputs[1].tokens);
        assert_eq!(training.len() + held_out.len(), 2000);
        assert!((150..250).contains(&held_out.len()), "{}", held_out.len());
        let number = |document: &String| document["document ".len()..].parse::<u32>().unwrap();
        assert!(training.is_sorted_by_key(number) && held_out.is_sorted_by_key(number));
        held_out
    };
    let held_out = split(1);
    assert_eq!(split(1), held_out);
    assert_ne!(split(2), held_out);
}

#[test]
fn shards_hold_the_same_tokens() {
    let bench = Bench::new();
    let text = "one\n<|endoftext|>\ntwo\n<|endoftext|>\nthree four five";
    let mut options = bench.options("in.txt", text.as_bytes());
    run(&options).unwrap();
    let whole = TokenFile::open(&bench.path("out.bin"), 257).unwrap().tokens().to_vec();
    options.shard_tokens = Some(10);
    let summary = run(&options).unwrap();
    let sizes: Vec<_> = summary.outputs.iter().map(|output| output.tokens).collect();
    assert_eq!(sizes, [10, 10, 4]);
    assert_eq!(summary.outputs[2].path, bench.path("out_000003.bin"));
    let tokens =
        summary.outputs.iter().flat_map(|output| TokenFile::open(&output.path, 257).unwrap().tokens().to_vec());
    assert_eq!(tokens.collect::<Vec<_>>(), whole);
    // Fewer shards than before would leave an old one among the new.
    options.shard_tokens = Some(20);
    assert!(run(&options).unwrap_err().to_string().contains("out_000003.bin: is left from an earlier run"));
    assert_eq!(TokenFile::open(&bench.path("out_000001.bin"), 257).unwrap().tokens().len(), 10);
}

#[test]
fn a_document_longer_than_a_segment_keeps_its_tokens() {
    let bench = Bench::new();
    let parts =
        ["A line of words, and\n", "\n", "  indented\n", "ends in space \n", "it's 12\r\n", "é漢字\n", "\u{a0}odd\n"];
    let lines: String = (0..60_000).map(|number| parts[(number * number + number / 7) % parts.len()]).collect();
    let one_line: String = lines.chars().map(|character| if character == '\n' { ' ' } else { character }).collect();
    let without_space = "é漢字".repeat(300_000);
    for text in [lines, one_line.repeat(3), without_space, " \n".repeat(300_000) + "."] {
        let mut expected = vec![50256];
        expected.extend(Tokenizer::Gpt2.encode(text.trim_matches(['\n', '\r'])));
        for (name, contents) in [("in.txt", text.clone()), ("in.json", serde_json::to_string(&text).unwrap())] {
            let mut options = bench.options(name, contents.as_bytes());
            options.tokenizer = Tokenizer::Gpt2;
            assert_eq!(run(&options).unwrap().documents, 1);
            let file = TokenFile::open(&bench.path("out.bin"), 50257).unwrap();
            assert!(file.tokens() == expected, "{name}: {:?}", text.chars().take(40).collect::<String>());
        }
    }
}

#[test]
fn text_without_any_space_is_refused_before_it_fills_the_memory() {
    let bench = Bench::new();
    let sentence = bench.refusal("in.txt", &vec![b'a'; 66 << 20]);
    assert!(sentence.contains("holds 64 MiB without a space between words, starting with \"aaa"), "{sentence}");
}

proptest! {
    #[test]
    fn random_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let bench = Bench::new();
        for name in ["in.txt", "in.json"] {
            if bench.documents(name, &bytes).is_err() {
                bench.assert_clean();
            }
            let _ = fs::remove_file(bench.path("out.bin"));
        }
    }

    #[test]
    fn mutated_json_is_read_or_refused(changes in proptest::collection::vec((0usize..90, any::<u8>()), 1..4), cut in 0usize..90) {
        let mut bytes = br#"[{"story": "one \u00e9 \n", "x": [1.5e3, true]}, {"text": "two"}, "three"] {"text": "f"}"#.to_vec();
        for (index, value) in changes {
            let len = bytes.len();
            bytes[index % len] = value;
        }
        bytes.truncate(cut.max(40));
        let _ = Bench::new().documents("in.jsonl", &bytes);
    }

    #[test]
    fn random_documents_survive(texts in proptest::collection::vec("[a-zé \t\n]{0,20}", 1..10)) {
        let bench = Bench::new();
        let expected: Vec<_> = texts.iter().map(|text| text.trim_matches('\n')).filter(|text| !text.is_empty()).collect();
        prop_assume!(!expected.is_empty());
        let joined = texts.join("\n<|endoftext|>\n");
        prop_assert_eq!(bench.documents("in.txt", joined.as_bytes()).unwrap(), expected.clone());
        let json = serde_json::to_vec(&texts).unwrap();
        prop_assert_eq!(bench.documents("in.json", &json).unwrap(), expected);
    }
}

/// The reference token files' sizes and SHA-256.
#[test]
fn tinystories_gives_the_reference_tokens() {
    let Some(folder) = std::env::var_os("BANDTRAIN_TEST_DATA") else {
        let why = "BANDTRAIN_TEST_DATA names no folder with tinystories/train.txt and valid.txt";
        return skip::skip("tinystories", why);
    };
    let reference = [
        ("train.txt", 2_663_532, "bd2a53b0eb3ce3bb9a043778a8278303c34a020e9fa5b27e0a8519612f21f18f"),
        ("valid.txt", 189_587, "c28126dae591c049006eb3c748a3dfd9a8c389f90d3925a86fe02dbdb72b4275"),
    ];
    for (name, tokens, sha256) in reference {
        let bench = Bench::new();
        let options = TokenizeOptions {
            inputs: vec![Path::new(&folder).join("tinystories").join(name)],
            output: bench.path("out.bin"),
            validation: None,
            shard_tokens: None,
            tokenizer: Tokenizer::Gpt2,
        };
        let start = std::time::Instant::now();
        let summary = run(&options).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        println!("{name}: {:.1} MB/s", summary.bytes as f64 / 1e6 / seconds);
        assert_eq!(summary.tokens(), tokens);
        let hash = Sha256::digest(fs::read(bench.path("out.bin")).unwrap());
        assert_eq!(hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), sha256);
    }
}
