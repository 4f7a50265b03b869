//! TinyStories (Eldan and Li 2023, <https://arxiv.org/abs/2305.07759>) from the Hugging Face hub.

use crate::data::tokenize::{Summary, TokenizeOptions, tokenize};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::{HFClientBuilder, HFClientSync, HFError};
use sha2::{Digest, Sha256};
use std::error::Error as _;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

const OWNER: &str = "roneneldan";
const DATASET: &str = "TinyStories";
/// Each file of text and the token file made of it, under llm.c's name. The small one comes first: what is wrong with the
/// network or the disk shows before the 2 GB.
const FILES: [(&str, &str); 2] =
    [("TinyStories-valid.txt", "TinyStories_val.bin"), ("TinyStories-train.txt", "TinyStories_train.bin")];

/// Further attempts after a request that failed for a passing reason, and the wait before the first of them (it doubles).
const RETRIES: usize = 2;
const RETRY_DELAY: Duration = Duration::from_millis(200);

/// Which hub to ask and where to keep what it sends.
#[derive(Debug, Clone)]
pub struct Hub {
    /// The hub's address; None means the environment's `HF_ENDPOINT`, else <https://huggingface.co>.
    pub endpoint: Option<String>,
    /// The folder of downloads; None means the hub's usual cache (`HF_HOME` and its kin), shared with other programs.
    pub cache: Option<PathBuf>,
    /// How long the hub may send nothing before the download is given up.
    pub patience: Duration,
}

impl Default for Hub {
    fn default() -> Self {
        Hub { endpoint: None, cache: None, patience: Duration::from_secs(60) }
    }
}

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
/// cache, so that another run goes on with what is already there.
///
/// # Errors
/// [`Error::Network`] when the hub cannot be reached, refuses, falls silent or sends something else than it states (which is
/// deleted); [`Error::Io`] when the disk refuses; whatever `progress` returns.
pub fn download(output_dir: &Path, hub: &Hub, progress: &mut Progress) -> Result<Vec<Source>> {
    fs::create_dir_all(output_dir).map_err(Error::io("create", output_dir))?;
    let hub = connect(hub)?;
    let mut checked = Vec::new();
    for (name, output) in FILES {
        let fetched = fetch(&hub, name, progress)?;
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

/// A client and where it gets and keeps things.
struct Connection {
    client: HFClientSync,
    endpoint: String,
    cache: PathBuf,
    patience: Duration,
}

fn connect(hub: &Hub) -> Result<Connection> {
    let mut builder = HFClientBuilder::new().retry_max_attempts(RETRIES).retry_base_delay(RETRY_DELAY);
    if let Some(endpoint) = &hub.endpoint {
        builder = builder.endpoint(endpoint);
    }
    if let Some(cache) = &hub.cache {
        builder = builder.cache_dir(cache);
    }
    let connection = builder.build().and_then(|client| {
        let (endpoint, cache) = (client.endpoint().to_owned(), client.cache_dir().to_owned());
        Ok(Connection { client: HFClientSync::from_inner(client)?, endpoint, cache, patience: hub.patience })
    });
    connection.map_err(|error| match error {
        HFError::Url(error) => Error::usage(format!(
            "HF_ENDPOINT '{}' is not an address ({error}); set one like https://huggingface.co or unset it",
            hub.endpoint.clone().or_else(|| std::env::var("HF_ENDPOINT").ok()).unwrap_or_default()
        )),
        error => Error::Network(format!("cannot set up the connection to the hub: {}", causes(&error))),
    })
}

/// What a download reports to the thread that waits for it.
enum Event {
    /// The size that the hub states.
    Size(u64),
    /// Bytes that have come.
    Bytes(u64),
    Done(std::result::Result<PathBuf, HFError>),
}

/// Sends on the hub's events; repeats nothing, so that silence means that nothing comes.
struct Reporter {
    sender: Sender<Event>,
    bytes: AtomicU64,
}

impl ProgressHandler for Reporter {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        let bytes = match event {
            DownloadEvent::Start { total_bytes, .. } => {
                let _ = self.sender.send(Event::Size(*total_bytes));
                return;
            }
            DownloadEvent::Progress { files } => files.iter().map(|file| file.bytes_completed).sum(),
            DownloadEvent::AggregateProgress { bytes_completed, .. } => *bytes_completed,
            DownloadEvent::Complete => return,
        };
        if self.bytes.swap(bytes, Ordering::Relaxed) != bytes {
            // A receiver that has gone has given up on the download.
            let _ = self.sender.send(Event::Bytes(bytes));
        }
    }
}

/// A file in the cache, not checked yet.
struct Fetched {
    path: PathBuf,
    /// The size the hub stated, if it was asked and knew.
    size: Option<u64>,
}

/// Fetches one file into the cache. The download runs in a thread of its own, because the client sets no time limits.
fn fetch(hub: &Connection, name: &str, progress: &mut Progress) -> Result<Fetched> {
    let (sender, receiver) = mpsc::channel();
    let reporter = Reporter { sender: sender.clone(), bytes: AtomicU64::new(0) };
    let (dataset, filename) = (hub.client.dataset(OWNER, DATASET), name.to_owned());
    thread::spawn(move || {
        let result = dataset.download_file().filename(filename).progress(reporter).send();
        let _ = sender.send(Event::Done(result));
    });
    let (mut size, mut bytes) = (0, 0);
    let what = format!("fetching {name}");
    progress(&what, 0, 0)?;
    loop {
        match receiver.recv_timeout(hub.patience) {
            Ok(Event::Size(total)) => size = total,
            Ok(Event::Bytes(done)) => bytes = done,
            Ok(Event::Done(Ok(path))) => return Ok(Fetched { path, size: Some(size).filter(|&size| size > 0) }),
            Ok(Event::Done(Err(error))) => return Err(explain(error, hub, name, bytes, size)),
            Err(RecvTimeoutError::Timeout) => {
                return Err(Error::Network(format!(
                    "the hub at {} sent nothing for {:.0?} while {name} was fetched; check the network and run again",
                    hub.endpoint, hub.patience
                )));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::Internal(format!("the download of {name} vanished")));
            }
        }
        progress(&what, bytes, size)?;
    }
}

/// The sentence for a download that failed after `bytes` of `size` bytes.
fn explain(error: HFError, hub: &Connection, name: &str, bytes: u64, size: u64) -> Error {
    let endpoint = &hub.endpoint;
    let error = match disk_error(error) {
        Ok(source) => return Error::Io { action: "write the download into", path: hub.cache.clone(), source },
        Err(error) => error,
    };
    let because = causes(&error);
    Error::Network(match error {
        HFError::Request { source, .. } if source.is_body() || source.is_decode() => format!(
            "the connection to the hub at {endpoint} was cut after {bytes} of {size} bytes of {name} ({because}); run again"
        ),
        HFError::Request { .. } => {
            format!("cannot reach the hub at {endpoint} ({because}); check the network or HF_ENDPOINT and run again")
        }
        HFError::EntryNotFound { .. } | HFError::RepoNotFound { .. } | HFError::RevisionNotFound { .. } => {
            format!("the hub at {endpoint} has no {name} in the dataset {OWNER}/{DATASET}; check HF_ENDPOINT")
        }
        HFError::AuthRequired { .. } | HFError::Forbidden { .. } => {
            format!("the hub at {endpoint} refuses {name} ({because}); check HF_TOKEN or unset it")
        }
        _ => format!("the hub at {endpoint} did not deliver {name} ({because}); try again later"),
    })
}

/// The operating system's refusal to write, if that is what ended a download.
fn disk_error(error: HFError) -> std::result::Result<io::Error, HFError> {
    match error {
        HFError::Io(source) => Ok(source),
        // Of a full disk in one of the hub's own transfers only the words are left.
        error if causes(&error).contains("No space left on device") => Ok(io::ErrorKind::StorageFull.into()),
        error => Err(error),
    }
}

/// An error and what lies beneath it, in one line.
fn causes(error: &HFError) -> String {
    let mut sentence = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_sentence = inner.to_string();
        if !sentence.contains(&inner_sentence) {
            sentence = format!("{sentence}: {inner_sentence}");
        }
        cause = inner.source();
    }
    sentence.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A file that is what the hub says it is.
struct Checked {
    path: PathBuf,
    sha256: String,
    sha256_stated: bool,
}

/// Compares a file with the size and the SHA-256 the hub states. The cache names a file by the hub's etag, which for large
/// files is their SHA-256. What does not agree is deleted, so that the next run fetches it anew.
fn check(name: &str, fetched: Fetched, progress: &mut Progress) -> Result<Checked> {
    let Fetched { path, size } = fetched;
    let blob = path.canonicalize().map_err(Error::io("open", &path))?;
    let length = fs::metadata(&blob).map_err(Error::io("open", &blob))?.len();
    if let Some(size) = size.filter(|&size| size != length) {
        let what = format!("{name} should have {size} bytes, but {length} came");
        return Err(discard(&path, &blob, what));
    }
    let stated = blob.file_name().and_then(|etag| etag.to_str()).filter(|etag| is_sha256(etag)).map(str::to_owned);
    let sha256 = hash_file(&blob, &mut |done| progress(&format!("checking {name}"), done, length))?;
    match &stated {
        Some(stated) if !stated.eq_ignore_ascii_case(&sha256) => {
            let what = format!("{name} should have the SHA-256 {stated}, but what came has {sha256}");
            Err(discard(&path, &blob, what))
        }
        _ => Ok(Checked { path, sha256, sha256_stated: stated.is_some() }),
    }
}

fn discard(pointer: &Path, blob: &Path, what: String) -> Error {
    let removed = fs::remove_file(blob).and_then(|()| if pointer == blob { Ok(()) } else { fs::remove_file(pointer) });
    Error::Network(match removed {
        Ok(()) => format!("{what}; it is deleted, run again to fetch it anew"),
        Err(error) => format!("{what}; delete {} ({error}) and run again to fetch it anew", blob.display()),
    })
}

fn is_sha256(etag: &str) -> bool {
    etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit())
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
