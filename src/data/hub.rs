//! Files of a dataset on the Hugging Face hub, fetched into the hub's cache, laid out there as its other programs do.
//!
//! `https://HUB/datasets/NAME/resolve/main/FILE` is answered, for large files by a redirect to where they lie, with the
//! headers `X-Linked-Etag` (their SHA-256), `X-Linked-Size` and `X-Repo-Commit`. In the cache a file is `blobs/ETAG`, and
//! `snapshots/COMMIT/FILE` is a link to it.

use crate::atomic::{AtomicFile, second_name};
use crate::error::{Error, Result};
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode, Uri, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::typestate::WithoutBody;
use ureq::{Agent, Body, RequestBuilder};

const HUB: &str = "https://huggingface.co";
/// Further attempts after a request that failed for a passing reason, and the wait before the first of them (it doubles).
const RETRIES: u32 = 2;
const RETRY_DELAY: Duration = Duration::from_millis(200);
/// Redirects within the hub: renamed datasets.
const MAX_REDIRECTS: usize = 5;

/// Which hub to ask and where to keep what it sends.
#[derive(Debug, Clone)]
pub struct Hub {
    /// The hub's address; None means the environment's `HF_ENDPOINT`, else <https://huggingface.co>.
    pub endpoint: Option<String>,
    /// The folder of downloads; None means the hub's usual cache (`HF_HUB_CACHE`, `HF_HOME`), shared with other programs.
    pub cache: Option<PathBuf>,
    /// How long the hub may send nothing before the download is given up.
    pub patience: Duration,
}

impl Default for Hub {
    fn default() -> Self {
        Hub { endpoint: None, cache: None, patience: Duration::from_secs(60) }
    }
}

/// A file in the cache, its contents not checked yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Where it lies, under its own name.
    pub path: PathBuf,
    /// What that is a link to.
    pub blob: PathBuf,
    /// The size in bytes that the hub states, if it does.
    pub size: Option<u64>,
    /// The SHA-256 that the hub states, in lower-case hexadecimal, if it does: it does of large files.
    pub sha256: Option<String>,
}

/// A dataset on a hub, and where its files are kept.
pub struct Dataset {
    agent: Agent,
    endpoint: String,
    /// Its name: "owner/dataset".
    name: &'static str,
    /// The cache's folder for it.
    folder: PathBuf,
    token: Option<String>,
    patience: Duration,
}

/// What the hub says of a file before it sends it.
struct Stated {
    etag: String,
    size: Option<u64>,
    commit: Option<String>,
}

/// Why a request or a transfer failed.
enum Failure {
    /// The connection, or what came through it.
    Request(ureq::Error),
    /// The hub said no.
    Status(StatusCode),
    /// The answer lacks something.
    Answer(&'static str),
    /// The connection ended in the middle of a file.
    Cut { error: io::Error, bytes: u64, size: Option<u64> },
    /// Not the network's fault.
    Local(Error),
}

impl From<ureq::Error> for Failure {
    fn from(error: ureq::Error) -> Self {
        Failure::Request(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Local(error)
    }
}

impl Failure {
    /// Whether the next attempt may go better.
    fn may_pass(&self) -> bool {
        match self {
            Failure::Request(ureq::Error::BadUri(_) | ureq::Error::Timeout(_)) => false,
            Failure::Request(_) => true,
            Failure::Status(status) => status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS,
            _ => false,
        }
    }

    /// Whether the hub could not be asked at all, so that what the cache has must do.
    fn is_absence(&self) -> bool {
        matches!(self, Failure::Request(_)) || self.may_pass()
    }
}

impl Dataset {
    /// The dataset `name` ("owner/dataset") on `hub`. Asks nothing yet.
    ///
    /// # Errors
    /// An address that is none; a cache whose place the environment does not tell.
    pub fn new(hub: &Hub, name: &'static str) -> Result<Self> {
        let endpoint = hub.endpoint.clone().or_else(|| variable("HF_ENDPOINT")).unwrap_or_else(|| HUB.to_string());
        let bad = |why: &str| {
            Error::usage(format!("HF_ENDPOINT '{endpoint}' is not an address ({why}); set one like {HUB} or unset it"))
        };
        let address: Uri = endpoint.parse().map_err(|error| bad(&format!("{error}")))?;
        if address.scheme().is_none() || address.host().is_none() {
            return Err(bad("it does not begin with https://"));
        }
        let cache = hub.cache.clone().or_else(cache_of_user).ok_or_else(|| {
            Error::usage("there is no home folder to keep downloads in; name a folder in HF_HUB_CACHE")
        })?;
        let agent = Agent::config_builder()
            .user_agent(concat!("bandtrain/", env!("CARGO_PKG_VERSION")))
            // As on the rest of the machine: certificates of a company's own included.
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_resolve(Some(hub.patience))
            .timeout_connect(Some(hub.patience))
            .timeout_per_read(Some(hub.patience))
            .timeout_per_write(Some(hub.patience))
            .build()
            .new_agent();
        let folder = cache.join(format!("datasets--{}", name.replace('/', "--")));
        let endpoint = endpoint.trim_end_matches('/').to_string();
        Ok(Self { agent, endpoint, name, folder, token: token(), patience: hub.patience })
    }

    /// Fetches a file into the cache, unless the newest version is there, and tells `progress` how many bytes of how many
    /// have come (0 when not known). An attempt that is cut is gone on with by the next. A hub that cannot be reached is
    /// made up for by what the cache has.
    ///
    /// # Errors
    /// [`Error::Network`] when the hub cannot be reached, refuses, or falls silent; [`Error::Io`] when the disk refuses;
    /// whatever `progress` returns.
    pub fn fetch(&self, file: &str, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<Fetched> {
        progress(0, 0)?;
        let result = self.stated(file).and_then(|stated| {
            let blob = self.folder.join("blobs").join(&stated.etag);
            if !blob.is_file() {
                self.transfer(file, &blob, stated.size, progress)?;
            }
            let path = self.named(file, &blob, &stated)?;
            Ok(Fetched { path, size: stated.size, sha256: sha256_of(&stated.etag), blob })
        });
        result.or_else(|failure| match self.cached(file).filter(|_| failure.is_absence()) {
            Some(fetched) => Ok(fetched),
            None => Err(self.explain(file, failure)),
        })
    }

    fn url(&self, file: &str) -> String {
        format!("{}/datasets/{}/resolve/main/{file}", self.endpoint, self.name)
    }

    /// Asks what the hub has, without leaving it for where the file lies.
    fn stated(&self, file: &str) -> std::result::Result<Stated, Failure> {
        let mut url = self.url(file);
        for _ in 0..MAX_REDIRECTS {
            let response = self.with_retries(|| {
                let request = self.signed(self.agent.head(&url));
                request.config().max_redirects(0).max_redirects_will_error(false).build().call()
            })?;
            let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
            let within = text("location").filter(|to| to.starts_with('/') && !to.starts_with("//"));
            if let Some(to) = within.filter(|_| response.status().is_redirection()) {
                url = format!("{}{to}", origin(&url));
                continue;
            }
            let size = text("x-linked-size").or(text("content-length").filter(|_| response.status().is_success()));
            let etag =
                text("x-linked-etag").or(text("etag")).map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
            return Ok(Stated {
                etag: etag.map(as_name).filter(|etag| is_name(etag)).ok_or(Failure::Answer("it states no version"))?,
                size: size.and_then(|size| size.parse().ok()),
                commit: text("x-repo-commit").filter(|commit| is_name(commit)).map(String::from),
            });
        }
        Err(ureq::Error::TooManyRedirects.into())
    }

    /// Calls until something other than a passing failure comes of it.
    fn with_retries(
        &self,
        mut call: impl FnMut() -> std::result::Result<Response<Body>, ureq::Error>,
    ) -> std::result::Result<Response<Body>, Failure> {
        let (mut wait, mut left) = (RETRY_DELAY, RETRIES);
        loop {
            let failure = match call() {
                Ok(response) if response.status().is_success() || response.status().is_redirection() => {
                    return Ok(response);
                }
                Ok(response) => Failure::Status(response.status()),
                Err(error) => Failure::Request(error),
            };
            if left == 0 || !failure.may_pass() {
                return Err(failure);
            }
            thread::sleep(wait);
            (wait, left) = (2 * wait, left - 1);
        }
    }

    /// Brings a file to `blob`, which appears when it is whole. What came of it in an attempt that was cut stays.
    fn transfer(
        &self,
        file: &str,
        blob: &Path,
        size: Option<u64>,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> std::result::Result<(), Failure> {
        let disk = |error| self.disk(error);
        fs::create_dir_all(self.folder.join("blobs")).map_err(disk)?;
        let part = blob.with_extension("bandtrain-part");
        let mut out = File::options().create(true).append(true).open(&part).map_err(disk)?;
        match out.try_lock() {
            Err(TryLockError::WouldBlock) => {
                let what = format!("another program is fetching {file} into {}; wait for it", self.folder.display());
                return Err(Error::usage(what).into());
            }
            // Where files cannot be locked, the checksum finds what two writers did.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        let here = out.metadata().map_err(disk)?.len();
        if here == 0 || size != Some(here) {
            let here = if size.is_some_and(|size| here < size) { here } else { 0 };
            self.receive(file, &mut out, here, size, progress)?;
        }
        out.sync_all().map_err(disk)?;
        drop(out);
        fs::rename(&part, blob).map_err(disk)
    }

    /// Writes to `out` what the hub sends of a file after the first `here` bytes, which stand there.
    fn receive(
        &self,
        file: &str,
        out: &mut File,
        here: u64,
        size: Option<u64>,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> std::result::Result<(), Failure> {
        let response = self.with_retries(|| {
            let request = self.signed(self.agent.get(self.url(file)));
            if here == 0 { request } else { request.header(header::RANGE, format!("bytes={here}-")) }.call()
        })?;
        // A hub that knows no ranges sends everything.
        let mut bytes = if response.status() == StatusCode::PARTIAL_CONTENT { here } else { 0 };
        out.set_len(bytes).map_err(|error| self.disk(error))?;
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 1 << 16];
        loop {
            progress(bytes, size.unwrap_or(0))?;
            let came = body.read(&mut buffer).map_err(|error| Failure::Cut { error, bytes, size })?;
            if came == 0 {
                return Ok(());
            }
            out.write_all(&buffer[..came]).map_err(|error| self.disk(error))?;
            bytes += came as u64;
        }
    }

    /// A request with the user's token, if there is one.
    fn signed(&self, request: RequestBuilder<WithoutBody>) -> RequestBuilder<WithoutBody> {
        match &self.token {
            Some(token) => request.header(header::AUTHORIZATION, format!("Bearer {token}")),
            None => request,
        }
    }

    fn disk(&self, error: io::Error) -> Failure {
        Failure::Local(Error::io("write the download into", &self.folder)(error))
    }

    /// Gives the file in the cache its own name, and the branch the commit it stands at.
    fn named(&self, file: &str, blob: &Path, stated: &Stated) -> Result<PathBuf> {
        // A mirror may not know of commits.
        let commit = stated.commit.as_deref().unwrap_or("main");
        let (snapshot, refs) = (self.folder.join("snapshots").join(commit), self.folder.join("refs"));
        for folder in [&snapshot, &refs] {
            fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        }
        let path = snapshot.join(file);
        if !path.canonicalize().is_ok_and(|target| blob.canonicalize().is_ok_and(|blob| blob == target)) {
            link(blob, &path)?;
        }
        let mut branch = AtomicFile::create(&refs.join("main"))?;
        branch.append(commit.as_bytes())?;
        branch.seal()?.publish()?;
        Ok(path)
    }

    /// What the cache has of a file, from an earlier run or another program.
    fn cached(&self, file: &str) -> Option<Fetched> {
        let commit = fs::read_to_string(self.folder.join("refs/main")).ok()?;
        let path = self.folder.join("snapshots").join(Some(commit.trim()).filter(|commit| is_name(commit))?).join(file);
        let blob = path.canonicalize().ok().filter(|blob| blob.is_file())?;
        let sha256 = sha256_of(&blob.file_name()?.to_string_lossy());
        Some(Fetched { path, blob, size: None, sha256 })
    }

    /// The sentence for what ended a download.
    fn explain(&self, file: &str, failure: Failure) -> Error {
        let Self { endpoint, name, patience, .. } = self;
        let silent = || {
            format!(
                "the hub at {endpoint} sent nothing for {patience:.0?} while {file} was fetched; check the network and run again"
            )
        };
        Error::Network(match failure {
            Failure::Local(error) => return error,
            Failure::Request(ureq::Error::Timeout(_)) => silent(),
            Failure::Cut { error, .. } if is_timeout(&error) => silent(),
            Failure::Cut { error, bytes, size } => {
                let size = size.map(|size| format!(" of {size}")).unwrap_or_default();
                format!(
                    "the connection to the hub at {endpoint} was cut after {bytes}{size} bytes of {file} ({error}); run again"
                )
            }
            Failure::Request(error) => {
                format!("cannot reach the hub at {endpoint} ({error}); check the network or HF_ENDPOINT and run again")
            }
            Failure::Status(StatusCode::NOT_FOUND) => {
                format!("the hub at {endpoint} has no {file} in the dataset {name}; check HF_ENDPOINT")
            }
            Failure::Status(status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)) => {
                format!("the hub at {endpoint} refuses {file} ({status}); check HF_TOKEN or unset it")
            }
            Failure::Status(status) => {
                format!("the hub at {endpoint} did not deliver {file} ({status}); try again later")
            }
            Failure::Answer(lack) => {
                format!("the hub at {endpoint} did not deliver {file} ({lack}); check HF_ENDPOINT")
            }
        })
    }
}

/// An environment variable that says something.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The hub's own folder of the user.
fn home_of_user() -> Option<PathBuf> {
    let home = || variable("HOME").or_else(|| variable("USERPROFILE")).map(|home| PathBuf::from(home).join(".cache"));
    variable("HF_HOME")
        .map(PathBuf::from)
        .or_else(|| variable("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).map(|cache| cache.join("huggingface")))
}

fn cache_of_user() -> Option<PathBuf> {
    variable("HF_HUB_CACHE").map(PathBuf::from).or_else(|| home_of_user().map(|home| home.join("hub")))
}

/// Who asks, where the user has said so.
fn token() -> Option<String> {
    if variable("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some() {
        return None;
    }
    variable("HF_TOKEN").or_else(|| {
        let file =
            variable("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| home_of_user().map(|home| home.join("token")))?;
        fs::read_to_string(file).ok().map(|token| token.trim().to_string()).filter(|token| !token.is_empty())
    })
}

/// Scheme and host of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |scheme| scheme + 3);
    url[host..].find('/').map_or(url, |path| &url[..host + path])
}

/// A word of the hub's with which a file can be named.
fn as_name(word: &str) -> String {
    word.chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' }).collect()
}

/// Whether a hub's word may name a file in the cache, and nothing outside it.
fn is_name(word: &str) -> bool {
    (1..=128).contains(&word.len()) && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// The SHA-256 that an etag is, if it is one.
fn sha256_of(etag: &str) -> Option<String> {
    (etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| etag.to_ascii_lowercase())
}

fn is_timeout(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<ureq::Error>());
    error.kind() == io::ErrorKind::TimedOut || matches!(inner, Some(ureq::Error::Timeout(_)))
}

/// A link to a file of the cache, relative, so that the cache may be moved; where there are no links, its second name.
fn link(blob: &Path, path: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        let target = Path::new("../../blobs").join(blob.file_name().unwrap_or_default());
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io("replace", path)(error)),
            _ => {}
        }
        if std::os::unix::fs::symlink(target, path).is_ok() {
            return Ok(());
        }
    }
    second_name(blob, path)
}
