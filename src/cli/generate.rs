//! `bandtrain generate`: text from a model.

use super::device::{DeviceArgs, Task, with_backend};
use super::parse;
use crate::backend::Backend;
use crate::checkpoint;
use crate::data::{StreamDecoder, Tokenizer};
use crate::error::{Error, Result};
use crate::generate::{Generator, Sampler, Sampling};
use crate::model::Model;
use crate::output;
use crate::say;
use crate::weights::Weights;
use std::path::PathBuf;

/// Writes text with a model
///
/// A text ends after the tokens asked for, or where the model ends it.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  bandtrain generate -e model.safetensors -n 100 --prompt 'Once upon a time'")]
pub struct GenerateArgs {
    /// Model to use
    #[arg(long, short = 'e', value_name = "FILE")]
    init: PathBuf,
    /// Most tokens of each text
    #[arg(long, short = 'n', default_value = "256", value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    tokens: usize,
    /// What the text begins with [default: nothing]
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Below 1 plays safe, above 1 takes risks, 0 always takes the likeliest token
    #[arg(long, default_value = "0.8", value_parser = parse::not_negative, value_name = "F", allow_negative_numbers = true)]
    temperature: f64,
    /// Draw among the N likeliest tokens only, 0 is all
    #[arg(long, default_value = "0", value_parser = parse::count, value_name = "N", allow_negative_numbers = true)]
    top_k: usize,
    /// Draw among the likeliest tokens that make up this share of the probability
    #[arg(long, default_value = "1", value_parser = parse::above_zero, value_name = "F", allow_negative_numbers = true)]
    top_p: f64,
    /// Same seed, same text
    #[arg(long, default_value = "42", value_parser = parse::seed, value_name = "N", allow_negative_numbers = true)]
    seed: u64,
    /// How many texts
    #[arg(long, default_value = "1", value_parser = parse::positive, value_name = "N", allow_negative_numbers = true)]
    samples: usize,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object for each text instead of streaming it
    #[arg(long)]
    json: bool,
}

struct Generate {
    weights: Weights,
    tokenizer: Tokenizer,
    prompt: Vec<u16>,
    sampling: Sampling,
    args: GenerateArgs,
}

/// Runs the command.
///
/// # Errors
/// A model that cannot be read or has no known tokenizer; settings that make no sense.
pub fn run(args: GenerateArgs) -> Result<()> {
    let sampling =
        Sampling { temperature: args.temperature as f32, top_k: args.top_k, top_p: args.top_p as f32, seed: args.seed }
            .checked()?;
    let checkpoint = checkpoint::load(&args.init)?;
    let vocab = checkpoint.weights.config().vocab_size;
    let tokenizer = Tokenizer::for_vocab_size(vocab).map_err(|error| Error::file(&args.init, error.to_string()))?;
    if let Some(name) = checkpoint.meta.tokenizer.filter(|name| name != tokenizer.name()) {
        let what =
            format!("names the tokenizer {name}, but has {} tokens like {}; it is damaged", vocab, tokenizer.name());
        return Err(Error::file(&args.init, what));
    }
    let mut prompt = vec![tokenizer.end_of_text()];
    prompt.extend(tokenizer.encode(args.prompt.as_deref().unwrap_or("")));
    with_backend(args.device, Generate { weights: checkpoint.weights, tokenizer, prompt, sampling, args })
}

impl Task for Generate {
    type Output = ();

    fn run<B: Backend>(self, backend: B) -> Result<()> {
        let mut model = Model::new(backend, &self.weights)?;
        let mut generator = Generator::new(&mut model)?;
        for sample in 0..self.args.samples {
            if self.args.samples > 1 && !self.args.json {
                say!("--- sample {}", sample + 1)?;
            }
            self.one(&mut model, &mut generator, sample)?;
        }
        Ok(())
    }
}

impl Generate {
    /// Writes one text, piece by piece as it comes.
    fn one<B: Backend>(&self, model: &mut Model<B>, generator: &mut Generator<B>, sample: usize) -> Result<()> {
        let json = self.args.json;
        let mut text = self.args.prompt.clone().unwrap_or_default();
        if !json {
            output::write(format_args!("{text}"))?;
        }
        let mut sampler = Sampler::new(self.sampling, sample as u64);
        let mut decoder = StreamDecoder::new(self.tokenizer);
        let (mut tokens, end) = (0, self.tokenizer.end_of_text());
        generator.generate(model, &self.prompt, self.args.tokens, &mut sampler, |token| {
            if token == end {
                return Ok(false);
            }
            tokens += 1;
            let piece = decoder.push(token)?;
            if !json {
                output::write(format_args!("{piece}"))?;
            }
            text.push_str(&piece);
            Ok(true)
        })?;
        let rest = decoder.finish();
        text.push_str(&rest);
        match json {
            true => say!("{}", serde_json::json!({ "sample": sample, "tokens": tokens, "text": text })),
            false => say!("{rest}"),
        }
    }
}
