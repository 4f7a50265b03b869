//! Checkpoints from outside: what is written is what is read, in every format and from one to the next.

use bandtrain::band::Band;
use bandtrain::bandwidths::Bandwidths;
use bandtrain::checkpoint::{Checkpoint, Encoding, Format, Meta, detect, load, save};
use bandtrain::config::GptConfig;
use bandtrain::shapes::Param;
use bandtrain::weights::Weights;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::fs;
use std::path::{Path, PathBuf};

/// Odd sizes: C = 40 is no multiple of anything the packing likes.
const ODD: GptConfig = GptConfig {
    channels: 40,
    num_layers: 2,
    num_heads: 5,
    max_seq_len: 13,
    vocab_size: 101,
    padded_vocab_size: 128,
    mlp_width: None,
    fc1_bandwidth: Bandwidths::Same(36),
    fc2_bandwidth: Bandwidths::Same(50),
};

const DENSE: GptConfig = GptConfig { fc1_bandwidth: Bandwidths::DENSE, fc2_bandwidth: Bandwidths::DENSE, ..ODD };

/// A checkpoint whose every existing weight differs from every other's.
fn sample(config: GptConfig) -> Checkpoint {
    let mut weights = Weights::init(&config, 11).unwrap();
    for param in Param::ALL.into_iter().filter(|param| !param.is_matrix()) {
        for layer in 0..if param.per_layer() { config.num_layers } else { 1 } {
            let stored = weights.stored_mut(param, layer).iter_mut().enumerate();
            stored.for_each(|(k, value)| *value = (k + 1) as f32 * 0.003 + param as usize as f32 + layer as f32 * 0.5);
        }
    }
    let mut meta = Meta { tokenizer: Some("bytes".to_string()), step: 1234, ..Meta::default() };
    meta.extra.insert("note".to_string(), "kept as it is: ä\"{".to_string());
    Checkpoint { weights, meta }
}

fn saved(folder: &Path, checkpoint: &Checkpoint, format: Format) -> PathBuf {
    let path = folder.join(format!("model-{format}"));
    save(&path, checkpoint, format).unwrap();
    assert_eq!(detect(&path).unwrap(), format);
    path
}

fn through(checkpoint: &Checkpoint, format: Format) -> Checkpoint {
    let folder = tempfile::tempdir().unwrap();
    load(&saved(folder.path(), checkpoint, format)).unwrap()
}

fn dense_equal(a: &Weights, b: &Weights, encoding: Encoding) {
    for tensor in a.table().tensors() {
        let expected: Vec<f32> =
            a.dense(tensor.param, tensor.layer).into_iter().map(|value| encoding.rounded(value)).collect();
        assert_eq!(expected, b.dense(tensor.param, tensor.layer), "{:?} of layer {}", tensor.param, tensor.layer);
    }
}

#[test]
fn the_native_format_keeps_everything() {
    let blocks = GptConfig { channels: 80, fc1_bandwidth: "random:0.5:4".parse().unwrap(), ..ODD };
    for config in [
        DENSE,
        ODD,
        GptConfig { fc2_bandwidth: 0.into(), ..ODD },
        GptConfig { fc1_bandwidth: 1.into(), ..ODD },
        blocks,
        GptConfig { fc2_bandwidth: "strided:0.6,70".parse().unwrap(), ..blocks },
    ] {
        let before = sample(config);
        let after = through(&before, Format::Safetensors);
        assert_eq!(after.weights.config(), before.weights.config());
        assert_eq!(after.weights.values(), before.weights.values());
        assert_eq!(after.meta, before.meta);
    }
}

/// What the metadata says of blocks is what a reader without our random numbers unpacks by.
#[test]
fn blocks_lie_as_their_metadata_says() {
    let config = GptConfig { channels: 80, fc1_bandwidth: "random:0.5:4".parse().unwrap(), ..ODD };
    let (before, folder) = (sample(config), tempfile::tempdir().unwrap());
    let bytes = fs::read(saved(folder.path(), &before, Format::Safetensors)).unwrap();
    let (file, (_, header)) = (SafeTensors::deserialize(&bytes).unwrap(), SafeTensors::read_metadata(&bytes).unwrap());
    let notes = header.metadata().as_ref().unwrap();
    assert_eq!((notes["block_rows"].as_str(), notes["block_cols"].as_str()), ("128", "64"));
    for layer in 0..2 {
        let stored: Vec<f32> = bytemuck::pod_collect_to_vec(file.tensor(&format!("h.{layer}.fcw")).unwrap().data());
        let (mut values, mut dense) = (stored.into_iter(), vec![0.0; 320 * 80]);
        for (down, row) in notes[&format!("h.{layer}.fcw.blocks")].split(' ').enumerate() {
            for (across, _) in row.chars().enumerate().filter(|(_, kept)| *kept == '1') {
                for j in 128 * down..(128 * down + 128).min(320) {
                    let (start, end) = (64 * across, (64 * across + 64).min(80));
                    dense[80 * j + start..80 * j + end].fill_with(|| values.next().unwrap());
                }
            }
        }
        assert_eq!((values.next(), dense), (None, before.weights.dense(Param::Fcw, layer)));
    }
    assert!(!notes.contains_key("h.0.fcprojw.blocks"));
    let bands = fs::read(saved(folder.path(), &sample(ODD), Format::Safetensors)).unwrap();
    assert!(!String::from_utf8_lossy(&bands[..3000]).contains("block"));
}

#[test]
fn extra_metadata_cannot_replace_the_formats_own() {
    let mut checkpoint = sample(ODD);
    for key in ["format", "version", "config", "panel_rows", "align", "step", "tokenizer"] {
        checkpoint.meta.extra.insert(key.to_string(), "other".to_string());
    }
    assert_eq!(through(&checkpoint, Format::Safetensors).meta, sample(ODD).meta);
}

/// Packs a dense matrix as docs/formats.md describes it, for any constants.
fn packed(band: &Band, value: impl Fn(usize, usize) -> f32, panel_rows: usize, align: usize) -> Vec<f32> {
    let mut packed = Vec::new();
    for start in (0..band.wide()).step_by(panel_rows) {
        let rows = start..(start + panel_rows).min(band.wide());
        let touched: Vec<usize> = rows.clone().flat_map(|j| band.row(j)).collect();
        let first = touched.iter().min().map_or(0, |first| first / align * align);
        let end = touched.iter().max().map_or(0, |last| (last + 1).next_multiple_of(align));
        for j in rows {
            packed.extend((first..end).map(|i| if band.contains(j, i) { value(j, i) } else { 0.0 }));
        }
    }
    packed
}

#[test]
fn files_packed_with_other_constants_are_packed_anew() {
    let folder = tempfile::tempdir().unwrap();
    let before = sample(ODD);
    let bytes = fs::read(saved(folder.path(), &before, Format::Safetensors)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for (panel_rows, align) in [(64, 16), (32, 8), (7, 3), (1, 1), (1000, 64)] {
        let repacked = |name: &str| {
            let layer = name.as_bytes()[2] as usize - b'0' as usize;
            let (param, stride) =
                if name.ends_with("fcw") { (Param::Fcw, (40, 1)) } else { (Param::Fcprojw, (1, 160)) };
            let (band, _) = before.weights.table().band(param, 0).unwrap();
            let dense = before.weights.dense(param, layer);
            let values = packed(band, |j, i| dense[j * stride.0 + i * stride.1], panel_rows, align);
            (vec![values.len()], bytemuck::cast_slice(&values).to_vec())
        };
        let tensors: Vec<_> = file
            .iter()
            .map(|(name, view)| match name.ends_with("fcw") || name.ends_with("fcprojw") {
                true => (name, repacked(name)),
                false => (name, (view.shape().to_vec(), view.data().to_vec())),
            })
            .collect();
        let views = tensors
            .iter()
            .map(|(name, (shape, data))| (*name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let mut notes = metadata.metadata().clone().unwrap();
        notes.insert("panel_rows".to_string(), panel_rows.to_string());
        notes.insert("align".to_string(), align.to_string());
        // Whoever packs anew leaves it out, or computes it anew.
        notes.remove("crc32c");
        let path = folder.path().join("other.safetensors");
        safetensors::serialize_to_file(views, Some(notes), &path).unwrap();
        let after = load(&path).unwrap();
        assert_eq!(after.weights.values(), before.weights.values(), "{panel_rows} rows, aligned to {align}");
        assert_eq!(after.meta, before.meta);
    }
}

#[test]
fn equal_checkpoints_are_equal_files() {
    let folder = tempfile::tempdir().unwrap();
    for format in [Format::Llmc, Format::LlmcBf16, Format::Safetensors] {
        let first = fs::read(saved(folder.path(), &sample(ODD), format)).unwrap();
        let second = fs::read(saved(folder.path(), &sample(ODD), format)).unwrap();
        assert!(first == second, "{format}");
    }
}

#[test]
fn llmc_files_hold_the_dense_matrices() {
    for config in [DENSE, ODD] {
        let before = sample(config);
        for (format, encoding) in [(Format::Llmc, Encoding::F32), (Format::LlmcBf16, Encoding::Bf16)] {
            let after = through(&before, format);
            assert_eq!(*after.weights.config(), DENSE);
            dense_equal(&before.weights, &after.weights, encoding);
            assert_eq!(after.meta, Meta::default(), "101 tokens fit no tokenizer, and llm.c's header has no room");
        }
    }
}

#[test]
fn llmc_files_come_back_byte_by_byte() {
    let folder = tempfile::tempdir().unwrap();
    for format in [Format::Llmc, Format::LlmcBf16] {
        let first = saved(folder.path(), &sample(DENSE), format);
        let again = folder.path().join("again.bin");
        save(&again, &load(&first).unwrap(), format).unwrap();
        assert!(fs::read(first).unwrap() == fs::read(again).unwrap(), "{format}");
    }
}

#[test]
fn an_llmc_file_has_its_published_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = sample(DENSE);
    let bytes = fs::read(saved(folder.path(), &checkpoint, Format::Llmc)).unwrap();
    let words: Vec<i32> = bytes[..36].chunks(4).map(|word| i32::from_le_bytes(word.try_into().unwrap())).collect();
    assert_eq!(words, [20240326, 3, 13, 101, 2, 5, 40, 128, 0]);
    // wte [128, 40] and wpe [13, 40] come first; then ln1w of both layers together.
    let at = 1024 + 4 * (128 * 40 + 13 * 40 + 40);
    let second_layer = f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!(second_layer, checkpoint.weights.stored(Param::Ln1w, 1)[0]);
}

#[test]
fn hugging_face_folders_hold_the_dense_matrices() {
    for config in [DENSE, ODD] {
        let before = sample(config);
        let after = through(&before, Format::Hf);
        assert_eq!(*after.weights.config(), DENSE);
        dense_equal(&before.weights, &after.weights, Encoding::F32);
        assert_eq!(after.meta, Meta { extra: Default::default(), ..before.meta });
    }
}

#[test]
fn a_hugging_face_folder_has_the_published_names_shapes_and_fields() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = sample(DENSE);
    let path = saved(folder.path(), &checkpoint, Format::Hf);
    let config: serde_json::Value = serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap();
    for (field, value) in [("n_embd", 40), ("n_layer", 2), ("n_head", 5), ("n_positions", 13), ("vocab_size", 101)] {
        assert_eq!(config[field], value, "{field}");
    }
    assert_eq!((&config["eos_token_id"], &config["tie_word_embeddings"]), (&100.into(), &true.into()));
    assert_eq!((&config["model_type"], &config["activation_function"]), (&"gpt2".into(), &"gelu_new".into()));

    let bytes = fs::read(path.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for (name, shape) in [
        ("transformer.wte.weight", [101, 40]),
        ("transformer.h.1.attn.c_attn.weight", [40, 120]),
        ("transformer.h.1.attn.c_proj.weight", [40, 40]),
        ("transformer.h.0.mlp.c_fc.weight", [40, 160]),
        ("transformer.h.0.mlp.c_proj.weight", [160, 40]),
    ] {
        assert_eq!(file.tensor(name).unwrap().shape(), shape, "{name}");
    }
    // Input 3 to output 7, here [out, in] and there [in, out].
    let c_fc = file.tensor("transformer.h.0.mlp.c_fc.weight").unwrap().data()[4 * (3 * 160 + 7)..][..4].to_vec();
    assert_eq!(f32::from_le_bytes(c_fc.try_into().unwrap()), checkpoint.weights.dense(Param::Fcw, 0)[7 * 40 + 3]);
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
}

#[test]
fn a_bare_hugging_face_file_is_read_with_its_neighbour() {
    let folder = tempfile::tempdir().unwrap();
    let before = sample(DENSE);
    let path = saved(folder.path(), &before, Format::Hf).join("model.safetensors");
    assert_eq!(detect(&path).unwrap(), Format::Hf);
    assert_eq!(load(&path).unwrap().weights.values(), before.weights.values());
}

#[test]
fn a_chain_of_conversions_loses_nothing_but_the_band() {
    let mut checkpoint = sample(ODD);
    for format in [Format::Safetensors, Format::Hf, Format::Llmc, Format::Safetensors, Format::Llmc, Format::Hf] {
        checkpoint = through(&checkpoint, format);
    }
    let (banded, cut) = checkpoint.weights.rebanded(36.into(), 50.into()).unwrap();
    assert_eq!(banded.values(), sample(ODD).weights.values());
    assert!(cut.iter().all(|cut| cut.abs() < 1e-12), "{cut:?}");
}

#[test]
fn the_tokenizer_of_a_file_without_metadata_follows_from_its_vocabulary() {
    for (vocab_size, padded_vocab_size, name) in [(257, 320, "bytes"), (50257, 50304, "gpt2")] {
        let config = GptConfig { vocab_size, padded_vocab_size, channels: 2, num_heads: 1, ..DENSE };
        let after = through(&Checkpoint { meta: Meta::default(), ..sample(config) }, Format::Llmc);
        assert_eq!(after.meta.tokenizer.as_deref(), Some(name));
    }
}

#[test]
fn padded_vocabulary_rows_are_zero_after_loading() {
    let mut before = sample(DENSE);
    before.weights.stored_mut(Param::Wte, 0)[101 * 40..].fill(9.0);
    for format in Format::ALL {
        let after = through(&before, format);
        assert!(after.weights.stored(Param::Wte, 0)[101 * 40..].iter().all(|&value| value == 0.0), "{format}");
        assert_eq!(after.weights.stored(Param::Wte, 0).len(), 128 * 40);
    }
}

#[test]
fn a_failed_save_keeps_the_older_checkpoint_and_leaves_nothing_else() {
    for format in Format::ALL {
        let folder = tempfile::tempdir().unwrap();
        let good = sample(ODD);
        let path = saved(folder.path(), &good, format);
        let mut diverged = good.clone();
        diverged.weights.stored_mut(Param::Fcb, 1)[7] = f32::NAN;
        let error = save(&path, &diverged, format).unwrap_err().to_string();
        assert!(error.contains("was not written: weight 7 of tensor h.1.fcb is NaN"), "{error}");
        load(&path).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

#[test]
fn a_value_that_bf16_cannot_hold_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut large = sample(DENSE);
    large.weights.stored_mut(Param::Wpe, 0)[1] = f32::MAX;
    assert!(save(&folder.path().join("m"), &large, Format::LlmcBf16).is_err());
    save(&folder.path().join("m"), &large, Format::Llmc).unwrap();
}

#[test]
fn a_weight_outside_the_band_is_never_written() {
    let folder = tempfile::tempdir().unwrap();
    let mut wrong = sample(ODD);
    let last = wrong.weights.stored(Param::Fcw, 0).len() - 1;
    wrong.weights.stored_mut(Param::Fcw, 0)[last] = 1.0;
    let error = save(&folder.path().join("m.safetensors"), &wrong, Format::Safetensors).unwrap_err();
    assert!(error.to_string().contains("tensor h.0.fcw at wide row 159"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn places_that_cannot_be_written_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing").join("m.bin");
    let error = save(&missing, &sample(ODD), Format::Llmc).unwrap_err().to_string();
    assert!(error.starts_with(&format!("cannot create {}", missing.display())), "{error}");
    let error = save(folder.path(), &sample(ODD), Format::Llmc).unwrap_err().to_string();
    assert!(error.contains("is a folder or a device"), "{error}");
    let file = folder.path().join("file");
    fs::write(&file, "mine").unwrap();
    let error = save(&file, &sample(ODD), Format::Hf).unwrap_err().to_string();
    assert!(error.contains("name a folder"), "{error}");
    assert_eq!(fs::read(&file).unwrap(), b"mine");
}

#[test]
fn formats_are_told_by_name_and_by_extension() {
    for format in Format::ALL {
        assert_eq!(Format::from_name(format.name()).unwrap(), format);
    }
    let error = Format::from_name("onnx").unwrap_err().to_string();
    assert!(error.contains("choose one of llmc, llmc-bf16, safetensors, hf"), "{error}");
    assert_eq!(Format::of_path(Path::new("a/b.bin")).unwrap(), Format::Llmc);
    assert_eq!(Format::of_path(Path::new("a/b.safetensors")).unwrap(), Format::Safetensors);
    let error = Format::of_path(Path::new("a/b")).unwrap_err().to_string();
    assert!(error.contains("a/b; end it in .safetensors"), "{error}");
}
