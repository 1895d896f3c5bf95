// Native matrix-matrix products: Y = X W^T for every type of W. Alone, added to a residual, or two with a gate.
#include "cpu/native/strips.h"

namespace zinc {
namespace {

// Multiplies MATRICES matrices (bindings 2 ..) by X (the next binding). Passes the products to
// finish(token, row, n, y0, y1).
template <class T, int MATRICES, class Finish>
void multiply(const NativeLaunch& l, uint64_t begin, uint64_t end, Finish&& finish) {
    const auto& p = l.as<MatMulParams>();
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens;
    const float* x = l.buffer<const float>(2 + MATRICES);
    for_blocks(begin, end, l.grid[0], [&](Range xs, Range ys) {
        const Range rows = pieces(p.m, ys, l.grid[1]), range = pieces(n_tokens, xs, l.grid[0]);
        if (range.begin >= range.end) return;
        const float** list = workspace().tokens.take<const float*>(range.end - range.begin);
        for (uint32_t t = range.begin; t < range.end; t++) list[t - range.begin] = x + size_t(t) * p.k;
        const Tokens tokens(list, range.end - range.begin, n_tokens);
        for (uint32_t r = rows.begin; r < rows.end; r += STRIP) {
            Strip strips[MATRICES];
            for (int i = 0; i < MATRICES; i++)
                strips[i] = {l.buffer<const uint8_t>(2 + i) + size_t(r) * p.row_bytes, p.row_bytes,
                             std::min(rows.end - r, STRIP), p.k};
            multiply_strips<T>(strips, tokens, [&](size_t t, uint32_t n, const float* y0, const float* y1) {
                finish(range.begin + t, r, n, y0, y1);
            });
        }
    });
}

template <class T>
void mul_mm(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const uint32_t m = l.as<MatMulParams>().m;
    float* out = l.buffer<float>(4);
    multiply<T, 1>(l, begin, end, [&](size_t token, uint32_t row, uint32_t n, const float* y, const float*) {
        std::memcpy(out + token * m + row, y, n * sizeof(float));
    });
}

template <class T>
void mul_mm_add(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<MatMulParams>();
    const float* residual = l.buffer<const float>(4);
    float* out = l.buffer<float>(5);
    multiply<T, 1>(l, begin, end, [&](size_t token, uint32_t row, uint32_t n, const float* y, const float*) {
        map_floats(n, out + token * p.m + row, residual + token * p.residual_stride + row, y,
                   [](vf a, vf b) { return a + b; });
    });
}

template <class T>
void mul_mm_mix(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<MatMulParams>();
    const float *residual = l.buffer<const float>(4), *scale = l.buffer<const float>(5);
    float* out = l.buffer<float>(6);
    multiply<T, 1>(l, begin, end, [&](size_t token, uint32_t row, uint32_t n, const float* y, const float*) {
        const float factor = scale[token * p.scale_stride];
        map_floats(n, out + token * p.m + row, residual + token * p.residual_stride + row, y,
                   [factor](vf a, vf b) { return a + factor * b; });
    });
}

template <class T, vf (*GATE)(vf)>
void mul_mm_gated(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const uint32_t m = l.as<MatMulParams>().m;
    float* out = l.buffer<float>(5);
    multiply<T, 2>(l, begin, end, [&](size_t token, uint32_t row, uint32_t n, const float* gate, const float* up) {
        map_floats(n, out + token * m + row, gate, up, [](vf g, vf u) { return GATE(g) * u; });
    });
}

// Rows of the step along the grid's x, rows of a head's matrix along y, heads along z.
template <class T>
void mul_heads_mm(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<HeadsParams>();
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens;
    const float* x = l.buffer<const float>(3);
    float* out = l.buffer<float>(4);
    for_blocks(begin, end, l.grid[0], [&](Range xs, Range ys) {
        const Range range = pieces(n_tokens, xs, l.grid[0]);
        if (range.begin >= range.end) return;
        const float** list = workspace().tokens.take<const float*>(range.end - range.begin);
        for (uint32_t y = ys.begin, stop; y < ys.end; y = stop) {  // the rows of a head together
            const uint32_t head = y / l.grid[1], first = head * l.grid[1];
            stop = std::min(ys.end, first + l.grid[1]);
            const Range rows = pieces(p.m, Range{y - first, stop - first}, l.grid[1]);
            for (uint32_t t = range.begin; t < range.end; t++)
                list[t - range.begin] = x + (size_t(t) * p.n_head + head) * p.k;
            const Tokens tokens(list, range.end - range.begin, n_tokens);
            const uint8_t* w = l.buffer<const uint8_t>(2) + size_t(head) * p.head_bytes;
            for (uint32_t r = rows.begin; r < rows.end; r += STRIP) {
                const Strip strips[1] = {
                    {w + size_t(r) * p.row_bytes, p.row_bytes, std::min(rows.end - r, STRIP), p.k}};
                multiply_strips<T>(strips, tokens, [&](size_t t, uint32_t n, const float* y0, const float*) {
                    std::memcpy(out + ((range.begin + t) * p.n_head + head) * p.m + r, y0, n * sizeof(float));
                });
            }
        }
    });
}

}  // namespace

#define MUL_MM(name, T)                                                                                                \
    {"mul_mm_" name, mul_mm<T>, 0}, {"mul_mm_add_" name, mul_mm_add<T>, 0}, {"mul_mm_mix_" name, mul_mm_mix<T>, 0},    \
        {"mul_mm_swiglu_" name, mul_mm_gated<T, silu>, 0}, {"mul_mm_geglu_" name, mul_mm_gated<T, gelu>, 0},           \
        {"mul_heads_mm_" name, mul_heads_mm<T>, 0},

NATIVE_TABLE(products_mm) = {TENSOR_TYPES(MUL_MM){}};

}  // namespace zinc
