//! Event files as TensorBoard reads them: records of TFRecord's framing, each a protocol buffer of a few fields.
//!
//! The messages are TensorFlow's `Event`, `Summary`, `SessionLog` and `TensorProto`; the numbers below are their fields'.

use crate::error::{Error, Result};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A file of events.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins a file in `folder` whose events come after `step`. What older files tell about later steps is void: a run that
    /// was lost.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be written.
    pub fn create(folder: &Path, step: u64) -> Result<Self> {
        let now = now();
        // TensorBoard reads the files of a folder in the order of their names.
        let path = folder.join(format!("events.out.tfevents.{:010}.{:09}", now.as_secs(), now.subsec_nanos()));
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        let mut events = Self { path, file };
        let mut version = Message::default();
        version.double(1, now.as_secs_f64()).bytes(3, b"brain.Event:2");
        events.record(&version)?;
        let mut start = Message::default();
        start.integer(1, 1);
        let next = if step == 0 { 0 } else { step + 1 };
        events.event(next, 7, &start)?;
        Ok(events)
    }

    /// Values of a step, each with its tag.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be written.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = Message::default();
        for (tag, value) in values {
            let mut scalar = Message::default();
            scalar.bytes(1, tag.as_bytes()).float(2, *value as f32);
            summary.message(1, &scalar);
        }
        self.event(step, 5, &summary)
    }

    /// A text of a step.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be written.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) -> Result<()> {
        const STRING: u64 = 7;
        let [mut plugin, mut metadata, mut tensor, mut value, mut summary] =
            std::array::from_fn(|_| Message::default());
        plugin.bytes(1, b"text");
        metadata.message(1, &plugin);
        tensor.integer(1, STRING).message(2, &Message::default()).bytes(8, text.as_bytes());
        value.bytes(1, tag.as_bytes()).message(8, &tensor).message(9, &metadata);
        summary.message(1, &value);
        self.event(step, 5, &summary)
    }

    /// An event of now, whose field `what` holds `content`.
    fn event(&mut self, step: u64, what: u64, content: &Message) -> Result<()> {
        let mut event = Message::default();
        event.double(1, now().as_secs_f64()).integer(2, step).message(what, content);
        self.record(&event)
    }

    /// One write a record, so that a reader, or a crash, never sees half of one.
    fn record(&mut self, event: &Message) -> Result<()> {
        self.file.write_all(&framed(&event.0)).map_err(Error::io("write", &self.path))
    }
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// TFRecord's framing: length, its checksum, the data, their checksum.
fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length), data, &masked_crc(data)].concat()
}

/// CRC-32C, rotated and shifted by a constant, so that the checksum of data that hold checksums stays a good one.
fn masked_crc(data: &[u8]) -> [u8; 4] {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// A protocol buffer in the making.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn key(&mut self, field: u64, wire_type: u64) -> &mut Self {
        self.varint(field << 3 | wire_type)
    }

    fn varint(&mut self, mut value: u64) -> &mut Self {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
        self
    }

    fn integer(&mut self, field: u64, value: u64) -> &mut Self {
        self.key(field, 0).varint(value)
    }

    fn double(&mut self, field: u64, value: f64) -> &mut Self {
        self.key(field, 1).0.extend(value.to_le_bytes());
        self
    }

    fn float(&mut self, field: u64, value: f32) -> &mut Self {
        self.key(field, 5).0.extend(value.to_le_bytes());
        self
    }

    fn bytes(&mut self, field: u64, value: &[u8]) -> &mut Self {
        self.key(field, 2).varint(value.len() as u64).0.extend(value);
        self
    }

    fn message(&mut self, field: u64, value: &Message) -> &mut Self {
        self.bytes(field, &value.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_masked_crc32c() {
        // RFC 3720's value for the digits is 0xe3069283; the masked one of eight zeros stands before each record of no bytes.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), 0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes());
        assert_eq!(framed(b"")[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0x29, 0x03, 0x98, 0x07]);
    }

    /// The fields of a message: number, wire type and bytes.
    fn fields(mut data: &[u8]) -> Vec<(u64, u64, Vec<u8>)> {
        let varint = |data: &mut &[u8]| {
            let (mut value, mut shift) = (0, 0);
            loop {
                let (&byte, rest) = data.split_first().unwrap();
                *data = rest;
                value |= u64::from(byte & 0x7f) << shift;
                shift += 7;
                if byte < 0x80 {
                    return value;
                }
            }
        };
        let mut found = Vec::new();
        while !data.is_empty() {
            let key = varint(&mut data);
            let length = match key & 7 {
                0 => {
                    found.push((key >> 3, 0, varint(&mut data).to_le_bytes().to_vec()));
                    continue;
                }
                1 => 8,
                5 => 4,
                _ => varint(&mut data) as usize,
            };
            found.push((key >> 3, key & 7, data[..length].to_vec()));
            data = &data[length..];
        }
        found
    }

    #[test]
    fn records_are_framed_and_hold_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(folder.path(), 299).unwrap();
        events.scalars(300, &[("loss/train", 2.5), ("lr", 1e-3)]).unwrap();
        events.text(300, "sample", &"ab".repeat(100)).unwrap();
        let bytes = std::fs::read(&events.path).unwrap();
        let (mut rest, mut records) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked_crc(&rest[..8]));
            let data = &rest[12..12 + length];
            assert_eq!(rest[12 + length..16 + length], masked_crc(data));
            records.push(fields(data));
            rest = &rest[16 + length..];
        }
        assert_eq!(records.len(), 4);
        assert_eq!(records[0][1], (3, 2, b"brain.Event:2".to_vec()));
        let step = (2, 0, 300u64.to_le_bytes().to_vec());
        assert!(records[1..].iter().all(|record| record[0].0 == 1 && record[1] == step));
        assert_eq!(records[1][2], (7, 2, vec![1 << 3, 1]));
        let values = fields(&records[2][2].2);
        let value = fields(&values[0].2);
        assert_eq!(value, [(1, 2, b"loss/train".to_vec()), (2, 5, 2.5f32.to_le_bytes().to_vec())]);
        assert_eq!(fields(&values[1].2)[1].2, 1e-3f32.to_le_bytes());
        let value = fields(&fields(&records[3][2].2)[0].2);
        assert_eq!(value[0].2, b"sample");
        assert_eq!(fields(&value[1].2)[2], (8, 2, "ab".repeat(100).into_bytes()));
        assert_eq!(fields(&fields(&value[2].2)[0].2)[0].2, b"text");
    }
}
