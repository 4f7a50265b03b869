//! Weights as bytes: the element types of files, streamed to and from f32.

use crate::atomic::AtomicFile;
use crate::error::{Error, Result};
use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use std::io::{self, Read};
use std::path::Path;

#[cfg(target_endian = "big")]
compile_error!("checkpoints are little-endian and are read and written as they lie in memory");

/// Elements converted at a time: small enough for the cache.
const BLOCK: usize = 1 << 14;

/// How a file stores one weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single, rounded to nearest even.
    Bf16,
}

impl Encoding {
    /// Bytes of one weight.
    pub fn bytes(self) -> usize {
        match self {
            Encoding::F32 => 4,
            Encoding::F16 | Encoding::Bf16 => 2,
        }
    }

    /// The value that a reader gets back.
    pub fn rounded(self, value: f32) -> f32 {
        match self {
            Encoding::F32 => value,
            Encoding::F16 => f16::from_f32(value).to_f32(),
            Encoding::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }
}

/// Fills `values` from the next bytes of `reader`.
///
/// # Errors
/// The reader's own.
pub fn read(reader: &mut impl Read, encoding: Encoding, values: &mut [f32]) -> io::Result<()> {
    match encoding {
        Encoding::F32 => reader.read_exact(bytemuck::cast_slice_mut(values)),
        Encoding::F16 => read_halves::<f16>(reader, values),
        Encoding::Bf16 => read_halves::<bf16>(reader, values),
    }
}

fn read_halves<H: Pod + Zeroable + Into<f32>>(reader: &mut impl Read, values: &mut [f32]) -> io::Result<()> {
    let mut block = vec![H::zeroed(); BLOCK.min(values.len())];
    for values in values.chunks_mut(BLOCK) {
        let halves = &mut block[..values.len()];
        reader.read_exact(bytemuck::cast_slice_mut(halves))?;
        values.iter_mut().zip(halves).for_each(|(value, half)| *value = (*half).into());
    }
    Ok(())
}

/// Appends `values` to `file`.
///
/// # Errors
/// [`Error::Io`].
pub fn append(file: &mut AtomicFile, encoding: Encoding, values: &[f32]) -> Result<()> {
    match encoding {
        Encoding::F32 => file.append(bytemuck::cast_slice(values)),
        Encoding::F16 => append_halves(file, values, f16::from_f32),
        Encoding::Bf16 => append_halves(file, values, bf16::from_f32),
    }
}

fn append_halves<H: Pod>(file: &mut AtomicFile, values: &[f32], round: fn(f32) -> H) -> Result<()> {
    let mut block = Vec::with_capacity(BLOCK.min(values.len()));
    for values in values.chunks(BLOCK) {
        block.clear();
        block.extend(values.iter().map(|&value| round(value)));
        file.append(bytemuck::cast_slice(&block))?;
    }
    Ok(())
}

/// Refuses NaN and infinity in a tensor that was read.
///
/// # Errors
/// [`Error::File`] naming the tensor and the first index.
pub fn check_finite(path: &Path, name: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Error::file(
            path,
            format!(
                "weight {index} of tensor {name} is {}: the training that wrote it diverged or the file is damaged; \
                 use an earlier checkpoint",
                values[index]
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(encoding: Encoding, values: &[f32]) -> Vec<f32> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("values");
        let mut file = AtomicFile::create(&path).unwrap();
        append(&mut file, encoding, values).unwrap();
        file.seal().unwrap().publish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), values.len() * encoding.bytes());
        let mut back = vec![f32::NAN; values.len()];
        read(&mut bytes.as_slice(), encoding, &mut back).unwrap();
        back
    }

    #[test]
    fn every_encoding_gives_back_its_rounded_values() {
        let values: Vec<f32> = (0..BLOCK + 7).map(|k| (k as f32 - 999.0) * 1.000_123e-3).collect();
        for encoding in [Encoding::F32, Encoding::F16, Encoding::Bf16] {
            let expected: Vec<f32> = values.iter().map(|&value| encoding.rounded(value)).collect();
            assert_eq!(round_trip(encoding, &values), expected, "{encoding:?}");
        }
    }

    #[test]
    fn bf16_rounds_to_nearest_even() {
        let half_up = f32::from_bits(0x3f80_8000); // halfway between 1 and the next bf16: down to the even 1
        let half_odd = f32::from_bits(0x3f81_8000); // halfway above an odd one: up
        let expected = [1.0, f32::from_bits(0x3f82_0000)];
        assert_eq!(round_trip(Encoding::Bf16, &[half_up, half_odd]), expected);
    }

    #[test]
    fn the_first_bad_weight_is_named() {
        let error = check_finite(Path::new("m.bin"), "h.3.fcw", &[0.0, f32::NAN, f32::INFINITY]).unwrap_err();
        assert!(error.to_string().starts_with("m.bin: weight 1 of tensor h.3.fcw is NaN"), "{error}");
    }
}
