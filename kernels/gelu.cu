// The GELU where the product before it cannot apply it itself; the function and its derivative are in common.cuh.
//
//   gelu_forward   out = gelu(pre)
//   gelu_backward  gradient *= gelu'(pre)
//
// Shapes: any, `count` elements. ALIGNED: count is a multiple of LANES.
// Dtypes: Element, arithmetic in float.
// Grid: one thread per 16 bytes (or per element).
// Determinism: element by element.
// Caller: src/backend/cuda/linear.rs.

[[maybe_unused]] constexpr int WIDTH = ALIGNED ? LANES : 1;

extern "C" __global__ void gelu_forward(Element* out, const Element* pre, long long count) {
    long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (at >= count) return;
    float x[WIDTH];
    load(x, pre + at);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) x[i] = gelu(x[i]);
    store(out + at, x);
}

extern "C" __global__ void gelu_backward(Element* gradient, const Element* pre, long long count) {
    long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (at >= count) return;
    float x[WIDTH], g[WIDTH];
    load(x, pre + at);
    load(g, gradient + at);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) g[i] *= gelu_derivative(x[i]);
    store(gradient + at, g);
}
