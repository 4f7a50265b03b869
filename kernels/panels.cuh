// What the kernels of a banded layer share: panels, how results change lanes on their way out, and how the outer
// product's tiles are dealt out.
//
// The text of this file stands behind that of matrix.cuh, before those of band.cu and band_hopper.cu.

constexpr int PANEL_ROWS = 64;

// Wide rows [row, row + rows) of narrow columns [col, end()), whose weights lie row by row from `offset` on (`Band::table`).
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

// The same; beyond the last one there are empty ones.
__device__ __forceinline__ Panel panel_or_none(const u32* table, int index) {
    return index < (int)table[2] ? panel_at(table, index) : Panel{index * PANEL_ROWS, 0, 0, 0, 0};
}

// A quad of lanes holds four chunks of 16 bytes, lane t the word t of each; afterwards lane t holds chunk t. Its own inverse.
__device__ __forceinline__ void turn(u32 (&words)[4]) {
    bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        u32 other = __shfl_xor_sync(0xffffffffu, odd ? words[i] : words[i + 1], 1);
        words[i] = odd ? other : words[i];
        words[i + 1] = odd ? words[i + 1] : other;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 other = __shfl_xor_sync(0xffffffffu, high ? words[i] : words[i + 2], 2);
        words[i] = high ? other : words[i];
        words[i + 2] = high ? words[i + 2] : other;
    }
}

#if defined(OUTER)

// Wide rows of a tile: Hopper's have PANELS panels for each of two warpgroups.
#if defined(PANELS)
constexpr int TILE_ROWS = 2 * PANELS * PANEL_ROWS;
#else
constexpr int TILE_ROWS = BLOCK_ROWS;
#endif

// What all threads of a block know of its work. The first `whole` tiles are whole; the others are cut into `parts` along the rows.
struct Work {
    const u32* table;
    int tiles_at, tiles, whole, parts, steps, add;
    float *out, *bias, *pieces;

    __device__ __forceinline__ int cut() const {
        return tiles - whole;
    }

    __device__ __forceinline__ int items() const {
        return whole + cut() * parts;
    }
};

// A tile, or a part of one: steps [first, end) of its rows. The parts of a tile are cut() pieces apart.
struct Item {
    int tile, first, end, piece;
    bool whole;

    __device__ __forceinline__ Item(const Work& work, int index) {
        bool is_whole = index < work.whole;
        piece = is_whole ? 0 : index - work.whole;
        int part = is_whole ? 0 : piece / work.cut(), parts = is_whole ? 1 : work.parts;
        tile = is_whole ? index : work.whole + piece % work.cut();
        first = part * work.steps / parts;
        end = (part + 1) * work.steps / parts;
        whole = parts == 1;
    }
};

// A tile by its first panel, wide row and narrow column.
struct OuterTile {
    int panel, row, col;
    bool adds;  // whether it is the one of its rows that sums the wide values

    __device__ __forceinline__ OuterTile(const Work& work, int tile) {
        const u32* words = work.table + work.tiles_at + 4 * tile;
        panel = words[0], row = words[1], col = words[2], adds = words[3];
    }
};

// Floats of a tile's piece: results as the threads hold them, then the sums of wide values.
constexpr int PIECE = TILE_ROWS * BLOCK_COLS + TILE_ROWS;

__device__ __forceinline__ float* piece_at(const Work& work, int piece) {
    return work.pieces + (long long)piece * PIECE;
}

// Writes results of a panel to dP: those of rows r and r + 8, in columns `col` and the next, and so on 8 columns further each.
template <int Groups>
__device__ __forceinline__ void write_results(const Work& work, const Panel& panel, int r, int col, const float (&acc)[Groups][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++, r += 8) {
        if (r >= panel.rows) continue;
        const u32* range = work.table + work.table[6] + 2 * (panel.row + r);
        int from = (int)range[0] - panel.col, to = (int)range[1] - panel.col;
        float* line = work.out + panel.offset + r * panel.cols;
#pragma unroll
        for (int j = 0; j < Groups; j++) {
            int c = col - panel.col + 8 * j;
            if (c < 0 || c >= panel.cols) continue;
            float2* at = reinterpret_cast<float2*>(line + c);
            float2 old = work.add ? *at : make_float2(0.0f, 0.0f);
            float2 sums;
            sums.x = c >= from && c < to ? acc[j][2 * half] + old.x : 0.0f;
            sums.y = c + 1 >= from && c + 1 < to ? acc[j][2 * half + 1] + old.y : 0.0f;
            *at = sums;
        }
    }
}

#endif
