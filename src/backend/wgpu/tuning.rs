//! What suits an adapter: tiles, how many workgroups keep it busy, and how slow it may be.

use super::device::AdapterKind;
use crate::band::{COLUMN_TILE, PANEL_ROWS};

/// What a workgroup computes (bm x bn results, bk of the depth at a time), and what a thread of it (tm x tn): see
/// `shaders/matrix.wgsl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) bm: usize,
    pub(super) bn: usize,
    pub(super) bk: usize,
    pub(super) tm: usize,
    pub(super) tn: usize,
}

/// What suits an adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tuning {
    /// Tiles of dense products by falling size.
    pub(super) dense: [Tile; 3],
    /// Tiles of the band's expand and contract, as wide as a panel has rows and a column tile columns: for many rows, and
    /// for few.
    pub(super) band: [Tile; 2],
    /// The tile of the band's outer: a panel's rows times some columns of its window.
    pub(super) outer: Tile,
    /// Scores of a thread in attention: queries (or keys) by keys (or queries).
    pub(super) attention: [usize; 2],
    /// Workgroups from which on the adapter is busy: tiles are made smaller, or sums shared out, to get as many.
    pub(super) busy_groups: usize,
    /// FLOP/s that a slow adapter of its kind reaches: work is cut into dispatches by it, so that none runs for long.
    pub(super) slow_flops: f64,
}

/// For graphics hardware. The first dense tile was the fastest of those that fit 16 KiB and 256 threads on an H100 through
/// Vulkan (34 TFLOP/s at 4096^3); the others are for results too small to keep an adapter busy with it.
const HARDWARE: Tuning = Tuning {
    dense: [
        Tile { bm: 64, bn: 128, bk: 16, tm: 8, tn: 4 },
        Tile { bm: 64, bn: 64, bk: 16, tm: 8, tn: 4 },
        Tile { bm: 32, bn: 32, bk: 16, tm: 4, tn: 4 },
    ],
    band: [
        Tile { bm: 128, bn: PANEL_ROWS, bk: 16, tm: 8, tn: 4 },
        Tile { bm: 32, bn: COLUMN_TILE, bk: 16, tm: 4, tn: 4 },
    ],
    outer: Tile { bm: PANEL_ROWS, bn: 64, bk: 16, tm: 8, tn: 4 },
    attention: [4, 4],
    busy_groups: 256,
    slow_flops: 1e12,
};

/// For lavapipe, where workgroup memory is memory like any other and a thread's own tile is what counts: up to twice as fast
/// as the tiles above (28 GFLOP/s on two cores, Mesa 26).
const SOFTWARE: Tuning = Tuning {
    dense: [
        Tile { bm: 128, bn: 64, bk: 16, tm: 16, tn: 8 },
        Tile { bm: 64, bn: 64, bk: 16, tm: 8, tn: 8 },
        Tile { bm: 32, bn: 32, bk: 16, tm: 8, tn: 8 },
    ],
    band: [
        Tile { bm: 128, bn: PANEL_ROWS, bk: 16, tm: 16, tn: 8 },
        Tile { bm: 32, bn: COLUMN_TILE, bk: 16, tm: 8, tn: 8 },
    ],
    outer: Tile { bm: PANEL_ROWS, bn: 64, bk: 16, tm: 16, tn: 8 },
    attention: [16, 8],
    busy_groups: 4,
    slow_flops: 8e9,
};

/// Every table there is.
pub(super) const TUNINGS: [Tuning; 2] = [HARDWARE, SOFTWARE];

impl Tuning {
    /// What suits adapters of this kind.
    pub fn of(kind: AdapterKind) -> Self {
        match kind {
            AdapterKind::Discrete => HARDWARE,
            AdapterKind::Integrated | AdapterKind::Virtual => Self { busy_groups: 64, slow_flops: 1e11, ..HARDWARE },
            AdapterKind::Other => Self { busy_groups: 64, slow_flops: 5e10, ..HARDWARE },
            AdapterKind::Software => SOFTWARE,
        }
    }

    /// The same for an adapter that is busy with fewer, or only with more workgroups.
    pub fn with_busy_groups(self, busy_groups: usize) -> Self {
        Self { busy_groups: busy_groups.max(1), ..self }
    }

    /// The largest tile of which a dense result has enough to keep the adapter busy, else the smallest.
    pub(super) fn for_result(&self, rows: usize, cols: usize) -> Tile {
        self.dense.into_iter().find(|tile| tile.count(rows, cols) >= self.busy_groups).unwrap_or(self.dense[2])
    }

    /// The largest tile that a dense result fills, else the smallest.
    pub(super) fn filled_by(&self, rows: usize, cols: usize) -> Tile {
        self.dense.into_iter().find(|tile| rows >= tile.bm && cols >= tile.bn).unwrap_or(self.dense[2])
    }

    /// Into how many shares to cut sums of `depth` products so that `tiles` tiles keep the adapter busy, and each one's
    /// depth.
    pub(super) fn shares(&self, tiles: usize, depth: usize) -> (usize, usize) {
        let wanted = self.busy_groups.div_ceil(tiles.max(1)).min(depth / SHARE_DEPTH).max(1);
        let share = depth.div_ceil(wanted).next_multiple_of(16);
        (depth.div_ceil(share).max(1), share)
    }

    /// The most elements that the shares of one product take: there are fewer than busy + tiles tiles in all shares, and
    /// fewer tiles than busy ones when there is more than one share.
    pub(super) fn most_shares(&self) -> usize {
        2 * self.busy_groups * self.dense[0].bm * self.dense[0].bn
    }
}

/// Depth that a share of a sum has at least: less is not worth the sum over shares.
const SHARE_DEPTH: usize = 256;

impl Tile {
    /// The template's variables.
    pub(super) fn variables(self) -> [(&'static str, u32); 6] {
        let Tile { bm, bn, bk, tm, tn } = self;
        let threads = (bm / tm) * (bn / tn);
        [("bm", bm), ("bn", bn), ("bk", bk), ("tm", tm), ("tn", tn), ("threads", threads)]
            .map(|(name, value)| (name, value as u32))
    }

    /// Tiles of a result.
    pub(super) fn count(self, rows: usize, cols: usize) -> usize {
        rows.div_ceil(self.bm) * cols.div_ceil(self.bn)
    }

    /// FLOPs of one tile over `depth`.
    pub(super) fn flops(self, depth: usize) -> f64 {
        2.0 * (self.bm * self.bn) as f64 * depth as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_the_depth_and_no_more() {
        for busy in [1, 4, 256] {
            let tuning = HARDWARE.with_busy_groups(busy);
            for (tiles, depth) in [(96, 8192), (1, 8192), (1000, 8192), (4, 100), (1, 1)] {
                let (count, share) = tuning.shares(tiles, depth);
                assert!(share % 16 == 0 && count * share >= depth && (count - 1) * share < depth, "{tiles} {depth}");
            }
        }
        assert_eq!(HARDWARE.shares(96, 8192), (3, 2736));
        assert_eq!(SOFTWARE.shares(96, 8192).0, 1);
    }

    #[test]
    fn small_results_get_small_tiles() {
        assert_eq!(HARDWARE.for_result(8192, 1536), HARDWARE.dense[0]);
        assert_eq!(SOFTWARE.for_result(39, 40), SOFTWARE.dense[2]);
        assert_eq!(HARDWARE.filled_by(64, 100), HARDWARE.dense[1]);
    }

    #[test]
    fn tiles_divide_into_threads_and_the_bands_fit_its_geometry() {
        for tuning in TUNINGS {
            for tile in [&tuning.dense[..], &tuning.band, &[tuning.outer]].concat() {
                assert!(tile.tm % 4 == 0 && tile.tn % 4 == 0 && tile.bk % 4 == 0, "{tile:?}");
                assert!(tile.bm % tile.tm == 0 && tile.bn % tile.tn == 0, "{tile:?}");
            }
            assert!(tuning.band.iter().all(|tile| tile.bn == PANEL_ROWS && tile.bn == COLUMN_TILE && tile.bk == 16));
            assert_eq!(tuning.outer.bm, PANEL_ROWS);
        }
    }
}
