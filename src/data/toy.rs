//! The built-in toy corpus: enough text for a small byte-level model to learn words in a minute (see `data/README.md`).

use crate::data::shard::TokenWriter;
use crate::data::tokenize::{Output, Summary};
use crate::data::tokenizer::{END_OF_TEXT, Tokenizer};
use crate::error::{Error, Result};
use std::fs;
use std::path::Path;

const TEXT: &str = include_str!("../../data/toy.txt");
/// Every 16th story is held out: 6 %, spread evenly.
const HELD_OUT: usize = 16;

/// The tokens of the toy corpus: (training, validation). Each story is the end-of-text token and its own tokens.
pub fn toy_tokens(tokenizer: Tokenizer) -> (Vec<u16>, Vec<u16>) {
    let (mut training, mut validation) = (Vec::new(), Vec::new());
    for (number, story) in stories().enumerate() {
        let tokens = if is_held_out(number) { &mut validation } else { &mut training };
        tokens.push(tokenizer.end_of_text());
        tokens.extend(tokenizer.encode(story));
    }
    (training, validation)
}

/// Writes `toy_train.bin` and `toy_val.bin` into `output_dir`, which is made if it is missing.
///
/// # Errors
/// [`Error::Io`] when the folder or the files cannot be written.
pub fn write_toy(output_dir: &Path, tokenizer: Tokenizer) -> Result<Summary> {
    fs::create_dir_all(output_dir).map_err(Error::io("create", output_dir))?;
    let (training, validation) = toy_tokens(tokenizer);
    let mut outputs = Vec::new();
    for (name, tokens) in [("toy_train.bin", training), ("toy_val.bin", validation)] {
        let path = output_dir.join(name);
        let mut writer = TokenWriter::create(&path)?;
        writer.write(&tokens)?;
        writer.finish()?;
        outputs.push(Output { path, tokens: tokens.len() });
    }
    let (documents, validation_documents) =
        (stories().count(), (0..stories().count()).filter(|&n| is_held_out(n)).count());
    Ok(Summary {
        bytes: TEXT.len() as u64,
        documents: documents as u64,
        validation_documents: validation_documents as u64,
        outputs,
    })
}

fn stories() -> impl Iterator<Item = &'static str> {
    TEXT.split(END_OF_TEXT).map(|story| story.trim_matches('\n')).filter(|story| !story.is_empty())
}

fn is_held_out(number: usize) -> bool {
    number % HELD_OUT == HELD_OUT - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::shard::TokenFile;

    #[test]
    fn the_parts_are_large_enough_and_share_no_story() {
        let (training, validation) = toy_tokens(Tokenizer::Bytes);
        assert!(training.len() > 300_000, "{}", training.len());
        // The toy preset validates on batches of 16 rows of 128 tokens.
        assert!(validation.len() > 10 * 16 * 128, "{}", validation.len());
        let held_out: Vec<_> = stories().skip(HELD_OUT - 1).step_by(HELD_OUT).collect();
        let training_text = String::from_utf8(Tokenizer::Bytes.decode(&training).unwrap()).unwrap();
        assert!(held_out.iter().all(|story| !training_text.contains(story)));
    }

    #[test]
    fn the_written_files_hold_the_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let summary = write_toy(&folder.path().join("new"), Tokenizer::Gpt2).unwrap();
        let (training, validation) = toy_tokens(Tokenizer::Gpt2);
        for (output, tokens) in summary.outputs.iter().zip([training, validation]) {
            assert_eq!(TokenFile::open(&output.path, Tokenizer::Gpt2.vocab_size()).unwrap().tokens(), tokens);
        }
        assert_eq!((summary.documents, summary.validation_documents), (1200, 75));
    }
}
