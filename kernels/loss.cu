// Cross-entropy of a chunk of rows of logits, its gradient in their place, sums of losses, and logits for generation.
//
//   cross_entropy  loss[m] = log sum over v < V of exp(z[m, v]) - z[m, y[m]]; with GRADIENT, z becomes
//                  scale * (softmax(z) - onehot(y)), and 0 from V on
//   loss_sum       total (+)= scale * sum of losses
//   copy_logits    out[m, v] = z[m, v] for v < V
//
// Shapes: logits z [rows, Vp]; targets y [rows]; losses [rows]; out [rows, V]. ALIGNED: Vp is a multiple of 16 bytes. HELD: a row
//   is copied to shared memory, so that it is read from elsewhere once.
// Dtypes: Logit (-DLOGIT) logits; float losses and out.
// Grid: cross_entropy one block of 512 threads per row; loss_sum one block of 512; copy_logits (rows, ceil(V / 256)).
// Determinism: each thread's share of a row is fixed, shares meet in a tree.
// Caller: src/backend/cuda/loss.rs.

typedef LOGIT Logit;

constexpr int THREADS = 512;
constexpr int WIDTH = ALIGNED ? 16 / sizeof(Logit) : 1;
[[maybe_unused]] constexpr float LOG2_E = 1.4426950408889634f;
[[maybe_unused]] constexpr float HIDDEN = -1e30f;

// WIDTH logits from v on, those that do not exist hidden.
__device__ __forceinline__ void load_logits(float (&z)[WIDTH], const Logit* row, int v, int vocab) {
    load(z, row + v);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        if (v + i >= vocab) z[i] = HIDDEN;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy(float* losses, Logit* logits, const u32* targets, int vocab, int padded_vocab, float scale) {
    Logit* row = logits + (long long)blockIdx.x * padded_vocab;
    int target = targets[blockIdx.x];
    float target_logit = to_float(row[target]);
#if HELD
    SHARED_MEMORY(shared);
    Logit* from = reinterpret_cast<Logit*>(shared);
    // Each thread reads what it has copied itself.
    for (int v = threadIdx.x * WIDTH; v < padded_vocab; v += THREADS * WIDTH) copy_async(from + v, row + v, true);
    copy_async_commit();
    copy_async_wait<0>();
#else
    const Logit* from = row;
#endif
    // The largest logit so far and the sum of exponentials against it, in one pass over the row.
    float peak = HIDDEN, sum = 0.0f;
    for (int v = threadIdx.x * WIDTH; v < vocab; v += THREADS * WIDTH) {
        float z[WIDTH];
        load_logits(z, from, v, vocab);
        float raised = peak;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) raised = fmaxf(raised, z[i]);
        sum *= exp2_fast((peak - raised) * LOG2_E);
        peak = raised;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum += exp2_fast((z[i] - peak) * LOG2_E);
    }
    float all_peak = block_max<THREADS>(peak);
    float all = block_sum<THREADS>(sum * exp2_fast((peak - all_peak) * LOG2_E));
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(all) - (target_logit - all_peak);
#if GRADIENT
    float factor = scale / all;
    for (int v = threadIdx.x * WIDTH; v < padded_vocab; v += THREADS * WIDTH) {
        float z[WIDTH];
        load_logits(z, from, v, vocab);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            z[i] = exp2_fast((z[i] - all_peak) * LOG2_E) * factor - (v + i == target ? scale : 0.0f);
        }
        store(row + v, z);
    }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
    loss_sum(float* total, const float* losses, int rows, float scale, int add) {
    float sum = 0.0f;
    for (int row = threadIdx.x; row < rows; row += THREADS) sum += losses[row];
    sum = block_sum<THREADS>(sum) * scale;
    if (threadIdx.x == 0) *total = add ? *total + sum : sum;
}

extern "C" __global__ void copy_logits(float* out, const Logit* logits, int vocab, int padded_vocab) {
    int v = blockIdx.y * blockDim.x + threadIdx.x;
    if (v < vocab) out[(long long)blockIdx.x * vocab + v] = to_float(logits[(long long)blockIdx.x * padded_vocab + v]);
}
