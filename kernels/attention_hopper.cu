// Causal multi-head attention on Hopper: the maths of `attention.cu` by its matrix units and its copy engine. Only for bf16, heads
// of 64 and sequences of whole tiles of 64 tokens.
//
//   attention_forward         S = scale Q K^T where key <= query; out = softmax(S) V; lse = log sum exp S
//   attention_backward_query  delta = sum over the head of dout * out; P = exp(S - lse); dS = P * (dout V^T - delta) * scale;
//                             dQ = dS K
//   attention_backward_key    the same P and dS, transposed: dV = P^T dout; dK = dS^T Q
//
// Shapes: qkv and dqkv [B, T, 3C], out and dout [B, T, C], lse and delta [B, NH, T]. The maps describe matrices of B T rows to the
//   copy engine, in boxes of 64 x 64.
// Dtypes: bf16 operands and results, float statistics; sums and softmax in float.
// Grid: (sequences in turn for each tile of queries or, for the keys' gradients, keys; heads), a warpgroup each. It walks over
//   tiles of the other axis, skipping those that causality hides; STAGES of these are on their way or in use. What a product of
//   two tiles makes is the left operand of the next one as it lies in registers. RESIDENT blocks are on a multiprocessor.
// Determinism: one warp sums each element in order; dQ is computed apart from dK and dV, so nothing is added atomically.
// Caller: src/backend/cuda/attention_hopper.rs.

constexpr int THREADS = 128;
constexpr int TILE = 64;
constexpr int TILE_BYTES = TILE * 128;
constexpr int NT = TILE / 8;
constexpr float LOG2_E = 1.4426950408889634f;
[[maybe_unused]] constexpr float HIDDEN = -1e30f;

// Tiles of its own that a block has in shared memory, and the two of a stage.
#if defined(FORWARD)
constexpr int OWN_TILES = 1;
#else
constexpr int OWN_TILES = 2;
#endif
constexpr int STAGE_BYTES = 2 * TILE_BYTES;
static_assert(STAGES >= 2, "the queries' kernel reads `out` from the second stage before that is needed");
// Of lse or of delta, for a tile of queries.
[[maybe_unused]] constexpr int STATISTICS_BYTES = TILE * 4;

// 64 x 64 results of a warpgroup, as `mma_bf16` describes them, and as a left operand.
typedef float Scores[NT][4];
typedef u32 Left[TILE / KSTEP][4];

// The tile's rows of this warp as a left operand.
__device__ __forceinline__ void load_rows(Left& left, char* tile) {
    Along<TILE> rows{Tile<TILE>{tile}, (int)threadIdx.x / 32 * 16};
#pragma unroll
    for (int k = 0; k < TILE / KSTEP; k++) load_left(left[k], rows, 0, k * KSTEP);
}

__device__ __forceinline__ void pack(Left& left, const Scores& x) {
#pragma unroll
    for (int k = 0; k < TILE / KSTEP; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) left[k][i] = pack_bf16(x[2 * k + i / 2][i % 2 * 2], x[2 * k + i / 2][i % 2 * 2 + 1]);
    }
}

// A point in the order of what the compiler does with results: it does not know how long products write to them.
__device__ __forceinline__ void hold(Scores& x) {
#pragma unroll
    for (int j = 0; j < NT; j++) wgmma_hold(x[j]);
}

__device__ __forceinline__ void clear(Scores& x) {
#pragma unroll
    for (int j = 0; j < NT; j++) x[j][0] = x[j][1] = x[j][2] = x[j][3] = 0.0f;
    hold(x);
}

// Begins x = rows of the block's own tile times the tile's rows, over the head. (With its own rows in registers, ptxas 12.9 to 13.5
// gives the same registers to `weights`.)
__device__ __forceinline__ void begin_scores(Scores& x, char* own, char* tile) {
    Along<TILE> left{Tile<TILE>{own}, 0}, right{Tile<TILE>{tile}, 0};
    wgmma_first<false, false>(x, descriptor(left, 0), descriptor(right, 0));
#pragma unroll
    for (int k = KSTEP; k < TILE; k += KSTEP) wgmma<TILE, false, false>(x, descriptor(left, k), descriptor(right, k));
    wgmma_commit();
}

// Begins x += weights times the tile, over its rows.
__device__ __forceinline__ void begin_weighted(Scores& x, const Left& weights, char* tile) {
    Across<TILE> right{Tile<TILE>{tile}, 0};
#pragma unroll
    for (int k = 0; k < TILE / KSTEP; k++) wgmma<true>(x, weights[k], descriptor(right, k * KSTEP));
    wgmma_commit();
}

// What a block works on, and its shared memory: tiles of its own, stages, a barrier for the tiles and one for each stage.
struct Work {
    int own, tiles, row, col;  // its tile and how many there are; the sequence's first row and the head's first column
    long long statistics;
    char* shared;
    int warp, g, t;

    __device__ __forceinline__ Work(char* shared, int own, int batches, int tokens)
        : own(own), tiles(tokens / TILE), row((int)blockIdx.x % batches * tokens), col((int)blockIdx.y * TILE),
          statistics(((long long)((int)blockIdx.x % batches) * gridDim.y + blockIdx.y) * tokens), shared(shared),
          warp(threadIdx.x / 32), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}

    __device__ __forceinline__ char* tile(int index) const {
        return shared + index * TILE_BYTES;
    }

    __device__ __forceinline__ char* stage(int slot) const {
        return tile(OWN_TILES) + slot * STAGE_BYTES;
    }

    __device__ __forceinline__ u64* barriers() const {
        return reinterpret_cast<u64*>(stage(STAGES));
    }

    __device__ __forceinline__ u64* own_full() const {
        return barriers();
    }

    __device__ __forceinline__ u64* full(int slot) const {
        return barriers() + 1 + slot;
    }

    __device__ __forceinline__ void begin() const {
        if (threadIdx.x == 0) {
            barrier_init(own_full(), 1);
            for (int slot = 0; slot < STAGES; slot++) barrier_init(full(slot), 1);
            barrier_show();
        }
        __syncthreads();
    }

    // Has keys and values of the tile that step `step` meets copied to its stage.
    __device__ __forceinline__ void fetch_keys(const TensorMap& qkv_map, int channels, int step) const {
        if (threadIdx.x != 0) return;
        int slot = step % STAGES;
        barrier_expect(full(slot), STAGE_BYTES);
        tensor_load(stage(slot), &qkv_map, channels + col, row + step * TILE, full(slot));
        tensor_load(stage(slot) + TILE_BYTES, &qkv_map, 2 * channels + col, row + step * TILE, full(slot));
    }

    // Row of the tile that result `e` of this thread belongs to, and its column among 8.
    __device__ __forceinline__ int result_row(int e) const {
        return 16 * warp + g + e / 2 * 8;
    }

    __device__ __forceinline__ int result_col(int e) const {
        return 2 * t + e % 2;
    }

    // Of the tile on the diagonal: `value` for every key behind its query; rows are queries, or with Keys keys.
    template <bool Keys>
    __device__ __forceinline__ void hide(Scores& x, float value) const {
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = 8 * j + result_col(e), query = result_row(e);
                x[j][e] = (Keys ? query > key : key > query) ? value : x[j][e];
            }
        }
    }

    // Results times `scale` to the rows of this warp in one of the block's own tiles, which its products have read before.
    __device__ __forceinline__ void keep(int index, const Scores& x, float scale0, float scale1) const {
        Tile<TILE> out{tile(index)};
#pragma unroll
        for (int j = 0; j < NT; j++) {
            *reinterpret_cast<u32*>(&out.element(result_row(0), 8 * j + 2 * t)) = pack_bf16(x[j][0] * scale0, x[j][1] * scale0);
            *reinterpret_cast<u32*>(&out.element(result_row(2), 8 * j + 2 * t)) = pack_bf16(x[j][2] * scale1, x[j][3] * scale1);
        }
    }
};

typedef StagePlace<STAGES> Place;

#if !defined(FORWARD)

// Begins the products of both tiles of the next stage with the block's own. The scores of the first are there on return, those of the
// second after `wgmma_wait<0>`.
__device__ __forceinline__ void begin_stage(const Work& work, const Place& place, Scores& p, Scores& dp) {
    char* stage = work.stage(place.slot);
    barrier_wait(work.full(place.slot), place.phase);
    wgmma_begin();
    begin_scores(p, work.tile(0), stage);
    begin_scores(dp, work.tile(1), stage + TILE_BYTES);
    wgmma_wait<1>();
    hold(p);
}

#endif

#if defined(FORWARD)

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    attention_forward(const __grid_constant__ TensorMap qkv_map, const __grid_constant__ TensorMap out_map, float* lse, int batches,
                      int tokens, int channels, float scale) {
    SHARED_MEMORY(shared);
    // The last queries see the most keys: the longest work starts first.
    Work work(shared, gridDim.x / batches - 1 - blockIdx.x / batches, batches, tokens);
    int steps = work.own + 1;
    work.begin();
    if (threadIdx.x == 0) {
        barrier_expect(work.own_full(), TILE_BYTES);
        tensor_load(work.tile(0), &qkv_map, work.col, work.row + work.own * TILE, work.own_full());
    }
    for (int step = 0; step < min(STAGES, steps); step++) work.fetch_keys(qkv_map, channels, step);

    Left weights;
    barrier_wait(work.own_full(), 0);
    Scores s, out;
    clear(out);
    float peaks[2] = {HIDDEN, HIDDEN}, sums[2] = {0.0f, 0.0f};
    float scale2 = scale * LOG2_E;
    Place place{0, 0};
    for (int step = 0; step < steps; step++) {
        char* stage = work.stage(place.slot);
        barrier_wait(work.full(place.slot), place.phase);
        wgmma_begin();
        begin_scores(s, work.tile(0), stage);
        wgmma_wait<0>();
        hold(s);
        if (step == steps - 1) work.hide<false>(s, HIDDEN);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float peak = peaks[half];
#pragma unroll
            for (int j = 0; j < NT; j++) peak = fmaxf(peak, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
            peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
            peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
            float shrink = exp2_fast((peaks[half] - peak) * scale2), top = peak * scale2, sum = 0.0f;
            peaks[half] = peak;
#pragma unroll
            for (int j = 0; j < NT; j++) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    s[j][e] = exp2_fast(fmaf(s[j][e], scale2, -top));
                    sum += s[j][e];
                    out[j][e] *= shrink;
                }
            }
            sums[half] = sums[half] * shrink + sum;
        }
        pack(weights, s);
        hold(out);
        wgmma_begin();
        begin_weighted(out, weights, stage + TILE_BYTES);
        wgmma_wait<0>();
        hold(out);
        __syncthreads();
        if (step + STAGES < steps) work.fetch_keys(qkv_map, channels, step + STAGES);
        place.advance();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        sums[half] += __shfl_xor_sync(0xffffffffu, sums[half], 1);
        sums[half] += __shfl_xor_sync(0xffffffffu, sums[half], 2);
        if (work.t == 0) {
            lse[work.statistics + work.own * TILE + work.result_row(2 * half)] = peaks[half] * scale + logf(sums[half]);
        }
    }
    work.keep(0, out, 1.0f / sums[0], 1.0f / sums[1]);
    wgmma_show();
    __syncthreads();
    if (threadIdx.x == 0) {
        tensor_store(&out_map, work.col, work.row + work.own * TILE, work.tile(0));
        tensor_store_read();
    }
}

#elif defined(QUERIES)

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    attention_backward_query(const __grid_constant__ TensorMap dqkv_map, const __grid_constant__ TensorMap qkv_map,
                             const __grid_constant__ TensorMap dout_map, const __grid_constant__ TensorMap out_map,
                             const float* lse, float* delta, int batches, int tokens, int channels, float scale) {
    SHARED_MEMORY(shared);
    Work work(shared, gridDim.x / batches - 1 - blockIdx.x / batches, batches, tokens);
    int own_row = work.row + work.own * TILE, steps = work.own + 1;
    work.begin();
    if (threadIdx.x == 0) {
        barrier_expect(work.own_full(), 3 * TILE_BYTES);
        tensor_load(work.tile(0), &qkv_map, work.col, own_row, work.own_full());
        tensor_load(work.tile(1), &dout_map, work.col, own_row, work.own_full());
        tensor_load(work.stage(1), &out_map, work.col, own_row, work.own_full());
    }
    work.fetch_keys(qkv_map, channels, 0);

    float lse2[2], deltas[2] = {0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        lse2[half] = lse[work.statistics + work.own * TILE + work.result_row(2 * half)] * LOG2_E;
    }
    Left douts, outs, weights;
    barrier_wait(work.own_full(), 0);
    load_rows(douts, work.tile(1));
    load_rows(outs, work.stage(1));
    __syncthreads();
    for (int step = 1; step < min(STAGES, steps); step++) work.fetch_keys(qkv_map, channels, step);
#pragma unroll
    for (int k = 0; k < TILE / KSTEP; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 a = douts[k][i], b = outs[k][i];
            deltas[i % 2] = fmaf(__uint_as_float(a << 16), __uint_as_float(b << 16), deltas[i % 2]);
            deltas[i % 2] = fmaf(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u), deltas[i % 2]);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        deltas[half] += __shfl_xor_sync(0xffffffffu, deltas[half], 1);
        deltas[half] += __shfl_xor_sync(0xffffffffu, deltas[half], 2);
        if (work.t == 0) delta[work.statistics + work.own * TILE + work.result_row(2 * half)] = deltas[half];
    }

    Scores p, dp, dq;
    clear(dq);
    float scale2 = scale * LOG2_E;
    Place place{0, 0};
    for (int step = 0; step < steps; step++) {
        char* stage = work.stage(place.slot);
        begin_stage(work, place, p, dp);
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) p[j][e] = exp2_fast(fmaf(p[j][e], scale2, -lse2[e / 2]));
        }
        if (step == steps - 1) work.hide<false>(p, 0.0f);
        wgmma_wait<0>();
        hold(dp);
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) p[j][e] *= dp[j][e] - deltas[e / 2];
        }
        pack(weights, p);
        wgmma_begin();
        begin_weighted(dq, weights, stage);
        wgmma_wait<0>();
        hold(dq);
        __syncthreads();
        if (step + STAGES < steps) work.fetch_keys(qkv_map, channels, step + STAGES);
        place.advance();
    }
    work.keep(0, dq, scale, scale);
    wgmma_show();
    __syncthreads();
    if (threadIdx.x == 0) {
        tensor_store(&dqkv_map, work.col, own_row, work.tile(0));
        tensor_store_read();
    }
}

#elif defined(KEYS)

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    attention_backward_key(const __grid_constant__ TensorMap dqkv_map, const __grid_constant__ TensorMap qkv_map,
                           const __grid_constant__ TensorMap dout_map, const float* lse, const float* delta, int batches,
                           int tokens, int channels, float scale) {
    SHARED_MEMORY(shared);
    // The first keys are seen by all queries: the longest work starts first.
    Work work(shared, blockIdx.x / batches, batches, tokens);
    int own_row = work.row + work.own * TILE, steps = work.tiles - work.own;
    // Of a slot, 64 values of lse and of delta, behind the barriers.
    float* statistics = reinterpret_cast<float*>(work.barriers() + (1 + STAGES + 1) / 2 * 2);
    auto fetch = [&](int step) {
        if (threadIdx.x != 0 || step >= steps) return;
        int slot = step % STAGES, first = (work.own + step) * TILE;
        u64* full = work.full(slot);
        float* statistics_of = statistics + slot * 2 * TILE;
        barrier_expect(full, 2 * TILE_BYTES + 2 * STATISTICS_BYTES);
        tensor_load(work.stage(slot), &qkv_map, work.col, work.row + first, full);
        tensor_load(work.stage(slot) + TILE_BYTES, &dout_map, work.col, work.row + first, full);
        bulk_load(statistics_of, lse + work.statistics + first, STATISTICS_BYTES, full);
        bulk_load(statistics_of + TILE, delta + work.statistics + first, STATISTICS_BYTES, full);
    };
    work.begin();
    if (threadIdx.x == 0) {
        barrier_expect(work.own_full(), 2 * TILE_BYTES);
        tensor_load(work.tile(0), &qkv_map, channels + work.col, own_row, work.own_full());
        tensor_load(work.tile(1), &qkv_map, 2 * channels + work.col, own_row, work.own_full());
    }
    for (int step = 0; step < STAGES; step++) fetch(step);

    Left weights, gradients;
    barrier_wait(work.own_full(), 0);
    Scores p, dp, dk, dv;
    clear(dk);
    clear(dv);
    float scale2 = scale * LOG2_E;
    Place place{0, 0};
    for (int step = 0; step < steps; step++) {
        char* stage = work.stage(place.slot);
        const float* lses = statistics + place.slot * 2 * TILE + 2 * work.t;
        begin_stage(work, place, p, dp);
#pragma unroll
        for (int j = 0; j < NT; j++) {
            float2 sums = *reinterpret_cast<const float2*>(lses + 8 * j);
            sums.x *= LOG2_E, sums.y *= LOG2_E;
#pragma unroll
            for (int e = 0; e < 4; e++) p[j][e] = exp2_fast(fmaf(p[j][e], scale2, e % 2 ? -sums.y : -sums.x));
        }
        if (step == 0) work.hide<true>(p, 0.0f);
        pack(weights, p);
        wgmma_wait<0>();
        hold(dp);
        wgmma_begin();
        begin_weighted(dv, weights, stage + TILE_BYTES);
#pragma unroll
        for (int j = 0; j < NT; j++) {
            float2 deltas = *reinterpret_cast<const float2*>(lses + TILE + 8 * j);
#pragma unroll
            for (int e = 0; e < 4; e++) dp[j][e] = p[j][e] * (dp[j][e] - (e % 2 ? deltas.y : deltas.x));
        }
        pack(gradients, dp);
        wgmma_begin();
        begin_weighted(dk, gradients, stage);
        wgmma_wait<0>();
        hold(dk);
        hold(dv);
        __syncthreads();
        fetch(step + STAGES);
        place.advance();
    }
    work.keep(0, dk, scale, scale);
    work.keep(1, dv, 1.0f, 1.0f);
    wgmma_show();
    __syncthreads();
    if (threadIdx.x == 0) {
        tensor_store(&dqkv_map, channels + work.col, own_row, work.tile(0));
        tensor_store(&dqkv_map, 2 * channels + work.col, own_row, work.tile(1));
        tensor_store_read();
    }
}

#endif
