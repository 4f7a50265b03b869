//! Models that learn which blocks of their MLPs they keep: trained, resumed, looked at, traded.

use crate::common::{Place, json_lines};
use bandtrain::checkpoint::{load, load_with_moments};
use bandtrain::shapes::{Param, ParamTable};
use bandtrain::weights::Weights;
use serde_json::Value;

/// Exchanges after steps 3, 6 and 9. Everything else that an exchange has to get along with is there too.
const RUN: &str = "--preset toy --backend cpu -b 1 -t 16 --grad-accum 2 -v 4 -m 1 -s 0 --schedule constant --warmup 0 \
                   --weight-decay 0.1 --skip-loss-zscore 6 -w learned:0.5:3 -2 64,learned:0.75:band,0,strided:0.6 \
                   --learn-every 3 --learn-fraction 0.9 --learn-until 11 --metrics m.jsonl -c m.safetensors";

fn blocks(weights: &Weights, param: Param, layer: usize) -> String {
    weights.table().band(param, layer).unwrap().0.blocks().unwrap().to_text()
}

/// The metrics without times.
fn metrics(place: &Place) -> Vec<String> {
    let timeless = json_lines(&place.path("m.jsonl")).into_iter().map(|mut record| {
        record.retain(|key, _| key != "tok_per_s" && key != "step_ms");
        serde_json::to_string(&record).unwrap()
    });
    timeless.collect()
}

#[test]
fn blocks_are_learned_and_resumed() {
    let whole = Place::new();
    let stdout = whole.ok(&format!("{RUN} -n 12"));
    assert!(stdout.contains("learned blocks: exchanged every 3 steps before step 11, at first 0.9000"), "{stdout}");
    let line = stdout.lines().find(|line| line.starts_with("step 3/12 |") && line.contains("learned blocks")).unwrap();
    assert!(line.contains(" of 22 learned blocks exchanged (fraction 0.74"), "{line}");
    let records = json_lines(&whole.path("m.jsonl")).into_iter().filter_map(|record| {
        let changed = record.get("exchanged")?.as_object()?.values().map(|count| count.as_u64().unwrap()).sum::<u64>();
        Some((record["step"].as_u64()?, changed, record["exchanged"].as_object()?.len()))
    });
    let records: Vec<_> = records.collect();
    assert_eq!(records.iter().map(|(step, ..)| *step).collect::<Vec<_>>(), [3, 6, 9]);
    assert!(records.iter().all(|(_, changed, tensors)| *changed <= 22 && *tensors == 5) && records[0].1 > 0);

    let (checkpoint, moments) = load_with_moments(&whole.path("m.safetensors")).unwrap();
    let weights = &checkpoint.weights;
    let start = ParamTable::new(weights.config()).unwrap();
    let mut others = 0;
    for (param, layer, count) in
        [0, 1, 2, 3].map(|layer| (Param::Fcw, layer, 4)).into_iter().chain([(Param::Fcprojw, 1, 6)])
    {
        let (band, kept) = (weights.table().band(param, layer).unwrap().0, start.band(param, layer).unwrap().0);
        others += band.blocks().unwrap().count_beside(kept.blocks().unwrap());
        assert_eq!(band.blocks().unwrap().count(), count);
        let at = |k: usize| if param == Param::Fcw { (k / 128, k % 128) } else { (k % 512, k / 512) };
        for set in [weights, &moments.first, &moments.second] {
            let dense = set.dense(param, layer);
            assert!((0..dense.len()).all(|k| dense[k] == 0.0 || band.contains(at(k).0, at(k).1)));
        }
    }
    assert!(others > 0);
    assert_eq!(
        blocks(weights, Param::Fcprojw, 3),
        start.band(Param::Fcprojw, 3).unwrap().0.blocks().unwrap().to_text()
    );

    // Stopped between exchanges, at one, and after the last.
    for stop in [5, 6, 11] {
        let resumed = Place::new();
        resumed.ok(&format!("{RUN} -n {stop}"));
        resumed.ok(&format!("{RUN} -n 12 --resume"));
        assert!(whole.bytes("m.safetensors") == resumed.bytes("m.safetensors"), "after step {stop}");
        // The shorter run validated at its end as well.
        let losses = |place| metrics(place).into_iter().filter(|line| !line.contains("val_loss")).collect::<Vec<_>>();
        assert_eq!(losses(&whole), losses(&resumed), "after step {stop}");
    }
    let change = RUN.replace("--learn-every 3", "--learn-every 4");
    whole.mistake(&format!("{change} -n 13 --resume"), "learn-every was 3 and is now 4");
}

#[test]
fn learned_blocks_go_where_the_model_goes() {
    let place = Place::new();
    place.ok(&format!("{RUN} -n 4"));
    let weights = load(&place.path("m.safetensors")).unwrap().weights;
    place.ok("generate -e m.safetensors -n 3 --backend cpu");
    let stdout = place.ok("info -e m.safetensors --backend cpu");
    assert!(stdout.contains("m.safetensors: C=128") && stdout.contains("FC1 pattern learned:0.5:3: density 50.000 %"));
    assert!(stdout.contains("16 learned blocks, ") && stdout.contains("of them others than at the start"), "{stdout}");
    assert!(stdout.contains("whole gradients"), "{stdout}");
    let json: Value = serde_json::from_str(&place.ok("info -e m.safetensors --backend cpu --json")).unwrap();
    assert_eq!(json["blocks"]["h.2.fcw"], blocks(&weights, Param::Fcw, 2));
    assert_eq!(json["blocks"].as_object().unwrap().len(), 5);

    // Dense formats get zeros; what stays learned keeps its blocks, whatever becomes of the other layer.
    place.ok("convert -i m.safetensors -o dense.bin --to llmc");
    let dense = load(&place.path("dense.bin")).unwrap().weights;
    assert_eq!(dense.dense(Param::Fcw, 2), weights.dense(Param::Fcw, 2));
    let stdout = place.ok("convert -i m.safetensors -o other.safetensors --to safetensors -2 0");
    let other = load(&place.path("other.safetensors")).unwrap().weights;
    assert_eq!(other.stored(Param::Fcw, 1), weights.stored(Param::Fcw, 1), "{stdout}");
    place.ok("convert -i m.safetensors -o again.safetensors --to safetensors");
    assert_eq!(load(&place.path("again.safetensors")).unwrap().weights.values(), weights.values());
    place.ok("--backend cpu -e m.safetensors -b 1 -t 16 -n 2 -v 0 -s 0 --learn-every 0 -c next.safetensors");
    let next = load(&place.path("next.safetensors")).unwrap().weights;
    assert_eq!(blocks(&next, Param::Fcw, 1), blocks(&weights, Param::Fcw, 1));

    // With llm.c's format, the state beside it says the blocks.
    let llmc = RUN.replace("-c m.safetensors", "-c l.bin").replace("m.jsonl", "l.jsonl");
    place.ok(&format!("{llmc} -n 4"));
    let state = load(&place.path("l.state.safetensors")).unwrap().weights;
    assert_eq!(state.values(), weights.values());

    // Blocks of another number, or what are none.
    let text = blocks(&weights, Param::Fcw, 2);
    let key = b"\"h.2.fcw.blocks\":\"";
    for character in ["0", "2"] {
        let mut bytes = place.bytes("m.safetensors");
        let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len();
        bytes[at..at + text.len()].copy_from_slice(text.replacen('1', character, 1).as_bytes());
        place.write("bad.safetensors", bytes);
        let words = "which are not 4 of 4 x 2 blocks: it is damaged";
        place.mistake("generate -e bad.safetensors -n 3 --backend cpu", words);
    }
}

#[test]
fn what_makes_no_learning_is_a_mistake() {
    let place = Place::new();
    for option in ["--learn-every 5", "--learn-fraction 0.5", "--learn-until 7"] {
        let words = format!("{} is for learned blocks, but no layer has any", option.split(' ').next().unwrap());
        place.mistake(&format!("--preset toy --backend cpu -n 2 -w random:0.5 {option}"), &words);
    }
    place.mistake("-w learned:0.5 --learn-fraction 1", "it must be at least 0 and below 1");
    place.mistake("-w learned:0.5 --learn-every -1", "it must not be negative");
    place.mistake("-w learned:0.5:bands", "or band in its place for a diagonal start");
    place.mistake("-w learned", "learned lacks its density, as in learned:0.438");
    place.write("bad.toml", "fc1-bandwidth = \"learned:0.5\"\nlearn-fraction = 2.0\n");
    place.mistake("--config bad.toml", "it must be at least 0 and below 1");
    let stdout = place.ok("--preset toy --backend cpu -b 1 -t 8 -n 8 -v 0 -s 0 -w learned:0.5 -c m.safetensors");
    assert!(stdout.contains("exchanged every 100 steps before step 6, at first 0.3000"), "{stdout}");
    let resolved = place.read("m.toml");
    assert!(resolved.contains("learn-every = 100\nlearn-fraction = 0.3\nlearn-until = 6\n"), "{resolved}");
}
