//! What suits an adapter: tiles, how many threads keep it busy, and how slow it may be; and changes to that from outside.

use super::device::AdapterKind;
use crate::band::{ALIGN, PANEL_ROWS};
use crate::error::{Error, Result};

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

/// How many keys (or queries) attention's block of 64 queries (or keys) meets at a time, and a thread's share of these scores
/// (tm x tn): see `shaders/attention.wgsl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) span: usize,
    pub(super) tm: usize,
    pub(super) tn: usize,
}

/// What suits an adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tuning {
    /// Tiles of dense products by falling size.
    pub(super) dense: [Tile; 3],
    /// Tiles of the band's expand, as wide as one panel or two have rows: for many rows, and for few.
    pub(super) expand: [Tile; 2],
    /// Tiles of the band's contract: for many rows, and for few.
    pub(super) contract: [Tile; 2],
    /// The tile of the band's outer: the rows of one panel or two times some columns of their windows.
    pub(super) outer: Tile,
    /// Attention's forward, and its backward.
    pub(super) attention: [Share; 2],
    /// Threads from which on the adapter is busy: tiles are made smaller, or sums shared out, to get as many.
    pub(super) busy_threads: usize,
    /// Steps of the depth that products are unrolled by.
    pub(super) unroll: usize,
    /// Buffers of operands in workgroup memory, 1 or 2, where there is room.
    pub(super) buffers: usize,
    /// Workgroup memory, in bytes.
    pub(super) workgroup_bytes: usize,
    /// FLOP/s that a slow adapter of its kind reaches: work is cut into dispatches by it, so that none runs for long.
    pub(super) slow_flops: f64,
}

/// Workgroup memory in bytes: what every WebGPU adapter has, and what large ones have.
pub const WORKGROUP_SIZES: [usize; 2] = [16 << 10, 48 << 10];
/// Threads that a workgroup has at most, on every adapter.
const MAX_THREADS: usize = 256;
/// Threads that no adapter needs to be busy.
const MAX_BUSY: usize = 1 << 22;
/// Depth that a share of a sum has at least (less is not worth the sum over shares), and what it is a multiple of.
const SHARE_DEPTH: usize = 256;
const SHARE_ALIGN: usize = 32;

const fn tile([bm, bn, bk]: [usize; 3], [tm, tn]: [usize; 2]) -> Tile {
    Tile { bm, bn, bk, tm, tn }
}

/// For graphics hardware: 8 x 8 results a thread need the fewest loads from workgroup memory that its registers allow.
const HARDWARE: Tuning = Tuning {
    dense: [tile([128, 128, 8], [8, 8]), tile([64, 64, 8], [8, 8]), tile([32, 32, 16], [4, 4])],
    expand: [tile([128, 128, 8], [8, 8]), tile([32, 64, 16], [4, 4])],
    contract: [tile([128, 64, 8], [8, 8]), tile([32, 64, 16], [4, 4])],
    outer: tile([128, 64, 8], [8, 8]),
    attention: [Share { span: 64, tm: 8, tn: 4 }, Share { span: 32, tm: 4, tn: 4 }],
    busy_threads: 1 << 16,
    unroll: 8,
    buffers: 2,
    workgroup_bytes: WORKGROUP_SIZES[0],
    slow_flops: 1e12,
};

/// For lavapipe, where workgroup memory is memory like any other and a thread's own tile is what counts: up to twice as fast
/// as the tiles above (28 GFLOP/s on two cores, Mesa 26).
const SOFTWARE: Tuning = Tuning {
    dense: [tile([128, 64, 16], [16, 8]), tile([64, 64, 16], [8, 8]), tile([32, 32, 16], [8, 8])],
    expand: [tile([128, 64, 16], [16, 8]), tile([32, 64, 16], [8, 8])],
    contract: [tile([128, 64, 16], [16, 8]), tile([32, 64, 16], [8, 8])],
    outer: tile([64, 64, 16], [16, 8]),
    attention: [Share { span: 32, tm: 16, tn: 8 }; 2],
    busy_threads: 256,
    unroll: 1,
    buffers: 1,
    slow_flops: 8e9,
    ..HARDWARE
};

/// Every table there is.
pub(super) const TUNINGS: [Tuning; 2] = [HARDWARE, SOFTWARE];

impl Tuning {
    /// What suits adapters of this kind.
    pub fn of(kind: AdapterKind) -> Self {
        match kind {
            AdapterKind::Discrete => HARDWARE,
            AdapterKind::Integrated | AdapterKind::Virtual => {
                Self { busy_threads: 1 << 14, slow_flops: 1e11, ..HARDWARE }
            }
            AdapterKind::Other => Self { busy_threads: 1 << 14, slow_flops: 5e10, ..HARDWARE },
            AdapterKind::Software => SOFTWARE,
        }
    }

    /// The same with changes, `key=value` separated by semicolons. `dense`, `expand`, `contract` and `outer` take tiles
    /// (`128x64x8:8x8`: 128 rows x 64 columns of results, 8 of the depth at a time, 8 rows x 8 columns for a thread), the
    /// first ones of their list where there are several, separated by commas; `attention` takes `64x32:4x4` (64 queries meet
    /// 32 keys at a time, and a thread 4 x 4 of these), for its forward and its backward; `busy`, `unroll` and `buffers`
    /// numbers.
    ///
    /// # Errors
    /// [`Error::Usage`]: an unknown key, or a value that the kernels cannot be made with.
    pub fn with(mut self, changes: &str) -> Result<Self> {
        for change in changes.split(';').map(str::trim).filter(|change| !change.is_empty()) {
            let (key, value) = change.split_once('=').unwrap_or((change, ""));
            self.change(key.trim(), value.trim()).map_err(|why| {
                Error::usage(format!("'{change}' does not tune the wgpu backend: {why}; see bandtrain bench --help"))
            })?;
        }
        self.check().map_err(|why| Error::usage(format!("'{changes}' does not tune the wgpu backend: {why}")))?;
        Ok(self)
    }

    fn change(&mut self, key: &str, value: &str) -> std::result::Result<(), String> {
        match key {
            "dense" => replace(&mut self.dense, value, parse_tile),
            "expand" => replace(&mut self.expand, value, parse_tile),
            "contract" => replace(&mut self.contract, value, parse_tile),
            "outer" => replace(std::slice::from_mut(&mut self.outer), value, parse_tile),
            "attention" => replace(&mut self.attention, value, parse_share),
            "busy" => numbers(value).map(|[busy]| self.busy_threads = busy),
            "unroll" => numbers(value).map(|[unroll]| self.unroll = unroll),
            "buffers" => numbers(value).map(|[buffers]| self.buffers = buffers),
            _ => Err("the keys are dense, expand, contract, outer, attention, busy, unroll and buffers".to_string()),
        }
    }

    /// Whether kernels can be made with it; else why not.
    fn check(&self) -> std::result::Result<(), String> {
        let band = self.expand.iter().chain(&self.contract).chain([&self.outer]);
        self.dense.iter().chain(band.clone()).try_for_each(|tile| tile.check(self.workgroup_bytes))?;
        let panels = |extent: usize| extent == PANEL_ROWS || extent == 2 * PANEL_ROWS;
        if !self.expand.iter().all(|tile| panels(tile.bn)) || !panels(self.outer.bm) {
            return Err(format!("expand's columns and outer's rows are {PANEL_ROWS} or {}", 2 * PANEL_ROWS));
        }
        if band.clone().any(|tile| tile.bk > ALIGN) {
            return Err(format!("the band's depth goes up to {ALIGN} at a time"));
        }
        let fits = |&Share { span, tm, tn }: &Share| {
            [32, 64].contains(&span)
                && [4, 8, 16].contains(&tm)
                && [4, 8].contains(&tn)
                && 64 / tm * span / tn <= MAX_THREADS
        };
        if !self.attention.iter().all(fits) {
            return Err("attention is 64x32 or 64x64, a thread's share of it 4, 8 or 16 by 4 or 8".to_string());
        }
        if !(1..=MAX_BUSY).contains(&self.busy_threads)
            || ![1, 2].contains(&self.buffers)
            || ![1, 2, 4, 8, 16, 32].contains(&self.unroll)
        {
            return Err(format!("busy is 1 to {MAX_BUSY}, buffers 1 or 2, unroll a power of 2 up to 32"));
        }
        Ok(())
    }

    /// The same for workgroup memory of this size, at least the least of [`WORKGROUP_SIZES`].
    pub(super) fn within(self, workgroup_bytes: usize) -> Self {
        Self { workgroup_bytes, ..self }
    }

    /// The same for an adapter that is busy with fewer, or only with more threads.
    pub fn with_busy_threads(self, busy_threads: usize) -> Self {
        Self { busy_threads: busy_threads.max(1), ..self }
    }

    /// The same for an adapter that may be as slow as this many FLOP/s.
    pub fn with_slow_flops(self, slow_flops: f64) -> Self {
        Self { slow_flops: slow_flops.max(1.0), ..self }
    }

    /// The template's variables for products by `tile`.
    pub(super) fn variables(&self, tile: Tile) -> [(&'static str, u32); 8] {
        let Tile { bm, bn, bk, tm, tn } = tile;
        let buffers = if tile.bytes(2) <= self.workgroup_bytes { self.buffers } else { 1 };
        let unroll = self.unroll.min(bk);
        [
            ("bm", bm),
            ("bn", bn),
            ("bk", bk),
            ("tm", tm),
            ("tn", tn),
            ("threads", tile.threads()),
            ("buffers", buffers),
            ("unroll", unroll),
        ]
        .map(|(name, value)| (name, value as u32))
    }

    /// The largest tile of which a dense result has enough to keep the adapter busy, else the smallest.
    pub(super) fn for_result(&self, rows: usize, cols: usize) -> Tile {
        let busy = |tile: &Tile| tile.count(rows, cols) * tile.threads() >= self.busy_threads;
        self.dense.into_iter().find(busy).unwrap_or(self.dense[2])
    }

    /// The largest tile that a dense result fills, else the smallest.
    pub(super) fn filled_by(&self, rows: usize, cols: usize) -> Tile {
        self.dense.into_iter().find(|tile| rows >= tile.bm && cols >= tile.bn).unwrap_or(self.dense[2])
    }

    /// Into how many shares to cut sums of `depth` products so that `count` tiles keep the adapter busy, and each one's
    /// depth.
    pub(super) fn shares(&self, tile: Tile, count: usize, depth: usize) -> (usize, usize) {
        let threads = count.max(1) * tile.threads();
        let wanted = self.busy_threads.div_ceil(threads).min(depth / SHARE_DEPTH).max(1);
        let share = depth.div_ceil(wanted).next_multiple_of(SHARE_ALIGN);
        (depth.div_ceil(share).max(1), share)
    }

    /// The most elements that the shares of one product take: the threads of all shares but one are fewer than busy ones,
    /// and so are those of one share when there are more.
    pub(super) fn most_shares(&self) -> usize {
        let results = |tile: &Tile| tile.tm * tile.tn;
        let most = self.dense.iter().chain([&self.outer]).map(results).max().unwrap_or(0);
        2 * self.busy_threads * most
    }
}

impl Tile {
    /// Tiles of a result.
    pub(super) fn count(self, rows: usize, cols: usize) -> usize {
        rows.div_ceil(self.bm) * cols.div_ceil(self.bn)
    }

    /// FLOPs of one tile over `depth`.
    pub(super) fn flops(self, depth: usize) -> f64 {
        2.0 * (self.bm * self.bn) as f64 * depth as f64
    }

    pub(super) fn threads(self) -> usize {
        (self.bm / self.tm) * (self.bn / self.tn)
    }

    /// Workgroup memory of so many buffers of both operands.
    fn bytes(self, buffers: usize) -> usize {
        buffers * (self.bm + self.bn) * self.bk * size_of::<f32>()
    }

    fn check(&self, workgroup_bytes: usize) -> std::result::Result<(), String> {
        let Self { bm, bn, bk, tm, tn } = *self;
        let extent = |extent: usize| extent.is_multiple_of(32) && (32..=256).contains(&extent);
        if !extent(bm) || !extent(bn) || ![8, 16, 32].contains(&bk) {
            return Err("a tile's rows and columns are multiples of 32 up to 256, its depth is 8, 16 or 32".to_string());
        }
        let share =
            |share: usize, of: usize| share.is_multiple_of(4) && (4..=16).contains(&share) && of.is_multiple_of(share);
        if !share(tm, bm) || !share(tn, bn) || self.threads() > MAX_THREADS {
            return Err(format!(
                "a thread's rows and columns are 4, 8, 12 or 16 and divide the tile's, for at most {MAX_THREADS} threads"
            ));
        }
        if self.bytes(1) > workgroup_bytes {
            return Err(format!("a tile of {bm}x{bn}x{bk} does not fit {workgroup_bytes} bytes of workgroup memory"));
        }
        Ok(())
    }
}

/// Replaces the first tiles of `list` by those that `text` names.
fn replace<T>(list: &mut [T], text: &str, parse: fn(&str) -> Option<T>) -> std::result::Result<(), String> {
    let named: Vec<&str> = text.split(',').collect();
    if named.len() > list.len() {
        return Err(format!("it has {} tiles, but there are only {}", named.len(), list.len()));
    }
    for (tile, text) in list.iter_mut().zip(named) {
        *tile = parse(text.trim()).ok_or_else(|| format!("'{text}' is no tile of its kind"))?;
    }
    Ok(())
}

fn parse_tile(text: &str) -> Option<Tile> {
    let (group, thread) = text.split_once(':')?;
    Some(tile(numbers(group).ok()?, numbers(thread).ok()?))
}

fn parse_share(text: &str) -> Option<Share> {
    let (group, thread) = text.split_once(':')?;
    let ([64, span], [tm, tn]) = (numbers(group).ok()?, numbers(thread).ok()?) else { return None };
    Some(Share { span, tm, tn })
}

/// Numbers separated by `x`.
fn numbers<const N: usize>(text: &str) -> std::result::Result<[usize; N], String> {
    let parsed: Option<Vec<usize>> = text.split('x').map(|number| number.parse().ok()).collect();
    let wrong = || format!("'{text}' is not a number");
    parsed.and_then(|numbers| numbers.try_into().ok()).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_the_depth_and_no_more() {
        for busy in [1, 1024, 1 << 16] {
            let tuning = HARDWARE.with_busy_threads(busy);
            for (count, depth) in [(96, 8192), (1, 8192), (1000, 8192), (4, 100), (1, 1)] {
                let (shares, share) = tuning.shares(tuning.dense[0], count, depth);
                assert!(share % 32 == 0 && shares * share >= depth && (shares - 1) * share < depth, "{count} {depth}");
                let elements = if shares > 1 { shares * count * 128 * 128 } else { 0 };
                assert!(elements <= tuning.most_shares(), "{busy} {count} {depth}: {elements}");
            }
        }
        assert_eq!(HARDWARE.shares(HARDWARE.dense[0], 96, 8192), (3, 2752));
        assert_eq!(SOFTWARE.shares(SOFTWARE.dense[0], 96, 8192).0, 1);
    }

    #[test]
    fn small_results_get_small_tiles() {
        assert_eq!(HARDWARE.for_result(8192, 1536), HARDWARE.dense[0]);
        assert_eq!(SOFTWARE.for_result(39, 40), SOFTWARE.dense[2]);
        assert_eq!(HARDWARE.filled_by(64, 100), HARDWARE.dense[1]);
    }

    #[test]
    fn kernels_can_be_made_with_every_table_and_fit_any_adapter() {
        for tuning in TUNINGS {
            assert_eq!(tuning.check(), Ok(()));
            for tile in [&tuning.dense[..], &tuning.expand, &tuning.contract, &[tuning.outer]].concat() {
                let buffers = |bytes| tuning.within(bytes).variables(tile)[6].1 as usize;
                let [least, large] = WORKGROUP_SIZES;
                assert!(tile.bytes(buffers(least)) <= least);
                assert_eq!(buffers(large), tuning.buffers);
            }
        }
    }

    #[test]
    fn changes_are_taken() {
        let tuned =
            HARDWARE.with(" dense=128x64x16:8x8 ; outer=64x96x8:8x4;attention=64x64:8x4;busy=7;unroll=4;").unwrap();
        assert_eq!(tuned.dense, [tile([128, 64, 16], [8, 8]), HARDWARE.dense[1], HARDWARE.dense[2]]);
        assert_eq!(tuned.outer, tile([64, 96, 8], [8, 4]));
        assert_eq!(tuned.attention, [Share { span: 64, tm: 8, tn: 4 }, HARDWARE.attention[1]]);
        assert_eq!((tuned.busy_threads, tuned.unroll, tuned.buffers), (7, 4, HARDWARE.buffers));
        assert_eq!(HARDWARE.with("").unwrap(), HARDWARE);
        assert!(HARDWARE.with("dense=128x128x32:8x8").is_err());
        assert!(HARDWARE.within(32 << 10).with("dense=128x128x32:8x8").is_ok());
    }

    #[test]
    fn changes_that_make_no_kernel_are_sentences() {
        for (changes, why) in [
            ("fast", "the keys are dense"),
            ("dense=8", "'8' is no tile"),
            ("dense=64x64x8:8", "no tile"),
            ("dense=1x1x1:1x1,2,3,4", "there are only 3"),
            ("dense=96x100x8:8x4", "multiples of 32"),
            ("dense=256x256x8:8x8", "at most 256 threads"),
            ("dense=64x64x8:0x8", "a thread's rows"),
            ("dense=64x64x8:99999999999999999999x8", "no tile"),
            ("expand=128x96x8:8x8", "expand's columns"),
            ("contract=64x64x32:8x8", "the band's depth"),
            ("outer=32x64x8:8x8", "outer's rows"),
            ("attention=4x4", "no tile"),
            ("attention=32x32:4x4", "no tile"),
            ("attention=64x32:5x4", "attention is"),
            ("busy=-1", "'-1' is not a number"),
            ("busy=0", "busy is 1 to"),
            ("busy=9999999", "busy is 1 to"),
            ("unroll=3", "unroll a power of 2"),
        ] {
            let error = HARDWARE.with(changes).unwrap_err();
            assert!(error.to_string().contains(why) && error.exit_code() == 2, "{changes}: {error}");
        }
    }
}
