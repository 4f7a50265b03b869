// Token and position embeddings, and their gradients.
//
//   embed_forward    out[b, t] = wte[tokens[b, t]] + wpe[past + t]
//   embed_tokens     dwte[token] += sum over its places of dout, in order of the places
//   embed_positions  dwpe[t] (+)= sum over b of dout[b, t]; 0 for t >= T when set
//
// Shapes: out, dout [B, T, C]; wte [Vp, C], wpe [maxT, C]; tokens [B, T]. order [B, T]: the places sorted by token; runs
//   [count + 1][2]: each different token and its first place in `order`, ended by (none, B T). ALIGNED: C is a multiple of
//   LANES.
// Dtypes: Element activations and wte, float wpe and gradients.
// Grid: one thread per piece of WIDTH columns; embed_forward (B T, pieces), embed_tokens (B T, pieces) of which the first
//   `count` have a run, embed_positions (maxT, pieces).
// Determinism: one thread sums each element in a fixed order.
// Caller: src/backend/cuda/embed.rs.

[[maybe_unused]] constexpr int WIDTH = ALIGNED ? LANES : 1;

extern "C" __global__ void embed_forward(Element* out, const u32* tokens, const Element* wte, const float* wpe, int channels,
                                         int length, int past) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH, row = blockIdx.x;
    if (column >= channels) return;
    float token[WIDTH], position[WIDTH];
    load(token, wte + (long long)tokens[row] * channels + column);
    load(position, wpe + (long long)(past + row % length) * channels + column);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) token[i] += position[i];
    store(out + (long long)row * channels + column, token);
}

extern "C" __global__ void embed_tokens(float* dwte, const Element* dout, const u32* order, const u32* runs, int channels,
                                        int rows) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    u32 first = runs[2 * blockIdx.x + 1];
    if (column >= channels || first >= (u32)rows) return;
    u32 end = runs[2 * blockIdx.x + 3];
    float* to = dwte + (long long)runs[2 * blockIdx.x] * channels + column;
    float sum[WIDTH];
    load(sum, to);
    for (u32 place = first; place < end; place++) {
        float x[WIDTH];
        load(x, dout + (long long)order[place] * channels + column);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum[i] += x[i];
    }
    store(to, sum);
}

extern "C" __global__ void embed_positions(float* dwpe, const Element* dout, int channels, int length, int batch, int add) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH, t = blockIdx.x;
    if (column >= channels) return;
    float* to = dwpe + (long long)t * channels + column;
    float sum[WIDTH] = {};
    if (add) load(sum, to);
    if (t < length) {
        for (int b = 0; b < batch; b++) {
            float x[WIDTH];
            load(x, dout + ((long long)b * length + t) * channels + column);
#pragma unroll
            for (int i = 0; i < WIDTH; i++) sum[i] += x[i];
        }
    }
    store(to, sum);
}
