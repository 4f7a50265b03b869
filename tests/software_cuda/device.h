// CUDA C++ for a C++ compiler: stands before the text of every kernel, behind kernel.h. __global__ and __launch_bounds__ are
// defined by libnvrtc, after it has looked for them in the preprocessed text.

typedef unsigned long size_t;

#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static
#define __grid_constant__
// All threads of a block are fibers on one operating system thread, which has no other block at the same time.
#define __shared__ static thread_local

#define threadIdx (software_cuda_thread->index)
#define blockIdx (software_cuda_thread->block->index)
#define blockDim (software_cuda_thread->block->size)
#define gridDim (software_cuda_thread->block->grid)
#define warpSize 32
typedef software_cuda::Index uint3, dim3;

// ---- Vectors. Their alignment is checked at every access.

#define VECTOR2(name, type)                                                             \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                             \
    __forceinline__ name##2 make_##name##2(type x, type y) { return name##2{x, y}; }
#define VECTOR4(name, type)                                                             \
    struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };                       \
    __forceinline__ name##4 make_##name##4(type x, type y, type z, type w) { return name##4{x, y, z, w}; }

VECTOR2(uchar, unsigned char) VECTOR4(uchar, unsigned char)
VECTOR2(ushort, unsigned short) VECTOR4(ushort, unsigned short)
VECTOR2(int, int) VECTOR4(int, int)
VECTOR2(uint, unsigned) VECTOR4(uint, unsigned)
VECTOR2(float, float) VECTOR4(float, float)
VECTOR2(double, double)
VECTOR2(longlong, long long)
VECTOR2(ulonglong, unsigned long long)

// In C++, alignas may not follow __shared__.
#define alignas(n) __attribute__((aligned(n)))

// ---- Arithmetic. The compiler does not contract a * b + c: only an fma is one.

#define FUNCTION1(name)                            \
    extern "C" double name(double) noexcept;       \
    extern "C" float name##f(float) noexcept;      \
    __forceinline__ float name(float x) { return name##f(x); }
#define FUNCTION2(name)                                    \
    extern "C" double name(double, double) noexcept;       \
    extern "C" float name##f(float, float) noexcept;       \
    __forceinline__ float name(float x, float y) { return name##f(x, y); }

FUNCTION1(sqrt) FUNCTION1(exp) FUNCTION1(exp2) FUNCTION1(expm1) FUNCTION1(log) FUNCTION1(log2) FUNCTION1(log1p)
FUNCTION1(tanh) FUNCTION1(sin) FUNCTION1(cos) FUNCTION1(erf) FUNCTION1(fabs) FUNCTION1(floor) FUNCTION1(ceil)
FUNCTION1(trunc) FUNCTION1(round) FUNCTION1(rint)
FUNCTION2(pow) FUNCTION2(copysign) FUNCTION2(fmod)
extern "C" double fma(double, double, double) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
extern "C" float ldexpf(float, int) noexcept;
extern "C" int printf(const char*, ...);

__forceinline__ float fma(float a, float b, float c) { return fmaf(a, b, c); }
__forceinline__ float rsqrtf(float x) { return (float)(1.0 / sqrt((double)x)); }
__forceinline__ double rsqrt(double x) { return 1.0 / sqrt(x); }
__forceinline__ float __expf(float x) { return expf(x); }
__forceinline__ float __logf(float x) { return logf(x); }
__forceinline__ float __fdividef(float a, float b) { return a / b; }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float __frcp_rn(float x) { return 1.0f / x; }

#define PREDICATE(name)                                                  \
    __forceinline__ bool name(float x) { return __builtin_##name(x); }   \
    __forceinline__ bool name(double x) { return __builtin_##name(x); }
PREDICATE(isfinite) PREDICATE(isnan) PREDICATE(isinf)

// The overloads of CUDA, so that calls ambiguous there are so here; of a number and a NaN, the number is both.
#define MINMAX(type, a_type, b_type)                                                    \
    __forceinline__ type min(a_type a, b_type b) { return (type)a < (type)b ? (type)a : (type)b; } \
    __forceinline__ type max(a_type a, b_type b) { return (type)a > (type)b ? (type)a : (type)b; }
#define MINMAX1(type) MINMAX(type, type, type)
MINMAX1(int) MINMAX1(long) MINMAX1(long long) MINMAX1(unsigned) MINMAX1(unsigned long) MINMAX1(unsigned long long)
MINMAX(unsigned, int, unsigned) MINMAX(unsigned, unsigned, int)
MINMAX(unsigned long, long, unsigned long) MINMAX(unsigned long, unsigned long, long)
MINMAX(unsigned long long, long long, unsigned long long) MINMAX(unsigned long long, unsigned long long, long long)
#define FMINMAX(type, fmin, fmax)                                                             \
    __forceinline__ type fmin(type a, type b) { return a < b || b != b ? a : b; }             \
    __forceinline__ type fmax(type a, type b) { return a > b || b != b ? a : b; }
FMINMAX(float, fminf, fmaxf) FMINMAX(float, fmin, fmax) FMINMAX(float, min, max)
FMINMAX(double, fmin, fmax) FMINMAX(double, min, max)

__forceinline__ int abs(int x) { return x < 0 ? -x : x; }
__forceinline__ float abs(float x) { return fabsf(x); }
__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
__forceinline__ unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

#define BIT_CAST(name, to, from)                                                        \
    __forceinline__ to name(from x) {                                                   \
        to result;                                                                      \
        __builtin_memcpy(&result, &x, sizeof x);                                        \
        return result;                                                                  \
    }
BIT_CAST(__float_as_uint, unsigned, float) BIT_CAST(__uint_as_float, float, unsigned)
BIT_CAST(__float_as_int, int, float) BIT_CAST(__int_as_float, float, int)
BIT_CAST(__double_as_longlong, long long, double) BIT_CAST(__longlong_as_double, double, long long)

// ---- Memory

template <class T> __forceinline__ T __ldg(const T* p) { return *p; }
template <class T> __forceinline__ T __ldcg(const T* p) { return *p; }
template <class T> __forceinline__ T __ldcs(const T* p) { return *p; }
template <class T> __forceinline__ void __stcg(T* p, T value) { *p = value; }
template <class T> __forceinline__ void __stcs(T* p, T value) { *p = value; }
__forceinline__ void __threadfence() { asm volatile("" ::: "memory"); }
__forceinline__ void __threadfence_block() { asm volatile("" ::: "memory"); }
__forceinline__ long long clock64() { return (long long)__builtin_ia32_rdtsc(); }
__forceinline__ void __trap() { software_cuda_fail("__trap"); }

// ---- Threads that meet

// The line tells barriers apart: all threads of a block must come to the same one.
__forceinline__ void __syncthreads(unsigned line = __builtin_LINE()) {
    asm volatile("" ::: "memory");
    software_cuda_barrier(line);
    asm volatile("" ::: "memory");
}
__forceinline__ void __syncwarp(unsigned mask = ~0u) {
    asm volatile("" ::: "memory");
    software_cuda_meet(mask, &software_cuda_syncwarp, nullptr);
    asm volatile("" ::: "memory");
}

namespace software_cuda {

template <class T> __forceinline__ T shuffle(unsigned mask, T value, unsigned source) {
    Shuffle record{0, 0, source};
    __builtin_memcpy(&record.value, &value, sizeof value);
    software_cuda_meet(mask, &software_cuda_shuffle, &record);
    __builtin_memcpy(&value, &record.result, sizeof value);
    return value;
}

__forceinline__ unsigned vote(unsigned mask, bool value) {
    Vote record{value, 0};
    software_cuda_meet(mask, &software_cuda_vote, &record);
    return record.result;
}

}  // namespace software_cuda

// As in CUDA, a lane whose source lies beyond its segment of `width` lanes receives its own value.
#define SHUFFLES(type)                                                                                           \
    __forceinline__ type __shfl_sync(unsigned mask, type value, int lane, int width = 32) {                      \
        unsigned self = software_cuda_thread->lane, within = (unsigned)width - 1;                                \
        return software_cuda::shuffle(mask, value, (self & ~within) | ((unsigned)lane & within));                \
    }                                                                                                            \
    __forceinline__ type __shfl_up_sync(unsigned mask, type value, unsigned delta, int width = 32) {             \
        unsigned self = software_cuda_thread->lane, within = (unsigned)width - 1;                                \
        return software_cuda::shuffle(mask, value, (self & within) >= delta ? self - delta : self);              \
    }                                                                                                            \
    __forceinline__ type __shfl_down_sync(unsigned mask, type value, unsigned delta, int width = 32) {           \
        unsigned self = software_cuda_thread->lane, within = (unsigned)width - 1;                                \
        return software_cuda::shuffle(mask, value, (self & within) + delta <= within ? self + delta : self);     \
    }                                                                                                            \
    __forceinline__ type __shfl_xor_sync(unsigned mask, type value, int flip, int width = 32) {                  \
        unsigned self = software_cuda_thread->lane, within = (unsigned)width - 1, other = self ^ (unsigned)flip; \
        return software_cuda::shuffle(mask, value, other <= (self | within) ? other : self);                     \
    }
SHUFFLES(int) SHUFFLES(unsigned) SHUFFLES(long) SHUFFLES(unsigned long) SHUFFLES(long long) SHUFFLES(unsigned long long)
SHUFFLES(float) SHUFFLES(double)

__forceinline__ unsigned __ballot_sync(unsigned mask, int value) { return software_cuda::vote(mask, value); }
__forceinline__ int __any_sync(unsigned mask, int value) { return software_cuda::vote(mask, value) != 0; }
__forceinline__ int __all_sync(unsigned mask, int value) { return software_cuda::vote(mask, !value) == 0; }

// ---- The instructions behind the kernels' common text: everything that it declares for real devices only

#define SHARED_MEMORY(name) char* name = software_cuda_thread->block->shared

__forceinline__ unsigned shared_address(const void* shared) { return software_cuda_shared(shared, 1, 1); }

__forceinline__ void copy_async(void* shared, const void* global, bool valid) { software_cuda_copy(shared, global, valid); }

__forceinline__ void prefetch(const void*) {}

__forceinline__ void keep(unsigned&) {}

__forceinline__ void copy_async_commit() { ++software_cuda_thread->group; }

template <int Open> __forceinline__ void copy_async_wait() {
    software_cuda_copy_wait(Open);
    asm volatile("" ::: "memory");
}

__forceinline__ void load_matrices(unsigned (&r)[4], const void* row) {
    software_cuda_shared(row, 16, 16);
    software_cuda::Matrices record{row, r};
    software_cuda_meet(~0u, &software_cuda_load, &record);
}

__forceinline__ void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    software_cuda_shared(row, 16, 16);
    software_cuda::Matrices record{row, r};
    software_cuda_meet(~0u, &software_cuda_load_transposed, &record);
}

__forceinline__ void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    software_cuda::Product record{c, a, {b0, b1}};
    software_cuda_meet(~0u, &software_cuda_mma_bf16, &record);
}

__forceinline__ void mma_tf32(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    software_cuda::Product record{c, a, {b0, b1}};
    software_cuda_meet(~0u, &software_cuda_mma_tf32, &record);
}

__forceinline__ void wgmma_show() { software_cuda_thread->shown = true; }

__forceinline__ void wgmma_begin() {}

__forceinline__ void wgmma_commit() { ++software_cuda_thread->product_group; }

template <int Open> __forceinline__ void wgmma_wait() {
    software_cuda_product_wait(Open);
    asm volatile("" ::: "memory");
}

__forceinline__ void wgmma_hold(float (&)[4]) { asm volatile("" ::: "memory"); }

__forceinline__ void barrier_init(unsigned long long* barrier, int count) { software_cuda_phase_init(barrier, count); }

__forceinline__ void barrier_show() {}

__forceinline__ void barrier_arrive(unsigned long long* barrier) { software_cuda_phase_arrive(barrier, 0); }

__forceinline__ void barrier_expect(unsigned long long* barrier, int bytes) { software_cuda_phase_arrive(barrier, bytes); }

__forceinline__ void barrier_wait(unsigned long long* barrier, unsigned phase) {
    asm volatile("" ::: "memory");
    software_cuda_phase_wait(barrier, phase);
    asm volatile("" ::: "memory");
}

__forceinline__ void copy_async_arrive(unsigned long long* barrier) { software_cuda_copy_arrive(barrier); }

template <int Count> __forceinline__ void registers_down() {}

template <int Count> __forceinline__ void registers_up() {}

typedef software_cuda::TensorMap TensorMap;

__forceinline__ void tensor_load(char* shared, const TensorMap* map, int column, int row, unsigned long long* barrier) {
    software_cuda_copy_box(shared, map, column, row, barrier);
}

__forceinline__ void bulk_load(void* shared, const void* global, int bytes, unsigned long long* barrier) {
    software_cuda_copy_bulk(shared, global, bytes, barrier);
}

__forceinline__ void tensor_store(const TensorMap* map, int column, int row, const char* shared) {
    software_cuda_store_box(map, column, row, shared);
}

__forceinline__ void tensor_store_read() {
    software_cuda_store_wait();
    asm volatile("" ::: "memory");
}

namespace software_cuda {

__forceinline__ WarpgroupProduct described(float (*c)[4], unsigned long long left, unsigned long long right, unsigned columns,
                                           bool left_across, bool right_across, bool adds) {
    return {c, left, right, columns, 0, left_across, right_across, adds, false, {}};
}

__forceinline__ void begin_with_rows(float (*c)[4], const unsigned (&left)[4], unsigned long long right, bool right_across) {
    WarpgroupProduct product{c, 0, right, 64, 0, false, right_across, true, true, {}};
    LeftRows record{left, product.rows};
    software_cuda_meet(~0u, &software_cuda_left_rows, &record);
    software_cuda_begin_product(product);
}

}  // namespace software_cuda

template <int Columns, bool LeftAcross, bool RightAcross>
__forceinline__ void wgmma(float (*c)[4], unsigned long long left, unsigned long long right) {
    software_cuda_begin_product(software_cuda::described(c, left, right, Columns, LeftAcross, RightAcross, true));
}

template <bool LeftAcross, bool RightAcross>
__forceinline__ void wgmma_first(float (&c)[8][4], unsigned long long left, unsigned long long right) {
    software_cuda_begin_product(software_cuda::described(c, left, right, 64, LeftAcross, RightAcross, false));
}

template <bool RightAcross>
__forceinline__ void wgmma(float (&c)[8][4], const unsigned (&left)[4], unsigned long long right) {
    software_cuda::begin_with_rows(c, left, right, RightAcross);
}

// To nearest, ties away from zero; a carry out of the mantissa goes to the exponent, as far as infinity.
__forceinline__ unsigned to_tf32(unsigned bits) {
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
    return (bits + 0x1000u) & ~0x1fffu;
}

// To nearest even.
__forceinline__ unsigned pack_bf16(float low, float high) {
    unsigned halves[2] = {__float_as_uint(low), __float_as_uint(high)};
    for (unsigned& bits : halves)
        bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    return halves[1] << 16 | halves[0];
}

// Results too small for a normal float are zero.
__forceinline__ float exp2_fast(float x) {
    float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

// No more exact than hardware's: 10 bits after the point.
__forceinline__ float tanh_fast(float x) {
    return __uint_as_float(to_tf32(__float_as_uint(tanhf(x))));
}

// (New primitives of the common text go here; those that a warp does together get an Operation in runtime.cpp.)

// ---- What libnvrtc adds behind the kernels

namespace software_cuda {

template <size_t... I> struct Indices {};

template <class... A, size_t... I> constexpr auto caller(Indices<I...>) {
    return [](void (*function)(), void** arguments) {
        reinterpret_cast<void (*)(A...)>(function)(*static_cast<A*>(arguments[I])...);
    };
}

template <class... A> Kernel describe(void (*function)(A...), unsigned max_threads) {
    return {caller<A...>(Indices<__integer_pack(sizeof...(A))...>()), reinterpret_cast<void (*)()>(function), max_threads,
            sizeof...(A), {sizeof(A)...}};
}

}  // namespace software_cuda
