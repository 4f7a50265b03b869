// What all kernels share: element types, the instructions behind them, and sums over warps and blocks.
//
// The text of this file stands before every kernel's; there are no other includes. The host compiles each kernel with
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

#if WGMMA  // Hopper (sm_90a): products of a warpgroup, four warps, whose operands lie in shared memory

// Shows this thread's writes to shared memory, copies that it has waited for included, to products after the next barrier.
__device__ __forceinline__ void wgmma_show() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Stands before the products of a stage, which make a group once they are closed.
__device__ __forceinline__ void wgmma_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until all but the last `Open` groups are done: their operands are no longer read, their results are there.
template <int Open>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Open) : "memory");
}

// c += left right, begun: left 64 x 16, right 16 x N of bf16, each where its descriptor says. Warp w of the
// warpgroup has rows 16 w to 16 w + 15, in tiles of 8 columns as `mma_bf16` describes them.
#define FOUR(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define SIXTEEN(j) FOUR(j), FOUR(j + 1), FOUR(j + 2), FOUR(j + 3)
#define R0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define R16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define R48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define R64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define R80 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
// The operands behind the results are numbered on: two descriptors, then which of them lie across the depth.
#define WGMMA_OF(columns, results, left_at, right_at, left_across, right_across, ...) \
    asm volatile("{.reg .pred on; setp.eq.u32 on, 0, 0; wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" results \
                 "}, %" #left_at ", %" #right_at ", on, 1, 1, %" #left_across ", %" #right_across ";}" \
                 : __VA_ARGS__ \
                 : "l"(left), "l"(right), "n"(LeftAcross), "n"(RightAcross) \
                 : "memory")

template <int N, bool LeftAcross, bool RightAcross>
__device__ __forceinline__ void wgmma(float (*c)[4], u64 left, u64 right) {
    static_assert(N == 8 || N == 64 || N == 96 || N == 128 || N == 160 || N == 192, "the widths that kernels use");
    if constexpr (N == 8) {
        WGMMA_OF(8, "%0, %1, %2, %3", 4, 5, 6, 7, FOUR(0));
    } else if constexpr (N == 64) {
        WGMMA_OF(64, R0 ", " R16, 32, 33, 34, 35, SIXTEEN(0), SIXTEEN(4));
    } else if constexpr (N == 96) {
        WGMMA_OF(96, R0 ", " R16 ", " R32, 48, 49, 50, 51, SIXTEEN(0), SIXTEEN(4), SIXTEEN(8));
    } else if constexpr (N == 128) {
        WGMMA_OF(128, R0 ", " R16 ", " R32 ", " R48, 64, 65, 66, 67, SIXTEEN(0), SIXTEEN(4), SIXTEEN(8), SIXTEEN(12));
    } else if constexpr (N == 160) {
        WGMMA_OF(160, R0 ", " R16 ", " R32 ", " R48 ", " R64, 80, 81, 82, 83, SIXTEEN(0), SIXTEEN(4), SIXTEEN(8), SIXTEEN(12), SIXTEEN(16));
    } else if constexpr (N == 192) {
        WGMMA_OF(192, R0 ", " R16 ", " R32 ", " R48 ", " R64 ", " R80, 96, 97, 98, 99, SIXTEEN(0), SIXTEEN(4), SIXTEEN(8), SIXTEEN(12), SIXTEEN(16), SIXTEEN(20));
    }
}

// The same of 64 columns, but c = left right: what c was is not read.
#define NEW(j) "=f"(c[j][0]), "=f"(c[j][1]), "=f"(c[j][2]), "=f"(c[j][3])

template <bool LeftAcross, bool RightAcross>
__device__ __forceinline__ void wgmma_first(float (&c)[8][4], u64 left, u64 right) {
    asm volatile("{.reg .pred on; setp.ne.u32 on, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" R0 ", " R16
                 "}, %32, %33, on, 1, 1, %34, %35;}"
                 : NEW(0), NEW(1), NEW(2), NEW(3), NEW(4), NEW(5), NEW(6), NEW(7)
                 : "l"(left), "l"(right), "n"(LeftAcross), "n"(RightAcross)
                 : "memory");
}

// c += left right where left lies in registers, as `mma_bf16` describes each warp's 16 rows.
template <bool RightAcross>
__device__ __forceinline__ void wgmma(float (&c)[8][4], const u32 (&left)[4], u64 right) {
    asm volatile("{.reg .pred on; setp.eq.u32 on, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" R0 ", " R16
                 "}, {%32, %33, %34, %35}, %36, on, 1, 1, %37;}"
                 : SIXTEEN(0), SIXTEEN(4)
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "n"(RightAcross)
                 : "memory");
}

#undef NEW
#undef WGMMA_OF
#undef R80
#undef R64
#undef R48
#undef R32
#undef R16
#undef R0
#undef SIXTEEN
#undef FOUR

// A point in the order of what the compiler does with these registers.
__device__ __forceinline__ void wgmma_hold(float (&c)[4]) {
    asm volatile("" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])::"memory");
}

// A warpgroup gives back registers until each thread has `Count`, or waits until there are as many for it.
template <int Count>
__device__ __forceinline__ void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

template <int Count>
__device__ __forceinline__ void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// Barriers in shared memory that count arrivals and the bytes that copies bring. A phase ends once `count` threads have arrived
// and all bytes that were announced are there; phases are numbered 0, 1, 0, 1 and so on.

__device__ __forceinline__ void barrier_init(u64* barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Shows new barriers to the copy engine.
__device__ __forceinline__ void barrier_show() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    wgmma_show();
}

__device__ __forceinline__ void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and announces bytes.
__device__ __forceinline__ void barrier_expect(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Waits for the end of the phase `phase`; that before the first has ended.
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 phase) {
    asm volatile("{.reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; @done bra over; bra again; over:}"
                 ::"r"(shared_address(barrier)), "r"(phase)
                 : "memory");
}

// Arrives when all copies that this thread has started with `copy_async` are there.
__device__ __forceinline__ void copy_async_arrive(u64* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// A matrix as the copy engine is told of it.
struct __align__(64) TensorMap {
    u64 words[16];
};

// Starts to copy the map's box from (row, col) on to shared memory, as a tile; zeros outside the matrix. The barrier counts
// the box's bytes.
__device__ __forceinline__ void tensor_load(char* shared, const TensorMap* map, int col, int row, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                     shared_address(shared)),
                 "l"(map), "r"(col), "r"(row), "r"(shared_address(barrier))
                 : "memory");
}

// Starts to copy `bytes` bytes, a multiple of 16, from where they are aligned to as much. The barrier counts them.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, int bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// The other way: a tile to the map's box from (row, col) on; what lies outside the matrix is left out.
__device__ __forceinline__ void tensor_store(const TensorMap* map, int col, int row, const char* shared) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(col), "r"(row),
                 "r"(shared_address(shared))
                 : "memory");
}

// Waits until all that this thread stores in this way has been read.
__device__ __forceinline__ void tensor_store_read() {
    asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;" ::: "memory");
}

#endif

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

// ---- Products of tiles in shared memory
//
// A tile has rows of 128 bytes; a wider one consists of several such segments, one after the other. In each row the eight
// 16-byte chunks are permuted by the row's number, so that eight rows at one column, and of floats four rows at eight columns
// too, lie in different banks; of bf16 they are permuted as `wgmma` expects it. An operand lies along the depth (its rows are the result's rows or columns) or across it (its rows are
// steps of the depth). A warp holds MT x NT tiles of 16 x 8 results as `mma_bf16` describes them, in every precision.

// Elements of a tile's row of 128 bytes, and of the depth that one step of `multiply` takes.
[[maybe_unused]] constexpr int SEGMENT = 128 / sizeof(Element);
[[maybe_unused]] constexpr int KSTEP = PRECISION == 16 ? 16 : 8;

// Steps of the depth that a loop over `multiply` is unrolled by: the fewer instructions a step has, the more.
[[maybe_unused]] constexpr int UNROLL = PRECISION == 16 ? 8 : PRECISION == 19 ? 2 : 1;

template <int Rows>
struct Tile {
    char* base;

    // Bytes of a tile of `cols` columns.
    static constexpr int bytes(int cols) {
        return (cols + SEGMENT - 1) / SEGMENT * Rows * 128;
    }

    // The chunk that holds column `col` of a row.
    __device__ __forceinline__ char* at(int row, int col) const {
        int chunk = (col % SEGMENT) / LANES;
        int place = chunk ^ (PRECISION == 16 ? row & 7 : ((row & 3) << 1) | ((row >> 2) & 1));
        return base + ((col / SEGMENT) * Rows + row) * 128 + place * 16;
    }

    __device__ __forceinline__ Element& element(int row, int col) const {
        return reinterpret_cast<Element*>(at(row, col))[col % LANES];
    }
};

// An operand from row `first` of a tile that lies along the depth.
template <int Rows>
struct Along {
    Tile<Rows> tile;
    int first;
    static constexpr bool ACROSS = false;
};

// An operand from column `first` of a tile that lies across the depth.
template <int Rows>
struct Across {
    Tile<Rows> tile;
    int first;
    static constexpr bool ACROSS = true;
};

#if WGMMA

// Where the next of a ring of stages lies, and in which phase of its barriers.
template <int Stages>
struct StagePlace {
    int slot;
    u32 phase;

    __device__ __forceinline__ void advance() {
        if (++slot == Stages) {
            slot = 0;
            phase ^= 1;
        }
    }
};

// What `wgmma` is told of an operand, from step k of the depth on (PTX ISA, "Matrix Descriptor"): the address, the distances of
// blocks of 64 columns and of 8 rows, all in 16 bytes, and that 128-byte rows are permuted.
__device__ __forceinline__ u64 descriptor(const char* at, int column_blocks) {
    constexpr u64 eight_rows = 8 * 128 / 16, permuted = 1;
    return (shared_address(at) >> 4 & 0x3fff) | (u64)(column_blocks / 16) << 16 | eight_rows << 32 | permuted << 62;
}

template <int Rows>
__device__ __forceinline__ u64 descriptor(const Along<Rows>& operand, int k) {
    return descriptor(operand.tile.base + operand.first * 128 + k * (int)sizeof(Element), 16);
}

template <int Rows>
__device__ __forceinline__ u64 descriptor(const Across<Rows>& operand, int k) {
    return descriptor(operand.tile.base + (operand.first / SEGMENT * Rows + k) * 128, Rows * 128);
}

#endif

// Chunks of a row of `cols` elements, rounded up to a power of two.
constexpr int rounded_chunks(int cols) {
    int chunks = 1;
    while (chunks * LANES < cols) chunks *= 2;
    return chunks;
}

// Starts to copy `Count` x `Cols` elements of a row-major matrix, whose rows start at 16-byte boundaries, to the tile's rows
// from `tile_row`; zeros from row `rows` on and outside columns [begin, end). Each thread keeps to one column.
template <int Count, int Cols, int Threads, int Rows>
__device__ __forceinline__ void stage_aligned(const Tile<Rows>& tile, int tile_row, const Element* matrix, long long stride,
                                              int rows, int begin, int end) {
    constexpr int chunks = rounded_chunks(Cols);
    constexpr int at_once = Threads / chunks;
    static_assert(Count % at_once == 0, "whole rounds of rows");
    int row = threadIdx.x / chunks, col = threadIdx.x % chunks * LANES;
    if (Cols % (chunks * LANES) != 0 && col >= Cols) return;
    bool inside = col >= begin && col < end;
    const Element* from = matrix + row * stride + col;
    if (rows >= Count) {
#pragma unroll
        for (int r = 0; r < Count; r += at_once) {
            copy_async(tile.at(tile_row + row + r, col), from, inside);
            from += at_once * stride;
        }
    } else {
#pragma unroll 1
        for (int r = 0; r < Count; r += at_once) {
            copy_async(tile.at(tile_row + row + r, col), from, inside && row + r < rows);
            from += at_once * stride;
        }
    }
}

// The same for all the tile's rows of any matrix; zeros from row `rows` and column `cols` on. With ALIGNED its rows start at
// 16-byte boundaries and `cols` is a multiple of LANES.
template <int Cols, int Threads, int Rows>
__device__ __forceinline__ void stage(const Tile<Rows>& tile, const Element* matrix, long long stride, int rows, int cols) {
#if ALIGNED
    stage_aligned<Rows, Cols, Threads>(tile, 0, matrix, stride, rows, 0, cols);
#else
    constexpr int chunks = Cols / LANES;
#pragma unroll 1
    for (int i = threadIdx.x; i < Rows * chunks; i += Threads) {
        int row = i / chunks, col = i % chunks * LANES;
        Element* to = reinterpret_cast<Element*>(tile.at(row, col));
        for (int lane = 0; lane < LANES; lane++) {
            bool valid = row < rows && col + lane < cols;
            store_element(to + lane, valid ? to_float(matrix[row * stride + col + lane]) : 0.0f);
        }
    }
#endif
}

#if PRECISION == 32

// Of the KSTEP multiplications of a step, how many are unrolled; a kernel that is short of registers is given 1.
#ifndef STEP_UNROLL
#define STEP_UNROLL 2
#endif

template <int Rows>
__device__ __forceinline__ float value(const Along<Rows>& operand, int index, int k) {
    return operand.tile.element(operand.first + index, k);
}

template <int Rows>
__device__ __forceinline__ float value(const Across<Rows>& operand, int index, int k) {
    return operand.tile.element(k, operand.first + index);
}

// Values at an even index and the next.
template <int Rows>
__device__ __forceinline__ float2 values(const Along<Rows>& operand, int index, int k) {
    return make_float2(value(operand, index, k), value(operand, index + 1, k));
}

template <int Rows>
__device__ __forceinline__ float2 values(const Across<Rows>& operand, int index, int k) {
    return *reinterpret_cast<const float2*>(&operand.tile.element(k, operand.first + index));
}

// acc += left right over KSTEP of the depth from k, for the tiles [begin, end) of the NT across (multiples of 2).
template <int MT, int NT, class Left, class Right>
__device__ __forceinline__ void multiply(float (&acc)[MT][NT][4], const Left& left, const Right& right, int k, int begin = 0,
                                         int end = NT) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll STEP_UNROLL
    for (int step = 0; step < KSTEP; step++) {
        float a[MT][2];
#pragma unroll
        for (int i = 0; i < MT; i++) {
            a[i][0] = value(left, 16 * i + g, k + step);
            a[i][1] = value(left, 16 * i + g + 8, k + step);
        }
#pragma unroll
        for (int j = 0; j < NT; j++) {
            if (j < begin || j >= end) continue;
            float2 b = values(right, 8 * j + 2 * t, k + step);
#pragma unroll
            for (int i = 0; i < MT; i++) {
                acc[i][j][0] = fmaf(a[i][0], b.x, acc[i][j][0]);
                acc[i][j][1] = fmaf(a[i][0], b.y, acc[i][j][1]);
                acc[i][j][2] = fmaf(a[i][1], b.x, acc[i][j][2]);
                acc[i][j][3] = fmaf(a[i][1], b.y, acc[i][j][3]);
            }
        }
    }
}

#else

// The 16 rows of a left operand from 16 i, or the 16 columns of a right one (two tiles) from 16 j, over one step from k.
template <int Rows>
__device__ __forceinline__ void load_left(u32 (&r)[4], const Along<Rows>& operand, int i, int k) {
    int lane = threadIdx.x % 32;
    load_matrices(r, operand.tile.at(operand.first + 16 * i + lane % 16, k + lane / 16 * LANES));
}

template <int Rows>
__device__ __forceinline__ void load_right(u32 (&r)[4], const Along<Rows>& operand, int j, int k) {
    int lane = threadIdx.x % 32;
    load_matrices(r, operand.tile.at(operand.first + 16 * j + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * LANES));
}

template <int Rows>
__device__ __forceinline__ void load_left(u32 (&r)[4], const Across<Rows>& operand, int i, int k) {
    int lane = threadIdx.x % 32;
#if PRECISION == 16
    load_matrices_transposed(r, operand.tile.at(k + lane % 8 + lane / 16 * 8, operand.first + 16 * i + lane / 8 % 2 * 8));
#else
#pragma unroll
    for (int e = 0; e < 4; e++) {
        r[e] = __float_as_uint(operand.tile.element(k + lane % 4 + e / 2 * 4, operand.first + 16 * i + lane / 4 + e % 2 * 8));
    }
#endif
}

template <int Rows>
__device__ __forceinline__ void load_right(u32 (&r)[4], const Across<Rows>& operand, int j, int k) {
    int lane = threadIdx.x % 32;
#if PRECISION == 16
    load_matrices_transposed(r, operand.tile.at(k + lane % 16, operand.first + 16 * j + lane / 16 * 8));
#else
#pragma unroll
    for (int e = 0; e < 4; e++) {
        r[e] = __float_as_uint(operand.tile.element(k + lane % 4 + e % 2 * 4, operand.first + 16 * j + lane / 4 + e / 2 * 8));
    }
#endif
}

// Brings operands from memory to what the tensor cores take.
__device__ __forceinline__ void round_operand(u32 (&r)[4]) {
#if PRECISION == 19
#pragma unroll
    for (int e = 0; e < 4; e++) r[e] = to_tf32(r[e]);
#endif
}

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if PRECISION == 16
    mma_bf16(c, a, b0, b1);
#else
    mma_tf32(c, a, b0, b1);
#endif
}

// acc += left right over KSTEP of the depth from k, for the tiles [begin, end) of the NT across (multiples of 2).
template <int MT, int NT, class Left, class Right>
__device__ __forceinline__ void multiply(float (&acc)[MT][NT][4], const Left& left, const Right& right, int k, int begin = 0,
                                         int end = NT) {
    u32 a[MT][4];
#pragma unroll
    for (int i = 0; i < MT; i++) {
        load_left(a[i], left, i, k);
        round_operand(a[i]);
    }
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
        if (j < begin || j >= end) continue;
        u32 b[4];
        load_right(b, right, j / 2, k);
        round_operand(b);
#pragma unroll
        for (int i = 0; i < MT; i++) {
            mma(acc[i][j], a[i], b[0], b[1]);
            mma(acc[i][j + 1], a[i], b[2], b[3]);
        }
    }
}

#endif
