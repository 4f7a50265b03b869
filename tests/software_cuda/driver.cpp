// The CUDA driver API: memory, modules, streams and graphs of one device that is this machine's processor.

#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "runtime.h"

using software_cuda::Index;
using software_cuda::Kernel;

#define API EXPORT int

#define ERRORS(e)                                                                                             \
    e(SUCCESS, 0) e(INVALID_VALUE, 1) e(OUT_OF_MEMORY, 2) e(NOT_INITIALIZED, 3) e(INVALID_DEVICE, 101)        \
    e(INVALID_IMAGE, 200) e(INVALID_CONTEXT, 201) e(NO_BINARY_FOR_GPU, 209) e(INVALID_HANDLE, 400)            \
    e(NOT_FOUND, 500) e(NOT_READY, 600) e(NOT_SUPPORTED, 801) e(STREAM_CAPTURE_UNSUPPORTED, 900)              \
    e(STREAM_CAPTURE_UNMATCHED, 903) e(STREAM_CAPTURE_ISOLATION, 905) e(CAPTURED_EVENT, 907)
#define DEFINE_ERROR(name, number) name = number,
enum Error { ERRORS(DEFINE_ERROR) };

constexpr size_t PAGE = 4096, ALIGNMENT = 16;
constexpr int MAX_THREADS = 1024, DEFAULT_SHARED = 48 * 1024, REGISTERS = 64;

// The device that this is: compute capability 9.0 if the environment says so, else 8.9.
static int architecture() {
    static const int asked = [] {
        const char* text = getenv("SOFTWARE_CUDA_ARCHITECTURE");
        return text && !strcmp(text, "90") ? 90 : 89;
    }();
    return asked;
}

// Of a block, and of a multiprocessor, which keeps 1 KiB of each block's for itself.
static int max_shared() { return architecture() == 90 ? 227 * 1024 : 99 * 1024; }

using Work = std::function<void()>;

struct Graph {
    std::vector<Work> work;
    // Of its capture. The mode says what other calls are forbidden meanwhile: GLOBAL all, THREAD_LOCAL those of the thread.
    int mode;
    std::thread::id thread;
};

struct Stream {
    bool blocking = true;  // by work of the default stream
    Graph* capture = nullptr;
    std::deque<Work> late;  // submitted, not yet done
    uint64_t submitted = 0, done = 0;
};

// A place in a stream's work.
struct Mark {
    Stream* stream;
    uint64_t number;
    bool passed = false;
    std::chrono::steady_clock::time_point time;
};

struct Event {
    bool timed;
    std::shared_ptr<Mark> mark;
    Graph* capture = nullptr;  // in which it was recorded last
};

struct Function {
    std::string name;
    const Kernel* kernel;
    const struct Module* module;
    int max_shared = DEFAULT_SHARED;
};

struct Module {
    int file;  // stays open: the loader knows libraries by their paths, and this one's path is the number
    void* library;
    char* (*statics)();
    std::ptrdiff_t statics_offset;
    unsigned static_bytes;
    std::map<std::string, Function> functions;
};

struct Allocation {
    size_t size;
    char* region;
    size_t region_size;
    bool host, freed;
    size_t rounded() const { return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }
};

// Everything below is used by one system thread at a time.
static std::recursive_mutex device;
static bool initialized, late;
static int retained;
static thread_local void* current;
static Stream default_stream;
static std::set<Stream*> streams;
static std::set<Event*> events;
static std::set<Graph*> graphs, executables, captures;
static std::set<Module*> modules;
static std::map<uintptr_t, Allocation> allocations;  // by start, the freed ones too
static size_t allocated, total_memory;

#define CHECK(condition, error) \
    if (!(condition)) return error
// Before every call that needs a device.
#define ENTER                                 \
    std::lock_guard guard(device);            \
    CHECK(initialized, NOT_INITIALIZED);      \
    CHECK(current, INVALID_CONTEXT)
// Before calls that a capture forbids, as they would not be in its graph.
#define ENTER_UNCAPTURED \
    ENTER;               \
    CHECK(may_leave_capture(), STREAM_CAPTURE_UNSUPPORTED)

static bool may_leave_capture() {
    auto thread = std::this_thread::get_id();
    return std::all_of(captures.begin(), captures.end(),
                       [&](Graph* graph) { return graph->mode == 2 || (graph->mode == 1 && graph->thread != thread); });
}

template <class T>
static T* create(std::set<T*>& set, T value = {}) {
    T* object = new T(std::move(value));
    set.insert(object);
    return object;
}

template <class T>
static int destroy(std::set<T*>& set, T* object) {
    CHECK(set.erase(object), INVALID_HANDLE);
    delete object;
    return SUCCESS;
}

// ---- Work

static void flush(Stream& stream, uint64_t number) {
    while (stream.done < number && !stream.late.empty()) {
        Work work = std::move(stream.late.front());
        stream.late.pop_front();
        ++stream.done;
        work();
    }
}

static void flush(Stream& stream) { flush(stream, stream.submitted); }

static void flush_all(bool blocking_only = false) {
    for (Stream* stream : streams)
        if (stream->blocking || !blocking_only) flush(*stream);
}

static Stream* find_stream(void* handle) {
    if (reinterpret_cast<uintptr_t>(handle) <= 2) return &default_stream;  // null, or the names of default streams
    auto stream = static_cast<Stream*>(handle);
    return streams.count(stream) ? stream : nullptr;
}

static void submit(Stream& stream, Work work) {
    if (stream.capture) return stream.capture->work.push_back(std::move(work));
    ++stream.submitted;
    stream.late.push_back(std::move(work));
    if (&stream == &default_stream) flush_all(true);
    if (&stream == &default_stream || !late) flush(stream);
}

EXPORT int software_cuda_submit(void* stream, const Work& work) {
    ENTER;
    Stream* found = find_stream(stream);
    CHECK(found, INVALID_HANDLE);
    submit(*found, work);
    return SUCCESS;
}

// ---- The device

API cuInit(unsigned flags) {
    std::lock_guard guard(device);
    CHECK(flags == 0, INVALID_VALUE);
    if (initialized) return SUCCESS;
    // Modules find the runtime among the global symbols.
    Dl_info self;
    if (!dladdr(reinterpret_cast<void*>(&software_cuda_submit), &self) ||
        !dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL))
        software_cuda_fail("libcuda does not find itself");
    total_memory = size_t(sysconf(_SC_PHYS_PAGES)) * PAGE / 2;
    const char* text = getenv("SOFTWARE_CUDA_LATE");
    late = text && *text && strcmp(text, "0");
    start_runtime();
    initialized = true;
    return SUCCESS;
}

API cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}

API cuDeviceGetCount(int* count) {
    *count = 1;
    return initialized ? SUCCESS : NOT_INITIALIZED;
}

API cuDeviceGet(int* handle, int ordinal) {
    CHECK(initialized, NOT_INITIALIZED);
    CHECK(ordinal == 0, INVALID_DEVICE);
    *handle = 0;
    return SUCCESS;
}

API cuDeviceGetName(char* name, int length, int) {
    snprintf(name, size_t(length), "Software CUDA");
    return SUCCESS;
}

API cuDeviceGetUuid_v2(char* uuid, int) {
    memcpy(uuid, "software CUDA 01", 16);
    return SUCCESS;
}

API cuDeviceTotalMem_v2(size_t* bytes, int) {
    CHECK(initialized, NOT_INITIALIZED);
    *bytes = total_memory;
    return SUCCESS;
}

// 0 for the rest, which are mostly of the kind "can it".
API cuDeviceGetAttribute(int* value, int attribute, int) {
    static const std::map<int, int> attributes = {
        {1, MAX_THREADS},     {2, 1024},        {3, 1024},       {4, 64},                   // block
        {5, 0x7fffffff},      {6, 65535},       {7, 65535},                                 // grid
        {8, DEFAULT_SHARED},  {9, 65536},       {10, 32},        {11, 0x7fffffff},          // shared, constant memory, warp
        {12, 65536},          {13, 2000000},    {14, 512},       {16, 4},                   // registers, kHz, multiprocessors
        {29, 512},            {31, 1},          {36, 9000000},   {37, 128},                 // memory kHz, bits
        {38, 4 << 20},        {39, 1536},       {40, 2},         {41, 1},                   // L2, threads, copy engines
        {75, architecture() / 10}, {76, architecture() % 10}, {78, 1},         {79, 1},       {80, 1},    // compute capability
        {81, max_shared() + 1024}, {82, 65536}, {97, max_shared()}, {106, 24},    {111, 1024},
    };
    auto found = attributes.find(attribute);
    *value = found == attributes.end() ? 0 : found->second;
    return SUCCESS;
}

API cuDevicePrimaryCtxRetain(void** context, int) {
    std::lock_guard guard(device);
    CHECK(initialized, NOT_INITIALIZED);
    ++retained;
    *context = &retained;
    return SUCCESS;
}

API cuDevicePrimaryCtxRelease_v2(int) {
    std::lock_guard guard(device);
    CHECK(retained > 0, INVALID_CONTEXT);
    flush_all();
    --retained;
    return SUCCESS;
}

API cuCtxSetCurrent(void* context) {
    CHECK(!context || context == &retained, INVALID_CONTEXT);
    current = context;
    return SUCCESS;
}

API cuCtxGetCurrent(void** context) {
    *context = current;
    return SUCCESS;
}

API cuCtxSynchronize() {
    ENTER_UNCAPTURED;
    flush_all();
    return SUCCESS;
}

API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return SUCCESS;
}

// ---- Memory

static int allocate(uintptr_t* result, size_t size, bool host) {
    CHECK(size, INVALID_VALUE);
    CHECK(host || size <= total_memory - allocated, OUT_OF_MEMORY);
    Allocation a{size, nullptr, 0, host, false};
    size_t usable = (a.rounded() + PAGE - 1) / PAGE * PAGE;
    a.region_size = usable + 2 * PAGE;
    void* region = mmap(nullptr, a.region_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(region != MAP_FAILED, OUT_OF_MEMORY);
    a.region = static_cast<char*>(region);
    CHECK(!mprotect(a.region + PAGE, usable, PROT_READ | PROT_WRITE), OUT_OF_MEMORY);
    memset(a.region + PAGE, 0xff, usable);  // NaN
    // The end, rather than the start, is next to its guard page.
    *result = reinterpret_cast<uintptr_t>(a.region + PAGE + usable - a.rounded());
    allocations[*result] = a;
    if (!host) allocated += a.rounded();
    return SUCCESS;
}

static int release(uintptr_t start, bool host) {
    if (!start) return SUCCESS;
    auto found = allocations.find(start);
    CHECK(found != allocations.end() && found->second.host == host && !found->second.freed, INVALID_VALUE);
    flush_all();
    // What lies between the allocation and the guard pages must be as it was.
    Allocation& a = found->second;
    auto written = [](const char* p, const char* end) { return std::any_of(p, end, [](char c) { return c != '\xff'; }); };
    auto begin = reinterpret_cast<char*>(start);
    if (written(a.region + PAGE, begin))
        software_cuda_fail("something was written before the start of an allocation of %zu bytes", a.size);
    if (written(begin + a.size, begin + a.rounded()))
        software_cuda_fail("something was written behind the end of an allocation of %zu bytes", a.size);
    // The addresses are never used again, so that late accesses fault.
    mmap(a.region, a.region_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    a.freed = true;
    if (!host) allocated -= a.rounded();
    return SUCCESS;
}

// The allocation around an address, or the nearest one.
static std::map<uintptr_t, Allocation>::const_iterator nearest(uintptr_t address) {
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) return next;
    auto before = std::prev(next);
    if (next == allocations.end() || address - (before->first + before->second.size) < next->first - address ||
        address < before->first + before->second.size)
        return before;
    return next;
}

void describe_address(uintptr_t address, char* text, size_t size) {
    auto found = nearest(address);
    int length = snprintf(text, size, "address %#lx was accessed", address);
    if (found == allocations.end()) return;
    auto [start, a] = *found;
    uintptr_t end = start + a.size;
    snprintf(text + length, size - length, ", %zu bytes %s of %s %s of %zu bytes (%#lx)",
             address < start ? start - address : address < end ? address - start : address - end,
             address < start ? "before the start" : address < end ? "behind the start" : "behind the end",
             a.freed ? "a freed" : "a live", a.host ? "host allocation" : "allocation", a.size, start);
}

static bool is_memory(uintptr_t address, size_t size, bool host) {
    auto found = nearest(address);
    if (found == allocations.end()) return false;
    auto& [start, a] = *found;
    return a.host == host && !a.freed && start <= address && address + size <= start + a.size;
}

API cuMemAlloc_v2(uintptr_t* result, size_t size) {
    ENTER_UNCAPTURED;
    return allocate(result, size, false);
}

API cuMemFree_v2(uintptr_t start) {
    ENTER_UNCAPTURED;
    return release(start, false);
}

API cuMemHostAlloc(uintptr_t* result, size_t size, unsigned) {
    ENTER_UNCAPTURED;
    return allocate(result, size, true);
}

API cuMemFreeHost(uintptr_t start) {
    ENTER_UNCAPTURED;
    return release(start, true);
}

API cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER;
    *free = total_memory - allocated;
    *total = total_memory;
    return SUCCESS;
}

static void copy(uintptr_t to, uintptr_t from, size_t size) {
    activity = "a copy";
    memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), size);
    activity = nullptr;
}

// As on a device: pageable memory is read before the call returns, and written by then; pinned memory whenever it comes.
static int copy_async(uintptr_t to, uintptr_t from, size_t size, void* handle, bool from_host, bool to_host) {
    ENTER;
    Stream* stream = find_stream(handle);
    CHECK(stream, INVALID_HANDLE);
    if (!size) return SUCCESS;
    CHECK(from_host || is_memory(from, size, false), INVALID_VALUE);
    CHECK(to_host || is_memory(to, size, false), INVALID_VALUE);
    if (from_host && !is_memory(from, size, true) && !stream->capture && late) {
        auto start = reinterpret_cast<const char*>(from);
        submit(*stream, [to, size, bytes = std::vector<char>(start, start + size)] {
            copy(to, reinterpret_cast<uintptr_t>(bytes.data()), size);
        });
    } else {
        submit(*stream, [=] { copy(to, from, size); });
        if (to_host && !is_memory(to, size, true) && !stream->capture) flush(*stream);
    }
    return SUCCESS;
}

static int copy_now(uintptr_t to, uintptr_t from, size_t size, bool from_host, bool to_host) {
    ENTER_UNCAPTURED;
    return copy_async(to, from, size, nullptr, from_host, to_host);
}

API cuMemcpyHtoD_v2(uintptr_t to, uintptr_t from, size_t size) { return copy_now(to, from, size, true, false); }
API cuMemcpyDtoH_v2(uintptr_t to, uintptr_t from, size_t size) { return copy_now(to, from, size, false, true); }
API cuMemcpyDtoD_v2(uintptr_t to, uintptr_t from, size_t size) { return copy_now(to, from, size, false, false); }
API cuMemcpyHtoDAsync_v2(uintptr_t to, uintptr_t from, size_t size, void* stream) {
    return copy_async(to, from, size, stream, true, false);
}
API cuMemcpyDtoHAsync_v2(uintptr_t to, uintptr_t from, size_t size, void* stream) {
    return copy_async(to, from, size, stream, false, true);
}
API cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t size, void* stream) {
    return copy_async(to, from, size, stream, false, false);
}

template <class T>
static int set_async(uintptr_t to, T value, size_t count, void* handle) {
    ENTER;
    Stream* stream = find_stream(handle);
    CHECK(stream, INVALID_HANDLE);
    if (!count) return SUCCESS;
    CHECK(to % sizeof(T) == 0 && is_memory(to, count * sizeof(T), false), INVALID_VALUE);
    submit(*stream, [=] {
        activity = "a memset";
        std::fill_n(reinterpret_cast<T*>(to), count, value);
        activity = nullptr;
    });
    return SUCCESS;
}

API cuMemsetD8Async(uintptr_t to, unsigned char value, size_t count, void* s) { return set_async(to, value, count, s); }
API cuMemsetD32Async(uintptr_t to, unsigned value, size_t count, void* s) { return set_async(to, value, count, s); }

// ---- Modules

// The size of a shared library, whose section headers are at its end; 0 for other data.
static size_t image_size(const void* image) {
    auto header = static_cast<const Elf64_Ehdr*>(image);
    if (memcmp(header->e_ident, ELFMAG, SELFMAG) || header->e_machine != EM_X86_64) return 0;
    return header->e_shoff + size_t(header->e_shentsize) * header->e_shnum;
}

// Finds where the static shared memory of the module lies: it is all that is local to a system thread there.
static int find_statics(dl_phdr_info* info, size_t, void* data) {
    auto& module = *static_cast<Module*>(data);
    link_map* map;
    if (dlinfo(module.library, RTLD_DI_LINKMAP, &map) || map->l_addr != info->dlpi_addr) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i)
        if (info->dlpi_phdr[i].p_type == PT_TLS) module.static_bytes = unsigned(info->dlpi_phdr[i].p_memsz);
    module.statics_offset = module.statics() - static_cast<char*>(info->dlpi_tls_data);
    return 1;
}

API cuModuleLoadData(Module** result, const void* image) {
    ENTER_UNCAPTURED;
    size_t size = image_size(image);
    CHECK(size, INVALID_IMAGE);
    int file = memfd_create("module", MFD_CLOEXEC);
    CHECK(file >= 0 && write(file, image, size) == ssize_t(size), OUT_OF_MEMORY);
    std::string path = "/proc/self/fd/" + std::to_string(file);
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) fprintf(stderr, "software CUDA: %s\n", dlerror());
    auto version = library ? static_cast<const unsigned*>(dlsym(library, "software_cuda_version")) : nullptr;
    if (!version || *version != DEVICE_VERSION) {
        if (library) dlclose(library);
        close(file);
        return library ? NO_BINARY_FOR_GPU : INVALID_IMAGE;
    }
    Module module{file, library, reinterpret_cast<char* (*)()>(dlsym(library, "software_cuda_statics")), 0, 0, {}};
    module.statics();  // so that this system thread has them
    dl_iterate_phdr(find_statics, &module);
    *result = create(modules, module);
    return SUCCESS;
}

API cuModuleUnload(Module* module) {
    ENTER_UNCAPTURED;
    CHECK(modules.count(module), INVALID_HANDLE);
    flush_all();
    dlclose(module->library);
    close(module->file);
    return destroy(modules, module);
}

API cuModuleGetFunction(Function** result, Module* module, const char* name) {
    ENTER;
    CHECK(modules.count(module), INVALID_HANDLE);
    auto kernel = static_cast<const Kernel*>(dlsym(module->library, (std::string(name) + "__kernel").c_str()));
    CHECK(kernel, NOT_FOUND);
    *result = &module->functions.try_emplace(name, Function{name, kernel, module}).first->second;
    return SUCCESS;
}

API cuFuncSetAttribute(Function* function, int attribute, int value) {
    ENTER;
    if (attribute == 8) {  // dynamic shared memory
        CHECK(value >= 0 && value + int(function->module->static_bytes) <= max_shared(), INVALID_VALUE);
        function->max_shared = value;
    } else {
        CHECK(attribute == 9, INVALID_VALUE);  // how L1 and shared memory are divided: a hint
    }
    return SUCCESS;
}

API cuFuncGetAttribute(int* value, int attribute, Function* function) {
    ENTER;
    switch (attribute) {
        case 0: *value = int(function->kernel->max_threads); break;
        case 1: *value = int(function->module->static_bytes); break;
        case 4: *value = REGISTERS; break;
        case 5: case 6: *value = architecture(); break;  // compute capability of the code
        case 8: *value = function->max_shared; break;
        default: *value = 0;
    }
    return SUCCESS;
}

API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, Function* f, int threads, size_t shared, unsigned) {
    ENTER;
    CHECK(threads > 0, INVALID_VALUE);
    size_t needed = shared + f->module->static_bytes + 1024;
    size_t by_threads = 1536 / unsigned(threads), by_registers = 65536 / unsigned(REGISTERS * threads);
    *blocks = int(std::min<size_t>({24, by_threads, by_registers, 100 * 1024 / needed}));
    if (threads > int(f->kernel->max_threads) || shared > size_t(f->max_shared)) *blocks = 0;
    return SUCCESS;
}

API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* function, int threads, size_t shared) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

// A launch with its own copies of the arguments.
struct OwnedLaunch {
    struct alignas(64) Unit {
        char bytes[64];
    };
    std::vector<Unit> storage;
    std::vector<void*> arguments;
    Launch launch;

    OwnedLaunch(const Function& f, Index grid, Index block, unsigned shared, void** given) {
        std::vector<size_t> starts;
        for (unsigned i = 0; i < f.kernel->count; ++i) {
            starts.push_back(storage.size());
            storage.resize(storage.size() + (f.kernel->sizes[i] + sizeof(Unit) - 1) / sizeof(Unit));
        }
        for (unsigned i = 0; i < f.kernel->count; ++i) {
            arguments.push_back(&storage[starts[i]]);
            memcpy(arguments[i], given[i], f.kernel->sizes[i]);
        }
        const Module& m = *f.module;
        launch = {f.name, f.kernel, grid, block, shared, m.static_bytes, m.statics, m.statics_offset, arguments.data()};
    }
};

API cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* handle, void** arguments, void** extra) {
    ENTER;
    Stream* stream = find_stream(handle);
    CHECK(stream && function, INVALID_HANDLE);
    CHECK(gx && gy && gz && gx <= 0x7fffffff && gy <= 65535 && gz <= 65535, INVALID_VALUE);
    CHECK(bx && by && bz && bx <= 1024 && by <= 1024 && bz <= 64, INVALID_VALUE);
    CHECK(bx * by * bz <= function->kernel->max_threads, INVALID_VALUE);
    CHECK(shared <= unsigned(function->max_shared) && !extra, INVALID_VALUE);
    CHECK(arguments || function->kernel->count == 0, INVALID_VALUE);
    auto owned = std::make_shared<OwnedLaunch>(*function, Index{gx, gy, gz}, Index{bx, by, bz}, shared, arguments);
    submit(*stream, [owned] { run_kernel(owned->launch); });
    return SUCCESS;
}

// ---- Streams and events

API cuStreamCreateWithPriority(Stream** result, unsigned flags, int) {
    ENTER;
    *result = create(streams);
    (*result)->blocking = !(flags & 1);
    return SUCCESS;
}

API cuStreamCreate(Stream** result, unsigned flags) { return cuStreamCreateWithPriority(result, flags, 0); }

API cuStreamDestroy_v2(Stream* stream) {
    ENTER;
    CHECK(streams.count(stream), INVALID_HANDLE);
    flush(*stream);
    return destroy(streams, stream);
}

API cuStreamSynchronize(void* handle) {
    ENTER;
    Stream* stream = find_stream(handle);
    CHECK(stream, INVALID_HANDLE);
    CHECK(!stream->capture, STREAM_CAPTURE_UNSUPPORTED);
    if (stream == &default_stream) flush_all(true);
    flush(*stream);
    return SUCCESS;
}

API cuStreamQuery(void* stream) { return cuStreamSynchronize(stream); }

API cuEventCreate(Event** result, unsigned flags) {
    ENTER;
    *result = create(events, {!(flags & 2), nullptr, nullptr});
    return SUCCESS;
}

API cuEventDestroy_v2(Event* event) {
    ENTER;
    return destroy(events, event);
}

static void pass(const std::shared_ptr<Mark>& mark) {
    if (mark && !mark->passed) flush(*mark->stream, mark->number);
}

API cuEventRecord(Event* event, void* handle) {
    ENTER;
    Stream* stream = find_stream(handle);
    CHECK(stream && events.count(event), INVALID_HANDLE);
    event->capture = stream->capture;
    event->mark = nullptr;
    if (stream->capture) return SUCCESS;  // the order of the calls is the order of the graph
    auto mark = std::make_shared<Mark>(Mark{stream, stream->submitted + 1, false, {}});
    event->mark = mark;
    submit(*stream, [mark] {
        mark->passed = true;
        mark->time = std::chrono::steady_clock::now();
    });
    return SUCCESS;
}

API cuEventSynchronize(Event* event) {
    ENTER;
    CHECK(events.count(event), INVALID_HANDLE);
    CHECK(!event->capture, CAPTURED_EVENT);
    pass(event->mark);
    return SUCCESS;
}

API cuEventQuery(Event* event) { return cuEventSynchronize(event); }

API cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
    ENTER;
    for (Event* event : {start, end}) {
        CHECK(events.count(event) && event->timed && event->mark, INVALID_HANDLE);
        CHECK(event->mark->passed, NOT_READY);
    }
    *milliseconds = std::chrono::duration<float, std::milli>(end->mark->time - start->mark->time).count();
    return SUCCESS;
}

API cuEventElapsedTime(float* milliseconds, Event* start, Event* end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}

API cuStreamWaitEvent(void* handle, Event* event, unsigned) {
    ENTER;
    Stream* stream = find_stream(handle);
    CHECK(stream && events.count(event), INVALID_HANDLE);
    if (event->capture)
        stream->capture = event->capture;  // joins the capture
    else if (stream->capture)
        return event->mark ? STREAM_CAPTURE_ISOLATION : SUCCESS;
    else if (event->mark)
        submit(*stream, [mark = event->mark] { pass(mark); });
    return SUCCESS;
}

// ---- Graphs

API cuStreamBeginCapture_v2(void* handle, int mode) {
    ENTER;
    Stream* stream = find_stream(handle);
    CHECK(stream, INVALID_HANDLE);
    CHECK(stream != &default_stream && !stream->capture, STREAM_CAPTURE_UNSUPPORTED);
    stream->capture = create(captures, {{}, mode, std::this_thread::get_id()});
    return SUCCESS;
}

API cuStreamEndCapture(void* handle, Graph** result) {
    ENTER;
    Stream* stream = find_stream(handle);
    CHECK(stream, INVALID_HANDLE);
    CHECK(stream->capture, STREAM_CAPTURE_UNMATCHED);
    Graph* graph = stream->capture;
    for (Stream* joined : streams)
        if (joined->capture == graph) joined->capture = nullptr;
    for (Event* event : events)
        if (event->capture == graph) event->capture = nullptr;
    captures.erase(graph);
    graphs.insert(graph);
    *result = graph;
    return SUCCESS;
}

API cuStreamIsCapturing(void* handle, int* status) {
    ENTER;
    Stream* stream = find_stream(handle);
    CHECK(stream, INVALID_HANDLE);
    *status = stream->capture != nullptr;
    return SUCCESS;
}

API cuGraphInstantiateWithFlags(Graph** result, Graph* graph, unsigned long long) {
    ENTER;
    CHECK(graphs.count(graph), INVALID_HANDLE);
    *result = create(executables, *graph);
    return SUCCESS;
}

API cuGraphUpload(Graph* executable, void* stream) {
    ENTER;
    return executables.count(executable) && find_stream(stream) ? SUCCESS : INVALID_HANDLE;
}

API cuGraphLaunch(Graph* executable, void* handle) {
    ENTER;
    Stream* stream = find_stream(handle);
    CHECK(stream && executables.count(executable), INVALID_HANDLE);
    for (const Work& work : executable->work) submit(*stream, work);
    return SUCCESS;
}

API cuGraphDestroy(Graph* graph) {
    ENTER;
    return destroy(graphs, graph);
}

API cuGraphExecDestroy(Graph* executable) {
    ENTER;
    return destroy(executables, executable);
}

// ---- Maps for copies of boxes: of a matrix of 16-bit numbers, boxes 64 columns wide, permuted by 128 bytes

API cuTensorMapEncodeTiled(software_cuda::TensorMap* map, int type, unsigned rank, void* base, const uint64_t* sizes,
                           const uint64_t* pitches, const uint32_t* box, const uint32_t* steps, int interleave, int swizzle,
                           int, int fill) {
    std::lock_guard guard(device);
    constexpr int BF16 = 9, PERMUTED_128 = 3;
    CHECK(reinterpret_cast<uintptr_t>(map) % 64 == 0, INVALID_VALUE);
    CHECK(type == BF16 && rank == 2 && interleave == 0 && swizzle == PERMUTED_128 && fill == 0, INVALID_VALUE);
    CHECK(reinterpret_cast<uintptr_t>(base) % 16 == 0 && pitches[0] % 16 == 0 && pitches[0] < 1ull << 40, INVALID_VALUE);
    CHECK(sizes[0] && sizes[1] && sizes[0] <= 1ull << 32 && sizes[1] <= 1ull << 32 && 2 * sizes[0] <= pitches[0], INVALID_VALUE);
    CHECK(box[0] == 64 && box[1] >= 1 && box[1] <= 256 && steps[0] == 1 && steps[1] == 1, INVALID_VALUE);
    CHECK(is_memory(reinterpret_cast<uintptr_t>(base), (sizes[1] - 1) * pitches[0] + 2 * sizes[0], false), INVALID_VALUE);
    *map = {TENSOR_MAP, reinterpret_cast<uintptr_t>(base), sizes[0], sizes[1], pitches[0], box[0], box[1], {}};
    return SUCCESS;
}

// ---- Errors

API cuGetErrorName(int error, const char** name) {
#define NAME_ERROR(name, number) {number, "CUDA_ERROR_" #name},
    static const std::map<int, const char*> names = {ERRORS(NAME_ERROR)};
    auto found = names.find(error);
    *name = error == 0 ? "CUDA_SUCCESS" : found == names.end() ? nullptr : found->second;
    return *name ? SUCCESS : INVALID_VALUE;
}

API cuGetErrorString(int error, const char** text) { return cuGetErrorName(error, text); }
