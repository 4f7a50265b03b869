// What Hopper (sm_90a) alone has: products of a warpgroup, four warps, whose operands lie in shared memory; barriers that count
// bytes; the copy engine.
//
// The text of this file stands behind that of matrix.cuh, before those of kernels for Hopper.

#ifndef SOFTWARE_CUDA  // As in common.cuh.

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
