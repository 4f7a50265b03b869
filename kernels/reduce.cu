// Sums over rows and over parts: the gradients of biases, and the end of every sum that was shared out.
//
//   column_sums  per part of the rows: sums of a matrix's columns
//   add_parts    out[c] (+)= sum over parts of parts[part * stride + c], for one output or two that lie side by side in the parts
//
// Shapes: matrix [M, columns]; parts [parts][stride], stride >= columns * outputs; out [columns]. ALIGNED: columns is a multiple of LANES.
// Dtypes: matrix Element; parts and out float.
// Grid: column_sums (ceil(columns / (32 * WIDTH)), parts), 256 threads: 32 groups of columns by 8 interleaved rows;
//   add_parts (ceil(columns / 32), outputs), 512 threads: 32 columns by 16 interleaved parts.
// Determinism: each thread's rows or parts are fixed, their sums are added in order.
// Caller: src/backend/cuda/reduce.rs, for linear, band and layernorm.

[[maybe_unused]] constexpr int WIDTH = ALIGNED ? LANES : 1;
constexpr int ROW_LANES = 8, PART_LANES = 16;

extern "C" __global__ void __launch_bounds__(256)
    column_sums(float* parts, const Element* matrix, int rows, int columns, int part_rows) {
    __shared__ float shares[ROW_LANES][32 * WIDTH + 1];
    int lane = threadIdx.x % 32, row_lane = threadIdx.x / 32;
    int column = (blockIdx.x * 32 + lane) * WIDTH;
    int end = min(rows, (int)(blockIdx.y + 1) * part_rows);
    float sums[WIDTH] = {};
    if (column < columns) {
#pragma unroll 4
        for (int row = blockIdx.y * part_rows + row_lane; row < end; row += ROW_LANES) {
            float x[WIDTH];
            load(x, matrix + (long long)row * columns + column);
#pragma unroll
            for (int i = 0; i < WIDTH; i++) sums[i] += x[i];
        }
    }
#pragma unroll
    for (int i = 0; i < WIDTH; i++) shares[row_lane][lane * WIDTH + i] = sums[i];
    __syncthreads();
    int first = blockIdx.x * 32 * WIDTH;
    for (int c = threadIdx.x; c < 32 * WIDTH && first + c < columns; c += 256) {
        float sum = 0.0f;
#pragma unroll
        for (int share = 0; share < ROW_LANES; share++) sum += shares[share][c];
        parts[(long long)blockIdx.y * columns + first + c] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(32 * PART_LANES)
    add_parts(float* first_out, float* second_out, const float* parts, int columns, int stride, int count, int add) {
    __shared__ float shares[PART_LANES][32];
    int lane = threadIdx.x % 32, part_lane = threadIdx.x / 32;
    int column = blockIdx.x * 32 + lane;
    float* out = blockIdx.y ? second_out : first_out;
    parts += blockIdx.y * columns;
    float sum = 0.0f;
    if (column < columns) {
#pragma unroll 8
        for (int part = part_lane; part < count; part += PART_LANES) sum += parts[(long long)part * stride + column];
    }
    shares[part_lane][lane] = sum;
    __syncthreads();
    if (part_lane || column >= columns) return;
    sum = add ? out[column] : 0.0f;
#pragma unroll
    for (int share = 0; share < PART_LANES; share++) sum += shares[share][lane];
    out[column] = sum;
}
