//! GPT-2's byte-pair encoding against another implementation of it.

use bandtrain::data::Tokenizer;
use proptest::prelude::*;
use std::sync::LazyLock;

static ORACLE: LazyLock<tiktoken_rs::CoreBPE> = LazyLock::new(|| tiktoken_rs::r50k_base().unwrap());

fn oracle(text: &str) -> Vec<u16> {
    ORACLE.encode_ordinary(text).into_iter().map(|token| token as u16).collect()
}

#[test]
fn odd_texts_agree() {
    let texts = [
        "",
        " ",
        "\n\n\n",
        "a  b   c\t\td \n e\n\n  f",
        "it's IT'S they'll 've  'd",
        "<|endoftext|>",
        "x<|endoftext|>y",
        "12345 ½ ² Ⅻ ٣",
        "\u{a0}\u{3000}\u{2028}x\u{200b}\u{feff}",
        "\r\n\r\n x\r",
        "日本語のテキスト。 한국어 عربى \u{1f469}\u{200d}\u{1f469}\u{200d}\u{1f467}",
        "e\u{301}\u{0}\u{1}",
    ];
    for text in texts {
        assert_eq!(Tokenizer::Gpt2.encode(text), oracle(text), "{text:?}");
    }
    let long = "a".repeat(100_000);
    assert_eq!(Tokenizer::Gpt2.decode(&Tokenizer::Gpt2.encode(&long)).unwrap(), long.as_bytes());
}

#[test]
fn long_texts_agree_and_take_linear_time() {
    let mut text = String::new();
    for number in 0..40_000u32 {
        let spaces = ["\u{a0}", " ", "\n\n", " \u{3000} ", "\r\n  ", "\t"];
        text += spaces[(number.wrapping_mul(2_654_435_761) >> 20) as usize % spaces.len()];
        text += ["it's", "odd", "12", "é漢字", "...", "<|endoftext|>"][(number.wrapping_mul(40_503) >> 7) as usize % 6];
    }
    assert_eq!(Tokenizer::Gpt2.encode(&text), oracle(&text));
    let start = std::time::Instant::now();
    Tokenizer::Gpt2.encode(&"\u{a0}word".repeat(500_000));
    assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn random_unicode_agrees_and_round_trips(text in any::<String>()) {
        let tokens = Tokenizer::Gpt2.encode(&text);
        prop_assert_eq!(&tokens, &oracle(&text));
        prop_assert_eq!(Tokenizer::Gpt2.decode(&tokens).unwrap(), text.as_bytes());
        let bytes = Tokenizer::Bytes.encode(&text);
        prop_assert_eq!(Tokenizer::Bytes.decode(&bytes).unwrap(), text.as_bytes());
    }

    #[test]
    fn random_words_and_white_space_agree(text in "([a-zA-Z]{0,8}|[ \t\r\n\u{a0}\u{3000}\u{85}]{1,4}|[0-9]{1,4}|['.,!?-]{1,3}|'s|'ll|[é漢🦊])*") {
        let tokens = Tokenizer::Gpt2.encode(&text);
        prop_assert_eq!(&tokens, &oracle(&text));
        prop_assert_eq!(Tokenizer::Gpt2.decode(&tokens).unwrap(), text.as_bytes());
    }
}
