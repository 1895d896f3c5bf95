// Native matrix-vector products: y = W x for every type of W, alone, added to a residual, or gate and up under SwiGLU.
#include "native_dot.h"
#include "native_register.h"

namespace zinc {
namespace {

// Rows of W that are read side by side.
#if defined(NATIVE_AVX512)
constexpr int ROWS = 4;
#else
constexpr int ROWS = 2;
#endif

// out[0..n) = rows [first, first + n) of W · x.
template <class T>
__attribute__((noinline)) void products(const uint8_t* w, const MatMulParams& p, uint32_t first, uint32_t n,
                                        const float* x, float* out) {
    const uint8_t* row = w + size_t(first) * p.row_bytes;
    uint32_t i = 0;
    for (; i + ROWS <= n; i += ROWS) dot_rows<ROWS, T>(row + size_t(i) * p.row_bytes, p.row_bytes, x, p.k, out + i);
    for (; i < n; i++) dot_rows<1, T>(row + size_t(i) * p.row_bytes, p.row_bytes, x, p.k, out + i);
}

// The rows of threadgroups [begin, end): all m divide evenly over the grid.
INLINE Range rows_of(const Launch& l, const MatMulParams& p, uint64_t begin, uint64_t end) {
    return {piece(p.m, begin, l.grid[0]).begin, piece(p.m, end - 1, l.grid[0]).end};
}

template <class T>
void mul_mv(const Launch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<MatMulParams>();
    const Range rows = rows_of(l, p, begin, end);
    const float* x = l.buffer<const float>(2);
    products<T>(l.buffer<const uint8_t>(1), p, rows.begin, rows.end - rows.begin, x, l.buffer<float>(3) + rows.begin);
}

constexpr uint32_t STRIP = 64;  // rows whose products wait for what is done with them

template <class T>
void mul_mv_add(const Launch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<MatMulParams>();
    const Range rows = rows_of(l, p, begin, end);
    const float* x = l.buffer<const float>(2);
    const float* residual = l.buffer<const float>(3);
    float* out = l.buffer<float>(4);
    for (uint32_t r = rows.begin; r < rows.end; r += STRIP) {
        const uint32_t n = rows.end - r < STRIP ? rows.end - r : STRIP;
        float y[STRIP];
        products<T>(l.buffer<const uint8_t>(1), p, r, n, x, y);
        map_floats(n, out + r, residual + r, y, [](vf a, vf b) { return a + b; });
    }
}

template <class T>
void mul_mv_swiglu(const Launch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<MatMulParams>();
    const Range rows = rows_of(l, p, begin, end);
    const float* x = l.buffer<const float>(3);
    float* out = l.buffer<float>(4);
    for (uint32_t r = rows.begin; r < rows.end; r += STRIP) {
        const uint32_t n = rows.end - r < STRIP ? rows.end - r : STRIP;
        float gate[STRIP], up[STRIP];
        products<T>(l.buffer<const uint8_t>(1), p, r, n, x, gate);
        products<T>(l.buffer<const uint8_t>(2), p, r, n, x, up);
        map_floats(n, out + r, gate, up, [](vf g, vf u) { return silu(g) * u; });
    }
}

}  // namespace

#define MUL_MV(name, T)                                                                                                \
    {"mul_mv_" name, mul_mv<T>, 1}, {"mul_mv_add_" name, mul_mv_add<T>, 1}, {"mul_mv_swiglu_" name, mul_mv_swiglu<T>, 1}

NATIVE_TABLE(mul_mv) = {
    MUL_MV("f32", F32),   MUL_MV("f16", F16),   MUL_MV("bf16", BF16), MUL_MV("q4_0", Q4_0),
    MUL_MV("q4_1", Q4_1), MUL_MV("q5_0", Q5_0), MUL_MV("q5_1", Q5_1), MUL_MV("q8_0", Q8_0),
    MUL_MV("q4_k", Q4_K), MUL_MV("q5_k", Q5_K), MUL_MV("q6_k", Q6_K), {},
};

}  // namespace zinc
