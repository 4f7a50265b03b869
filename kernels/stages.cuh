// How a block of band.cu multiplies: operands come to shared memory in stages and to registers step by step, results leave by
// the threads that have them side by side. The three products say what is fetched, multiplied and done with the results.
//
// The text of this file stands behind that of panels.cuh, before that of band.cu.

constexpr int WARPS_DOWN = BLOCK_ROWS / WARP_ROWS;
constexpr int THREADS = 32 * WARPS_DOWN * (BLOCK_COLS / WARP_COLS);
constexpr int MT = WARP_ROWS / 16;
constexpr int NT = WARP_COLS / 8;
// Neighbours in a row that a thread finishes at a time.
constexpr int WIDTH = !ALIGNED ? 1 : PRECISION == 16 ? LANES : 2;

// The operands in a stage: the rows or columns of the block's results by the depth, along it or across.
#if defined(OUTER)
constexpr int LEFT_ROWS = DEPTH;
typedef Across<LEFT_ROWS> Left;
#else
constexpr int LEFT_ROWS = BLOCK_ROWS;
typedef Along<LEFT_ROWS> Left;
#endif
#if defined(EXPAND)
constexpr int RIGHT_ROWS = BLOCK_COLS;
typedef Along<RIGHT_ROWS> Right;
#else
constexpr int RIGHT_ROWS = DEPTH;
typedef Across<RIGHT_ROWS> Right;
#endif
constexpr int LEFT_BYTES = Tile<LEFT_ROWS>::bytes(Left::ACROSS ? BLOCK_ROWS : DEPTH);
constexpr int STAGE_BYTES = LEFT_BYTES + Tile<RIGHT_ROWS>::bytes(Right::ACROSS ? BLOCK_COLS : DEPTH);
// Parts that a stage is fetched in: a round of chunks is the least that all threads copy of the smallest piece.
constexpr int SMALLEST = DEPTH * PANEL_ROWS / LANES / THREADS;
constexpr int PARTS = PRECISION == 32 || SMALLEST < 2 ? 1 : SMALLEST < 4 ? 2 : 4;

// Which halves of a warp's columns are multiplied. (Tests between products of single tiles cost more than those products.)
struct Covered {
    bool left, right;

    __device__ __forceinline__ bool all() const {
        return left && right;
    }
};

// Those, of a warp's from `col`, that [first, last) touches.
__device__ __forceinline__ Covered covered(int first, int last, int col) {
    int middle = col + WARP_COLS / 2;
    return Covered{first < middle && last > col, first < col + WARP_COLS && last > middle};
}

// What a thread copies of Rows rows x Cols columns that lie in a stage's tile of `TileRows` rows from byte `Offset` on: one column's
// chunks, in PARTS parts.
template <int Rows, int Cols, int TileRows, int Offset>
struct Copies {
    static constexpr int CHUNKS = rounded_chunks(Cols), AT_ONCE = THREADS / CHUNKS, ROUNDS = Rows / AT_ONCE / PARTS;
    static_assert(CHUNKS * LANES == Cols && ROUNDS * AT_ONCE * PARTS == Rows, "whole rounds of rows");
    static_assert(AT_ONCE % 8 == 0, "a thread's rows are permuted alike");
    int row, col;
    u32 place;

    __device__ __forceinline__ Copies() : row(threadIdx.x / CHUNKS), col(threadIdx.x % CHUNKS * LANES) {
        Tile<TileRows> tile{nullptr};
        place = Offset + (u32)(tile.at(row, col) - tile.base);
        keep(place);
    }

    // Starts to copy a part from `from`, where the thread's first chunk lies; zeros from row `rows` on and outside columns [begin, end).
    __device__ __forceinline__ void copy(char* stage, int part, const Element* from, long long stride, int rows, int begin,
                                         int end) const {
#pragma unroll ALIGNED ? ROUNDS : 1
        for (int r = 0; r < ROUNDS; r++) {
            int down = (part * ROUNDS + r) * AT_ONCE;
            char* to = stage + place + down * 128;
            bool valid = WHOLE || row + down < rows;
#if ALIGNED
            copy_async(to, from + down * stride, valid && col >= begin && col < end);
#else
            for (int lane = 0; lane < LANES; lane++) {
                bool inside = valid && col + lane >= begin && col + lane < end;
                store_element(reinterpret_cast<Element*>(to) + lane, inside ? to_float(from[down * stride + lane]) : 0.0f);
            }
#endif
        }
    }
};

#if PRECISION != 32

// An operand of the products, as a lane reads it: `lane` is the place in a stage of its part of the first 16 rows or columns at the
// first step of the depth.
template <bool IsLeft, bool IsAcross, int Rows, int Offset>
struct Operand {
    int first;
    u32 lane;

    __device__ __forceinline__ Operand(int first) : first(first) {
        int l = threadIdx.x % 32;
        // Of four matrices of 8 rows or columns by 8 steps that are read at once, the next in the one direction and in the other.
        int eight = IsLeft ? l / 8 % 2 : l / 16, step = IsLeft ? l / 16 : l / 8 % 2;
        int at = first + l % 8 + eight * 8;
        Tile<Rows> tile{nullptr};
        lane = Offset + (u32)((IsAcross ? tile.at(l % 8 + step * 8, first + eight * 8) : tile.at(at, step * LANES)) - tile.base);
        keep(lane);
    }

    // The 16 rows or columns from 16 i at step k of the depth.
    __device__ __forceinline__ void load(u32 (&r)[4], char* stage, int i, int k) const {
        if constexpr (!IsAcross) {
            load_matrices(r, stage + (lane ^ (k * (int)sizeof(Element))) + 16 * 128 * i);
        } else if constexpr (PRECISION == 16) {
            load_matrices_transposed(r, stage + (lane ^ (i % 4 * 32)) + i / 4 * Rows * 128 + 128 * k);
        } else {
            Across<Rows> operand{Tile<Rows>{stage + Offset}, first};
            if constexpr (IsLeft) {
                load_left(r, operand, i, k);
            } else {
                load_right(r, operand, i, k);
            }
        }
        round_operand(r);
    }
};

// The operands of one step of the depth, as the tensor cores take them.
struct Fragments {
    u32 a[MT][4], b[NT / 2][4];

    template <class LeftOperand, class RightOperand>
    __device__ __forceinline__ void load(const LeftOperand& left, const RightOperand& right, char* stage, int k) {
#pragma unroll
        for (int i = 0; i < MT; i++) left.load(a[i], stage, i, k);
#pragma unroll
        for (int j = 0; j < NT / 2; j++) right.load(b[j], stage, j, k);
    }

    // The tiles of 8 columns in [Begin, End).
    template <int Begin, int End>
    __device__ __forceinline__ void multiply(float (&acc)[MT][NT][4]) const {
#pragma unroll
        for (int j = Begin; j < End; j += 2) {
#pragma unroll
            for (int i = 0; i < MT; i++) {
                mma(acc[i][j], a[i], b[j / 2][0], b[j / 2][1]);
                mma(acc[i][j + 1], a[i], b[j / 2][2], b[j / 2][3]);
            }
        }
    }

    __device__ __forceinline__ void multiply(float (&acc)[MT][NT][4], const Covered& tiles) const {
        if (tiles.left) multiply<0, NT / 2>(acc);
        if (tiles.right) multiply<NT / 2, NT>(acc);
    }
};

#endif

// The place, in bytes, of the stage after or before another.
__device__ __forceinline__ int after(int slot) {
    return slot == (STAGES - 1) * STAGE_BYTES ? 0 : slot + STAGE_BYTES;
}

__device__ __forceinline__ int before(int slot) {
    return slot == 0 ? (STAGES - 1) * STAGE_BYTES : slot - STAGE_BYTES;
}

// Fills acc, stage by stage, by one of the kernels' products:
//   fetch(step, slot, part)  starts to copy a part of a stage, zeros beyond the last one; the last part closes a group of copies
//   arrived(step, slot)      a stage is there
//   tiles(step, k)           those that are multiplied at step k of the stage's depth
//   all(step)                whether those are all, so that there is nothing to ask between the products
//   also(fragments, at)      has another use of the operands of step `at` of a stage
// While the operands of a step of the depth are multiplied the next ones come to registers, and copies start part by part; a stage's
// place is free once its last operands have been read.
template <class Product>
__device__ __forceinline__ void run_stages(float (&acc)[MT][NT][4], char* shared, int steps, int warp_row, int warp_col,
                                           Product& product) {
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;
    }
    auto fetch_all = [&](int step, int slot) {
        for (int part = 0; part < PARTS; part++) product.fetch(step, slot, part);
    };
    for (int step = 0; step < STAGES - 1; step++) fetch_all(step, step * STAGE_BYTES);
    int slot = 0;
#if PRECISION == 32
    for (int step = 0; step < steps; step++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        product.arrived(step, slot);
        fetch_all(step + STAGES - 1, before(slot));
        Left left{{shared + slot}, warp_row};
        Right right{{shared + slot + LEFT_BYTES}, warp_col};
        for (int k = 0; k < DEPTH; k += KSTEP) {
            Covered tiles = product.tiles(step, k);
            multiply<MT, NT>(acc, left, right, k, tiles.left ? 0 : NT / 2, tiles.right ? NT : NT / 2);
        }
        slot = after(slot);
    }
#else
    Operand<true, Left::ACROSS, LEFT_ROWS, 0> left(warp_row);
    Operand<false, Right::ACROSS, RIGHT_ROWS, LEFT_BYTES> right(warp_col);
    copy_async_wait<STAGES - 2>();
    __syncthreads();
    product.arrived(0, 0);
    product.fetch(STAGES - 1, (STAGES - 1) * STAGE_BYTES, 0);
    Fragments fragments[2];
    fragments[0].load(left, right, shared, 0);
    auto stage = [&](int step, auto&& multiply) {
        constexpr int LAST = DEPTH / KSTEP - 1;
        static_assert(LAST % 2 == 1 && PARTS <= LAST + 1, "the first step's operands are where a stage before leaves them");
#pragma unroll
        for (int at = 0; at <= LAST; at++) {
            Fragments& next = fragments[(at + 1) % 2];
            if (at < LAST) {
                next.load(left, right, shared + slot, (at + 1) * KSTEP);
                if (at + 1 < PARTS) product.fetch(step + STAGES - 1, before(slot), at + 1);
            } else {
                copy_async_wait<STAGES - 2>();
                __syncthreads();
                product.arrived(step + 1, after(slot));
                next.load(left, right, shared + after(slot), 0);
                product.fetch(step + STAGES, slot, 0);
            }
            multiply(fragments[at % 2], at * KSTEP);
            product.also(fragments[at % 2], at);
        }
        slot = after(slot);
    };
    for (int step = 0; step < steps; step++) {
        if (product.all(step)) {
            stage(step, [&](const Fragments& now, int) { now.template multiply<0, NT>(acc); });
        } else {
            stage(step, [&](const Fragments& now, int k) { now.multiply(acc, product.tiles(step, k)); });
        }
    }
#endif
    copy_async_commit();
    copy_async_wait<0>();
}

// Neighbours in a row as they lie in memory.
struct __align__(WIDTH * sizeof(Element)) Neighbours {
    Element values[WIDTH];
};

// Has each thread `finish` neighbours of a row: finish(row, col, sums, bias, old), all inside `rows` and `cols`, where `bias` is of
// their columns (zeros without one), and `old` what bring(row, col, old) has read of them before, for many rows at once. Where all
// are inside (Inside) there are no branches.
template <bool Inside, class Bring, class Finish>
__device__ __forceinline__ void finish_results(const float (&acc)[MT][NT][4], int warp_row, int warp_col, int rows, int cols,
                                               const float* bias, const Bring& bring, const Finish& finish) {
    constexpr int CHUNKS = WIDTH == LANES ? 1 : 8 / WIDTH;
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    auto row_of = [&](int i, int half) { return warp_row + 16 * i + 8 * half + g; };
    auto inside = [&](int row, int col) { return Inside || (row < rows && col < cols); };
#pragma unroll
    for (int q = 0; q < NT / 4; q++) {
        // Of 32 columns a thread finishes 8 in chunks: as neighbours, or, of floats, the two of each 8 that the products have left it.
        auto col_of = [&](int chunk) {
            int first = CHUNKS == 1 ? 8 * t : chunk * WIDTH / 2 * 8 + 2 * t + chunk * WIDTH % 2;
            return warp_col + 32 * q + first;
        };
        float beside[CHUNKS][WIDTH] = {};
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            if (bias != nullptr && (Inside || col_of(chunk) < cols)) load(beside[chunk], bias + col_of(chunk));
        }
        Neighbours old[MT][2][CHUNKS];
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS; chunk++) {
                    if (inside(row_of(i, half), col_of(chunk))) bring(row_of(i, half), col_of(chunk), old[i][half][chunk]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float sums[CHUNKS][WIDTH];
                if constexpr (CHUNKS == 1) {
                    u32 even[4], odd[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        even[j] = __float_as_uint(acc[i][4 * q + j][2 * half]);
                        odd[j] = __float_as_uint(acc[i][4 * q + j][2 * half + 1]);
                    }
                    turn(even);
                    turn(odd);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        sums[0][2 * j] = __uint_as_float(even[j]);
                        sums[0][2 * j + 1] = __uint_as_float(odd[j]);
                    }
                } else {
#pragma unroll
                    for (int c = 0; c < 8; c++) sums[c / WIDTH][c % WIDTH] = acc[i][4 * q + c / 2][2 * half + c % 2];
                }
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS; chunk++) {
                    int row = row_of(i, half), col = col_of(chunk);
                    if (inside(row, col)) finish(row, col, sums[chunk], beside[chunk], old[i][half][chunk]);
                }
            }
        }
    }
}
