//! TinyStories (Eldan and Li 2023, <https://arxiv.org/abs/2305.07759>) from the Hugging Face hub.

use crate::data::hub::{Dataset, Fetched, Hub};
use crate::data::tokenize::{Summary, TokenizeOptions, tokenize};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

const DATASET: &str = "roneneldan/TinyStories";
/// Each file of text and the token file made of it, under llm.c's name. The small one comes first: what is wrong with the
/// network or the disk shows before the 2 GB.
const FILES: [(&str, &str); 2] =
    [("TinyStories-valid.txt", "TinyStories_val.bin"), ("TinyStories-train.txt", "TinyStories_train.bin")];

/// A file of the dataset as it lies in the cache, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Its name in the dataset.
    pub name: &'static str,
    /// Where it lies.
    pub path: PathBuf,
    /// Its SHA-256 in hexadecimal.
    pub sha256: String,
    /// Whether the hub stated a SHA-256 (they agree then); false means that only the size could be checked.
    pub sha256_stated: bool,
    /// What became of it.
    pub summary: Summary,
}

/// Told what is being done, and how many bytes of how many are done (0 when not known); may stop the work by an error.
pub type Progress<'a> = dyn FnMut(&str, u64, u64) -> Result<()> + 'a;

/// Fetches TinyStories, checks it against the sizes and SHA-256 that the hub states, and writes `TinyStories_val.bin` and
/// `TinyStories_train.bin` (GPT-2 tokens) into `output_dir`, which is made if it is missing. The text stays in the hub's
/// cache, so that another run goes on with what is already there, a part of a file too.
///
/// # Errors
/// [`Error::Network`] when the hub cannot be reached, refuses, falls silent or sends something else than it states (which is
/// deleted); [`Error::Io`] when the disk refuses; whatever `progress` returns.
pub fn download(output_dir: &Path, hub: &Hub, progress: &mut Progress) -> Result<Vec<Source>> {
    fs::create_dir_all(output_dir).map_err(Error::io("create", output_dir))?;
    let dataset = Dataset::new(hub, DATASET)?;
    let mut checked = Vec::new();
    for (name, output) in FILES {
        let what = format!("fetching {name}");
        let fetched = dataset.fetch(name, &mut |done, total| progress(&what, done, total))?;
        checked.push((name, output, check(name, fetched, progress)?));
    }
    let mut sources = Vec::new();
    for (name, output, Checked { path, sha256, sha256_stated }) in checked {
        let options = TokenizeOptions {
            inputs: vec![path.clone()],
            output: output_dir.join(output),
            validation: None,
            shard_tokens: None,
            tokenizer: Tokenizer::Gpt2,
        };
        let summary = tokenize(&options, &mut |done, total| progress(&format!("tokenizing {name}"), done, total))?;
        sources.push(Source { name, path, sha256, sha256_stated, summary });
    }
    Ok(sources)
}

/// A file that is what the hub says it is.
struct Checked {
    path: PathBuf,
    sha256: String,
    sha256_stated: bool,
}

/// Compares a file with the size and the SHA-256 that the hub states. What does not agree is deleted, so that the next run
/// fetches it anew.
fn check(name: &str, fetched: Fetched, progress: &mut Progress) -> Result<Checked> {
    let Fetched { path, size, sha256: stated, .. } = &fetched;
    let length = fs::metadata(path).map_err(Error::io("open", path))?.len();
    if let Some(size) = size.filter(|&size| size != length) {
        return Err(discard(&fetched, format!("{name} should have {size} bytes, but {length} came")));
    }
    let sha256 = hash_file(path, &mut |done| progress(&format!("checking {name}"), done, length))?;
    match stated {
        Some(stated) if *stated != sha256 => {
            let what = format!("{name} should have the SHA-256 {stated}, but what came has {sha256}");
            Err(discard(&fetched, what))
        }
        _ => Ok(Checked { path: path.clone(), sha256, sha256_stated: stated.is_some() }),
    }
}

/// Deletes a file of the cache, and says so after `what` is wrong with it.
fn discard(Fetched { path, blob, .. }: &Fetched, what: String) -> Error {
    let kept = [path, blob].into_iter().find_map(|file| match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Some((file, error)),
        _ => None,
    });
    Error::Network(match kept {
        None => format!("{what}; it is deleted, run again to fetch it anew"),
        Some((file, error)) => format!("{what}; delete {} ({error}) and run again to fetch it anew", file.display()),
    })
}

fn hash_file(path: &Path, progress: &mut dyn FnMut(u64) -> Result<()>) -> Result<String> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let mut buffer = vec![0; 1 << 20];
    let (mut hash, mut done) = (Sha256::new(), 0);
    loop {
        let bytes = file.read(&mut buffer).map_err(Error::io("read", path))?;
        if bytes == 0 {
            return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hash.update(&buffer[..bytes]);
        done += bytes as u64;
        progress(done)?;
    }
}
