//! Text to tokens and back: GPT-2's byte-pair encoding, and plain bytes.

use crate::config::{BYTES_VOCAB, GPT2_VOCAB};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::str;
use std::sync::LazyLock;
use tiktoken::CoreBpe;

/// How the end-of-text token is shown; between documents of a text file this stands on a line of its own.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// GPT-2's vocabulary and merges, which are part of the program.
static GPT2: LazyLock<CoreBpe> = LazyLock::new(tiktoken::encoding::gpt2);

/// A mapping between text and tokens. In both, the last token of the vocabulary is end-of-text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Tokenizer {
    /// GPT-2's byte-pair encoding: 50256 pieces of text and the end-of-text token.
    Gpt2,
    /// One token per byte, and the end-of-text token: a vocabulary small enough for a toy model.
    Bytes,
}

impl Tokenizer {
    /// Every tokenizer there is.
    pub const ALL: [Tokenizer; 2] = [Tokenizer::Gpt2, Tokenizer::Bytes];

    /// The name on the command line and in checkpoints.
    pub fn name(self) -> &'static str {
        match self {
            Tokenizer::Gpt2 => "gpt2",
            Tokenizer::Bytes => "bytes",
        }
    }

    /// The tokenizer called `name`.
    ///
    /// # Errors
    /// [`Error::Usage`] listing the names there are.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|tokenizer| tokenizer.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Tokenizer::name).join(" or ");
            Error::usage(format!("there is no tokenizer '{name}'; choose {names}"))
        })
    }

    /// The tokenizer whose vocabulary has exactly `vocab_size` tokens.
    ///
    /// # Errors
    /// [`Error::Usage`] listing the sizes there are.
    pub fn for_vocab_size(vocab_size: usize) -> Result<Self> {
        Self::ALL.into_iter().find(|tokenizer| tokenizer.vocab_size() == vocab_size).ok_or_else(|| {
            Error::usage(format!(
                "no tokenizer has {vocab_size} tokens: gpt2 has {GPT2_VOCAB} and bytes has {BYTES_VOCAB}; \
                 use a model with one of these vocabularies"
            ))
        })
    }

    /// V: tokens that exist, end-of-text included.
    pub fn vocab_size(self) -> usize {
        match self {
            Tokenizer::Gpt2 => GPT2_VOCAB,
            Tokenizer::Bytes => BYTES_VOCAB,
        }
    }

    /// The token that starts every document.
    pub fn end_of_text(self) -> u16 {
        match self {
            Tokenizer::Gpt2 => 50256,
            Tokenizer::Bytes => 256,
        }
    }

    /// The tokens of `text`. The characters `<|endoftext|>` inside it are ordinary text.
    pub fn encode(self, text: &str) -> Vec<u16> {
        match self {
            Tokenizer::Gpt2 => encode_gpt2(text),
            Tokenizer::Bytes => text.bytes().map(u16::from).collect(),
        }
    }

    /// The bytes that `tokens` stand for; end-of-text gives `<|endoftext|>`. A token may hold part of a character, so the
    /// bytes need not be UTF-8: [`StreamDecoder`] makes text of them.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the first token outside the vocabulary.
    pub fn decode(self, tokens: &[u16]) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(4 * tokens.len());
        for &token in tokens {
            self.decode_token(token, &mut bytes)?;
        }
        Ok(bytes)
    }

    fn decode_token(self, token: u16, bytes: &mut Vec<u8>) -> Result<()> {
        if usize::from(token) >= self.vocab_size() {
            let (name, last) = (self.name(), self.vocab_size() - 1);
            return Err(Error::usage(format!(
                "token {token} does not exist in the vocabulary of tokenizer {name} (0 to {last}); \
                 use the tokenizer that the model was trained with"
            )));
        }
        match (self, u8::try_from(token)) {
            _ if token == self.end_of_text() => bytes.extend_from_slice(END_OF_TEXT.as_bytes()),
            (Tokenizer::Bytes, Ok(byte)) => bytes.push(byte),
            _ => bytes.extend_from_slice(&GPT2.decode(&[u32::from(token)])),
        }
        Ok(())
    }
}

/// Text is handed to the encoder in stretches of about this many bytes: behind white space other than ASCII it looks at
/// all of the text that is left, which takes time quadratic in its length.
const STRETCH_BYTES: usize = 1024;

fn encode_gpt2(mut text: &str) -> Vec<u16> {
    let mut tokens = Vec::with_capacity(text.len() / 3);
    while !text.is_empty() {
        let (stretch, rest) = text.split_at(next_cut(text, text.floor_char_boundary(STRETCH_BYTES)));
        // Every token of this vocabulary is below 50257.
        tokens.extend(GPT2.encode(stretch).into_iter().map(|token| token as u16));
        text = rest;
    }
    tokens
}

/// The first place behind `start` where `text` may be cut so that both sides encode to the same tokens apart as together:
/// behind a word and before white space; the end of `text` if there is none. GPT-2's BPE first splits text into words and
/// runs of white space, and only the last space of a run may belong to the word behind it, so there is a split at every
/// such place.
fn next_cut(text: &str, start: usize) -> usize {
    let mut in_word = false;
    let cut = text[start..].find(|character: char| {
        let was_in_word = in_word;
        in_word = !character.is_whitespace();
        was_in_word && !in_word
    });
    cut.map_or(text.len(), |cut| start + cut)
}

/// The last such place behind `start`, if there is one.
pub(crate) fn last_cut(text: &str, start: usize) -> Option<usize> {
    let behind = &text[start..];
    let words = behind[..behind.rfind(char::is_whitespace)?].trim_end();
    (!words.is_empty()).then_some(start + words.len())
}

/// Turns tokens into text one at a time, holding back a character until all of its bytes have come.
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    /// The bytes of a character that is not complete yet: at most 3.
    held: Vec<u8>,
}

impl StreamDecoder {
    /// A decoder at the beginning of a text.
    pub fn new(tokenizer: Tokenizer) -> Self {
        StreamDecoder { tokenizer, held: Vec::new() }
    }

    /// The text that `token` completes; empty while a character is incomplete. Bytes that cannot be UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Usage`] for a token outside the vocabulary.
    pub fn push(&mut self, token: u16) -> Result<String> {
        self.tokenizer.decode_token(token, &mut self.held)?;
        let mut text = String::new();
        let mut incomplete = Vec::new();
        let mut chunks = self.held.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            if chunks.peek().is_none() && is_incomplete(chunk.invalid()) {
                incomplete = chunk.invalid().to_vec();
            } else if !chunk.invalid().is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.held = incomplete;
        Ok(text)
    }

    /// What is left at the end of the text: U+FFFD if the last character never became complete.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.held).into_owned()
    }
}

/// Whether `bytes` begin a character that more bytes could complete.
pub(crate) fn is_incomplete(bytes: &[u8]) -> bool {
    str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_and_sizes_find_their_tokenizer() {
        for tokenizer in Tokenizer::ALL {
            assert_eq!(Tokenizer::from_name(tokenizer.name()).unwrap(), tokenizer);
            assert_eq!(Tokenizer::for_vocab_size(tokenizer.vocab_size()).unwrap(), tokenizer);
            assert_eq!(usize::from(tokenizer.end_of_text()), tokenizer.vocab_size() - 1);
        }
        assert!(Tokenizer::from_name("gpt3").unwrap_err().to_string().contains("choose gpt2 or bytes"));
        assert!(Tokenizer::for_vocab_size(100).unwrap_err().to_string().contains("50257"));
    }

    #[test]
    fn known_tokens() {
        assert_eq!(Tokenizer::Gpt2.encode("Hello world"), [15496, 995]);
        assert_eq!(Tokenizer::Bytes.encode("hi"), [104, 105]);
        assert!(!Tokenizer::Gpt2.encode(END_OF_TEXT).contains(&50256));
        assert_eq!(Tokenizer::Bytes.decode(&[104, 256]).unwrap(), b"h<|endoftext|>");
        assert_eq!(Tokenizer::Gpt2.decode(&[50256]).unwrap(), END_OF_TEXT.as_bytes());
    }

    #[test]
    fn every_token_decodes_to_some_bytes_and_others_are_errors() {
        for tokenizer in Tokenizer::ALL {
            for token in 0..=u16::MAX {
                let decoded = tokenizer.decode(&[token]);
                assert_eq!(decoded.is_ok(), usize::from(token) < tokenizer.vocab_size());
                assert!(decoded.is_err() || !decoded.unwrap().is_empty());
            }
        }
        let error = StreamDecoder::new(Tokenizer::Bytes).push(300).unwrap_err();
        assert!(error.to_string().contains("(0 to 256)"), "{error}");
    }

    #[test]
    fn a_stream_holds_back_incomplete_characters() {
        let mut stream = StreamDecoder::new(Tokenizer::Bytes);
        let pushed: Vec<_> = "aé€".bytes().map(|byte| stream.push(byte.into()).unwrap()).collect();
        assert_eq!(pushed, ["a", "", "é", "", "", "€"]);
        assert_eq!(stream.push(0xe2).unwrap(), "");
        assert_eq!(stream.push(u16::from(b'x')).unwrap(), "\u{fffd}x");
        assert_eq!(stream.push(0xf0).unwrap(), "");
        assert_eq!(stream.finish(), "\u{fffd}");
    }

    proptest! {
        #[test]
        fn a_stream_gives_what_the_whole_would(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut stream = StreamDecoder::new(Tokenizer::Bytes);
            let mut text = String::new();
            for &byte in &bytes {
                text += &stream.push(byte.into()).unwrap();
            }
            text += &stream.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
