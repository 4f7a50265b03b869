//! Where compiled kernels are kept between runs: files that any run may write, read and delete, each with its own checksum,
//! so that a damaged or foreign one counts as absent.

use crate::atomic::AtomicFile;
use sha2::{Digest, Sha256};
use std::path::PathBuf;

/// Bytes of the checksum that a cached file begins with.
const DIGEST: usize = 32;

/// The folder of kept files; without one nothing is kept.
#[derive(Debug, Clone)]
pub struct Cache(Option<PathBuf>);

impl Cache {
    /// The folder named by `BANDTRAIN_CACHE`, else a part of the user's cache folder; none when the environment names neither.
    pub fn of_user() -> Self {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(folder) = variable("BANDTRAIN_CACHE") {
            return Self(Some(folder));
        }
        let base = if cfg!(windows) {
            variable("LOCALAPPDATA")
        } else if cfg!(target_os = "macos") {
            variable("HOME").map(|home| home.join("Library/Caches"))
        } else {
            variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")))
        };
        Self(base.map(|base| base.join("bandtrain")))
    }

    /// This folder.
    pub fn at(folder: PathBuf) -> Self {
        Self(Some(folder))
    }

    /// What was kept under this name, if it is there and whole.
    pub fn read(&self, name: &str) -> Option<Vec<u8>> {
        let mut bytes = std::fs::read(self.0.as_ref()?.join(name)).ok()?;
        let contents = bytes.get(DIGEST..)?;
        let whole = Sha256::digest(contents).as_slice() == &bytes[..DIGEST];
        whole.then(|| bytes.split_off(DIGEST))
    }

    /// Keeps `contents` under this name. Whether that works is of no consequence: without a cache, work is done again.
    pub fn write(&self, name: &str, contents: &[u8]) {
        let Some(folder) = &self.0 else { return };
        let keep = || {
            std::fs::create_dir_all(folder).map_err(crate::Error::io("create", folder))?;
            let mut file = AtomicFile::create(&folder.join(name))?;
            file.append(Sha256::digest(contents).as_slice())?;
            file.append(contents)?;
            file.seal()?.publish()
        };
        let _: crate::Result<()> = keep();
    }
}

/// The name of what `parts` decide.
pub fn key(parts: &[&[u8]]) -> String {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
