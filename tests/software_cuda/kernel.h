// What a compiled kernel and the runtime in libcuda share. Kernels are compiled with this text in front, without any other
// header, so that it must not include one; a module compiled with another version of it is refused (DEVICE_VERSION).
#pragma once

namespace software_cuda {

struct Index {
    unsigned x, y, z;
};

// A block; `shared` is its dynamic shared memory, `statics` the static shared memory of all kernels of its module.
struct Block {
    Index index, size, grid;
    char *shared, *statics;
    unsigned shared_bytes, static_bytes;
};

// 16 bytes on their way to shared memory; zeros when `from` is null.
struct Copy {
    char* to;
    const char* from;
    unsigned group;
};

// A thread's part of a warpgroup's product, begun and not waited for.
struct WarpgroupProduct {
    float (*c)[4];
    unsigned long long left, right;  // where the operands are, as the device describes it
    unsigned columns, group;
    bool left_across, right_across;
    bool adds;             // to what c was
    bool has_rows;         // the left operand lies in registers: this thread's two rows of it
    float rows[2][16];
};

// The left operand of a warpgroup's product in registers: from each lane's part, the two rows that it needs.
struct LeftRows {
    const unsigned* part;  // 4
    float (*rows)[16];     // 2
};

// A device thread: a fiber on its block's operating system thread. Its size is an odd number of cache lines, lest the lanes of
// a warp all fall into the same cache sets.
struct alignas(64) Thread {
    void* stack;  // where to go on; valid while another thread runs
    Block* block;
    struct Warp* warp;
    Index index;
    unsigned lane;
    unsigned barrier;  // the source line of the __syncthreads that it waits at
    unsigned group;    // number of the copies' group not yet closed
    unsigned first_copy, end_copy;
    static constexpr unsigned COPIES = 256, PRODUCTS = 63;
    Copy copies[COPIES];  // a ring
    bool shown;           // to products: everything that copies brought
    unsigned long long* awaited;  // the barrier in shared memory that it waits for, until this phase has ended
    unsigned awaited_phase;
    unsigned product_group, first_product, end_product;
    WarpgroupProduct products[PRODUCTS];  // a ring
};
static_assert(sizeof(Thread) / 64 % 2 == 1, "an odd number of cache lines");

// What lanes of a warp do together: the last one to come computes for all, from one record each.
struct Operation {
    const char* name;
    void (*compute)(void* const* records, unsigned lanes);
};

struct Shuffle {
    unsigned long long value, result;
    unsigned source;
};

struct Vote {
    bool value;
    unsigned result;
};

struct Matrices {
    const void* row;
    unsigned* result;  // 4
};

// What copies of boxes are told of a matrix; the device keeps its own description as secret.
struct TensorMap {
    unsigned long long magic, base, columns, rows, pitch, box_columns, box_rows, unused[9];
};

struct Product {
    float* c;           // 4
    const unsigned* a;  // 4
    unsigned b[2];
};

// A kernel as its module exports it, under its name and "__kernel".
struct Kernel {
    void (*call)(void (*function)(), void** arguments);
    void (*function)();
    unsigned max_threads, count, sizes[64];
};

}  // namespace software_cuda

extern "C" {

// The running device thread. The initial-exec model makes it one instruction to read, from any module.
extern __thread software_cuda::Thread* software_cuda_thread __attribute__((tls_model("initial-exec")));

// Waits for the live lanes in `mask` to come to the same operation.
void software_cuda_meet(unsigned mask, const software_cuda::Operation* operation, void* record);
extern const software_cuda::Operation software_cuda_shuffle, software_cuda_vote, software_cuda_syncwarp, software_cuda_load,
    software_cuda_load_transposed, software_cuda_mma_bf16, software_cuda_mma_tf32, software_cuda_left_rows;

void software_cuda_barrier(unsigned line);
void software_cuda_copy(void* shared, const void* global, bool valid);
void software_cuda_copy_wait(unsigned open);
void software_cuda_phase_init(unsigned long long* barrier, int count);
void software_cuda_phase_arrive(unsigned long long* barrier, int bytes);
void software_cuda_phase_wait(unsigned long long* barrier, unsigned phase);
void software_cuda_copy_arrive(unsigned long long* barrier);
void software_cuda_copy_box(char* shared, const software_cuda::TensorMap* map, int column, int row, unsigned long long* barrier);
void software_cuda_copy_bulk(void* shared, const void* global, int bytes, unsigned long long* barrier);
void software_cuda_store_box(const software_cuda::TensorMap* map, int column, int row, const char* shared);
void software_cuda_store_wait();
void software_cuda_begin_product(const software_cuda::WarpgroupProduct& product);
void software_cuda_product_wait(unsigned open);

// The place of `bytes` bytes in the block's shared memory; ends the program when they are not there or not aligned.
unsigned software_cuda_shared(const void* address, unsigned bytes, unsigned alignment);

// Ends the program with a message that says which device thread runs.
[[noreturn]] void software_cuda_fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}
