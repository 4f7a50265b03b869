//! The wgpu backend against the reference: operation by operation, then whole steps on the golden runs, then two runs
//! against each other. Without an adapter these tests say so and pass; `BANDTRAIN_REQUIRE=wgpu` makes that a failure.

mod adapter;
mod agreement;
#[path = "golden.rs"]
mod golden;
#[path = "agreement/learning.rs"]
mod learning;
mod skip;

use adapter::{checked, device};
use bandtrain::backend::cpu::Cpu;
use bandtrain::backend::wgpu::{AdapterKind, Options, Tuning, Wgpu};
use bandtrain::backend::{Attention, Device, Role, SequenceDims};
use bandtrain::tolerance::UNIT_F32;

/// Every case, or those that have one of `only` in their names: at least `least` rows.
fn check_parity(options: &Options, only: &[&str], least: usize) {
    let Some(device) = device(options) else { return };
    let rows = agreement::parity_rows(device, only);
    assert!(rows.len() >= least, "only {} rows", rows.len());
}

#[test]
fn every_operation_agrees_with_the_reference() {
    check_parity(&Options::default(), &[], 400);
}

/// The kernels of graphics hardware, wherever this runs, sums shared out as on a large card; then within the limits that are
/// promised everywhere; then in chunks, as what exceeds a binding goes through: a binding of 16 KiB makes nearly everything
/// exceed it. (One test, not three: most kernels are the same, and the later passes find them compiled, where the driver
/// keeps them.)
#[test]
fn every_operation_agrees_with_a_cards_kernels_within_the_default_limits_and_in_chunks() {
    let card = Options { tuning: Some(Tuning::of(AdapterKind::Discrete)), ..Options::default() };
    check_parity(&card, &[], 400);
    let limited = Options { default_limits: true, ..card };
    check_parity(&limited, &[], 400);
    check_parity(&Options { binding_bytes: Some(16 << 10), ..limited }, &[], 400);
}

/// The large tiles, which results as small as these get on an adapter that is soon busy. (Attention's are no others than before.)
#[test]
fn every_operation_agrees_with_large_tiles() {
    let tuning = Some(Tuning::of(AdapterKind::Discrete).with_busy_threads(1));
    check_parity(&Options { tuning, ..checked() }, &["linear", "w=", "loss"], 300);
}

/// Tiles that no table has, at a size or two: operands in several rounds, parts of rounds, one buffer, one panel, partly unrolled
/// loops.
#[test]
fn every_operation_agrees_with_other_tiles() {
    let tiles = "dense=64x96x32:4x12,32x128x8:4x8,64x32x8:4x8;expand=64x64x8:8x8,128x128x16:8x8;\
                 contract=64x128x16:8x8,32x32x8:4x4;outer=128x96x16:8x12;attention=64x64:4x8,64x64:8x4;busy=999;unroll=4;buffers=1";
    let tuning = Some(Tuning::of(AdapterKind::Discrete));
    let only = ["linear M=65", "linear M=64", "N=40 W=160", "N=96 W=384", "attention B=2 T=70"];
    check_parity(&Options { tuning, tuning_changes: Some(tiles.to_string()), ..Options::default() }, &only, 80);
}

/// The kernels of software adapters whose subgroups are no vectors of 8, at a size or two.
#[test]
fn every_operation_agrees_with_another_software_adapters_tiles() {
    let only = ["linear M=65", "N=40 W=160", "attention B=2 T=70"];
    check_parity(&Options { tuning: Some(Tuning::of(AdapterKind::Software)), ..Options::default() }, &only, 50);
}

/// Exchanging blocks, on the reference and on an adapter.
#[test]
fn learned_blocks_are_exchanged() {
    learning::check_learning(Cpu::new(), Cpu::new(), Cpu::new());
    let [first, twin, successor] = [(); 3].map(|()| device(&Options::default()));
    if let (Some(first), Some(twin), Some(successor)) = (first, twin, successor) {
        learning::check_learning(first, twin, successor);
    }
}

macro_rules! golden_runs {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            let Some(device) = device(&Options::default()) else { return };
            golden::check(device, stringify!($name), UNIT_F32);
        }
    )*};
}

golden_runs! { dense fc1_bw64 fc2_bw32 both_odd both_wide }

#[test]
fn a_golden_run_in_chunks() {
    let Some(device) = device(&Options { binding_bytes: Some(4 << 10), ..checked() }) else { return };
    golden::check(device, "both_odd", UNIT_F32);
}

#[test]
fn layers_of_other_bandwidths_and_an_odd_width() {
    if let Some(device) = device(&checked()) {
        agreement::check_uneven_layers(device);
    }
}

#[test]
fn two_runs_give_the_same_bits() {
    let train = |options: &Options| device(options).map(agreement::trained_bits);
    let Some(first) = train(&Options::default()) else { return };
    agreement::assert_same(&first, &train(&Options::default()).unwrap(), "two runs");
    agreement::assert_same(&first, &train(&checked()).unwrap(), "without and with bounds checks");
}

#[test]
fn what_does_not_fit_is_a_sentence() {
    let Some(mut device) = device(&Options { default_limits: true, ..checked() }) else { return };
    for len in [1 << 45, usize::MAX] {
        let error = device.alloc(Role::Activations, "gelu", len).err().unwrap();
        assert!(error.to_string().starts_with("gelu needs") && error.exit_code() == 2, "{error}");
    }
    let dims = SequenceDims { batch: 1, tokens: 2, channels: 132, heads: 1 };
    let [mut out, mut log_sum_exp, qkv] =
        ["out", "log_sum_exp", "qkv"].map(|name| device.alloc(Role::Activations, name, 2 * 3 * 132).unwrap());
    let error = device.attention_forward(&mut out, &mut log_sum_exp, &qkv, dims).unwrap_err();
    assert!(error.to_string().contains("head sizes C/NH up to 128, not 132"), "{error}");
}

#[test]
fn a_device_that_is_not_there_is_a_sentence() {
    let error = Wgpu::new(&Options { adapter: Some("no such card".into()), ..Options::default() }).err().unwrap();
    assert!(error.to_string().contains("'no such card'"), "{error}");
    assert_eq!(error.exit_code(), 2);
}
