// How the parts of the software CUDA work together outside of kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "kernel.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Marks a map that the driver has made.
constexpr unsigned long long TENSOR_MAP = 0x62616e64'6d617021ull;

struct Launch {
    std::string name;
    const software_cuda::Kernel* kernel;
    software_cuda::Index grid, block;
    unsigned shared_bytes, static_bytes;
    char* (*statics)();  // a place in the calling system thread's static shared memory
    std::ptrdiff_t statics_offset;  // of that place
    void** arguments;
};

// Runs the blocks of a kernel, to the end.
void run_kernel(const Launch& launch);

// What the calling system thread does with device memory; null: nothing, so that its faults are not the device's.
extern __thread const char* activity;

// Faults and the order of work; called once.
void start_runtime();

// Writes about an address that nobody may access: which allocation is next to it.
void describe_address(std::uintptr_t address, char* text, std::size_t size);

// Calls body(0..count) on all cores. `activity` names it in messages about faults.
EXPORT void software_cuda_parallel(const char* activity, std::size_t count, const std::function<void(std::size_t)>& body);

// Does the work as a part of the stream: now, or when a graph being captured is launched. Returns a CUresult.
EXPORT int software_cuda_submit(void* stream, const std::function<void()>& work);
