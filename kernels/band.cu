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
//   lists (see src/backend/cuda/band.rs): for each tile of 128 narrow columns the panels that touch it; the tiles of the
//   outer product as (pair of panels, first column). ALIGNED: N and W are multiples of LANES.
// Dtypes: Element operands and results, float bias and dP, sums in float.
// Grid: 256 threads, 8 warps as 4 x 2, each with 32 x 64 results (32 x OUTER_COLS/2 in band_outer), STAGES tiles on their way.
//   expand: for each tile of 128 rows the pairs of panels; contract: for each tile of 128 rows the tiles of 128 columns; outer
//   (its list, shares); outer_sum one block of 128 threads per wide row.
// Determinism: every result is summed by one warp in order of the depth; shares are added in order.
// Caller: src/backend/cuda/band.rs.

[[maybe_unused]] constexpr int THREADS = 256;
[[maybe_unused]] constexpr int BLOCK_ROWS = 128;
[[maybe_unused]] constexpr int BLOCK_COLS = 128;
[[maybe_unused]] constexpr int MT = 2;
[[maybe_unused]] constexpr int PANEL_ROWS = 64;
// Rows of the batch that a stage of band_outer holds.
[[maybe_unused]] constexpr int OUTER_DEPTH = 32;
// Floats between rows of a tile of results: an eighth of the banks further each, so that a warp's stores spread over all.
constexpr int RESULT_STRIDE = BLOCK_COLS + 8;

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

// Panels 2 * pair and the next; where there is none it is empty.
struct Pair {
    Panel upper, lower;
    int first, end;  // the columns that either touches
};

__device__ __forceinline__ Pair pair_at(const u32* table, int pair) {
    Panel a = panel_at(table, 2 * pair);
    Panel b = {a.row + PANEL_ROWS, 0, 0, 0, 0};
    if (2 * pair + 1 < (int)table[2]) b = panel_at(table, 2 * pair + 1);
    int first = a.cols == 0 ? b.col : b.cols == 0 ? a.col : min(a.col, b.col);
    return Pair{a, b, first, max(a.end(), b.end())};
}

// The tiles of 8 columns, of those of a warp from `col`, that a panel's window covers: windows are multiples of 16 columns.
struct Covered {
    int begin, end;
};

__device__ __forceinline__ Covered covered(const Panel& panel, int col, int cols) {
    int begin = min(max(panel.col - col, 0), cols), end = min(max(panel.end() - col, 0), cols);
    return Covered{begin / 8, end / 8};
}

// Starts to copy rows [row, row + Rows) x columns [col, col + Cols) of a panel, `col` counting as the narrow axis does.
template <int Cols, int Rows>
__device__ __forceinline__ void stage_panel(const Tile<Rows>& tile, int tile_row, int count, const Element* weights,
                                            const Panel& panel, int row, int col) {
    constexpr int chunks = Cols / LANES;
    for (int i = threadIdx.x; i < count * chunks; i += THREADS) {
        int r = i / chunks, c = i % chunks * LANES;
        int from = col + c - panel.col;
        bool valid = row + r < panel.rows && from >= 0 && from < panel.cols;
        const Element* source = valid ? weights + panel.offset + (row + r) * panel.cols + from : weights;
        copy_async(tile.at(tile_row + r, c), source, valid);
    }
}

// A warp's results to the tile of results in shared memory.
template <int NT>
__device__ __forceinline__ void spill_results(float* results, const float (&acc)[MT][NT][4], int row, int col) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
            float* at = results + (row + 16 * i + g) * RESULT_STRIDE + col + 8 * j + 2 * t;
            *reinterpret_cast<float2*>(at) = make_float2(acc[i][j][0], acc[i][j][1]);
            *reinterpret_cast<float2*>(at + 8 * RESULT_STRIDE) = make_float2(acc[i][j][2], acc[i][j][3]);
        }
    }
}

// Neighbours that a thread finishes at once.
[[maybe_unused]] constexpr int WIDTH = ALIGNED ? LANES : 1;

#if defined(EPILOGUE)

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    band_expand(Element* y, Element* pre, const Element* x, const Element* weights, const float* bias, const u32* table,
                int rows) {
    constexpr int NT = 8;
    SHARED_MEMORY(shared);
    int narrow = table[0], wide = table[1];
    int pairs = ceil_div(table[2], 2);
    Pair pair = pair_at(table, blockIdx.x % pairs);
    int row0 = blockIdx.x / pairs * BLOCK_ROWS;
    int warp = threadIdx.x / 32, warp_row = warp % 4 * 32, warp_col = warp / 4 * 64;
    Panel own = warp / 4 == 0 ? pair.upper : pair.lower;
    int steps = ceil_div(pair.end - pair.first, SEGMENT);

    auto x_tile = [&](int step) { return Tile<BLOCK_ROWS>{shared + step % STAGES * (BLOCK_ROWS + BLOCK_COLS) * 128}; };
    auto p_tile = [&](int step) { return Tile<BLOCK_COLS>{x_tile(step).base + BLOCK_ROWS * 128}; };
    auto fetch = [&](int step) {
        if (step < steps) {
            int col = pair.first + step * SEGMENT;
            stage<SEGMENT, THREADS>(x_tile(step), x + (long long)row0 * narrow + col, narrow, rows - row0, narrow - col);
            stage_panel<SEGMENT>(p_tile(step), 0, PANEL_ROWS, weights, pair.upper, 0, col);
            stage_panel<SEGMENT>(p_tile(step), PANEL_ROWS, PANEL_ROWS, weights, pair.lower, 0, col);
        }
        copy_async_commit();
    };

    float acc[MT][NT][4] = {};
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
    for (int step = 0; step < steps; step++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        fetch(step + STAGES - 1);
        Along<BLOCK_ROWS> left{x_tile(step), warp_row};
        Along<BLOCK_COLS> right{p_tile(step), warp_col};
        int col = pair.first + step * SEGMENT;
#pragma unroll UNROLL
        for (int k = 0; k < SEGMENT; k += KSTEP) {
            if (col + k >= own.col && col + k < own.end()) multiply<MT, NT>(acc, left, right, k);
        }
    }
    copy_async_wait<0>();
    __syncthreads();

    float* results = reinterpret_cast<float*>(shared);
    spill_results(results, acc, warp_row, warp_col);
    __syncthreads();
    int col0 = pair.upper.row;
    for (int i = threadIdx.x; i < BLOCK_ROWS * BLOCK_COLS / WIDTH; i += THREADS) {
        int r = i / (BLOCK_COLS / WIDTH), c = i % (BLOCK_COLS / WIDTH) * WIDTH;
        if (row0 + r >= rows || col0 + c >= wide) continue;
        long long at = (long long)(row0 + r) * wide + col0 + c;
        float sums[WIDTH], others[WIDTH];
        load(sums, results + r * RESULT_STRIDE + c);
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
    }
}

#else

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    band_contract(Element* y, const Element* x, const Element* weights, const float* bias, const u32* table, int tiles_at,
                  int rows) {
    constexpr int NT = 8;
    // Stages that a panel's rows make.
    constexpr int PER_PANEL = PANEL_ROWS / SEGMENT;
    constexpr int STAGE_BYTES = BLOCK_ROWS * 128 + Tile<SEGMENT>::bytes(BLOCK_COLS);
    SHARED_MEMORY(shared);
    int narrow = table[0], wide = table[1];
    int tiles_across = ceil_div(narrow, BLOCK_COLS), tile = blockIdx.x % tiles_across;
    int col0 = tile * BLOCK_COLS, row0 = blockIdx.x / tiles_across * BLOCK_ROWS;
    int warp = threadIdx.x / 32, warp_row = warp % 4 * 32, warp_col = warp / 4 * 64;
    const u32* list = table + table[tiles_at + 2 * tile];
    int steps = table[tiles_at + 2 * tile + 1] * PER_PANEL;

    auto x_tile = [&](int step) { return Tile<BLOCK_ROWS>{shared + step % STAGES * STAGE_BYTES}; };
    auto p_tile = [&](int step) { return Tile<SEGMENT>{x_tile(step).base + BLOCK_ROWS * 128}; };
    auto fetch = [&](int step) {
        if (step < steps) {
            Panel panel = panel_at(table, list[step / PER_PANEL]);
            int row = step % PER_PANEL * SEGMENT;
            const Element* source = x + (long long)row0 * wide + panel.row + row;
            stage<SEGMENT, THREADS>(x_tile(step), source, wide, rows - row0, panel.rows - row);
            stage_panel<BLOCK_COLS>(p_tile(step), 0, SEGMENT, weights, panel, row, col0);
        }
        copy_async_commit();
    };

    float acc[MT][NT][4] = {};
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
    for (int step = 0; step < steps; step++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        fetch(step + STAGES - 1);
        Covered tiles = covered(panel_at(table, list[step / PER_PANEL]), col0 + warp_col, 64);
        if (tiles.begin >= tiles.end) continue;
        Along<BLOCK_ROWS> left{x_tile(step), warp_row};
        Across<SEGMENT> right{p_tile(step), warp_col};
#pragma unroll UNROLL
        for (int k = 0; k < SEGMENT; k += KSTEP) multiply<MT, NT>(acc, left, right, k, tiles.begin, tiles.end);
    }
    copy_async_wait<0>();
    __syncthreads();

    float* results = reinterpret_cast<float*>(shared);
    spill_results(results, acc, warp_row, warp_col);
    __syncthreads();
    for (int i = threadIdx.x; i < BLOCK_ROWS * BLOCK_COLS / WIDTH; i += THREADS) {
        int r = i / (BLOCK_COLS / WIDTH), c = i % (BLOCK_COLS / WIDTH) * WIDTH;
        if (row0 + r >= rows || col0 + c >= narrow) continue;
        float sums[WIDTH], others[WIDTH];
        load(sums, results + r * RESULT_STRIDE + c);
        if (bias != nullptr) {
            load(others, bias + col0 + c);
#pragma unroll
            for (int lane = 0; lane < WIDTH; lane++) sums[lane] += others[lane];
        }
        store(y + (long long)(row0 + r) * narrow + col0 + c, sums);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    band_outer(float* out, const Element* wide_values, const Element* narrow_values, const u32* table, int tiles_at, int rows,
               int share_rows, int packed_len, int add) {
    constexpr int NT = OUTER_COLS / 16;
    constexpr int WIDE_BYTES = Tile<OUTER_DEPTH>::bytes(BLOCK_COLS);
    constexpr int STAGE_BYTES = WIDE_BYTES + Tile<OUTER_DEPTH>::bytes(OUTER_COLS);
    SHARED_MEMORY(shared);
    int narrow = table[0], wide = table[1];
    Pair pair = pair_at(table, table[tiles_at + 2 * blockIdx.x]);
    int col0 = table[tiles_at + 2 * blockIdx.x + 1], row0 = pair.upper.row;
    int first = blockIdx.y * share_rows, end = min(rows, first + share_rows);
    int warp = threadIdx.x / 32, warp_row = warp % 4 * 32, warp_col = warp / 4 * (OUTER_COLS / 2);
    Panel own = warp_row < PANEL_ROWS ? pair.upper : pair.lower;
    Covered tiles = covered(own, col0 + warp_col, OUTER_COLS / 2);
    int steps = ceil_div(end - first, OUTER_DEPTH);

    auto wide_tile = [&](int step) { return Tile<OUTER_DEPTH>{shared + step % STAGES * STAGE_BYTES}; };
    auto narrow_tile = [&](int step) { return Tile<OUTER_DEPTH>{wide_tile(step).base + WIDE_BYTES}; };
    auto fetch = [&](int step) {
        if (step < steps) {
            int m = first + step * OUTER_DEPTH;
            const Element* left = wide_values + (long long)m * wide + row0;
            const Element* right = narrow_values + (long long)m * narrow + col0;
            stage<BLOCK_COLS, THREADS>(wide_tile(step), left, wide, end - m, wide - row0);
            stage<OUTER_COLS, THREADS>(narrow_tile(step), right, narrow, end - m, narrow - col0);
        }
        copy_async_commit();
    };

    float acc[MT][NT][4] = {};
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
    for (int step = 0; step < steps; step++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        fetch(step + STAGES - 1);
        if (tiles.begin >= tiles.end) continue;
        Across<OUTER_DEPTH> left{wide_tile(step), warp_row};
        Across<OUTER_DEPTH> right{narrow_tile(step), warp_col};
#pragma unroll UNROLL
        for (int k = 0; k < OUTER_DEPTH; k += KSTEP) multiply<MT, NT>(acc, left, right, k, tiles.begin, tiles.end);
    }

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
    int row = blockIdx.x;
    Panel panel = panel_at(table, row / PANEL_ROWS);
    const u32* range = table + table[6] + 2 * row;
    int from = range[0], to = range[1];
    int base = panel.offset + (row - panel.row) * panel.cols;
    for (int c = threadIdx.x; c < panel.cols; c += blockDim.x) {
        int col = panel.col + c;
        float sum = 0.0f;
        if (col >= from && col < to) {
            for (int share = 0; share < count; share++) sum += shares[(long long)share * packed_len + base + c];
            if (add) sum += out[base + c];
        }
        out[base + c] = sum;
    }
}

#endif
