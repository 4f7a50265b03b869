//! Patterns on the command line and the files they mean.

use crate::error::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// What a folder given as input contributes.
const TEXT_EXTENSIONS: [&str; 4] = ["txt", "json", "jsonl", "ndjson"];

/// The files that a path or a glob names, sorted. A path that exists is taken literally even if it holds `*`, `?` or `[`.
///
/// # Errors
/// [`Error::File`] when nothing matches, [`Error::Usage`] for a malformed glob, [`Error::Io`] for an unreadable folder.
pub(crate) fn matching_files(pattern: &str) -> Result<Vec<PathBuf>> {
    if Path::new(pattern).exists() {
        return Ok(vec![PathBuf::from(pattern)]);
    }
    let matches = glob::glob(pattern).map_err(|error| {
        Error::usage(format!("'{pattern}' is not a valid glob: {} at character {}; mend it", error.msg, error.pos + 1))
    })?;
    let mut files = Vec::new();
    for entry in matches {
        files.push(entry.map_err(|error| {
            let path = error.path().to_path_buf();
            Error::io("read", path)(error.into())
        })?);
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::file(pattern, "no such file, and no file matches it as a glob; check the path"));
    }
    Ok(files)
}

/// The text files (.txt, .json, .jsonl, .ndjson) that paths, folders and globs name, in the order given; the files of one folder or glob are sorted.
///
/// # Errors
/// [`Error::File`] when nothing matches or a folder holds no text, [`Error::Usage`] for a malformed glob, [`Error::Io`] for an
/// unreadable folder.
pub fn text_files(patterns: &[String]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for pattern in patterns {
        for path in matching_files(pattern)? {
            if path.is_dir() {
                files.extend(text_files_of_folder(&path)?);
            } else {
                files.push(path);
            }
        }
    }
    Ok(files)
}

fn text_files_of_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        if path.is_file() && has_extension(&path, &TEXT_EXTENSIONS) {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        let what = format!("holds no file ending in .{}; name the files", TEXT_EXTENSIONS.join(", ."));
        return Err(Error::file(folder, what));
    }
    Ok(files)
}

/// Whether two paths are one, or lead to one file.
pub(crate) fn same_file(one: &Path, other: &Path) -> bool {
    one == other || matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

/// Whether `path` ends in one of `extensions`, in any case.
pub(crate) fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let extension = path.extension().unwrap_or_default();
    extensions.iter().any(|known| extension.eq_ignore_ascii_case(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_are_sorted_and_literal_names_win() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.bin", "a.bin", "[x].bin", "c.txt"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let named = |pattern: &str| matching_files(&folder.path().join(pattern).display().to_string()).unwrap();
        let names = |paths: Vec<PathBuf>| -> Vec<String> {
            paths.iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
        };
        assert_eq!(names(named("*.bin")), ["[x].bin", "a.bin", "b.bin"]);
        assert_eq!(names(named("[x].bin")), ["[x].bin"]);
        assert_eq!(names(text_files(&[folder.path().display().to_string()]).unwrap()), ["c.txt"]);
    }

    #[test]
    fn nothing_found_and_bad_globs_are_errors() {
        assert!(matching_files("no/such/*.bin").unwrap_err().to_string().contains("no file matches"));
        assert!(matching_files("a[").unwrap_err().to_string().contains("not a valid glob"));
        let empty = tempfile::tempdir().unwrap();
        assert!(text_files(&[empty.path().display().to_string()]).is_err());
    }
}
