// The three products of a banded layer; tiles outside the band are not visited. P is the packed weight.
//
//   band_expand     y[m, j] = sum over i in band(j) of x[m, i] P[j, i]; then, with EPILOGUE
//                   1: pre = y + bias, y = gelu(pre)     2: y = y gelu'(pre)
//   band_contract   y[m, i] = sum over j in band(i) of x[m, j] P[j, i] (+ bias[i], unless that is null)
//   band_outer      dP[j, i] (+)= sum over m of wide[m, j] narrow[m, i] in the band, 0 in every other slot; with several
//                   shares of m, each share's sums (unmasked) go to out + share * packed_len
//   band_outer_sum  dP (+)= sum over shares, in order, in the band; 0 in every other slot
//
// Shapes: x, y, pre, wide, narrow: [M, N] or [M, W]; bias [W] or [N]; P and dP packed as `Band::table` says. The table's
//   lists (see src/backend/cuda/band.rs): for each tile of narrow columns the panels that touch it; the tiles of the outer
//   product as (group of panels, first column). ALIGNED: N and W are multiples of LANES. BLOCKS: blocks of 128 wide rows x 64
//   columns stand in the band's place, two panels each; after the table then stand, for each 128 wide rows, their first block
//   and, in the next word, the end of their blocks. To contract and outer these are panels like any other.
// Dtypes: Element operands and results, float bias and dP, sums in float.
// Grid: a block has BLOCK_ROWS x BLOCK_COLS results, a warp of it WARP_ROWS x WARP_COLS; STAGES tiles of DEPTH are on their
//   way. expand: for each tile of rows the groups of BLOCK_COLS / 64 panels; contract: for each tile of rows the tiles of
//   narrow columns; outer (rows of the block are wide ones): (its list, shares); outer_sum one block per wide row, with BLOCKS
//   per row of a panel, 64 for each.
// Determinism: every result is summed by one warp in order of the depth; shares are added in order.
// Caller: src/backend/cuda/band.rs.

constexpr int WARPS_DOWN = BLOCK_ROWS / WARP_ROWS;
constexpr int THREADS = 32 * WARPS_DOWN * (BLOCK_COLS / WARP_COLS);
constexpr int MT = WARP_ROWS / 16;
constexpr int NT = WARP_COLS / 8;
// A warp with many results has few registers for more than a step of the product at a time.
[[maybe_unused]] constexpr int BAND_UNROLL = MT * NT >= 16 && UNROLL > 2 ? 2 : UNROLL;
constexpr int PANEL_ROWS = 64;
[[maybe_unused]] constexpr int WIDTH = ALIGNED ? LANES : 1;
// Floats between rows of a tile of results: a quarter of the banks further each, so that a warp's stores spread over all.
[[maybe_unused]] constexpr int RESULT_STRIDE = BLOCK_COLS + 8;
// Rows of results that lie in shared memory at one time.
[[maybe_unused]] constexpr int RESULT_ROWS = BLOCK_ROWS < 128 ? BLOCK_ROWS : 128;

struct Panel {
    int row, rows, col, cols, offset;

    __device__ __forceinline__ int end() const {
        return col + cols;
    }
};

__device__ __forceinline__ Panel panel_at(const u32* table, int index) {
    const u32* words = table + 8 + 5 * index;
    return Panel{(int)words[0], (int)words[1], (int)words[2], (int)words[3], (int)words[4]};
}

// `Count` (1 or 2) neighbouring panels; where there is no second it is empty.
template <int Count>
struct Group {
    Panel upper, lower;
    int first, end;  // the columns that any of them touches

    __device__ __forceinline__ Group(const u32* table, int index) {
        upper = panel_at(table, Count * index);
        lower = Panel{upper.row + PANEL_ROWS, 0, 0, 0, 0};
        if (Count == 2 && 2 * index + 1 < (int)table[2]) lower = panel_at(table, 2 * index + 1);
        first = upper.cols == 0 ? lower.col : lower.cols == 0 ? upper.col : min(upper.col, lower.col);
        end = max(upper.end(), lower.end());
    }

    // The panel that row (or column) `at` of the group's wide rows belongs to.
    __device__ __forceinline__ Panel of(int at) const {
        return Count == 1 || at < PANEL_ROWS ? upper : lower;
    }
};

// The tiles of 8 columns, of those of a warp from `col`, that [first, end) covers: windows are multiples of 16 columns.
struct Covered {
    int begin, end;

    __device__ __forceinline__ Covered(int first, int last, int col) {
        begin = min(max(first - col, 0), WARP_COLS) / 8;
        end = min(max(last - col, 0), WARP_COLS) / 8;
    }

    __device__ __forceinline__ bool all() const {
        return begin == 0 && end == NT;
    }
};

// acc += left right over Depth, for the covered tiles. Where all are covered there is nothing to ask between the steps.
template <int Depth, class Left, class Right>
__device__ __forceinline__ void multiply_covered(float (&acc)[MT][NT][4], const Left& left, const Right& right,
                                                 const Covered& tiles) {
    if (tiles.all()) {
#pragma unroll BAND_UNROLL
        for (int k = 0; k < Depth; k += KSTEP) multiply<MT, NT>(acc, left, right, k);
    } else if (tiles.begin < tiles.end) {
#pragma unroll 1
        for (int k = 0; k < Depth; k += KSTEP) multiply<MT, NT>(acc, left, right, k, tiles.begin, tiles.end);
    }
}

// Fills acc, stage by stage: fetch(step) starts to copy one and closes a group of copies, use(step) multiplies it.
template <class Fetch, class Use>
__device__ __forceinline__ void run_stages(float (&acc)[MT][NT][4], int steps, const Fetch& fetch, const Use& use) {
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;
    }
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
    for (int step = 0; step < steps; step++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        fetch(step + STAGES - 1);
        use(step);
    }
    copy_async_wait<0>();
}

// Starts to copy rows [row, row + Count) x columns [col, col + Cols) of a panel to the tile's rows from `tile_row`; `col`
// counts as the narrow axis does.
template <int Count, int Cols, int Rows>
__device__ __forceinline__ void stage_panel(const Tile<Rows>& tile, int tile_row, const Element* weights, const Panel& panel,
                                            int row, int col) {
    const Element* source = weights + panel.offset + row * panel.cols + col - panel.col;
    stage_aligned<Count, Cols, THREADS>(tile, tile_row, source, panel.cols, panel.rows - row, panel.col - col,
                                        panel.end() - col);
}

// Brings the block's results to shared memory, RESULT_ROWS rows at a time, and has each thread `finish` neighbours of a row:
// finish(row, col, sums), all inside `rows` and `cols`.
template <class Finish>
__device__ __forceinline__ void finish_results(char* shared, const float (&acc)[MT][NT][4], int warp_row, int warp_col, int rows,
                                               int cols, const Finish& finish) {
    float* results = reinterpret_cast<float*>(shared);
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 1
    for (int first = 0; first < min(rows, BLOCK_ROWS); first += RESULT_ROWS) {
        __syncthreads();
        if (warp_row >= first && warp_row < first + RESULT_ROWS) {
#pragma unroll
            for (int i = 0; i < MT; i++) {
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    float* at = results + (warp_row - first + 16 * i + g) * RESULT_STRIDE + warp_col + 8 * j + 2 * t;
                    *reinterpret_cast<float2*>(at) = make_float2(acc[i][j][0], acc[i][j][1]);
                    *reinterpret_cast<float2*>(at + 8 * RESULT_STRIDE) = make_float2(acc[i][j][2], acc[i][j][3]);
                }
            }
        }
        __syncthreads();
#pragma unroll ALIGNED ? 4 : 1
        for (int i = threadIdx.x; i < RESULT_ROWS * BLOCK_COLS / WIDTH; i += THREADS) {
            int r = i / (BLOCK_COLS / WIDTH), c = i % (BLOCK_COLS / WIDTH) * WIDTH;
            if (first + r >= rows || c >= cols) continue;
            float sums[WIDTH];
            load(sums, results + r * RESULT_STRIDE + c);
            finish(first + r, c, sums);
        }
    }
}

#if defined(EXPAND)

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    band_expand(Element* y, Element* pre, const Element* x, const Element* weights, const float* bias, const u32* table,
                int rows) {
    constexpr int PANELS = BLOCK_COLS / PANEL_ROWS;
    constexpr int STAGE_BYTES = (BLOCK_ROWS + BLOCK_COLS) * 128;
    static_assert(WARP_COLS == PANEL_ROWS && DEPTH == SEGMENT, "a warp has a panel, a stage one segment");
    SHARED_MEMORY(shared);
#if BLOCKS
    // Stages that a block of the pattern makes.
    constexpr int PER_BLOCK = 64 / DEPTH;
    static_assert(PANELS == 2, "a block has the rows of a block of the pattern");
    int narrow = table[0], wide = table[1], groups = ceil_div(wide, BLOCK_COLS), col0 = blockIdx.x % groups * BLOCK_COLS;
    const u32* blocks = table + table[7] + 2 * table[4] + blockIdx.x % groups;
    int steps = (blocks[1] - blocks[0]) * PER_BLOCK;
#else
    int narrow = table[0], wide = table[1], groups = ceil_div(table[2], PANELS);
    Group<PANELS> group(table, blockIdx.x % groups);
#endif
    int row0 = blockIdx.x / groups * BLOCK_ROWS;
    int warp = threadIdx.x / 32, warp_row = warp % WARPS_DOWN * WARP_ROWS, warp_col = warp / WARPS_DOWN * WARP_COLS;
#if !BLOCKS
    Panel own = group.of(warp_col);
    int steps = ceil_div(group.end - group.first, DEPTH), col0 = group.upper.row;
#endif

#if EPILOGUE == 2
    // What the results are multiplied by at the end is on its way meanwhile.
    constexpr int LINE = 128 / sizeof(Element);
    for (int i = threadIdx.x; i < BLOCK_ROWS * BLOCK_COLS / LINE; i += THREADS) {
        int row = row0 + i / (BLOCK_COLS / LINE), col = col0 + i % (BLOCK_COLS / LINE) * LINE;
        if (row < rows && col < wide) prefetch(pre + (long long)row * wide + col);
    }
#endif

    auto x_tile = [&](int step) { return Tile<BLOCK_ROWS>{shared + step % STAGES * STAGE_BYTES}; };
    auto p_tile = [&](int step) { return Tile<BLOCK_COLS>{x_tile(step).base + BLOCK_ROWS * 128}; };
    const Element* x_rows = x + (long long)row0 * narrow;
    float acc[MT][NT][4];
#if BLOCKS
    // The panels of the next stage to fetch are read a stage early: they are there when they are needed.
    Panel upper = {}, lower = {};
    auto read_ahead = [&](int step) {
        if (step >= steps) return;
        int index = 2 * (blocks[0] + step / PER_BLOCK);
        upper = panel_at(table, index), lower = panel_at(table, index + 1);
    };
    auto fetch = [&](int step) {
        if (step < steps) {
            int col = upper.col + step % PER_BLOCK * DEPTH;
            stage<DEPTH, THREADS>(x_tile(step), x_rows + col, narrow, rows - row0, narrow - col);
            stage_panel<PANEL_ROWS, DEPTH>(p_tile(step), 0, weights, upper, 0, col);
            stage_panel<PANEL_ROWS, DEPTH>(p_tile(step), PANEL_ROWS, weights, lower, 0, col);
        }
        copy_async_commit();
        read_ahead(step + 1);
    };

    read_ahead(0);
    run_stages(acc, steps, fetch, [&](int step) {
        Along<BLOCK_ROWS> left{x_tile(step), warp_row};
        Along<BLOCK_COLS> right{p_tile(step), warp_col};
#pragma unroll BAND_UNROLL
        for (int k = 0; k < DEPTH; k += KSTEP) multiply<MT, NT>(acc, left, right, k);
    });
#else
    auto fetch = [&](int step) {
        if (step < steps) {
            int col = group.first + step * DEPTH;
            stage<DEPTH, THREADS>(x_tile(step), x_rows + col, narrow, rows - row0, narrow - col);
            stage_panel<PANEL_ROWS, DEPTH>(p_tile(step), 0, weights, group.upper, 0, col);
            if (PANELS == 2) stage_panel<PANEL_ROWS, DEPTH>(p_tile(step), PANEL_ROWS, weights, group.lower, 0, col);
        }
        copy_async_commit();
    };

    run_stages(acc, steps, fetch, [&](int step) {
        Along<BLOCK_ROWS> left{x_tile(step), warp_row};
        Along<BLOCK_COLS> right{p_tile(step), warp_col};
        int col = group.first + step * DEPTH;
        if (col >= own.col && col + DEPTH <= own.end()) {
#pragma unroll BAND_UNROLL
            for (int k = 0; k < DEPTH; k += KSTEP) multiply<MT, NT>(acc, left, right, k);
        } else {
#pragma unroll 1
            for (int k = max(own.col - col, 0); k < min(own.end() - col, DEPTH); k += KSTEP) {
                multiply<MT, NT>(acc, left, right, k);
            }
        }
    });
#endif

    finish_results(shared, acc, warp_row, warp_col, rows - row0, wide - col0, [&](int r, int c, float(&sums)[WIDTH]) {
        long long at = (long long)(row0 + r) * wide + col0 + c;
        float others[WIDTH];
#if EPILOGUE == 1
        load(others, bias + col0 + c);
#pragma unroll
        for (int lane = 0; lane < WIDTH; lane++) sums[lane] += others[lane];
        store(pre + at, sums);
#pragma unroll
        for (int lane = 0; lane < WIDTH; lane++) sums[lane] = gelu(sums[lane]);
#else
        load(others, pre + at);
#pragma unroll
        for (int lane = 0; lane < WIDTH; lane++) sums[lane] *= gelu_derivative(others[lane]);
#endif
        store(y + at, sums);
    });
}

#elif defined(CONTRACT)

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    band_contract(Element* y, const Element* x, const Element* weights, const float* bias, const u32* table, int tiles_at,
                  int rows) {
    // Stages that a panel's rows make.
    constexpr int PER_PANEL = PANEL_ROWS / DEPTH;
    constexpr int STAGE_BYTES = BLOCK_ROWS * 128 + Tile<DEPTH>::bytes(BLOCK_COLS);
    static_assert(DEPTH == SEGMENT, "a stage has one segment");
    SHARED_MEMORY(shared);
    // The columns that the panel of each stage on its way covers.
    __shared__ int2 windows[STAGES];
    int narrow = table[0], wide = table[1], tiles_across = ceil_div(narrow, BLOCK_COLS), tile = blockIdx.x % tiles_across;
    int col0 = tile * BLOCK_COLS, row0 = blockIdx.x / tiles_across * BLOCK_ROWS;
    int warp = threadIdx.x / 32, warp_row = warp % WARPS_DOWN * WARP_ROWS, warp_col = warp / WARPS_DOWN * WARP_COLS;
    const u32* list = table + table[tiles_at + 2 * tile];
    int steps = table[tiles_at + 2 * tile + 1] * PER_PANEL;

    auto x_tile = [&](int step) { return Tile<BLOCK_ROWS>{shared + step % STAGES * STAGE_BYTES}; };
    auto p_tile = [&](int step) { return Tile<DEPTH>{x_tile(step).base + BLOCK_ROWS * 128}; };
    const Element* x_rows = x + (long long)row0 * wide;
    // The panel of the next stage to fetch is read a stage early: it is there when it is needed.
    Panel coming = {};
    auto read_ahead = [&](int step) {
        if (step < steps) coming = panel_at(table, list[step / PER_PANEL]);
    };
    auto fetch = [&](int step) {
        if (step < steps) {
            int row = step % PER_PANEL * DEPTH;
            stage<DEPTH, THREADS>(x_tile(step), x_rows + coming.row + row, wide, rows - row0, coming.rows - row);
            stage_panel<DEPTH, BLOCK_COLS>(p_tile(step), 0, weights, coming, row, col0);
            if (threadIdx.x == 0) windows[step % STAGES] = make_int2(coming.col, coming.end());
        }
        copy_async_commit();
        read_ahead(step + 1);
    };

    float acc[MT][NT][4];
    read_ahead(0);
    run_stages(acc, steps, fetch, [&](int step) {
        Along<BLOCK_ROWS> left{x_tile(step), warp_row};
        Across<DEPTH> right{p_tile(step), warp_col};
        int2 window = windows[step % STAGES];
        multiply_covered<DEPTH>(acc, left, right, Covered(window.x, window.y, col0 + warp_col));
    });

    finish_results(shared, acc, warp_row, warp_col, rows - row0, narrow - col0, [&](int r, int c, float(&sums)[WIDTH]) {
        if (bias != nullptr) {
            float others[WIDTH];
            load(others, bias + col0 + c);
#pragma unroll
            for (int lane = 0; lane < WIDTH; lane++) sums[lane] += others[lane];
        }
        store(y + (long long)(row0 + r) * narrow + col0 + c, sums);
    });
}

#elif defined(OUTER)

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    band_outer(float* out, const Element* wide_values, const Element* narrow_values, const u32* table, int tiles_at, int rows,
               int share_rows, int packed_len, int add) {
    constexpr int PANELS = BLOCK_ROWS / PANEL_ROWS;
    constexpr int WIDE_BYTES = Tile<DEPTH>::bytes(BLOCK_ROWS);
    constexpr int STAGE_BYTES = WIDE_BYTES + Tile<DEPTH>::bytes(BLOCK_COLS);
    static_assert(PANEL_ROWS % WARP_ROWS == 0, "a warp's rows lie in one panel");
    SHARED_MEMORY(shared);
    int narrow = table[0], wide = table[1];
    Group<PANELS> group(table, table[tiles_at + 2 * blockIdx.x]);
    int col0 = table[tiles_at + 2 * blockIdx.x + 1], row0 = group.upper.row;
    int first = blockIdx.y * share_rows, end = min(rows, first + share_rows);
    int warp = threadIdx.x / 32, warp_row = warp % WARPS_DOWN * WARP_ROWS, warp_col = warp / WARPS_DOWN * WARP_COLS;
    Panel own = group.of(warp_row);
    Covered tiles(own.col, own.end(), col0 + warp_col);
    int steps = ceil_div(end - first, DEPTH);

    auto wide_tile = [&](int step) { return Tile<DEPTH>{shared + step % STAGES * STAGE_BYTES}; };
    auto narrow_tile = [&](int step) { return Tile<DEPTH>{wide_tile(step).base + WIDE_BYTES}; };
    auto fetch = [&](int step) {
        if (step < steps) {
            int m = first + step * DEPTH;
            const Element* left = wide_values + (long long)m * wide + row0;
            const Element* right = narrow_values + (long long)m * narrow + col0;
            stage<BLOCK_ROWS, THREADS>(wide_tile(step), left, wide, end - m, wide - row0);
            stage<BLOCK_COLS, THREADS>(narrow_tile(step), right, narrow, end - m, narrow - col0);
        }
        copy_async_commit();
    };

    float acc[MT][NT][4];
    run_stages(acc, steps, fetch, [&](int step) {
        Across<DEPTH> left{wide_tile(step), warp_row};
        Across<DEPTH> right{narrow_tile(step), warp_col};
        multiply_covered<DEPTH>(acc, left, right, tiles);
    });

    bool shared_out = gridDim.y > 1;
    float* target = out + (long long)blockIdx.y * packed_len;
    const u32* ranges = table + table[6];
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = (warp_row + 16 * i + 8 * half + g) % PANEL_ROWS;
            if (r >= own.rows) continue;
            int from = ranges[2 * (own.row + r)], to = ranges[2 * (own.row + r) + 1];
#pragma unroll
            for (int j = 0; j < NT; j++) {
                if (j < tiles.begin || j >= tiles.end) continue;
                int col = col0 + warp_col + 8 * j + 2 * t;
                float2* at = reinterpret_cast<float2*>(target + own.offset + r * own.cols + col - own.col);
                float2 sums = make_float2(acc[i][j][2 * half], acc[i][j][2 * half + 1]);
                if (!shared_out) {
                    float2 old = add ? *at : make_float2(0.0f, 0.0f);
                    sums.x = col >= from && col < to ? sums.x + old.x : 0.0f;
                    sums.y = col + 1 >= from && col + 1 < to ? sums.y + old.y : 0.0f;
                }
                *at = sums;
            }
        }
    }
}

extern "C" __global__ void band_outer_sum(float* out, const float* shares, const u32* table, int count, int packed_len,
                                          int add) {
#if BLOCKS
    Panel panel = panel_at(table, blockIdx.x / PANEL_ROWS);
    int row = panel.row + blockIdx.x % PANEL_ROWS;
    if (row >= panel.row + panel.rows) return;
#else
    int row = blockIdx.x;
    Panel panel = panel_at(table, row / PANEL_ROWS);
#endif
    const u32* range = table + table[6] + 2 * row;
    int from = range[0], to = range[1];
    int base = panel.offset + (row - panel.row) * panel.cols;
    for (int c = threadIdx.x; c < panel.cols; c += blockDim.x) {
        int col = panel.col + c;
        float sum = 0.0f;
        if (col >= from && col < to) {
#pragma unroll 4
            for (int share = 0; share < count; share++) sum += shares[(long long)share * packed_len + base + c];
            if (add) sum += out[base + c];
        }
        out[base + c] = sum;
    }
}

#endif
