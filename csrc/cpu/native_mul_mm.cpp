// Native matrix-matrix products: Y = X W^T for every type of W, alone, added to a residual, or gate and up under
// SwiGLU.
#include "native_quants.h"
#include "native_register.h"
#include "native_tile.h"

namespace zinc {
namespace {

constexpr uint32_t TILE_ROWS = 64;  // rows of W whose panels are packed at a time, and then meet every token
constexpr uint32_t PART = 128;      // columns of a panel, which then stays in the L1 cache

// Memory of a thread for the tiles of a launch.
struct Workspace {
    Scratch panel, rows, result[2];
};

Workspace& workspace() {
    thread_local Workspace w;
    return w;
}

// n rows of activations, contiguous.
struct Tokens {
    const float* x;
    size_t n;
};

// y[n tokens][TILE_ROWS] = rows [first, first + n_rows) of W times every token.
template <class T>
void multiply_rows(const uint8_t* w, const MatMulParams& p, uint32_t first, uint32_t n_rows, const Tokens& tokens,
                   float* y) {
    const uint8_t* rows = w + size_t(first) * p.row_bytes;
    float* const panel = workspace().panel.take<float>(PART * PANEL);
    float* const unpacked = workspace().rows.take<float>(PART * PANEL);
    std::memset(y, 0, tokens.n * TILE_ROWS * sizeof(float));
    for (uint32_t r = 0; r < n_rows; r += PANEL)
        for (uint32_t c = 0; c < p.k; c += PART) {
            const uint32_t count = p.k - c < PART ? p.k - c : PART;
            for (uint32_t i = 0; i < PANEL; i++)
                dequantise<T>(rows + size_t(r + i < n_rows ? r + i : n_rows - 1) * p.row_bytes, c, count,
                              unpacked + i * PART);
            pack_panel(unpacked, PART, int(count), panel);
            multiply_panel(panel, tokens.x + c, p.k, tokens.n, int(count), y + r, TILE_ROWS);
        }
}

// Calls tile(rows, tokens) for threadgroups [begin, end): tokens divide evenly over the grid's x, rows of W over its y.
// Whole lines of the grid go together, so that rows fill panels whatever a threadgroup of the MSL kernel takes.
template <class Tile>
void for_tiles(const Launch& l, uint32_t m, uint64_t begin, uint64_t end, Tile&& tile) {
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens, width = l.grid[0];
    while (begin < end) {
        const uint64_t x = begin % width, whole = x == 0 ? (end - begin) / width : 0;
        const uint64_t rest_of_line = end - begin < width - x ? end - begin : width - x;
        const uint64_t stop = begin + (whole ? whole * width : rest_of_line);
        const Range rows{piece(m, begin / width, l.grid[1]).begin, piece(m, (stop - 1) / width, l.grid[1]).end};
        const Range tokens{piece(n_tokens, x, width).begin, piece(n_tokens, (stop - 1) % width, width).end};
        for (uint32_t r = rows.begin; r < rows.end && tokens.begin < tokens.end; r += TILE_ROWS)
            tile(Range{r, r + TILE_ROWS < rows.end ? r + TILE_ROWS : rows.end}, tokens);
        begin = stop;
    }
}

// The products of MATRICES matrices (bindings 2 ..) with X (the next binding), handed to finish(token, row, n, y0, y1).
template <class T, int MATRICES, class Finish>
void multiply(const Launch& l, uint64_t begin, uint64_t end, Finish&& finish) {
    const auto& p = l.as<MatMulParams>();
    const float* x = l.buffer<const float>(2 + MATRICES);
    for_tiles(l, p.m, begin, end, [&](Range rows, Range range) {
        const Tokens tokens{x + size_t(range.begin) * p.k, range.end - range.begin};
        float* y[2] = {};
        for (int i = 0; i < MATRICES; i++) {
            y[i] = workspace().result[i].take<float>(tokens.n * TILE_ROWS);
            multiply_rows<T>(l.buffer<const uint8_t>(2 + i), p, rows.begin, rows.end - rows.begin, tokens, y[i]);
        }
        for (size_t t = 0; t < tokens.n; t++)
            finish((range.begin + t) * p.m + rows.begin, rows.end - rows.begin, y[0] + t * TILE_ROWS,
                   MATRICES == 2 ? y[1] + t * TILE_ROWS : nullptr);
    });
}

template <class T>
void mul_mm(const Launch& l, uint64_t begin, uint64_t end) {
    float* out = l.buffer<float>(4);
    multiply<T, 1>(l, begin, end, [&](size_t at, uint32_t n, const float* y, const float*) {
        std::memcpy(out + at, y, n * sizeof(float));
    });
}

template <class T>
void mul_mm_add(const Launch& l, uint64_t begin, uint64_t end) {
    const float* residual = l.buffer<const float>(4);
    float* out = l.buffer<float>(5);
    multiply<T, 1>(l, begin, end, [&](size_t at, uint32_t n, const float* y, const float*) {
        map_floats(n, out + at, residual + at, y, [](vf a, vf b) { return a + b; });
    });
}

template <class T>
void mul_mm_swiglu(const Launch& l, uint64_t begin, uint64_t end) {
    float* out = l.buffer<float>(5);
    multiply<T, 2>(l, begin, end, [&](size_t at, uint32_t n, const float* gate, const float* up) {
        map_floats(n, out + at, gate, up, [](vf g, vf u) { return silu(g) * u; });
    });
}

}  // namespace

#define MUL_MM(name, T)                                                                                                \
    {"mul_mm_" name, mul_mm<T>, 0}, {"mul_mm_add_" name, mul_mm_add<T>, 0}, {"mul_mm_swiglu_" name, mul_mm_swiglu<T>, 0}

NATIVE_TABLE(mul_mm) = {
    MUL_MM("f32", F32),   MUL_MM("f16", F16),   MUL_MM("bf16", BF16), MUL_MM("q4_0", Q4_0),
    MUL_MM("q4_1", Q4_1), MUL_MM("q5_0", Q5_0), MUL_MM("q5_1", Q5_1), MUL_MM("q8_0", Q8_0),
    MUL_MM("q4_k", Q4_K), MUL_MM("q5_k", Q5_K), MUL_MM("q6_k", Q6_K), {},
};

}  // namespace zinc
