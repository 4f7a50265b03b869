// The three products of a banded layer on Hopper: the maths, shapes and lists of `band.cu`, by its matrix units and its copy
// engine. Only for bf16, and where N and W are multiples of 8.
//
//   band_expand     y[m, j] = sum over i in band(j) of x[m, i] P[j, i]; then, with EPILOGUE
//                   1: pre = y + bias, y = gelu(pre)     2: y = y gelu'(pre)
//   band_contract   y[m, i] = sum over j in band(i) of x[m, j] P[j, i] (+ bias[i], unless that is null)
//   band_outer      dP[j, i] (+)= sum over m of wide[m, j] narrow[m, i] in the band, 0 in every other slot; dbias[j] (+)= sum
//                   over m of wide[m, j], unless that is null; tiles that several blocks share go to `pieces`
//   band_outer_sum  the same from those pieces, added in order
//
// Shapes: as in `band.cu`. The maps describe activations to the copy engine, in boxes of 64 columns: of 256 rows for x, of 128 for y
//   and pre, of 64 for wide and narrow. The table's lists (src/backend/cuda/band_hopper.rs): for each tile of BLOCK_COLS narrow
//   columns the panels that touch its left half alone, then the others that touch it; the tiles of the outer product as (first
//   of its 2 PANELS panels, first row, first column, whether it is the first of these rows). BLOCKS: as in `band.cu`, for expand.
// Dtypes: bf16 operands and results, float bias, dP and dbias, sums in float.
// Grid: blocks that stay, one on each multiprocessor; each takes every gridDim.x-th tile. Of the outer product, tiles that would
//   leave most blocks idle in a last round are cut along the batch's rows into pieces. Two warpgroups multiply: of expand and
//   contract each has 128 rows and BLOCK_COLS columns, of the outer product PANELS panels and BLOCK_COLS columns. The warps behind
//   them fetch: activations by the copy engine, panels by their threads. STAGES stages of 64 of the depth go around between them.
//   band_outer_sum: (tiles that are cut, groups of their columns, PANELS).
// Determinism: every piece is summed by one warpgroup in order of the depth, and pieces are added in that order.
// Caller: src/backend/cuda/band_hopper.rs.

#if defined(EXPAND) || defined(CONTRACT)

// Threads that fetch.
#if defined(EXPAND)
constexpr int FILLERS = 64;
#else
constexpr int FILLERS = 128;
#endif

// Starts to copy rows of a panel x columns [col, col + Cols) to the tile's rows from `tile_row`, zeros outside the panel.
template <int Cols, int Rows>
__device__ __forceinline__ void fetch_panel(const Tile<Rows>& tile, int tile_row, const Element* weights, const Panel& panel,
                                            int col) {
    constexpr int CHUNKS = Cols / LANES, AT_ONCE = FILLERS / CHUNKS;
    int thread = threadIdx.x - CONSUMERS, row = thread / CHUNKS, at = thread % CHUNKS * LANES;
    bool inside = col + at >= panel.col && col + at < panel.end();
    const Element* from = weights + panel.offset + row * panel.cols + (inside ? col + at - panel.col : 0);
#pragma unroll
    for (int r = 0; r < PANEL_ROWS; r += AT_ONCE) {
        copy_async(tile.at(tile_row + row + r, at), from, inside && row + r < panel.rows);
        from += AT_ONCE * panel.cols;
    }
}

// Two neighbouring biases; zeros beyond the end, or without any.
__device__ __forceinline__ float2 bias_at(const float* bias, int col, int cols) {
    return bias != nullptr && col < cols ? *reinterpret_cast<const float2*>(bias + col) : make_float2(0.0f, 0.0f);
}

#endif

#if defined(EXPAND)

// The rows of two neighbouring panels, and the columns of x that they are multiplied with, a stage at a time: those that any of
// them touches, or those of their blocks.
struct Strip {
    const u32* table;
    Panel upper, lower;
    int first, steps;

    __device__ __forceinline__ Strip(const u32* table, int index) : table(table) {
#if BLOCKS
        const u32* blocks = table + table[7] + 2 * table[4] + index;
        first = blocks[0], steps = blocks[1] - blocks[0];
#else
        upper = panel_or_none(table, 2 * index), lower = panel_or_none(table, 2 * index + 1);
        first = upper.cols == 0 ? lower.col : lower.cols == 0 ? upper.col : min(upper.col, lower.col);
        steps = ceil_div(max(upper.end(), lower.end()) - first, DEPTH);
#endif
    }

    // Goes to a stage; its first column.
    __device__ __forceinline__ int go(int step) {
#if BLOCKS
        upper = panel_at(table, 2 * (first + step)), lower = panel_at(table, 2 * (first + step) + 1);
        return upper.col;
#else
        return first + step * DEPTH;
#endif
    }
};

// Results leave in boxes of 128 rows x 64 columns, a warpgroup's: tiles in shared memory, of which each has two. A warp behind
// the others has the copy engine take them away, and, where results are multiplied by GELU's derivative, bring what that is of
// to the same place before.
constexpr int STORERS = 64;
constexpr int BOX_ROWS = 128;
constexpr int OUT_BYTES = BOX_ROWS * 128;
// Boxes of a tile.
constexpr int BOXES = EPILOGUE == 1 ? 4 : 2;

struct Outbox {
    char* base;
    u64* barriers;

    __device__ __forceinline__ Outbox(char* shared, int group) {
        char* boxes = shared + STAGES * STAGE_BYTES;
        base = boxes + group * 2 * OUT_BYTES;
        barriers = reinterpret_cast<u64*>(boxes + 4 * OUT_BYTES) + 2 * STAGES + 4 * group;
    }

    __device__ __forceinline__ Tile<BOX_ROWS> box(int slot) const {
        return Tile<BOX_ROWS>{base + slot * OUT_BYTES};
    }

    // The box may be written (and holds what results are multiplied by).
    __device__ __forceinline__ u64* open(int slot) const {
        return barriers + slot;
    }

    // The box is written.
    __device__ __forceinline__ u64* closed(int slot) const {
        return barriers + 2 + slot;
    }

    __device__ __forceinline__ void begin() const {
        for (int slot = 0; slot < 2; slot++) {
            barrier_init(open(slot), 1);
            barrier_init(closed(slot), 4);
        }
    }
};

// Where the next box lies, and in which phase of its barriers.
struct BoxPlace {
    int slot;
    u32 phase;

    __device__ __forceinline__ void advance() {
        slot ^= 1;
        if (slot == 0) phase ^= 1;
    }
};

// Tiles of results: for each tile of rows all pairs of panels' rows.
struct Tiles {
    int pairs, count;

    __device__ __forceinline__ Tiles(const u32* table, int rows) : pairs(ceil_div(table[1], 2 * PANEL_ROWS)) {
        count = pairs * ceil_div(rows, BLOCK_ROWS);
    }

    __device__ __forceinline__ int row(int tile) const {
        return tile / pairs * BLOCK_ROWS;
    }

    __device__ __forceinline__ int column(int tile) const {
        return tile % pairs * 2 * PANEL_ROWS;
    }
};

__device__ __forceinline__ void fetch_all(const Ring& ring, const Tiles& tiles, const TensorMap* x_map, const Element* weights,
                                          const u32* table) {
    Place place{0, 0};
    for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
        Strip strip(table, tile % tiles.pairs);
        for (int step = 0; step < strip.steps; step++) {
            int col = strip.go(step);
            barrier_wait(ring.read(place.slot), place.phase ^ 1);
            char* stage = ring.stage(place.slot);
            if (threadIdx.x == CONSUMERS) {
                barrier_expect(ring.full(place.slot), X_BYTES);
                tensor_load(stage, x_map, col, tiles.row(tile), ring.full(place.slot));
            }
            Tile<BLOCK_COLS> weights_tile{stage + X_BYTES};
            fetch_panel<DEPTH>(weights_tile, 0, weights, strip.upper, col);
            fetch_panel<DEPTH>(weights_tile, PANEL_ROWS, weights, strip.lower, col);
            copy_async_arrive(ring.full(place.slot));
            place.advance();
        }
    }
    copy_async_commit();
    copy_async_wait<0>();
}

// By one thread for each warpgroup.
__device__ __forceinline__ void store_all(const Outbox& outbox, const Tiles& tiles, int group, const TensorMap* y_map,
                                          const TensorMap* pre_map) {
    auto row = [&](int tile) { return tiles.row(tile) + group * BOX_ROWS; };
    auto bring = [&](int slot, int tile) {
        barrier_expect(outbox.open(slot), OUT_BYTES);
        tensor_load(outbox.box(slot).base, pre_map, tiles.column(tile) + 64 * slot, row(tile), outbox.open(slot));
    };
    BoxPlace place{0, 0};
    if (EPILOGUE == 2 && blockIdx.x < tiles.count) {
        bring(0, blockIdx.x);
        bring(1, blockIdx.x);
    }
    for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
        for (int box = 0; box < BOXES; box++) {
            barrier_wait(outbox.closed(place.slot), place.phase);
            // With both outputs, a half's `pre` comes before its y.
            const TensorMap* map = EPILOGUE == 1 && box % 2 == 0 ? pre_map : y_map;
            tensor_store(map, tiles.column(tile) + 64 * (EPILOGUE == 1 ? box / 2 : box), row(tile), outbox.box(place.slot).base);
            tensor_store_read();
            int next = tile + gridDim.x;
            if (EPILOGUE == 1) {
                barrier_arrive(outbox.open(place.slot));
            } else if (next < tiles.count) {
                bring(place.slot, next);
            }
            place.advance();
        }
    }
}

// Fills the next box with a warpgroup's results in the columns from Half * 64 on: what make(j, a, b, old) makes of two
// neighbours in the j-th group of 8 columns and of what the box held.
template <int Half, class Make>
__device__ __forceinline__ void fill_box(const Outbox& outbox, BoxPlace& place, const float (&acc)[2][NT][4], const Make& make) {
    int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4, t = lane % 4;
    barrier_wait(outbox.open(place.slot), EPILOGUE == 1 ? place.phase ^ 1 : place.phase);
    Tile<BOX_ROWS> box = outbox.box(place.slot);
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32* at = reinterpret_cast<u32*>(&box.element(64 * i + row + 8 * half, 8 * j + 2 * t));
                const float(&sums)[4] = acc[i][8 * Half + j];
                *at = make(j, sums[2 * half], sums[2 * half + 1], EPILOGUE == 1 ? 0 : *at);
            }
        }
    }
    wgmma_show();
    __syncwarp();
    if (lane == 0) barrier_arrive(outbox.closed(place.slot));
    place.advance();
}

// The results of one half of the columns, from `col` of the wide ones on.
template <int Half>
__device__ __forceinline__ void finish_half(const Outbox& outbox, BoxPlace& place, const float (&acc)[2][NT][4],
                                            const float* bias, int col, int wide) {
#if EPILOGUE == 1
    float2 add[8];
#pragma unroll
    for (int j = 0; j < 8; j++) add[j] = bias_at(bias, col + 8 * j + threadIdx.x % 4 * 2, wide);
    fill_box<Half>(outbox, place, acc, [&](int j, float a, float b, u32) { return pack_bf16(a + add[j].x, b + add[j].y); });
    fill_box<Half>(outbox, place, acc,
                   [&](int j, float a, float b, u32) { return pack_bf16(gelu(a + add[j].x), gelu(b + add[j].y)); });
#else
    fill_box<Half>(outbox, place, acc, [&](int, float a, float b, u32 pre) {
        float left = __uint_as_float(pre << 16), right = __uint_as_float(pre & 0xffff0000u);
        return pack_bf16(a * gelu_derivative(left), b * gelu_derivative(right));
    });
#endif
}

__device__ __forceinline__ void multiply_all(const Ring& ring, const Outbox& outbox, const Tiles& tiles, const float* bias,
                                             const u32* table) {
    Results<2> results;
    Place place{0, 0};
    BoxPlace box{0, 0};
    int first_row = threadIdx.x / 128 * 128, wide = table[1];
    for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
        int steps = Strip(table, tile % tiles.pairs).steps;
        results.clear();
        consume<0>(ring, place, steps, [&](char* stage) {
            Along<BLOCK_COLS> right{Tile<BLOCK_COLS>{stage + X_BYTES}, 0};
#pragma unroll
            for (int k = 0; k < DEPTH; k += KSTEP) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    Along<BLOCK_ROWS> left{Tile<BLOCK_ROWS>{stage}, first_row + 64 * i};
                    wgmma<BLOCK_COLS, false, false>(results.acc[i], descriptor(left, k), descriptor(right, k));
                }
            }
        });
        results.hold();
        finish_half<0>(outbox, box, results.acc, bias, tiles.column(tile), wide);
        finish_half<1>(outbox, box, results.acc, bias, tiles.column(tile) + 64, wide);
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + FILLERS + STORERS, 1)
    band_expand(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map,
                const __grid_constant__ TensorMap pre_map, const Element* weights, const float* bias, const u32* table, int rows) {
    SHARED_MEMORY(shared);
    Ring ring(shared, shared + STAGES * STAGE_BYTES + 4 * OUT_BYTES);
    Outbox outbox(shared, threadIdx.x < CONSUMERS ? threadIdx.x / 128 : threadIdx.x / 32 % 2);
    if (threadIdx.x == 0 || threadIdx.x == 128) outbox.begin();
    ring.begin(1 + FILLERS, CONSUMERS / 32);
    Tiles tiles(table, rows);

    if (threadIdx.x >= CONSUMERS) {
        registers_down<OTHERS>();
        if (threadIdx.x < CONSUMERS + FILLERS) {
            fetch_all(ring, tiles, &x_map, weights, table);
        } else if (threadIdx.x % 32 == 0) {
            store_all(outbox, tiles, threadIdx.x / 32 % 2, &y_map, &pre_map);
        }
    } else {
        registers_up<MULTIPLYING>();
        multiply_all(ring, outbox, tiles, bias, table);
    }
}

#elif defined(CONTRACT)

__device__ __forceinline__ void store_chunk(Element* to, const u32 (&words)[4]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Hands out a warpgroup's results, 32 columns of a row a quad of lanes at a time: take(row, quad, chunk, sums). The columns begin
// at `quad`; `sums` are columns 8j + 2t of them and the next, for j in 0..4; `chunk` is where this lane's 16 bytes begin.
template <class Take>
__device__ __forceinline__ void each_quad(const float (&acc)[2][NT][4], int row0, const Take& take) {
    int lane = threadIdx.x % 32, t = lane % 4, row = row0 + threadIdx.x / 128 * 128 + threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int q = 0; q < NT / 4; q++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float sums[4][2];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    sums[j][0] = acc[i][4 * q + j][2 * half];
                    sums[j][1] = acc[i][4 * q + j][2 * half + 1];
                }
                take(row + 64 * i + 8 * half, 32 * q, 8 * t, sums);
            }
        }
    }
}

// Begins the products of a warpgroup's rows and the first Cols columns of one stage.
template <int Cols>
__device__ __forceinline__ void multiply_columns(Results<2>& results, char* stage, int first_row) {
    Across<DEPTH> right{Tile<DEPTH>{stage + X_BYTES}, 0};
#pragma unroll
    for (int k = 0; k < DEPTH; k += KSTEP) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            Along<BLOCK_ROWS> left{Tile<BLOCK_ROWS>{stage}, first_row + 64 * i};
            wgmma<Cols, false, true>(results.acc[i], descriptor(left, k), descriptor(right, k));
        }
    }
}

// The panels that a tile of narrow columns touches: first those that touch the left half of the columns alone, then the rest.
struct Panels {
    const u32* numbers;
    int left, all;

    __device__ __forceinline__ Panels(const u32* table, int tiles_at, int tile) {
        const u32* head = table + tiles_at + 3 * tile;
        numbers = table + head[0];
        left = head[1], all = head[2];
    }
};

// A block's tiles, in order: by turns those of whole columns; where the last column is narrower, its tiles then, first of all
// by blocks that the last round leaves idle.
struct Order {
    int columns, left, own, spare, idle, fit, count;

    __device__ __forceinline__ Order(const u32* table, int tiles_at, int narrow, int rows) {
        int across = ceil_div(narrow, BLOCK_COLS), down = ceil_div(rows, BLOCK_ROWS), blocks = gridDim.x, block = blockIdx.x;
        columns = narrow / BLOCK_COLS;
        int rest = columns * down % blocks, narrower = (across - columns) * down;
        left = block - rest;
        own = columns * down / blocks + (left < 0);
        idle = rest == 0 ? 0 : blocks - rest;
        // As many tiles of the last column have about the panels of one in the middle.
        fit = across == columns ? 1 : Panels(table, tiles_at, across / 2).all / max(1, Panels(table, tiles_at, columns).all);
        fit = max(1, min(fit, ceil_div(narrower, max(1, idle))));
        spare = idle == 0 || left < 0 ? 0 : max(0, min(fit, narrower - left * fit));
        count = own + spare + ceil_div(max(0, narrower - idle * fit - block), blocks);
    }

    // (row, column) of the n-th tile.
    __device__ __forceinline__ int2 at(int n) const {
        int blocks = gridDim.x, block = blockIdx.x;
        if (n < own) return make_int2((block + n * blocks) / columns, (block + n * blocks) % columns);
        if (n < own + spare) return make_int2(left * fit + n - own, columns);
        return make_int2(idle * fit + block + (n - own - spare) * blocks, columns);
    }
};

extern "C" __global__ void __launch_bounds__(CONSUMERS + FILLERS, 1)
    band_contract(const __grid_constant__ TensorMap x_map, Element* y, const Element* weights, const float* bias,
                  const u32* table, int tiles_at, int rows) {
    constexpr int HALF = BLOCK_COLS / 2;
    SHARED_MEMORY(shared);
    Ring ring(shared, shared + STAGES * STAGE_BYTES);
    ring.begin(1 + FILLERS, CONSUMERS / 32);
    int narrow = table[0];
    Order order(table, tiles_at, narrow, rows);
    Place place{0, 0};

    if (threadIdx.x >= CONSUMERS) {
        for (int n = 0; n < order.count; n++) {
            int2 tile = order.at(n);
            Panels panels(table, tiles_at, tile.y);
            int col0 = tile.y * BLOCK_COLS, row0 = tile.x * BLOCK_ROWS;
            Panel coming = panel_at(table, panels.numbers[0]);
            for (int step = 0; step < panels.all; step++) {
                Panel panel = coming;
                if (step + 1 < panels.all) coming = panel_at(table, panels.numbers[step + 1]);  // there when it is needed
                barrier_wait(ring.read(place.slot), place.phase ^ 1);
                char* stage = ring.stage(place.slot);
                if (threadIdx.x == CONSUMERS) {
                    barrier_expect(ring.full(place.slot), X_BYTES);
                    tensor_load(stage, &x_map, panel.row, row0, ring.full(place.slot));
                }
                // A tile across the depth has one segment for each half of the columns.
                Tile<DEPTH> left{stage + X_BYTES}, right{stage + X_BYTES + DEPTH * 128};
                fetch_panel<HALF>(left, 0, weights, panel, col0);
                if (step >= panels.left) fetch_panel<HALF>(right, 0, weights, panel, col0 + HALF);
                copy_async_arrive(ring.full(place.slot));
                place.advance();
            }
        }
        copy_async_commit();
        copy_async_wait<0>();
        return;
    }

    Results<2> results;
    int first_row = threadIdx.x / 128 * 128;
    for (int n = 0; n < order.count; n++) {
        int2 tile = order.at(n);
        Panels panels(table, tiles_at, tile.y);
        results.clear();
        consume<0>(ring, place, panels.left, [&](char* stage) { multiply_columns<HALF>(results, stage, first_row); });
        consume<0>(ring, place, panels.all - panels.left,
                   [&](char* stage) { multiply_columns<BLOCK_COLS>(results, stage, first_row); });
        results.hold();
        each_quad(results.acc, tile.x * BLOCK_ROWS, [&](int row, int quad, int chunk, float(&sums)[4][2]) {
            u32 words[4];
            int col = tile.y * BLOCK_COLS + quad;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 add = bias_at(bias, col + 8 * j + threadIdx.x % 4 * 2, narrow);
                words[j] = pack_bf16(sums[j][0] + add.x, sums[j][1] + add.y);
            }
            turn(words);
            if (row < rows && col + chunk < narrow) store_chunk(y + (long long)row * narrow + col + chunk, words);
        });
    }
}

#elif defined(OUTER)

constexpr int THREADS = CONSUMERS + 128;
constexpr int WIDE_ROWS = WIDE_BOXES * PANEL_ROWS;
// The wide values are summed by a product with eight columns of ones.
constexpr int ONES_BYTES = 8 * 128;

// A thread's first row of a panel, and its first column of a group of 8.
__device__ __forceinline__ int own_row() {
    return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
}

__device__ __forceinline__ int own_col() {
    return threadIdx.x % 4 * 2;
}

// By one thread.
__device__ __forceinline__ void fetch_all(const Work& work, const Ring& ring, const TensorMap* wide_map,
                                          const TensorMap* narrow_map) {
    Place place{0, 0};
    for (int index = blockIdx.x; index < work.items(); index += gridDim.x) {
        Item item(work, index);
        OuterTile tile(work, item.tile);
        for (int step = item.first; step < item.end; step++) {
            barrier_wait(ring.read(place.slot), place.phase ^ 1);
            char* stage = ring.stage(place.slot);
            u64* full = ring.full(place.slot);
            barrier_expect(full, STAGE_BYTES);
#pragma unroll
            for (int box = 0; box < WIDE_BOXES; box++) {
                tensor_load(stage + box * BOX_BYTES, wide_map, tile.row + box * PANEL_ROWS, step * DEPTH, full);
            }
#pragma unroll
            for (int box = 0; box < NARROW_BOXES; box++) {
                tensor_load(stage + (WIDE_BOXES + box) * BOX_BYTES, narrow_map, tile.col + 64 * box, step * DEPTH, full);
            }
            place.advance();
        }
    }
}

// The sums of the wide values of an item, in the first column that the ones have given: to dbias, or to the item's piece.
__device__ __forceinline__ void write_sums(const Work& work, const Item& item, const OuterTile& tile,
                                           const float (&sums)[PANELS][1][4]) {
    if (threadIdx.x % 4 != 0) return;
    int first = threadIdx.x / 128 * PANELS * PANEL_ROWS + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    float* piece = piece_at(work, item.piece) + WIDE_ROWS * BLOCK_COLS;
#pragma unroll
    for (int i = 0; i < PANELS; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = first + PANEL_ROWS * i + 8 * half, j = tile.row + row;
            float sum = sums[i][0][2 * half];
            if (!item.whole) {
                piece[row] = sum;
            } else if (j < (int)work.table[1]) {
                work.bias[j] = work.add ? work.bias[j] + sum : sum;
            }
        }
    }
}

__device__ __forceinline__ void multiply_all(const Work& work, const Ring& ring, char* ones) {
    Results<PANELS> results;
    float sums[PANELS][1][4];
    Place place{0, 0};
    int own = threadIdx.x / 128 * PANELS;
    for (int index = blockIdx.x; index < work.items(); index += gridDim.x) {
        Item item(work, index);
        results.clear();
#pragma unroll
        for (int i = 0; i < PANELS; i++) {
            sums[i][0][0] = sums[i][0][1] = sums[i][0][2] = sums[i][0][3] = 0.0f;
            wgmma_hold(sums[i][0]);
        }
        consume<1>(ring, place, item.end - item.first, [&](char* stage) {
            Across<DEPTH> narrow{Tile<DEPTH>{stage + WIDE_BOXES * BOX_BYTES}, 0};
            Along<8> eight{Tile<8>{ones}, 0};
#pragma unroll
            for (int k = 0; k < DEPTH; k += KSTEP) {
#pragma unroll
                for (int i = 0; i < PANELS; i++) {
                    Across<DEPTH> wide{Tile<DEPTH>{stage}, (own + i) * PANEL_ROWS};
                    wgmma<BLOCK_COLS, true, true>(results.acc[i], descriptor(wide, k), descriptor(narrow, k));
                    wgmma<8, true, false>(sums[i], descriptor(wide, k), descriptor(eight, k));
                }
            }
        });
        results.hold();
#pragma unroll
        for (int i = 0; i < PANELS; i++) wgmma_hold(sums[i][0]);
        OuterTile tile(work, item.tile);
        if (work.bias != nullptr && tile.adds) write_sums(work, item, tile, sums);
        float4* piece = reinterpret_cast<float4*>(piece_at(work, item.piece));
#pragma unroll
        for (int i = 0; i < PANELS; i++) {
            if (item.whole) {
                write_results(work, panel_or_none(work.table, tile.panel + own + i), own_row(), tile.col + own_col(), results.acc[i]);
                continue;
            }
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const float(&c)[4] = results.acc[i][j];
                piece[(i * NT + j) * CONSUMERS + threadIdx.x] = make_float4(c[0], c[1], c[2], c[3]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    band_outer(const __grid_constant__ TensorMap wide_map, const __grid_constant__ TensorMap narrow_map, float* out, float* bias,
               float* pieces, const u32* table, int tiles_at, int tiles, int whole, int parts, int rows, int add) {
    SHARED_MEMORY(shared);
    char* ones = shared + STAGES * STAGE_BYTES;
    if (threadIdx.x < ONES_BYTES / 4) reinterpret_cast<u32*>(ones)[threadIdx.x] = 0x3f803f80u;
    wgmma_show();
    Ring ring(shared, ones + ONES_BYTES);
    ring.begin(1, CONSUMERS / 32);
    Work work{table, tiles_at, tiles, whole, parts, ceil_div(rows, DEPTH), add, out, bias, pieces};
    if (threadIdx.x >= CONSUMERS) {
        registers_down<OTHERS>();
        if (threadIdx.x == CONSUMERS) fetch_all(work, ring, &wide_map, &narrow_map);
    } else {
        registers_up<MULTIPLYING>();
        multiply_all(work, ring, ones);
    }
}

// Groups of 8 columns that a block of band_outer_sum adds up.
constexpr int SUM_GROUPS = 4;

extern "C" __global__ void __launch_bounds__(CONSUMERS)
    band_outer_sum(float* out, float* bias, float* pieces, const u32* table, int tiles_at, int tiles, int whole, int parts, int add) {
    Work work{table, tiles_at, tiles, whole, parts, 0, add, out, bias, pieces};
    OuterTile tile(work, whole + blockIdx.x);
    int group = blockIdx.y * SUM_GROUPS, i = blockIdx.z, column = tile.row + threadIdx.x;
    bool adds = bias != nullptr && tile.adds && group == 0 && i == 0 && threadIdx.x < WIDE_ROWS && column < (int)table[1];
    float acc[SUM_GROUPS][4] = {};
    float sum = 0.0f;
#pragma unroll 2
    for (int part = 0; part < parts; part++) {
        const float* piece = piece_at(work, part * work.cut() + blockIdx.x);
#pragma unroll
        for (int j = 0; j < SUM_GROUPS; j++) {
            float4 c = reinterpret_cast<const float4*>(piece)[(i * NT + group + j) * CONSUMERS + threadIdx.x];
            acc[j][0] += c.x;
            acc[j][1] += c.y;
            acc[j][2] += c.z;
            acc[j][3] += c.w;
        }
        if (adds) sum += piece[WIDE_ROWS * BLOCK_COLS + threadIdx.x];
    }
    Panel panel = panel_or_none(table, tile.panel + threadIdx.x / 128 * PANELS + i);
    write_results(work, panel, own_row(), tile.col + 8 * group + own_col(), acc);
    if (adds) bias[column] = add ? bias[column] + sum : sum;
}

#endif
