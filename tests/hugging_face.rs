//! The Hugging Face export held against Hugging Face's definition of the model and their own programs: the forward pass
//! in double precision from the exported files alone, their tokenizers library, and transformers itself where it is installed.

mod skip;

use bandtrain::backend::cpu::Cpu;
use bandtrain::checkpoint::{Checkpoint, Format, Meta, load, save};
use bandtrain::config::{BYTES_VOCAB, GPT2_VOCAB, GptConfig, padded_vocab};
use bandtrain::data::Tokenizer;
use bandtrain::generate::{Generator, Sampler, Sampling};
use bandtrain::model::{Activations, Model};
use bandtrain::shapes::Param;
use bandtrain::tolerance::{self, Tolerance, UNIT_F32};
use bandtrain::weights::Weights;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A banded model of odd sizes with a tokenizer.
fn config(tokenizer: Tokenizer) -> GptConfig {
    GptConfig {
        channels: 40,
        num_layers: 2,
        num_heads: 5,
        max_seq_len: 24,
        vocab_size: tokenizer.vocab_size(),
        padded_vocab_size: padded_vocab(tokenizer.vocab_size()),
        mlp_width: None,
        fc1_bandwidth: 36.into(),
        fc2_bandwidth: 50.into(),
    }
}

/// A model in which nothing is as it was initialised: weights large enough for attention and GELU to matter, biases not 0.
fn sample(config: GptConfig) -> Checkpoint {
    let mut weights = Weights::init(&config, 7).unwrap();
    weights.values_mut().iter_mut().for_each(|value| *value *= 5.0);
    for param in Param::ALL.into_iter().filter(|param| !param.is_matrix()) {
        for layer in 0..if param.per_layer() { config.num_layers } else { 1 } {
            let stored = weights.stored_mut(param, layer).iter_mut().enumerate();
            stored.for_each(|(k, value)| *value = 0.2 * *value + ((k * 37 + 11 * layer) % 19) as f32 * 0.03 - 0.25);
        }
    }
    Checkpoint { meta: Meta::of_config(&config), weights }
}

fn exported(folder: &Path, checkpoint: &Checkpoint) -> PathBuf {
    let path = folder.join("export");
    save(&path, checkpoint, Format::Hf).unwrap();
    path
}

/// Rows of tokens of the model's full length.
fn inputs(config: &GptConfig) -> Vec<u32> {
    (0..2 * config.max_seq_len).map(|k| ((k * k * 31 + 7 * k) % config.vocab_size) as u32).collect()
}

fn logits(weights: &Weights, inputs: &[u32]) -> Vec<f32> {
    let t = weights.config().max_seq_len;
    let mut model = Model::new(Cpu::new(), weights).unwrap();
    let mut acts = Activations::new(&mut model, inputs.len() / t, t, false).unwrap();
    model.logits(&mut acts, inputs).unwrap()
}

/// Holds the program's logits against those computed in double precision.
fn assert_close(weights: &Weights, inputs: &[u32], expected: &[f64], what: &str) {
    let expected: Vec<f32> = expected.iter().map(|&logit| logit as f32).collect();
    let tolerance = Tolerance::of_forward(UNIT_F32, weights.config(), weights.config().max_seq_len);
    let worst = tolerance::compare(&logits(weights, inputs), &expected, tolerance);
    println!("{what}: {worst}");
    assert!(worst.ratio() <= 1.0, "{what}: {worst}");
}

/// Texts that a tokenizer gets wrong if it can.
fn texts() -> Vec<String> {
    let plain = [
        "Once upon a time, there was a little girl named Lily.",
        "  two  spaces,\ttabs\n\nand\r\nlines  ",
        "It's we'll they've I'd we're I'm DON'T",
        "digits 1234567 and 3.14159, symbols !?#$%^&*()_+-=[]{}|;:'\",./<>~`",
        "ÄÖÜ é à ñ ß € 日本語 русский язык עברית 😀👩‍👩‍👧",
        "a",
        " ",
        "",
        "\u{0}\u{1}\u{7f}\u{a0}\u{ad}\u{2028}",
        "antidisestablishmentarianism supercalifragilisticexpialidocious",
    ];
    let corpus = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/data/toy.txt")).unwrap();
    let every_latin: String = (0x20..0x250).filter_map(char::from_u32).collect();
    let cut = corpus.floor_char_boundary(20_000);
    plain.map(String::from).into_iter().chain([every_latin, corpus[..cut].replace("<|endoftext|>", "")]).collect()
}

#[test]
fn their_tokenizers_library_reads_the_same_tokens() {
    for tokenizer in Tokenizer::ALL {
        let folder = tempfile::tempdir().unwrap();
        let export = exported(folder.path(), &sample(GptConfig { channels: 4, num_heads: 1, ..config(tokenizer) }));
        let theirs = tokenizers::Tokenizer::from_file(export.join("tokenizer.json")).unwrap();
        assert_eq!(theirs.get_vocab_size(true), tokenizer.vocab_size());
        for text in texts() {
            let encoding = theirs.encode(text.as_str(), true).unwrap();
            let ids: Vec<u32> = tokenizer.encode(&text).into_iter().map(u32::from).collect();
            assert_eq!(encoding.get_ids(), ids, "{} {text:?}", tokenizer.name());
            assert_eq!(theirs.decode(&ids, false).unwrap(), text, "{}", tokenizer.name());
        }
        // Where documents meet they read the token, as every program of theirs does.
        let end = u32::from(tokenizer.end_of_text());
        assert_eq!(theirs.encode("<|endoftext|>", true).unwrap().get_ids(), [end]);
    }
}

#[test]
fn the_exported_numbers_are_the_model_by_their_definition() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = sample(config(Tokenizer::Bytes));
    let export = exported(folder.path(), &checkpoint);
    let inputs = inputs(checkpoint.weights.config());
    let expected = definition::logits(&export, &inputs);
    assert_close(&checkpoint.weights, &inputs, &expected, "logits by definition");
    assert_close(&load(&export).unwrap().weights, &inputs, &expected, "logits of the export read back");
}

#[test]
fn a_folder_has_the_tokenizer_that_fits_the_model_and_no_other() {
    let names = |checkpoint: &Checkpoint| {
        let folder = tempfile::tempdir().unwrap();
        let export = exported(folder.path(), checkpoint);
        let mut names: Vec<_> =
            fs::read_dir(export).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let model = ["config.json", "generation_config.json", "model.safetensors"];
    let all = [
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ];
    assert_eq!(names(&sample(config(Tokenizer::Bytes))), all);
    let odd = GptConfig { vocab_size: 101, padded_vocab_size: 128, ..config(Tokenizer::Bytes) };
    assert_eq!(names(&sample(odd)), model);
    // A vocabulary with room beyond the tokenizer's is no hindrance, one too small is.
    let named = |name: &str, vocab_size: usize| {
        let mut checkpoint = sample(GptConfig { vocab_size, padded_vocab_size: padded_vocab(vocab_size), ..odd });
        checkpoint.meta.tokenizer = Some(name.to_string());
        checkpoint
    };
    assert_eq!(names(&named("bytes", 300)), all);
    assert_eq!(names(&named("gpt2", 300)), model);
}

#[test]
fn end_of_text_is_the_tokenizers() {
    for (name, vocab_size, expected) in
        [("bytes", 300, 256), ("gpt2", GPT2_VOCAB + 47, 50256), ("gpt2", 300, 299), ("bytes", BYTES_VOCAB, 256)]
    {
        let sizes = GptConfig {
            vocab_size,
            padded_vocab_size: padded_vocab(vocab_size),
            channels: 2,
            num_heads: 1,
            ..config(Tokenizer::Bytes)
        };
        let mut checkpoint = sample(sizes);
        checkpoint.meta.tokenizer = Some(name.to_string());
        let folder = tempfile::tempdir().unwrap();
        let export = exported(folder.path(), &checkpoint);
        for file in ["config.json", "generation_config.json"] {
            let fields: Value = serde_json::from_slice(&fs::read(export.join(file)).unwrap()).unwrap();
            assert_eq!((&fields["bos_token_id"], &fields["eos_token_id"]), (&expected.into(), &expected.into()));
        }
    }
}

/// Hugging Face transformers itself, with PyTorch. Several gigabytes, so only where it is installed in
/// `target/transformers` or `BANDTRAIN_REQUIRE` asks for it.
#[test]
fn transformers_computes_tokenizes_and_writes_the_same() {
    let Some(python) = transformers() else { return };
    for tokenizer in Tokenizer::ALL {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = sample(config(tokenizer));
        let (weights, t) = (&checkpoint.weights, checkpoint.weights.config().max_seq_len);
        let inputs = inputs(weights.config());
        let prompt = &inputs[..5];
        let request = json!({
            "texts": texts(), "inputs": inputs.chunks(t).collect::<Vec<_>>(), "prompt": prompt, "new_tokens": t - 5,
        });
        let answer = ask(&python, folder.path(), &exported(folder.path(), &checkpoint), &request);
        println!("{}", answer["versions"]);

        assert_close(weights, &inputs, &numbers(&answer["logits"]), tokenizer.name());
        assert_eq!(answer["continued"], json!(continued(weights, prompt, t - 5)));
        let end = tokenizer.end_of_text();
        assert_eq!(answer["special"], json!([end, end, t]));
        for (index, text) in texts().iter().enumerate() {
            assert_eq!(answer["ids"][index], json!(tokenizer.encode(text)), "{} {text:?}", tokenizer.name());
            assert_eq!(answer["decoded"][index], json!(text));
        }

        let dense = load(&folder.path().join("export")).unwrap().weights;
        for written in ["again", "headless"] {
            assert_eq!(load(&folder.path().join(written)).unwrap().weights.values(), dense.values(), "{written}");
        }
        let rounded = load(&folder.path().join("bf16")).unwrap().weights;
        for (half, full) in rounded.values().iter().zip(dense.values()) {
            assert!((half - full).abs() <= full.abs() / 256.0, "{half} {full}");
        }
        let fresh = load(&folder.path().join("fresh")).unwrap().weights;
        let counting: Vec<u32> = (0..24).collect();
        assert_close(&fresh, &counting, &numbers(&answer["fresh_logits"]), "a model made by transformers");
    }
}

/// The Python that has transformers; installed first when it is demanded.
fn transformers() -> Option<PathBuf> {
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/transformers");
    let python = venv.join("bin/python");
    let has_it =
        || Command::new(&python).args(["-c", "import torch, transformers"]).output().is_ok_and(|o| o.status.success());
    if skip::is_required("transformers") && !has_it() {
        let run = |program: &Path, args: &[&str]| {
            let done = Command::new(program).args(args).status().is_ok_and(|status| status.success());
            assert!(done, "{} {args:?} failed", program.display());
        };
        run(Path::new("python3"), &["-m", "venv", venv.to_str().unwrap()]);
        run(&python, &["-m", "pip", "install", "--quiet", "--no-cache-dir", "torch", "transformers"]);
    }
    if !has_it() {
        let why = "torch and transformers (6 GB) are not in target/transformers; BANDTRAIN_REQUIRE=transformers installs them";
        skip::skip("transformers", why);
        return None;
    }
    Some(python)
}

/// Runs the script on an export; what it writes is in `folder`.
fn ask(python: &Path, folder: &Path, export: &Path, request: &Value) -> Value {
    let (script, asked) =
        (concat!(env!("CARGO_MANIFEST_DIR"), "/tests/transformers/peer.py"), folder.join("request.json"));
    fs::write(&asked, request.to_string()).unwrap();
    let mut command = Command::new(python);
    command.arg(script).args([export, &asked, folder]).env("HF_HUB_OFFLINE", "1");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    println!("{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&fs::read(folder.join("answer.json")).unwrap()).unwrap()
}

fn numbers(values: &Value) -> Vec<f64> {
    values.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
}

/// The likeliest continuation; up to and with the end-of-text token, as transformers ends a text.
fn continued(weights: &Weights, prompt: &[u32], count: usize) -> Vec<u16> {
    let mut model = Model::new(Cpu::new(), weights).unwrap();
    let prompt: Vec<u16> = prompt.iter().map(|&token| token as u16).collect();
    let mut sampler = Sampler::new(Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }, 0);
    let end = if weights.config().vocab_size == BYTES_VOCAB { Tokenizer::Bytes } else { Tokenizer::Gpt2 }.end_of_text();
    let mut tokens = Vec::new();
    let mut generator = Generator::new(&mut model).unwrap();
    let emit = |token| {
        tokens.push(token);
        Ok(token != end)
    };
    generator.generate(&mut model, &prompt, count, &mut sampler, emit).unwrap();
    tokens
}

/// GPT-2 as `modeling_gpt2.py` defines it, from the exported files alone, in double precision and as plainly as possible.
mod definition {
    use super::*;

    struct Export {
        bytes: Vec<u8>,
        heads: usize,
        layers: usize,
    }

    /// A matrix, row by row.
    struct Matrix {
        values: Vec<f64>,
        columns: usize,
    }

    impl Matrix {
        fn rows(&self) -> std::slice::Chunks<'_, f64> {
            self.values.chunks(self.columns)
        }

        fn map_rows(&self, columns: usize, row: impl FnMut(&[f64]) -> Vec<f64>) -> Matrix {
            Matrix { values: self.rows().flat_map(row).collect(), columns }
        }

        fn plus(&self, other: &Matrix) -> Matrix {
            let values = self.values.iter().zip(&other.values).map(|(a, b)| a + b).collect();
            Matrix { values, columns: self.columns }
        }
    }

    impl Export {
        fn tensor(&self, name: &str) -> Matrix {
            let file = SafeTensors::deserialize(&self.bytes).unwrap();
            let view = file.tensor(&format!("transformer.{name}")).unwrap();
            let floats = view.data().chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()).into());
            Matrix { values: floats.collect(), columns: *view.shape().last().unwrap() }
        }

        /// `x @ weight + bias`.
        fn conv1d(&self, name: &str, x: &Matrix) -> Matrix {
            let (weight, bias) = (self.tensor(&format!("{name}.weight")), self.tensor(&format!("{name}.bias")).values);
            x.map_rows(weight.columns, |x| {
                let mut out = bias.clone();
                for (x, weights) in x.iter().zip(weight.rows()) {
                    out.iter_mut().zip(weights).for_each(|(out, weight)| *out += x * weight);
                }
                out
            })
        }

        fn layer_norm(&self, name: &str, x: &Matrix) -> Matrix {
            let [weight, bias] = ["weight", "bias"].map(|part| self.tensor(&format!("{name}.{part}")).values);
            x.map_rows(x.columns, |x| {
                let mean = x.iter().sum::<f64>() / x.len() as f64;
                let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
                let normed = x.iter().map(|x| (x - mean) / (variance + 1e-5).sqrt());
                normed.zip(&weight).zip(&bias).map(|((x, weight), bias)| x * weight + bias).collect()
            })
        }

        /// Causal attention of one sequence.
        fn attention(&self, qkv: &Matrix) -> Matrix {
            let channels = qkv.columns / 3;
            let size = channels / self.heads;
            let rows: Vec<_> = qkv.rows().collect();
            let mut values = Vec::new();
            for (place, row) in rows.iter().enumerate() {
                for head in 0..self.heads {
                    let part = |row: &[f64], which: usize| row[which * channels + head * size..][..size].to_vec();
                    let dot = |a: Vec<f64>, b: Vec<f64>| a.iter().zip(&b).map(|(a, b)| a * b).sum::<f64>();
                    let scores = (0..=place).map(|key| dot(part(row, 0), part(rows[key], 1)) / (size as f64).sqrt());
                    let weights: Vec<f64> = scores.map(f64::exp).collect();
                    let total: f64 = weights.iter().sum();
                    let mixed = |channel: usize| -> f64 {
                        weights.iter().zip(&rows).map(|(weight, row)| weight / total * part(row, 2)[channel]).sum()
                    };
                    values.extend((0..size).map(mixed));
                }
            }
            Matrix { values, columns: channels }
        }

        fn sequence(&self, tokens: &[u32]) -> Vec<f64> {
            let (wte, wpe) = (self.tensor("wte.weight"), self.tensor("wpe.weight"));
            let row = |matrix: &Matrix, row: usize| matrix.rows().nth(row).unwrap().to_vec();
            let embedded = |values| Matrix { values, columns: wte.columns };
            let mut x = embedded(tokens.iter().flat_map(|&token| row(&wte, token as usize)).collect())
                .plus(&embedded(wpe.values[..tokens.len() * wte.columns].to_vec()));
            for layer in 0..self.layers {
                let name = |part: &str| format!("h.{layer}.{part}");
                let qkv = self.conv1d(&name("attn.c_attn"), &self.layer_norm(&name("ln_1"), &x));
                x = x.plus(&self.conv1d(&name("attn.c_proj"), &self.attention(&qkv)));
                let mut hidden = self.conv1d(&name("mlp.c_fc"), &self.layer_norm(&name("ln_2"), &x));
                hidden.values.iter_mut().for_each(|x| *x = gelu_new(*x));
                x = x.plus(&self.conv1d(&name("mlp.c_proj"), &hidden));
            }
            let x = self.layer_norm("ln_f", &x);
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            x.rows().flat_map(|x| wte.rows().map(move |token| dot(x, token)).collect::<Vec<_>>()).collect()
        }
    }

    fn gelu_new(x: f64) -> f64 {
        0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
    }

    /// The logits of rows of tokens of the model's full length.
    pub fn logits(export: &Path, inputs: &[u32]) -> Vec<f64> {
        let config: Value = serde_json::from_slice(&fs::read(export.join("config.json")).unwrap()).unwrap();
        let size = |field: &str| config[field].as_u64().unwrap() as usize;
        let bytes = fs::read(export.join("model.safetensors")).unwrap();
        let export = Export { bytes, heads: size("n_head"), layers: size("n_layer") };
        inputs.chunks(size("n_positions")).flat_map(|tokens| export.sequence(tokens)).collect()
    }
}
