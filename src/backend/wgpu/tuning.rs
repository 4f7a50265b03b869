//! What suits an adapter: tiles, how many threads keep it busy, and how slow it may be; and changes to that from outside.

use super::device::{AdapterInfo, AdapterKind};
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
    /// Tiles of the band's expand, as wide as one panel or two have rows: for much work, and for little.
    pub(super) expand: [Tile; 2],
    /// Tiles of the band's contract: for much work, and for little.
    pub(super) contract: [Tile; 2],
    /// The tile of the band's outer: the rows of one panel or two times some columns of their windows.
    pub(super) outer: Tile,
    /// Attention's forward, and its backward for queries and for keys.
    pub(super) attention: [Share; 3],
    /// Whether, for each of these, a block's operands stay in workgroup memory where there is room: without, more blocks do.
    pub(super) held: [bool; 3],
    /// Threads from which on the adapter is busy: tiles are made smaller, or sums shared out, to get as many.
    pub(super) busy_threads: usize,
    /// Steps of the depth that products are unrolled by.
    pub(super) unroll: usize,
    /// Buffers of operands in workgroup memory, 1 or 2, where there is room.
    pub(super) buffers: usize,
    /// Invocations of a subgroup that load a thread's rows for each other, straight from memory; 0: the threads of a workgroup
    /// share theirs through its memory.
    pub(super) subgroup: usize,
    /// Threads that share a short row, where one sums up a row.
    pub(super) row_threads: usize,
    /// Columns of the slices of a band's tile that are skipped where the band does not touch them.
    pub(super) slice: usize,
    /// MiB of logits that exist at one time, at most.
    pub(super) logits: usize,
    /// Workgroup memory, in bytes.
    pub(super) workgroup_bytes: usize,
    /// FLOP/s that a slow adapter of its kind reaches: work is cut into dispatches by it, so that none runs for long.
    pub(super) slow_flops: f64,
}

/// Workgroup memory in bytes: what every WebGPU adapter has, and what large ones have.
pub const WORKGROUP_SIZES: [usize; 2] = [16 << 10, 48 << 10];
/// Threads that a workgroup has at most, on every adapter.
const MAX_THREADS: usize = 256;
/// What can be changed from outside.
const KEYS: &str = "dense, expand, contract, outer, attention, held, busy, unroll, buffers, slice and logits";
/// MiB of logits that no adapter needs at a time.
const MAX_LOGITS: usize = 1 << 14;
/// Threads that no adapter needs to be busy.
const MAX_BUSY: usize = 1 << 22;
/// Registers that one of an adapter's processors has, those that a thread takes beside its results, and how many threads of
/// 8 x 8 results the processor holds by that: what [`Tuning::busy_threads`] is counted in.
const CORE_REGISTERS: usize = 1 << 16;
const OTHER_REGISTERS: usize = 64;
const CORE_THREADS: usize = CORE_REGISTERS / (8 * 8 + OTHER_REGISTERS);
/// Depth that a group's part of a sum has at least: less is not worth the sum over parts.
const LEAST_DEPTH: usize = 256;

const fn tile([bm, bn, bk]: [usize; 3], [tm, tn]: [usize; 2]) -> Tile {
    Tile { bm, bn, bk, tm, tn }
}

/// How many processors cards have whose names contain this; no interface tells.
const PROCESSORS: [(&str, usize); 3] = [("H100 PCIe", 114), ("H100", 132), ("H200", 132)];

/// For graphics hardware: 8 x 8 results a thread need the fewest loads from workgroup memory that its registers allow.
const HARDWARE: Tuning = Tuning {
    dense: [tile([128, 128, 8], [8, 8]), tile([64, 64, 8], [8, 8]), tile([32, 32, 16], [4, 4])],
    expand: [tile([256, 64, 8], [8, 8]), tile([32, 64, 16], [4, 4])],
    contract: [tile([128, 128, 8], [8, 8]), tile([32, 64, 16], [4, 4])],
    outer: tile([128, 96, 8], [8, 12]),
    attention: [Share { span: 64, tm: 4, tn: 4 }, Share { span: 32, tm: 4, tn: 4 }, Share { span: 32, tm: 4, tn: 4 }],
    held: [true, true, false],
    busy_threads: 128 * CORE_THREADS,
    unroll: 8,
    buffers: 2,
    subgroup: 0,
    row_threads: 32,
    slice: 32,
    logits: LOGITS[0],
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
    attention: [Share { span: 32, tm: 16, tn: 8 }; 3],
    held: [true; 3],
    busy_threads: 256,
    unroll: 1,
    buffers: 1,
    row_threads: 8,
    slow_flops: 8e9,
    ..HARDWARE
};

/// The same where a subgroup is a vector of 8: a load takes as long as one for each lane, and what one lane has loaded costs
/// the others nothing. More results a thread than fit the processor's registers do not pay.
const SOFTWARE_VECTORS: Tuning = Tuning {
    dense: [tile([64, 64, 8], [16, 8]), tile([32, 64, 8], [16, 8]), tile([32, 32, 8], [16, 4])],
    expand: [tile([64, 64, 8], [16, 8]), tile([32, 64, 8], [16, 8])],
    contract: [tile([64, 64, 8], [16, 8]), tile([32, 64, 8], [16, 8])],
    outer: tile([64, 64, 8], [16, 8]),
    attention: [Share { span: 32, tm: 32, tn: 4 }; 3],
    subgroup: 8,
    ..SOFTWARE
};

/// MiB of logits: what every adapter has memory for, and where more no longer pays.
const LOGITS: [usize; 2] = [128, 1024];

/// Every table there is.
pub(super) const TUNINGS: [Tuning; 3] = [HARDWARE, SOFTWARE, SOFTWARE_VECTORS];

impl Tuning {
    /// What suits this adapter.
    pub fn suiting(adapter: &AdapterInfo) -> Self {
        let vectors = adapter.subgroup == Some(SOFTWARE_VECTORS.subgroup);
        let known = PROCESSORS.into_iter().find(|(name, _)| adapter.name.contains(name));
        match (adapter.kind, known) {
            (AdapterKind::Software, _) if vectors => SOFTWARE_VECTORS,
            (kind, Some((_, processors))) => Self::of(kind).with_busy_threads(processors * CORE_THREADS),
            (kind, None) => Self::of(kind),
        }
    }

    /// What suits adapters of this kind, whatever their subgroups are.
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
    /// 32 keys at a time, and a thread 4 x 4 of these), for its forward and its backward for queries and for keys; `held` 0 or
    /// 1 for each of these; `busy`, `unroll`, `buffers`, `slice` and `logits` (MiB of them at a time) a number.
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
            "dense" => replace(&mut self.dense, value, TILE, parse_tile),
            "expand" => replace(&mut self.expand, value, TILE, parse_tile),
            "contract" => replace(&mut self.contract, value, TILE, parse_tile),
            "outer" => replace(std::slice::from_mut(&mut self.outer), value, TILE, parse_tile),
            "attention" => replace(&mut self.attention, value, TILE, parse_share),
            "held" => replace(&mut self.held, value, "0 or 1", parse_switch),
            "busy" => numbers(value).map(|[busy]| self.busy_threads = busy),
            "unroll" => numbers(value).map(|[unroll]| self.unroll = unroll),
            "buffers" => numbers(value).map(|[buffers]| self.buffers = buffers),
            "slice" => numbers(value).map(|[slice]| self.slice = slice),
            "logits" => numbers(value).map(|[logits]| self.logits = logits),
            _ => Err(format!("the keys are {KEYS}")),
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
                && [4, 8, 16, 32].contains(&tm)
                && [4, 8].contains(&tn)
                && 64 / tm * span / tn <= MAX_THREADS
        };
        if !self.attention.iter().all(fits) {
            return Err("attention is 64x32 or 64x64, a thread's share of it 4, 8, 16 or 32 by 4 or 8".to_string());
        }
        if !(1..=MAX_BUSY).contains(&self.busy_threads)
            || ![1, 2].contains(&self.buffers)
            || ![1, 2, 4, 8, 16, 32].contains(&self.unroll)
            || ![32, 64, 128].contains(&self.slice)
            || !(1..=MAX_LOGITS).contains(&self.logits)
        {
            return Err(format!(
                "busy is 1 to {MAX_BUSY}, buffers 1 or 2, unroll a power of 2 up to 32, slice 32, 64 or 128, logits 1 to {MAX_LOGITS}"
            ));
        }
        let subgroup = |rows: usize, across: usize| {
            self.subgroup == 0 || (rows / 4 <= self.subgroup && across.is_multiple_of(self.subgroup))
        };
        if !self.dense.iter().chain(band).all(|tile| subgroup(tile.tm, tile.bn / tile.tn))
            || !self.attention.iter().all(|share| subgroup(share.tm, share.span / share.tn))
        {
            return Err(format!(
                "a thread's columns go a multiple of {0} times into a tile's where {0} lanes share up to {1} rows",
                self.subgroup,
                4 * self.subgroup
            ));
        }
        Ok(())
    }

    /// The same for workgroup memory of this size, at least the least of [`WORKGROUP_SIZES`].
    pub(super) fn within(self, workgroup_bytes: usize) -> Self {
        Self { workgroup_bytes, ..self }
    }

    /// The same for an adapter whose own memory has so many bytes: a 64th of it may be logits.
    pub(super) fn with_memory(self, bytes: Option<usize>) -> Self {
        let [least, most] = LOGITS;
        Self { logits: bytes.map_or(least, |bytes| ((bytes >> 20) / 64).clamp(least, most)), ..self }
    }

    /// The same for an adapter that is busy with fewer, or only with more threads.
    pub fn with_busy_threads(self, busy_threads: usize) -> Self {
        Self { busy_threads: busy_threads.max(1), ..self }
    }

    /// The same for an adapter that may be as slow as this many FLOP/s.
    pub fn with_slow_flops(self, slow_flops: f64) -> Self {
        Self { slow_flops: slow_flops.max(1.0), ..self }
    }

    /// The columns of a slice of a band's tile, at least `least`: as many as are skipped together, if the threads of so many
    /// are whole subgroups, else all. Where lanes share their rows a tile is as small as a slice.
    pub(super) fn slice_of(&self, tile: Tile, least: usize) -> usize {
        if self.subgroup > 0 {
            return tile.bn;
        }
        let slice = self.slice.max(least).min(tile.bn);
        let threads = slice / tile.tn * (tile.bm / tile.tm);
        let whole = tile.bn.is_multiple_of(slice) && slice.is_multiple_of(tile.tn) && threads.is_multiple_of(32);
        if whole { slice } else { tile.bn }
    }

    /// The template's variables for products by `tile`.
    pub(super) fn variables(&self, tile: Tile) -> [(&'static str, u32); 9] {
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
            ("subgroup", self.subgroup),
        ]
        .map(|(name, value)| (name, value as u32))
    }

    /// The largest tile of which a dense result has enough to keep the adapter busy, else the smallest.
    pub(super) fn for_result(&self, rows: usize, cols: usize) -> Tile {
        let busy = |tile: &Tile| self.is_busy_with(*tile, tile.count(rows, cols));
        self.dense.into_iter().find(busy).unwrap_or(self.dense[2])
    }

    /// Whether so many groups of a tile's threads are three quarters of what the adapter holds at once, which are fewer where
    /// a thread has more results: smaller tiles do more work than would be won.
    pub(super) fn is_busy_with(&self, tile: Tile, groups: usize) -> bool {
        4 * groups >= 3 * self.resident(tile)
    }

    /// The largest tile that a dense result fills, else the smallest.
    pub(super) fn filled_by(&self, rows: usize, cols: usize) -> Tile {
        self.dense.into_iter().find(|tile| rows >= tile.bm && cols >= tile.bn).unwrap_or(self.dense[2])
    }

    /// How many groups of a tile's threads the adapter holds at once.
    fn resident(&self, tile: Tile) -> usize {
        match self.busy_threads / CORE_THREADS {
            0 => (self.busy_threads / tile.threads()).max(1),
            cores => cores * (CORE_REGISTERS / (tile.tm * tile.tn + OTHER_REGISTERS) / tile.threads()).max(1),
        }
    }

    /// How to deal `count` tiles of sums of `depth` products out to groups. Each tile is one group's if the adapter holds no
    /// more of them at once; else as many groups' as it holds, so that all begin and end together.
    pub(super) fn deal(&self, tile: Tile, count: usize, depth: usize) -> Deal {
        let (count, tile_steps) = (count.max(1), depth.div_ceil(tile.bk).max(1));
        let most = count * tile_steps / (LEAST_DEPTH / tile.bk);
        let groups = self.resident(tile).min(most).max(count);
        // Whole groups for every tile take fewer registers, and are as good where they leave little of the adapter idle.
        let shares = groups / count;
        if shares == 1 && groups == count || 10 * shares * count >= 9 * groups {
            return Deal { tiles: count, tile_steps, group_steps: tile_steps.div_ceil(shares), shares, even: true };
        }
        Deal::one_list(count, tile_steps, (count * tile_steps).div_ceil(groups))
    }

    /// The most elements that the parts of one product's tiles take: each of the groups that an adapter holds makes one, and
    /// each of the fewer tiles begins and ends in the middle of a group.
    pub(super) fn most_shares(&self) -> usize {
        let results = |tile: &Tile| self.resident(*tile) * tile.bm * tile.bn;
        3 * self.dense.iter().chain([&self.outer]).map(results).max().unwrap_or(0)
    }
}

/// The steps of tiles' depths, dealt out to groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Deal {
    tiles: usize,
    /// Steps of a tile, and of a group.
    tile_steps: usize,
    group_steps: usize,
    /// Groups that a tile falls to at most: the parts that its sums come in.
    pub(super) shares: usize,
    /// Whether every tile has groups of its own, as many as the others.
    pub(super) even: bool,
}

impl Deal {
    /// As one list of all tiles' steps.
    fn one_list(tiles: usize, tile_steps: usize, group_steps: usize) -> Self {
        let group_of = |step: usize| step / group_steps;
        let shares = |tile: usize| group_of((tile + 1) * tile_steps - 1) - group_of(tile * tile_steps) + 1;
        let shares = (0..tiles).map(shares).max().unwrap_or(1);
        Self { tiles, tile_steps, group_steps, shares, even: false }
    }

    pub(super) fn groups(self) -> usize {
        if self.even { self.tiles * self.shares } else { (self.tiles * self.tile_steps).div_ceil(self.group_steps) }
    }

    /// A kernel's parameters; the parts of its result are `share_stride` elements apart.
    pub(super) fn words(self, share_stride: usize) -> [usize; 5] {
        [self.tiles, self.tile_steps, self.group_steps, self.shares, share_stride]
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
            |share: usize, of: usize| share.is_multiple_of(4) && (4..=32).contains(&share) && of.is_multiple_of(share);
        if !share(tm, bm) || !share(tn, bn) || self.threads() > MAX_THREADS {
            return Err(format!(
                "a thread's rows and columns are multiples of 4 up to 32 and divide the tile's, for at most {MAX_THREADS} threads"
            ));
        }
        if self.bytes(1) > workgroup_bytes {
            return Err(format!("a tile of {bm}x{bn}x{bk} does not fit {workgroup_bytes} bytes of workgroup memory"));
        }
        Ok(())
    }
}

/// Replaces the first tiles of `list` by those that `text` names.
fn replace<T>(list: &mut [T], text: &str, what: &str, parse: fn(&str) -> Option<T>) -> std::result::Result<(), String> {
    let named: Vec<&str> = text.split(',').collect();
    if named.len() > list.len() {
        return Err(format!("it has {} values, but there are only {}", named.len(), list.len()));
    }
    for (value, text) in list.iter_mut().zip(named) {
        *value = parse(text.trim()).ok_or_else(|| format!("'{text}' is not {what}"))?;
    }
    Ok(())
}

/// What a value that [`parse_tile`] or [`parse_share`] refuses is not.
const TILE: &str = "a tile of its kind";

fn parse_switch(text: &str) -> Option<bool> {
    match text {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
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

    fn adapter(name: &str, kind: AdapterKind, subgroup: Option<usize>) -> AdapterInfo {
        let (backend, driver, name) = ("Vulkan".to_string(), String::new(), name.to_string());
        AdapterInfo { index: 0, name, kind, backend, driver, limits: Vec::new(), features: Vec::new(), subgroup }
    }

    #[test]
    fn a_card_is_known_by_its_name_and_a_processor_by_its_vectors() {
        let tuning = |name, kind, subgroup| Tuning::suiting(&adapter(name, kind, subgroup));
        let card = |name| tuning(name, AdapterKind::Discrete, Some(32)).busy_threads / CORE_THREADS;
        assert_eq!(card("NVIDIA H100 80GB HBM3"), 132);
        assert_eq!(card("NVIDIA H100 PCIe"), 114);
        assert_eq!(card("Big Card"), 128);
        assert_eq!(tuning("llvmpipe", AdapterKind::Software, Some(8)), SOFTWARE_VECTORS);
        assert_eq!(tuning("llvmpipe", AdapterKind::Software, Some(4)), SOFTWARE);
        assert_eq!(tuning("llvmpipe", AdapterKind::Software, None), SOFTWARE);
        assert_eq!(tuning("Small Chip", AdapterKind::Integrated, Some(8)), Tuning::of(AdapterKind::Integrated));
    }

    #[test]
    fn tiles_are_large_where_they_nearly_fill_the_adapter() {
        let card = HARDWARE.with_busy_threads(132 * CORE_THREADS);
        assert_eq!(card.for_result(8192, 512), card.dense[0]);
        assert_eq!(card.for_result(8192, 256), card.dense[2]);
        assert_eq!(card.with_busy_threads(1).for_result(1, 1), card.dense[0]);
        // 12 x 8 results a thread: three blocks of 128 threads are on a processor, not four.
        let contract = tile([192, 64, 8], [12, 8]);
        assert!(card.is_busy_with(contract, 344) && !card.is_busy_with(contract, 296));
    }

    #[test]
    fn dealt_parts_are_equal_fill_the_adapter_and_fit_their_memory() {
        for busy in [1, 300, 1024, 1 << 16] {
            let tuning = HARDWARE.with_busy_threads(busy);
            for (count, depth) in [(96, 8192), (1, 8192), (1000, 8192), (250, 1000), (4, 100), (1, 1), (3, 0)] {
                for tile in [tuning.dense[0], tuning.outer] {
                    let deal = tuning.deal(tile, count, depth);
                    assert!(deal.groups() * deal.group_steps >= count * deal.tile_steps, "{count} {depth}");
                    assert!(deal.shares * deal.group_steps >= deal.tile_steps, "{count} {depth}");
                    assert!(deal.groups() <= tuning.resident(tile).max(count), "{count} {depth}");
                    let elements = if deal.shares > 1 { deal.shares * count * tile.bm * tile.bn } else { 0 };
                    assert!(elements <= tuning.most_shares(), "{busy} {count} {depth}: {elements}");
                }
            }
        }
        let shares = |tile, count| {
            let deal = HARDWARE.deal(tile, count, 8192);
            (deal.groups(), deal.group_steps, deal.shares, deal.even)
        };
        assert_eq!(shares(HARDWARE.dense[0], 64), (256, 256, 4, true));
        assert_eq!(shares(HARDWARE.dense[0], 48), (240, 205, 5, true));
        assert_eq!(shares(HARDWARE.dense[0], 96), (256, 384, 4, false));
        assert_eq!(shares(HARDWARE.dense[0], 300), (300, 1024, 1, true));
        assert_eq!(shares(HARDWARE.outer, 44), (352, 128, 8, true));
        assert_eq!(SOFTWARE.deal(SOFTWARE.dense[0], 96, 8192).shares, 1);
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
    fn large_memories_have_room_for_many_logits() {
        let logits = |bytes| HARDWARE.with_memory(bytes).logits;
        assert_eq!([None, Some(2 << 30), Some(24 << 30), Some(80 << 30)].map(logits), [128, 128, 384, 1024]);
    }

    #[test]
    fn changes_are_taken() {
        let tuned =
            HARDWARE.with(" dense=128x64x16:8x8 ; outer=64x96x8:8x4;attention=64x64:8x4;busy=7;unroll=4;").unwrap();
        assert_eq!(tuned.dense, [tile([128, 64, 16], [8, 8]), HARDWARE.dense[1], HARDWARE.dense[2]]);
        assert_eq!(tuned.outer, tile([64, 96, 8], [8, 4]));
        assert_eq!(tuned.attention, [Share { span: 64, tm: 8, tn: 4 }, HARDWARE.attention[1], HARDWARE.attention[2]]);
        assert_eq!(HARDWARE.with("held=0,0,1").unwrap().held, [false, false, true]);
        assert_eq!((tuned.busy_threads, tuned.unroll, tuned.buffers), (7, 4, HARDWARE.buffers));
        assert_eq!(HARDWARE.with("").unwrap(), HARDWARE);
        assert!(HARDWARE.with("dense=128x128x32:8x8").is_err());
        assert!(HARDWARE.within(32 << 10).with("dense=128x128x32:8x8").is_ok());
    }

    #[test]
    fn lanes_share_no_more_rows_than_they_are_and_whole_subgroups_do() {
        for (changes, fine) in
            [("dense=64x64x8:32x8", true), ("dense=64x32x8:16x8", false), ("attention=64x32:4x8", false)]
        {
            assert_eq!(SOFTWARE_VECTORS.with(changes).is_ok(), fine, "{changes}");
        }
        let four = Tuning { subgroup: 4, ..SOFTWARE };
        assert!(four.with("dense=64x64x8:32x8").unwrap_err().to_string().contains("4 lanes share up to 16 rows"));
    }

    #[test]
    fn changes_that_make_no_kernel_are_sentences() {
        for (changes, why) in [
            ("fast", "the keys are dense"),
            ("dense=8", "'8' is not a tile"),
            ("dense=64x64x8:8", "not a tile"),
            ("dense=1x1x1:1x1,2,3,4", "there are only 3"),
            ("dense=96x100x8:8x4", "multiples of 32"),
            ("dense=256x256x8:8x8", "at most 256 threads"),
            ("dense=64x64x8:0x8", "a thread's rows"),
            ("dense=64x64x8:99999999999999999999x8", "not a tile"),
            ("expand=128x96x8:8x8", "expand's columns"),
            ("contract=64x64x32:8x8", "the band's depth"),
            ("outer=32x64x8:8x8", "outer's rows"),
            ("attention=4x4", "not a tile"),
            ("attention=32x32:4x4", "not a tile"),
            ("attention=64x32:5x4", "attention is"),
            ("held=1,2", "'2' is not 0 or 1"),
            ("held=1,0,1,1", "4 values, but there are only 3"),
            ("busy=-1", "'-1' is not a number"),
            ("busy=0", "busy is 1 to"),
            ("busy=9999999", "busy is 1 to"),
            ("unroll=3", "unroll a power of 2"),
            ("slice=16", "slice 32, 64 or 128"),
            ("logits=0", "logits 1 to"),
        ] {
            let error = HARDWARE.with(changes).unwrap_err();
            assert!(error.to_string().contains(why) && error.exit_code() == 2, "{changes}: {error}");
        }
    }
}
