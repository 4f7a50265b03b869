//! Models whose bandwidths differ over the depth, and whose MLPs are narrower than GPT-2's: trained, resumed, traded.

use crate::common::Place;
use bandtrain::bandwidths::Bandwidths;
use bandtrain::checkpoint::load;
use bandtrain::shapes::Param;
use serde_json::Value;

const RUN: &str = "--preset toy --backend cpu -b 1 -t 16 -v 0 -s 0 --schedule constant";

#[test]
fn bandwidths_differ_over_the_depth() {
    let (whole, resumed) = (Place::new(), Place::new());
    let stdout = whole.ok(&format!("{RUN} -w 64..16 -2 32,0,64,16 -n 4 -c m.safetensors"));
    assert!(stdout.contains("FC1 bandwidth 64..16: ") && stdout.contains("FC2 bandwidth 32,0,64,16: "), "{stdout}");
    let weights = load(&whole.path("m.safetensors")).unwrap().weights;
    let of = |param, layer| weights.table().band(param, layer).map_or(0, |(band, _)| band.bandwidth());
    assert_eq!([0, 1, 2, 3].map(|layer| of(Param::Fcw, layer)), [64, 48, 32, 16]);
    assert_eq!([0, 1, 2, 3].map(|layer| of(Param::Fcprojw, layer)), [32, 0, 64, 16]);
    assert!(whole.read("m.toml").contains("fc1-bandwidth = \"64..16\""));

    resumed.ok(&format!("{RUN} -w 64..16 -2 32,0,64,16 -n 2 -c m.safetensors"));
    resumed.ok("--config m.toml -n 4 --resume");
    assert!(whole.bytes("m.safetensors") == resumed.bytes("m.safetensors"));
    resumed.mistake("--config m.toml -n 5 --resume -w 64..8", "its model has other sizes or bandwidths");

    whole.ok("generate -e m.safetensors -n 3");
    whole.ok("convert -i m.safetensors -o dense.bin --to llmc");
    let stdout = whole.ok("convert -i dense.bin -o again.safetensors --to safetensors -w 64..16 -2 32,0,64,16");
    assert!(stdout.contains("banding FC2 cut 0.00 %"), "{stdout}");
    assert_eq!(load(&whole.path("again.safetensors")).unwrap().weights.values(), weights.values());
    whole.mistake(&format!("{RUN} -w 1,2,3"), "the list of bandwidths 1,2,3 has 3 entries, but the model has 4 blocks");
    whole.mistake(&format!("{RUN} -w 0..3"), "a ramp runs between bandwidths of at least 1");
    whole.mistake(&format!("{RUN} -w 3,x"), "it must consist of whole numbers");
}

#[test]
fn a_narrower_mlp_is_trained_and_traded_where_formats_know_it() {
    let place = Place::new();
    let stdout = place.ok(&format!("{RUN} -d 1 --mlp-width 200 -n 3 -c m.safetensors"));
    assert!(stdout.contains("FC1 dense, of width 200 instead of 512"), "{stdout}");
    let config = *load(&place.path("m.safetensors")).unwrap().weights.config();
    assert_eq!((config.mlp_width, config.fc1_bandwidth), (Some(200), Bandwidths::DENSE));
    place.ok("generate -e m.safetensors -n 3");
    place.ok("--config m.toml -n 4 --resume");
    place.ok("convert -i m.safetensors -o hf --to hf");
    let fields: Value = serde_json::from_str(&place.read("hf/config.json")).unwrap();
    assert_eq!(fields["n_inner"], 200);
    place.ok("convert -i hf -o back.safetensors --to safetensors");
    let [before, after] = ["m.safetensors", "back.safetensors"].map(|name| load(&place.path(name)).unwrap().weights);
    assert_eq!((before.config(), before.values()), (after.config(), after.values()));
    let words = "llm.c's format, whose MLPs have the width 4C = 512, but this model's have 200";
    place.mistake("convert -i m.safetensors -o m.bin --to llmc", words);
    place.mistake("init --preset toy --mlp-width 200 -o m.bin", words);
    place.mistake(&format!("{RUN} --mlp-width 200 -n 3 -c m.bin"), words);
    place.mistake(
        &format!("-e m.safetensors -c n.safetensors -n 1 {} --mlp-width 300", "--backend cpu"),
        "has an MLP of width 200",
    );
    place.mistake(&format!("{RUN} --mlp-width 0"), "it must be at least 1");
    place.mistake(&format!("{RUN} --mlp-width 100"), "a band needs 1 <= N <= W");
}

#[test]
fn fresh_weights_of_banded_layers_are_rescaled_where_asked() {
    let place = Place::new();
    place.ok("init --preset toy -w 128 -o plain.safetensors");
    place.ok("init --preset toy -w 128 --rescale-init -o rescaled.safetensors");
    let [plain, rescaled] =
        ["plain.safetensors", "rescaled.safetensors"].map(|name| load(&place.path(name)).unwrap().weights);
    let (band, _) = plain.table().band(Param::Fcw, 1).unwrap();
    let factor = (1.0 / band.density()).sqrt() as f32;
    let expected: Vec<f32> = plain.stored(Param::Fcw, 1).iter().map(|value| value * factor).collect();
    assert_eq!(rescaled.stored(Param::Fcw, 1), expected);
    assert_eq!(rescaled.stored(Param::Fcprojw, 1), plain.stored(Param::Fcprojw, 1));
    place.ok(&format!("{RUN} -w 128 --rescale-init -n 1 -c a.safetensors"));
    let words = "rescale-init was true and is now nothing";
    place.mistake(&format!("{RUN} -w 128 -n 2 -c a.safetensors --resume"), words);
    place.mistake("-e plain.safetensors --rescale-init -n 1", "cannot be used with");
}
