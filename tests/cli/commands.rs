//! The commands beside training.

use crate::common::{Place, TINY, losses};
use crate::skip;
use bandtrain::checkpoint::{Meta, load};
use bandtrain::config::GptConfig;
use bandtrain::data::{TokenFile, Tokenizer};
use bandtrain::shapes::Param;
use bandtrain::weights::Weights;
use serde_json::Value;

/// The one JSON object that a command prints.
fn json(place: &Place, line: &str) -> Value {
    serde_json::from_str(&place.ok(line)).unwrap()
}

#[test]
fn every_help_shows_an_example() {
    let place = Place::new();
    let commands = ["", "train", "generate", "eval", "init", "tokenize", "data", "convert", "bench", "band", "info"];
    for command in commands {
        for flag in ["--help", "-h"] {
            let help = place.ok(&format!("{command} {flag}"));
            assert!(help.contains("Example") && help.contains("Usage: bandtrain"), "{command}:\n{help}");
        }
    }
    assert!(place.ok("--version").starts_with("bandtrain "));
}

#[test]
fn generation_repeats_itself_for_a_seed() {
    let place = Place::with_model_and_data();
    let text = |options: &str| place.ok(&format!("generate -e tiny.bin -n 30 {options}"));
    assert_eq!(text("--seed 1"), text("--seed 1"));
    assert_ne!(text("--seed 1"), text("--seed 2"));
    // The likeliest token needs no chance.
    assert_eq!(text("--temperature 0 --seed 1"), text("--temperature 0 --seed 2"));
    assert_eq!(text("--temperature 0"), text("--top-k 1"));
    assert_eq!(text("--temperature 0"), text("--top-p 0.0001"));
}

#[test]
fn generation_honours_prompt_samples_and_length() {
    let place = Place::with_model_and_data();
    let stdout = place.ok("generate -e tiny.bin -n 5 --samples 3 --prompt Once");
    assert!(stdout.contains("--- sample 1\nOnce") && stdout.contains("--- sample 3\nOnce"), "{stdout}");
    let stdout = place.ok("generate -e tiny.bin -n 5 --samples 3 --prompt Once --json");
    let objects: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (index, object) in objects.iter().enumerate() {
        assert_eq!(object["sample"], index);
        assert!(object["tokens"].as_u64().unwrap() <= 5 && object["text"].as_str().unwrap().starts_with("Once"));
    }
    assert!(objects.len() == 3 && objects[0]["text"] != objects[1]["text"], "{stdout}");
    // Longer than the model's context of 16, and nothing at all.
    assert!(json(&place, "generate -e tiny.bin -n 50 --json --temperature 0")["tokens"].as_u64().unwrap() > 16);
    for prompt in ["", " ", "é€😀", "two\nlines", "<|endoftext|>", "a sentence ".repeat(500).as_str()] {
        let stdout = place.succeed(place.command("generate -e tiny.bin -n 2 --prompt").arg(prompt));
        assert!(stdout.starts_with(prompt), "{prompt}");
    }
}

#[test]
fn eval_measures_what_training_validated() {
    let place = Place::with_model_and_data();
    let sizes = "-j val.bin -b 2 -t 8 -m 3";
    place.ok(&format!("-e tiny.bin -i train.bin {sizes} -n 4 -v 2 -s 0 -w 28 -c m.safetensors --metrics m.jsonl"));
    let val_losses = losses(&place.path("m.jsonl"), "val_loss");
    let eval = |model: &str| json(&place, &format!("eval -e {model} {sizes} --json"));
    let last = eval("m.safetensors");
    assert_eq!(last["loss"].as_f64().unwrap() as f32, val_losses[2]);
    assert_eq!((last["batches"].as_u64(), last["tokens"].as_u64()), (Some(3), Some(48)));
    let of_loss = f64::from(val_losses[2]).exp();
    assert!((last["perplexity"].as_f64().unwrap() / of_loss - 1.0).abs() < 1e-12, "{last}");
    // Without -m all batches there are, and the loss of fresh weights is that of a guess.
    let all = json(&place, "eval -e tiny.bin -j val.bin -b 2 --json");
    assert_eq!(all["batches"], 6);
    assert!((all["loss"].as_f64().unwrap() - 257f64.ln()).abs() < 0.2, "{all}");
    let line = place.ok("eval -e tiny.bin -j val.bin -b 2");
    assert!(line.starts_with("loss 5.") && line.contains("perplexity ") && line.ends_with("(6 batches)\n"), "{line}");
}

#[test]
fn init_and_convert_keep_the_weights_through_every_format() {
    let place = Place::new();
    place.ok("init --preset toy -w 64 -2 100 --seed 9 --output a.safetensors");
    for (from, to, format) in [
        ("a.safetensors", "b.bin", "llmc"),
        ("b.bin", "c", "hf"),
        ("c", "d.safetensors", "safetensors"),
        ("d.safetensors", "e.bin", "llmc"),
        ("e.bin", "f.bin", "llmc-bf16"),
        ("f.bin", "g.safetensors", "safetensors"),
    ] {
        let stdout = place.ok(&format!("convert --input {from} --output {to} --to {format}"));
        assert!(stdout.contains(" parameters as "), "{stdout}");
    }
    assert!(place.bytes("b.bin") == place.bytes("e.bin"));
    let weights = |name: &str| load(&place.path(name)).unwrap().weights;
    let (start, dense, rounded) = (weights("a.safetensors"), weights("d.safetensors"), weights("g.safetensors"));
    assert_eq!((start.config().fc1_bandwidth, start.config().fc2_bandwidth), (64.into(), 100.into()));
    assert_eq!((dense.config().fc1_bandwidth, rounded.config().fc2_bandwidth), (0.into(), 0.into()));
    for (param, layer) in [(Param::Wte, 0), (Param::Qkvw, 3), (Param::Fcw, 0), (Param::Fcprojw, 2), (Param::Lnfw, 0)] {
        let [start, dense, rounded] = [&start, &dense, &rounded].map(|weights: &Weights| weights.dense(param, layer));
        assert_eq!(start, dense, "{param:?}");
        let close = start.iter().zip(&rounded).all(|(exact, rounded)| (exact - rounded).abs() <= exact.abs() / 256.0);
        assert!(close, "{param:?}");
    }
}

#[test]
fn init_is_where_a_training_starts() {
    let place = Place::new();
    place.ok("init --preset toy --seed 3 --output start.safetensors");
    let first_loss = |model: &str| {
        place.ok(&format!("{model} -n 1 -b 2 -t 16 -v 0 -s 0 --warmup 1 -c m.safetensors --metrics m.jsonl --seed 3"));
        losses(&place.path("m.jsonl"), "train_loss")
    };
    assert_eq!(first_loss("--preset toy"), first_loss("-e start.safetensors"));
}

#[test]
fn text_becomes_tokens() {
    let place = Place::new();
    place.write("a.txt", "Hi\n<|endoftext|>\nyou\n");
    place.write("b.jsonl", "{\"story\": \"all\"}\n");
    let stdout = place.ok("tokenize --input a.txt b.jsonl --output t.bin --tokenizer bytes");
    assert!(stdout.contains("t.bin: 11 tokens") && stdout.contains("3 documents"), "{stdout}");
    let tokens = TokenFile::open(&place.path("t.bin"), Tokenizer::Bytes.vocab_size()).unwrap();
    assert_eq!(tokens.tokens(), [256, 72, 105, 256, 121, 111, 117, 256, 97, 108, 108]);
    assert_eq!(place.ok("tokenize --input a.txt --output g.bin --val-output v.bin --val-fraction 0.5 --quiet"), "");
    assert!(place.path("g.bin").exists() && place.path("v.bin").exists());
    let stdout = place.ok("data toy --output corpus");
    assert!(stdout.contains("corpus/toy_train.bin: 396,341 tokens"), "{stdout}");
    assert_eq!(place.ok("data toy --output corpus --tokenizer gpt2 --quiet"), "");
}

#[test]
fn a_band_counts_its_connections() {
    let place = Place::new();
    let band = json(&place, "band -w 1024 --json");
    assert_eq!((band["connections"].as_u64(), band["dense_connections"].as_u64()), (Some(459_136), Some(1_048_576)));
    assert!(band["packed_elements"].as_u64().unwrap() as f64 <= 1.15 * 459_136.0);
    let table = place.ok("band -w 1024 --svg band.svg");
    assert!(table.contains("*       1024        459,136   43.787 %"), "{table}");
    assert!(place.read("band.svg").starts_with("<svg"));
    assert!(place.ok("band -w 5000").contains("note: bandwidth 5000 keeps every connection"));
    assert_eq!(json(&place, "band -w 3 -C 5 --wide 11 --json")["narrow"], 5);
}

#[test]
fn info_accounts_for_memory() {
    let place = Place::new();
    let info = json(&place, "info --preset toy -b 2 -t 16 -w 64 --json");
    assert!(
        info["largest_batch"].as_u64().unwrap() > 2 && info["total_bytes"].as_u64().unwrap() > 4 * 600_000,
        "{info}"
    );
    assert_eq!(info["config"]["fc1_bandwidth"], 64);
    // An absurd batch is a question like any other.
    assert!(place.ok("info --preset gpt2-xl -b 2147483648").contains("Memory of training on"));
}

#[test]
fn info_lists_every_adapter() {
    let place = Place::new();
    let devices = json(&place, "info --preset toy --json")["devices"].as_array().unwrap().clone();
    let listed: Vec<&Value> = devices.iter().filter(|device| device["backend"] == "wgpu").collect();
    let adapters = bandtrain::backend::wgpu::adapters();
    if adapters.is_empty() {
        skip::skip("wgpu", "this machine has no adapter for Vulkan, Metal or DirectX 12");
    }
    assert_eq!(listed.len(), adapters.len());
    let text = place.ok("info --preset toy");
    for (device, adapter) in listed.into_iter().zip(&adapters) {
        assert_eq!((&device["name"], &device["kind"]), (&adapter.name.as_str().into(), &adapter.kind.name().into()));
        assert!(device["limits"]["maxStorageBufferBindingSize"].as_u64().unwrap() >= 128 << 20, "{device}");
        assert!(!device["features"].as_array().unwrap().is_empty() && text.contains(&adapter.describe()), "{text}");
        // By either of the two things that --adapter takes, it is the one that is used, and its memory is known.
        for choice in [adapter.index.to_string(), adapter.name.clone()] {
            let mut command = place.command("info --preset toy --json --adapter");
            let info: Value = serde_json::from_str(&place.succeed(command.arg(choice))).unwrap();
            assert_eq!(info["device"], adapter.describe().as_str());
            assert!(info["largest_batch"].as_u64().is_none_or(|batch| batch > 0), "{info}");
        }
    }
}

/// Every number of an object is finite and above 0.
fn all_positive(object: &Value, names: &[&str]) {
    for name in names {
        let number = object[name].as_f64().unwrap_or_else(|| panic!("{name} of {object}"));
        assert!(number > 0.0 && number.is_finite(), "{name} of {object}");
    }
}

const TIMING: [&str; 4] = ["milliseconds", "gb_per_s", "floor_milliseconds", "fraction_of_floor"];
const SMALL_KERNELS: &str = "bench kernels -C 16 --rows 8 -t 4 --vocab-size 100 --repeats 1";

#[test]
fn bench_kernels_tells_everything_in_json() {
    let place = Place::new();
    let report = json(&place, &format!("{SMALL_KERNELS} -w 8 16 --json"));
    all_positive(&report["ceilings"], &["gflop_per_s", "gb_per_s"]);
    assert!(report["ceilings"]["gflop_per_s_of"].as_str().unwrap().starts_with("dense product "), "{report}");
    let sizes = ["channels", "mlp_width", "rows", "sequences", "tokens_per_sequence", "heads", "vocab_size", "repeats"];
    assert_eq!(sizes.map(|name| report[name].as_u64().unwrap()), [16, 64, 8, 2, 4, 1, 100, 1]);
    let kernels = report["kernels"].as_array().unwrap();
    assert_eq!((kernels.len(), report["sums"].as_array().unwrap().len()), (6 * 3, 3));
    for kernel in kernels {
        all_positive(kernel, &TIMING);
        all_positive(kernel, &["gflop_per_s", "density", "of_dense", "speed_up", "ideal_speed_up"]);
        let product = |a: &str, b: &str| kernel[a].as_f64().unwrap() * kernel[b].as_f64().unwrap();
        assert!((product("speed_up", "of_dense") - 1.0).abs() < 1e-9, "{kernel}");
        let floor = product("fraction_of_floor", "milliseconds");
        assert!((floor / kernel["floor_milliseconds"].as_f64().unwrap() - 1.0).abs() < 1e-9, "{kernel}");
    }
    let break_even = report["break_even"].as_array().unwrap();
    assert_eq!((break_even.len(), &break_even[6]["product"]), (7, &"all six".into()));
    break_even.iter().for_each(|product| all_positive(product, &["density"]));
    let operations = report["operations"].as_array().unwrap();
    assert_eq!((operations.len(), &operations[16]["operation"]), (17, &"AdamW".into()));
    operations.iter().for_each(|operation| all_positive(operation, &TIMING));
    assert_eq!(
        (&operations[8]["operation"], &operations[16]["gflop_per_s"]),
        (&"attention forward".into(), &0.0.into())
    );
    for buffers in ["product_buffers", "operation_buffers"] {
        all_positive(&report[buffers], &["sets", "least_bytes"]);
    }
    let report = json(&place, &format!("{SMALL_KERNELS} -w 8 random:0.5 --json"));
    let kept = |index: usize| &report["kernels"][index]["bandwidth"];
    assert_eq!([kept(0), kept(1), kept(2)], [&Value::from(0), &8.into(), &"random:0.5".into()]);
    // The one block that 64 x 16 elements make.
    assert_eq!((&report["kernels"][2]["density"], &report["kernels"][2]["stored"]), (&1.0.into(), &1.0.into()));
    all_positive(&report["kernels"][1], &["stored"]);
}

#[test]
fn bench_kernels_prints_what_was_measured() {
    let text = Place::new().ok(SMALL_KERNELS);
    let parts = [
        "C=16 W=64 M=8 in fp32 on CPU",
        "this device, measured: ",
        " GFLOP/s (dense product ",
        " MB a run)",
        "products of the MLP, on 16 sets of buffers in turn",
        "FC2 weight gradient ",
        "all six ",
        "the band is faster than the dense product",
        "other operations, B=2 T=4 NH=1 V=100, on 16 sets of buffers in turn",
        "head + loss, all gradients ",
        "AdamW ",
    ];
    for part in parts {
        assert!(text.contains(part), "'{part}' is missing in {text}");
    }
    // The defaults: 4C, 2C, C and C / 2.
    for bandwidth in [64, 32, 16, 8] {
        assert!(text.lines().any(|line| line.starts_with(&format!("FC1 input gradient {bandwidth:>18} "))), "{text}");
    }
    let text = Place::new().ok("bench kernels -C 128 --rows 8 -t 4 --vocab-size 100 --repeats 1 -w 256 strided:0.5");
    let line = |name: &str| {
        let found = text.lines().find(|line| line.starts_with("all six ") && line.contains(name));
        found.unwrap_or_else(|| panic!("{name} is missing in {text}")).split_whitespace().collect::<Vec<_>>()
    };
    assert_eq!(line(" strided:0.5 ")[2..7], ["strided:0.5", "50.00", "%", "50.00", "%"]);
    assert_eq!((line(" 256 ")[3], line(" dense ")[3..7].join(" ")), ("43.90", "100.00 % 100.00 %".to_string()));
}

#[test]
fn bench_step_tells_everything_in_json() {
    let place = Place::new();
    let report = json(&place, "bench step --preset toy -b 1 -t 4 -w 64 --repeats 1 --peak-tflops 2 --json");
    all_positive(&report, &["peak_tflop_per_s", "sequences", "tokens_per_sequence", "repeats"]);
    let steps = report["steps"].as_array().unwrap();
    assert_eq!((steps.len(), &steps[0]["speed_up"], &steps[1]["fc1_bandwidth"]), (2, &1.0.into(), &64.into()));
    let ceiling = report["ceilings"]["gflop_per_s"].as_f64().unwrap();
    for step in steps {
        let names = ["parameters", "milliseconds", "tok_per_s", "gflop_per_s", "mfu", "mfu_of_peak", "estimated_bytes"];
        all_positive(step, &names);
        let number = |name: &str| step[name].as_f64().unwrap();
        assert!((number("mfu") * ceiling / number("gflop_per_s") - 1.0).abs() < 1e-9, "{step}");
        assert!((number("mfu_of_peak") * 2e3 / number("gflop_per_s") - 1.0).abs() < 1e-9, "{step}");
        assert!((number("tok_per_s") * number("milliseconds") - 4e3).abs() < 1e-6, "{step}");
        let groups = step["groups"].as_array().unwrap();
        // Embeddings are what is left over.
        groups.iter().for_each(|group| all_positive(group, &["milliseconds", "share"]));
        assert_eq!((groups.len(), &groups[0]["group"], &step["timed_by"]), (7, &"mlp_products".into(), &"host".into()));
        let seconds: f64 = step["ops"].as_array().unwrap().iter().map(|op| op["seconds"].as_f64().unwrap()).sum();
        let together: f64 = groups.iter().map(|group| group["milliseconds"].as_f64().unwrap()).sum();
        assert!((together - 1e3 * seconds).abs() < 1e-9, "{step}");
    }
    let ops_of = |step: &Value, part: &str| -> Vec<String> {
        let ops = step["ops"].as_array().unwrap().iter().filter(|op| op["part"] == part);
        ops.map(|op| op["op"].as_str().unwrap().to_string()).collect()
    };
    assert_eq!((ops_of(&steps[0], "mlp").len(), ops_of(&steps[0], "attention").len()), (3, 3));
    assert!(ops_of(&steps[1], "mlp").is_empty() && ops_of(&steps[1], "model").contains(&"band_outer".to_string()));
    let without_peak = json(&place, "bench step -b 1 -t 4 --repeats 1 --json");
    assert!(without_peak["steps"][0]["mfu_of_peak"].is_null() && without_peak["peak_tflop_per_s"].is_null());
}

#[test]
fn bench_step_prints_what_was_measured() {
    let place = Place::new();
    let text = place.ok("bench step -b 1 -t 4 --repeats 1 --peak-tflops 0.5");
    let parts = [
        "toy: B=1 T=4 in fp32 on CPU",
        "this device, measured: ",
        "of peak: of the 0.5 TFLOP/s given with --peak-tflops",
        "one step by groups, ms and share, timed by the host",
        "attention products",
        "head + loss",
        "banded 256: ",
        "linear_backward_weight, MLP",
    ];
    for part in parts {
        assert!(text.contains(part), "'{part}' is missing in {text}");
    }
    let text = place.ok("bench step -b 1 -t 4 --repeats 1 -w strided:0.5");
    assert!(!text.contains("of peak") && text.lines().any(|line| line.starts_with("strided:0.5  ")), "{text}");
}

#[test]
fn models_of_any_shape_are_understood() {
    let place = Place::with_model_and_data();
    place.save_model(
        "odd.safetensors",
        GptConfig { channels: 10, num_heads: 5, fc1_bandwidth: 7.into(), ..TINY },
        Meta::default(),
    );
    place.ok("-e odd.safetensors -i train.bin -j val.bin -n 2 -b 1 -t 5 -v 1 -m 1 -s 1 -g 3 -c m.bin");
    place.ok("generate -e m.bin -n 3");
}

#[test]
fn converting_to_hugging_face_brings_the_tokenizer_that_fits() {
    let place = Place::with_model_and_data();
    let stdout = place.ok("convert --input tiny.bin --output hf --to hf");
    assert!(stdout.contains("parameters as hf") && !stdout.contains("note"), "{stdout}");
    assert!(place.read("hf/tokenizer_config.json").contains("\"model_max_length\": 16"));
    assert_eq!(place.read("hf/merges.txt"), "#version: 0.2\n");
    place.save_model("odd.bin", GptConfig { vocab_size: 300, padded_vocab_size: 320, ..TINY }, Meta::default());
    let stdout = place.ok("convert --input odd.bin --output odd --to hf");
    assert!(
        stdout.contains("note: without a tokenizer, since none is known that fits the model's 300 tokens"),
        "{stdout}"
    );
    assert!(!place.path("odd/tokenizer.json").exists() && place.path("odd/generation_config.json").exists());
}

#[test]
fn converting_can_band_and_says_what_that_cuts() {
    let place = Place::with_model_and_data();
    let stdout = place.ok("convert --input tiny.bin --output banded.safetensors --to safetensors -w 32 -2 16");
    assert!(stdout.contains("banding FC1 cut ") && stdout.contains("banding FC2 cut "), "{stdout}");
    // Back to dense and once more into the same band nothing is left to cut.
    for (bits, format) in [("32", "llmc"), ("16", "llmc-bf16")] {
        let stdout = place.ok(&format!("convert --input banded.safetensors --output {bits}.bin --to {format}"));
        assert!(!stdout.contains("cut"), "{stdout}");
        let again = format!("convert --input {bits}.bin --output {bits}.safetensors --to safetensors -w 32 -2 16");
        let stdout = place.ok(&again);
        assert!(stdout.contains("banding FC1 cut 0.00 %") && stdout.contains("banding FC2 cut 0.00 %"), "{stdout}");
    }
    assert!(place.bytes("32.safetensors") == place.bytes("banded.safetensors"));
    let weights = |name: &str| load(&place.path(name)).unwrap().weights;
    for (exact, rounded) in weights("banded.safetensors").values().iter().zip(weights("16.safetensors").values()) {
        assert!((exact - rounded).abs() <= exact.abs() / 256.0, "{exact} {rounded}");
    }
    // One of the two alone; 0 is dense; what training says of the same cut.
    let said = place.ok("convert --input tiny.bin --output fc2.safetensors --to safetensors -2 16");
    assert!(!said.contains("FC1") && said.contains("banding FC2 cut"), "{said}");
    let trained = place.ok("-e tiny.bin -i train.bin -b 2 -n 1 -v 0 -s 0 -w 32 -2 16 -c trained.safetensors");
    let cut = stdout_line(&stdout, "banding FC1");
    assert!(trained.contains(cut), "{trained} should say: {cut}");
    let dense = place.ok("convert --input banded.safetensors --output dense.safetensors --to safetensors -w 0 -2 0");
    assert!(!dense.contains("cut"), "{dense}");
    assert_eq!(weights("dense.safetensors").config().fc1_bandwidth, 0.into());
}

/// The line of an output that begins like this.
fn stdout_line<'a>(stdout: &'a str, start: &str) -> &'a str {
    stdout.lines().find(|line| line.starts_with(start)).unwrap()
}

#[test]
fn parity_of_some_cases_shows_these_alone() {
    let place = Place::new();
    let rows = |line: &str| -> Vec<String> {
        let report = json(&place, line);
        assert_eq!(report["failed"], 0, "{report}");
        let word = |row: &serde_json::Value, key: &str| row[key].as_str().unwrap().to_string();
        let of = |row: &serde_json::Value| word(row, "op") + " " + &word(row, "shape");
        report["rows"].as_array().unwrap().iter().map(of).collect()
    };
    let some = rows("parity --backend cpu --json --only layernorm --only N=7");
    assert!(some.iter().all(|row| row.contains("layernorm") || row.contains("N=7 ")), "{some:?}");
    assert!(
        some.iter().any(|row| row.contains("layernorm")) && some.iter().any(|row| row.contains("band ")),
        "{some:?}"
    );
    assert!(some.len() < rows("parity --backend cpu --json").len() / 2);
    let printed = place.ok("parity --backend cpu --only layernorm --quiet");
    assert!(printed.contains(" rows pass") && printed.lines().count() == 2, "{printed}");
    place.mistake("parity --backend cpu --only nonesuch", "no case of the parity suite has any --only text");
}

#[test]
fn hellaswags_lines_become_questions_to_score() {
    let place = Place::new();
    place.write("val.jsonl", include_bytes!("../fixtures/hellaswag.jsonl"));
    assert_eq!(place.ok("tokenize --hellaswag --input val.jsonl --output gpt2.bin"), "gpt2.bin: 3 questions\n");
    assert_eq!(place.ok("tokenize --hellaswag --input val.jsonl --output b.bin --tokenizer bytes --quiet"), "");
    let words: Vec<u16> = bytemuck::pod_collect_to_vec(&place.bytes("gpt2.bin")[1024..]);
    // The beginning of the second question: "The kettle boils." as GPT-2 reads it, 'He' behind a space.
    let second = usize::from(words[1]) / 2;
    let [context, ending] = ["The kettle boils.", " He eats the kettle."].map(|text| Tokenizer::Gpt2.encode(text));
    assert_eq!(words[second + 2..][..4], [1, 2, 4, context.len() as u16]);
    assert_eq!(words[second + 6..][..context.len()], context);
    assert_eq!(words[second + 7 + context.len()..][..ending.len()], ending);

    place.save_model("m.bin", GptConfig { max_seq_len: 128, ..TINY }, Meta::default());
    let score = json(&place, "eval -e m.bin --hellaswag b.bin --json");
    let (correct, questions) = (score["correct"].as_u64().unwrap(), score["questions"].as_u64().unwrap());
    assert_eq!((questions, score["accuracy"].as_f64().unwrap()), (3, correct as f64 / 3.0));
    assert_eq!(json(&place, "eval -e m.bin --hellaswag b.bin --json -b 16"), score);
    assert_eq!(json(&place, "eval -e m.bin --hellaswag b.bin --json -m 2")["questions"], 2);
    let line = place.ok("eval -e m.bin --hellaswag b.bin");
    assert!(line.starts_with("accuracy ") && line.contains(" of 3 questions, by mean loss"), "{line}");
}

#[test]
fn a_model_answers_what_it_was_taught() {
    let place = Place::with_model_and_data();
    place.ok("-e tiny.bin -i train.bin -b 4 -n 150 -l 0.01 -v 0 -s 0 -c m.safetensors");
    let question = |label: usize, context: &str, right: &str| {
        let mut endings = ["zz", "qq", "xvx", "kj"];
        endings[label] = right;
        serde_json::json!({ "ctx": context, "endings": endings, "label": label }).to_string()
    };
    let lines = [question(0, "One day a cat", "sat"), question(3, "on a mat", "and"), question(2, "and saw", "a rat.")];
    place.write("q.jsonl", lines.join("\n"));
    place.ok("tokenize --hellaswag --input q.jsonl --output q.bin --tokenizer bytes");
    let score = json(&place, "eval -e m.safetensors --hellaswag q.bin --json");
    assert_eq!((score["accuracy"].as_f64(), score["correct"].as_u64()), (Some(1.0), Some(3)), "{score}");
}
