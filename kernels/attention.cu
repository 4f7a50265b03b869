// Causal multi-head attention without a matrix of T x T: softmax on the way, its log-sum-exp kept for the way back
// (Dao et al. 2022, "FlashAttention").
//
//   attention_forward         S = scale Q K^T where key <= past + query; out = softmax(S) V; lse = log sum exp S
//   attention_append          copies the new tokens' keys and values into a cache
//   attention_delta           delta[query] = sum over the head of dout * out
//   attention_backward_query  P = exp(S - lse); dS = P * (dout V^T - delta) * scale; dQ = dS K
//   attention_backward_key    the same P and dS, transposed: dV = P^T dout; dK = dS^T Q
//
// Shapes: qkv and dqkv [B, T, 3C], out and dout [B, T, C], lse and delta [B, NH, T]; a cache's keys and values
//   [B, capacity, C] of which `past` tokens precede the queries. HEAD_SIZE = C/NH up to 128, padded in shared memory to DIM,
//   a multiple of 16, with zeros. Any T. ALIGNED: HEAD_SIZE is a multiple of LANES.
// Dtypes: Element activations, float statistics; sums and softmax in float.
// Grid: 128 threads, each warp with 16 of a block's 64 queries (or, for the keys' gradients, keys): (sequences in turn for
//   each block of queries or keys, heads). A block walks over tiles of TILE of the other axis, skipping those that causality
//   hides; STAGES (1 or 2) of them are on their way. append: (B T, pieces of C); delta: 8 threads per (row, head).
// Determinism: one warp sums each element in order; dQ is computed apart from dK and dV, so nothing is added atomically.
// Caller: src/backend/cuda/attention.rs.

[[maybe_unused]] constexpr int THREADS = 128;
[[maybe_unused]] constexpr int BLOCK = 64;
[[maybe_unused]] constexpr int WIDTH = ALIGNED ? LANES : 1;
[[maybe_unused]] constexpr float LOG2_E = 1.4426950408889634f;
[[maybe_unused]] constexpr float LN_2 = 0.6931471805599453f;
[[maybe_unused]] constexpr float HIDDEN = -1e30f;

#if defined(DIM)

// Bytes of a tile of Rows tokens, and of what a warp needs to turn results into an operand.
constexpr int bytes_of(int rows) {
    return (DIM + SEGMENT - 1) / SEGMENT * rows * 128;
}

// Large heads leave few registers for more than one step of a product at a time.
constexpr int HEAD_UNROLL = DIM <= 64 ? UNROLL : PRECISION == 16 ? 2 : 1;

constexpr int SCRATCH_BYTES = PRECISION == 16 ? 0 : Tile<16>::bytes(TILE);

// acc (16 x 8 NT) += weights (16 x 8 KT, results of an earlier product) times rows of a tile.
template <int NT, int KT, int Rows>
__device__ __forceinline__ void multiply_weights(float (&acc)[1][NT][4], const float (&weights)[1][KT][4],
                                                 const Across<Rows>& right, char* scratch) {
#if PRECISION == 16
#pragma unroll
    for (int k = 0; k < KT / 2; k++) {
        const float(&low)[4] = weights[0][2 * k], (&high)[4] = weights[0][2 * k + 1];
        u32 a[4] = {pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3]), pack_bf16(high[0], high[1]),
                    pack_bf16(high[2], high[3])};
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
            u32 b[4];
            load_right(b, right, j / 2, 16 * k);
            mma_bf16(acc[0][j], a, b[0], b[1]);
            mma_bf16(acc[0][j + 1], a, b[2], b[3]);
        }
    }
#else
    Tile<16> tile{scratch};
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    __syncwarp();
    // In pairs: NVRTC (12.9 to 13.5) has been seen to take the chunk of an odd column for that column itself.
#pragma unroll
    for (int k = 0; k < KT; k++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float2* pair = reinterpret_cast<float2*>(&tile.element(g + 8 * half, 8 * k + 2 * t));
            *pair = make_float2(weights[0][k][2 * half], weights[0][k][2 * half + 1]);
        }
    }
    __syncwarp();
#pragma unroll HEAD_UNROLL
    for (int k = 0; k < 8 * KT; k += KSTEP) multiply<1, NT>(acc, Along<16>{tile, 0}, right, k);
#endif
}

// acc (16 x 8 NT) += rows of `left` times rows of `right`, over the head.
template <int NT, int A, int B>
__device__ __forceinline__ void multiply_heads(float (&acc)[1][NT][4], const Along<A>& left, const Along<B>& right) {
#pragma unroll HEAD_UNROLL
    for (int k = 0; k < DIM; k += KSTEP) multiply<1, NT>(acc, left, right, k);
}

// A warp's 16 rows of results to rows [row, row + 16) of a matrix, `scales` per half of 8 rows.
template <int NT>
__device__ __forceinline__ void store_rows(Element* matrix, long long stride, const float (&acc)[1][NT][4], int row, int rows,
                                           float scale0, float scale1) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int at = row + g + 8 * half;
        float scale = half ? scale1 : scale0;
        if (at >= rows) continue;
#pragma unroll
        for (int j = 0; j < NT; j++) {
            int d = 8 * j + 2 * t;
            float low = acc[0][j][2 * half] * scale, high = acc[0][j][2 * half + 1] * scale;
            Element* to = matrix + at * stride + d;
#if ALIGNED
            if (d >= HEAD_SIZE) continue;
#if PRECISION == 16
            *reinterpret_cast<u32*>(to) = pack_bf16(low, high);
#else
            *reinterpret_cast<float2*>(to) = make_float2(low, high);
#endif
#else
            if (d < HEAD_SIZE) store_element(to, low);
            if (d + 1 < HEAD_SIZE) store_element(to + 1, high);
#endif
        }
    }
}

// Queries, keys or values of a head in a larger matrix: `at` is the first token's, `stride` elements lie between tokens.
struct Rows {
    const Element* at;
    long long stride;
};

template <int Count>
__device__ __forceinline__ void stage_rows(const Tile<Count>& tile, const Rows& from, int first, int end) {
    stage<DIM, THREADS>(tile, from.at + first * from.stride, from.stride, end - first, HEAD_SIZE);
}

#if defined(FORWARD)

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_forward(Element* out, float* lse, const Element* queries, const Element* keys, const Element* values,
                      long long query_stride, long long key_stride, long long key_batch_stride, int batches, int tokens,
                      int past, int channels, float scale) {
    constexpr int NT = DIM / 8, KT = TILE / 8;
    SHARED_MEMORY(shared);
    int head = blockIdx.y, batch = blockIdx.x % batches, warp = threadIdx.x / 32;
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    // The last queries see the most keys: the longest work starts first.
    int query0 = (gridDim.x / batches - 1 - blockIdx.x / batches) * BLOCK;
    int key_count = past + min(query0 + BLOCK, tokens);
    int steps = ceil_div(key_count, TILE);

    Rows q{queries + batch * tokens * query_stride + head * HEAD_SIZE, query_stride};
    Rows k{keys + batch * key_batch_stride + head * HEAD_SIZE, key_stride};
    Rows v{values + batch * key_batch_stride + head * HEAD_SIZE, key_stride};
    Tile<BLOCK> q_tile{shared};
    auto k_tile = [&](int step) { return Tile<TILE>{shared + bytes_of(BLOCK) + step % STAGES * 2 * bytes_of(TILE)}; };
    auto v_tile = [&](int step) { return Tile<TILE>{k_tile(step).base + bytes_of(TILE)}; };
    char* scratch = shared + bytes_of(BLOCK) + STAGES * 2 * bytes_of(TILE) + warp * SCRATCH_BYTES;
    auto fetch = [&](int step) {
        if (step < steps) {
            stage_rows(k_tile(step), k, step * TILE, key_count);
            stage_rows(v_tile(step), v, step * TILE, key_count);
        }
        copy_async_commit();
    };

    stage_rows(q_tile, q, query0, tokens);
    for (int step = 0; step < STAGES; step++) fetch(step);
    float acc[1][NT][4] = {};
    float peaks[2] = {HIDDEN, HIDDEN}, sums[2] = {0.0f, 0.0f};
    float scale2 = scale * LOG2_E;
    for (int step = 0; step < steps; step++) {
        copy_async_wait<STAGES - 1>();
        __syncthreads();
        float s[1][KT][4] = {};
        multiply_heads<KT>(s, Along<BLOCK>{q_tile, 16 * warp}, Along<TILE>{k_tile(step), 0});
        int hidden_from = past + query0 + 16 * warp;  // the first query's last visible key
        bool masked = (step + 1) * TILE > min(hidden_from, key_count);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int last = hidden_from + g + 8 * half;
            float peak = peaks[half];
#pragma unroll
            for (int j = 0; j < KT; j++) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    int key = step * TILE + 8 * j + 2 * t + e % 2;
                    s[0][j][e] = masked && (key > last || key >= key_count) ? HIDDEN : s[0][j][e] * scale2;
                    peak = fmaxf(peak, s[0][j][e]);
                }
            }
            peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
            peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
            float shrink = exp2_fast(peaks[half] - peak), sum = 0.0f;
            peaks[half] = peak;
#pragma unroll
            for (int j = 0; j < KT; j++) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    s[0][j][e] = exp2_fast(s[0][j][e] - peak);
                    sum += s[0][j][e];
                }
            }
            sums[half] = sums[half] * shrink + sum;
#pragma unroll
            for (int j = 0; j < NT; j++) {
                acc[0][j][2 * half] *= shrink;
                acc[0][j][2 * half + 1] *= shrink;
            }
        }
        multiply_weights<NT, KT>(acc, s, Across<TILE>{v_tile(step), 0}, scratch);
        __syncthreads();
        fetch(step + STAGES);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        sums[half] += __shfl_xor_sync(0xffffffffu, sums[half], 1);
        sums[half] += __shfl_xor_sync(0xffffffffu, sums[half], 2);
    }
    Element* target = out + (long long)batch * tokens * channels + head * HEAD_SIZE;
    store_rows<NT>(target, channels, acc, query0 + 16 * warp, tokens, 1.0f / sums[0], 1.0f / sums[1]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int query = query0 + 16 * warp + g + 8 * half;
        if (lse != nullptr && t == 0 && query < tokens) {
            lse[((long long)batch * gridDim.y + head) * tokens + query] = peaks[half] * LN_2 + logf(sums[half]);
        }
    }
}

#else

// What both halves of the way back read.
struct Backward {
    Rows q, k, v, dout;
    const float* lse;
    const float* delta;

    __device__ __forceinline__ Backward(const Element* qkv, const Element* dout, const float* lse, const float* delta,
                                        int batches, int tokens, int channels) {
        int head = blockIdx.y, batch = blockIdx.x % batches;
        const Element* first = qkv + (long long)batch * tokens * 3 * channels + head * HEAD_SIZE;
        q = Rows{first, 3 * channels};
        k = Rows{first + channels, 3 * channels};
        v = Rows{first + 2 * channels, 3 * channels};
        this->dout = Rows{dout + (long long)batch * tokens * channels + head * HEAD_SIZE, channels};
        long long statistics = ((long long)batch * gridDim.y + head) * tokens;
        this->lse = lse + statistics;
        this->delta = delta + statistics;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_backward_query(Element* dqkv, const Element* dout, const float* lse, const float* delta, const Element* qkv,
                             int batches, int tokens, int channels, float scale) {
    constexpr int NT = DIM / 8, KT = TILE / 8;
    SHARED_MEMORY(shared);
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int query0 = (gridDim.x / batches - 1 - blockIdx.x / batches) * BLOCK;
    int key_count = min(query0 + BLOCK, tokens), steps = ceil_div(key_count, TILE);
    Backward in(qkv, dout, lse, delta, batches, tokens, channels);

    Tile<BLOCK> q_tile{shared}, dout_tile{shared + bytes_of(BLOCK)};
    auto k_tile = [&](int step) { return Tile<TILE>{shared + 2 * bytes_of(BLOCK) + step % STAGES * 2 * bytes_of(TILE)}; };
    auto v_tile = [&](int step) { return Tile<TILE>{k_tile(step).base + bytes_of(TILE)}; };
    char* scratch = shared + 2 * bytes_of(BLOCK) + STAGES * 2 * bytes_of(TILE) + warp * SCRATCH_BYTES;
    auto fetch = [&](int step) {
        if (step < steps) {
            stage_rows(k_tile(step), in.k, step * TILE, key_count);
            stage_rows(v_tile(step), in.v, step * TILE, key_count);
        }
        copy_async_commit();
    };

    stage_rows(q_tile, in.q, query0, tokens);
    stage_rows(dout_tile, in.dout, query0, tokens);
    for (int step = 0; step < STAGES; step++) fetch(step);
    float lse2[2], deltas[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int query = min(query0 + 16 * warp + g + 8 * half, tokens - 1);
        lse2[half] = in.lse[query] * LOG2_E;
        deltas[half] = in.delta[query];
    }
    float dq[1][NT][4] = {};
    float scale2 = scale * LOG2_E;
    for (int step = 0; step < steps; step++) {
        copy_async_wait<STAGES - 1>();
        __syncthreads();
        float p[1][KT][4] = {}, dp[1][KT][4] = {};
        multiply_heads<KT>(p, Along<BLOCK>{q_tile, 16 * warp}, Along<TILE>{k_tile(step), 0});
        multiply_heads<KT>(dp, Along<BLOCK>{dout_tile, 16 * warp}, Along<TILE>{v_tile(step), 0});
#pragma unroll
        for (int j = 0; j < KT; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = step * TILE + 8 * j + 2 * t + e % 2, query = query0 + 16 * warp + g + e / 2 * 8;
                float weight = key > query ? 0.0f : exp2_fast(p[0][j][e] * scale2 - lse2[e / 2]);
                p[0][j][e] = weight * (dp[0][j][e] - deltas[e / 2]);
            }
        }
        multiply_weights<NT, KT>(dq, p, Across<TILE>{k_tile(step), 0}, scratch);
        __syncthreads();
        fetch(step + STAGES);
    }
    Element* target = dqkv + (in.q.at - qkv);
    store_rows<NT>(target, in.q.stride, dq, query0 + 16 * warp, tokens, scale, scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_backward_key(Element* dqkv, const Element* dout, const float* lse, const float* delta, const Element* qkv,
                           int batches, int tokens, int channels, float scale) {
    constexpr int NT = DIM / 8, QT = TILE / 8;
    SHARED_MEMORY(shared);
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    // The first keys are seen by all queries: the longest work starts first.
    int key0 = blockIdx.x / batches * BLOCK;
    int first_step = key0 / TILE, steps = ceil_div(tokens, TILE);
    Backward in(qkv, dout, lse, delta, batches, tokens, channels);

    Tile<BLOCK> k_tile{shared}, v_tile{shared + bytes_of(BLOCK)};
    auto q_tile = [&](int step) { return Tile<TILE>{shared + 2 * bytes_of(BLOCK) + step % STAGES * 2 * bytes_of(TILE)}; };
    auto dout_tile = [&](int step) { return Tile<TILE>{q_tile(step).base + bytes_of(TILE)}; };
    char* scratch = shared + 2 * bytes_of(BLOCK) + STAGES * 2 * bytes_of(TILE) + warp * SCRATCH_BYTES;
    auto fetch = [&](int step) {
        if (step < steps) {
            stage_rows(q_tile(step), in.q, step * TILE, tokens);
            stage_rows(dout_tile(step), in.dout, step * TILE, tokens);
        }
        copy_async_commit();
    };

    stage_rows(k_tile, in.k, key0, tokens);
    stage_rows(v_tile, in.v, key0, tokens);
    for (int step = 0; step < STAGES; step++) fetch(first_step + step);
    float dk[1][NT][4] = {}, dv[1][NT][4] = {};
    float scale2 = scale * LOG2_E;
    for (int step = first_step; step < steps; step++) {
        copy_async_wait<STAGES - 1>();
        __syncthreads();
        float p[1][QT][4] = {}, dp[1][QT][4] = {};
        multiply_heads<QT>(p, Along<BLOCK>{k_tile, 16 * warp}, Along<TILE>{q_tile(step), 0});
        multiply_heads<QT>(dp, Along<BLOCK>{v_tile, 16 * warp}, Along<TILE>{dout_tile(step), 0});
#pragma unroll
        for (int j = 0; j < QT; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int query = step * TILE + 8 * j + 2 * t + e;
                float lse2 = in.lse[min(query, tokens - 1)] * LOG2_E, delta = in.delta[min(query, tokens - 1)];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int key = key0 + 16 * warp + g + 8 * half;
                    float& weight = p[0][j][2 * half + e];
                    float& gradient = dp[0][j][2 * half + e];
                    weight = key > query || query >= tokens ? 0.0f : exp2_fast(weight * scale2 - lse2);
                    gradient = weight * (gradient - delta);
                }
            }
        }
        multiply_weights<NT, QT>(dv, p, Across<TILE>{dout_tile(step), 0}, scratch);
        multiply_weights<NT, QT>(dk, dp, Across<TILE>{q_tile(step), 0}, scratch);
        __syncthreads();
        fetch(step + STAGES);
    }
    store_rows<NT>(dqkv + (in.k.at - qkv), in.k.stride, dk, key0 + 16 * warp, tokens, scale, scale);
    store_rows<NT>(dqkv + (in.v.at - qkv), in.v.stride, dv, key0 + 16 * warp, tokens, 1.0f, 1.0f);
}

#endif

#else

extern "C" __global__ void attention_append(Element* keys, Element* values, const Element* qkv, int tokens, int channels,
                                            int past, int capacity) {
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH, row = blockIdx.x;
    if (c >= channels) return;
    const Element* from = qkv + (long long)row * 3 * channels + c;
    long long to = ((long long)(row / tokens) * capacity + past + row % tokens) * channels + c;
    float x[WIDTH];
    load(x, from + channels);
    store(keys + to, x);
    load(x, from + 2 * channels);
    store(values + to, x);
}

extern "C" __global__ void attention_delta(float* delta, const Element* dout, const Element* out, int rows, int tokens,
                                           int heads) {
    int index = (blockIdx.x * blockDim.x + threadIdx.x) / 8, lane = threadIdx.x % 8;
    int row = min(index, rows * heads - 1) / heads, head = min(index, rows * heads - 1) % heads;
    long long at = (long long)row * heads * HEAD_SIZE + head * HEAD_SIZE;
    float sum = 0.0f;
    for (int d = lane * WIDTH; d < HEAD_SIZE; d += 8 * WIDTH) {
        float a[WIDTH], b[WIDTH];
        load(a, dout + at + d);
        load(b, out + at + d);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum = fmaf(a[i], b[i], sum);
    }
#pragma unroll
    for (int lanes = 4; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (lane == 0 && index < rows * heads) {
        delta[((long long)(row / tokens) * heads + head) * tokens + row % tokens] = sum;
    }
}

#endif
