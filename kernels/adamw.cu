// The global gradient norm, and AdamW (Loshchilov & Hutter 2019) on the flat buffers with clipping by that norm.
//
//   norm_parts    per block: sum of squares of its share of the gradients
//   grad_norm     norm = sqrt(sum of the parts); one that is not finite stays
//   adamw_step    g' = g min(1, clip/norm); m = b1 m + (1-b1) g'; v = b2 v + (1-b2) g'^2;
//                 p -= lr (m unbias1 / (sqrt(v unbias2) + eps) + decay p); and p's bf16 copy, unless that is null;
//                 nothing when the norm is not finite
//   round_params  the bf16 copy alone
//
// Shapes: params, m, v, grads, copy: `count` elements, a multiple of 64; decays: one byte for each 64 of them; parts [blocks].
// Dtypes: float; the copy bf16.
// Grid: norm_parts 256 threads per NORM_ELEMENTS; grad_norm one block of 1024; the others one thread per 4 elements.
// Determinism: trees of fixed shape; the update is element by element. Where p, m, v and g are 0, p stays exactly 0.
// Caller: src/backend/cuda/adamw.rs.

[[maybe_unused]] constexpr int NORM_ELEMENTS = 16 * 4 * 256;

struct Constants {
    float learning_rate, beta1, one_minus_beta1, beta2, one_minus_beta2, unbias1, unbias2, eps, weight_decay, grad_clip;
};

extern "C" __global__ void __launch_bounds__(256) norm_parts(float* parts, const float* grads, long long count) {
    float squares[4] = {};
#pragma unroll
    for (int slot = 0; slot < NORM_ELEMENTS / 1024; slot++) {
        long long at = (long long)blockIdx.x * NORM_ELEMENTS + (slot * 256 + threadIdx.x) * 4;
        if (at >= count) continue;
        float g[4];
        load(g, grads + at);
#pragma unroll
        for (int i = 0; i < 4; i++) squares[i] = fmaf(g[i], g[i], squares[i]);
    }
    float sum = block_sum<256>((squares[0] + squares[1]) + (squares[2] + squares[3]));
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(1024) grad_norm(float* norm, const float* parts, int count) {
    float sum = 0.0f;
    for (int part = threadIdx.x; part < count; part += 1024) sum += parts[part];
    sum = block_sum<1024>(sum);
    if (threadIdx.x == 0 && isfinite(*norm)) *norm = sqrtf(sum);
}

__device__ __forceinline__ void store_copy(bf16* copy, const float (&p)[4]) {
    *reinterpret_cast<uint2*>(copy) = make_uint2(pack_bf16(p[0], p[1]), pack_bf16(p[2], p[3]));
}

extern "C" __global__ void __launch_bounds__(256)
    adamw_step(float* params, float* first, float* second, bf16* copy, const float* grads, const float* norm, const u8* decays,
               const Constants* constants, long long count) {
    long long at = ((long long)blockIdx.x * 256 + threadIdx.x) * 4;
    if (at >= count || !isfinite(*norm)) return;
    Constants k = *constants;
    float clip = k.grad_clip > 0.0f && *norm > k.grad_clip ? k.grad_clip / *norm : 1.0f;
    float decay = decays[at / 64] ? k.weight_decay : 0.0f;
    float p[4], m[4], v[4], g[4];
    load(p, params + at);
    load(m, first + at);
    load(v, second + at);
    load(g, grads + at);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float gradient = g[i] * clip;
        m[i] = k.beta1 * m[i] + k.one_minus_beta1 * gradient;
        v[i] = k.beta2 * v[i] + k.one_minus_beta2 * gradient * gradient;
        float direction = m[i] * k.unbias1 / (sqrtf(v[i] * k.unbias2) + k.eps);
        p[i] -= k.learning_rate * (direction + decay * p[i]);
    }
    store(params + at, p);
    store(first + at, m);
    store(second + at, v);
    if (copy != nullptr) store_copy(copy + at, p);
}

extern "C" __global__ void __launch_bounds__(256) round_params(bf16* copy, const float* params, long long count) {
    long long at = ((long long)blockIdx.x * 256 + threadIdx.x) * 4;
    if (at >= count) return;
    float p[4];
    load(p, params + at);
    store_copy(copy + at, p);
}
