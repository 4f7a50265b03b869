//! Text files to token files.
//!
//! Text is read in blocks, each block's documents are encoded in parallel, and their tokens are written in order, so the
//! outputs depend on neither the number of threads nor the size of a block, and memory stays small.

use crate::atomic::SealedFile;
use crate::data::paths::{has_extension, same_file};
use crate::data::shard::TokenWriter;
use crate::data::tokenizer::{END_OF_TEXT, Tokenizer, is_incomplete, last_cut};
use crate::error::{Error, Result};
use rayon::prelude::*;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::cell::Cell;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// Bytes of text that are encoded together.
const BLOCK_BYTES: usize = 8 << 20;
/// Documents longer than this are cut where the cut changes no token.
const SEGMENT_BYTES: usize = 256 << 10;
/// A line is read in chunks of at most this many bytes.
const CHUNK_BYTES: usize = 1 << 20;
/// The longest stretch without a place to cut. The encoder's memory is many times the longest word.
const MAX_UNCUT_BYTES: usize = 64 << 20;
/// What is stripped at both ends of a document.
const NEWLINES: [char; 2] = ['\n', '\r'];

/// What to tokenize and where to.
#[derive(Debug, Clone)]
pub struct TokenizeOptions {
    /// Files of text ([`crate::data::text_files`] finds those of folders and globs). Files ending in .json, .jsonl or
    /// .ndjson hold JSON; all others hold text with lines `<|endoftext|>` between documents.
    pub inputs: Vec<PathBuf>,
    /// The token file, or with `shard_tokens` the name that the shards' names follow.
    pub output: PathBuf,
    /// Documents held out for validation.
    pub validation: Option<ValidationSplit>,
    /// Tokens per shard: `train.bin` becomes `train_000001.bin`, `train_000002.bin`, ... None means a single file.
    pub shard_tokens: Option<usize>,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
}

/// Which documents are held out, and where they go.
#[derive(Debug, Clone)]
pub struct ValidationSplit {
    /// The token file of the documents held out; never in shards.
    pub output: PathBuf,
    /// The share of documents held out, between 0 and 1. Whether a document is depends on its place and the seed alone.
    pub fraction: f64,
    /// Chooses other documents.
    pub seed: u64,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Summary {
    /// Bytes of text read.
    pub bytes: u64,
    /// Documents in all outputs.
    pub documents: u64,
    /// Documents held out for validation among them.
    pub validation_documents: u64,
    /// The files, training before validation.
    pub outputs: Vec<Output>,
}

/// One token file that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Where it is.
    pub path: PathBuf,
    /// The tokens in it.
    pub tokens: usize,
}

impl Summary {
    /// Tokens in all outputs.
    pub fn tokens(&self) -> usize {
        self.outputs.iter().map(|output| output.tokens).sum()
    }
}

/// Turns text into token files. Each document, stripped of newlines at both ends, becomes the end-of-text token and its
/// own tokens; empty documents are dropped. The files appear when all of them are complete; on an error none does.
///
/// `progress` is told the bytes read so far and in all, and may stop the work by returning an error.
///
/// # Errors
/// [`Error::File`] for text that is not UTF-8 or JSON of another form, naming the line; [`Error::Usage`] for options that
/// do not fit; [`Error::Io`] when a file cannot be read or written; whatever `progress` returns.
pub fn tokenize(options: &TokenizeOptions, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<Summary> {
    let inputs = &options.inputs;
    check_options(options)?;
    let mut total = 0;
    for input in inputs {
        total += fs::metadata(input).map_err(Error::io("open", input))?.len();
    }
    let read = Cell::new(0);
    let mut report = || progress(read.get(), total);
    let mut encoder = Encoder::new(options, &mut report)?;
    for input in inputs {
        read_documents(input, &read, &mut |segment| encoder.push(segment))?;
    }
    encoder.finish(options, read.get())
}

fn check_options(options: &TokenizeOptions) -> Result<()> {
    let inputs = &options.inputs;
    if options.shard_tokens == Some(0) {
        return Err(Error::usage("a shard of 0 tokens is not possible; choose --shard-tokens of at least 1"));
    }
    if inputs.is_empty() {
        return Err(Error::usage("there is no text to tokenize; name files with --input"));
    }
    let mut outputs = vec![&options.output];
    if let Some(validation) = &options.validation {
        if !(validation.fraction > 0.0 && validation.fraction < 1.0) {
            let fraction = validation.fraction;
            return Err(Error::usage(format!("--val-fraction is {fraction}, but must lie between 0 and 1")));
        }
        if same_file(&options.output, &validation.output) {
            return Err(Error::file(&validation.output, "is named for training and for validation; name two outputs"));
        }
        outputs.push(&validation.output);
    }
    match outputs.into_iter().find(|output| inputs.iter().any(|input| same_file(input, output))) {
        Some(output) => Err(Error::file(output, "is an input and would be overwritten; name another output")),
        None => Ok(()),
    }
}

/// A stretch of a document that can be encoded by itself.
struct Segment {
    text: String,
    /// False for the second and later stretches of a long document.
    starts_document: bool,
}

impl Segment {
    fn encode(&self, tokenizer: Tokenizer) -> Vec<u16> {
        let mut tokens = tokenizer.encode(&self.text);
        if self.starts_document {
            tokens.insert(0, tokenizer.end_of_text());
        }
        tokens
    }
}

/// Collects segments into blocks, encodes a block in parallel, and writes it in order.
struct Encoder<'a> {
    tokenizer: Tokenizer,
    /// Segments, and whether each is held out.
    block: Vec<(Segment, bool)>,
    /// Memory of the block, the segments' own included: documents may be tiny and many.
    block_bytes: usize,
    training: Shards,
    validation: Option<(ValidationSplit, Shards)>,
    documents: u64,
    validation_documents: u64,
    report: &'a mut dyn FnMut() -> Result<()>,
}

impl<'a> Encoder<'a> {
    fn new(options: &TokenizeOptions, report: &'a mut dyn FnMut() -> Result<()>) -> Result<Self> {
        let validation = match &options.validation {
            Some(split) => Some((split.clone(), Shards::create(&split.output, None)?)),
            None => None,
        };
        Ok(Encoder {
            tokenizer: options.tokenizer,
            block: Vec::new(),
            block_bytes: 0,
            training: Shards::create(&options.output, options.shard_tokens)?,
            validation,
            documents: 0,
            validation_documents: 0,
            report,
        })
    }

    fn push(&mut self, segment: Segment) -> Result<()> {
        if segment.starts_document {
            self.documents += 1;
        }
        let held_out = self.validation.as_ref().is_some_and(|(split, _)| is_held_out(split, self.documents));
        self.validation_documents += u64::from(held_out && segment.starts_document);
        self.block_bytes += segment.text.len() + size_of::<(Segment, bool)>();
        self.block.push((segment, held_out));
        if self.block_bytes >= BLOCK_BYTES { self.write_block() } else { Ok(()) }
    }

    fn write_block(&mut self) -> Result<()> {
        let tokenizer = self.tokenizer;
        let encoded: Vec<_> = self.block.par_iter().map(|(segment, _)| segment.encode(tokenizer)).collect();
        for (tokens, (_, held_out)) in encoded.iter().zip(&self.block) {
            match &mut self.validation {
                Some((_, output)) if *held_out => output.write(tokens)?,
                _ => self.training.write(tokens)?,
            }
        }
        self.block.clear();
        self.block_bytes = 0;
        (self.report)()
    }

    fn finish(mut self, options: &TokenizeOptions, bytes: u64) -> Result<Summary> {
        self.write_block()?;
        let Encoder { documents, validation_documents, .. } = self;
        if documents == 0 {
            return Err(Error::file(&options.inputs[0], "holds no document; name files with text"));
        }
        if options.validation.is_some() && (validation_documents == 0 || validation_documents == documents) {
            let empty = if validation_documents == 0 { "validation" } else { "training" };
            return Err(Error::usage(format!(
                "none of the {documents} documents fell to {empty}; choose another --val-fraction, or separate the \
                 documents with lines {END_OF_TEXT}"
            )));
        }
        let mut finished = self.training.seal()?;
        if let Some((_, output)) = self.validation {
            finished.extend(output.seal()?);
        }
        let outputs = publish(finished)?;
        Ok(Summary { bytes, documents, validation_documents, outputs })
    }
}

/// Whether the document counted `document` is held out: its hash (SplitMix64, Steele et al. 2014), as a fraction, is below
/// the split's.
fn is_held_out(split: &ValidationSplit, document: u64) -> bool {
    let mut hash = split.seed.wrapping_add(document.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^= hash >> 31;
    ((hash >> 11) as f64) < split.fraction * (1u64 << 53) as f64
}

/// Token files filled one after the other.
struct Shards {
    output: PathBuf,
    shard_tokens: Option<usize>,
    open: TokenWriter,
    full: Vec<(SealedFile, usize)>,
}

impl Shards {
    fn create(output: &Path, shard_tokens: Option<usize>) -> Result<Self> {
        let first = if shard_tokens.is_some() { shard_path(output, 1) } else { output.to_path_buf() };
        let open = TokenWriter::create(&first)?;
        Ok(Shards { output: output.to_path_buf(), shard_tokens, open, full: Vec::new() })
    }

    fn write(&mut self, mut tokens: &[u16]) -> Result<()> {
        while let Some(shard_tokens) = self.shard_tokens
            && tokens.len() > shard_tokens - self.open.count()
        {
            let (fitting, rest) = tokens.split_at(shard_tokens - self.open.count());
            self.open.write(fitting)?;
            let next = TokenWriter::create(&shard_path(&self.output, self.full.len() + 2))?;
            let full = std::mem::replace(&mut self.open, next);
            let tokens_in_full = full.count();
            self.full.push((full.seal()?, tokens_in_full));
            tokens = rest;
        }
        self.open.write(tokens)
    }

    /// Completes the files, still under their temporary names.
    fn seal(mut self) -> Result<Vec<(SealedFile, usize)>> {
        let tokens = self.open.count();
        self.full.push((self.open.seal()?, tokens));
        let next = shard_path(&self.output, self.full.len() + 1);
        if self.shard_tokens.is_some() && next.exists() {
            let what =
                "is left from an earlier run with more shards and would be read with the new ones; remove it first";
            return Err(Error::file(next, what));
        }
        Ok(self.full)
    }
}

/// `train.bin` and 1 make `train_000001.bin`.
fn shard_path(output: &Path, number: usize) -> PathBuf {
    let stem = output.file_stem().unwrap_or_default().to_string_lossy();
    let extension = output.extension().map_or("bin".into(), |extension| extension.to_string_lossy());
    output.with_file_name(format!("{stem}_{number:06}.{extension}"))
}

fn publish(finished: Vec<(SealedFile, usize)>) -> Result<Vec<Output>> {
    let mut outputs = Vec::with_capacity(finished.len());
    for (file, tokens) in finished {
        outputs.push(Output { path: file.path().to_path_buf(), tokens });
        file.publish()?;
    }
    Ok(outputs)
}

/// Where the documents of a file go.
type Sink<'a> = dyn FnMut(Segment) -> Result<()> + 'a;

/// Reads the documents of one file in order; adds the bytes read to `read`.
fn read_documents(path: &Path, read: &Cell<u64>, sink: &mut Sink) -> Result<()> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut reader = BufReader::with_capacity(1 << 20, CountingReader { file, read });
    let start = reader.fill_buf().map_err(Error::io("read", path))?;
    if start.starts_with(b"\xef\xbb\xbf") {
        reader.consume(3); // a byte order mark is no text
    }
    if has_extension(path, &["json", "jsonl", "ndjson"]) {
        read_json(path, reader, sink)
    } else {
        read_text(path, reader, sink)
    }
}

struct CountingReader<'a> {
    file: File,
    read: &'a Cell<u64>,
}

impl Read for CountingReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.file.read(buffer)?;
        self.read.set(self.read.get() + bytes as u64);
        Ok(bytes)
    }
}

/// Reads documents separated by lines `<|endoftext|>`.
fn read_text(path: &Path, mut reader: impl BufRead, sink: &mut Sink) -> Result<()> {
    let mut document = DocumentBuilder::new(path);
    // Starts with the incomplete character that the chunk before ended with, if any.
    let mut bytes = Vec::new();
    let (mut offset, mut line, mut at_line_start) = (0, 1u64, true);
    loop {
        let chunk = reader.by_ref().take(CHUNK_BYTES as u64).read_until(b'\n', &mut bytes);
        let at_end = chunk.map_err(Error::io("read", path))? == 0;
        let text = bytes.utf8_chunks().next().map_or("", |chunk| chunk.valid());
        let (length, rest) = (text.len(), &bytes[text.len()..]);
        if !rest.is_empty() && (at_end || !is_incomplete(rest)) {
            let place = offset + length;
            return Err(Error::file(
                path,
                format!("is not UTF-8 at byte {place}, in line {line}; convert it to UTF-8"),
            ));
        }
        if at_line_start && text.trim_end_matches(NEWLINES) == END_OF_TEXT {
            document.finish(sink)?;
        } else {
            document.push(text, sink)?;
        }
        if at_end {
            return document.finish(sink);
        }
        at_line_start = text.ends_with('\n');
        line += u64::from(at_line_start);
        offset += length;
        bytes.drain(..length);
    }
}

/// The document at hand, chunk by chunk.
struct DocumentBuilder<'a> {
    path: &'a Path,
    text: String,
    /// The last place where `text` may be cut; 0 for none.
    cut: usize,
    /// Whether earlier stretches of this document are already in the sink.
    continued: bool,
}

impl<'a> DocumentBuilder<'a> {
    fn new(path: &'a Path) -> Self {
        DocumentBuilder { path, text: String::new(), cut: 0, continued: false }
    }

    fn push(&mut self, chunk: &str, sink: &mut Sink) -> Result<()> {
        let is_start = self.text.is_empty() && !self.continued;
        let start = self.text.len();
        self.text.push_str(if is_start { chunk.trim_start_matches(NEWLINES) } else { chunk });
        self.cut = last_cut(&self.text, start).unwrap_or(self.cut);
        if self.text.len() < SEGMENT_BYTES {
            return Ok(());
        }
        if self.cut > 0 {
            let rest = self.text.split_off(self.cut);
            self.emit(sink)?;
            (self.text, self.cut, self.continued) = (rest, 0, true);
        } else if self.text.len() > MAX_UNCUT_BYTES {
            let start: String = self.text.chars().take(20).collect();
            let what = format!(
                "holds {} MiB without a space between words, starting with {start:?}; remove what is no text",
                MAX_UNCUT_BYTES >> 20
            );
            return Err(Error::file(self.path, what));
        }
        Ok(())
    }

    fn finish(&mut self, sink: &mut Sink) -> Result<()> {
        let length = self.text.trim_end_matches(NEWLINES).len();
        self.text.truncate(length);
        if !self.text.is_empty() {
            self.emit(sink)?;
        }
        (self.cut, self.continued) = (0, false);
        Ok(())
    }

    fn emit(&mut self, sink: &mut Sink) -> Result<()> {
        sink(Segment { text: std::mem::take(&mut self.text), starts_document: !self.continued })
    }
}

/// Reads JSON values one after the other: strings, objects with a `story` or `text`, and arrays of these. JSON lines and one
/// large array are both of this form.
fn read_json(path: &Path, reader: impl BufRead, sink: &mut Sink) -> Result<()> {
    let mut refusal = None;
    let mut json = serde_json::Deserializer::from_reader(reader);
    let mut document = DocumentBuilder::new(path);
    let mut take = |text: String| {
        whole_document(&mut document, &text, sink).map_err(|error| {
            refusal = Some(error);
            "stopped"
        })
    };
    let outcome = loop {
        if json.end().is_ok() {
            break Ok(());
        }
        if let Err(error) = (Documents { take: &mut take, in_array: false }).deserialize(&mut json) {
            break Err(error);
        }
    };
    match (refusal, outcome) {
        (Some(error), _) => Err(error),
        (None, Err(error)) if error.is_io() => Err(Error::io("read", path)(error.into())),
        (None, Err(error)) => Err(Error::file(
            path,
            format!("invalid record: {error}; each must be a string or an object with a string `story` or `text`"),
        )),
        (None, Ok(())) => Ok(()),
    }
}

fn whole_document(document: &mut DocumentBuilder, mut text: &str, sink: &mut Sink) -> Result<()> {
    while !text.is_empty() {
        let (chunk, rest) = text.split_at(text.floor_char_boundary(CHUNK_BYTES));
        document.push(chunk, sink)?;
        text = rest;
    }
    document.finish(sink)
}

/// Hands the texts of one JSON value to `take` as they are read, so that an array of any length needs no memory.
struct Documents<'a, F> {
    take: &'a mut F,
    in_array: bool,
}

impl<'de, F: FnMut(String) -> std::result::Result<(), &'static str>> DeserializeSeed<'de> for Documents<'_, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, F: FnMut(String) -> std::result::Result<(), &'static str>> Visitor<'de> for Documents<'_, F> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(if self.in_array { "a string or an object" } else { "a string, an object or an array" })
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<(), E> {
        (self.take)(text.to_owned()).map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> std::result::Result<(), A::Error> {
        let (mut story, mut text) = (None, None);
        while let Some(key) = object.next_key::<String>()? {
            match key.as_str() {
                "story" => story = Some(object.next_value()?),
                "text" => text = Some(object.next_value()?),
                _ => drop(object.next_value::<IgnoredAny>()?),
            }
        }
        let document =
            story.or(text).ok_or_else(|| A::Error::custom("neither a `story` nor a `text` in the object"))?;
        (self.take)(document).map_err(A::Error::custom)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> std::result::Result<(), A::Error> {
        if self.in_array {
            return Err(A::Error::custom("an array inside an array"));
        }
        while array.next_element_seed(Documents { take: &mut *self.take, in_array: true })?.is_some() {}
        Ok(())
    }
}
