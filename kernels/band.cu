// The three products of a banded layer; tiles outside the band are not visited. P is the packed weight.
//
//   band_expand     y[m, j] = sum over i in band(j) of x[m, i] P[j, i]; then, with EPILOGUE
//                   1: pre = y + bias, y = gelu(pre)     2: y = y gelu'(pre)
//   band_contract   y[m, i] = sum over j in band(i) of x[m, j] P[j, i] (+ bias[i], unless that is null)
//   band_outer      dP[j, i] (+)= sum over m of wide[m, j] narrow[m, i] in the band, 0 in every other slot; dbias[j] (+)= sum
//                   over m of wide[m, j], unless that is null; tiles that several blocks share go to `pieces`
//   band_outer_sum  the same from those pieces, added in order
//
// Shapes: x, y, pre, wide, narrow: [M, N] or [M, W]; bias [W] or [N]; P and dP packed as `Band::table` says. The table's
//   lists (see src/backend/cuda/band.rs): for each tile of narrow columns the panels that touch it; the tiles of the outer
//   product as (first of its panels, first row, first column, whether it is the first of these rows). ALIGNED: N and W are multiples
//   of LANES. WHOLE: besides, W is a multiple of 128 and M of a tile's rows of the batch. BLOCKS: blocks of 128 wide rows x 64
//   columns stand in the band's place, two panels each; after the table then stand, for each 128 wide rows, their first block
//   and, in the next word, the end of their blocks. To contract and outer these are panels like any other.
// Dtypes: Element operands and results, float bias, dP and dbias, sums in float.
// Grid: a block has BLOCK_ROWS x BLOCK_COLS results, a warp of it WARP_ROWS x WARP_COLS; STAGES tiles of DEPTH are on their
//   way. expand: for each tile of rows the groups of BLOCK_COLS / 64 panels; contract: for each tile of rows the tiles of
//   narrow columns; outer (rows of the block are wide ones): whole tiles, then the parts of the others (src/backend/cuda/outer.rs);
//   outer_sum: (tiles that are cut, groups of a warp's columns, 16-row tiles of a warp).
// Determinism: every piece is summed by one warp in order of the depth, and pieces are added in that order; of the wide values the
//   warps of the same rows sum every other step, and these sums are added in the order of the warps.
// Caller: src/backend/cuda/band.rs.

#if defined(EXPAND)

static_assert(BLOCK_COLS == 2 * PANEL_ROWS && WARP_COLS % PANEL_ROWS == 0, "a block has two panels, a warp whole ones");

// What run_stages needs of band_expand: x rows by the columns of two panels, along the narrow axis.
struct Expand {
    char* shared;
    const Element *x, *weights;
    const u32* table;
    int narrow, rows, steps;
    Copies<BLOCK_ROWS, DEPTH, BLOCK_ROWS, 0> x_copies;
    Copies<PANEL_ROWS, DEPTH, BLOCK_COLS, LEFT_BYTES> p_copies;
    // Of the stage to fetch next: its first column, and where the thread's share of it lies.
    int col;
    const Element *x_from, *upper_from, *lower_from;
    Panel upper, lower;
    // The first block, or the first column that any of the panels touches.
    int first;
#if BLOCKS
    // Stages that a block of the pattern makes.
    static constexpr int PER_BLOCK = 64 / DEPTH;
#else
    // The panels, upper and lower or the same, that the warp has.
    Panel own, own_lower;
#endif

    __device__ __forceinline__ Expand(char* shared, const Element* x, const Element* weights, const u32* table, int rows, int index,
                                      int row0, int warp_col)
        : shared(shared), x(x), weights(weights), table(table), narrow(table[0]), rows(rows - row0), col(0), upper_from(weights),
          lower_from(weights), upper{}, lower{} {
        x_from = x + (long long)(row0 + x_copies.row) * narrow + x_copies.col;
#if BLOCKS
        const u32* blocks = table + table[7] + 2 * table[4] + index;
        first = blocks[0], steps = (blocks[1] - first) * PER_BLOCK;
        this->x = x_from;  // each stage has columns of its own
        go(0);
#else
        upper = panel_or_none(table, 2 * index), lower = panel_or_none(table, 2 * index + 1);
        first = col = upper.cols == 0 ? lower.col : lower.cols == 0 ? upper.col : min(upper.col, lower.col);
        steps = ceil_div(max(upper.end(), lower.end()) - first, DEPTH);
        own = warp_col < PANEL_ROWS ? upper : lower;
        own_lower = warp_col + WARP_COLS <= PANEL_ROWS ? upper : lower;
        x_from += col;
        upper_from = from(upper), lower_from = from(lower);
#endif
    }

    // Where the thread's share of a panel lies from the stage's first column on.
    __device__ __forceinline__ const Element* from(const Panel& panel) const {
        return weights + panel.offset + p_copies.row * panel.cols + p_copies.col + col - panel.col;
    }

#if BLOCKS
    // Goes to a stage to fetch: what is read of it here is there when it is needed.
    __device__ __forceinline__ void go(int step) {
        if (step >= steps) return;
        int index = 2 * (first + step / PER_BLOCK);
        upper = panel_at(table, index), lower = panel_at(table, index + 1);
        col = upper.col + step % PER_BLOCK * DEPTH;
        x_from = x + col, upper_from = from(upper), lower_from = from(lower);
    }

    __device__ __forceinline__ bool all(int) const {
        return true;
    }

    __device__ __forceinline__ Covered tiles(int, int) const {
        return Covered{true, true};
    }
#else
    __device__ __forceinline__ void go(int) {
        col += DEPTH;
        x_from += DEPTH, upper_from += DEPTH, lower_from += DEPTH;
    }

    __device__ __forceinline__ bool all(int step) const {
        int at = first + step * DEPTH;
        return at >= max(own.col, own_lower.col) && at + DEPTH <= min(own.end(), own_lower.end());
    }

    __device__ __forceinline__ Covered tiles(int step, int k) const {
        int at = first + step * DEPTH + k;
        return Covered{at >= own.col && at < own.end(), at >= own_lower.col && at < own_lower.end()};
    }
#endif

    __device__ __forceinline__ void arrived(int, int) {}

#if PRECISION != 32
    __device__ __forceinline__ void also(const Fragments&, int) {}
#endif

    __device__ __forceinline__ void fetch(int step, int slot, int part) {
        bool more = step < steps;
        char* stage = shared + slot;
        x_copies.copy(stage, part, x_from, narrow, rows, 0, more ? narrow - col : 0);
        p_copies.copy(stage, part, upper_from, upper.cols, upper.rows, upper.col - col, more ? upper.end() - col : upper.col - col);
        p_copies.copy(stage + PANEL_ROWS * 128, part, lower_from, lower.cols, lower.rows, lower.col - col,
                      more ? lower.end() - col : lower.col - col);
        if (part < PARTS - 1) return;
        copy_async_commit();
        go(step + 1);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    band_expand(Element* y, Element* pre, const Element* x, const Element* weights,
                const float* bias, const u32* table, int rows) {
    SHARED_MEMORY(shared);
    int wide = table[1], groups = ceil_div(wide, BLOCK_COLS), index = blockIdx.x % groups;
    int row0 = blockIdx.x / groups * BLOCK_ROWS, col0 = index * BLOCK_COLS;
    int warp = threadIdx.x / 32, warp_row = warp % WARPS_DOWN * WARP_ROWS, warp_col = warp / WARPS_DOWN * WARP_COLS;

#if EPILOGUE == 2
    // What the results are multiplied by at the end is on its way meanwhile.
    constexpr int SECTORS = 128 / sizeof(Element);
    for (int i = threadIdx.x; i < BLOCK_ROWS * BLOCK_COLS / SECTORS; i += THREADS) {
        int row = row0 + i / (BLOCK_COLS / SECTORS), col = col0 + i % (BLOCK_COLS / SECTORS) * SECTORS;
        if (row < rows && col < wide) prefetch(pre + (long long)row * wide + col);
    }
#endif

    Expand product(shared, x, weights, table, rows, index, row0, warp_col);
    float acc[MT][NT][4];
    run_stages(acc, shared, product.steps, warp_row, warp_col, product);
    auto place = [&](int r, int c) { return (long long)(row0 + r) * wide + col0 + c; };
    auto bring = [&](int r, int c, Neighbours& old) {
        if (EPILOGUE == 2) old = *reinterpret_cast<const Neighbours*>(pre + place(r, c));
    };
    const float* beside = EPILOGUE == 1 ? bias + col0 : nullptr;
    auto finish = [&](int r, int c, float(&sums)[WIDTH], const float(&bias)[WIDTH], const Neighbours& old) {
#if EPILOGUE == 1
#pragma unroll
        for (int lane = 0; lane < WIDTH; lane++) sums[lane] += bias[lane];
        store(pre + place(r, c), sums);
#pragma unroll
        for (int lane = 0; lane < WIDTH; lane++) sums[lane] = gelu(sums[lane]);
#else
        float others[WIDTH];
        load(others, old.values);
#pragma unroll
        for (int lane = 0; lane < WIDTH; lane++) sums[lane] *= gelu_derivative(others[lane]);
#endif
        store(y + place(r, c), sums);
    };
    finish_results<WHOLE>(acc, warp_row, warp_col, rows - row0, wide - col0, beside, bring, finish);
}

#elif defined(CONTRACT)

// What run_stages needs of band_contract: x rows by a tile of narrow columns, along the wide rows of the panels that touch it.
struct Contract {
    // Stages that a panel's rows make.
    static constexpr int PER_PANEL = PANEL_ROWS / DEPTH;
    char* shared;
    int2* windows;  // the columns that the panel of each stage on its way covers
    const Element *x, *weights;
    const u32 *table, *list;
    int wide, rows, col0, warp_col, steps;
    Copies<BLOCK_ROWS, DEPTH, BLOCK_ROWS, 0> x_copies;
    Copies<DEPTH, BLOCK_COLS, DEPTH, LEFT_BYTES> p_copies;
    // Of the stage to fetch next: its panel, the first of the panel's rows that it has, and where the thread's share lies.
    Panel panel;
    int row;
    const Element *x_from, *p_from;
    Covered here, next;

    __device__ __forceinline__ Contract(char* shared, int2* windows, const Element* x, const Element* weights, const u32* table,
                                        int tiles_at, int tile, int rows, int row0, int warp_col)
        : shared(shared), windows(windows), weights(weights), table(table), wide(table[1]), rows(rows - row0), col0(tile * BLOCK_COLS),
          warp_col(warp_col), panel{} {
        list = table + table[tiles_at + 2 * tile];
        steps = table[tiles_at + 2 * tile + 1] * PER_PANEL;
        this->x = x + (long long)(row0 + x_copies.row) * wide + x_copies.col;
        go(0);
    }

    // Goes to a stage to fetch: what is read of it here is there when it is needed.
    __device__ __forceinline__ void go(int step) {
        if (step < steps) panel = panel_at(table, list[step / PER_PANEL]);
        row = step % PER_PANEL * DEPTH;
        x_from = x + panel.row + row;
        p_from = weights + panel.offset + (row + p_copies.row) * panel.cols + col0 + p_copies.col - panel.col;
    }

    __device__ __forceinline__ void arrived(int, int slot) {
        int2 window = windows[slot / STAGE_BYTES];
        next = covered(window.x, window.y, col0 + warp_col);
    }

    __device__ __forceinline__ bool all(int) {
        here = next;
        return here.all();
    }

    __device__ __forceinline__ Covered tiles(int, int) const {
        return PRECISION == 32 ? next : here;
    }

#if PRECISION != 32
    __device__ __forceinline__ void also(const Fragments&, int) {}
#endif

    __device__ __forceinline__ void fetch(int step, int slot, int part) {
        bool more = step < steps;
        char* stage = shared + slot;
        x_copies.copy(stage, part, x_from, wide, rows, 0, more ? panel.rows - row : 0);
        p_copies.copy(stage, part, p_from, panel.cols, panel.rows - row, panel.col - col0, more ? panel.end() - col0 : panel.col - col0);
        if (part == 0 && threadIdx.x == 0) windows[slot / STAGE_BYTES] = make_int2(panel.col, panel.end());
        if (part < PARTS - 1) return;
        copy_async_commit();
        go(step + 1);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    band_contract(Element* y, const Element* x, const Element* weights, const float* bias, const u32* table,
                  int tiles_at, int rows) {
    SHARED_MEMORY(shared);
    __shared__ int2 windows[STAGES];
    int narrow = table[0], tiles_across = ceil_div(narrow, BLOCK_COLS), tile = blockIdx.x % tiles_across;
    int col0 = tile * BLOCK_COLS, row0 = blockIdx.x / tiles_across * BLOCK_ROWS;
    int warp = threadIdx.x / 32, warp_row = warp % WARPS_DOWN * WARP_ROWS, warp_col = warp / WARPS_DOWN * WARP_COLS;
    Contract product(shared, windows, x, weights, table, tiles_at, tile, rows, row0, warp_col);
    float acc[MT][NT][4];
    run_stages(acc, shared, product.steps, warp_row, warp_col, product);

    const float* beside = bias == nullptr ? nullptr : bias + col0;
    auto finish = [&](int r, int c, float(&sums)[WIDTH], const float(&bias)[WIDTH], const Neighbours&) {
#pragma unroll
        for (int lane = 0; lane < WIDTH; lane++) sums[lane] += bias[lane];
        store(y + (long long)(row0 + r) * narrow + col0 + c, sums);
    };
    finish_results<false>(acc, warp_row, warp_col, rows - row0, narrow - col0, beside, [](int, int, Neighbours&) {}, finish);
}

#elif defined(OUTER)

static_assert(PANEL_ROWS % WARP_ROWS == 0, "a warp's rows lie in one panel");

[[maybe_unused]] constexpr int WARPS_ACROSS = BLOCK_COLS / WARP_COLS;

// What run_stages needs of band_outer: a tile of wide rows by narrow columns, along the rows of the batch.
struct Outer {
    char* shared;
    int wide, narrow, wide_cols, narrow_cols, steps;
    Covered own;
    Copies<DEPTH, BLOCK_ROWS, DEPTH, 0> wide_copies;
    Copies<DEPTH, BLOCK_COLS, DEPTH, LEFT_BYTES> narrow_copies;
    // Of the stage to fetch next: where the thread's share lies, and the rows that are left.
    const Element *wide_from, *narrow_from;
    int left;
    bool adds;
#if PRECISION == 32
    float sum = 0.0f;
#else
    // Sums of wide values, as products with ones: of a warp's 16-row tile i in column i, for which only that column has ones. The
    // warps beside each other, of the same rows, take the steps of the depth by turns.
    float sums[4] = {};
    u32 column;
    int turn_of;
#endif

    __device__ __forceinline__ Outer(char* shared, const Element* wide_values, const Element* narrow_values, const u32* table, int first,
                                     int rows, int row0, int col0, const Covered& own, bool adds, int warp_col)
        : shared(shared), wide(table[1]), narrow(table[0]), wide_cols(wide - row0), narrow_cols(narrow - col0),
          steps(ceil_div(rows, DEPTH)), own(own), left(rows), adds(adds) {
        wide_from = wide_values + (long long)(first + wide_copies.row) * wide + row0 + wide_copies.col;
        narrow_from = narrow_values + (long long)(first + narrow_copies.row) * narrow + col0 + narrow_copies.col;
#if PRECISION != 32
        column = threadIdx.x % 32 / 4;
        turn_of = adds ? warp_col / WARP_COLS : WARPS_ACROSS;
#endif
    }

    __device__ __forceinline__ void arrived(int, int slot) {
#if PRECISION == 32
        if (!adds || threadIdx.x >= BLOCK_ROWS) return;
        Tile<DEPTH> values{shared + slot};
        for (int k = 0; k < DEPTH; k++) sum += values.element(k, threadIdx.x);
#endif
    }

#if PRECISION != 32
    __device__ __forceinline__ void also(const Fragments& fragments, int step) {
        constexpr u32 ONES = PRECISION == 16 ? 0x3f803f80u : 0x3f800000u;
        if (step % WARPS_ACROSS != turn_of) return;
#pragma unroll
        for (int i = 0; i < MT; i++) {
            u32 ones = column == i ? ONES : 0;
            mma(sums, fragments.a[i], ones, ones);
        }
    }
#endif

    __device__ __forceinline__ bool all(int) const {
        return own.all();
    }

    __device__ __forceinline__ Covered tiles(int, int) const {
        return own;
    }

    __device__ __forceinline__ void fetch(int step, int slot, int part) {
        bool more = step < steps;
        char* stage = shared + slot;
        wide_copies.copy(stage, part, wide_from, wide, left, 0, more ? wide_cols : 0);
        narrow_copies.copy(stage, part, narrow_from, narrow, left, 0, more ? narrow_cols : 0);
        if (part < PARTS - 1) return;
        copy_async_commit();
        wide_from += (long long)DEPTH * wide, narrow_from += (long long)DEPTH * narrow, left -= DEPTH;
    }

    // Sums to dbias, or to the item's piece.
    __device__ __forceinline__ void write_sums(const Work& work, const Item& item, const OuterTile& tile, int warp_row) {
#if PRECISION != 32
        static_assert(WARPS_ACROSS <= DEPTH / KSTEP && MT % 2 == 0, "each warp has its turn");
        float* all = reinterpret_cast<float*>(shared);
        int g = threadIdx.x % 32 / 4, i = threadIdx.x % 4 * 2;
        __syncthreads();
        if (i < MT) {
            float* own_sums = all + turn_of * BLOCK_ROWS + warp_row + 16 * i + g;
            own_sums[0] = sums[0], own_sums[8] = sums[2], own_sums[16] = sums[1], own_sums[24] = sums[3];
        }
        __syncthreads();
#endif
        int j = tile.row + threadIdx.x;
        if (threadIdx.x >= BLOCK_ROWS) return;
#if PRECISION != 32
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS_ACROSS; warp++) sum += all[warp * BLOCK_ROWS + threadIdx.x];
#endif
        if (!item.whole) {
            piece_at(work, item.piece)[BLOCK_ROWS * BLOCK_COLS + threadIdx.x] = sum;
        } else if (j < wide) {
            work.bias[j] = work.add ? work.bias[j] + sum : sum;
        }
    }
};

static_assert(THREADS >= BLOCK_ROWS, "a thread for each row's sum");

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    band_outer(float* out, float* bias, float* pieces, const Element* wide_values, const Element* narrow_values, const u32* table,
               int tiles_at, int tiles, int whole, int parts, int rows, int add) {
    SHARED_MEMORY(shared);
    Work work{table, tiles_at, tiles, whole, parts, ceil_div(rows, DEPTH), add, out, bias, pieces};
    Item item(work, blockIdx.x);
    OuterTile tile(work, item.tile);
    int warp = threadIdx.x / 32, warp_row = warp % WARPS_DOWN * WARP_ROWS, warp_col = warp / WARPS_DOWN * WARP_COLS;
    Panel own = panel_or_none(table, tile.panel + warp_row / PANEL_ROWS);
    bool adds = bias != nullptr && tile.adds;
    int first = item.first * DEPTH;
    Outer product(shared, wide_values, narrow_values, table, first, min(rows, item.end * DEPTH) - first, tile.row, tile.col,
                  covered(own.col, own.end(), tile.col + warp_col), adds, warp_col);
    float acc[MT][NT][4];
    run_stages(acc, shared, product.steps, warp_row, warp_col, product);
    if (adds) product.write_sums(work, item, tile, warp_row);
    if (item.whole) {
#pragma unroll
        for (int i = 0; i < MT; i++) {
            int r = (warp_row + 16 * i) % PANEL_ROWS + threadIdx.x % 32 / 4;
            write_results(work, own, r, tile.col + warp_col + threadIdx.x % 4 * 2, acc[i]);
        }
        return;
    }
    float4* piece = reinterpret_cast<float4*>(piece_at(work, item.piece));
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
            piece[(i * NT + j) * THREADS + threadIdx.x] = make_float4(acc[i][j][0], acc[i][j][1], acc[i][j][2], acc[i][j][3]);
        }
    }
}

// Groups of 8 columns that a block of band_outer_sum adds up.
constexpr int SUM_GROUPS = 4;

extern "C" __global__ void __launch_bounds__(THREADS)
    band_outer_sum(float* out, float* bias, float* pieces, const u32* table, int tiles_at, int tiles, int whole, int parts, int add) {
    Work work{table, tiles_at, tiles, whole, parts, 0, add, out, bias, pieces};
    OuterTile tile(work, whole + blockIdx.x);
    int group = blockIdx.y * SUM_GROUPS, i = blockIdx.z;
    bool adds = bias != nullptr && tile.adds && group == 0 && i == 0;
    float acc[SUM_GROUPS][4] = {};
#pragma unroll 2
    for (int part = 0; part < parts; part++) {
        const float* piece = piece_at(work, part * work.cut() + blockIdx.x);
#pragma unroll
        for (int j = 0; j < SUM_GROUPS; j++) {
            float4 c = reinterpret_cast<const float4*>(piece)[(i * NT + group + j) * THREADS + threadIdx.x];
            acc[j][0] += c.x;
            acc[j][1] += c.y;
            acc[j][2] += c.z;
            acc[j][3] += c.w;
        }
    }
    int warp = threadIdx.x / 32, row = warp % WARPS_DOWN * WARP_ROWS + 16 * i, col = warp / WARPS_DOWN * WARP_COLS + 8 * group;
    Panel panel = panel_or_none(table, tile.panel + row / PANEL_ROWS);
    write_results(work, panel, row % PANEL_ROWS + threadIdx.x % 32 / 4, tile.col + col + threadIdx.x % 4 * 2, acc);
    for (int own = threadIdx.x; adds && own < BLOCK_ROWS && tile.row + own < (int)table[1]; own += THREADS) {
        float sum = 0.0f;
        for (int part = 0; part < parts; part++) sum += piece_at(work, part * work.cut() + blockIdx.x)[BLOCK_ROWS * BLOCK_COLS + own];
        bias[tile.row + own] = add ? bias[tile.row + own] + sum : sum;
    }
}

#endif
