//! The order of batches against llm.c's own and against a plain restatement of its rule.

use bandtrain::data::loader::{DEFAULT_SEED, Loader, Shuffle};
use bandtrain::data::{Position, TokenWriter};
use rand_mt::Mt;

/// The first 650 batch indices that llm.c serves from 2,663,532 tokens with B = 16 and T = 512.
const REFERENCE: &str = include_str!("fixtures/ts_batch_order.csv");
const TOKENS: usize = 2_663_532;

fn reference() -> Vec<u32> {
    REFERENCE.lines().skip(1).map(|line| line.split(',').nth(1).unwrap().parse().unwrap()).collect()
}

fn first_inputs(loader: &mut Loader, batch_tokens: usize) -> u32 {
    let (mut inputs, mut targets) = (vec![0; batch_tokens], vec![0; batch_tokens]);
    loader.next_batch(&mut inputs, &mut targets).unwrap();
    assert_eq!(inputs[1..], targets[..batch_tokens - 1]);
    inputs[0]
}

/// Every token of a batch says which batch it belongs to.
fn labelled(tokens: usize, batch_tokens: usize) -> Vec<u16> {
    (0..tokens).map(|index| (index / batch_tokens) as u16).collect()
}

#[test]
fn the_reference_order_is_reproduced() {
    let tokens = labelled(TOKENS, 16 * 512);
    let mut loader = Loader::from_tokens(tokens, "synthetic", 16, 512, Shuffle::Llmc, DEFAULT_SEED).unwrap();
    assert_eq!((loader.num_tokens(), loader.batches_per_epoch()), (TOKENS, 325));
    let reference = reference();
    assert_eq!(reference.len(), 650);
    for (step, &expected) in reference.iter().enumerate() {
        assert_eq!(first_inputs(&mut loader, 16 * 512), expected, "step {step}");
    }
    // The same again from a saved position in the second epoch.
    let position: Position = serde_json::from_str(r#"{"batches": 400}"#).unwrap();
    loader.seek(position).unwrap();
    assert_eq!(first_inputs(&mut loader, 16 * 512), reference[400]);
}

/// llm.c's rule in the plainest words: the (shard, batch) pairs of the first `epochs` epochs.
fn restated(batches_of_shards: &[u32], epochs: usize, seed: u32) -> Vec<(u32, u32)> {
    let mut random = Mt::new(seed);
    let mut shuffle = |list: &mut Vec<u32>| {
        let mut i = list.len();
        while i > 1 {
            i -= 1;
            let j = random.next_u32() as usize % (i + 1);
            list.swap(i, j);
        }
    };
    let mut order = Vec::new();
    let mut shards: Vec<u32> = (0..batches_of_shards.len() as u32).collect();
    for _ in 0..epochs {
        shuffle(&mut shards);
        for &shard in &shards {
            let mut batches: Vec<u32> = (0..batches_of_shards[shard as usize]).collect();
            shuffle(&mut batches);
            order.extend(batches.into_iter().map(|batch| (shard, batch)));
        }
    }
    order
}

#[test]
fn several_shards_over_two_epochs_follow_the_rule() {
    let folder = tempfile::tempdir().unwrap();
    // Tokens per shard, with B*T = 6: 3, 7, 1, 0 and 2 batches. The fourth is too short for any.
    let lengths = [20, 43, 7, 5, 18];
    for (shard, &length) in lengths.iter().enumerate() {
        let tokens: Vec<u16> = (0..length).map(|index| (100 * shard + index) as u16).collect();
        let mut writer = TokenWriter::create(&folder.path().join(format!("shard_{shard:03}.bin"))).unwrap();
        writer.write(&tokens).unwrap();
        writer.finish().unwrap();
    }
    let pattern = folder.path().join("shard_*.bin").display().to_string();
    for seed in [42, 43, 7] {
        let mut loader = Loader::open(&pattern, 500, 2, 3, Shuffle::Llmc, seed).unwrap();
        assert_eq!((loader.num_tokens(), loader.batches_per_epoch()), (93, 13));
        for (shard, batch) in restated(&[3, 7, 1, 0, 2], 2, seed) {
            assert_eq!(first_inputs(&mut loader, 6), 100 * shard + 6 * batch);
        }
        let mut sequential = Loader::open(&pattern, 500, 2, 3, Shuffle::None, seed).unwrap();
        let firsts: Vec<u32> = (0..14).map(|_| first_inputs(&mut sequential, 6)).collect();
        assert_eq!(firsts, [0, 6, 12, 100, 106, 112, 118, 124, 130, 136, 200, 400, 406, 0]);
    }
}
