// Native kernels that work row by row: RMSNorm, RoPE with KV write, element-wise work. And begin_step,
// before them all.
#include "cpu/native/cache_rows.h"
#include "cpu/native/register.h"
#include "shapes.h"

namespace zinc {
namespace {

INLINE void normalise(float* out, const float* x, const float* weight, const NormParams& p) {
    multiply(out, x, rms_scale(x, p.n, p.eps) * p.scale, p.weighted ? weight : nullptr, p.n);
}

// The vectors of a step that norms take.
INLINE uint64_t n_vectors(const NativeLaunch& l) {
    return uint64_t(l.buffer<const Step>(1)->n_tokens) * l.as<NormParams>().groups;
}

void rms_norm(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<NormParams>();
    const uint64_t n = n_vectors(l);
    for (uint64_t t = begin; t < end && t < n; t++)
        normalise(l.buffer<float>(4) + t * p.n, l.buffer<const float>(2) + t * p.n, l.buffer<const float>(3), p);
}

// NEXT: the sum is normalised again, with another weight.
template <bool NEXT>
void rms_norm_add(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<NormParams>();
    const float out_scale = p.scaled ? *l.buffer<const float>(NEXT ? 6 : 5) : 1.0f;
    const uint64_t n = n_vectors(l);
    for (uint64_t t = begin; t < end && t < n; t++) {
        float* sum = l.buffer<float>(NEXT ? 7 : 6) + t * p.n;
        const float* residual = l.buffer<const float>(4) + t * p.n;
        float* normed = thread_scratch().take<float>(p.n);  // the sum may lie where the residual is
        normalise(normed, l.buffer<const float>(2) + t * p.n, l.buffer<const float>(3), p);
        map_floats(p.n, sum, residual, normed, [out_scale](vf a, vf b) { return (a + b) * out_scale; });
        if (NEXT)
            multiply(l.buffer<float>(8) + t * p.n, sum, rms_scale(sum, p.n, p.next_eps), l.buffer<const float>(5), p.n);
    }
}

// ---- element-wise

template <class Apply>
INLINE void binary(const NativeLaunch& l, uint64_t begin, uint64_t end, Apply apply) {
    const uint32_t n = l.as<ElementwiseParams>().n;
    for_rows(l, begin, end, l.buffer<const Step>(1)->n_tokens, [&](uint32_t x, uint32_t t) {
        const Range columns = piece(n, x, l.grid[0]);
        const size_t at = size_t(t) * n + columns.begin;
        map_floats(columns.end - columns.begin, l.buffer<float>(4) + at, l.buffer<const float>(2) + at,
                   l.buffer<const float>(3) + at, apply);
    });
}

void add(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    binary(l, begin, end, [](vf a, vf b) { return a + b; });
}

void swiglu(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    binary(l, begin, end, [](vf gate, vf up) { return silu(gate) * up; });
}

void geglu(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    binary(l, begin, end, [](vf gate, vf up) { return gelu(gate) * up; });
}

void swiglu_clamped_rows(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    binary(l, begin, end, [](vf gate, vf up) { return swiglu_clamped(gate, up); });
}

void relu2_rows(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const uint32_t n = l.as<ElementwiseParams>().n;
    for_rows(l, begin, end, l.buffer<const Step>(1)->n_tokens, [&](uint32_t x, uint32_t t) {
        const Range columns = piece(n, x, l.grid[0]);
        const size_t at = size_t(t) * n + columns.begin;
        const float* from = l.buffer<const float>(2) + at;
        map_floats(columns.end - columns.begin, l.buffer<float>(3) + at, from, from, [](vf a, vf) { return relu2(a); });
    });
}

void geglu_slice(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<SliceParams>();
    for_rows(l, begin, end, l.buffer<const Step>(1)->n_tokens, [&](uint32_t x, uint32_t t) {
        const Range columns = piece(p.n, x, l.grid[0]);
        const size_t at = size_t(t) * p.n + columns.begin, other = size_t(t) * p.stride + columns.begin;
        map_floats(columns.end - columns.begin, l.buffer<float>(4) + at, l.buffer<const float>(2) + at,
                   l.buffer<const float>(3) + other, [](vf gate, vf up) { return gelu(gate) * up; });
    });
}

void scale(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const uint32_t n = l.as<ElementwiseParams>().n;
    const float factor = *l.buffer<const float>(3);
    for_rows(l, begin, end, l.buffer<const Step>(1)->n_tokens, [&](uint32_t x, uint32_t t) {
        const Range columns = piece(n, x, l.grid[0]);
        const size_t at = size_t(t) * n + columns.begin;
        multiply(l.buffer<float>(4) + at, l.buffer<const float>(2) + at, factor, nullptr, columns.end - columns.begin);
    });
}

void take_rows(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const uint32_t n = l.as<ElementwiseParams>().n;
    for_lines(l, begin, end, [&](Line line) {
        if (line.y >= l.buffer<const Step>(1)->n_out) return;
        const Range columns = pieces(n, line.begin, line.end, l.grid[0]);
        const float* from = l.buffer<const float>(3) + size_t(l.buffer<const uint32_t>(2)[line.y]) * n;
        std::memcpy(l.buffer<float>(4) + size_t(line.y) * n + columns.begin, from + columns.begin,
                    (columns.end - columns.begin) * sizeof(float));
    });
}

// ---- Rows that a block which drafts reads one position later. KV is the type that they are kept in.

INLINE size_t kept_row(const NativeLaunch& l, const Row& row, uint32_t position) {
    return size_t(l.buffer<const uint32_t>(3)[row.pages + position / KV_PAGE]) * KV_PAGE + position % KV_PAGE;
}

template <class KV>
void keep_rows(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const uint32_t n = l.as<ElementwiseParams>().n;
    for_rows(l, begin, end, l.buffer<const Step>(1)->n_tokens, [&](uint32_t x, uint32_t t) {
        const Row& row = l.buffer<const Row>(2)[t];
        const Range columns = piece(n, x, l.grid[0]);
        uint8_t* kept = l.buffer<uint8_t>(5) + kept_row(l, row, row.pos) * n * KV::BYTES;
        store_row<KV>(kept + columns.begin * KV::BYTES, l.buffer<const float>(4) + size_t(t) * n + columns.begin,
                      columns.end - columns.begin);
    });
}

template <class KV>
void pair_rows(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const uint32_t n = l.as<ElementwiseParams>().n;
    for_rows(l, begin, end, l.buffer<const Step>(1)->n_tokens, [&](uint32_t x, uint32_t t) {
        const Row& row = l.buffer<const Row>(2)[t];
        const Range columns = piece(n, x, l.grid[0]);
        float* out = l.buffer<float>(6) + 2 * size_t(t) * n;
        std::memcpy(out + columns.begin, l.buffer<const float>(5) + size_t(t) * n + columns.begin,
                    (columns.end - columns.begin) * sizeof(float));
        const uint8_t* kept = l.buffer<const uint8_t>(4) + kept_row(l, row, row.pos ? row.pos - 1 : 0) * n * KV::BYTES;
        for (uint32_t i = columns.begin; i < columns.end; i++)
            out[n + i] = row.pos ? KV::one(kept + size_t(i) * KV::BYTES) : 0.0f;
    });
}

// ---- RoPE and KV write

// The rotations of one position, [n_rot / 2] each, and room for a head vector.
struct Rotation {
    float *sine, *cosine, *head;

    Rotation(const RopeKvParams& p, float position, const float* freqs) {
        const uint32_t n_pairs = p.n_rot / 2, room = (n_pairs + 7) / 8 * 8;
        sine = thread_scratch().take<float>(2 * room + p.head_dim);
        cosine = sine + room;
        head = cosine + room;
        rotations(position, freqs, n_pairs, p.magnitude, sine, cosine);
    }
};

// head = scale * x, normalised or as it is.
template <bool NORM>
INLINE void load_head(const RopeKvParams& p, const float* x, const float* norm_weight, float scale, float* head) {
    if (NORM) scale *= rms_scale(x, p.head_dim, p.eps);
    for (uint32_t i = 0; i < p.head_dim; i++) head[i] = x[i] * (NORM ? scale * norm_weight[i] : scale);
}

template <bool NEOX>
INLINE void rotate_head(const RopeKvParams& p, const Rotation& r) {
    float* head = r.head;
    const uint32_t n_pairs = p.n_rot / 2, step = NEOX ? 1 : 2, other = NEOX ? n_pairs : 1;
    for (uint32_t i = 0; i < n_pairs; i++) {
        const float a = head[i * step], b = head[i * step + other];
        head[i * step] = a * r.cosine[i] - b * r.sine[i];
        head[i * step + other] = a * r.sine[i] + b * r.cosine[i];
    }
}

// Heads along x: of q, of k, of v; the rows of the step along y. KV is the type of the cache.
template <class KV, bool NEOX, bool QK_NORM>
void rope_kv(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<RopeKvParams>();
    const Step step = *l.buffer<const Step>(1);
    const uint32_t n_heads = p.n_head + 2 * p.n_head_kv;
    while (begin < end) {
        const uint32_t t = uint32_t(begin / l.grid[0]);
        const uint64_t line = uint64_t(t) * l.grid[0], stop = line + l.grid[0] < end ? line + l.grid[0] : end;
        const Range heads{piece(n_heads, begin - line, l.grid[0]).begin,
                          piece(n_heads, stop - 1 - line, l.grid[0]).end};
        begin = stop;
        if (t >= step.n_tokens) continue;
        const Row& row_of_step = l.buffer<const Row>(2)[t];
        const uint32_t position = row_of_step.pos;
        const Rotation rotation(p, float(position), l.buffer<const float>(7));
        for (uint32_t head = heads.begin; head < heads.end; head++) {
            if (head < p.n_head) {
                const size_t row = size_t(t) * p.n_head + head;
                load_head<QK_NORM>(p, l.buffer<const float>(4) + row * p.q_stride, l.buffer<const float>(8),
                                   q_scale(p, position), rotation.head);
                rotate_head<NEOX>(p, rotation);
                store_row<F32>(l.buffer<uint8_t>(10) + row_bytes<F32>(p.head_dim) * row, rotation.head, p.head_dim);
                continue;
            }
            const uint32_t page = l.buffer<const uint32_t>(3)[row_of_step.pages + position / KV_PAGE];
            const size_t cache_row = size_t(page) * KV_PAGE + position % KV_PAGE;
            const uint32_t kv_head = (head - p.n_head) % p.n_head_kv;
            const size_t from = (size_t(t) * p.n_head_kv + kv_head) * p.head_dim;
            const size_t to = (cache_row * p.n_head_kv + kv_head) * row_bytes<KV>(p.head_dim);
            if (head < p.n_head + p.n_head_kv) {
                load_head<QK_NORM>(p, l.buffer<const float>(5) + from, l.buffer<const float>(9), 1.0f, rotation.head);
                rotate_head<NEOX>(p, rotation);
                store_row<KV>(l.buffer<uint8_t>(11) + to, rotation.head, p.head_dim);
            } else {
                const float* v = l.buffer<const float>(6) + from;
                if (p.v_norm) {
                    multiply(rotation.head, v, rms_scale(v, p.head_dim, p.eps), nullptr, p.head_dim);
                    v = rotation.head;
                }
                store_row<KV>(l.buffer<uint8_t>(12) + to, v, p.head_dim);
            }
        }
    }
}

}  // namespace

#define ROPE_KV(name, T, neox)                                                                                         \
    {"rope_kv_" name, rope_kv<T, neox, false>, 1}, {"rope_kv_" name "_qknorm", rope_kv<T, neox, true>, 1},

NATIVE_TABLE(rows) = {
    ROPE_KV("norm_f32", F32, false) ROPE_KV("norm_f16", F16, false) ROPE_KV("norm_q8_0", Q8_0, false)
        ROPE_KV("neox_f32", F32, true) ROPE_KV("neox_f16", F16, true)
            ROPE_KV("neox_q8_0", Q8_0, true){"rms_norm", rms_norm, 1},
    {"rms_norm_add", rms_norm_add<false>, 1},
    {"rms_norm_add_norm", rms_norm_add<true>, 1},
    {"add", add, 1},
    {"swiglu", swiglu, 1},
    {"geglu", geglu, 1},
    {"swiglu_clamped", swiglu_clamped_rows, 1},
    {"relu2", relu2_rows, 1},
    {"geglu_slice", geglu_slice, 1},
    {"scale", scale, 1},
    {"take_rows", take_rows, 1},
    {"keep_rows_f32", keep_rows<F32>, 1},
    {"keep_rows_f16", keep_rows<F16>, 1},
    {"pair_rows_f32", pair_rows<F32>, 1},
    {"pair_rows_f16", pair_rows<F16>, 1},
    {},
};

}  // namespace zinc
