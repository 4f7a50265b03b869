// What all kernels share: element types, the instructions behind them, and sums over warps and blocks.
//
// The text of this file stands before every kernel's, those of the other headers behind it (src/backend/cuda/compiler.rs says
// which); there are no includes. The host compiles each kernel with
//   PRECISION  32: IEEE fp32 in FMAs; 19: fp32 in memory, TF32 tensor cores; 16: bf16 in memory, bf16 tensor cores
// and with the sizes that the kernel names in its header.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// A bf16 in memory; arithmetic is done in float.
struct bf16 {
    u16 bits;
};

#ifndef SOFTWARE_CUDA  // The tests run kernels on a processor, with their own versions of what stands in this block.

#define SHARED_MEMORY(name) extern __shared__ __align__(1024) char name[]

__device__ __forceinline__ u32 shared_address(const void* shared) {
    return (u32)__cvta_generic_to_shared(shared);
}

// Starts to copy 16 bytes from global to shared memory, both aligned to as much; zeros instead when not `valid`.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// Asks for the 128 bytes at `global` to be brought near: they will be read later.
__device__ __forceinline__ void prefetch(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Has the compiler keep a number in a register instead of computing it anew.
__device__ __forceinline__ void keep(u32& x) {
    asm volatile("" : "+r"(x));
}

// Closes a group of copies.
__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the last `Open` groups of this thread are there (for it; others see them after a barrier).
template <int Open>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Open) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, or 8 x 4 of 32 bits: lane l points to row l % 8 (16 bytes) of matrix l / 8. Of
// matrix i, lane l receives in r[i] the 32 bits at row l / 4, word l % 4.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, 16-bit elements only, each matrix transposed: lane l receives elements (2 * (l % 4), l / 4) and the one below.
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a b for a 16 x 16, b 16 x 8 of bf16. With g = lane / 4, t = lane % 4: c[0..2] is row g, columns 2t and 2t + 1; c[2..4]
// the same of row g + 8. a: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..), two elements each; b: (2t.., g),
// (2t + 8.., g).
__device__ __forceinline__ void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b for a 16 x 8, b 8 x 8 of TF32; c as above. a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b: (t, g), (t + 4, g).
__device__ __forceinline__ void mma_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The TF32 nearest to the bits of a float.
__device__ __forceinline__ u32 to_tf32(u32 bits) {
    u32 rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
    return rounded;
}

// Two floats as bf16, `low` in the lower half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// tanh(x) within 2^-10.9 of itself.
__device__ __forceinline__ float tanh_fast(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 2^x within 2 ULP.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif

// ---- Elements: what activations and the operands of products are made of

#if PRECISION == 16
typedef bf16 Element;
#else
typedef float Element;
#endif

// Elements of 16 bytes.
[[maybe_unused]] constexpr int LANES = 16 / sizeof(Element);

__device__ __forceinline__ float to_float(float x) {
    return x;
}

__device__ __forceinline__ float to_float(bf16 x) {
    return __uint_as_float((u32)x.bits << 16);
}

__device__ __forceinline__ void store_element(float* at, float x) {
    *at = x;
}

__device__ __forceinline__ void store_element(bf16* at, float x) {
    at->bits = (u16)pack_bf16(x, 0.0f);
}

// What is read again when x has been stored as an element.
__device__ __forceinline__ float as_stored(float x) {
    if constexpr (sizeof(Element) == 4) {
        return x;
    } else {
        return __uint_as_float(pack_bf16(x, 0.0f) << 16);
    }
}

// N neighbours as floats: one, two floats, or whole 16 bytes from an address aligned to as much.
template <int N, class T>
__device__ __forceinline__ void load(float (&x)[N], const T* from) {
    if constexpr (N == 1) {
        x[0] = to_float(*from);
    } else if constexpr (N * sizeof(T) == 8) {
        static_assert(sizeof(T) == 4, "two floats");
        float2 pair = *reinterpret_cast<const float2*>(from);
        x[0] = pair.x, x[1] = pair.y;
    } else {
        constexpr int each = 16 / sizeof(T);
        static_assert(N % each == 0, "whole vectors");
#pragma unroll
        for (int i = 0; i < N; i += each) {
            uint4 bits = *reinterpret_cast<const uint4*>(from + i);
            u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
            for (int w = 0; w < 4; w++) {
                if constexpr (sizeof(T) == 4) {
                    x[i + w] = __uint_as_float(words[w]);
                } else {
                    x[i + 2 * w] = __uint_as_float(words[w] << 16);
                    x[i + 2 * w + 1] = __uint_as_float(words[w] & 0xffff0000u);
                }
            }
        }
    }
}

// The counterpart of `load`.
template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&x)[N]) {
    if constexpr (N == 1) {
        store_element(to, x[0]);
    } else if constexpr (N * sizeof(T) == 8) {
        static_assert(sizeof(T) == 4, "two floats");
        *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
    } else {
        constexpr int each = 16 / sizeof(T);
        static_assert(N % each == 0, "whole vectors");
#pragma unroll
        for (int i = 0; i < N; i += each) {
            u32 words[4];
#pragma unroll
            for (int w = 0; w < 4; w++) {
                if constexpr (sizeof(T) == 4) {
                    words[w] = __float_as_uint(x[i + w]);
                } else {
                    words[w] = pack_bf16(x[i + 2 * w], x[i + 2 * w + 1]);
                }
            }
            *reinterpret_cast<uint4*>(to + i) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

__device__ __forceinline__ int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}

// ---- Sums over threads, always in the same order

// The sum over the warp, for every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    return x;
}

// The sum over a block of `Threads` (a power of two, at least 32), for every thread.
template <int Threads>
__device__ __forceinline__ float block_sum(float x) {
    x = warp_sum(x);
    if constexpr (Threads > 32) {
        __shared__ float parts[32];
        __syncthreads();  // what an earlier sum left there has been read
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
        __syncthreads();
        x = 0.0f;
#pragma unroll
        for (int warp = 0; warp < Threads / 32; warp++) x += parts[warp];
    }
    return x;
}

template <int Threads>
__device__ __forceinline__ float block_max(float x) {
    x = warp_max(x);
    if constexpr (Threads > 32) {
        __shared__ float peaks[32];
        __syncthreads();
        if (threadIdx.x % 32 == 0) peaks[threadIdx.x / 32] = x;
        __syncthreads();
        x = peaks[0];
#pragma unroll
        for (int warp = 1; warp < Threads / 32; warp++) x = fmaxf(x, peaks[warp]);
    }
    return x;
}

// ---- GELU in its tanh form (Hendrycks & Gimpel 2016), tanh(u) with u = sqrt(2/pi) (x + 0.044715 x^3)

constexpr float SQRT_2_OVER_PI = 0.7978845608028654f;
constexpr float CUBIC = 0.044715f * SQRT_2_OVER_PI;

// As exact as the elements: for floats from t = exp(-2 |u|), which neither overflows nor cancels, as sign(u) (1 - t) / (1 + t).
__device__ __forceinline__ float tanh_of(float u) {
    if constexpr (PRECISION == 16) {
        return tanh_fast(u);
    } else {
        float t = exp2_fast(-2.8853900817779268f * fabsf(u));
        return copysignf(__fdividef(1.0f - t, 1.0f + t), u);
    }
}

__device__ __forceinline__ float gelu(float x) {
    float half = 0.5f * x, t = tanh_of(x * fmaf(CUBIC, x * x, SQRT_2_OVER_PI));
    return fmaf(half, t, half);
}

__device__ __forceinline__ float gelu_derivative(float x) {
    float square = x * x, t = tanh_of(x * fmaf(CUBIC, square, SQRT_2_OVER_PI));
    float du = fmaf(3.0f * CUBIC, square, SQRT_2_OVER_PI);
    return fmaf(0.5f, t, 0.5f) + 0.5f * x * fmaf(-t, t, 1.0f) * du;
}
