//! HellaSwag (Zellers et al. 2019) and whatever else comes in llm.c's form for questions with four endings, such as MMLU.
//!
//! 256 little-endian int32 (20240522, 1, number of questions, bytes of the longest, zeros), then each question as uint16:
//! 65535, its bytes, its index, the right ending, 4, and five counted runs of tokens: the context and the four endings.
//! Source of the format: llm.c, `data_common.py` (`write_evalfile`) and `dataloader.h` (`EvalLoader`).

use crate::atomic::AtomicFile;
use crate::config::GptConfig;
use crate::data::paths::same_file;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::output::quoted;
use serde::Deserialize;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

/// Endings of a question.
pub const ENDINGS: usize = 4;

const MAGIC: i32 = 20240522;
const VERSION: i32 = 1;
const HEADER_WORDS: usize = 256;
const HEADER_BYTES: u64 = 4 * HEADER_WORDS as u64;
/// The first word of a question; no token of ours.
const START: u16 = 65535;
/// Words of a question before its runs.
const FRONT: usize = 5;
/// The index of a question, and its bytes, are single words.
const MOST_QUESTIONS: u64 = 1 << 16;
const MOST_BYTES: u64 = (1 << 16) - 2;
/// With every run at its shortest: a count and a token.
const FEWEST_BYTES: u64 = 2 * (FRONT + 2 * (1 + ENDINGS)) as u64;
/// Text beyond this cannot fit [`MOST_BYTES`] as tokens, and would cost the encoder time and memory.
const MOST_TEXT: usize = 1 << 20;

/// A beginning and four ways to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Which ending is right, from 0.
    pub label: usize,
    /// The beginning's tokens.
    pub context: Vec<u16>,
    /// The endings' tokens.
    pub endings: [Vec<u16>; ENDINGS],
}

impl Question {
    /// Positions a model needs for it: those of the longest ending behind the context, save the last, which predicts nothing.
    pub fn positions(&self) -> usize {
        self.context.len() + self.endings.iter().map(Vec::len).max().unwrap_or(0) - 1
    }

    fn runs(&self) -> impl Iterator<Item = &Vec<u16>> {
        std::iter::once(&self.context).chain(&self.endings)
    }

    /// The question as words of the file; `None` when they, or a count, do not fit a word.
    fn words(&self, index: usize) -> Option<Vec<u16>> {
        let len = FRONT + self.runs().map(|run| 1 + run.len()).sum::<usize>();
        let (bytes, index) = (u16::try_from(2 * len).ok()?, u16::try_from(index).ok()?);
        let mut words = vec![START, bytes, index, self.label as u16, ENDINGS as u16];
        for run in self.runs() {
            words.push(run.len() as u16); // fewer than the bytes, which fit
            words.extend(run);
        }
        Some(words)
    }
}

/// Reads and checks a file of questions for a model of these sizes.
///
/// # Errors
/// [`Error::Io`] when it cannot be read; [`Error::File`] when it is no such file or damaged, when a token lies outside the
/// model's vocabulary, and when a question is longer than its positions.
pub fn read(path: &Path, config: &GptConfig) -> Result<Vec<Question>> {
    let fault = |what: String| Error::file(path, what);
    if !fs::metadata(path).map_err(Error::io("open", path))?.is_file() {
        return Err(fault("is not a regular file; name a HellaSwag file (.bin)".to_string()));
    }
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let len = file.metadata().map_err(Error::io("read", path))?.len();
    let count = read_header(path, &mut file, len)?;
    let mut words = vec![0u16; (len - HEADER_BYTES) as usize / 2];
    file.read_exact(bytemuck::cast_slice_mut(&mut words)).map_err(Error::io("read", path))?;
    let questions = parse(&words, count).map_err(fault)?;
    check_fit(&questions, config).map_err(fault)?;
    Ok(questions)
}

/// Checks the header against the file's length; returns the number of questions.
fn read_header(path: &Path, file: &mut File, len: u64) -> Result<usize> {
    if len < HEADER_BYTES {
        let what = format!("has {len} bytes, fewer than the {HEADER_BYTES} of a HellaSwag file's header; {REMEDY}");
        return Err(Error::file(path, what));
    }
    let mut header = [0i32; HEADER_WORDS];
    file.read_exact(bytemuck::cast_slice_mut(&mut header)).map_err(Error::io("read", path))?;
    check_header(&header, len).map_err(|what| Error::file(path, what))
}

const REMEDY: &str = "copy it again or make it with 'bandtrain tokenize --hellaswag'";

fn check_header(header: &[i32; HEADER_WORDS], len: u64) -> std::result::Result<usize, String> {
    let [magic, version, count, ..] = *header;
    if magic == 20240520 {
        return Err("is a file of tokens, not of HellaSwag's questions; evaluate on it with -j".to_string());
    }
    if magic != MAGIC {
        return Err(format!("starts with {magic}, but HellaSwag files start with {MAGIC}; {REMEDY}"));
    }
    if version != VERSION {
        return Err(format!(
            "is a HellaSwag file of version {version}, but only version {VERSION} can be read; {REMEDY}"
        ));
    }
    let questions = u64::try_from(count).ok().filter(|count| (1..=MOST_QUESTIONS).contains(count));
    let Some(questions) = questions else {
        return Err(format!("counts {count} questions, but 1 to {MOST_QUESTIONS} are possible; {REMEDY}"));
    };
    let body = len - HEADER_BYTES;
    if !(questions * FEWEST_BYTES..=questions * MOST_BYTES).contains(&body) || !body.is_multiple_of(2) {
        return Err(format!("counts {questions} questions, which cannot take the {len} bytes that it has; {REMEDY}"));
    }
    Ok(questions as usize)
}

/// The questions that `words` hold, exactly `count` of them.
fn parse(mut words: &[u16], count: usize) -> std::result::Result<Vec<Question>, String> {
    let mut questions = Vec::with_capacity(count.min(words.len() * 2 / FEWEST_BYTES as usize));
    for index in 0..count {
        let (question, rest) =
            split_question(words, index).map_err(|what| format!("question {index} {what}; {REMEDY}"))?;
        questions.push(question);
        words = rest;
    }
    match words.len() {
        0 => Ok(questions),
        more => Err(format!("has {} bytes behind the {count} questions that it counts; {REMEDY}", 2 * more)),
    }
}

/// Takes one question off the front.
fn split_question(words: &[u16], index: usize) -> std::result::Result<(Question, &[u16]), &'static str> {
    let &[START, bytes, stated_index, label, endings, ..] = words else { return Err("does not begin as one") };
    if usize::from(stated_index) != index {
        return Err("has another one's index");
    }
    if usize::from(label) >= ENDINGS || usize::from(endings) != ENDINGS {
        return Err("does not have four endings, one of them right");
    }
    if !bytes.is_multiple_of(2) {
        return Err("has an odd number of bytes");
    }
    let (question, rest) = words.split_at_checked(usize::from(bytes) / 2).ok_or("is cut short")?;
    let mut runs = question.get(FRONT..).ok_or("is shorter than its own front")?;
    let context = take_run(&mut runs)?;
    let mut taken = [const { Vec::new() }; ENDINGS];
    for ending in &mut taken {
        *ending = take_run(&mut runs)?;
    }
    if !runs.is_empty() {
        return Err("is longer than its runs of tokens");
    }
    Ok((Question { label: label.into(), context, endings: taken }, rest))
}

/// Takes a counted run of tokens off the front.
fn take_run(words: &mut &[u16]) -> std::result::Result<Vec<u16>, &'static str> {
    let (&len, rest) = words.split_first().ok_or("lacks a run of tokens")?;
    if len == 0 {
        return Err("has an empty run of tokens");
    }
    let (run, rest) = rest.split_at_checked(len.into()).ok_or("has a run of tokens that goes beyond its end")?;
    *words = rest;
    Ok(run.to_vec())
}

fn check_fit(questions: &[Question], config: &GptConfig) -> std::result::Result<(), String> {
    let GptConfig { vocab_size, max_seq_len, .. } = *config;
    for (index, question) in questions.iter().enumerate() {
        if let Some(token) = question.runs().flatten().find(|token| usize::from(**token) >= vocab_size) {
            return Err(format!(
                "token {token} of question {index} is outside the model's vocabulary of {vocab_size} tokens; make the \
                 file with the model's tokenizer"
            ));
        }
        if question.positions() > max_seq_len {
            return Err(format!(
                "question {index} takes {} positions, but the model has {max_seq_len}; evaluate a model for longer texts",
                question.positions()
            ));
        }
    }
    Ok(())
}

/// Writes a file of questions, whole or not at all.
///
/// # Errors
/// [`Error::File`] for no question, too many, or one too long for the format; [`Error::Io`].
pub fn write(path: &Path, questions: &[Question]) -> Result<()> {
    if questions.is_empty() || questions.len() as u64 > MOST_QUESTIONS {
        let what = format!("would hold {} questions, but 1 to {MOST_QUESTIONS} are possible", questions.len());
        return Err(Error::file(path, what));
    }
    let mut header = [0i32; HEADER_WORDS];
    let mut file = AtomicFile::create(path)?;
    file.append(bytemuck::cast_slice(&header))?;
    let mut longest = 0;
    for (index, question) in questions.iter().enumerate() {
        let Some(words) = question.words(index) else {
            let what =
                format!("was not written: question {index} takes more than the {MOST_BYTES} bytes of the format");
            return Err(Error::file(path, what));
        };
        longest = longest.max(2 * words.len());
        file.append(bytemuck::cast_slice(&words))?;
    }
    header[..4].copy_from_slice(&[MAGIC, VERSION, questions.len() as i32, longest as i32]);
    file.write_start(bytemuck::cast_slice(&header))?;
    file.seal()?.publish()
}

/// A line of HellaSwag's published files; `split`, `source_id` and others are not needed.
#[derive(Deserialize)]
struct Record {
    ctx: String,
    endings: [String; ENDINGS],
    label: serde_json::Value,
}

impl Record {
    /// As llm.c encodes it: every ending begins with the space that separates it from the context.
    fn question(&self, tokenizer: Tokenizer) -> std::result::Result<Question, &'static str> {
        let label = match &self.label {
            serde_json::Value::String(digit) => digit.parse().ok(),
            number => number.as_u64(),
        };
        let label = label.filter(|&label| label < ENDINGS as u64);
        let label = label.ok_or("has no label from 0 to 3 (HellaSwag's test split keeps them secret; use 'val')")?;
        let texts = || std::iter::once(&self.ctx).chain(&self.endings);
        if texts().map(String::len).sum::<usize>() > MOST_TEXT {
            return Err("is longer than any question can be");
        }
        if self.ctx.is_empty() {
            return Err("has an empty ctx");
        }
        let endings = self.endings.each_ref().map(|ending| tokenizer.encode(&format!(" {ending}")));
        Ok(Question { label: label as usize, context: tokenizer.encode(&self.ctx), endings })
    }
}

/// The questions of HellaSwag's published files (JSON lines with `ctx`, `endings` and `label`).
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] naming the record that is none.
pub fn read_json_lines(path: &Path, tokenizer: Tokenizer) -> Result<Vec<Question>> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let records = serde_json::Deserializer::from_reader(BufReader::new(file)).into_iter::<Record>();
    let question = |(index, record): (usize, serde_json::Result<Record>)| match record {
        Ok(record) => record
            .question(tokenizer)
            .map_err(|what| Error::file(path, format!("record {} {what}; mend or remove it", index + 1))),
        Err(error) if error.is_io() => Err(Error::io("read", path)(error.into())),
        Err(error) => Err(Error::file(
            path,
            format!(
                "record {} is none of HellaSwag's: {}; each needs ctx, four endings and label",
                index + 1,
                quoted(&error.to_string())
            ),
        )),
    };
    records.enumerate().map(question).collect()
}

/// Turns HellaSwag's published files into one of llm.c's; returns the number of questions.
///
/// # Errors
/// As [`read_json_lines`] and [`write()`]; nothing is written then.
pub fn convert(inputs: &[PathBuf], output: &Path, tokenizer: Tokenizer) -> Result<usize> {
    if let Some(input) = inputs.iter().find(|input| same_file(input, output)) {
        return Err(Error::file(input, "is an input and would be overwritten; name another output"));
    }
    let mut questions = Vec::new();
    for input in inputs {
        questions.extend(read_json_lines(input, tokenizer)?);
    }
    write(output, &questions)?;
    Ok(questions.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::preset;
    use proptest::prelude::*;

    fn config() -> GptConfig {
        preset("toy").unwrap().model
    }

    fn question(label: usize) -> Question {
        Question { label, context: vec![1, 2, 3], endings: [vec![4], vec![5, 6], vec![7], vec![8]] }
    }

    fn bytes_of(questions: &[Question]) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.bin");
        write(&path, questions).unwrap();
        fs::read(path).unwrap()
    }

    fn read_bytes(bytes: &[u8]) -> Result<Vec<Question>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.bin");
        fs::write(&path, bytes).unwrap();
        read(&path, &config())
    }

    fn refusal(bytes: &[u8]) -> String {
        read_bytes(bytes).unwrap_err().to_string()
    }

    /// A file of two questions with the words from `at` replaced.
    fn with_words(at: usize, words: &[u16]) -> Vec<u8> {
        let mut bytes = bytes_of(&[question(0), question(3)]);
        let start = HEADER_BYTES as usize + 2 * at;
        bytes[start..start + 2 * words.len()].copy_from_slice(bytemuck::cast_slice(words));
        bytes
    }

    fn with_header(at: usize, word: i32) -> Vec<u8> {
        let mut bytes = bytes_of(&[question(0), question(3)]);
        bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
        bytes
    }

    #[test]
    fn a_file_has_its_published_bytes() {
        let bytes = bytes_of(&[question(2)]);
        let header: Vec<i32> = bytemuck::pod_collect_to_vec(&bytes[..16]);
        assert_eq!(header, [20240522, 1, 1, 36]);
        assert!(bytes[16..1024].iter().all(|&byte| byte == 0));
        let words: Vec<u16> = bytemuck::pod_collect_to_vec(&bytes[1024..]);
        assert_eq!(words, [65535, 36, 0, 2, 4, 3, 1, 2, 3, 1, 4, 2, 5, 6, 1, 7, 1, 8]);
        assert_eq!(read_bytes(&bytes).unwrap(), [question(2)]);
    }

    #[test]
    fn each_flaw_has_its_sentence() {
        let good = bytes_of(&[question(0), question(3)]);
        assert!(refusal(b"").contains("has 0 bytes, fewer than the 1024"));
        assert!(refusal(&with_header(0, 20240520)).contains("is a file of tokens"));
        assert!(refusal(&with_header(0, 7)).contains("starts with 7, but HellaSwag files start with 20240522"));
        assert!(refusal(&with_header(1, 2)).contains("version 2"));
        for count in [0, -1, i32::MIN, i32::MAX, 65537] {
            assert!(refusal(&with_header(2, count)).contains(&format!("counts {count} questions, but 1 to 65536")));
        }
        assert!(refusal(&with_header(2, 1)).contains("has 36 bytes behind the 1 questions"));
        assert!(refusal(&with_header(2, 3)).contains("counts 3 questions, which cannot take the 1096 bytes"));
        assert!(refusal(&good[..good.len() - 1]).contains("cannot take the 1095 bytes"));
        assert!(refusal(&good[..good.len() - 2]).contains("question 1 is cut short"));
        assert!(refusal(&with_words(18, &[1])).contains("question 1 does not begin as one"));
        assert!(refusal(&with_words(1, &[37])).contains("question 0 has an odd number of bytes"));
        assert!(refusal(&with_words(1, &[8])).contains("question 0 is shorter than its own front"));
        assert!(refusal(&with_words(1, &[34])).contains("goes beyond its end"));
        assert!(refusal(&with_words(1, &[38])).contains("longer than its runs"));
        assert!(refusal(&with_words(2, &[1])).contains("another one's index"));
        assert!(refusal(&with_words(3, &[4])).contains("four endings, one of them right"));
        assert!(refusal(&with_words(4, &[5])).contains("four endings, one of them right"));
        assert!(refusal(&with_words(5, &[0])).contains("empty run"));
        assert!(
            refusal(&with_words(6, &[300]))
                .contains("token 300 of question 0 is outside the model's vocabulary of 257")
        );
        // Two more than the 128 positions: of the context and the longest ending the last predicts nothing.
        let long = |tokens: usize| bytes_of(&[question(1), Question { context: vec![9; tokens], ..question(0) }]);
        assert!(read_bytes(&long(127)).is_ok());
        assert!(refusal(&long(128)).contains("question 1 takes 129 positions, but the model has 128"));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            questions in proptest::collection::vec(
                (0..ENDINGS, proptest::collection::vec(0u16..257, 1..20), proptest::array::uniform4(
                    proptest::collection::vec(0u16..257, 1..20)
                )),
                1..20,
            ),
        ) {
            let questions: Vec<_> = questions
                .into_iter()
                .map(|(label, context, endings)| Question { label, context, endings })
                .collect();
            prop_assert_eq!(read_bytes(&bytes_of(&questions)).unwrap(), questions);
        }

        #[test]
        fn mutated_files_are_read_or_refused(
            changes in proptest::collection::vec((0usize..2000, any::<u8>()), 1..6),
            length in 900usize..1200,
        ) {
            let mut bytes = bytes_of(&[question(0), question(3)]);
            for (index, value) in changes {
                let len = bytes.len();
                bytes[index % len] = value;
            }
            bytes.resize(length, 0);
            if let Ok(questions) = read_bytes(&bytes) {
                prop_assert!(questions.iter().all(|question| question.positions() <= config().max_seq_len));
            }
        }

        #[test]
        fn random_words_behind_an_honest_header_are_read_or_refused(
            words in proptest::collection::vec(0u16..12, 36..37), start in any::<bool>(),
        ) {
            let mut words = words;
            if start {
                words[..5].copy_from_slice(&[START, 72, 0, 1, 4]);
            }
            let _ = read_bytes(&[&bytes_of(&[question(0)])[..HEADER_BYTES as usize], bytemuck::cast_slice(&words)].concat());
        }
    }
}
