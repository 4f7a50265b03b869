//! How the outer product of a band is cut into tiles and these are dealt out to the card: for `kernels/band.cu` and
//! `kernels/band_hopper.cu` alike (`kernels/panels.cuh` is their side of it).

use crate::band::{Band, PANEL_ROWS};

/// Parts of a tile at most.
const MAX_PARTS: usize = 16;

/// Tiles of the outer product, and what they cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tiling {
    /// Wide rows of a tile: whole panels.
    pub(super) rows: usize,
    /// Narrow columns.
    pub(super) cols: usize,
    /// Rows of the batch that a stage has.
    pub(super) depth: usize,
    /// Bytes of a stage, and how many of them a multiprocessor is through with in a microsecond, as measured.
    pub(super) stage_bytes: usize,
    pub(super) stage_rate: usize,
    /// Parts that a multiprocessor may be given.
    pub(super) parts_each: usize,
}

/// Tiles that stay whole, tiles that are cut along the batch's rows, and into how many parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Deal {
    pub(super) whole: usize,
    pub(super) cut: usize,
    pub(super) parts: usize,
}

impl Deal {
    /// What blocks work on: whole tiles, then parts.
    pub(super) fn items(self) -> usize {
        self.whole + self.cut * self.parts
    }

    /// Parts that lie in memory until they are added.
    pub(super) fn pieces(self) -> usize {
        if self.parts > 1 { self.cut * self.parts } else { 0 }
    }
}

impl Tiling {
    /// Panels of a tile.
    pub(super) fn group(self) -> usize {
        self.rows / PANEL_ROWS
    }

    /// Floats of a piece: a tile's results and the sums of its wide values.
    pub(super) fn piece(self) -> usize {
        self.rows * self.cols + self.rows
    }

    /// First panels, first rows, first columns, and whether a tile is the first of its rows: that one sums the wide values. All
    /// rows have a tile, also those without a connection.
    pub(super) fn tiles(self, band: &Band) -> Vec<[u32; 4]> {
        let mut tiles = Vec::new();
        let mut rows = 0;
        for (group, panels) in band.panels().chunks(self.group()).enumerate() {
            let touched = panels.iter().filter(|panel| !panel.is_empty());
            let first = touched.clone().map(|panel| panel.col_start).min().unwrap_or(0);
            let end = touched.map(|panel| panel.col_start + panel.cols).max().unwrap_or(0);
            let row = panels[0].row_start;
            for empty in (rows..row).step_by(self.rows) {
                tiles.push([band.panels().len(), empty, 0, 1]);
            }
            for col in (first..end.max(first + 1)).step_by(self.cols) {
                let is_first = col == first && row >= rows;
                tiles.push([group * self.group(), row, col, usize::from(is_first)]);
            }
            rows = row + self.rows;
        }
        tiles.extend((rows..band.wide()).step_by(self.rows).map(|empty| [band.panels().len(), empty, 0, 1]));
        tiles.into_iter().map(|tile| tile.map(|word| word as u32)).collect()
    }

    /// How `tiles` tiles over `rows` rows of the batch are best dealt out to so many multiprocessors, and about how many
    /// microseconds that takes: as many whole tiles as give each the same, and the others in parts.
    pub(super) fn deal(self, tiles: usize, rows: usize, multiprocessors: usize) -> (Deal, f64) {
        const PIECE_BYTES_A_MICROSECOND: f64 = 1.5e6;
        const SUM_LAUNCH: f64 = 4.0;
        let steps = rows.div_ceil(self.depth);
        let whole = tiles / multiprocessors * multiprocessors;
        let cut = tiles - whole;
        let cost = |deal: Deal| {
            let most_steps = whole / multiprocessors * steps
                + (cut * deal.parts).div_ceil(multiprocessors) * steps.div_ceil(deal.parts);
            let stages = (most_steps * self.stage_bytes) as f64 / self.stage_rate as f64;
            let pieces = (4 * deal.pieces() * self.piece()) as f64 / PIECE_BYTES_A_MICROSECOND + SUM_LAUNCH;
            stages + if deal.parts > 1 { pieces } else { 0.0 }
        };
        let most = (self.parts_each * multiprocessors).checked_div(cut).unwrap_or(1);
        let deals = (1..=most.clamp(1, MAX_PARTS)).map(|parts| Deal { whole, cut, parts });
        let dealt = deals.map(|deal| (deal, cost(deal)));
        dealt.min_by(|(_, a), (_, b)| a.total_cmp(b)).expect("one part at least")
    }

    /// The most memory that the pieces take, whatever the band.
    pub(super) fn most_piece_bytes(self, multiprocessors: usize) -> usize {
        4 * self.parts_each * multiprocessors * self.piece()
    }
}

/// Of several cuts, each with where its tiles are listed and how many they are, the one that is fastest for so many rows: it, where its
/// tiles are, and how they are dealt out.
pub(super) fn fastest<C: Copy>(
    cuts: &[(C, usize, usize)],
    tiling: impl Fn(C) -> Tiling,
    rows: usize,
    multiprocessors: usize,
) -> (C, usize, Deal) {
    let dealt = cuts.iter().map(|&(cut, at, tiles)| (cut, at, tiling(cut).deal(tiles, rows, multiprocessors)));
    let (cut, at, (deal, _)) = dealt.min_by(|(.., (_, a)), (.., (_, b))| a.total_cmp(b)).expect("there are cuts");
    (cut, at, deal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::Blocks;

    const TILING: Tiling =
        Tiling { rows: 128, cols: 128, depth: 64, stage_bytes: 32 << 10, stage_rate: 45_000, parts_each: 2 };

    /// The first rows of the tiles that sum.
    fn summed(tiles: &[[u32; 4]]) -> Vec<usize> {
        tiles.iter().filter(|tile| tile[3] == 1).map(|tile| tile[1] as usize).collect()
    }

    #[test]
    fn tiles_cover_every_window_and_each_group_has_one_that_sums() {
        for (narrow, wide, bandwidth) in [(512, 2048, 1024), (1024, 4096, 2048), (8, 4096, 1), (300, 1200, 257)] {
            let band = Band::new(narrow, wide, bandwidth).unwrap();
            for (rows, cols) in [(128, 96), (256, 160), (128, 64)] {
                let tiling = Tiling { rows, cols, ..TILING };
                let tiles = tiling.tiles(&band);
                for (index, panel) in band.panels().iter().enumerate() {
                    let group = (index / tiling.group() * tiling.group()) as u32;
                    let own = tiles.iter().filter(|tile| tile[0] == group);
                    let first = own.clone().map(|tile| tile[2] as usize).min().unwrap();
                    let end = own.map(|tile| tile[2] as usize + cols).max().unwrap();
                    assert!(panel.is_empty() || first <= panel.col_start && end >= panel.col_start + panel.cols);
                }
                assert_eq!(summed(&tiles), (0..wide).step_by(rows).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn each_block_has_a_tile_and_so_have_rows_without_blocks() {
        let mut blocks = Blocks::none(256, 1024);
        for (row, col) in [(1, 3), (1, 0), (4, 2)] {
            blocks.keep(row, col);
        }
        let band = Band::of_blocks(256, 1024, blocks).unwrap();
        let tiles = Tiling { cols: 64, ..TILING }.tiles(&band);
        assert_eq!(tiles.len(), 3 + 6);
        assert_eq!(summed(&tiles), (0..1024).step_by(128).collect::<Vec<_>>());
    }

    #[test]
    fn whole_tiles_are_dealt_out_evenly_and_parts_as_many_as_there_is_room_for() {
        for (tiles, rows) in [(1, 64), (44, 8192), (132, 8192), (133, 8192), (1000, 40)] {
            for parts_each in [1, 2] {
                let tiling = Tiling { parts_each, ..TILING };
                let (deal, _) = tiling.deal(tiles, rows, 132);
                assert_eq!((deal.whole + deal.cut, deal.whole % 132), (tiles, 0));
                assert!(deal.parts >= 1 && deal.pieces() <= parts_each * 132);
                assert!(4 * deal.pieces() * tiling.piece() <= tiling.most_piece_bytes(132));
            }
        }
        // Three parts of 40 tiles keep 120 of 132 busy, four tiles over are worth many parts, and half of all cannot be halved.
        let parts = |tiles| TILING.deal(tiles, 8192, 132).0.parts;
        assert_eq!([40, 136, 88, 198].map(parts), [3, 16, 3, 2]);
    }
}
