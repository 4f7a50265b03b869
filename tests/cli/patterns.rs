//! Models whose MLPs keep patterns of blocks: shown, trained, resumed, traded.

use crate::common::Place;
use bandtrain::checkpoint::load;
use bandtrain::shapes::Param;
use serde_json::Value;

const RUN: &str = "--preset toy --backend cpu -b 1 -t 16 -v 0 -s 0 --schedule constant";
const PATTERNS: &str = "-w random:0.5:3 -2 64,strided:0.75,0,random:0.6";

#[test]
fn patterns_are_trained_and_resumed() {
    let (whole, resumed) = (Place::new(), Place::new());
    let stdout = whole.ok(&format!("{RUN} {PATTERNS} -n 4 -c m.safetensors"));
    assert!(stdout.contains("FC1 pattern random:0.5:3: 50.000 % of its connections"), "{stdout}");
    assert!(stdout.contains("FC2 patterns 64,strided:0.75,0,random:0.6: "), "{stdout}");
    assert!(whole.read("m.toml").contains("fc1-bandwidth = \"random:0.5:3\""));
    let weights = load(&whole.path("m.safetensors")).unwrap().weights;
    let mut patterns = Vec::new();
    for (param, layer) in [0, 1, 2, 3].map(|layer| (Param::Fcw, layer)).into_iter().chain([(Param::Fcprojw, 3)]) {
        let (band, _) = weights.table().band(param, layer).unwrap();
        patterns.push(band.blocks().unwrap().to_text());
        let dense = weights.dense(param, layer);
        let at = |k: usize| if param == Param::Fcw { (k / 128, k % 128) } else { (k % 512, k / 512) };
        assert!((0..dense.len()).all(|k| dense[k] == 0.0 || band.contains(at(k).0, at(k).1)));
        assert!(dense.iter().filter(|value| **value != 0.0).count() > band.count() * 9 / 10);
    }
    assert!(patterns[1..].iter().any(|pattern| *pattern != patterns[0]), "{patterns:?}");

    resumed.ok(&format!("{RUN} {PATTERNS} -n 2 -c m.safetensors"));
    resumed.ok("--config m.toml -n 4 --resume");
    assert!(whole.bytes("m.safetensors") == resumed.bytes("m.safetensors"));
    let words = "its model has other sizes or bandwidths";
    resumed.mistake("--config m.toml -n 5 --resume -w random:0.5:4", words);
    resumed.mistake("--config m.toml -n 5 --resume -w strided:0.5", words);
}

#[test]
fn patterns_are_made_and_traded() {
    let place = Place::new();
    place.ok(&format!("init --preset toy {PATTERNS} -o m.safetensors"));
    let weights = load(&place.path("m.safetensors")).unwrap().weights;
    place.ok("generate -e m.safetensors -n 3 --backend cpu");
    for (format, name) in [("llmc", "dense.bin"), ("hf", "dense-hf")] {
        place.ok(&format!("convert -i m.safetensors -o {name} --to {format}"));
        let dense = load(&place.path(name)).unwrap().weights;
        assert!(dense.config().fc1_bandwidth.is_dense());
        assert_eq!(dense.dense(Param::Fcw, 2), weights.dense(Param::Fcw, 2));
        let stdout = place.ok(&format!("convert -i {name} -o again.safetensors --to safetensors {PATTERNS}"));
        assert!(stdout.contains("banding FC1 cut 0.00 %") && stdout.contains("banding FC2 cut 0.00 %"), "{stdout}");
        assert_eq!(load(&place.path("again.safetensors")).unwrap().weights.values(), weights.values());
    }
    let stdout = place.ok("convert -i dense.bin -o other.safetensors --to safetensors -w random:0.5:4");
    assert!(!stdout.contains("banding FC1 cut 0.00 %"), "{stdout}");
}

#[test]
fn patterns_are_shown() {
    let place = Place::new();
    let json: Value = serde_json::from_str(&place.ok("band -w random:0.438:2 --json")).unwrap();
    assert_eq!((json["bandwidth"].as_str(), json["connections"].as_u64()), (Some("random:0.438:2"), Some(56 * 8192)));
    assert_eq!((json["packed_elements"].as_u64(), json["density"].as_f64()), (Some(56 * 8192), Some(0.4375)));
    let stdout = place.ok("band -w strided:0.5 -C 256 --svg band.svg");
    assert!(stdout.contains("strided:0.5 keeps 16 of 32 blocks: 131,072 connections, 50.000 %"), "{stdout}");
    let row = format!("{0}{1}{0}{1}", "#".repeat(16), ".".repeat(16));
    assert!(stdout.contains(&row), "{stdout}");
    assert!(place.read("band.svg").contains("16 of 32 blocks"));
    assert!(place.ok("band -w strided:0.5 -C 8").contains("pattern strided:0.5 keeps every connection"));
    let stdout = place.ok("info --backend cpu -w random:0.438 -2 strided:0.25");
    assert!(stdout.contains("FC1 pattern random:0.438: density 43.750 %, 3,670,016 of 8,388,608 weights"), "{stdout}");
    let json: Value = serde_json::from_str(&place.ok("info --backend cpu -2 strided:0.25 --json")).unwrap();
    assert_eq!(json["config"]["fc2_bandwidth"], "strided:0.25");
}

#[test]
fn what_makes_no_pattern_is_a_mistake() {
    let place = Place::new();
    place.write("bad.toml", "fc1-bandwidth = \"random:7\"\n");
    place.mistake("--config bad.toml", "the density '7' must lie between 0 and 1");
    for flag in ["-w ", "-2 ", "--fc2-bandwidth=", "init --preset toy -o m.safetensors -w ", "band -w "] {
        place.mistake(&format!("{flag}chess:0.5"), "there is no pattern 'chess'; choose random, strided or learned");
        place.mistake(&format!("{flag}random"), "random lacks its density, as in random:0.438");
        place.mistake(&format!("{flag}random:1.5"), "the density '1.5' must lie between 0 and 1");
        place.mistake(&format!("{flag}strided:0"), "the density '0' must lie between 0 and 1");
        place.mistake(&format!("{flag}random:0.5:-1"), "the seed of a random pattern must be a whole number from 0");
    }
    place.mistake("-w 64,strided:2,0,0 --preset toy", "the density '2' must lie between 0 and 1");
    place.mistake("-w 64,strided:0.5 --preset toy", "has 2 entries, but the model has 4 blocks");
    place.mistake(&format!("{RUN} -w random:0.5 --mlp-width 100"), "a band needs 1 <= N <= W");
}
