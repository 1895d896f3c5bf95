// Native products of 2 to 32 rows of activations: Y = X W^T for every type of W. Alone, added to a residual, or two
// with a gate. The rows of small classes meet a weight while it is in a register, those of large ones meet unpacked
// strips. The class alone decides, so that a row does not depend on its batch.
#include "cpu/native/few.h"
#include "cpu/native/register.h"
#include "cpu/native/strips.h"

namespace zinc {
namespace {

// The products of rows [rows.begin, rows.end) of matrices at bindings 2 .. with tokens from `first` on, up to N of
// them. Passes them to finish(token, row, n, y0, y1).
template <class T, int N, int MATRICES, class Finish>
void multiply_rows(const NativeLaunch& l, Range rows, uint32_t first, uint32_t n_tokens, Finish& finish) {
    const auto& p = l.as<MulFewParams>();
    const float* list[N];
    for (uint32_t t = 0; t < n_tokens; t++) list[t] = l.buffer<const float>(2 + MATRICES) + size_t(first + t) * p.k;
    const Tokens tokens(list, n_tokens, N);
    for (uint32_t r = rows.begin; r < rows.end; r += STRIP) {
        Strip strips[MATRICES];
        for (int i = 0; i < MATRICES; i++)
            strips[i] = {l.buffer<const uint8_t>(2 + i) + size_t(r) * p.row_bytes, p.row_bytes,
                         std::min(rows.end - r, STRIP), p.k};
        const auto finish_at = [&](size_t t, uint32_t n, const float* y0, const float* y1) {
            finish(first + t, r, n, y0, y1);
        };
        if constexpr (N <= MOST_TOGETHER)
            few_strips<T, N>(strips, tokens, finish_at);
        else
            multiply_strips<T>(strips, tokens, finish_at);
    }
}

// A stack: the outputs of all matrices, one after the other, divide evenly over the grid's x.
template <class T, int N>
void stack_rows(const NativeLaunch& l, int i, Range rows, uint32_t first, uint32_t n_tokens) {
    const auto& p = l.as<StackParams>();
    const float *x = l.buffer<const float>(2), *list[N];
    for (uint32_t t = 0; t < n_tokens; t++) list[t] = x + size_t(first + t) * p.k;
    const Tokens tokens(list, n_tokens, N);
    float* out = l.buffer<float>(11 + i);
    const float* bias = p.has_bias ? l.buffer<const float>(7 + i) : nullptr;
    const bool pair = p.pair && i == 2;
    for (uint32_t r = rows.begin; r < rows.end; r += STRIP) {
        const uint32_t n_rows = std::min(rows.end - r, STRIP);
        const auto strip = [&](int matrix) {
            return Strip{l.buffer<const uint8_t>(3 + matrix) + size_t(r) * p.row_bytes[i], p.row_bytes[i], n_rows, p.k};
        };
        const auto put = [&](size_t t, uint32_t n, const float* a, const float* b) {
            float* const to = out + (first + t) * p.m[i] + r;
            if (pair)
                map_floats(n, to, a, b, [](vf g, vf u) { return silu(g) * u; });
            else if (bias)
                map_floats(n, to, bias + r, a, [](vf x, vf y) { return x + y; });
            else
                std::memcpy(to, a, n * sizeof(float));
        };
        if (pair) {
            const Strip both[2] = {strip(2), strip(3)};
            few_strips<T, N>(both, tokens, put);
        } else {
            const Strip one[1] = {strip(i)};
            few_strips<T, N>(one, tokens, put);
        }
    }
}

template <class T, int N>
void mul_few_stack(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<StackParams>();
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens;
    const int n_outs = p.pair ? 3 : 4;
    uint32_t total = 0;
    for (int i = 0; i < n_outs; i++) total += p.m[i];
    for_lines(l, begin, end, [&](Line line) {
        const uint32_t first = line.y * N;
        if (first >= n_tokens) return;
        const Range all = pieces(total, line.begin, line.end, l.grid[0]);
        uint32_t before = 0;
        for (int i = 0; i < n_outs; before += p.m[i++]) {
            const uint32_t after = before + p.m[i];
            const Range rows{std::max(all.begin, before) - before,
                             std::min(all.end, after) - std::min(before, all.end)};
            if (all.end <= before || rows.begin >= rows.end) continue;
            const uint32_t n = std::min(n_tokens - first, uint32_t(N));
            p.is_f32[i] ? stack_rows<F32, N>(l, i, rows, first, n) : stack_rows<T, N>(l, i, rows, first, n);
        }
    });
}

// The same for threadgroups [begin, end): rows divide along the grid's x, and a line along y has N tokens.
template <class T, int N, int MATRICES, class Finish>
void multiply_few(const NativeLaunch& l, uint64_t begin, uint64_t end, Finish&& finish) {
    const auto& p = l.as<MulFewParams>();
    const uint32_t n_tokens = std::min(l.buffer<const Step>(1)->n_tokens, p.rows);
    for_lines(l, begin, end, [&](Line line) {
        const uint32_t first = line.y * N;
        if (first >= n_tokens) return;
        const Range rows = pieces(p.m, line.begin, line.end, l.grid[0]);
        multiply_rows<T, N, MATRICES>(l, rows, first, std::min(n_tokens - first, uint32_t(N)), finish);
    });
}

template <class T, int N>
void mul_few(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<MulFewParams>();
    const float *residual = l.buffer<const float>(4), *scale = l.buffer<const float>(5);
    float* out = l.buffer<float>(6);
    multiply_few<T, N, 1>(l, begin, end, [&](size_t token, uint32_t row, uint32_t n, const float* y, const float*) {
        float* const to = out + token * p.m + row;
        if (p.kind == FEW_STORE) {
            std::memcpy(to, y, n * sizeof(float));
            return;
        }
        const float factor = p.kind == FEW_MIX ? scale[token * p.scale_stride] : 1.0f;
        map_floats(n, to, residual + token * p.residual_stride + row, y,
                   [factor](vf a, vf b) { return a + factor * b; });
    });
}

template <class T, int N>
void mul_few_gated(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<MulFewParams>();
    float* out = l.buffer<float>(5);
    multiply_few<T, N, 2>(l, begin, end,
                          [&](size_t token, uint32_t row, uint32_t n, const float* gate, const float* up) {
                              float* const to = out + token * p.m + row;
                              if (p.kind == FEW_GELU)
                                  map_floats(n, to, gate, up, [](vf g, vf u) { return gelu(g) * u; });
                              else
                                  map_floats(n, to, gate, up, [](vf g, vf u) { return silu(g) * u; });
                          });
}

}  // namespace

#define MUL_FEW_CLASS(name, T, n)                                                                                      \
    {"mul_few_" name "_n" #n, mul_few<T, n>, 1}, {"mul_few_gated_" name "_n" #n, mul_few_gated<T, n>, 1},
#define MUL_FEW(name, T)                                                                                               \
    {"mul_few_stack_" name "_n2", mul_few_stack<T, 2>, 1}, {"mul_few_stack_" name "_n4", mul_few_stack<T, 4>, 1},      \
        {"mul_few_stack_" name "_n8", mul_few_stack<T, 8>, 1},                                                         \
        MUL_FEW_CLASS(name, T, 2) MUL_FEW_CLASS(name, T, 4) MUL_FEW_CLASS(name, T, 8) MUL_FEW_CLASS(name, T, 16)       \
            MUL_FEW_CLASS(name, T, 32)

NATIVE_TABLE(products_few) = {TENSOR_TYPES(MUL_FEW){}};

}  // namespace zinc
