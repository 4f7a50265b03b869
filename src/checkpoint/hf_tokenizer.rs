//! The files that transformers makes a tokenizer of: for GPT-2's byte-pair encoding the published ones, for the byte
//! tokenizer an encoding of the same kind that never merges.
//!
//! Nothing is stored for this. The program's vocabulary gives each token's bytes in the order of their ranks, and which two
//! pieces a token is merged from follows from that order. Source of names, fields and the alphabet: openai/gpt-2,
//! `encoder.py`; transformers, `tokenization_gpt2.py`; tokenizers, `ByteLevel` and `BPE`.

use crate::data::Tokenizer;
use crate::data::tokenizer::END_OF_TEXT;
use std::collections::{BTreeMap, HashMap};

/// The files' names and contents, for a model of `max_seq_len` positions.
pub fn files(tokenizer: Tokenizer, max_seq_len: usize) -> [(&'static str, String); 5] {
    let tokens = byte_strings(tokenizer);
    let alphabet = alphabet();
    let spell = |bytes: &[u8]| -> String { bytes.iter().map(|&byte| alphabet[usize::from(byte)]).collect() };
    let mut vocabulary: Vec<String> = tokens.iter().map(|token| spell(token)).collect();
    vocabulary.push(END_OF_TEXT.to_string());
    let merges: Vec<String> =
        merges(&tokens).into_iter().map(|(left, right)| format!("{} {}", spell(left), spell(right))).collect();
    [
        ("vocab.json", vocab_json(&vocabulary)),
        ("merges.txt", merges_txt(&merges)),
        ("tokenizer.json", tokenizer_json(tokenizer, &vocabulary, &merges)),
        ("tokenizer_config.json", tokenizer_config_json(max_seq_len)),
        ("special_tokens_map.json", special_tokens_json()),
    ]
}

/// The bytes of every token before end-of-text.
fn byte_strings(tokenizer: Tokenizer) -> Vec<Vec<u8>> {
    (0..tokenizer.end_of_text()).map(|token| tokenizer.decode(&[token]).expect("the vocabulary has no gap")).collect()
}

/// GPT-2's letters for the 256 bytes: a byte that prints stands for itself, the others follow from U+0100 on.
fn alphabet() -> [char; 256] {
    let mut others = '\u{100}'..;
    std::array::from_fn(|byte| match byte as u8 {
        byte @ (b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) => char::from(byte),
        _ => others.next().expect("there are fewer than 256 others"),
    })
}

/// The two pieces that each token of more than one byte is merged from, in the order of the tokens.
fn merges(tokens: &[Vec<u8>]) -> Vec<(&[u8], &[u8])> {
    let ranks: HashMap<&[u8], usize> = tokens.iter().map(Vec::as_slice).zip(0..).collect();
    let merged = tokens.iter().enumerate().filter(|(_, token)| token.len() > 1);
    merged.map(|(rank, token)| token.split_at(last_cut(token, rank, &ranks))).collect()
}

/// Where a token is cut when byte-pair encoding has made two pieces of it, with merges below `rank` alone.
fn last_cut(token: &[u8], rank: usize, ranks: &HashMap<&[u8], usize>) -> usize {
    let mut cuts: Vec<usize> = (0..=token.len()).collect();
    while cuts.len() > 3 {
        let pairs = cuts.windows(3).zip(1..).filter_map(|(cuts, at)| Some((*ranks.get(&token[cuts[0]..cuts[2]])?, at)));
        let best = pairs.filter(|(pair, _)| *pair < rank).min();
        cuts.remove(best.expect("a token is merged from earlier ones").1);
    }
    cuts[1]
}

/// Byte for byte as OpenAI published GPT-2's: by id, ASCII only.
fn vocab_json(vocabulary: &[String]) -> String {
    let entries: Vec<_> =
        vocabulary.iter().enumerate().map(|(id, token)| format!("{}: {id}", ascii_json(token))).collect();
    format!("{{{}}}", entries.join(", "))
}

/// A JSON string with escapes for all that is not ASCII; the alphabet ends far below U+10000.
fn ascii_json(text: &str) -> String {
    let escape = |letter: char| match letter {
        _ if letter.is_ascii() => letter.to_string(),
        _ => format!("\\u{:04x}", letter as u32),
    };
    serde_json::Value::from(text).to_string().chars().map(escape).collect()
}

/// Byte for byte as OpenAI published GPT-2's (`vocab.bpe`).
fn merges_txt(merges: &[String]) -> String {
    std::iter::once("#version: 0.2").chain(merges.iter().map(String::as_str)).flat_map(|line| [line, "\n"]).collect()
}

fn tokenizer_json(tokenizer: Tokenizer, vocabulary: &[String], merges: &[String]) -> String {
    let ids: BTreeMap<_, _> = vocabulary.iter().zip(0..).collect();
    let byte_level = |add_prefix_space: bool, trim_offsets: bool| {
        serde_json::json!({
            "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets, "use_regex": true,
        })
    };
    let file = serde_json::json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": tokenizer.end_of_text(), "content": END_OF_TEXT, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": true,
        }],
        "normalizer": null,
        "pre_tokenizer": byte_level(false, true),
        "post_processor": byte_level(true, false),
        "decoder": byte_level(true, true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "vocab": ids, "merges": merges,
        },
    });
    format!("{file}\n")
}

fn tokenizer_config_json(max_seq_len: usize) -> String {
    let fields = serde_json::json!({
        "add_prefix_space": false,
        "bos_token": END_OF_TEXT,
        // Decoding shall give the text back as it was.
        "clean_up_tokenization_spaces": false,
        "eos_token": END_OF_TEXT,
        "model_max_length": max_seq_len,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": END_OF_TEXT,
    });
    format!("{fields:#}\n")
}

fn special_tokens_json() -> String {
    let fields = serde_json::json!({ "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT });
    format!("{fields:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};

    fn file(tokenizer: Tokenizer, name: &str) -> String {
        files(tokenizer, 1024).into_iter().find(|(known, _)| *known == name).unwrap().1
    }

    fn sha256(text: &str) -> String {
        Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The hashes stand in OpenAI's tiktoken (`openai_public.py`), which checks its downloads by them.
    #[test]
    fn gpt2s_vocabulary_and_merges_are_the_published_ones() {
        let vocab = sha256(&file(Tokenizer::Gpt2, "vocab.json"));
        assert_eq!(vocab, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783");
        let merges = sha256(&file(Tokenizer::Gpt2, "merges.txt"));
        assert_eq!(merges, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5");
    }

    #[test]
    fn bytes_are_their_own_tokens_and_never_merge() {
        let vocab: BTreeMap<String, usize> = serde_json::from_str(&file(Tokenizer::Bytes, "vocab.json")).unwrap();
        let ids = ["a", "Ġ", "Ċ", "ÿ", END_OF_TEXT].map(|token| vocab[token]);
        assert_eq!((vocab.len(), ids), (257, [97, 32, 10, 255, 256]));
        assert_eq!(file(Tokenizer::Bytes, "merges.txt"), "#version: 0.2\n");
    }
}
