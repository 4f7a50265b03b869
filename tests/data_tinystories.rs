//! The TinyStories download against a small server that plays the hub, honest and otherwise.

mod skip;

use bandtrain::data::tinystories::{Hub, Source, download};
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
#[derive(Debug, Clone, Copy, PartialEq)]
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
}

/// A hub on the loopback interface.
struct TestHub {
    endpoint: String,
    manner: Arc<Mutex<Manner>>,
    gets: Arc<AtomicUsize>,
}

impl TestHub {
    fn start(manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (manner, gets) = (Arc::new(Mutex::new(manner)), Arc::new(AtomicUsize::new(0)));
        let (shared_manner, shared_gets) = (manner.clone(), gets.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (manner, gets) = (*shared_manner.lock().unwrap(), shared_gets.clone());
                thread::spawn(move || serve(stream.unwrap(), manner, &gets));
            }
        });
        TestHub { endpoint, manner, gets }
    }

    fn becomes(&self, manner: Manner) {
        *self.manner.lock().unwrap() = manner;
    }
}

fn serve(mut stream: TcpStream, manner: Manner, gets: &AtomicUsize) {
    let Some(request) = read_request(&stream) else { return };
    let name = request.split(' ').nth(1).and_then(|path| path.rsplit('/').next()).unwrap_or_default();
    let text = contents(name);
    let is_get = request.starts_with("GET");
    gets.fetch_add(usize::from(is_get), Ordering::Relaxed);
    let _ = match (manner, is_get) {
        (Manner::Silent, _) => {
            thread::sleep(Duration::from_secs(5));
            Ok(())
        }
        (Manner::Missing, _) => {
            write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        }
        (Manner::Broken, false) => {
            write!(stream, "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        }
        _ => respond(&mut stream, &text, manner, is_get),
    };
}

fn read_request(stream: &TcpStream) -> Option<String> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next()?.ok()?;
    while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
    Some(request)
}

fn respond(stream: &mut TcpStream, text: &[u8], manner: Manner, is_get: bool) -> io::Result<()> {
    let etag = if manner == Manner::Unstated { format!("e83c5163-{}", text.len()) } else { sha256(text) };
    let mut body = text.to_vec();
    match manner {
        Manner::Corrupt => body[0] ^= 1,
        Manner::Short => body.truncate(text.len() - 10),
        _ => {}
    }
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nX-Repo-Commit: {}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}\r\nETag: \"{etag}\"\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        "0123456789".repeat(4),
        text.len(),
        body.len()
    )?;
    let sent = if manner == Manner::Cut { body.len() / 2 } else { body.len() };
    if is_get { stream.write_all(&body[..sent]) } else { Ok(()) }
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
    hub.becomes(Manner::Honest);
    bench.download(&hub.endpoint).unwrap();
}

#[test]
fn a_hub_that_states_no_checksum_is_reported() {
    let (bench, hub) = (Bench::new(), TestHub::start(Manner::Unstated));
    assert!(bench.download(&hub.endpoint).unwrap().iter().all(|source| !source.sha256_stated));
}

#[test]
fn hubs_that_do_not_answer_are_given_up_in_seconds() {
    let bench = Bench::new();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let sentence = bench.refusal(&format!("http://{closed}"));
    assert!(sentence.starts_with("cannot reach the hub at http://127.0.0.1"), "{sentence}");
    assert!(bench.refusal("ftp://127.0.0.1").starts_with("cannot reach the hub at ftp://127.0.0.1"));
    let sentence = bench.refusal(&TestHub::start(Manner::Silent).endpoint);
    assert!(sentence.contains("sent nothing for 2s"), "{sentence}");
    let sentence = bench.refusal(&TestHub::start(Manner::Missing).endpoint);
    assert!(sentence.contains("has no TinyStories-valid.txt"), "{sentence}");
    let sentence = bench.refusal(&TestHub::start(Manner::Broken).endpoint);
    assert!(sentence.contains("did not deliver"), "{sentence}");
    let sentence = bench.download("not an address").unwrap_err().to_string();
    assert!(sentence.contains("'not an address' is not an address"), "{sentence}");
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
