//! Text from a model: sampling with temperature, top-k and top-p, token after token over a key-value cache.

use crate::backend::{Backend, Role};
use crate::error::{Error, Result};
use crate::model::{Activations, KvCache, Model};
use crate::shapes::Span;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Only the k likeliest tokens; 0 is all.
    pub top_k: usize,
    /// Only the likeliest tokens whose probabilities sum up to p (Holtzman et al. 2020); 1 is all.
    pub top_p: f32,
    /// Same seed, same text.
    pub seed: u64,
}

impl Sampling {
    /// Returns the settings when they make sense.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the setting that does not.
    pub fn checked(self) -> Result<Self> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::usage(format!("--temperature {} must be 0 or more", self.temperature)));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::usage(format!("--top-p {} must be above 0 and at most 1", self.top_p)));
        }
        Ok(self)
    }
}

/// Draws tokens from logits.
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
    ranked: Vec<(f32, u16)>,
}

impl Sampler {
    /// A sampler for the `sample`-th text.
    pub fn new(sampling: Sampling, sample: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
        rng.set_stream(sample);
        Self { sampling, rng, ranked: Vec::new() }
    }

    /// The next token, given the logits `[V]` of all.
    pub fn draw(&mut self, logits: &[f32]) -> u16 {
        let Sampling { temperature, top_k, top_p, .. } = self.sampling;
        self.ranked.clear();
        self.ranked.extend(logits.iter().zip(0..).map(|(&logit, token)| (logit, token)));
        // The likeliest first; of equals the one with the smaller id, so that the order is the same everywhere.
        let by_logit = |a: &(f32, u16), b: &(f32, u16)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if temperature == 0.0 {
            return self.ranked.iter().min_by(|a, b| by_logit(a, b)).map_or(0, |&(_, token)| token);
        }
        if top_k > 0 && top_k < self.ranked.len() {
            self.ranked.select_nth_unstable_by(top_k - 1, by_logit);
            self.ranked.truncate(top_k);
        }
        self.ranked.sort_unstable_by(by_logit);
        let max = self.ranked[0].0;
        let mut total = 0.0;
        for (weight, _) in &mut self.ranked {
            *weight = ((*weight - max) / temperature).exp();
            total += *weight;
        }
        self.nucleus(top_p * total)
    }

    /// Draws among the first tokens whose weights reach `enough`.
    fn nucleus(&mut self, enough: f32) -> u16 {
        let mut sum = 0.0;
        let reaches = |&(weight, _): &(f32, u16)| {
            sum += weight;
            sum >= enough
        };
        let last = self.ranked.iter().position(reaches).unwrap_or(self.ranked.len() - 1);
        let kept = &self.ranked[..=last];
        let mut left = self.rng.random::<f32>() * kept.iter().map(|(weight, _)| weight).sum::<f32>();
        for &(weight, token) in kept {
            left -= weight;
            if left < 0.0 {
                return token;
            }
        }
        kept[last].1
    }
}

/// Continues texts, one at a time.
pub struct Generator<B: Backend> {
    cache: KvCache<B>,
    decode: Activations<B>,
    logits: B::Buffer,
    context: Vec<u32>,
}

impl<B: Backend> Generator<B> {
    /// Room for one text of the model's longest sequence.
    ///
    /// # Errors
    /// The device has not enough memory.
    pub fn new(model: &mut Model<B>) -> Result<Self> {
        let (capacity, vocab) = (model.config().max_seq_len, model.config().vocab_size);
        Ok(Self {
            cache: KvCache::new(model, 1, capacity)?,
            decode: Activations::new(model, 1, 1, false)?,
            logits: model.backend().alloc(Role::Statistics, "logits", vocab)?,
            context: Vec::new(),
        })
    }

    /// Generates up to `count` tokens after `prompt` (at least one token), handing each to `emit` until that returns
    /// false. Texts longer than the model's context forget their older half.
    ///
    /// # Errors
    /// An empty prompt; a model whose logits are not finite; the device failed; whatever `emit` returns.
    pub fn generate(
        &mut self,
        model: &mut Model<B>,
        prompt: &[u16],
        count: usize,
        sampler: &mut Sampler,
        mut emit: impl FnMut(u16) -> Result<bool>,
    ) -> Result<()> {
        if prompt.is_empty() {
            return Err(Error::usage("a text needs a beginning: give a prompt of at least one token"));
        }
        self.context.clear();
        self.context.extend(prompt.iter().map(|&token| u32::from(token)));
        self.read_context(model)?;
        for index in 0..count {
            let vocab = model.config().vocab_size;
            let logits = model.backend().download(&self.logits, Span { offset: 0, len: vocab })?;
            if !logits.iter().all(|logit| logit.is_finite()) {
                return Err(Error::usage(
                    "the model's logits are not finite: it has diverged; use an earlier checkpoint",
                ));
            }
            let token = sampler.draw(&logits);
            self.context.push(u32::from(token));
            if !emit(token)? || index + 1 == count {
                break;
            }
            if self.cache.past() == model.config().max_seq_len {
                self.read_context(model)?;
            } else {
                model.extend(&mut self.decode, &mut self.cache, &[token.into()], &mut self.logits, 1)?;
            }
        }
        Ok(())
    }

    /// Fills the cache with the end of the context: all of it where there is room, else the newer half of a full one.
    fn read_context(&mut self, model: &mut Model<B>) -> Result<()> {
        let capacity = model.config().max_seq_len;
        if self.context.len() > capacity {
            self.context.drain(..self.context.len() - capacity.div_ceil(2));
        }
        self.cache.clear();
        let mut prefill = Activations::new(model, 1, self.context.len(), false)?;
        model.extend(&mut prefill, &mut self.cache, &self.context, &mut self.logits, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::config::{GptConfig, PRESETS};
    use crate::weights::Weights;

    fn sampling(temperature: f32, top_k: usize, top_p: f32) -> Sampling {
        Sampling { temperature, top_k, top_p, seed: 1 }
    }

    fn frequencies(sampling: Sampling, logits: &[f32]) -> Vec<f32> {
        let mut sampler = Sampler::new(sampling, 0);
        let mut counts = vec![0.0; logits.len()];
        (0..20_000).for_each(|_| counts[sampler.draw(logits) as usize] += 1.0);
        counts.iter().map(|count| count / 20_000.0).collect()
    }

    #[test]
    fn temperature_one_draws_the_softmax() {
        let logits = [1.0f32, 0.0, -1.0, 2.0];
        let total: f32 = logits.iter().map(|l| l.exp()).sum();
        for (frequency, logit) in frequencies(sampling(1.0, 0, 1.0), &logits).iter().zip(logits) {
            assert!((frequency - logit.exp() / total).abs() < 0.015, "{frequency} {logit}");
        }
    }

    #[test]
    fn limits_cut_the_unlikely() {
        let logits = [1.0f32, 0.0, -1.0, 2.0];
        assert_eq!(frequencies(sampling(0.0, 0, 1.0), &logits), [0.0, 0.0, 0.0, 1.0]);
        let two = frequencies(sampling(1.0, 2, 1.0), &logits);
        assert!(two[0] > 0.2 && two[3] > 0.6 && two[1] + two[2] == 0.0, "{two:?}");
        let nucleus = frequencies(sampling(1.0, 0, 0.7), &logits);
        assert!(nucleus[0] > 0.2 && nucleus[3] > 0.6 && nucleus[1] + nucleus[2] == 0.0, "{nucleus:?}");
    }

    #[test]
    fn senseless_settings_are_refused() {
        for broken in [sampling(-1.0, 0, 1.0), sampling(f32::NAN, 0, 1.0), sampling(1.0, 0, 0.0), sampling(1.0, 0, 1.5)]
        {
            assert!(broken.checked().is_err(), "{broken:?}");
        }
    }

    /// The cache gives what a forward pass over the whole text gives, beyond the model's context too.
    #[test]
    fn the_cache_changes_nothing() {
        let config = GptConfig { max_seq_len: 12, fc2_bandwidth: 65.into(), ..PRESETS[0].model };
        let weights = Weights::init(&config, 3).unwrap();
        let mut model = Model::new(Cpu::new(), &weights).unwrap();
        let mut generator = Generator::new(&mut model).unwrap();
        let mut text: Vec<u16> = vec![256, 72, 105];
        let mut sampler = Sampler::new(sampling(0.0, 0, 1.0), 0);
        let mut generated = Vec::new();
        let emit = |token| {
            generated.push(token);
            Ok(true)
        };
        generator.generate(&mut model, &text, 9, &mut sampler, emit).unwrap();
        assert_eq!(generated.len(), 9);
        for token in generated {
            let inputs: Vec<u32> = text.iter().map(|&token| token.into()).collect();
            let mut acts = Activations::new(&mut model, 1, inputs.len(), false).unwrap();
            let logits = model.logits(&mut acts, &inputs).unwrap();
            assert_eq!(token, sampler.draw(&logits[logits.len() - config.vocab_size..]));
            text.push(token);
        }
        let mut count = 0;
        let emit = |_| {
            count += 1;
            Ok(true)
        };
        generator.generate(&mut model, &text, 40, &mut sampler, emit).unwrap();
        assert_eq!(count, 40);
    }
}
