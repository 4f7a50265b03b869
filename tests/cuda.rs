//! The CUDA backend against the reference: operation by operation in every precision, then whole steps on the golden runs, then
//! two runs against each other. Without a card (or the software CUDA of `tests/software_cuda`) these tests say so and pass;
//! `BANDTRAIN_REQUIRE=cuda` makes that a failure.

mod agreement;
mod card;
#[path = "golden.rs"]
mod golden;
#[path = "agreement/learning.rs"]
mod learning;
mod skip;

use bandtrain::backend::cuda::Options;
use bandtrain::backend::{Arithmetic, Attention, Device, Role, SequenceDims};
use bandtrain::config::preset;
use bandtrain::model::{Activations, Model};
use bandtrain::optim::{Optimizer, Recipe};
use bandtrain::parity;
use bandtrain::tolerance::UNIT_F32;
use bandtrain::weights::Weights;
use card::{device, of};

fn check_parity(options: Options) {
    let Some(device) = device(options) else { return };
    let rows = agreement::parity_rows(device, &[]);
    assert!(rows.len() > 600 && parity::summaries(&rows).len() == 5, "only {} rows", rows.len());
}

#[test]
fn every_operation_agrees_in_fp32() {
    check_parity(of(Arithmetic::Fp32));
}

#[test]
fn every_operation_agrees_in_tf32() {
    check_parity(of(Arithmetic::Tf32));
}

#[test]
fn every_operation_agrees_in_bf16() {
    check_parity(of(Arithmetic::Bf16));
}

/// Logits that exceed their share of memory go through in chunks of rows; a share of 4 KiB makes nearly all exceed it.
#[test]
fn every_operation_agrees_in_chunks() {
    check_parity(Options { arithmetic: Arithmetic::Bf16, logit_bytes: 4 << 10 });
}

macro_rules! golden_runs {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            let Some(device) = device(of(Arithmetic::Fp32)) else { return };
            golden::check(device, stringify!($name), UNIT_F32);
        }
    )*};
}

golden_runs! { dense fc1_bw64 fc2_bw32 both_odd both_wide }

#[test]
fn low_precisions_follow_the_golden_runs() {
    for arithmetic in [Arithmetic::Tf32, Arithmetic::Bf16] {
        for name in ["dense", "fc1_bw64", "fc2_bw32", "both_odd", "both_wide"] {
            let Some(device) = device(of(arithmetic)) else { return };
            golden::follow(device, name);
        }
    }
}

#[test]
fn layers_of_other_bandwidths_and_an_odd_width() {
    if let Some(device) = device(of(Arithmetic::Fp32)) {
        agreement::check_uneven_layers(device);
    }
}

#[test]
fn learned_blocks_are_exchanged() {
    let [first, twin, successor] = [(); 3].map(|()| device(of(Arithmetic::Fp32)));
    if let (Some(first), Some(twin), Some(successor)) = (first, twin, successor) {
        learning::check_learning(first, twin, successor);
    }
}

#[test]
fn two_runs_give_the_same_bits() {
    for arithmetic in [Arithmetic::Fp32, Arithmetic::Tf32, Arithmetic::Bf16] {
        let train = || device(of(arithmetic)).map(agreement::trained_bits);
        let Some(first) = train() else { return };
        agreement::assert_same(&first, &train().unwrap(), &format!("two runs in {}", arithmetic.name()));
    }
}

#[test]
fn what_does_not_fit_is_a_sentence() {
    let Some(mut device) = device(of(Arithmetic::Bf16)) else { return };
    for len in [1 << 45, usize::MAX] {
        let error = device.alloc(Role::Activations, "gelu", len).err().unwrap();
        assert!(error.to_string().contains("gelu needs") && error.exit_code() == 2, "{error}");
    }
    let dims = SequenceDims { batch: 1, tokens: 2, channels: 136, heads: 1 };
    let [mut out, qkv] = ["out", "qkv"].map(|name| device.alloc(Role::Activations, name, 2 * 3 * 136).unwrap());
    let mut log_sum_exp = device.alloc(Role::Statistics, "log_sum_exp", 2).unwrap();
    let error = device.attention_forward(&mut out, &mut log_sum_exp, &qkv, dims).unwrap_err();
    assert!(error.to_string().contains("head sizes C/NH up to 128, not 136"), "{error}");
}

#[test]
fn every_kernel_is_timed() {
    let Some(device) = device(of(Arithmetic::Bf16)) else { return };
    let mut model = Model::new(device, &Weights::init(&preset("toy").unwrap().model, 1).unwrap()).unwrap();
    let mut acts = Activations::new(&mut model, 1, 32, true).unwrap();
    let mut optimizer = Optimizer::new(&mut model).unwrap();
    assert!(model.backend().profile_start().unwrap());
    model.upload_batch(&mut acts, &[1; 32], &[2; 32]).unwrap();
    optimizer.micro_step(&mut model, &mut acts, 0, 1).unwrap();
    optimizer.update(&mut model, &Recipe::Stable.hyperparameters(), 1e-3).unwrap().collect(&mut model).unwrap();
    let times = model.backend().profile_finish().unwrap();
    for op in ["embed_forward", "band_expand", "attention_backward", "loss_forward_backward", "adamw_step"] {
        assert!(times.iter().any(|time| time.op == op && time.count > 0 && time.seconds >= 0.0), "{op} is missing");
    }
}

/// Runs the program where only these of the libraries are found, and returns the sentence and the exit code.
fn with_libraries(files: &[&str]) -> (String, Option<i32>) {
    let folder = tempfile::tempdir().unwrap();
    let from = std::env::var("BANDTRAIN_CUDA_LIBS").unwrap_or_default();
    for file in files {
        std::fs::copy(std::path::Path::new(&from).join(file), folder.path().join(file)).unwrap();
    }
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_bandtrain"))
        .args(["--backend", "cuda", "-n", "1", "-c", "model.bin"])
        .current_dir(folder.path())
        .env("BANDTRAIN_CUDA_LIBS", folder.path())
        .output()
        .unwrap();
    (String::from_utf8_lossy(&output.stderr).into_owned(), output.status.code())
}

/// With NVIDIA's libraries hidden one after the other, each case ends with advice.
#[test]
fn a_missing_library_is_a_sentence() {
    let from = std::env::var("BANDTRAIN_CUDA_LIBS").unwrap_or_default();
    if !std::path::Path::new(&from).join("libcublasLt.so.13").exists() {
        skip::skip(
            "cuda-libraries",
            "BANDTRAIN_CUDA_LIBS names no folder with all of NVIDIA's libraries to take some from",
        );
        return;
    }
    let (sentence, code) = with_libraries(&[]);
    if code == Some(0) {
        skip::skip("cuda-libraries", "this machine has NVIDIA's libraries in other places too");
        return;
    }
    let cases: [(&[&str], [&str; 2]); 3] = [
        (&[], ["NVIDIA's driver, and this machine has no libcuda.so.1", "install the driver of your card"]),
        (&["libcuda.so.1"], ["NVRTC (libnvrtc.so.13 or libnvrtc.so.12)", "pip install nvidia-cuda-nvrtc"]),
        (&["libcuda.so.1", "libnvrtc.so.13"], ["cuBLASLt (libcublasLt.so.13", "pip install nvidia-cublas"]),
    ];
    assert!(sentence.contains("driver"), "{sentence}");
    for (files, parts) in cases {
        let (sentence, code) = with_libraries(files);
        assert_eq!(code, Some(2), "{sentence}");
        assert!(parts.iter().all(|part| sentence.contains(part)), "{sentence}");
        assert!(sentence.starts_with("bandtrain: ") && sentence.trim_end().lines().count() == 1, "{sentence}");
    }
}
