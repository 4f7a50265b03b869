// How a block of band_hopper.cu multiplies: stages go around in a ring of shared memory, between warps that fetch them and two
// warpgroups that multiply them.
//
// The text of this file stands behind that of panels.cuh, before that of band_hopper.cu.

constexpr int DEPTH = 64;
constexpr int CONSUMERS = 256;
constexpr int NT = BLOCK_COLS / 8;
constexpr int BOX_BYTES = DEPTH * 128;
#if defined(OUTER)
constexpr int WIDE_BOXES = 2 * PANELS;
constexpr int NARROW_BOXES = (BLOCK_COLS + 63) / 64;
constexpr int STAGE_BYTES = (WIDE_BOXES + NARROW_BOXES) * BOX_BYTES;
#else
constexpr int X_BYTES = BLOCK_ROWS * 128;
constexpr int STAGE_BYTES = X_BYTES + BLOCK_COLS * 128;
#endif

// Of a block of 384 threads, the registers of a thread at the start (of 65536, in steps of 8), of one that multiplies, and of the
// others. What the latter give back must be enough for the former: else they wait for ever.
constexpr int REGISTERS = 65536 / 384 / 8 * 8;
#if defined(OUTER)
constexpr int MULTIPLYING = 232, OTHERS = 40;
#else
[[maybe_unused]] constexpr int MULTIPLYING = 216, OTHERS = 64;
#endif
static_assert(CONSUMERS * MULTIPLYING + 128 * OTHERS <= 384 * REGISTERS, "registers that there are");

typedef StagePlace<STAGES> Place;

// The stages in shared memory. Each has a barrier that it is full, and one that all have read it.
struct Ring {
    char* base;
    u64* barriers;

    __device__ __forceinline__ Ring(char* stages, char* barriers)
        : base(stages), barriers(reinterpret_cast<u64*>(barriers)) {}

    __device__ __forceinline__ char* stage(int slot) const {
        return base + slot * STAGE_BYTES;
    }

    __device__ __forceinline__ u64* full(int slot) const {
        return barriers + slot;
    }

    __device__ __forceinline__ u64* read(int slot) const {
        return barriers + STAGES + slot;
    }

    // By all threads, before anything else.
    __device__ __forceinline__ void begin(int fillers, int readers) const {
        if (threadIdx.x == 0) {
            for (int slot = 0; slot < STAGES; slot++) {
                barrier_init(full(slot), fillers);
                barrier_init(read(slot), readers);
            }
            barrier_show();
        }
        __syncthreads();
    }

    // By a warp that has read a stage.
    __device__ __forceinline__ void release(int slot) const {
        if (threadIdx.x % 32 == 0) barrier_arrive(read(slot));
    }
};

// The results of a warpgroup: MT times 64 rows.
template <int MT>
struct Results {
    float acc[MT][NT][4];

    // A point in the order of what the compiler does with them: it does not know how long products write to them.
    __device__ __forceinline__ void hold() {
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int j = 0; j < NT; j++) wgmma_hold(acc[i][j]);
        }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int j = 0; j < NT; j++) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;
        }
        hold();
    }
};

// Consumes `steps` stages: use(stage) begins the products of one. A stage is given back when they are done, for which the warpgroup
// waits before it begins those of the next (Ahead = 0), or after (Ahead = 1).
template <int Ahead, class Use>
__device__ __forceinline__ void consume(const Ring& ring, Place& place, int steps, const Use& use) {
    int last = place.slot;
    for (int step = 0; step < steps; step++) {
        barrier_wait(ring.full(place.slot), place.phase);
#if !defined(OUTER)
        wgmma_show();  // what threads have copied
#endif
        wgmma_begin();
        use(ring.stage(place.slot));
        wgmma_commit();
        wgmma_wait<Ahead>();
        if (Ahead == 0) {
            ring.release(place.slot);
        } else if (step > 0) {
            ring.release(last);
        }
        last = place.slot;
        place.advance();
    }
    if (Ahead == 1) {
        wgmma_wait<0>();
        if (steps > 0) ring.release(last);
    }
}
