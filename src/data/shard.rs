//! llm.c's token files: a header of 256 little-endian int32 (20240520, 1, number of tokens, zeros), then one uint16 per
//! token.

use crate::atomic::{AtomicFile, SealedFile};
use crate::error::{Error, Result};
use memmap2::Mmap;
use rayon::prelude::*;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

#[cfg(target_endian = "big")]
compile_error!("token files are little-endian and mapped as they are");

const MAGIC: i32 = 20240520;
const VERSION: i32 = 1;
const HEADER_BYTES: usize = 1024;
/// The most tokens one file can count: its header holds an int32.
pub const MAX_TOKENS: usize = i32::MAX as usize;
/// Tokens checked by one task: large enough to outweigh the task, small enough to share.
const CHECK_CHUNK: usize = 1 << 20;

/// Writes one token file, which appears at its path only when it is complete.
pub struct TokenWriter {
    file: AtomicFile,
    path: PathBuf,
    count: usize,
}

impl TokenWriter {
    /// Starts a token file that will appear at `path`.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be written, [`Error::File`] when `path` is a folder or a device.
    pub fn create(path: &Path) -> Result<Self> {
        let mut file = AtomicFile::create(path)?;
        file.append(&[0; HEADER_BYTES])?;
        Ok(TokenWriter { file, path: path.to_path_buf(), count: 0 })
    }

    /// Appends tokens.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses, [`Error::File`] beyond [`MAX_TOKENS`].
    pub fn write(&mut self, tokens: &[u16]) -> Result<()> {
        if tokens.len() > MAX_TOKENS - self.count {
            let what = format!("would hold more than {MAX_TOKENS} tokens, the format's most; use --shard-tokens");
            return Err(Error::file(&self.path, what));
        }
        self.count += tokens.len();
        self.file.append(bytemuck::cast_slice(tokens))
    }

    /// Tokens written so far.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Completes the file and gives it its name. Returns the number of tokens.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses; nothing is left then.
    pub fn finish(self) -> Result<usize> {
        let count = self.count;
        self.seal()?.publish()?;
        Ok(count)
    }

    /// Completes the file under its temporary name, so that several can appear together.
    pub(crate) fn seal(mut self) -> Result<SealedFile> {
        let mut header = [0i32; 3];
        header.copy_from_slice(&[MAGIC, VERSION, self.count as i32]);
        self.file.write_start(bytemuck::cast_slice(&header))?;
        self.file.seal()
    }
}

/// A token file mapped into memory, checked once when it is opened.
#[derive(Debug)]
pub struct TokenFile {
    map: Mmap,
}

impl TokenFile {
    /// Opens and checks the file at `path`: header, exact size, and every token below `vocab_size`. Reads the whole file
    /// once and allocates nothing that depends on its contents.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::File`] saying what is wrong with it and what to do.
    pub fn open(path: &Path, vocab_size: usize) -> Result<Self> {
        let map = map_file(path)?;
        check_header(&map).map_err(|what| Error::file(path, what))?;
        let file = TokenFile { map };
        check_vocabulary(file.tokens(), vocab_size).map_err(|what| Error::file(path, what))?;
        Ok(file)
    }

    /// The tokens.
    pub fn tokens(&self) -> &[u16] {
        // The body starts 1024 bytes into a page and its length is even (checked by `check_header`).
        bytemuck::cast_slice(&self.map[HEADER_BYTES..])
    }
}

fn map_file(path: &Path) -> Result<Mmap> {
    // Asked before opening: opening a pipe would wait for a writer.
    let metadata = fs::metadata(path).map_err(Error::io("open", path))?;
    if !metadata.is_file() {
        return Err(Error::file(path, "is not a regular file; name a token file (.bin)"));
    }
    if metadata.len() < HEADER_BYTES as u64 {
        let what = format!(
            "has {} bytes, fewer than the {HEADER_BYTES} of a token file's header; make it again with `bandtrain tokenize`",
            metadata.len()
        );
        return Err(Error::file(path, what));
    }
    let file = File::open(path).map_err(Error::io("open", path))?;
    // SAFETY: the map is read-only and only ever read as plain integers, so no contents can break an invariant. The file
    // must not be cut short while it is mapped; this program never does that, as it replaces files by renaming.
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file) };
    map.map_err(Error::io("map", path))
}

/// The header's int32 at `index`.
fn header_field(bytes: &[u8], index: usize) -> i32 {
    bytemuck::pod_read_unaligned(&bytes[4 * index..4 * index + 4])
}

fn check_header(bytes: &[u8]) -> std::result::Result<(), String> {
    if bytes.len() < HEADER_BYTES {
        return Err("became shorter while it was opened; try again".into());
    }
    let (magic, version, count) = (header_field(bytes, 0), header_field(bytes, 1), header_field(bytes, 2));
    if magic != MAGIC {
        return Err(format!(
            "is not a token file: {}; {}",
            describe_magic(bytes, magic),
            "make one with `bandtrain tokenize`"
        ));
    }
    if version != VERSION {
        return Err(format!(
            "is a token file of version {version}, but only version {VERSION} (16-bit tokens) can be read; \
             make it again with `bandtrain tokenize`"
        ));
    }
    let Ok(count) = u64::try_from(count) else {
        return Err(format!("claims {count} tokens, a negative number; make it again with `bandtrain tokenize`"));
    };
    let (expected, actual) = (HEADER_BYTES as u64 + 2 * count, bytes.len() as u64);
    if actual != expected {
        let how = if actual < expected { "truncated" } else { "longer than it says" };
        return Err(format!(
            "is {how}: its header counts {count} tokens, which take {expected} bytes, but it has {actual} bytes; \
             copy it again or make it again with `bandtrain tokenize`"
        ));
    }
    Ok(())
}

/// What a file with another magic number probably is.
fn describe_magic(bytes: &[u8], magic: i32) -> String {
    match magic {
        20240326 => "it is an llm.c model (pass it with --init)".into(),
        20240522 => "it is an llm.c multiple-choice evaluation file".into(),
        20240328 => "it is an llm.c tokenizer".into(),
        20240801 => "it is an llm.c token file for Llama 3, whose tokens have 32 bits".into(),
        _ if magic.swap_bytes() == MAGIC => "it is a token file in big-endian byte order".into(),
        _ if bytes.starts_with(b"MMIDIDX") => "it is a Megatron or GPT-NeoX index".into(),
        _ if bytes[8] == b'{' => "it looks like safetensors".into(),
        _ if bytes[..HEADER_BYTES].iter().all(|&byte| byte.is_ascii() && byte != 0) => "it looks like text".into(),
        _ => format!(
            "it starts with {magic} and not with {MAGIC} (raw 16-bit tokens without a header, as older tools and nanoGPT \
             write them, look like this)"
        ),
    }
}

fn check_vocabulary(tokens: &[u16], vocab_size: usize) -> std::result::Result<(), String> {
    let outside = |token: &u16| usize::from(*token) >= vocab_size;
    // The largest of a chunk is found many tokens at a time; only a bad chunk is searched for the position.
    let bad = tokens.par_chunks(CHECK_CHUNK).position_first(|chunk| chunk.iter().max().is_some_and(outside));
    let Some(chunk) = bad else { return Ok(()) };
    let start = chunk * CHECK_CHUNK;
    let position = start + tokens[start..].iter().position(outside).unwrap_or(0);
    Err(format!(
        "token {} at position {position} is outside the model's vocabulary of {vocab_size} tokens; \
         use a token file made with the model's tokenizer",
        tokens[position]
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file_bytes(tokens: &[u16]) -> Vec<u8> {
        let mut header = [0i32; 256];
        header[..3].copy_from_slice(&[MAGIC, VERSION, tokens.len() as i32]);
        [bytemuck::cast_slice(&header), bytemuck::cast_slice(tokens)].concat()
    }

    fn open(bytes: &[u8], vocab_size: usize) -> Result<Vec<u16>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.bin");
        fs::write(&path, bytes).unwrap();
        TokenFile::open(&path, vocab_size).map(|file| file.tokens().to_vec())
    }

    fn refusal(bytes: &[u8]) -> String {
        open(bytes, 100).unwrap_err().to_string()
    }

    fn patched(index: usize, value: i32) -> Vec<u8> {
        let mut bytes = file_bytes(&[1, 2, 3]);
        bytes[4 * index..4 * index + 4].copy_from_slice(&value.to_le_bytes());
        bytes
    }

    #[test]
    fn written_files_have_the_format_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.bin");
        let mut writer = TokenWriter::create(&path).unwrap();
        writer.write(&[5, 6]).unwrap();
        writer.write(&[7]).unwrap();
        assert_eq!(writer.finish().unwrap(), 3);
        assert_eq!(fs::read(&path).unwrap(), file_bytes(&[5, 6, 7]));
        assert_eq!(TokenFile::open(&path, 8).unwrap().tokens(), [5, 6, 7]);
    }

    #[test]
    fn each_flaw_has_its_sentence() {
        assert!(open(&file_bytes(&[]), 100).unwrap().is_empty());
        assert!(refusal(b"").contains("has 0 bytes, fewer than the 1024"));
        assert!(refusal(&patched(0, 20240326)).contains("it is an llm.c model"));
        assert!(refusal(&patched(0, 20240522)).contains("evaluation file"));
        assert!(refusal(&patched(0, MAGIC.swap_bytes())).contains("big-endian"));
        assert!(refusal(&patched(0, 7)).contains("starts with 7 and not with 20240520"));
        assert!(refusal(&[b'a'; 2000]).contains("looks like text"));
        assert!(refusal(&patched(1, 7)).contains("version 7"));
        assert!(refusal(&patched(2, -1)).contains("claims -1 tokens"));
        assert!(refusal(&patched(2, i32::MAX)).contains("take 4294968318 bytes, but it has 1030 bytes"));
        assert!(refusal(&patched(2, 2)).contains("longer than it says"));
        assert!(refusal(&file_bytes(&[1, 2, 3])[..1029]).contains("truncated"));
        assert!(refusal(&file_bytes(&[1, 100, 3])).contains("token 100 at position 1 is outside"));
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(TokenFile::open(folder.path(), 100).unwrap_err().to_string().contains("not a regular file"));
        assert!(TokenFile::open(&folder.path().join("none"), 100).unwrap_err().to_string().contains("check the path"));
    }

    #[test]
    fn a_bad_token_is_found_far_inside() {
        let mut tokens = vec![1u16; CHECK_CHUNK + 10];
        tokens[CHECK_CHUNK + 3] = 200;
        let what = check_vocabulary(&tokens, 100).unwrap_err();
        assert!(what.contains(&format!("position {}", CHECK_CHUNK + 3)), "{what}");
        assert!(check_vocabulary(&tokens, 1 << 16).is_ok());
    }

    proptest! {
        #[test]
        fn random_bytes_are_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            prop_assert!(open(&bytes, 100).is_err());
        }

        #[test]
        fn mutated_files_are_read_or_refused(
            tokens in proptest::collection::vec(0u16..100, 0..50),
            changes in proptest::collection::vec((0usize..1124, any::<u8>()), 0..4),
            length in 0usize..1200,
        ) {
            let mut bytes = file_bytes(&tokens);
            for (index, value) in changes {
                let len = bytes.len();
                bytes[index % len] = value;
            }
            bytes.resize(length.max(bytes.len() / 2), 0);
            if let Ok(read) = open(&bytes, 100) {
                prop_assert!(read.iter().all(|&token| token < 100));
                prop_assert_eq!(bytes.len(), HEADER_BYTES + 2 * read.len());
            }
        }
    }
}
