//! Files that appear whole or not at all: written under a temporary name in the same folder, synced, then renamed.

use crate::error::{Error, Result};
use std::fs;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::{NamedTempFile, TempPath};

/// A file being written. Dropping it removes what was written and leaves any older file at `path` as it was.
pub(crate) struct AtomicFile {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
}

/// A complete, synced, closed file that waits under its temporary name. Dropping it removes it.
pub(crate) struct SealedFile {
    path: PathBuf,
    temporary: TempPath,
}

impl AtomicFile {
    /// Starts a file that will appear at `path`.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        if fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
            return Err(Error::file(path, "exists and is not a regular file; name another output"));
        }
        let file = temporary_beside(path).map_err(Error::io("create", path))?;
        Ok(AtomicFile { path: path.to_path_buf(), file: BufWriter::with_capacity(1 << 20, file) })
    }

    /// Appends `bytes`.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io("write", &self.path))
    }

    /// Overwrites the start of the file: a header whose contents are known only at the end.
    pub(crate) fn write_start(&mut self, bytes: &[u8]) -> Result<()> {
        let file = &mut self.file;
        file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(bytes)).map_err(Error::io("write", &self.path))
    }

    /// Puts everything on the disk and closes the file, still under its temporary name.
    pub(crate) fn seal(mut self) -> Result<SealedFile> {
        let synced = self.file.flush().and_then(|()| self.file.get_ref().as_file().sync_all());
        synced.map_err(Error::io("write", &self.path))?;
        let (file, _) = self.file.into_parts();
        Ok(SealedFile { path: self.path, temporary: file.into_temp_path() })
    }
}

impl SealedFile {
    /// Where the file will appear.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the file its name, replacing an older one.
    pub(crate) fn publish(self) -> Result<()> {
        let SealedFile { path, temporary } = self;
        temporary.persist(&path).map_err(|failed| failed.error).map_err(Error::io("rename into place", &path))?;
        sync_folder(folder_of(&path)).map_err(Error::io("sync the folder of", &path))
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// A temporary file with the permissions that an ordinary new file gets.
fn temporary_beside(path: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".bandtrain-").suffix(".tmp");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder_of(path))
}

/// Makes a rename last: on Unix the folder holds the names and has to be synced itself.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { fs::File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unfinished_file_leaves_nothing_and_keeps_the_older_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.bin");
        fs::write(&path, "old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.append(b"new").unwrap();
        drop(file);
        drop(AtomicFile::create(&path).unwrap().seal().unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_published_file_holds_its_patched_start() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.bin");
        let mut file = AtomicFile::create(&path).unwrap();
        file.append(b"____body").unwrap();
        file.write_start(b"head").unwrap();
        file.seal().unwrap().publish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"headbody");
    }

    #[test]
    fn a_folder_is_no_output() {
        let folder = tempfile::tempdir().unwrap();
        assert!(AtomicFile::create(folder.path()).is_err());
    }
}
