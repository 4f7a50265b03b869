//! Files that appear whole or not at all: a temporary file in the target's folder, synced, then renamed over the target.

use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::{NamedTempFile, TempPath};

/// Few, large writes: a checkpoint is hundreds of megabytes.
const BUFFER_BYTES: usize = 1 << 20;

/// A file being written. Dropping it removes it and leaves an older file of its name untouched.
pub struct AtomicFile {
    path: PathBuf,
    // Before the path, so that the file is closed when its temporary name is removed.
    writer: BufWriter<File>,
    temporary: TempPath,
}

/// A file written and synced that still waits under its temporary name. Dropping it removes it.
#[must_use = "the file gets its name only when it is published"]
pub struct SealedFile {
    path: PathBuf,
    temporary: TempPath,
}

impl AtomicFile {
    /// Starts the file that will appear at `path`; a symbolic link there is followed, not replaced.
    ///
    /// # Errors
    /// [`Error::File`] when `path` is something other than a regular file (renaming would replace a folder or a
    /// device), [`Error::Io`] when its folder refuses new files.
    pub fn create(path: &Path) -> Result<Self> {
        if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(Error::file(path, "is a folder or a device; name a file to write"));
        }
        let target = match path.is_symlink() {
            true => fs::canonicalize(path).map_err(Error::io("follow the link", path))?,
            false => path.to_path_buf(),
        };
        let (file, temporary) = temporary_beside(&target).map_err(Error::io("create", path))?.into_parts();
        Ok(Self { path: target, writer: BufWriter::with_capacity(BUFFER_BYTES, file), temporary })
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among others.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(Error::io("write", &self.path))
    }

    /// Overwrites the start of the file: a header whose contents are known only at the end.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_start(&mut self, bytes: &[u8]) -> Result<()> {
        let writer = &mut self.writer;
        writer.seek(SeekFrom::Start(0)).and_then(|_| writer.write_all(bytes)).map_err(Error::io("write", &self.path))
    }

    /// Brings everything to the disk and closes the file.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among others.
    pub fn seal(mut self) -> Result<SealedFile> {
        let synced = self.writer.flush().and_then(|()| self.writer.get_ref().sync_all());
        synced.map_err(Error::io("write", &self.path))?;
        Ok(SealedFile { path: self.path, temporary: self.temporary })
    }
}

impl SealedFile {
    /// Where the file will appear.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the file its name, replacing an older one in a single step.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder refuses.
    pub fn publish(self) -> Result<()> {
        self.temporary.persist(&self.path).map_err(|failed| failed.error).map_err(Error::io("rename", &self.path))?;
        sync_folder(folder_of(&self.path)).map_err(Error::io("sync the folder of", &self.path))
    }
}

/// The folder that holds `path`.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Gives the whole file `from` the second name `to`, replacing an older file of that name: a link, which costs nothing, or a
/// copy where the file system knows no links. `from` stays as it is all the while.
///
/// # Errors
/// [`Error::Io`], a full disk among others.
pub fn second_name(from: &Path, to: &Path) -> Result<()> {
    // A link to a symbolic link would be one, and change with it.
    let source = fs::canonicalize(from).map_err(Error::io("open", from))?;
    match fs::remove_file(to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io("replace", to)(error)),
        _ => {}
    }
    match fs::hard_link(&source, to) {
        Ok(()) => sync_folder(folder_of(to)).map_err(Error::io("sync the folder of", to)),
        Err(_) => copy(&source, to),
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut source = File::open(from).map_err(Error::io("open", from))?;
    let mut file = AtomicFile::create(to)?;
    io::copy(&mut source, &mut file.writer).map_err(Error::io("write", to))?;
    file.seal()?.publish()
}

/// An empty temporary file with the permissions of an ordinary new file (tempfile's own would hide it from others).
fn temporary_beside(target: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".bandtrain-").suffix(".tmp");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder_of(target))
}

/// On Unix a rename lasts once the folder that holds the names is synced; some network file systems cannot do that.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if !cfg!(unix) {
        return Ok(());
    }
    match File::open(folder)?.sync_all() {
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_published_leaves_no_trace() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.bin");
        fs::write(&path, "old").unwrap();
        let mut unfinished = AtomicFile::create(&path).unwrap();
        unfinished.append(b"half").unwrap();
        drop(unfinished);
        drop(AtomicFile::create(&path).unwrap().seal().unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_start_written_last_stands_first() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.bin");
        let mut file = AtomicFile::create(&path).unwrap();
        file.append(b"____body").unwrap();
        file.write_start(b"head").unwrap();
        file.seal().unwrap().publish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"headbody");
    }

    #[test]
    fn publishing_replaces_the_older_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.bin");
        fs::write(&path, "something older and longer").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.append(b"new").unwrap();
        file.seal().unwrap().publish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn a_second_name_outlives_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let [first, second, third] = ["a", "b", "c"].map(|name| folder.path().join(name));
        fs::write(&first, "one").unwrap();
        fs::write(&second, "stale").unwrap();
        second_name(&first, &second).unwrap();
        copy(&first, &third).unwrap();
        let mut file = AtomicFile::create(&first).unwrap();
        file.append(b"two").unwrap();
        file.seal().unwrap().publish().unwrap();
        let contents = [first, second, third].map(|path| fs::read_to_string(path).unwrap());
        assert_eq!(contents, ["two", "one", "one"]);
    }

    #[test]
    fn folders_and_devices_are_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let error = AtomicFile::create(folder.path()).err().unwrap().to_string();
        assert!(error.ends_with("is a folder or a device; name a file to write"), "{error}");
        #[cfg(unix)]
        assert!(AtomicFile::create(Path::new("/dev/null")).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_permissions_are_ordinary() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let (target, link, plain) = (folder.path().join("a"), folder.path().join("b"), folder.path().join("c"));
        fs::write(&target, "old").unwrap();
        fs::write(&plain, "").unwrap();
        symlink(&target, &link).unwrap();
        let mut file = AtomicFile::create(&link).unwrap();
        file.append(b"new").unwrap();
        file.seal().unwrap().publish().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert!(link.is_symlink());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&target), mode(&plain));
    }
}
