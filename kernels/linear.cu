// Dense products of sizes that the library does not take: a matrix whose rows do not start at 16-byte boundaries.
//
//   linear  out[m, n] (+)= sum over k of left[m, k] right[n, k] (+ bias[n], unless that is null)
//
// Shapes: left is `left[m * left_row + k * left_step]`, right likewise, out [M, N] with `stride` elements between rows.
// Dtypes: Element operands, Result (-DRESULT) out, float bias; sums in float.
// Grid: (tiles of 32 rows, tiles of 32 columns), 256 threads with 2 x 2 results each.
// Determinism: one thread sums each element in order of the depth.
// Caller: src/backend/cuda/linear.rs and loss.rs, through product.rs.

typedef RESULT Result;

constexpr int TILE = 32;
constexpr int DEPTH = 16;

extern "C" __global__ void __launch_bounds__(256)
    linear(Result* out, const Element* left, const Element* right, const float* bias, int rows, int cols, int depth,
           long long left_row, long long left_step, long long right_row, long long right_step, long long stride, int add) {
    __shared__ float left_tile[DEPTH][TILE + 1], right_tile[DEPTH][TILE + 1];
    int row0 = blockIdx.x * TILE, col0 = blockIdx.y * TILE;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float acc[2][2] = {};
    for (int k0 = 0; k0 < depth; k0 += DEPTH) {
        for (int i = threadIdx.x; i < TILE * DEPTH; i += 256) {
            // Neighbouring threads take neighbours in memory, whichever way the matrix lies.
            int r = left_step == 1 ? i / DEPTH : i % TILE, k = left_step == 1 ? i % DEPTH : i / TILE;
            bool valid = row0 + r < rows && k0 + k < depth;
            left_tile[k][r] = valid ? to_float(left[(row0 + r) * left_row + (k0 + k) * left_step]) : 0.0f;
            int c = right_step == 1 ? i / DEPTH : i % TILE, d = right_step == 1 ? i % DEPTH : i / TILE;
            valid = col0 + c < cols && k0 + d < depth;
            right_tile[d][c] = valid ? to_float(right[(col0 + c) * right_row + (k0 + d) * right_step]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    acc[i][j] = fmaf(left_tile[k][ty + 16 * i], right_tile[k][tx + 16 * j], acc[i][j]);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int row = row0 + ty + 16 * i, col = col0 + tx + 16 * j;
            if (row >= rows || col >= cols) continue;
            Result* at = out + row * stride + col;
            float sum = acc[i][j] + (bias == nullptr ? 0.0f : bias[col]);
            store_element(at, add ? sum + to_float(*at) : sum);
        }
    }
}
