//! The wgpu backend as a guest on other people's machines: small memory, low limits, slow adapters, pipelines kept from
//! earlier runs. Without an adapter these tests say so and pass; `BANDTRAIN_REQUIRE=wgpu` makes that a failure.

mod adapter;
mod skip;

use adapter::{checked, device};
use bandtrain::backend::cpu::Cpu;
use bandtrain::backend::wgpu::{AdapterKind, Options, Tuning, Wgpu};
use bandtrain::backend::{AdamW, Affine, Backend, Device, Linear, LinearDims, Role};
use bandtrain::config::{GptConfig, preset};
use bandtrain::error::Error;
use bandtrain::memory::MemoryEstimate;
use bandtrain::model::{Activations, Model};
use bandtrain::optim::{Optimizer, Recipe};
use bandtrain::shapes::{ParamTable, Span};
use bandtrain::weights::Weights;
use sha2::{Digest, Sha256};

/// Losses and gradient norms of `steps` steps on B = `batch` sequences of T = `tokens` made-up tokens.
fn train<B: Backend>(
    model: &mut Model<B>,
    batch: usize,
    tokens: usize,
    steps: usize,
) -> bandtrain::Result<Vec<(f32, f32)>> {
    let vocab = model.config().vocab_size as u64;
    let mut optimizer = Optimizer::new(model)?;
    let mut acts = Activations::new(model, batch, tokens, true)?;
    let text: Vec<u32> = (0..=(batch * tokens) as u64).map(|k| (k * k * 7919 % vocab) as u32).collect();
    (0..steps)
        .map(|_| {
            model.upload_batch(&mut acts, &text[..batch * tokens], &text[1..])?;
            optimizer.micro_step(model, &mut acts, 0, 1)?;
            optimizer.update(model, &Recipe::Stable.hyperparameters(), 1e-3)?.collect(model)
        })
        .collect()
}

/// The one number in `sentence` that follows "choose -b ".
fn advised_batch(sentence: &str) -> usize {
    let (_, rest) = sentence.split_once("; choose -b ").unwrap_or_else(|| panic!("no advice in '{sentence}'"));
    rest.strip_suffix(" or less").and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{sentence}"))
}

#[test]
fn a_training_that_memory_cannot_hold_is_told_which_batch_fits() {
    const TOKENS: usize = 128;
    let config = preset("toy").unwrap().model;
    let options = Options { memory_bytes: Some(100 << 20), ..checked() };
    let Some(device) = device(&options) else { return };
    // Foreseen.
    let check = |device: &Wgpu, batch| MemoryEstimate::check(device, &config, batch, TOKENS);
    let error = check(&device, 64).unwrap_err();
    let (foreseen, sentence) = (advised_batch(&error.to_string()), error.to_string());
    assert!(sentence.starts_with("training in batches of 64 x 128 tokens takes ") && error.exit_code() == 2, "{error}");
    assert!(sentence.contains(" are free on "), "{error}");
    check(&device, foreseen).unwrap();
    check(&device, foreseen + 1).unwrap_err();
    // Met on the way.
    let mut model = Model::new(device, &Weights::init(&config, 3).unwrap()).unwrap();
    let error = train(&mut model, 64, TOKENS, 1).unwrap_err();
    let error = MemoryEstimate::advise(model.backend(), &config, 64, TOKENS, error);
    let sentence = error.to_string();
    assert!(matches!(error, Error::OutOfMemory { .. }) && error.exit_code() == 2, "{error}");
    for part in ["out of memory on ", " needs ", " are free; choose -b "] {
        assert!(sentence.contains(part), "{sentence}");
    }
    let advised = advised_batch(&sentence);
    assert!(advised + 1 >= foreseen && advised <= foreseen, "{sentence}, but {foreseen} was foreseen");
    // The advice holds, and the device is as good as before.
    let losses = train(&mut model, advised, TOKENS, 1).unwrap();
    assert!((losses[0].0 - 257f32.ln()).abs() < 0.5, "{losses:?}");
}

#[test]
fn a_model_that_memory_cannot_hold_is_refused() {
    let config = preset("toy").unwrap().model;
    let Some(device) = device(&Options { memory_bytes: Some(2 << 20), ..Options::default() }) else { return };
    let error = MemoryEstimate::check(&device, &config, 1, 8).unwrap_err().to_string();
    assert!(
        error.ends_with("not even one sequence of 8 tokens fits, choose a smaller -t or a smaller model"),
        "{error}"
    );
    let error = Model::new(device, &Weights::init(&config, 3).unwrap()).err().unwrap().to_string();
    assert!(
        error.contains("parameters needs ") && error.ends_with("the model itself does not fit, choose a smaller one")
    );
}

#[test]
fn a_buffer_larger_than_any_may_be_is_foreseen() {
    let Some(device) = device(&Options::default()) else { return };
    let most = device.max_buffer_bytes().unwrap();
    let config = GptConfig { num_layers: 1, max_seq_len: 1 << 20, ..preset("toy").unwrap().model };
    // GELU's input is the largest buffer of a batch.
    let batch = most / (4 * 4 * config.channels * config.max_seq_len) + 1;
    let error = MemoryEstimate::check(&device, &config, batch, config.max_seq_len).unwrap_err().to_string();
    assert!(error.contains("of them for ") && error.contains(", but a buffer may have "), "{error}");
}

/// What graphics inside a laptop's processor have: the limits that WebGPU promises and 2 GB for the whole training.
#[test]
fn a_laptop_trains_tinystories_7m() {
    let options = Options {
        default_limits: true,
        tuning: Some(Tuning::of(AdapterKind::Integrated)),
        memory_bytes: Some(2_000_000_000),
        ..Options::default()
    };
    let Some(device) = device(&options) else { return };
    let preset = preset("tinystories-7m").unwrap();
    for fc1_bandwidth in [0, 256] {
        let config = GptConfig { fc1_bandwidth: fc1_bandwidth.into(), ..preset.model };
        MemoryEstimate::check(&device, &config, preset.batch_size, config.max_seq_len).unwrap();
    }
    let config = GptConfig { fc1_bandwidth: 256.into(), ..preset.model };
    let mut model = Model::new(device, &Weights::init(&config, 3).unwrap()).unwrap();
    let losses = train(&mut model, 2, config.max_seq_len, 2).unwrap();
    assert!((losses[0].0 - 50257f32.ln()).abs() < 0.5 && losses[1].0 < losses[0].0, "{losses:?}");
}

/// GPT-2's embedding has 154 MB, and a binding 128 MiB.
#[test]
fn a_head_larger_than_a_binding_trains_as_on_the_reference() {
    let Some(device) = device(&Options { default_limits: true, ..Options::default() }) else { return };
    let config = GptConfig { num_layers: 1, max_seq_len: 16, ..preset("gpt2").unwrap().model };
    let table = ParamTable::new(&config).unwrap();
    assert!(table.tensors().iter().any(|tensor| 4 * tensor.span.len > 128 << 20), "every tensor fits a binding");
    let weights = Weights::init(&config, 3).unwrap();
    let losses = train(&mut Model::new(device, &weights).unwrap(), 1, 16, 2).unwrap();
    let expected = train(&mut Model::new(Cpu::new(), &weights).unwrap(), 1, 16, 2).unwrap();
    for ((loss, norm), (expected_loss, expected_norm)) in losses.iter().zip(&expected) {
        assert!((loss - expected_loss).abs() <= 2e-5 * expected_loss, "loss {loss}, not {expected_loss}");
        assert!((norm - expected_norm).abs() <= 1e-4 * expected_norm, "norm {norm}, not {expected_norm}");
    }
}

/// A product of 2 * 256^3 FLOPs on an adapter of this many FLOP/s: its results, and the dispatches that it took.
fn product(slow_flops: f64) -> Option<(Vec<f32>, usize)> {
    const N: usize = 256;
    let tuning = Tuning::of(AdapterKind::Integrated).with_slow_flops(slow_flops);
    let mut device = device(&Options { tuning: Some(tuning), ..Options::default() })?;
    let values: Vec<f32> = (0..N * N + N).map(|k| ((k * k) % 17) as f32 - 8.0).collect();
    let mut params = device.alloc(Role::Parameters, "params", N * N + N).unwrap();
    let mut inp = device.alloc(Role::Activations, "inp", N * N).unwrap();
    let mut out = device.alloc(Role::Activations, "out", N * N).unwrap();
    device.upload(&mut params, 0, &values).unwrap();
    device.upload(&mut inp, 0, &values[N..]).unwrap();
    let (weight, bias) = (Span { offset: 0, len: N * N }, Span { offset: N * N, len: N });
    if !device.profile_start().unwrap() {
        skip::skip("timestamps", "this adapter times no dispatches, so they cannot be counted");
        return None;
    }
    let dims = LinearDims { rows: N, inputs: N, outputs: N };
    device.linear_forward(&mut out, None, &inp, &params, Affine { weight, bias }, dims).unwrap();
    let dispatches = device.profile_finish().unwrap().iter().map(|time| time.count).sum();
    Some((device.download(&out, Span { offset: 0, len: N * N }).unwrap(), dispatches))
}

/// A dispatch takes less than half a second on the slowest adapter that there may be, or the system's watchdog resets it.
#[test]
fn a_slow_adapter_gets_its_work_in_pieces() {
    let Some((whole, 1)) = product(1e12) else { return };
    let (pieces, dispatches) = product(2e7).unwrap();
    // 33.6 MFLOP are 1.7 s of it.
    assert!(dispatches >= 4, "{dispatches} dispatches");
    assert!(whole == pieces, "pieces change results");
}

/// A sum of squares, by pipelines that `options` may have kept, and how many bytes of them were.
fn norm(options: &Options) -> Option<(Option<usize>, f32)> {
    let mut device = device(options)?;
    let mut values = device.alloc(Role::Gradients, "values", 1000).unwrap();
    device.upload(&mut values, 0, &[3.0; 1000]).unwrap();
    let mut norm = device.alloc(Role::Statistics, "norm", 1).unwrap();
    device.grad_norm(&mut norm, &values).unwrap();
    let norm = device.download(&norm, Span { offset: 0, len: 1 }).unwrap()[0];
    Some((device.kept_pipeline_bytes(), norm))
}

/// A file of the cache's folder with these contents: their checksum comes first.
fn kept_file(contents: &[u8]) -> Vec<u8> {
    [Sha256::digest(contents).as_slice(), contents].concat()
}

#[test]
fn pipelines_are_kept_and_damaged_ones_are_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { cache_folder: Some(folder.path().join("kept")), ..Options::default() };
    let Some((found, expected)) = norm(&options) else { return };
    let Some(found) = found else {
        skip::skip("pipeline-cache", "this adapter's driver gives no compiled pipelines out");
        return;
    };
    assert!(found == 0 && (expected - 9000f32.sqrt()).abs() < 1e-3, "{found} bytes, {expected}");
    let files: Vec<_> = std::fs::read_dir(folder.path().join("kept")).unwrap().map(|f| f.unwrap().path()).collect();
    let [file] = &files[..] else { panic!("{files:?}") };
    let whole = std::fs::read(file).unwrap();
    let contents = &whole[32..];
    assert!(whole == kept_file(contents));
    assert_eq!(norm(&options), Some((Some(contents.len()), expected)));

    let [mut flipped, mut foreign] = [whole.clone(), contents.to_vec()];
    flipped[40] ^= 1;
    // Behind wgpu's magic number, version and pointer size: backend and adapter.
    foreign[16..32].fill(0xee);
    let damaged = [whole[..whole.len() / 2].to_vec(), Vec::new(), [&whole[..], &[0]].concat(), flipped];
    let strange = [kept_file(&foreign), kept_file(b"no pipelines at all"), kept_file(&[])];
    for (index, bytes) in damaged.iter().chain(&strange).enumerate() {
        std::fs::write(file, bytes).unwrap();
        let (found, result) = norm(&options).unwrap();
        assert_eq!(result, expected);
        assert!(index >= damaged.len() || found == Some(0), "{found:?} bytes of a damaged file were used");
        let now = std::fs::read(file).unwrap();
        assert!(now == kept_file(&now[32..]) && now != *bytes, "file {index} stayed as it was");
    }
}
