//! Broken and hostile checkpoints: every one is an error of one sentence that names the file, never a panic, and never
//! an allocation out of proportion to the file.
#![allow(unsafe_code)] // the allocator below

use bandtrain::band::Band;
use bandtrain::bandwidths::Bandwidths;
use bandtrain::checkpoint::{Checkpoint, Format, Meta, load, save};
use bandtrain::config::GptConfig;
use bandtrain::weights::Weights;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

/// The system's allocator, remembering the largest request of each thread.
struct Watched;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(layout.size()));
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(layout.size()));
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(size));
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

const SMALL: GptConfig = GptConfig {
    channels: 20,
    num_layers: 2,
    num_heads: 5,
    max_seq_len: 3,
    vocab_size: 17,
    padded_vocab_size: 64,
    mlp_width: None,
    fc1_bandwidth: Bandwidths::Same(18),
    fc2_bandwidth: Bandwidths::Same(30),
};

/// A valid file of every format; for Hugging Face its model file and its configuration.
struct Valid {
    llmc: Vec<u8>,
    bf16: Vec<u8>,
    native: Vec<u8>,
    hf: Vec<u8>,
    hf_config: Vec<u8>,
}

static VALID: LazyLock<Valid> = LazyLock::new(|| {
    let checkpoint = Checkpoint { weights: Weights::init(&SMALL, 3).unwrap(), meta: Meta::default() };
    let folder = tempfile::tempdir().unwrap();
    let write = |format: Format, file: &str| {
        let path = folder.path().join(format.name());
        save(&path, &checkpoint, format).unwrap();
        fs::read(path.join(file)).or_else(|_| fs::read(path)).unwrap()
    };
    Valid {
        llmc: write(Format::Llmc, ""),
        bf16: write(Format::LlmcBf16, ""),
        native: write(Format::Safetensors, ""),
        hf: write(Format::Hf, "model.safetensors"),
        hf_config: write(Format::Hf, "config.json"),
    }
});

/// What loading says of these bytes, next to a configuration for those formats that need one.
fn verdict(bytes: &[u8], config: Option<&[u8]>) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, bytes).unwrap();
    if let Some(config) = config {
        fs::write(folder.path().join("config.json"), config).unwrap();
    }
    LARGEST.set(0);
    let result = load(&path);
    let (largest, file) = (LARGEST.get(), bytes.len().max(config.map_or(0, <[u8]>::len)));
    assert!(largest <= 4 * file + (16 << 20), "{largest} bytes allocated for a file of {file}");
    result.map(drop).map_err(|error| {
        assert_eq!(error.exit_code(), 2, "{error}");
        let sentence = error.to_string();
        assert!(sentence.contains(&folder.path().display().to_string()), "{sentence}");
        assert!(sentence.len() < 600 && !sentence.contains(char::is_control), "{sentence}");
        sentence
    })
}

fn expect(bytes: &[u8], config: Option<&[u8]>, part: &str) {
    let sentence = verdict(bytes, config).expect_err(part);
    assert!(sentence.contains(part), "'{sentence}' should contain '{part}'");
}

/// The valid llm.c file with one header word replaced.
fn with_word(at: usize, word: i32) -> Vec<u8> {
    let mut bytes = VALID.llmc.clone();
    bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
    bytes
}

/// A safetensors file taken apart.
struct Parts {
    header: Value,
    data: Vec<u8>,
}

impl Parts {
    fn of(bytes: &[u8]) -> Self {
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        Parts { header: serde_json::from_slice(&bytes[8..end]).unwrap(), data: bytes[end..].to_vec() }
    }

    fn bytes(&self) -> Vec<u8> {
        let header = serde_json::to_vec(&self.header).unwrap();
        [&(header.len() as u64).to_le_bytes()[..], &header, &self.data].concat()
    }

    /// Where a tensor's data starts.
    fn start(&self, name: &str) -> usize {
        self.header[name]["data_offsets"][0].as_u64().unwrap() as usize
    }

    fn set(&mut self, name: &str, index: usize, value: f32) {
        let at = self.start(name) + 4 * index;
        self.data[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Adds a tensor of one zero at the end.
    fn add(&mut self, name: &str) {
        let end = self.data.len();
        self.header[name] = json!({"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]});
        self.data.extend([0; 4]);
    }

    fn rename(&mut self, from: &str, to: &str) {
        let tensor = self.header.as_object_mut().unwrap().remove(from).unwrap();
        self.header[to] = tensor;
    }
}

/// The valid native file after `change`.
fn native(change: impl FnOnce(&mut Parts)) -> Vec<u8> {
    let mut parts = Parts::of(&VALID.native);
    change(&mut parts);
    parts.bytes()
}

/// The valid native file with one metadata entry replaced, or removed.
fn native_note(key: &str, value: Option<&str>) -> Vec<u8> {
    native(|parts| {
        let notes = parts.header["__metadata__"].as_object_mut().unwrap();
        notes.remove(key);
        notes.extend(value.map(|value| (key.to_string(), json!(value))));
    })
}

fn native_config(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut config = serde_json::to_value(SMALL).unwrap();
    change(&mut config);
    native_note("config", Some(&config.to_string()))
}

fn hf(change: impl FnOnce(&mut Parts)) -> Vec<u8> {
    let mut parts = Parts::of(&VALID.hf);
    change(&mut parts);
    parts.bytes()
}

fn hf_config(field: &str, value: Value) -> Vec<u8> {
    let mut config: Value = serde_json::from_slice(&VALID.hf_config).unwrap();
    config[field] = value;
    config.to_string().into_bytes()
}

#[test]
fn the_untouched_files_are_valid() {
    for bytes in [&VALID.llmc, &VALID.bf16, &VALID.native] {
        verdict(bytes, None).unwrap();
    }
    verdict(&VALID.hf, Some(&VALID.hf_config)).unwrap();
    verdict(&native(|_| ()), None).unwrap();
}

#[test]
fn what_is_no_checkpoint_is_named() {
    let words = |first: i32| [first, 1, 4, 0].map(i32::to_le_bytes).concat();
    expect(&words(20240520), None, "is a file of tokens, not a checkpoint; give it as training or validation data");
    expect(&words(20240522), None, "evaluation files");
    expect(&words(20240328), None, "tokenizer files");
    expect(&words(20240527), None, "optimizer state files");
    expect(b"", None, "is empty; checkpoints are bandtrain's .safetensors");
    expect(b"PK\x03\x04\0\0\0\0\0\0", None, "is a PyTorch pickle");
    expect(b"GGUF\x03\0\0\0\0\0\0", None, "is a GGUF file");
    expect(b"version https://git-lfs.github.com/spec/v1", None, "git lfs pull");
    expect(b"\x1f\x8b\x08\0", None, "decompress it first");
    expect(b"once upon", None, "is no checkpoint (first bytes 6f 6e 63 65 20 75 70 6f 6e); checkpoints are");
}

#[test]
fn a_folder_that_is_no_model_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let say = || load(folder.path()).unwrap_err().to_string();
    assert!(say().contains("is a folder without model.safetensors"), "{}", say());
    fs::write(folder.path().join("pytorch_model.bin"), "").unwrap();
    assert!(say().contains("holds pytorch_model.bin"), "{}", say());
    fs::write(folder.path().join("model.safetensors.index.json"), "").unwrap();
    assert!(say().contains("split into several files"), "{}", say());
    let other = hf(|parts| {
        let tensors = parts.header.as_object_mut().unwrap();
        let embedding = tensors.remove("transformer.wte.weight").unwrap();
        tensors.insert("embedding.weight".into(), embedding);
    });
    fs::write(folder.path().join("model.safetensors"), other).unwrap();
    assert!(say().contains("has no tensor wte.weight"), "{}", say());
    // What a run's folder holds under this name is a model, without anything beside it.
    fs::write(folder.path().join("model.safetensors"), &VALID.native).unwrap();
    assert!(load(folder.path()).is_ok());
    let missing = load(Path::new("no/such/model.bin")).unwrap_err().to_string();
    assert!(missing.starts_with("cannot open no/such/model.bin") && missing.ends_with("; check the path"), "{missing}");
}

#[test]
fn llmc_headers_are_checked() {
    expect(&with_word(1, 1), None, "is an llm.c model of version 1, but only versions 3 (fp32) and 5 (bf16)");
    expect(&with_word(1, 5), None, "bytes were appended or the header is damaged");
    expect(&with_word(2, -1), None, "gives the longest sequence T as -1");
    expect(&with_word(3, 100_000), None, "the vocabulary size V is 100000");
    expect(&with_word(4, 0), None, "the number of layers L is 0");
    expect(&with_word(4, i32::MAX), None, "the number of layers L is 2147483647, but must lie between 1 and 1024");
    expect(&with_word(5, 3), None, "C = 20 channels cannot be shared equally by NH = 3 heads");
    expect(&with_word(6, 65_535), None, "it is truncated");
    expect(&with_word(7, 16), None, "the padded vocabulary Vp = 16 must be at least V = 17");
}

#[test]
fn llmc_lengths_are_exact() {
    for bytes in [&VALID.llmc, &VALID.bf16] {
        for len in [4, 5, 100, 1023] {
            let part = format!("is {len} bytes long, but an llm.c model starts with a header of 1024 bytes");
            expect(&bytes[..len], None, &part);
        }
        for len in [1024, 1025, bytes.len() / 2, bytes.len() - 1] {
            let part = format!("is {len} bytes long, but its header (C 20, L 2, T 3, Vp 64) implies {}", bytes.len());
            expect(&bytes[..len], None, &part);
        }
        let longer = [bytes.as_slice(), b"!"].concat();
        expect(&longer, None, &format!("is {} bytes long, but", bytes.len() + 1));
    }
}

#[test]
fn llmc_weights_are_finite() {
    let mut bytes = VALID.llmc.clone();
    let wpe = 1024 + 4 * 64 * 20;
    bytes[wpe + 8..wpe + 12].copy_from_slice(&f32::NAN.to_le_bytes());
    expect(&bytes, None, "weight 2 of tensor wpe is NaN");
    let mut bytes = VALID.bf16.clone();
    let last = bytes.len() - 2;
    bytes[last..].copy_from_slice(&0xff80u16.to_le_bytes());
    expect(&bytes, None, "weight 19 of tensor lnfb is -inf");
}

#[test]
fn safetensors_containers_are_checked() {
    let valid = &VALID.native;
    for len in [9, 20, valid.len() / 2, valid.len() - 1] {
        expect(&valid[..len], None, "it is truncated");
    }
    expect(&[valid.as_slice(), b"!"].concat(), None, "it is damaged");
    let announce = |len: u64| [&len.to_le_bytes()[..], &valid[8..]].concat();
    expect(&announce(u64::MAX), None, "announces a header of 18446744073709551615 bytes, but only");
    expect(&announce(1 << 40), None, "announces a header of 1099511627776 bytes");
    expect(&announce(3), None, "has a damaged safetensors header");
    let large = [&(17u64 << 20).to_le_bytes()[..], b"{", &vec![b' '; 17 << 20]].concat();
    expect(&large, None, "more than the 16777216 that any model needs");
    expect(&native(|parts| parts.header["wte"]["data_offsets"] = json!([0, 4])), None, "damaged safetensors header");
    expect(&native(|parts| parts.header["wte"]["shape"] = json!([u64::MAX, 2])), None, "damaged safetensors header");
    let other = native_note("format", Some("pt"));
    expect(&other, None, "neither bandtrain's (its metadata lacks format = bandtrain) nor a Hugging Face GPT-2");
}

#[test]
fn native_metadata_is_checked() {
    for key in ["version", "config", "panel_rows", "align"] {
        expect(&native_note(key, None), None, &format!("lacks '{key}' in its metadata"));
    }
    expect(&native_note("version", Some("2")), None, "has version 2 of the native format");
    expect(&native_note("version", Some("one")), None, "gives version as 'one', which is not a number");
    expect(&native_note("align", Some("0")), None, "gives align as 0, but it must lie between 1 and 65536");
    expect(&native_note("panel_rows", Some("9999999")), None, "gives panel_rows as 9999999");
    expect(&native_note("panel_rows", Some("-1")), None, "gives panel_rows as '-1', which is not a number");
    expect(&native_note("step", Some("\u{1b}[2J")), None, "gives the step as '\\u{1b}[2J', not a number");
    expect(&native_note("tokenizer", Some("klingon")), None, "names the tokenizer 'klingon'");
    expect(&native_note("config", Some("{")), None, "has a damaged configuration in its metadata");
    expect(&native_config(|config| config["rank"] = json!(1)), None, "unknown field `rank`");
    expect(&native_config(|config| config["channels"] = json!(-5)), None, "damaged configuration");
    expect(&native_config(|config| config["num_heads"] = json!(3)), None, "its metadata makes no model: C = 20");
    expect(&native_config(|config| config["num_layers"] = json!(3)), None, "lacks tensor h.2.ln1w");
    expect(&native_config(|config| config["num_layers"] = json!(1)), None, "holds tensor 'h.1.");
    let absurd = |config: &mut Value| (config["channels"], config["num_layers"]) = (json!(65535), json!(1024));
    expect(&native_config(absurd), None, "tensor wte has shape [64, 20], but the configuration asks for [64, 65535]");
    expect(&native_config(|config| config["fc1_bandwidth"] = json!(0)), None, "tensor h.0.fcw has shape");
    expect(&native_config(|config| config["fc1_bandwidth"] = json!(1)), None, "tensor h.0.fcw has shape");
    // Keeps every connection; so small a band fills its windows in any case.
    verdict(&native_config(|config| config["fc2_bandwidth"] = json!(usize::MAX)), None).unwrap();
}

#[test]
fn blocks_are_checked() {
    let config = GptConfig { channels: 80, fc1_bandwidth: "random:0.5:2".parse().unwrap(), ..SMALL };
    let checkpoint = Checkpoint { weights: Weights::init(&config, 3).unwrap(), meta: Meta::default() };
    let blocks = checkpoint.weights.table().bands()[0].blocks().unwrap().to_text();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blocks.safetensors");
    save(&path, &checkpoint, Format::Safetensors).unwrap();
    let valid = fs::read(path).unwrap();
    let with = |key: &str, value: Option<&str>| {
        let mut parts = Parts::of(&valid);
        let notes = parts.header["__metadata__"].as_object_mut().unwrap();
        notes.remove(key);
        notes.extend(value.map(|value| (key.to_string(), json!(value))));
        parts.bytes()
    };
    verdict(&valid, None).unwrap();
    expect(&with("h.0.fcw.blocks", None), None, "lacks 'h.0.fcw.blocks' in its metadata");
    expect(&with("h.0.fcw.blocks", Some("11 11 11")), None, &format!("its configuration means '{blocks}'"));
    expect(&with("block_rows", Some("64")), None, "gives block_rows as '64' where its configuration means '128'");
    expect(&with("panel_rows", Some("32")), None, "packs its blocks in panels of 32 rows aligned to 16 columns");
    expect(&native_config(|config| config["fc1_bandwidth"] = json!("random:0.5")), None, "lacks 'block_rows'");
    expect(&native_config(|config| config["fc1_bandwidth"] = json!("chess:1")), None, "there is no pattern 'chess'");
    let absurd = |config: &mut Value| {
        config["fc1_bandwidth"] = json!("random:0.999");
        (config["channels"], config["num_layers"]) = (json!(20 * 1024), json!(1));
    };
    expect(&native_config(absurd), None, "makes no model: the patterns of this model choose from 204800 blocks");
    let large = |config: &mut Value| {
        config["fc1_bandwidth"] = json!("random:0.999");
        (config["channels"], config["num_layers"]) = (json!(16_000), json!(1));
    };
    expect(&native_config(large), None, "lacks 'block_rows'");
}

#[test]
fn native_tensors_are_checked() {
    expect(&native(|parts| parts.rename("h.1.fcb", "h.1.fc")), None, "lacks tensor h.1.fcb");
    expect(&native(|parts| parts.add("more\n")), None, "holds tensor 'more\\n', which its configuration does not know");
    expect(&native(|parts| parts.header["wpe"]["shape"] = json!([20, 3])), None, "tensor wpe has shape [20, 3]");
    expect(&native(|parts| parts.header["wpe"]["dtype"] = json!("I32")), None, "tensor wpe is stored as I32");
    expect(&native(|parts| parts.set("h.1.qkvb", 3, f32::INFINITY)), None, "weight 3 of tensor h.1.qkvb is inf");
}

#[test]
fn slots_outside_the_band_must_be_zero() {
    let band = Band::new(20, 80, 18).unwrap();
    let panel = band.panels()[1];
    let slot = (0..panel.len()).find(|&slot| band.slot(&panel, slot).is_none()).unwrap();
    let (row, column) = (64 + slot / panel.cols, panel.col_start + slot % panel.cols);
    let bytes = native(|parts| parts.set("h.1.fcw", panel.offset + slot, 0.25));
    let part = format!(
        "slot {} of tensor h.1.fcw (wide row {row}, narrow column {column}) lies outside the band, but holds 0.25",
        panel.offset + slot
    );
    expect(&bytes, None, &part);
    // A minus zero is a zero, but not the number that the checksum is of.
    let minus_zero = |with_checksum: bool| {
        native(|parts| {
            parts.set("h.1.fcw", panel.offset + slot, -0.0);
            if !with_checksum {
                parts.header["__metadata__"].as_object_mut().unwrap().remove("crc32c").unwrap();
            }
        })
    };
    verdict(&minus_zero(false), None).unwrap();
    expect(&minus_zero(true), None, "does not hold the numbers that were written to it");
}

#[test]
fn hugging_face_configurations_are_checked() {
    let with = |field: &str, value: Value| hf_config(field, value);
    expect(&VALID.hf, None, "config.json: does not exist, but the number of heads (n_head) stands only there");
    expect(&VALID.hf, Some(b"{"), "is not a model's configuration");
    expect(&VALID.hf, Some(&vec![b' '; 2 << 20]), "is longer than 1048576 bytes");
    expect(&VALID.hf, Some(b"{}"), "lacks n_head");
    expect(&VALID.hf, Some(&with("n_head", json!(3))), "NH = 3 heads");
    expect(&VALID.hf, Some(&with("n_head", json!(-3))), "is not a model's configuration");
    expect(&VALID.hf, Some(&with("n_embd", json!(40))), "says n_embd is 40, but the tensors say 20");
    expect(&VALID.hf, Some(&with("n_layer", json!(3))), "says n_layer is 3, but the tensors say 2");
    expect(&VALID.hf, Some(&with("n_inner", json!(50))), "says n_inner is 50, but the tensors say 80");
    expect(&VALID.hf, Some(&with("model_type", json!("llama"))), "model_type is 'llama', not gpt2");
    expect(&VALID.hf, Some(&with("activation_function", json!("relu"))), "activation_function is 'relu'");
    expect(&VALID.hf, Some(&with("layer_norm_epsilon", json!(1e-6))), "layer_norm_epsilon is 0.000001, not 1e-5");
    expect(&VALID.hf, Some(&with("scale_attn_weights", json!(false))), "scale_attn_weights is false");
    expect(&VALID.hf, Some(&with("scale_attn_by_inverse_layer_idx", json!(true))), "such a model cannot be read");
    expect(&VALID.hf, Some(&with("add_cross_attention", json!(true))), "add_cross_attention is true");
    expect(&VALID.hf, Some(&with("tie_word_embeddings", json!(false))), "lacks tensor lm_head.weight");
    verdict(&VALID.hf, Some(b"{\"n_head\": 5}")).unwrap();
}

#[test]
fn hugging_face_tensors_are_checked() {
    let config = Some(VALID.hf_config.as_slice());
    let fc = "transformer.h.1.mlp.c_fc.weight";
    expect(&hf(|parts| parts.rename(fc, "x")), config, "lacks tensor transformer.h.1.mlp.c_fc.weight");
    expect(&hf(|parts| parts.add("transformer.h.0.gate")), config, "holds tensor 'transformer.h.0.gate'");
    let part = "tensor transformer.h.1.mlp.c_fc.weight has shape [80, 20], but the configuration asks for [20, 80]";
    expect(&hf(|parts| parts.header[fc]["shape"] = json!([80, 20])), config, part);
    expect(&hf(|parts| parts.header["transformer.wte.weight"]["shape"] = json!([340])), config, "must be a matrix");
    expect(&hf(|parts| parts.header["transformer.wte.weight"]["dtype"] = json!("U32")), config, "is stored as U32");
    expect(&hf(|parts| parts.rename("transformer.wpe.weight", "wpe")), config, "lacks tensor transformer.wpe.weight");
    expect(&hf(|parts| parts.rename("transformer.h.0.ln_1.weight", "x")), None, "does not exist");
    let first = hf(|parts| parts.rename("transformer.h.0.ln_1.weight", "x"));
    expect(&first, Some(b"{\"n_head\": 5}"), "the number of layers L is 0");
    let last = hf(|parts| parts.set(fc, 161, f32::NAN));
    expect(&last, config, "weight 161 of tensor transformer.h.1.mlp.c_fc.weight is NaN");
}

#[test]
fn masks_are_ignored_and_prefixes_optional() {
    let config = Some(VALID.hf_config.as_slice());
    verdict(&hf(|parts| parts.add("transformer.h.0.attn.bias")), config).unwrap();
    let bare = hf(|parts| {
        let names: Vec<String> = parts.header.as_object().unwrap().keys().cloned().collect();
        for name in names {
            if let Some(short) = name.strip_prefix("transformer.") {
                parts.rename(&name, short);
            }
        }
        parts.add("h.1.attn.masked_bias");
    });
    verdict(&bare, config).unwrap();
}

#[test]
fn a_head_must_be_the_embedding() {
    let with_head = |change: fn(&mut Parts)| {
        hf(|parts| {
            let (start, end) = (parts.start("transformer.wte.weight"), parts.data.len());
            parts.data.extend_from_within(start..start + 4 * 17 * 20);
            parts.header["lm_head.weight"] =
                json!({"dtype": "F32", "shape": [17, 20], "data_offsets": [end, end + 4 * 17 * 20]});
            change(parts);
        })
    };
    let untied = hf_config("tie_word_embeddings", json!(false));
    verdict(&with_head(|_| ()), Some(&untied)).unwrap();
    let part = "tensor lm_head.weight differs from wte.weight at weight 33";
    expect(&with_head(|parts| parts.set("lm_head.weight", 33, 7.0)), Some(&untied), part);
}

#[test]
fn half_precision_hugging_face_files_are_read() {
    for (dtype, encode) in [
        ("F16", (|value| half::f16::from_f32(value).to_bits()) as fn(f32) -> u16),
        ("BF16", |value| half::bf16::from_f32(value).to_bits()),
    ] {
        let bytes = hf(|parts| {
            let halves = parts.data.chunks(4).map(|value| encode(f32::from_le_bytes(value.try_into().unwrap())));
            parts.data = halves.flat_map(u16::to_le_bytes).collect();
            for (_, tensor) in
                parts.header.as_object_mut().unwrap().iter_mut().filter(|(name, _)| *name != "__metadata__")
            {
                tensor["dtype"] = json!(dtype);
                let offsets = [0, 1].map(|k| tensor["data_offsets"][k].as_u64().unwrap() / 2);
                tensor["data_offsets"] = json!(offsets);
            }
        });
        verdict(&bytes, Some(&VALID.hf_config)).unwrap();
    }
}

/// One wound to a file.
#[derive(Debug, Clone)]
enum Wound {
    Replace(prop::sample::Index, u8),
    /// Within the first bytes, where headers are.
    ReplaceEarly(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
}

fn wound() -> impl Strategy<Value = Wound> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        1 => (index(), any::<u8>()).prop_map(|(at, byte)| Wound::Replace(at, byte)),
        4 => (index(), any::<u8>()).prop_map(|(at, byte)| Wound::ReplaceEarly(at, byte)),
        4 => (index(), b'0'..=b'9').prop_map(|(at, byte)| Wound::ReplaceEarly(at, byte)),
        1 => index().prop_map(Wound::Cut),
        1 => (index(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Wound::Insert(at, bytes)),
    ]
}

fn wounded(mut bytes: Vec<u8>, wounds: &[Wound]) -> Vec<u8> {
    for wound in wounds {
        if bytes.is_empty() {
            break;
        }
        let len = bytes.len();
        match wound {
            Wound::Replace(at, byte) => bytes[at.index(len)] = *byte,
            Wound::ReplaceEarly(at, byte) => bytes[at.index(len.min(2048))] = *byte,
            Wound::Cut(at) => bytes.truncate(at.index(len)),
            Wound::Insert(at, more) => drop(bytes.splice(at.index(len)..at.index(len), more.iter().copied())),
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_are_an_error(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        prop_assert!(verdict(&bytes, None).is_err());
    }

    #[test]
    fn random_llmc_headers_are_an_error(words in prop::collection::vec(any::<i32>(), 6), small in prop::collection::vec(1..2000i32, 6)) {
        for sizes in [words, small] {
            let mut bytes = VALID.llmc.clone();
            bytes[8..32].copy_from_slice(bytemuck::cast_slice(&sizes));
            prop_assert!(verdict(&bytes, None).is_err());
        }
    }

    #[test]
    fn random_json_headers_are_an_error(header in "\\{(\"(wte|__metadata__|shape|F32)\":|[\\[\\]{},0-9\"]){0,40}\\}") {
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
        prop_assert!(verdict(&bytes, None).is_err());
    }

    #[test]
    fn wounded_files_never_panic(wounds in prop::collection::vec(wound(), 1..4)) {
        // Some wounds go unnoticed (a weight that changes); what counts is in `verdict`.
        for bytes in [&VALID.llmc, &VALID.bf16, &VALID.native] {
            let _ = verdict(&wounded(bytes.clone(), &wounds), None);
        }
        let _ = verdict(&wounded(VALID.hf.clone(), &wounds), Some(&VALID.hf_config));
        let _ = verdict(&VALID.hf, Some(&wounded(VALID.hf_config.clone(), &wounds)));
    }
}
