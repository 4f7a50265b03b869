// Matrix products of cuBLASLt: D = epilogue(alpha op(A) op(B) + beta C), all stored by columns.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "runtime.h"

#define API EXPORT int

enum Status { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum Type { R_32F = 0, R_16BF = 14 };
enum Compute { COMPUTE_32F = 68, COMPUTE_32F_PEDANTIC = 69, COMPUTE_32F_FAST_TF32 = 77 };
// An epilogue is a set of these, and DEFAULT none.
enum Epilogue { DEFAULT = 1, BIAS = 4, BGRAD = 16, GELU = 32, DGELU = 64, AUX = 128, BGRADA = 256, BGRADB = 512 };

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t leading;
    int batches = 1;
    int64_t batch_stride = 0;
    size_t element() const { return type == R_16BF ? 2 : 4; }
};

struct Description {
    int compute, scale_type;
    int transpose_a = 0, transpose_b = 0;
    unsigned epilogue = DEFAULT;
    char *bias = nullptr, *aux = nullptr;
    int64_t aux_leading = 0, aux_batch_stride = 0, bias_batch_stride = 0;
    int bias_type = -1, aux_type = -1;  // -1: as D
    bool needs_bias() const { return epilogue & (BIAS | BGRAD | BGRADA | BGRADB); }
};

struct Preference {
    uint64_t workspace = 0;
};

// As in cuBLASLt; of the data, a mark of ours and the size of the workspace are used.
struct Algorithm {
    uint64_t data[8];
};
struct HeuristicResult {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
constexpr uint64_t MARK = 0x6d6c6120746663;

// ---- Elements

static float read(const char* p, int type, size_t i) {
    float value;
    if (type == R_32F) {
        memcpy(&value, p + 4 * i, 4);
        return value;
    }
    uint16_t half;
    memcpy(&half, p + 2 * i, 2);
    uint32_t bits = uint32_t(half) << 16;
    memcpy(&value, &bits, 4);
    return value;
}

static void write(char* p, int type, size_t i, float value) {
    if (type == R_32F) {
        memcpy(p + 4 * i, &value, 4);
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t half = std::isnan(value) ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    memcpy(p + 2 * i, &half, 2);
}

static float to_tf32(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (std::isfinite(value)) bits = (bits + 0x1000) & ~0x1fffu;
    memcpy(&value, &bits, 4);
    return value;
}

static float gelu(float x) { return 0.5f * x * (1 + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x))); }

static float gelu_slope(float x) {
    float t = std::tanh(0.7978845608f * (x + 0.044715f * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.7978845608f * (1 + 3 * 0.044715f * x * x);
}

// ---- A product

struct Product {
    Description description;
    Layout a, b, c, d;
    float alpha, beta;
    const char *A, *B, *C;
    char *D, *workspace;
    size_t workspace_bytes;

    size_t m() const { return d.rows; }
    size_t n() const { return d.columns; }
    size_t k() const { return description.transpose_a ? a.rows : a.columns; }
    int status() const;
    void run() const;
    void run_batch(int batch) const;
    void finish_column(size_t column, int batch, float* values) const;
};

int Product::status() const {
    const Description& t = description;
    for (const Layout* layout : {&a, &b, &c, &d}) {
        if (layout->type != R_32F && layout->type != R_16BF) return NOT_SUPPORTED;
        if (layout->leading < int64_t(layout->rows) || layout->rows == 0 || layout->columns == 0) return INVALID_VALUE;
        if (layout->batches != d.batches) return INVALID_VALUE;
    }
    if (t.compute != COMPUTE_32F && t.compute != COMPUTE_32F_PEDANTIC && t.compute != COMPUTE_32F_FAST_TF32)
        return NOT_SUPPORTED;
    if (t.scale_type != R_32F || a.type != b.type || c.type != d.type || (a.type == R_32F && d.type != R_32F))
        return NOT_SUPPORTED;
    uint64_t am = t.transpose_a ? a.columns : a.rows, bk = t.transpose_b ? b.columns : b.rows;
    uint64_t bn = t.transpose_b ? b.rows : b.columns;
    if (am != m() || bn != n() || bk != k()) return INVALID_VALUE;
    if (c.rows != m() || c.columns != n()) return INVALID_VALUE;
    if (t.epilogue & ~(DEFAULT | BIAS | BGRAD | GELU | DGELU | AUX | BGRADA | BGRADB)) return NOT_SUPPORTED;
    if (t.epilogue & AUX && (t.aux_leading < int64_t(m()) || t.aux_leading % 8)) return INVALID_VALUE;
    return SUCCESS;
}

// Sums of 4 columns: c[i] += a[i] * b[k]. Separate for processors with wider vectors.
__attribute__((target_clones("default", "arch=x86-64-v3")))
static void add_products(float (*c)[128], const float* a, size_t rows, const float* const* b, size_t depth) {
    for (size_t k = 0; k < depth; ++k, a += rows) {
        float b0 = b[0][k], b1 = b[1][k], b2 = b[2][k], b3 = b[3][k];
        for (size_t i = 0; i < rows; ++i) {
            c[0][i] += a[i] * b0;
            c[1][i] += a[i] * b1;
            c[2][i] += a[i] * b2;
            c[3][i] += a[i] * b3;
        }
    }
}

// Puts one operand into `packed`: in panels of `panel` indices of op's outer dimension, each [depth][panel].
static void pack(const char* from, const Layout& layout, bool outer_is_row, bool tf32, size_t panel,
                 std::vector<float>& packed) {
    size_t outer = outer_is_row ? layout.rows : layout.columns, depth = outer_is_row ? layout.columns : layout.rows;
    packed.resize(outer * depth);
    software_cuda_parallel("cublasLtMatmul, operands", (outer + panel - 1) / panel, [&](size_t p) {
        size_t begin = p * panel, width = std::min(panel, outer - begin);
        float* to = &packed[begin * depth];
        auto put = [&](size_t o, size_t k) {
            size_t row = outer_is_row ? begin + o : k, column = outer_is_row ? k : begin + o;
            float value = read(from, layout.type, row + column * size_t(layout.leading));
            to[k * width + o] = tf32 ? to_tf32(value) : value;
        };
        if (outer_is_row) {
            for (size_t k = 0; k < depth; ++k)
                for (size_t o = 0; o < width; ++o) put(o, k);
        } else {
            for (size_t o = 0; o < width; ++o)
                for (size_t k = 0; k < depth; ++k) put(o, k);
        }
    });
}

void Product::finish_column(size_t column, int batch, float* values) const {
    const Description& t = description;
    int bias_type = t.bias_type < 0 ? d.type : t.bias_type, aux_type = t.aux_type < 0 ? d.type : t.aux_type;
    for (size_t i = 0; i < m(); ++i) {
        float x = alpha * values[i];
        if (beta != 0) x += beta * read(C, c.type, i + column * size_t(c.leading) + size_t(batch * c.batch_stride));
        if (t.epilogue & BIAS) x += read(t.bias, bias_type, i + size_t(batch * t.bias_batch_stride));
        size_t aux_at = i + column * size_t(t.aux_leading) + size_t(batch * t.aux_batch_stride);
        if (t.epilogue & GELU) {
            if (t.epilogue & AUX) write(t.aux, aux_type, aux_at, x);
            x = gelu(x);
        }
        if (t.epilogue & DGELU) x *= gelu_slope(read(t.aux, aux_type, aux_at));
        values[i] = x;
        write(D, d.type, i + column * size_t(d.leading) + size_t(batch * d.batch_stride), x);
    }
}

void Product::run_batch(int batch) const {
    constexpr size_t ROWS = 128, COLUMNS = 4, DEPTH = 256;
    const Description& t = description;
    const char* from_a = A + size_t(batch * a.batch_stride) * a.element();
    const char* from_b = B + size_t(batch * b.batch_stride) * b.element();
    bool tf32 = t.compute == COMPUTE_32F_FAST_TF32 && a.type == R_32F;
    std::vector<float> packed_a, packed_b;
    pack(from_a, a, !t.transpose_a, tf32, ROWS, packed_a);
    pack(from_b, b, t.transpose_b, tf32, 1, packed_b);

    // Sums over columns need all of them.
    std::vector<float> kept(t.epilogue & BGRAD ? m() * n() : 0);
    software_cuda_parallel("cublasLtMatmul", (n() + COLUMNS - 1) / COLUMNS, [&](size_t group) {
        size_t column = group * COLUMNS, width = std::min(COLUMNS, n() - column);
        std::vector<float> results(m() * width);
        for (size_t row = 0; row < m(); row += ROWS) {
            size_t rows = std::min(ROWS, m() - row);
            float total[COLUMNS][ROWS] = {};
            for (size_t begin = 0; begin < k(); begin += DEPTH) {  // in blocks, for smaller rounding errors
                float sums[COLUMNS][ROWS] = {};
                const float* b_columns[COLUMNS];
                for (size_t j = 0; j < COLUMNS; ++j) b_columns[j] = &packed_b[(column + std::min(j, width - 1)) * k() + begin];
                add_products(sums, &packed_a[row * k() + begin * rows], rows, b_columns, std::min(DEPTH, k() - begin));
                for (size_t j = 0; j < COLUMNS; ++j)
                    for (size_t i = 0; i < rows; ++i) total[j][i] += sums[j][i];
            }
            for (size_t j = 0; j < width; ++j) std::copy_n(total[j], rows, &results[j * m() + row]);
        }
        for (size_t j = 0; j < width; ++j) {
            finish_column(column + j, batch, &results[j * m()]);
            if (!kept.empty()) std::copy_n(&results[j * m()], m(), &kept[(column + j) * m()]);
        }
    });

    if (!(t.epilogue & (BGRAD | BGRADA | BGRADB))) return;
    // The gradient of the bias: D's sums over columns, or sums over the depth of op(A) or op(B).
    size_t count = t.epilogue & BGRADB ? n() : m(), depth = t.epilogue & BGRAD ? n() : k();
    int type = t.bias_type < 0 ? d.type : t.bias_type;
    software_cuda_parallel("cublasLtMatmul, bias gradient", count, [&](size_t i) {
        double sum = 0;
        for (size_t j = 0; j < depth; ++j) {
            if (t.epilogue & BGRAD) {
                sum += kept[j * m() + i];
            } else {
                bool of_a = t.epilogue & BGRADA, by_row = of_a ? !t.transpose_a : t.transpose_b;
                const Layout& layout = of_a ? a : b;
                size_t row = by_row ? i : j, at = by_row ? j : i;
                sum += read(of_a ? from_a : from_b, layout.type, row + at * size_t(layout.leading));
            }
        }
        write(t.bias, type, i + size_t(batch * t.bias_batch_stride), float(sum));
    });
}

void Product::run() const {
    // Nobody else may use the workspace.
    software_cuda_parallel("cublasLtMatmul, workspace", workspace_bytes > 0,
                           [&](size_t) { memset(workspace, 0xff, workspace_bytes); });
    for (int batch = 0; batch < d.batches; ++batch) run_batch(batch);
}

// ---- The interface

API cublasLtCreate(void** handle) {
    static int library;
    *handle = &library;
    return SUCCESS;
}
API cublasLtDestroy(void*) { return SUCCESS; }
EXPORT size_t cublasLtGetVersion() { return 130000; }

API cublasLtMatmulDescCreate(Description** result, int compute, int scale_type) {
    *result = new Description{compute, scale_type};
    return SUCCESS;
}
API cublasLtMatmulDescDestroy(Description* description) {
    delete description;
    return SUCCESS;
}
API cublasLtMatrixLayoutCreate(Layout** result, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    *result = new Layout{type, rows, columns, leading};
    return SUCCESS;
}
API cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return SUCCESS;
}
API cublasLtMatmulPreferenceCreate(Preference** result) {
    *result = new Preference;
    return SUCCESS;
}
API cublasLtMatmulPreferenceDestroy(Preference* preference) {
    delete preference;
    return SUCCESS;
}

// Sets an attribute of the same size.
template <class T>
static int set(T& attribute, const void* value, size_t size) {
    if (size != sizeof attribute) return INVALID_VALUE;
    memcpy(&attribute, value, size);
    return SUCCESS;
}

API cublasLtMatmulDescSetAttribute(Description* d, int attribute, const void* value, size_t size) {
    int pointer_mode = 0;
    switch (attribute) {
        case 0: return set(d->compute, value, size);
        case 1: return set(d->scale_type, value, size);
        case 2: return set(pointer_mode, value, size) || pointer_mode ? NOT_SUPPORTED : SUCCESS;
        case 3: return set(d->transpose_a, value, size);
        case 4: return set(d->transpose_b, value, size);
        case 7: return set(d->epilogue, value, size);
        case 8: return set(d->bias, value, size);
        case 10: return set(d->bias_batch_stride, value, size);
        case 11: return set(d->aux, value, size);
        case 12: return set(d->aux_leading, value, size);
        case 13: return set(d->aux_batch_stride, value, size);
        case 22: return set(d->aux_type, value, size);
        case 26: return set(d->bias_type, value, size);
        default: return INVALID_VALUE;
    }
}

API cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value, size_t size) {
    switch (attribute) {
        case 0: return set(layout->type, value, size);
        case 2: return set(layout->rows, value, size);
        case 3: return set(layout->columns, value, size);
        case 4: return set(layout->leading, value, size);
        case 5: return set(layout->batches, value, size);
        case 6: return set(layout->batch_stride, value, size);
        default: return INVALID_VALUE;
    }
}

API cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t size) {
    return attribute == 1 ? set(preference->workspace, value, size) : SUCCESS;
}

API cublasLtMatmulAlgoGetHeuristic(void*, const Description* t, const Layout* a, const Layout* b, const Layout* c,
                                   const Layout* d, const Preference* preference, int requested, HeuristicResult* results,
                                   int* returned) {
    Product product{*t, *a, *b, *c, *d, 1, 0, nullptr, nullptr, nullptr, nullptr, nullptr, 0};
    *returned = 0;
    if (requested < 1) return INVALID_VALUE;
    if (int status = product.status()) return status;
    // Uses some of the workspace offered, as real algorithms do.
    uint64_t workspace = preference ? std::min<uint64_t>(preference->workspace, 64 * 1024) : 0;
    for (; *returned < requested; ++*returned) results[*returned] = {{{MARK, workspace}}, workspace, SUCCESS, 1, {}};
    return SUCCESS;
}

API cublasLtMatmulAlgoCheck(void*, const Description* t, const Layout* a, const Layout* b, const Layout* c, const Layout* d,
                            const Algorithm* algorithm, HeuristicResult* result) {
    Product product{*t, *a, *b, *c, *d, 1, 0, nullptr, nullptr, nullptr, nullptr, nullptr, 0};
    if (algorithm->data[0] != MARK) return INVALID_VALUE;
    *result = {*algorithm, algorithm->data[1], product.status(), 1, {}};
    return result->state;
}

API cublasLtMatmulAlgoConfigGetAttribute(const Algorithm* algorithm, int, void* buffer, size_t size, size_t* written) {
    if (algorithm->data[0] != MARK) return INVALID_VALUE;
    memset(buffer, 0, size);  // there is one algorithm, number 0, with one of everything
    if (written) *written = size;
    return SUCCESS;
}

API cublasLtMatmul(void*, const Description* t, const float* alpha, const char* A, const Layout* a, const char* B,
                   const Layout* b, const float* beta, const char* C, const Layout* c, char* D, const Layout* d,
                   const Algorithm* algorithm, char* workspace, size_t workspace_bytes, void* stream) {
    size_t used = algorithm ? algorithm->data[1] : 0;
    Product product{*t, *a, *b, *c, *d, *alpha, *beta, A, B, C, D, workspace, used};
    if (algorithm && algorithm->data[0] != MARK) return INVALID_VALUE;
    if (int status = product.status()) return status;
    if (used > workspace_bytes || (used && !workspace)) return INVALID_VALUE;
    if (!A || !B || !D || (*beta != 0 && !C) || (t->needs_bias() && !t->bias) || (t->epilogue & AUX && !t->aux))
        return INVALID_VALUE;
    return software_cuda_submit(stream, [product] { product.run(); }) ? INVALID_VALUE : SUCCESS;
}
