//! The native format: a safetensors file with every tensor as it lies in memory, banded ones packed.
//!
//! Tensors are named `wte`, `wpe`, `lnfw`, `lnfb` and `h.LAYER.NAME` with llm.c's names, all F32. The metadata holds
//! everything needed to make sense of them, the constants of the packing included: should these change, older files are
//! packed anew as they are read.

use crate::atomic::SealedFile;
use crate::band::{ALIGN, Band, PANEL_ROWS, Panel};
use crate::blocks::{self, BLOCK_COLS, BLOCK_ROWS, Blocks};
use crate::checkpoint::container::{self, Container, Entry};
use crate::checkpoint::values::Encoding;
use crate::checkpoint::{Checked, Checkpoint, Meta, Moments};
use crate::config::GptConfig;
use crate::error::{Error, Result};
use crate::output::quoted;
use crate::shapes::{Param, ParamTable, Tensor, learned_tensors};
use crate::weights::Weights;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The value of `format` in the metadata.
const FORMAT: &str = "bandtrain";
/// The value of `version` in the metadata. Raise it when an older program would misread a newer file.
const VERSION: u32 = 1;
/// What precedes a tensor's name when it holds the first or the second moments.
const FIRST: &str = "m.";
const SECOND: &str = "v.";
/// The metadata's key, behind the prefix of a set of tensors, for the CRC-32C of the set's bytes.
const CHECKSUM: &str = "crc32c";
/// No packing has panels of more rows or windows aligned to more columns.
const MAX_PACKING: usize = 1 << 16;
/// The metadata's keys for the size of blocks, and behind a tensor's name for those that are kept.
const BLOCK_ROWS_KEY: &str = "block_rows";
const BLOCK_COLS_KEY: &str = "block_cols";
const BLOCKS_KEY: &str = ".blocks";

/// Whether the metadata says that bandtrain wrote the file.
pub(super) fn recognises(container: &Container) -> bool {
    container.notes().get("format").is_some_and(|format| format == FORMAT)
}

/// Writes a checkpoint.
///
/// # Errors
/// [`Error::Io`].
pub fn write(path: &Path, checkpoint: &Checkpoint, moments: Option<&Moments>) -> Result<SealedFile> {
    let weights = &checkpoint.weights;
    let mut sets = vec![("", weights)];
    sets.extend(moments.into_iter().flat_map(|moments| [(FIRST, &moments.first), (SECOND, &moments.second)]));
    let mut notes = notes(checkpoint)?;
    notes.extend(sets.iter().map(|(prefix, set)| (format!("{prefix}{CHECKSUM}"), format!("{:08x}", checksum(set)))));
    let tensors: Vec<_> = sets
        .into_iter()
        .flat_map(|(prefix, set)| set.table().tensors().iter().map(move |&tensor| (prefix, set, tensor)))
        .collect();
    let entry = |&(prefix, _, tensor): &(&str, _, Tensor)| -> Entry {
        (format!("{prefix}{}", tensor.name()), shape(tensor, weights.config(), tensor.span.len))
    };
    let entries: Vec<Entry> = tensors.iter().map(entry).collect();
    let stored = |index: usize| {
        let (_, set, tensor) = tensors[index];
        Cow::Borrowed(set.stored(tensor.param, tensor.layer))
    };
    container::write(path, notes, &entries, stored)
}

/// Reads a checkpoint.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] when the metadata is missing, damaged or of a newer version, when a tensor is missing,
/// unknown or of another shape or type, when a weight is not finite, and when a slot outside the band is not zero.
pub fn read(path: &Path) -> Result<Checkpoint> {
    Ok(open(path)?.0)
}

/// Reads a checkpoint with its moments.
///
/// # Errors
/// As [`read`], and when the file holds no moments.
pub fn read_with_moments(path: &Path) -> Result<(Checkpoint, Moments)> {
    let (checkpoint, mut container, packing) = open(path)?;
    if container.shape(&format!("{FIRST}{}", Param::Wte.name())).is_none() {
        let what = "holds weights but no moments, so no training can be resumed from it; start from it with -e instead";
        return Err(Error::file(path, what));
    }
    let table = checkpoint.weights.table();
    let mut set = |prefix| -> Result<Weights> {
        check_shapes(&container, prefix, checkpoint.weights.config(), table, packing)?;
        read_set(&mut container, prefix, checkpoint.weights.config(), table, packing)
    };
    let moments = Moments { first: set(FIRST)?, second: set(SECOND)? };
    Ok((checkpoint, moments))
}

/// The checkpoint in a file, and the file for whatever else is wanted of it.
fn open(path: &Path) -> Result<(Checkpoint, Container, Packing)> {
    let mut container = Container::open(path)?;
    let fault = |what: String| Error::file(path, what);
    let mut notes = container.notes();
    let (config, packing) = take_layout(&mut notes).map_err(fault)?;
    let meta = Meta::take(&mut notes, &config).map_err(fault)?;
    let no_model = |error| fault(format!("its metadata makes no model: {error}"));
    let table = ParamTable::new(&config).map_err(no_model)?;
    let learned = take_learned(&mut notes, &config, &table).map_err(fault)?;
    let table = match learned.is_empty() {
        true => table,
        false => {
            let of = |param, layer| learned.get(&(param, layer)).cloned();
            ParamTable::with_blocks(&config, of).map_err(no_model)?
        }
    };
    check_blocks(&mut notes, &table, &learned, packing).map_err(fault)?;
    check_tensors(&container, &config, &table, packing)?;
    let weights = read_set(&mut container, "", &config, &table, packing)?;
    Ok((Checkpoint { weights, meta: Meta { extra: notes, ..meta } }, container, packing))
}

/// Reads all tensors whose names begin with `prefix`, and holds them to their checksum if the file has one.
fn read_set(
    container: &mut Container,
    prefix: &str,
    config: &GptConfig,
    table: &ParamTable,
    packing: Packing,
) -> Result<Weights> {
    let mut set = Weights::zeros_in(config, table.clone())?;
    let mut crc = 0;
    for &tensor in table.tensors() {
        let packed = table.band(tensor.param, tensor.layer).map(|(band, _)| (band, packing));
        crc = read_tensor(container, prefix, &mut set, tensor, packed, crc)?;
    }
    match container.notes().get(&format!("{prefix}{CHECKSUM}")) {
        Some(written) if *written != format!("{crc:08x}") => {
            let what = "does not hold the numbers that were written to it (their checksum differs): it is damaged; copy it \
                        again or use an earlier checkpoint";
            Err(Error::file(container.path(), what))
        }
        _ => Ok(set),
    }
}

/// CRC-32C of the bytes of all tensors, in order.
fn checksum(set: &Weights) -> u32 {
    let stored = set.table().tensors().iter().map(|tensor| set.stored(tensor.param, tensor.layer));
    stored.fold(0, |crc, values| crc32c::crc32c_append(crc, bytemuck::cast_slice(values)))
}

/// The constants a file was packed with.
#[derive(Debug, Clone, Copy)]
struct Packing {
    /// Wide rows of a panel.
    panel_rows: usize,
    /// Windows start at, and are as wide as, a multiple of this many columns.
    align: usize,
}

impl Packing {
    /// [`Band::panels`] as they would be with these constants.
    fn panels(self, band: &Band) -> Vec<Panel> {
        band.panels_with(self.panel_rows, self.align)
    }
}

/// The metadata. The format's own keys come last, so that `extra` cannot replace them.
fn notes(checkpoint: &Checkpoint) -> Result<BTreeMap<String, String>> {
    let config = serde_json::to_string(checkpoint.weights.config());
    let config = config.map_err(|error| Error::Internal(error.to_string()))?;
    let own = [
        ("format", FORMAT.to_string()),
        ("version", VERSION.to_string()),
        ("config", config),
        ("panel_rows", PANEL_ROWS.to_string()),
        ("align", ALIGN.to_string()),
    ];
    let own =
        own.map(|(key, value)| (key.to_string(), value)).into_iter().chain(block_notes(checkpoint.weights.table()));
    Ok(checkpoint.meta.extra.clone().into_iter().chain(checkpoint.meta.entries()).chain(own).collect())
}

/// What the metadata says of blocks: their size, and for each tensor that has any which ones. Of a model without there is
/// nothing to say.
fn block_notes(table: &ParamTable) -> Vec<(String, String)> {
    let sizes = [(BLOCK_ROWS_KEY, BLOCK_ROWS), (BLOCK_COLS_KEY, BLOCK_COLS)];
    let sizes = sizes.map(|(key, value)| (key.to_string(), value.to_string()));
    let of = |tensor: &Tensor| {
        let blocks = table.band(tensor.param, tensor.layer)?.0.blocks()?;
        Some((format!("{}{BLOCKS_KEY}", tensor.name()), blocks.to_text()))
    };
    let tensors: Vec<_> = table.tensors().iter().filter_map(of).collect();
    if tensors.is_empty() { tensors } else { sizes.into_iter().chain(tensors).collect() }
}

/// Removes from the metadata what it says of learned blocks: any may be that are as many as those that they started from.
fn take_learned(
    notes: &mut BTreeMap<String, String>,
    config: &GptConfig,
    start: &ParamTable,
) -> Checked<BTreeMap<(Param, usize), Blocks>> {
    let (narrow, wide) = (config.channels, config.mlp_width());
    let mut learned = BTreeMap::new();
    for (param, layer, _) in learned_tensors(config) {
        let key = format!("{}{BLOCKS_KEY}", param.name_in(layer));
        let text = take(notes, &key)?;
        let count = start.band(param, layer).and_then(|(band, _)| band.blocks()).map_or(0, Blocks::count);
        let blocks = Blocks::from_text(&text, narrow, wide).filter(|blocks| blocks.count() == count);
        let blocks = blocks.ok_or_else(|| {
            let (down, across) = blocks::grid(narrow, wide);
            format!(
                "gives {key} as {}, which are not {count} of {down} x {across} blocks: it is damaged",
                quoted(&text)
            )
        })?;
        learned.insert((param, layer), blocks);
    }
    Ok(learned)
}

/// Removes from the metadata what it says of blocks that are not learned, and holds them to be those that the configuration's
/// patterns mean.
fn check_blocks(
    notes: &mut BTreeMap<String, String>,
    table: &ParamTable,
    learned: &BTreeMap<(Param, usize), Blocks>,
    packing: Packing,
) -> Checked<()> {
    let learned: BTreeSet<_> =
        learned.keys().map(|&(param, layer)| format!("{}{BLOCKS_KEY}", param.name_in(layer))).collect();
    let expected = block_notes(table);
    for (key, own) in expected.iter().filter(|(key, _)| !learned.contains(key)) {
        let written = take(notes, key)?;
        if written != *own {
            let own = quoted(own);
            return Err(format!(
                "gives {key} as {} where its configuration means {own}: it is damaged, or from another version of bandtrain",
                quoted(&written)
            ));
        }
    }
    if !expected.is_empty() && (packing.panel_rows, packing.align) != (PANEL_ROWS, ALIGN) {
        let Packing { panel_rows, align } = packing;
        return Err(format!(
            "packs its blocks in panels of {panel_rows} rows aligned to {align} columns, but this program reads {PANEL_ROWS} and \
             {ALIGN}; it is damaged, or from another version of bandtrain"
        ));
    }
    Ok(())
}

/// Removes the format's own keys from the metadata and reads them.
fn take_layout(notes: &mut BTreeMap<String, String>) -> Checked<(GptConfig, Packing)> {
    notes.remove("format");
    for prefix in ["", FIRST, SECOND] {
        notes.remove(&format!("{prefix}{CHECKSUM}"));
    }
    let version = take_number(notes, "version")?;
    if version == 0 || version > VERSION as usize {
        return Err(format!(
            "has version {version} of the native format, but this program reads up to {VERSION}; update bandtrain"
        ));
    }
    let config = take(notes, "config")?;
    let config: GptConfig = serde_json::from_str(&config)
        .map_err(|error| format!("has a damaged configuration in its metadata: {}", quoted(&error.to_string())))?;
    let config = config.with_mlp_width(config.mlp_width());
    let packing = Packing { panel_rows: take_number(notes, "panel_rows")?, align: take_number(notes, "align")? };
    for (key, value) in [("panel_rows", packing.panel_rows), ("align", packing.align)] {
        if value == 0 || value > MAX_PACKING {
            return Err(format!("its metadata gives {key} as {value}, but it must lie between 1 and {MAX_PACKING}"));
        }
    }
    Ok((config, packing))
}

fn take(notes: &mut BTreeMap<String, String>, key: &str) -> Checked<String> {
    notes.remove(key).ok_or_else(|| format!("lacks '{key}' in its metadata; it was not written by bandtrain as it is"))
}

fn take_number(notes: &mut BTreeMap<String, String>, key: &str) -> Checked<usize> {
    let text = take(notes, key)?;
    text.parse().map_err(|_| format!("its metadata gives {key} as {}, which is not a number", quoted(&text)))
}

/// The shape of a tensor in the file: packed tensors and vectors have one dimension.
fn shape(tensor: Tensor, config: &GptConfig, len: usize) -> Vec<usize> {
    match (tensor.packed, tensor.param.is_matrix()) {
        (None, true) => {
            let (rows, cols) = tensor.param.shape(config);
            vec![rows, cols]
        }
        _ => vec![len],
    }
}

/// The model's tensors are there under `prefix`, each with its shape and F32.
fn check_shapes(
    container: &Container,
    prefix: &str,
    config: &GptConfig,
    table: &ParamTable,
    packing: Packing,
) -> Result<()> {
    let lens: Vec<usize> = table.bands().iter().map(|band| packing.panels(band).iter().map(Panel::len).sum()).collect();
    for &tensor in table.tensors() {
        let len = table.band_index(tensor.param, tensor.layer).map_or(tensor.span.len, |band| lens[band]);
        let name = format!("{prefix}{}", tensor.name());
        container.check(&name, &shape(tensor, config, len), &[Encoding::F32])?;
    }
    Ok(())
}

/// The model's tensors are there, and beside them nothing but moments.
fn check_tensors(container: &Container, config: &GptConfig, table: &ParamTable, packing: Packing) -> Result<()> {
    check_shapes(container, "", config, table, packing)?;
    let known: BTreeSet<_> = table.tensors().iter().map(Tensor::name).collect();
    let plain = |name: &str| name.strip_prefix(FIRST).or(name.strip_prefix(SECOND)).unwrap_or(name).to_string();
    match container.names().into_iter().find(|name| !known.contains(&plain(name))) {
        None => Ok(()),
        Some(name) => {
            let what =
                format!("holds tensor {}, which its configuration does not know; the file is damaged", quoted(&name));
            Err(Error::file(container.path(), what))
        }
    }
}

/// Reads one tensor to its place; a banded one comes with its band and the packing of the file. Returns `crc` with the tensor's
/// bytes appended.
fn read_tensor(
    container: &mut Container,
    prefix: &str,
    weights: &mut Weights,
    tensor: Tensor,
    packed: Option<(&Band, Packing)>,
    crc: u32,
) -> Result<u32> {
    let appended = |values: &[f32]| crc32c::crc32c_append(crc, bytemuck::cast_slice(values));
    let name = format!("{prefix}{}", tensor.name());
    let stored = weights.stored_mut(tensor.param, tensor.layer);
    let Some((band, packing)) = packed else {
        container.read(&name, stored)?;
        return Ok(appended(stored));
    };
    let panels = packing.panels(band);
    if panels == band.panels() {
        container.read(&name, stored)?;
        check_slots(container.path(), &name, band, &panels, stored)?;
        return Ok(appended(stored));
    }
    let mut foreign = vec![0.0; panels.iter().map(Panel::len).sum()];
    container.read(&name, &mut foreign)?;
    check_slots(container.path(), &name, band, &panels, &foreign)?;
    repack(band, &panels, &foreign, stored);
    Ok(appended(&foreign))
}

fn check_slots(path: &Path, name: &str, band: &Band, panels: &[Panel], packed: &[f32]) -> Result<()> {
    match first_outside(band, panels, packed) {
        None => Ok(()),
        Some((j, i, slot)) => Err(Error::file(
            path,
            format!(
                "slot {slot} of tensor {name} (wide row {j}, narrow column {i}) lies outside the band, but holds {} \
                 instead of 0; the file is damaged or was packed by another program",
                packed[slot]
            ),
        )),
    }
}

/// The first slot outside the exact band that is not zero: its wide row, its narrow column and its index.
pub(super) fn first_outside(band: &Band, panels: &[Panel], packed: &[f32]) -> Option<(usize, usize, usize)> {
    let rows = panels.iter().flat_map(|panel| panel.row_range().map(move |j| (panel, j)));
    rows.into_iter().find_map(|(panel, j)| {
        let (start, kept) = (slot_of(panel, j, panel.col_start), band.kept(panel, j));
        let row = packed[start..start + panel.cols].iter().zip(panel.col_start..);
        let outside = row.into_iter().find(|(value, i)| **value != 0.0 && !kept.contains(i));
        outside.map(|(_, i)| (j, i, slot_of(panel, j, i)))
    })
}

/// Moves every connection of a band from its slot under other panels to its slot under its own.
fn repack(band: &Band, panels: &[Panel], packed: &[f32], stored: &mut [f32]) {
    for panel in panels {
        for j in panel.row_range().filter(|&j| !band.row(j).is_empty()) {
            let (from, to) = (band.row(j).start, &band.panels()[j / PANEL_ROWS]);
            let len = band.row(j).len();
            stored[slot_of(to, j, from)..][..len].copy_from_slice(&packed[slot_of(panel, j, from)..][..len]);
        }
    }
}

/// Where a panel keeps wide row j, narrow column i.
fn slot_of(panel: &Panel, j: usize, i: usize) -> usize {
    panel.offset + (j - panel.row_start) * panel.cols + (i - panel.col_start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::band::Dense;
    use proptest::prelude::*;

    const OWN: Packing = Packing { panel_rows: PANEL_ROWS, align: ALIGN };

    proptest! {
        #[test]
        fn the_own_constants_give_the_bands_own_panels(n in 1usize..90, extra in 0usize..400, bandwidth in 1usize..300) {
            let band = Band::new(n, n + extra, bandwidth).unwrap();
            prop_assert_eq!(OWN.panels(&band), band.panels());
        }

        #[test]
        fn repacking_keeps_every_connection(
            n in 1usize..50, extra in 0usize..200, bandwidth in 1usize..200, panel_rows in 1usize..100, align in 1usize..40,
        ) {
            let band = Band::new(n, n + extra, bandwidth).unwrap();
            let dense: Vec<f32> = (1..=n * (n + extra)).map(|k| k as f32).collect();
            let mut own = vec![0.0; band.packed_len()];
            band.pack(&dense, Dense::WideByNarrow, &mut own);

            let foreign_panels = Packing { panel_rows, align }.panels(&band);
            let mut foreign = vec![0.0; foreign_panels.iter().map(Panel::len).sum()];
            for panel in &foreign_panels {
                for (j, i) in panel.row_range().flat_map(|j| band.row(j).map(move |i| (j, i))) {
                    foreign[slot_of(panel, j, i)] = dense[j * n + i];
                }
            }
            prop_assert_eq!(first_outside(&band, &foreign_panels, &foreign), None);
            let mut repacked = vec![0.0; band.packed_len()];
            repack(&band, &foreign_panels, &foreign, &mut repacked);
            prop_assert_eq!(repacked, own);
        }
    }

    #[test]
    fn every_slot_outside_the_band_is_found() {
        let band = Band::new(40, 160, 36).unwrap();
        for panel in band.panels() {
            for slot in 0..panel.len() {
                let mut packed = vec![0.0; band.packed_len()];
                packed[panel.offset + slot] = 1.0;
                let found = first_outside(&band, band.panels(), &packed).map(|(_, _, slot)| slot);
                let expected = band.slot(panel, slot).is_none().then_some(panel.offset + slot);
                assert_eq!(found, expected);
            }
        }
    }
}
