//! The CUDA backend on a card that is too small. By itself, since it takes all of the card's memory: tests beside it would want
//! for some. Without a card this says so and passes; `BANDTRAIN_REQUIRE=cuda` makes that a failure.

mod card;
mod skip;

use bandtrain::backend::Arithmetic;
use bandtrain::config::preset;
use bandtrain::error::Error;
use bandtrain::memory::MemoryEstimate;
use bandtrain::model::{Activations, Model};
use bandtrain::weights::Weights;
use card::{device, of};

#[test]
fn a_training_that_memory_cannot_hold_is_told_which_batch_fits() {
    const BATCH: usize = 1 << 20;
    let Some(device) = device(of(Arithmetic::Bf16)) else { return };
    let config = preset("toy").unwrap().model;
    let advised = |sentence: &str| -> usize {
        let (_, rest) = sentence.split_once("; choose -b ").unwrap_or_else(|| panic!("{sentence}"));
        rest.strip_suffix(" or less").unwrap().parse().unwrap()
    };
    // Foreseen.
    let foreseen = MemoryEstimate::check(&device, &config, BATCH, 128).unwrap_err();
    assert!(foreseen.to_string().contains(" are free on ") && foreseen.exit_code() == 2, "{foreseen}");
    assert!((1..BATCH).contains(&advised(&foreseen.to_string())), "{foreseen}");
    // Met on the way.
    let mut model = Model::new(device, &Weights::init(&config, 1).unwrap()).unwrap();
    let error = Activations::new(&mut model, BATCH, 128, true).err().unwrap();
    let error = MemoryEstimate::advise(model.backend(), &config, BATCH, 128, error);
    assert!(matches!(error, Error::OutOfMemory { .. }) && error.exit_code() == 2, "{error}");
    let sentence = error.to_string();
    for part in ["out of memory on ", " needs ", " are free; choose -b "] {
        assert!(sentence.contains(part), "{sentence}");
    }
    // Of the memory of a machine that other programs use too.
    let (advised, foreseen) = (advised(&sentence) as f64, advised(&foreseen.to_string()) as f64);
    assert!((0.5..2.0).contains(&(advised / foreseen)), "{sentence}, but {foreseen} was foreseen");
    // The device is as good as before.
    Activations::new(&mut model, 1, 128, true).unwrap();
}
