// Products of tiles in shared memory.
//
// A tile has rows of 128 bytes; a wider one consists of several such segments, one after the other. In each row the eight
// 16-byte chunks are permuted by the row's number, so that eight rows at one column, and of floats four rows at eight columns
// too, lie in different banks; of bf16 they are permuted as `wgmma` expects it. An operand lies along the depth (its rows are
// the result's rows or columns) or across it (its rows are steps of the depth). A warp holds MT x NT tiles of 16 x 8 results as
// `mma_bf16` describes them, in every precision.
//
// The text of this file stands behind that of common.cuh, before those kernels that multiply matrices.

// Elements of a tile's row of 128 bytes, and of the depth that one step of `multiply` takes.
[[maybe_unused]] constexpr int SEGMENT = 128 / sizeof(Element);
[[maybe_unused]] constexpr int KSTEP = PRECISION == 16 ? 16 : 8;

// Steps of the depth that a loop over `multiply` is unrolled by: the fewer instructions a step has, the more.
[[maybe_unused]] constexpr int UNROLL = PRECISION == 16 ? 8 : PRECISION == 19 ? 2 : 1;

template <int Rows>
struct Tile {
    char* base;

    // Bytes of a tile of `cols` columns.
    static constexpr int bytes(int cols) {
        return (cols + SEGMENT - 1) / SEGMENT * Rows * 128;
    }

    // The chunk that holds column `col` of a row.
    __device__ __forceinline__ char* at(int row, int col) const {
        int chunk = (col % SEGMENT) / LANES;
        int place = chunk ^ (PRECISION == 16 ? row & 7 : ((row & 3) << 1) | ((row >> 2) & 1));
        return base + ((col / SEGMENT) * Rows + row) * 128 + place * 16;
    }

    __device__ __forceinline__ Element& element(int row, int col) const {
        return reinterpret_cast<Element*>(at(row, col))[col % LANES];
    }
};

// An operand from row `first` of a tile that lies along the depth.
template <int Rows>
struct Along {
    Tile<Rows> tile;
    int first;
    static constexpr bool ACROSS = false;
};

// An operand from column `first` of a tile that lies across the depth.
template <int Rows>
struct Across {
    Tile<Rows> tile;
    int first;
    static constexpr bool ACROSS = true;
};

// Chunks of a row of `cols` elements, rounded up to a power of two.
constexpr int rounded_chunks(int cols) {
    int chunks = 1;
    while (chunks * LANES < cols) chunks *= 2;
    return chunks;
}

// Starts to copy `Count` x `Cols` elements of a row-major matrix, whose rows start at 16-byte boundaries, to the tile's rows
// from `tile_row`; zeros from row `rows` on and outside columns [begin, end). Each thread keeps to one column.
template <int Count, int Cols, int Threads, int Rows>
__device__ __forceinline__ void stage_aligned(const Tile<Rows>& tile, int tile_row, const Element* matrix, long long stride,
                                              int rows, int begin, int end) {
    constexpr int chunks = rounded_chunks(Cols);
    constexpr int at_once = Threads / chunks;
    static_assert(Count % at_once == 0, "whole rounds of rows");
    int row = threadIdx.x / chunks, col = threadIdx.x % chunks * LANES;
    if (Cols % (chunks * LANES) != 0 && col >= Cols) return;
    bool inside = col >= begin && col < end;
    const Element* from = matrix + row * stride + col;
    if (rows >= Count) {
#pragma unroll
        for (int r = 0; r < Count; r += at_once) {
            copy_async(tile.at(tile_row + row + r, col), from, inside);
            from += at_once * stride;
        }
    } else {
#pragma unroll 1
        for (int r = 0; r < Count; r += at_once) {
            copy_async(tile.at(tile_row + row + r, col), from, inside && row + r < rows);
            from += at_once * stride;
        }
    }
}

// The same for all the tile's rows of any matrix; zeros from row `rows` and column `cols` on. With ALIGNED its rows start at
// 16-byte boundaries and `cols` is a multiple of LANES.
template <int Cols, int Threads, int Rows>
__device__ __forceinline__ void stage(const Tile<Rows>& tile, const Element* matrix, long long stride, int rows, int cols) {
#if ALIGNED
    stage_aligned<Rows, Cols, Threads>(tile, 0, matrix, stride, rows, 0, cols);
#else
    constexpr int chunks = Cols / LANES;
#pragma unroll 1
    for (int i = threadIdx.x; i < Rows * chunks; i += Threads) {
        int row = i / chunks, col = i % chunks * LANES;
        Element* to = reinterpret_cast<Element*>(tile.at(row, col));
        for (int lane = 0; lane < LANES; lane++) {
            bool valid = row < rows && col + lane < cols;
            store_element(to + lane, valid ? to_float(matrix[row * stride + col + lane]) : 0.0f);
        }
    }
#endif
}

#if PRECISION == 32

// Of the KSTEP multiplications of a step, how many are unrolled; a kernel that is short of registers is given 1.
#ifndef STEP_UNROLL
#define STEP_UNROLL 2
#endif

template <int Rows>
__device__ __forceinline__ float value(const Along<Rows>& operand, int index, int k) {
    return operand.tile.element(operand.first + index, k);
}

template <int Rows>
__device__ __forceinline__ float value(const Across<Rows>& operand, int index, int k) {
    return operand.tile.element(k, operand.first + index);
}

// Values at an even index and the next.
template <int Rows>
__device__ __forceinline__ float2 values(const Along<Rows>& operand, int index, int k) {
    return make_float2(value(operand, index, k), value(operand, index + 1, k));
}

template <int Rows>
__device__ __forceinline__ float2 values(const Across<Rows>& operand, int index, int k) {
    return *reinterpret_cast<const float2*>(&operand.tile.element(k, operand.first + index));
}

// acc += left right over KSTEP of the depth from k, for the tiles [begin, end) of the NT across (multiples of 2).
template <int MT, int NT, class Left, class Right>
__device__ __forceinline__ void multiply(float (&acc)[MT][NT][4], const Left& left, const Right& right, int k, int begin = 0,
                                         int end = NT) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll STEP_UNROLL
    for (int step = 0; step < KSTEP; step++) {
        float a[MT][2];
#pragma unroll
        for (int i = 0; i < MT; i++) {
            a[i][0] = value(left, 16 * i + g, k + step);
            a[i][1] = value(left, 16 * i + g + 8, k + step);
        }
#pragma unroll
        for (int j = 0; j < NT; j++) {
            if (j < begin || j >= end) continue;
            float2 b = values(right, 8 * j + 2 * t, k + step);
#pragma unroll
            for (int i = 0; i < MT; i++) {
                acc[i][j][0] = fmaf(a[i][0], b.x, acc[i][j][0]);
                acc[i][j][1] = fmaf(a[i][0], b.y, acc[i][j][1]);
                acc[i][j][2] = fmaf(a[i][1], b.x, acc[i][j][2]);
                acc[i][j][3] = fmaf(a[i][1], b.y, acc[i][j][3]);
            }
        }
    }
}

#else

// The 16 rows of a left operand from 16 i, or the 16 columns of a right one (two tiles) from 16 j, over one step from k.
template <int Rows>
__device__ __forceinline__ void load_left(u32 (&r)[4], const Along<Rows>& operand, int i, int k) {
    int lane = threadIdx.x % 32;
    load_matrices(r, operand.tile.at(operand.first + 16 * i + lane % 16, k + lane / 16 * LANES));
}

template <int Rows>
__device__ __forceinline__ void load_right(u32 (&r)[4], const Along<Rows>& operand, int j, int k) {
    int lane = threadIdx.x % 32;
    load_matrices(r, operand.tile.at(operand.first + 16 * j + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * LANES));
}

template <int Rows>
__device__ __forceinline__ void load_left(u32 (&r)[4], const Across<Rows>& operand, int i, int k) {
    int lane = threadIdx.x % 32;
#if PRECISION == 16
    load_matrices_transposed(r, operand.tile.at(k + lane % 8 + lane / 16 * 8, operand.first + 16 * i + lane / 8 % 2 * 8));
#else
#pragma unroll
    for (int e = 0; e < 4; e++) {
        r[e] = __float_as_uint(operand.tile.element(k + lane % 4 + e / 2 * 4, operand.first + 16 * i + lane / 4 + e % 2 * 8));
    }
#endif
}

template <int Rows>
__device__ __forceinline__ void load_right(u32 (&r)[4], const Across<Rows>& operand, int j, int k) {
    int lane = threadIdx.x % 32;
#if PRECISION == 16
    load_matrices_transposed(r, operand.tile.at(k + lane % 16, operand.first + 16 * j + lane / 16 * 8));
#else
#pragma unroll
    for (int e = 0; e < 4; e++) {
        r[e] = __float_as_uint(operand.tile.element(k + lane % 4 + e % 2 * 4, operand.first + 16 * j + lane / 4 + e / 2 * 8));
    }
#endif
}

// Brings operands from memory to what the tensor cores take.
__device__ __forceinline__ void round_operand(u32 (&r)[4]) {
#if PRECISION == 19
#pragma unroll
    for (int e = 0; e < 4; e++) r[e] = to_tf32(r[e]);
#endif
}

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if PRECISION == 16
    mma_bf16(c, a, b0, b1);
#else
    mma_tf32(c, a, b0, b1);
#endif
}

// acc += left right over KSTEP of the depth from k, for the tiles [begin, end) of the NT across (multiples of 2).
template <int MT, int NT, class Left, class Right>
__device__ __forceinline__ void multiply(float (&acc)[MT][NT][4], const Left& left, const Right& right, int k, int begin = 0,
                                         int end = NT) {
    u32 a[MT][4];
#pragma unroll
    for (int i = 0; i < MT; i++) {
        load_left(a[i], left, i, k);
        round_operand(a[i]);
    }
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
        if (j < begin || j >= end) continue;
        u32 b[4];
        load_right(b, right, j / 2, k);
        round_operand(b);
#pragma unroll
        for (int i = 0; i < MT; i++) {
            mma(acc[i][j], a[i], b[0], b[1]);
            mma(acc[i][j + 1], a[i], b[2], b[3]);
        }
    }
}

#endif
