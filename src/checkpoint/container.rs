//! The safetensors container: an 8-byte header length, a JSON header, then the tensors without gaps.
//!
//! The header is parsed and validated by the `safetensors` crate; tensors are read straight into their destination, so
//! that no second copy of the file is ever in memory. Files are written here, not by the crate, because its header comes
//! in random order (two equal checkpoints shall be equal byte by byte) and its writer does not sync.

use crate::atomic::{AtomicFile, SealedFile};
use crate::checkpoint::values::{self, Encoding};
use crate::checkpoint::{file_len, open};
use crate::error::{Error, Result};
use crate::output::quoted;
use ::safetensors::Dtype;
use ::safetensors::tensor::{Metadata, TensorInfo};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Bytes of the header length.
const LENGTH_BYTES: u64 = 8;
/// The largest model's header is below 2 MiB.
const MAX_HEADER_BYTES: u64 = 1 << 24;
/// The header's entry for metadata.
const METADATA_KEY: &str = "__metadata__";

/// An open safetensors file whose header is known to describe exactly the bytes that follow it.
pub struct Container {
    path: PathBuf,
    reader: BufReader<File>,
    data_start: u64,
    metadata: Metadata,
}

impl Container {
    /// Opens a file and validates its header.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] when the header is cut short, is no valid JSON, leaves gaps or overlaps between
    /// tensors, or describes more or fewer bytes than there are.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = open(path)?;
        let len = file_len(path, &file)?;
        let header = read_header(path, &mut file, len)?;
        let data_start = LENGTH_BYTES + header.len() as u64;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| {
            Error::file(
                path,
                format!("has a damaged safetensors header: {}; copy or download it again", quoted(&error.to_string())),
            )
        })?;
        let expected = data_start.saturating_add(metadata.data_len() as u64);
        if len != expected {
            let state = if len < expected { "truncated" } else { "damaged" };
            let what = format!(
                "is {len} bytes long, but its header describes {expected}: it is {state}; copy or download it again"
            );
            return Err(Error::file(path, what));
        }
        Ok(Self { path: path.to_path_buf(), reader: BufReader::new(file), data_start, metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata, empty when there is none.
    pub fn notes(&self) -> BTreeMap<String, String> {
        self.metadata.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// The tensors' names in the order of their data.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// The shape of a tensor, `None` when there is none of that name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.metadata.info(name).map(|info| info.shape.as_slice())
    }

    /// Refuses a tensor that is missing or has another shape or element type than expected.
    ///
    /// # Errors
    /// [`Error::File`] naming the tensor.
    pub fn check(&self, name: &str, shape: &[usize], encodings: &[Encoding]) -> Result<()> {
        let info = self.info(name)?;
        if info.shape != shape {
            let what = format!(
                "tensor {name} has shape {:?}, but the configuration asks for {shape:?}; \
                 the file and its configuration do not belong together",
                info.shape
            );
            return Err(Error::file(&self.path, what));
        }
        match encoding_of(info.dtype).is_some_and(|encoding| encodings.contains(&encoding)) {
            true => Ok(()),
            false => {
                let what =
                    format!("tensor {name} is stored as {:?}, which cannot be read; convert it to F32", info.dtype);
                Err(Error::file(&self.path, what))
            }
        }
    }

    /// Reads a tensor into `values` and refuses what is not finite.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for a tensor that is missing, of another size, or holds NaN or infinity.
    pub fn read(&mut self, name: &str, values: &mut [f32]) -> Result<()> {
        let info = self.info(name)?;
        let (encoding, (start, end)) = (encoding_of(info.dtype), info.data_offsets);
        let Some(encoding) = encoding.filter(|encoding| values.len() * encoding.bytes() == end - start) else {
            return Err(Error::file(&self.path, format!("tensor {name} does not have the size that was asked for")));
        };
        let read = self.reader.seek(SeekFrom::Start(self.data_start + start as u64));
        let read = read.and_then(|_| values::read(&mut self.reader, encoding, values));
        read.map_err(Error::io("read", &self.path))?;
        values::check_finite(&self.path, name, values)
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        let missing = || Error::file(&self.path, format!("lacks tensor {name}; the file is incomplete"));
        self.metadata.info(name).ok_or_else(missing)
    }
}

fn encoding_of(dtype: Dtype) -> Option<Encoding> {
    match dtype {
        Dtype::F32 => Some(Encoding::F32),
        Dtype::F16 => Some(Encoding::F16),
        Dtype::BF16 => Some(Encoding::Bf16),
        _ => None,
    }
}

fn read_header(path: &Path, file: &mut File, len: u64) -> Result<Vec<u8>> {
    let Some(available) = len.checked_sub(LENGTH_BYTES) else {
        let what = format!("is {len} bytes long, too short for a safetensors file; copy or download it again");
        return Err(Error::file(path, what));
    };
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact(&mut length).map_err(Error::io("read", path))?;
    let header_len = u64::from_le_bytes(length);
    if header_len > available {
        let what = format!(
            "announces a header of {header_len} bytes, but only {available} follow: it is truncated or no \
             safetensors file; copy or download it again"
        );
        return Err(Error::file(path, what));
    }
    if header_len > MAX_HEADER_BYTES {
        let what = format!(
            "announces a header of {header_len} bytes, more than the {MAX_HEADER_BYTES} that any model needs; it is no \
             GPT-2 checkpoint"
        );
        return Err(Error::file(path, what));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact(&mut header).map_err(Error::io("read", path))?;
    Ok(header)
}

/// A tensor to be written: its name and shape.
pub type Entry = (String, Vec<usize>);

/// Writes fp32 tensors; `values(k)` gives those of entry k, and is asked once for each, in order.
///
/// # Errors
/// [`Error::Io`].
pub fn write<'a>(
    path: &Path,
    notes: BTreeMap<String, String>,
    entries: &[Entry],
    values: impl Fn(usize) -> Cow<'a, [f32]>,
) -> Result<SealedFile> {
    let header = header(notes, entries).map_err(|error| Error::Internal(error.to_string()))?;
    let mut file = AtomicFile::create(path)?;
    file.append(&(header.len() as u64).to_le_bytes())?;
    file.append(&header)?;
    for (index, (_, shape)) in entries.iter().enumerate() {
        let values = values(index);
        debug_assert_eq!(values.len(), shape.iter().product::<usize>());
        values::append(&mut file, Encoding::F32, &values)?;
    }
    file.seal()
}

/// The JSON header with sorted keys, padded with spaces so that the data starts at a multiple of 8 bytes.
fn header(notes: BTreeMap<String, String>, entries: &[Entry]) -> serde_json::Result<Vec<u8>> {
    let mut end = 0;
    let mut header = BTreeMap::from([(METADATA_KEY, serde_json::to_value(notes)?)]);
    for (name, shape) in entries {
        let start = end;
        end += shape.iter().product::<usize>() * Encoding::F32.bytes();
        let info = TensorInfo { dtype: Dtype::F32, shape: shape.clone(), data_offsets: (start, end) };
        header.insert(name, serde_json::to_value(info)?);
    }
    let mut bytes = serde_json::to_vec(&header)?;
    bytes.resize(bytes.len().next_multiple_of(LENGTH_BYTES as usize), b' ');
    Ok(bytes)
}
