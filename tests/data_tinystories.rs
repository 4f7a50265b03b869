//! The TinyStories download against a small server that plays the hub, honest and otherwise.

mod skip;

use bandtrain::data::hub::Hub;
use bandtrain::data::tinystories::{Source, download};
use bandtrain::data::{TokenFile, Tokenizer};
use bandtrain::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// What the hub does with a GET for a file.
#[derive(Debug, Clone, PartialEq)]
enum Manner {
    Honest,
    /// Other bytes than the etag says, as many as it says.
    Corrupt,
    /// Fewer bytes than the etag and the linked size say, in a response complete in itself.
    Short,
    /// The connection ends halfway.
    Cut,
    /// Honest, but with an etag that is no SHA-256.
    Unstated,
    /// No answer at all.
    Silent,
    Missing,
    Broken,
    /// A login is asked for.
    Private,
    /// The dataset has another name now, on the same hub.
    Renamed,
    /// As the hub answers for large files: what it states, and where they lie (this address).
    Elsewhere(String),
}

/// A hub on the loopback interface.
struct TestHub {
    endpoint: String,
    manner: Arc<Mutex<Manner>>,
    gets: Arc<AtomicUsize>,
    /// Bytes of files that went out.
    sent: Arc<AtomicUsize>,
}

impl TestHub {
    fn start(manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (manner, gets, sent) = (Arc::new(Mutex::new(manner)), Arc::default(), Arc::default());
        let hub = TestHub { endpoint, manner, gets, sent };
        let (manner, gets, sent) = (hub.manner.clone(), hub.gets.clone(), hub.sent.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (manner, gets, sent) = (manner.lock().unwrap().clone(), gets.clone(), sent.clone());
                thread::spawn(move || serve(stream.unwrap(), manner, &gets, &sent));
            }
        });
        hub
    }

    fn becomes(&self, manner: Manner) {
        *self.manner.lock().unwrap() = manner;
    }
}

/// What is asked.
struct Request {
    path: String,
    is_get: bool,
    /// The byte to begin with.
    first: usize,
}

fn serve(mut stream: TcpStream, manner: Manner, gets: &AtomicUsize, sent: &AtomicUsize) {
    let Some(request) = read_request(&stream) else { return };
    gets.fetch_add(usize::from(request.is_get), Ordering::Relaxed);
    let mut refuse = |status| write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let name = request.path.rsplit('/').next().unwrap_or_default();
    let _ = match manner {
        Manner::Silent => {
            thread::sleep(Duration::from_secs(5));
            Ok(())
        }
        Manner::Missing => refuse("404 Not Found".into()),
        Manner::Private => refuse("401 Unauthorized".into()),
        Manner::Broken if !request.is_get => refuse("500 Internal Server Error".into()),
        Manner::Renamed if request.path.starts_with("/datasets/roneneldan/") => {
            refuse(format!("307 Temporary Redirect\r\nLocation: /datasets/renamed/{name}"))
        }
        Manner::Elsewhere(ref place) => {
            let stated = stated(&contents(name), &sha256(&contents(name)));
            refuse(format!("302 Found\r\nLocation: {place}/files/{name}\r\n{stated}ETag: \"of the redirect\""))
        }
        _ => respond(&mut stream, &contents(name), &manner, &request).map(|bytes| {
            sent.fetch_add(bytes, Ordering::Relaxed);
        }),
    };
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next()?.ok()?;
    let headers: Vec<_> = lines.map_while(|line| line.ok().filter(|line| !line.is_empty())).collect();
    let first = headers.iter().find_map(|line| line.to_lowercase().strip_prefix("range: bytes=").map(String::from));
    let first = first.and_then(|range| range.trim_end_matches('-').parse().ok()).unwrap_or(0);
    Some(Request { path: request.split(' ').nth(1)?.to_string(), is_get: request.starts_with("GET"), first })
}

/// The headers in which a hub says what a file is.
fn stated(text: &[u8], etag: &str) -> String {
    let commit = "0123456789".repeat(4);
    format!("X-Repo-Commit: {commit}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}\r\n", text.len())
}

/// Answers with a file, or what the manner makes of it, and says how many bytes of it went out.
fn respond(stream: &mut TcpStream, text: &[u8], manner: &Manner, request: &Request) -> io::Result<usize> {
    let etag = if *manner == Manner::Unstated { format!("e83c5163-{}", text.len()) } else { sha256(text) };
    let mut body = text.to_vec();
    match manner {
        Manner::Corrupt => body[0] ^= 1,
        Manner::Short => body.truncate(text.len() - 10),
        _ => {}
    }
    let status = match request.first {
        0 => "200 OK".to_string(),
        first => {
            body.drain(..first);
            format!("206 Partial Content\r\nContent-Range: bytes {first}-{}/{}", text.len() - 1, text.len())
        }
    };
    let (stated, length) = (stated(text, &etag), body.len());
    write!(
        stream,
        "HTTP/1.1 {status}\r\n{stated}ETag: \"{etag}\"\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    let sent = match (request.is_get, manner) {
        (false, _) => 0,
        (true, Manner::Cut) => length / 2,
        (true, _) => length,
    };
    stream.write_all(&body[..sent])?;
    Ok(sent)
}

/// A few stories for validation, 3 MB of them for training.
fn contents(name: &str) -> Vec<u8> {
    let stories = if name.contains("train") { 60_000 } else { 100 };
    (0..stories)
        .map(|number| format!("Story {number} of a small cat and dog.\n<|endoftext|>\n"))
        .collect::<String>()
        .into()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A folder with a cache and an output folder.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        Bench(tempfile::tempdir().unwrap())
    }

    fn output(&self) -> PathBuf {
        self.0.path().join("output")
    }

    fn cache(&self) -> PathBuf {
        self.0.path().join("cache")
    }

    fn download(&self, endpoint: &str) -> Result<Vec<Source>> {
        download_into(&self.output(), &self.cache(), endpoint)
    }

    fn refusal(&self, endpoint: &str) -> String {
        let start = Instant::now();
        let error = self.download(endpoint).unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        assert!(matches!(error, Error::Network(_)), "{error:?}");
        assert_eq!(fs::read_dir(self.output()).unwrap().count(), 0);
        error.to_string()
    }
}

fn download_into(output: &Path, cache: &Path, endpoint: &str) -> Result<Vec<Source>> {
    let hub = Hub { endpoint: Some(endpoint.into()), cache: Some(cache.into()), patience: Duration::from_secs(2) };
    download(output, &hub, &mut |_, _, _| Ok(()))
}

#[test]
fn an_honest_hub_gives_token_files_and_is_asked_once() {
    let (bench, hub) = (Bench::new(), TestHub::start(Manner::Honest));
    let sources = bench.download(&hub.endpoint).unwrap();
    for (source, output, stories) in
        [(&sources[0], "TinyStories_val.bin", 100), (&sources[1], "TinyStories_train.bin", 60_000)]
    {
        assert!(source.sha256_stated);
        assert_eq!(source.sha256, sha256(&contents(source.name)));
        assert_eq!(source.summary.documents, stories);
        let tokens = TokenFile::open(&bench.output().join(output), Tokenizer::Gpt2.vocab_size()).unwrap();
        assert_eq!(tokens.tokens().iter().filter(|&&token| token == 50256).count() as u64, stories);
    }
    assert_eq!(bench.download(&hub.endpoint).unwrap(), sources);
    assert_eq!(hub.gets.load(Ordering::Relaxed), 2, "the second run reads the cache");
}

#[test]
fn a_wrong_checksum_is_deleted_and_fetched_anew() {
    for manner in [Manner::Corrupt, Manner::Short] {
        let (bench, hub) = (Bench::new(), TestHub::start(manner));
        let sentence = bench.refusal(&hub.endpoint);
        assert!(sentence.contains("TinyStories-valid.txt should have"), "{sentence}");
        assert!(sentence.contains("it is deleted, run again to fetch it anew"), "{sentence}");
        hub.becomes(Manner::Honest);
        bench.download(&hub.endpoint).unwrap();
    }
}

#[test]
fn a_cut_connection_says_so_and_the_next_run_succeeds() {
    let (bench, hub) = (Bench::new(), TestHub::start(Manner::Cut));
    let sentence = bench.refusal(&hub.endpoint);
    assert!(sentence.contains("was cut after"), "{sentence}");
    assert!(sentence.ends_with("run again"), "{sentence}");
    let half = hub.sent.swap(0, Ordering::Relaxed);
    hub.becomes(Manner::Honest);
    let sources = bench.download(&hub.endpoint).unwrap();
    let whole: usize = sources.iter().map(|source| contents(source.name).len()).sum();
    assert!(half > 0 && hub.sent.load(Ordering::Relaxed) == whole - half, "what had come is not sent again");
}

#[test]
fn what_the_cache_has_does_for_a_hub_that_is_gone() {
    let (bench, hub) = (Bench::new(), TestHub::start(Manner::Honest));
    let sources = bench.download(&hub.endpoint).unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_eq!(bench.download(&format!("http://{closed}")).unwrap(), sources);
    hub.becomes(Manner::Broken);
    assert_eq!(bench.download(&hub.endpoint).unwrap(), sources);
}

#[test]
fn redirects_lead_to_the_file() {
    let place = TestHub::start(Manner::Unstated);
    for manner in [Manner::Renamed, Manner::Elsewhere(place.endpoint.clone())] {
        let (bench, hub) = (Bench::new(), TestHub::start(manner));
        assert!(bench.download(&hub.endpoint).unwrap().iter().all(|source| source.sha256_stated));
        let folder = bench.cache().join("datasets--roneneldan--TinyStories");
        let commit = fs::read_to_string(folder.join("refs/main")).unwrap();
        let text = fs::read(folder.join("snapshots").join(commit).join("TinyStories-valid.txt")).unwrap();
        assert_eq!(fs::read(folder.join("blobs").join(sha256(&text))).unwrap(), text);
    }
}

#[test]
fn a_hub_that_states_no_checksum_is_reported() {
    let (bench, hub) = (Bench::new(), TestHub::start(Manner::Unstated));
    assert!(bench.download(&hub.endpoint).unwrap().iter().all(|source| !source.sha256_stated));
}

#[test]
fn hubs_that_do_not_answer_are_given_up_in_seconds() {
    let bench = Bench::new();
    // The port of an open connection: nobody listens there, and no other test is given it meanwhile.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connection = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let sentence = bench.refusal(&format!("http://{}", connection.local_addr().unwrap()));
    assert!(sentence.starts_with("cannot reach the hub at http://127.0.0.1"), "{sentence}");
    assert!(bench.refusal("ftp://127.0.0.1").starts_with("cannot reach the hub at ftp://127.0.0.1"));
    let sentence = bench.refusal(&TestHub::start(Manner::Silent).endpoint);
    assert!(sentence.contains("sent nothing for 2s"), "{sentence}");
    let sentence = bench.refusal(&TestHub::start(Manner::Missing).endpoint);
    assert!(sentence.contains("has no TinyStories-valid.txt"), "{sentence}");
    let sentence = bench.refusal(&TestHub::start(Manner::Private).endpoint);
    assert!(sentence.contains("refuses TinyStories-valid.txt") && sentence.contains("HF_TOKEN"), "{sentence}");
    let sentence = bench.refusal(&TestHub::start(Manner::Broken).endpoint);
    assert!(sentence.contains("did not deliver"), "{sentence}");
    for address in ["not an address", "huggingface.co", "https://"] {
        let sentence = bench.download(address).unwrap_err().to_string();
        assert!(sentence.contains(&format!("'{address}' is not an address")), "{sentence}");
    }
}

#[test]
fn progress_may_stop_the_download() {
    let (bench, hub) = (Bench::new(), TestHub::start(Manner::Honest));
    let hub = Hub { endpoint: Some(hub.endpoint), cache: Some(bench.cache()), ..Hub::default() };
    let stopped = download(&bench.output(), &hub, &mut |what, done, _| match (what, done) {
        ("tokenizing TinyStories-train.txt", _) => Err(Error::Interrupted("stop".into())),
        _ => Ok(()),
    });
    assert!(matches!(stopped, Err(Error::Interrupted(_))));
    let left: Vec<_> = fs::read_dir(bench.output()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["TinyStories_val.bin"]);
}

/// Names the folder with a disk of 1 MB to the child process of the next test.
const SMALL_DISK: &str = "BANDTRAIN_TEST_SMALL_DISK";

#[test]
fn a_full_disk_leaves_nothing_half_written() {
    let bench = Bench::new();
    let script = r#"mount -t tmpfs -o size=1m none "$0" && exec "$1" child_on_a_small_disk --exact --nocapture"#;
    let child = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script])
        .args([bench.0.path(), &std::env::current_exe().unwrap()])
        .env(SMALL_DISK, bench.0.path())
        .output();
    match child {
        Ok(child) if child.status.success() => {}
        // What the test harness exits with when a test fails.
        Ok(child) if child.status.code() == Some(101) => panic!("{}", String::from_utf8_lossy(&child.stderr)),
        other => skip::skip("small-disk", &format!("this system lets nobody mount a small disk to fill ({other:?})")),
    }
}

#[test]
fn child_on_a_small_disk() {
    let Some(small) = std::env::var_os(SMALL_DISK).map(PathBuf::from) else { return };
    let (elsewhere, hub) = (Bench::new(), TestHub::start(Manner::Honest));
    let assert_full = |result: Result<Vec<Source>>| {
        let sentence = result.unwrap_err().to_string();
        assert!(sentence.ends_with("; free some space or choose another disk"), "{sentence}");
    };
    assert_full(download_into(&small.join("output"), &elsewhere.cache(), &hub.endpoint));
    let left: Vec<_> = fs::read_dir(small.join("output")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["TinyStories_val.bin"]);
    assert_full(download_into(&elsewhere.output(), &small.join("cache"), &hub.endpoint));
    assert_eq!(fs::read_dir(elsewhere.output()).unwrap().count(), 0);
}
