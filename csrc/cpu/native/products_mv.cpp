// Native matrix-vector products: y = W x for every type of W, with the epilogues of the MSL kernels. Also stacks of
// matrices.
#include "cpu/native/products.h"
#include "cpu/native/register.h"

namespace zinc {
namespace {

Matrix matrix_of(const NativeLaunch& l, int binding) {
    const auto& p = l.as<MatMulParams>();
    return {l.buffer<const uint8_t>(binding), p.row_bytes, p.k};
}

// The rows of threadgroups [begin, end): all m divide evenly over the grid.
Range rows_of(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    return pieces(l.as<MatMulParams>().m, begin, end, l.grid[0]);
}

template <class T>
void mul_mv(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const Range rows = rows_of(l, begin, end);
    products<T>(matrix_of(l, 1), rows.begin, rows.end - rows.begin, maybe_normed<MatMulParams>(l, 2),
                l.buffer<float>(4) + rows.begin);
}

// out = apply(residual, product)
template <class T, class Apply>
INLINE void with_residual(const NativeLaunch& l, Range rows, const float* x, const float* residual, float* out,
                          Apply apply) {
    for_strips(rows.begin, rows.end, [&](uint32_t r, uint32_t n) {
        float y[STRIP];
        products<T>(matrix_of(l, 1), r, n, x, y);
        map_floats(n, out + r, residual + r, y, apply);
    });
}

template <class T>
void mul_mv_add(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const Range rows = rows_of(l, begin, end);
    float* out = l.buffer<float>(6);
    const float *x = maybe_normed<MatMulParams>(l, 2), *residual = l.buffer<const float>(4);
    if (!l.as<MatMulParams>().has_bias)
        return with_residual<T>(l, rows, x, residual, out, [](vf a, vf b) { return a + b; });
    const float* bias = l.buffer<const float>(5);
    for_strips(rows.begin, rows.end, [&](uint32_t r, uint32_t n) {
        float y[STRIP];
        products<T>(matrix_of(l, 1), r, n, x, y);
        map_floats(n, y, bias + r, y, [](vf a, vf b) { return a + b; });
        map_floats(n, out + r, residual + r, y, [](vf a, vf b) { return a + b; });
    });
}

template <class T>
void mul_mv_mix(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const float scale = *l.buffer<const float>(4);
    with_residual<T>(l, rows_of(l, begin, end), l.buffer<const float>(2), l.buffer<const float>(3), l.buffer<float>(5),
                     [scale](vf a, vf b) { return a + scale * b; });
}

template <class T, vf (*activation)(vf)>
void mul_mv_gated(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const Range rows = rows_of(l, begin, end);
    gated_products<T, activation>(matrix_of(l, 1), matrix_of(l, 2), rows.begin, rows.end,
                                  maybe_normed<MatMulParams>(l, 3), l.buffer<float>(5));
}

void add_bias(const float* bias, Range rows, float* out) {
    for (uint32_t r = rows.begin; r < rows.end; r++) out[r] += bias[r];
}

// Rows of matrix i of a stack, or of the pair that begins with it.
template <class T>
void stack_rows(const NativeLaunch& l, int i, Range rows, const float* x) {
    const auto& p = l.as<StackParams>();
    const Matrix w{l.buffer<const uint8_t>(3 + i), p.row_bytes[i], p.k};
    float* out = l.buffer<float>(11 + i);
    if (p.pair && i == 2) {
        const Matrix up{l.buffer<const uint8_t>(6), p.row_bytes[i], p.k};
        gated_products<T, silu>(w, up, rows.begin, rows.end, x, out);
    } else {
        products<T>(w, rows.begin, rows.end - rows.begin, x, out + rows.begin);
        if (p.has_bias) add_bias(l.buffer<const float>(7 + i), rows, out);
    }
}

// The outputs of all matrices, one after the other, divide evenly over the grid.
template <class T>
void mul_mv_stack(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<StackParams>();
    const int n_outs = p.pair ? 3 : 4;
    uint32_t total = 0, before = 0;
    for (int i = 0; i < n_outs; i++) total += p.m[i];
    const Range all = pieces(total, begin, end, l.grid[0]);
    const float* x = maybe_normed<StackParams>(l, 1);
    for (int i = 0; i < n_outs; before += p.m[i++]) {
        const uint32_t first = all.begin > before ? all.begin - before : 0, after = before + p.m[i];
        const Range rows{first, (all.end < after ? all.end : after) - before};
        if (all.end <= before || rows.begin >= rows.end) continue;
        p.is_f32[i] ? stack_rows<F32>(l, i, rows, x) : stack_rows<T>(l, i, rows, x);
    }
}

// Rows of a head's matrix along the grid's x; heads of rows of the step, one after the other, along y and z.
template <class T>
void mul_heads_mv(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<HeadsParams>();
    const uint32_t n_heads = l.buffer<const Step>(1)->n_tokens * p.n_head;
    for_lines(l, begin, end, [&](const Line& line) {
        if (line.y >= n_heads) return;
        const Range rows = pieces(p.m, line.begin, line.end, l.grid[0]);
        const Matrix w{l.buffer<const uint8_t>(2) + size_t(line.y % p.n_head) * p.head_bytes, p.row_bytes, p.k};
        products<T>(w, rows.begin, rows.end - rows.begin, l.buffer<const float>(3) + size_t(line.y) * p.k,
                    l.buffer<float>(4) + size_t(line.y) * p.m + rows.begin);
    });
}

}  // namespace

#define MUL_MV(name, T)                                                                                                \
    {"mul_mv_" name, mul_mv<T>, 1}, {"mul_mv_add_" name, mul_mv_add<T>, 1}, {"mul_mv_mix_" name, mul_mv_mix<T>, 1},    \
        {"mul_mv_swiglu_" name, mul_mv_gated<T, silu>, 1}, {"mul_mv_geglu_" name, mul_mv_gated<T, gelu>, 1},           \
        {"mul_mv_stack_" name, mul_mv_stack<T>, 1}, {"mul_heads_mv_" name, mul_heads_mv<T>, 1},

NATIVE_TABLE(products_mv) = {TENSOR_TYPES(MUL_MV){}};

}  // namespace zinc
