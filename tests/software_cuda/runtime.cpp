// Runs kernels: blocks on the cores of the machine, a block's threads as fibers of one operating system thread.

#include "runtime.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

using namespace software_cuda;

constexpr unsigned MAX_THREADS = 1024, WARP = 32, FULL = ~0u;
constexpr size_t PAGE = 4096;
// A page behind a power of two, so that the stacks of a warp do not all fall into the same cache sets. The first is a guard.
constexpr size_t STACK = 64 * 1024 + PAGE;
constexpr size_t SHARED = 228 * 1024;

struct software_cuda::Warp {
    // Sets of lanes: not returned; able to run; waiting for others with an operation; waiting at a barrier of the block;
    // waiting for a phase of a barrier in shared memory.
    unsigned live, runnable, waiting, at_barrier, at_phase;
    unsigned rotation;  // which lane runs first
    Thread* threads;
    const Operation* operations[WARP];
    void* records[WARP];
    unsigned masks[WARP];
};

// What arrives at a barrier in shared memory once it is there: a thread's copies, or a box.
struct Arrival {
    unsigned long long* barrier;
    std::vector<Copy> copies;
    unsigned bytes;
};

// A box that a thread has had stored and not waited for.
struct Store {
    const Thread* thread;
    const TensorMap* map;
    int column, row;
    const char* shared;
};

// What an operating system thread needs to run blocks.
struct Worker {
    void* stack;  // where the scheduler goes on; valid while a fiber runs
    Thread* threads;
    char *stacks, *shared_end;
    size_t guarded_stacks = 0;
    Block block;
    const Launch* launch = nullptr;
    Warp warps[MAX_THREADS / WARP];
    std::deque<Arrival> arrivals;  // on their way
    std::vector<Store> stores;
    bool mixed;  // copies by threads arrive at barriers too: products must be shown them
    Worker();
};

static bool shuffled;
static uint64_t seed;
static __thread Worker* worker;
__thread const char* activity;
__attribute__((visibility("default"))) __thread Thread* software_cuda_thread;

// ---- Messages and faults

static void write_place(char* text, size_t size) {
    const Thread* thread = software_cuda_thread;
    if (!worker || !worker->launch) {
        snprintf(text, size, "%s", activity ? activity : "outside of a kernel");
        return;
    }
    Index b = worker->block.index;
    int length = snprintf(text, size, "kernel %s, block (%u, %u, %u)", worker->launch->name.c_str(), b.x, b.y, b.z);
    if (thread)
        snprintf(text + length, size - length, ", thread (%u, %u, %u)", thread->index.x, thread->index.y, thread->index.z);
}

[[noreturn]] static void die(const char* message) {
    char place[256], text[2048];
    write_place(place, sizeof place);
    int length = snprintf(text, sizeof text, "software CUDA: %s: %s\n", place, message);
    if (write(2, text, std::min<size_t>(length, sizeof text - 1)) < 0) _exit(1);
    abort();
}

EXPORT void software_cuda_fail(const char* format, ...) {
    char message[1536];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    die(message);
}

static struct sigaction earlier_segv, earlier_bus;

static void on_fault(int signal, siginfo_t* info, void* context) {
    auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    if (!activity) {  // not ours
        struct sigaction& earlier = signal == SIGSEGV ? earlier_segv : earlier_bus;
        if (earlier.sa_flags & SA_SIGINFO) return earlier.sa_sigaction(signal, info, context);
        sigaction(signal, &earlier, nullptr);  // and the fault comes again
        return;
    }
    char text[512];
    auto stacks = worker ? reinterpret_cast<uintptr_t>(worker->stacks) : 0;
    auto shared_end = worker ? reinterpret_cast<uintptr_t>(worker->shared_end) : 0;
    if (info->si_code == SI_KERNEL)
        snprintf(text, sizeof text, "a misaligned vector or an address beyond all memory was accessed");
    else if (address - stacks < MAX_THREADS * STACK)
        snprintf(text, sizeof text, "the stack of %zu KiB overflows", (STACK - PAGE) / 1024);
    else if (address - shared_end < PAGE)
        snprintf(text, sizeof text, "%zu bytes behind the end of dynamic shared memory were accessed", address - shared_end);
    else
        describe_address(address, text, sizeof text);
    die(text);
}

// What the compiler's checks call (-fsanitize); all begin with the place in the source.
struct SourcePlace {
    const char* file;
    unsigned line, column;
};
#define ON_UNDEFINED(name, what)                                                                          \
    EXPORT void __ubsan_handle_##name##_abort(const SourcePlace* place, uintptr_t value) {                \
        software_cuda_fail("%s (%#lx), %s:%u", what, (unsigned long)value, place->file, place->line);     \
    }
ON_UNDEFINED(type_mismatch_v1, "misaligned address")
ON_UNDEFINED(out_of_bounds, "index outside of an array")
ON_UNDEFINED(shift_out_of_bounds, "shift by too much")
ON_UNDEFINED(divrem_overflow, "division by zero or overflow")

// ---- Fibers

// Goes on where `to` stopped, and keeps this place in *from.
extern "C" void software_cuda_switch(void** from, void* to);
asm(R"(
.pushsection .text
.globl software_cuda_switch
.hidden software_cuda_switch
.type software_cuda_switch, @function
software_cuda_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rdx
    jmpq *%rdx
.size software_cuda_switch, . - software_cuda_switch
.popsection
)");

// Lets another lane of the warp run, or the scheduler when none can; returns when this one is runnable again.
static void leave(Thread& self) {
    const Warp& warp = *self.warp;
    Thread* next = nullptr;
    if (warp.runnable) {
        unsigned r = warp.rotation;
        unsigned rotated = warp.runnable >> r | warp.runnable << (-r & 31);
        next = &warp.threads[(__builtin_ctz(rotated) + r) & 31];
    }
    software_cuda_thread = next;
    software_cuda_switch(&self.stack, next ? next->stack : worker->stack);
}

// Computes the operation that `lane` waits with, if all others are there.
static bool finish_operation(Warp& warp, unsigned lane) {
    unsigned lanes = warp.masks[lane] & warp.live;
    if (lanes & ~warp.waiting) return false;
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        unsigned other = __builtin_ctz(rest);
        if (warp.operations[other] != warp.operations[lane] || warp.masks[other] != warp.masks[lane]) return false;
    }
    if (auto compute = warp.operations[lane]->compute) compute(warp.records, lanes);
    warp.waiting &= ~lanes;
    warp.runnable |= lanes;
    return true;
}

EXPORT void software_cuda_meet(unsigned mask, const Operation* operation, void* record) {
    Thread& self = *software_cuda_thread;
    Warp& warp = *self.warp;
    unsigned bit = 1u << self.lane;
    if (!(mask & bit)) software_cuda_fail("%s for lanes %08x by lane %u", operation->name, mask, self.lane);
    if (unsigned others = warp.waiting & mask) {  // comparing with one that waits for this lane is enough to see most mistakes
        unsigned other = __builtin_ctz(others);
        if (warp.masks[other] & bit && (warp.operations[other] != operation || warp.masks[other] != mask))
            software_cuda_fail("%s for lanes %08x, but lane %u waits in %s for lanes %08x", operation->name, mask, other,
                               warp.operations[other]->name, warp.masks[other]);
    }
    warp.operations[self.lane] = operation;
    warp.records[self.lane] = record;
    warp.masks[self.lane] = mask;
    warp.waiting |= bit;
    if (finish_operation(warp, self.lane)) return;
    warp.runnable &= ~bit;
    leave(self);
}

EXPORT void software_cuda_barrier(unsigned line) {
    Thread& self = *software_cuda_thread;
    self.barrier = line;
    self.warp->at_barrier |= 1u << self.lane;
    self.warp->runnable &= ~(1u << self.lane);
    leave(self);
}

// Where a fiber begins.
static void run_thread() {
    Thread& self = *software_cuda_thread;
    const Launch& launch = *worker->launch;
    launch.kernel->call(launch.kernel->function, launch.arguments);
    Warp& warp = *self.warp;
    warp.live &= ~(1u << self.lane);
    warp.runnable &= warp.live;
    for (unsigned lanes = warp.waiting; lanes; lanes &= lanes - 1) {  // who waited only for this one
        unsigned lane = __builtin_ctz(lanes);
        if (warp.waiting >> lane & 1) finish_operation(warp, lane);
    }
    leave(self);
    __builtin_unreachable();
}

static void* map_memory(size_t size) {
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) die("no memory for device threads");
    return memory;
}

Worker::Worker() {
    threads = static_cast<Thread*>(map_memory(MAX_THREADS * sizeof(Thread)));
    stacks = static_cast<char*>(map_memory(MAX_THREADS * STACK));
    shared_end = static_cast<char*>(map_memory(SHARED + PAGE)) + SHARED;
    mprotect(shared_end, PAGE, PROT_NONE);
}

// ---- Blocks

static uint64_t hash(uint64_t x) {
    x = (x ^ x >> 32) * 0xd6e8feb86659fd93;
    x = (x ^ x >> 32) * 0xd6e8feb86659fd93;
    return x ^ x >> 32;
}

static void prepare_block(Worker& w, const Launch& launch, size_t number) {
    const Index& size = launch.block;
    unsigned count = size.x * size.y * size.z;
    for (; w.guarded_stacks < count; ++w.guarded_stacks) mprotect(w.stacks + w.guarded_stacks * STACK, PAGE, PROT_NONE);
    w.launch = &launch;
    w.arrivals.clear();
    w.stores.clear();
    w.mixed = false;
    Block& block = w.block;
    block.size = size;
    block.grid = launch.grid;
    block.index = {unsigned(number % launch.grid.x), unsigned(number / launch.grid.x % launch.grid.y),
                   unsigned(number / launch.grid.x / launch.grid.y)};
    // The end of dynamic shared memory is at the guard page, as far as its alignment allows.
    block.shared = w.shared_end - (launch.shared_bytes + 127) / 128 * 128;
    block.shared_bytes = launch.shared_bytes;
    block.statics = launch.statics() - launch.statics_offset;
    block.static_bytes = launch.static_bytes;
    memset(block.shared, 0xff, w.shared_end - block.shared);
    memset(block.statics, 0xff, block.static_bytes);

    Index index{0, 0, 0};
    for (unsigned i = 0; i < count; ++i) {
        Thread& thread = w.threads[i];
        // The offset spreads the tops over cache sets. A called function finds its stack 8 bytes off a multiple of 16.
        auto top = reinterpret_cast<void**>(w.stacks + (i + 1) * STACK - i % 8 * 512);
        top[-1] = nullptr;
        top[-2] = reinterpret_cast<void*>(&run_thread);
        thread.stack = top - 8;
        thread.block = &block;
        thread.warp = &w.warps[i / WARP];
        thread.index = index;
        thread.lane = i % WARP;
        thread.group = thread.first_copy = thread.end_copy = 0;
        thread.product_group = thread.first_product = thread.end_product = 0;
        thread.shown = true;
        thread.awaited = nullptr;
        if (++index.x == size.x) {
            index.x = 0;
            if (++index.y == size.y) index.y = 0, ++index.z;
        }
    }
    for (unsigned i = 0; i < count; i += WARP) {
        Warp& warp = w.warps[i / WARP];
        warp.live = warp.runnable = FULL >> (WARP - std::min(WARP, count - i));
        warp.waiting = warp.at_barrier = warp.at_phase = warp.rotation = 0;
        warp.threads = &w.threads[i];
    }
}

[[noreturn]] static void report_divergence(const Worker& w, unsigned warps, const char* what) {
    std::string text = what;
    for (unsigned i = 0, printed = 0; i < warps && printed < 8; ++i) {
        const Warp& warp = w.warps[i];
        for (unsigned lanes = warp.live; lanes;) {  // lanes that wait for the same, together
            unsigned first = __builtin_ctz(lanes), same = 0;
            auto waits_for = [&](unsigned lane) {
                char place[128];
                if (warp.at_barrier >> lane & 1)
                    snprintf(place, sizeof place, "at the __syncthreads of line %u", warp.threads[lane].barrier);
                else if (warp.at_phase >> lane & 1)
                    snprintf(place, sizeof place, "for phase %u of the barrier %td bytes behind the start of shared memory",
                             warp.threads[lane].awaited_phase,
                             reinterpret_cast<char*>(warp.threads[lane].awaited) - w.block.shared);
                else
                    snprintf(place, sizeof place, "in %s for lanes %08x", warp.operations[lane]->name, warp.masks[lane]);
                return std::string(place);
            };
            for (unsigned l = first; l < WARP; ++l)
                if (lanes >> l & 1 && waits_for(l) == waits_for(first)) same |= 1u << l;
            lanes &= ~same;
            char part[200];
            snprintf(part, sizeof part, "\n  warp %u: lanes %08x %s", i, same, waits_for(first).c_str());
            text += part, ++printed;
        }
        if (warp.live == 0) text += "\n  warp " + std::to_string(i) + " has returned", ++printed;
    }
    die(text.c_str());
}

// Lets all go on who wait at the barrier, after all live threads came there.
static void release_barrier(Worker& w, unsigned warps) {
    unsigned line = 0;
    for (unsigned i = 0; i < warps; ++i) {
        const Warp& warp = w.warps[i];
        if (warp.at_barrier != warp.live) report_divergence(w, warps, "threads wait for each other:");
        for (unsigned lanes = warp.live; lanes; lanes &= lanes - 1) {
            unsigned there = warp.threads[__builtin_ctz(lanes)].barrier;
            if (line && line != there) report_divergence(w, warps, "threads wait at different barriers:");
            line = there;
        }
    }
    for (unsigned i = 0; i < warps; ++i) {
        w.warps[i].runnable = w.warps[i].live;
        w.warps[i].at_barrier = 0;
    }
}

// A barrier in shared memory, as its 8 bytes: how many arrivals a phase takes, how many are missing, the bytes that are missing
// or came too early, and the number of the present phase.
struct Phases {
    uint16_t count, missing;
    int32_t bytes : 31;
    uint32_t phase : 1;
};
static_assert(sizeof(Phases) == 8, "as large as a device's");

template <class Change>
static bool with_phases(unsigned long long* barrier, const Change& change) {
    Phases phases;
    memcpy(&phases, barrier, sizeof phases);
    bool result = change(phases);
    if (phases.missing == 0 && phases.bytes == 0 && phases.count) {
        phases.phase ^= 1;
        phases.missing = phases.count;
    }
    memcpy(barrier, &phases, sizeof phases);
    return result;
}

static bool has_ended(unsigned long long* barrier, unsigned phase) {
    return with_phases(barrier, [&](Phases& phases) { return phases.phase != phase; });
}

static void arrive(unsigned long long* barrier, int announced, int bytes) {
    with_phases(barrier, [&](Phases& phases) {
        if (!bytes) {
            if (!phases.missing) software_cuda_fail("more arrivals at a barrier than the %u of a phase", phases.count);
            --phases.missing;
        }
        phases.bytes += announced - bytes;
        return true;
    });
}

// Brings what is on its way for the longest time.
static void complete_arrival(Worker& w) {
    Arrival arrival = std::move(w.arrivals.front());
    w.arrivals.pop_front();
    for (const Copy& copy : arrival.copies) {
        if (copy.from)
            memcpy(copy.to, copy.from, 16);
        else
            memset(copy.to, 0, 16);
    }
    arrive(arrival.barrier, 0, int(arrival.bytes));
}

// Wakes who waits for phases that have ended; copies come only when nobody else can go on. Says whether anyone can now.
static bool wake_waiting(Worker& w, unsigned warps) {
    for (;;) {
        bool woken = false;
        for (unsigned i = 0; i < warps; ++i) {
            Warp& warp = w.warps[i];
            for (unsigned lanes = warp.at_phase; lanes; lanes &= lanes - 1) {
                unsigned lane = __builtin_ctz(lanes);
                const Thread& thread = warp.threads[lane];
                if (!has_ended(thread.awaited, thread.awaited_phase)) continue;
                warp.at_phase &= ~(1u << lane);
                warp.runnable |= 1u << lane;
                woken = true;
            }
        }
        if (woken) return true;
        if (w.arrivals.empty()) return false;
        complete_arrival(w);
    }
}

static void run_block(const Launch& launch, size_t number) {
    if (!worker) worker = new Worker;
    Worker& w = *worker;
    prepare_block(w, launch, number);
    unsigned warps = (launch.block.x * launch.block.y * launch.block.z + WARP - 1) / WARP;
    uint64_t random = hash(seed + number);
    unsigned order[MAX_THREADS / WARP];
    for (unsigned i = 0; i < warps; ++i) order[i] = i;
    for (;;) {
        if (shuffled)
            for (unsigned i = 0; i < warps; ++i) {
                random = hash(random + 1);
                std::swap(order[i], order[i + random % (warps - i)]);
                w.warps[i].rotation = random >> 32 & 31;
            }
        bool live = false;
        for (unsigned i = 0; i < warps; ++i) {
            Warp& warp = w.warps[order[i]];
            while (warp.runnable) {  // once, until all its lanes wait or have returned
                unsigned r = warp.rotation;
                unsigned rotated = warp.runnable >> r | warp.runnable << (-r & 31);
                software_cuda_thread = &warp.threads[(__builtin_ctz(rotated) + r) & 31];
                software_cuda_switch(&w.stack, software_cuda_thread->stack);
            }
            live |= warp.live != 0;
        }
        if (!live) break;
        if (!wake_waiting(w, warps)) release_barrier(w, warps);
    }
    if (!w.arrivals.empty() || !w.stores.empty())
        software_cuda_fail("%zu copies are still on their way when the block ends", w.arrivals.size() + w.stores.size());
    w.launch = nullptr;
}

void run_kernel(const Launch& launch) {
    size_t count = size_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    std::vector<size_t> order;
    if (shuffled) {
        order.resize(count);
        for (size_t i = 0; i < count; ++i) order[i] = i;
        std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
    }
    software_cuda_parallel(launch.name.c_str(), count, [&](size_t i) { run_block(launch, shuffled ? order[i] : i); });
}

// ---- Shared memory and copies to it

EXPORT unsigned software_cuda_shared(const void* address, unsigned bytes, unsigned alignment) {
    const Block& block = *software_cuda_thread->block;
    auto p = static_cast<const char*>(address);
    if (reinterpret_cast<uintptr_t>(p) & (alignment - 1))
        software_cuda_fail("%u bytes of shared memory at %p, not aligned to %u", bytes, address, alignment);
    if (p >= block.shared && p + bytes <= block.shared + block.shared_bytes) return unsigned(p - block.shared);
    if (p >= block.statics && p + bytes <= block.statics + block.static_bytes) return 1u << 24 | unsigned(p - block.statics);
    software_cuda_fail("%u bytes at %p, which is %td bytes behind the start of the %u bytes of dynamic shared memory", bytes,
                       address, p - block.shared, block.shared_bytes);
}

EXPORT void software_cuda_copy(void* shared, const void* global, bool valid) {
    Thread& self = *software_cuda_thread;
    software_cuda_shared(shared, 16, 16);
    if (reinterpret_cast<uintptr_t>(global) % 16) software_cuda_fail("copy_async from %p, not aligned to 16", global);
    if (self.end_copy - self.first_copy == Thread::COPIES)
        software_cuda_fail("more than %u copies on their way", Thread::COPIES);
    self.copies[self.end_copy++ % Thread::COPIES] = {static_cast<char*>(shared),
                                                     valid ? static_cast<const char*>(global) : nullptr, self.group};
    // The copy may begin at once: who still reads what was here must see that it is too late.
    memset(shared, 0xff, 16);
}

EXPORT void software_cuda_copy_wait(unsigned open) {
    Thread& self = *software_cuda_thread;
    while (self.first_copy != self.end_copy) {
        const Copy& copy = self.copies[self.first_copy % Thread::COPIES];
        if (copy.group + open >= self.group) break;
        if (copy.from)
            memcpy(copy.to, copy.from, 16);
        else
            memset(copy.to, 0, 16);
        ++self.first_copy;
        self.shown = false;
    }
}

// ---- Barriers in shared memory, and copies that arrive at them

static unsigned long long* checked_barrier(unsigned long long* barrier) {
    software_cuda_shared(barrier, 8, 8);
    return barrier;
}

EXPORT void software_cuda_phase_init(unsigned long long* barrier, int count) {
    if (count < 1 || count > 1024) software_cuda_fail("a barrier of %d arrivals", count);
    Phases phases{uint16_t(count), uint16_t(count), 0, 0};
    memcpy(checked_barrier(barrier), &phases, sizeof phases);
}

EXPORT void software_cuda_phase_arrive(unsigned long long* barrier, int bytes) { arrive(checked_barrier(barrier), bytes, 0); }

EXPORT void software_cuda_phase_wait(unsigned long long* barrier, unsigned phase) {
    Thread& self = *software_cuda_thread;
    Warp& warp = *self.warp;
    self.awaited = checked_barrier(barrier);
    self.awaited_phase = phase;
    if (!has_ended(barrier, phase)) {
        warp.at_phase |= 1u << self.lane;
        warp.runnable &= ~(1u << self.lane);
        leave(self);
    }
    if (worker->mixed) self.shown = false;
}

EXPORT void software_cuda_copy_arrive(unsigned long long* barrier) {
    Thread& self = *software_cuda_thread;
    Arrival arrival{checked_barrier(barrier), {}, 0};
    for (; self.first_copy != self.end_copy; ++self.first_copy)
        arrival.copies.push_back(self.copies[self.first_copy % Thread::COPIES]);
    worker->arrivals.push_back(std::move(arrival));
    worker->mixed = true;
}

// Visits a box's chunks of 16 bytes: visit(place in shared memory, place in the matrix or null). A tile has rows of 128 bytes,
// whose chunks are permuted by the row's number.
template <class Visit>
static void each_chunk(const TensorMap& map, int column, int row, char* shared, const Visit& visit) {
    if (map.magic != TENSOR_MAP) software_cuda_fail("a box by a map that the driver has not made");
    software_cuda_shared(shared, unsigned(128 * map.box_rows), 16);
    std::ptrdiff_t place = shared - worker->block.shared;
    if (place % 1024 || column % 8) software_cuda_fail("a box at %td bytes of shared memory, from column %d on", place, column);
    for (unsigned r = 0; r < map.box_rows; ++r) {
        for (unsigned chunk = 0; chunk < 8; ++chunk) {
            long long at_row = row + (long long)r, at_column = column + 8LL * chunk;
            bool inside = at_row >= 0 && at_row < (long long)map.rows && at_column >= 0 && at_column < (long long)map.columns;
            auto outer = reinterpret_cast<char*>(map.base + at_row * map.pitch + 2 * at_column);
            visit(shared + r * 128 + (chunk ^ r % 8) * 16, inside ? outer : nullptr);
        }
    }
}

EXPORT void software_cuda_copy_box(char* shared, const TensorMap* map, int column, int row, unsigned long long* barrier) {
    Arrival arrival{checked_barrier(barrier), {}, unsigned(128 * map->box_rows)};
    each_chunk(*map, column, row, shared, [&](char* to, const char* from) { arrival.copies.push_back({to, from, 0}); });
    memset(shared, 0xff, arrival.bytes);
    worker->arrivals.push_back(std::move(arrival));
}

EXPORT void software_cuda_copy_bulk(void* shared, const void* global, int bytes, unsigned long long* barrier) {
    if (bytes <= 0 || bytes % 16 || (uintptr_t)global % 16) software_cuda_fail("a bulk copy of %d bytes from %p", bytes, global);
    software_cuda_shared(shared, unsigned(bytes), 16);
    Arrival arrival{checked_barrier(barrier), {}, unsigned(bytes)};
    auto to = static_cast<char*>(shared);
    auto from = static_cast<const char*>(global);
    for (int at = 0; at < bytes; at += 16) arrival.copies.push_back({to + at, from + at, 0});
    memset(shared, 0xff, arrival.bytes);
    worker->arrivals.push_back(std::move(arrival));
}

EXPORT void software_cuda_store_box(const TensorMap* map, int column, int row, const char* shared) {
    worker->stores.push_back({software_cuda_thread, map, column, row, shared});
}

// Boxes are read as late as a device may read them.
EXPORT void software_cuda_store_wait() {
    auto& stores = worker->stores;
    for (const Store& store : stores) {
        if (store.thread != software_cuda_thread) continue;
        each_chunk(*store.map, store.column, store.row, const_cast<char*>(store.shared), [](const char* from, char* to) {
            if (to) memcpy(to, from, 16);
        });
    }
    stores.erase(std::remove_if(stores.begin(), stores.end(), [](const Store& store) { return store.thread == software_cuda_thread; }),
                 stores.end());
}

// ---- Products of a warpgroup: 64 x 16 times 16 x N of bf16 in shared memory

// One operand of a product: its element at `index` (row of the left one, column of the right one) and step `k`. A block of 1 KiB has
// eight rows of 128 bytes, whose 16-byte chunks are permuted by the row's number; along the depth a row is an index, across it a
// step (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout").
struct Operand {
    const Block& block;
    unsigned start, column_blocks, row_blocks;
    bool across;

    Operand(const Block& block, unsigned long long descriptor, bool across, const char* which)
        : block(block), start((descriptor & 0x3fff) << 4), column_blocks((descriptor >> 16 & 0x3fff) << 4),
          row_blocks((descriptor >> 32 & 0x3fff) << 4), across(across) {
        if (descriptor >> 62 != 1 || descriptor >> 49 & 7) software_cuda_fail("wgmma: %s operand is not permuted by 128 bytes", which);
    }

    float at(unsigned index, unsigned k) const {
        unsigned row = across ? k : index, column = across ? index : k;
        unsigned place = start + row / 8 * row_blocks + row % 8 * 128 + column / 64 * column_blocks + column % 64 * 2;
        place ^= (place >> 7 & 7) << 4;
        if (place + 2 > block.shared_bytes)
            software_cuda_fail("wgmma reads %u bytes behind the start of %u bytes of dynamic shared memory", place, block.shared_bytes);
        uint16_t bits;
        memcpy(&bits, block.shared + place, 2);
        uint32_t wide = uint32_t(bits) << 16;
        float value;
        memcpy(&value, &wide, 4);
        return value;
    }
};

EXPORT void software_cuda_begin_product(const WarpgroupProduct& product) {
    Thread& self = *software_cuda_thread;
    const Index& size = self.block->size;
    if (size.y * size.z != 1 || self.index.x / 128 * 128 + 128 > size.x) software_cuda_fail("wgmma in a block of %u x %u x %u threads", size.x, size.y, size.z);
    if (!self.shown) software_cuda_fail("wgmma, but what copy_async brought was not shown to it");
    if (self.end_product - self.first_product == Thread::PRODUCTS)
        software_cuda_fail("more than %u products on their way", Thread::PRODUCTS);
    WarpgroupProduct& mine = self.products[self.end_product++ % Thread::PRODUCTS];
    mine = product;
    mine.group = self.product_group;
}

// A thread's results: with g = lane / 4 and t = lane % 4, rows g and g + 8 of its warp's 16, columns 2t and 2t + 1 of every 8.
static void multiply_part(const Thread& self, const WarpgroupProduct& product) {
    Operand right(*self.block, product.right, product.right_across, "the right");
    unsigned row = self.index.x % 128 / 32 * 16 + self.lane / 4, first = self.lane % 4 * 2;
    float rows[2][16];
    memcpy(rows, product.rows, sizeof rows);
    if (!product.has_rows) {
        Operand left(*self.block, product.left, product.left_across, "the left");
        for (unsigned k = 0; k < 16; ++k)
            for (unsigned half : {0, 1}) rows[half][k] = left.at(row + 8 * half, k);
    }
    for (unsigned column = 0; column < product.columns; ++column) {
        if (column % 8 / 2 * 2 != first) continue;
        float* c = product.c[column / 8];
        for (unsigned half : {0, 1}) c[2 * half + column % 2] = product.adds ? c[2 * half + column % 2] : 0.0f;
        for (unsigned k = 0; k < 16; ++k) {
            float b = right.at(column, k);
            for (unsigned half : {0, 1}) c[2 * half + column % 2] += rows[half][k] * b;
        }
    }
}

// Operands are read as late as a device may read them.
EXPORT void software_cuda_product_wait(unsigned open) {
    Thread& self = *software_cuda_thread;
    while (self.first_product != self.end_product) {
        const WarpgroupProduct& product = self.products[self.first_product % Thread::PRODUCTS];
        if (product.group + open >= self.product_group) break;
        multiply_part(self, product);
        ++self.first_product;
    }
}

// ---- Operations of a warp

static void whole_warp(unsigned lanes, const char* name) {
    if (lanes != FULL) software_cuda_fail("%s by lanes %08x only", name, lanes);
}

// A lane that is not there gives only ones, a NaN.
static void shuffle(void* const* records, unsigned lanes) {
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        auto& record = *static_cast<Shuffle*>(records[__builtin_ctz(rest)]);
        bool there = record.source < WARP && lanes >> record.source & 1;
        record.result = there ? static_cast<const Shuffle*>(records[record.source])->value : ~0ull;
    }
}

static void vote(void* const* records, unsigned lanes) {
    unsigned result = 0;
    for (unsigned l = 0; l < WARP; ++l)
        if (lanes >> l & 1 && static_cast<const Vote*>(records[l])->value) result |= 1u << l;
    for (unsigned rest = lanes; rest; rest &= rest - 1) static_cast<Vote*>(records[__builtin_ctz(rest)])->result = result;
}

template <bool Transposed>
static void load(void* const* records, unsigned lanes) {
    whole_warp(lanes, "load_matrices");
    uint16_t rows[WARP][8];
    for (unsigned l = 0; l < WARP; ++l) memcpy(rows[l], static_cast<const Matrices*>(records[l])->row, 16);
    for (unsigned l = 0; l < WARP; ++l)
        for (unsigned i = 0; i < 4; ++i) {
            unsigned a = l / 4, b = l % 4 * 2;
            unsigned low = Transposed ? rows[8 * i + b][a] : rows[8 * i + a][b];
            unsigned high = Transposed ? rows[8 * i + b + 1][a] : rows[8 * i + a][b + 1];
            static_cast<const Matrices*>(records[l])->result[i] = high << 16 | low;
        }
}

static float as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

typedef float Row __attribute__((vector_size(32)));  // 8 columns

// c += a b for a 16 x Depth, b Depth x 8. Products of bf16 or of TF32 are exact in a float; sums are rounded to nearest.
__attribute__((target_clones("default", "arch=x86-64-v3")))
static void multiply(Row* c, const float* a, const Row* b, unsigned depth) {
    for (unsigned row = 0; row < 16; ++row, a += depth) {
        Row sum = c[row];
        for (unsigned k = 0; k < depth; ++k) sum += a[k] * b[k];
        c[row] = sum;
    }
}

static void multiply_for(void* const* records, const float* a, const Row* b, unsigned depth) {
    Row c[16];
    for (unsigned l = 0; l < WARP; ++l) {
        const float* values = static_cast<const Product*>(records[l])->c;
        for (unsigned i = 0; i < 4; ++i) c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2] = values[i];
    }
    multiply(c, a, b, depth);
    for (unsigned l = 0; l < WARP; ++l) {
        float* values = static_cast<const Product*>(records[l])->c;
        for (unsigned i = 0; i < 4; ++i) values[i] = c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    }
}

static void multiply_bf16(void* const* records, unsigned lanes) {
    whole_warp(lanes, "mma_bf16");
    float a[16][16];
    Row b[16];
    for (unsigned l = 0; l < WARP; ++l) {
        auto& record = *static_cast<const Product*>(records[l]);
        unsigned g = l / 4, t = l % 4 * 2;
        for (unsigned i = 0; i < 4; ++i) {
            a[g + i % 2 * 8][t + i / 2 * 8] = as_float(record.a[i] << 16);
            a[g + i % 2 * 8][t + i / 2 * 8 + 1] = as_float(record.a[i] & 0xffff0000);
        }
        for (unsigned i = 0; i < 2; ++i) {
            b[t + i * 8][g] = as_float(record.b[i] << 16);
            b[t + i * 8 + 1][g] = as_float(record.b[i] & 0xffff0000);
        }
    }
    multiply_for(records, a[0], b, 16);
}

static void left_rows(void* const* records, unsigned lanes) {
    whole_warp(lanes, "wgmma with a left operand in registers");
    for (unsigned l = 0; l < WARP; ++l) {
        float(*rows)[16] = static_cast<const LeftRows*>(records[l])->rows;
        for (unsigned t = 0; t < 4; ++t) {
            const unsigned* part = static_cast<const LeftRows*>(records[l / 4 * 4 + t])->part;
            for (unsigned i = 0; i < 4; ++i) {
                rows[i % 2][2 * t + i / 2 * 8] = as_float(part[i] << 16);
                rows[i % 2][2 * t + i / 2 * 8 + 1] = as_float(part[i] & 0xffff0000);
            }
        }
    }
}

static void multiply_tf32(void* const* records, unsigned lanes) {
    whole_warp(lanes, "mma_tf32");
    float a[16][8];
    Row b[8];
    for (unsigned l = 0; l < WARP; ++l) {
        auto& record = *static_cast<const Product*>(records[l]);
        unsigned g = l / 4, t = l % 4;
        for (unsigned i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = as_float(record.a[i] & ~0x1fffu);
        for (unsigned i = 0; i < 2; ++i) b[t + i * 4][g] = as_float(record.b[i] & ~0x1fffu);
    }
    multiply_for(records, a[0], b, 8);
}

#define OPERATION(identifier, name, compute) EXPORT const Operation identifier = {name, compute};
OPERATION(software_cuda_shuffle, "a shuffle", shuffle)
OPERATION(software_cuda_vote, "a vote", vote)
OPERATION(software_cuda_syncwarp, "__syncwarp", nullptr)
OPERATION(software_cuda_load, "load_matrices", load<false>)
OPERATION(software_cuda_load_transposed, "load_matrices_transposed", load<true>)
OPERATION(software_cuda_mma_bf16, "mma_bf16", multiply_bf16)
OPERATION(software_cuda_left_rows, "wgmma with a left operand in registers", left_rows)
OPERATION(software_cuda_mma_tf32, "mma_tf32", multiply_tf32)

// ---- Cores

namespace {

// Never destroyed, as its threads still wait when the program ends.
struct Pool {
    std::mutex calls, mutex;
    std::condition_variable wake, finished;
    const std::function<void(size_t)>* body;
    const char* activity;
    size_t count = 0, next = 0, open = 0, started = 0;
    // More would only cost memory mappings, of which the stacks' guard pages use many.
    const unsigned size = std::clamp(std::thread::hardware_concurrency(), 1u, 16u);

    void work() {
        stack_t stack{};
        stack.ss_size = 64 * 1024;
        stack.ss_sp = malloc(stack.ss_size);
        sigaltstack(&stack, nullptr);  // a handler must not run on a stack that overflows
        std::unique_lock lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return next < count; });
            while (next < count) {
                // A few at a time, so that tiny blocks are not all about the lock.
                size_t begin = next, end = next + std::max<size_t>(1, (count - next) / (4 * size));
                next = end;
                lock.unlock();
                ::activity = activity;
                for (size_t i = begin; i < end; ++i) (*body)(i);
                ::activity = nullptr;
                lock.lock();
                open -= end - begin;
            }
            if (open == 0) finished.notify_all();
        }
    }

    void run(const char* name, size_t n, const std::function<void(size_t)>& function) {
        std::lock_guard call(calls);
        std::unique_lock lock(mutex);
        for (; started < std::min<size_t>(size, n); ++started) std::thread([this] { work(); }).detach();
        activity = name, body = &function, count = open = n, next = 0;
        if (n == 1)
            wake.notify_one();
        else
            wake.notify_all();
        finished.wait(lock, [&] { return open == 0; });
        count = next = 0;
    }
};

}  // namespace

EXPORT void software_cuda_parallel(const char* name, size_t count, const std::function<void(size_t)>& body) {
    static Pool& pool = *new Pool;
    if (count) pool.run(name, count, body);
}

void start_runtime() {
    if (const char* text = getenv("SOFTWARE_CUDA_SEED"); text && *text) {
        shuffled = true;
        seed = hash(strtoull(text, nullptr, 10) + 1);
    }
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &earlier_segv);
    sigaction(SIGBUS, &action, &earlier_bus);
}
