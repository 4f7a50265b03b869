// LayerNorm (Ba et al. 2016), alone and fused with the residual addition before it, and its gradients.
//
//   layernorm_forward            mean and rstd = 1 / sqrt(variance + 1e-5) of each row; out = (x - mean) rstd weight + bias
//   residual_layernorm_forward   residual = x + branch, then the same of residual as it is stored
//   layernorm_backward           with n = (x - mean) rstd, dn = dout weight: dx (+)= rstd (dn - mean(dn) - n mean(dn n));
//                                per block: sums over its rows of dout n and of dout, to parts[block][2C]
//
// Shapes: x, branch, residual, out, dout, dx [M, C], C = CHANNELS; mean, rstd [M]; weight, bias [C]. ALIGNED: C is a
//   multiple of LANES.
// Dtypes: Element activations, float statistics, weights and sums.
// Grid: ROW_THREADS threads (a power of two from 32) take a row, each SLOTS pieces of WIDTH columns that stay in registers;
//   ROWS rows at a time in a block. forward: one group of rows per block; backward: blocks walk over the rows.
// Determinism: sums within a row in a tree of fixed shape; a block's rows are fixed and added in order, blocks by add_parts.
// Caller: src/backend/cuda/layernorm.rs.

[[maybe_unused]] constexpr int WIDTH = ALIGNED ? LANES : 1;
[[maybe_unused]] constexpr float EPS = 1e-5f;

// The sum over the threads of a row, for each of them.
__device__ __forceinline__ float row_sum(float x) {
    if constexpr (ROW_THREADS == 32) {
        return warp_sum(x);
    } else {
        return block_sum<ROW_THREADS>(x);
    }
}

// The first column of a thread's piece.
__device__ __forceinline__ int column_of(int slot) {
    return (slot * ROW_THREADS + threadIdx.x % ROW_THREADS) * WIDTH;
}

#if defined(BACKWARD)

extern "C" __global__ void __launch_bounds__(ROW_THREADS * ROWS, 1)
    layernorm_backward(Element* dx, float* parts, const Element* dout, const Element* x, const float* mean, const float* rstd,
                       const float* weight, int rows, int add) {
    __shared__ float shares[ROWS][CHANNELS];
    int group = threadIdx.x / ROW_THREADS;
    float dweight[SLOTS][WIDTH] = {}, dbias[SLOTS][WIDTH] = {};
    // All threads of a block go round as often: with one row at a time they meet in `row_sum`.
    for (int row = blockIdx.x * ROWS + group; row < rows; row += gridDim.x * ROWS) {
        const Element* x_row = x + (long long)row * CHANNELS;
        const Element* dout_row = dout + (long long)row * CHANNELS;
        Element* dx_row = dx + (long long)row * CHANNELS;
        float row_mean = mean[row], row_rstd = rstd[row];
        float n[SLOTS][WIDTH], dn[SLOTS][WIDTH];
        float sum_dn = 0.0f, sum_dn_n = 0.0f;
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            int column = column_of(slot);
            if (column >= CHANNELS) continue;
            float w[WIDTH];
            load(n[slot], x_row + column);
            load(dn[slot], dout_row + column);
            load(w, weight + column);
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                n[slot][i] = (n[slot][i] - row_mean) * row_rstd;
                dbias[slot][i] += dn[slot][i];
                dweight[slot][i] = fmaf(dn[slot][i], n[slot][i], dweight[slot][i]);
                dn[slot][i] *= w[i];
                sum_dn += dn[slot][i];
                sum_dn_n = fmaf(dn[slot][i], n[slot][i], sum_dn_n);
            }
        }
        float mean_dn = row_sum(sum_dn) * (1.0f / CHANNELS), mean_dn_n = row_sum(sum_dn_n) * (1.0f / CHANNELS);
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            int column = column_of(slot);
            if (column >= CHANNELS) continue;
            float old[WIDTH] = {};
            if (add) load(old, dx_row + column);
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                old[i] += row_rstd * (dn[slot][i] - mean_dn - n[slot][i] * mean_dn_n);
            }
            store(dx_row + column, old);
        }
    }
#pragma unroll
    for (int which = 0; which < 2; which++) {
        __syncthreads();
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                int column = column_of(slot) + i;
                if (column < CHANNELS) shares[group][column] = which ? dbias[slot][i] : dweight[slot][i];
            }
        }
        __syncthreads();
        for (int column = threadIdx.x; column < CHANNELS; column += ROW_THREADS * ROWS) {
            float sum = 0.0f;
#pragma unroll
            for (int share = 0; share < ROWS; share++) sum += shares[share][column];
            parts[(long long)blockIdx.x * 2 * CHANNELS + which * CHANNELS + column] = sum;
        }
    }
}

#else

// A thread's pieces of a row's mean and variance, and its output.
__device__ __forceinline__ void normalize(Element* out, float* mean, float* rstd, float (&x)[SLOTS][WIDTH], const float* weight,
                                          const float* bias, int row) {
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        if (column_of(slot) >= CHANNELS) continue;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum += x[slot][i];
    }
    float row_mean = row_sum(sum) * (1.0f / CHANNELS);
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        if (column_of(slot) >= CHANNELS) continue;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) squares = fmaf(x[slot][i] - row_mean, x[slot][i] - row_mean, squares);
    }
    float row_rstd = 1.0f / sqrtf(row_sum(squares) * (1.0f / CHANNELS) + EPS);
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        int column = column_of(slot);
        if (column >= CHANNELS) continue;
        float w[WIDTH], b[WIDTH];
        load(w, weight + column);
        load(b, bias + column);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) w[i] = (x[slot][i] - row_mean) * row_rstd * w[i] + b[i];
        store(out + (long long)row * CHANNELS + column, w);
    }
    if (threadIdx.x % ROW_THREADS == 0) {
        mean[row] = row_mean;
        rstd[row] = row_rstd;
    }
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS * ROWS, 1)
    layernorm_forward(Element* out, float* mean, float* rstd, const Element* x, const float* weight, const float* bias,
                      int rows) {
    int row = blockIdx.x * ROWS + threadIdx.x / ROW_THREADS;
    if (row >= rows) return;
    float values[SLOTS][WIDTH];
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        int column = column_of(slot);
        if (column < CHANNELS) load(values[slot], x + (long long)row * CHANNELS + column);
    }
    normalize(out, mean, rstd, values, weight, bias, row);
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS * ROWS, 1)
    residual_layernorm_forward(Element* residual, Element* out, float* mean, float* rstd, const Element* x,
                               const Element* branch, const float* weight, const float* bias, int rows) {
    int row = blockIdx.x * ROWS + threadIdx.x / ROW_THREADS;
    if (row >= rows) return;
    float values[SLOTS][WIDTH];
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        int column = column_of(slot);
        if (column >= CHANNELS) continue;
        long long at = (long long)row * CHANNELS + column;
        float added[WIDTH];
        load(values[slot], x + at);
        load(added, branch + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) values[slot][i] = as_stored(values[slot][i] + added[i]);
        store(residual + at, values[slot]);
    }
    normalize(out, mean, rstd, values, weight, bias, row);
}

#endif
