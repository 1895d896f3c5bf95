// Native kernels that work row by row: embedding, RMSNorm, RoPE with KV write, element-wise work.
#include "cpu/native/quants.h"
#include "cpu/native/register.h"
#include "shapes.h"

namespace zinc {
namespace {

// Calls f(x, y) for threadgroups [begin, end) of a grid whose y is rows of the step. Skips rows that are not real.
template <class F>
INLINE void for_rows(const NativeLaunch& l, uint64_t begin, uint64_t end, uint32_t n_tokens, F&& f) {
    for (uint64_t i = begin; i < end; i++)
        if (i / l.grid[0] < n_tokens) f(uint32_t(i % l.grid[0]), uint32_t(i / l.grid[0]));
}

template <class T>
void embed(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<EmbedParams>();
    const int32_t* tokens = l.buffer<const int32_t>(2);
    for_rows(l, begin, end, l.buffer<const Step>(1)->n_tokens, [&](uint32_t x, uint32_t t) {
        const uint32_t token = uint32_t(tokens[t]) < p.n_vocab ? uint32_t(tokens[t]) : p.n_vocab - 1;
        if (token - p.first >= p.n_rows) return;
        const uint8_t* row = l.buffer<const uint8_t>(3) + size_t(token - p.first) * p.row_bytes;
        float* out = l.buffer<float>(4) + size_t(t) * p.n_embd;
        const Range groups = piece((p.n_embd + GROUP - 1) / GROUP, x, l.grid[0]);
        for (uint32_t g = groups.begin; g < groups.end; g++) {
            const uint32_t first = g * GROUP, count = p.n_embd - first < GROUP ? p.n_embd - first : GROUP;
            dequantise<T>(row, first, count, out + first);
            for (uint32_t i = first; i < first + count; i++) out[i] *= p.scale;
        }
    });
}

INLINE float rms_scale(const float* x, uint32_t n, float eps) {
    vf squares{};
    uint32_t i = 0;
    for (; i + W <= n; i += W) squares += load<vf>(x + i) * load<vf>(x + i);
    float total = sum_lanes(squares);
    for (; i < n; i++) total += x[i] * x[i];
    return 1.0f / std::sqrt(total / float(n) + eps);
}

INLINE void normalise(float* out, const float* x, const float* weight, const NormParams& p) {
    const float scale = rms_scale(x, p.n, p.eps);
    map_floats(p.n, out, x, weight, [scale](vf v, vf w) { return v * scale * w; });
}

void rms_norm(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<NormParams>();
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens;
    for (uint64_t t = begin; t < end && t < n_tokens; t++)
        normalise(l.buffer<float>(4) + t * p.n, l.buffer<const float>(2) + t * p.n, l.buffer<const float>(3), p);
}

// NEXT: the sum is normalised again, with another weight.
template <bool NEXT>
void rms_norm_add(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const auto& p = l.as<NormParams>();
    const uint32_t n_tokens = l.buffer<const Step>(1)->n_tokens;
    for (uint64_t t = begin; t < end && t < n_tokens; t++) {
        float* sum = l.buffer<float>(NEXT ? 6 : 5) + t * p.n;
        const float* residual = l.buffer<const float>(4) + t * p.n;
        float* normed = thread_scratch().take<float>(p.n);  // the sum may lie where the residual is
        normalise(normed, l.buffer<const float>(2) + t * p.n, l.buffer<const float>(3), p);
        map_floats(p.n, sum, residual, normed, [](vf a, vf b) { return a + b; });
        if (NEXT) normalise(l.buffer<float>(7) + t * p.n, sum, l.buffer<const float>(5), p);
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

void take_last_row(const NativeLaunch& l, uint64_t begin, uint64_t end) {
    const uint32_t n = l.as<ElementwiseParams>().n, n_tokens = l.buffer<const Step>(1)->n_tokens;
    if (n_tokens == 0) return;
    const uint32_t first = piece(n, begin, l.grid[0]).begin, last = piece(n, end - 1, l.grid[0]).end;
    std::memcpy(l.buffer<float>(3) + first, l.buffer<const float>(2) + size_t(n_tokens - 1) * n + first,
                (last - first) * sizeof(float));
}

// ---- RoPE and KV write

using f64x8 = double __attribute__((vector_size(64)));
using i64x8 = int64_t __attribute__((vector_size(64)));

// Sine and cosine of 8 angles, to float32 precision. They are computed in double: angles of a million keep their
// precision.
INLINE void sincos(const float* angle, float* sine, float* cosine) {
    f64x8 x;
    for (int i = 0; i < 8; i++) x[i] = double(angle[i]);
    const f64x8 shift = 0x1.8p52 - f64x8{};
    const f64x8 n = (x * 0.63661977236758134308 + shift) - shift;  // nearest multiple of pi / 2
    const f64x8 r = (x - n * 0x1.921fb54442d18p0) - n * 0x1.1a62633145c07p-54, z = r * r;
    const f64x8 s =
        r + r * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 - z * (1.0 / 39916800)))));
    const f64x8 c =
        1.0 + z * (-0.5 + z * (1.0 / 24 +
                               z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 + z * (1.0 / 479001600))))));
    const i64x8 quadrant = bits_as<i64x8>(n + shift);
    const f64x8 sin_part = (quadrant & 1) != 0 ? c : s, cos_part = (quadrant & 1) != 0 ? s : c;
    for (int i = 0; i < 8; i++) {
        sine[i] = float(quadrant[i] & 2 ? -sin_part[i] : sin_part[i]);
        cosine[i] = float((quadrant[i] + 1) & 2 ? -cos_part[i] : cos_part[i]);
    }
}

// The rotations of one position, [n_rot / 2] each, and room for a head vector.
struct Rotation {
    float *sine, *cosine, *head;

    Rotation(const RopeKvParams& p, float position, const float* freqs) {
        const uint32_t n_pairs = p.n_rot / 2, room = (n_pairs + 7) / 8 * 8;
        sine = thread_scratch().take<float>(2 * room + p.head_dim);
        cosine = sine + room;
        head = cosine + room;
        for (uint32_t i = 0; i < n_pairs; i += 8) {
            float angle[8] = {};
            for (uint32_t j = i; j < n_pairs && j < i + 8; j++) angle[j - i] = position * freqs[j];
            sincos(angle, sine + i, cosine + i);
        }
        for (uint32_t i = 0; i < n_pairs; i++) {
            sine[i] *= p.magnitude;
            cosine[i] *= p.magnitude;
        }
    }
};

// n floats as a row of a type that a cache may have.
template <class T>
INLINE void store_row(uint8_t* out, const float* x, uint32_t n);

template <>
INLINE void store_row<F32>(uint8_t* out, const float* x, uint32_t n) {
    std::memcpy(out, x, n * sizeof(float));
}

template <>
INLINE void store_row<F16>(uint8_t* out, const float* x, uint32_t n) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(out);
    uint32_t i = 0;
    for (; i + W <= n; i += W) store_half(halves + i, load<vf>(x + i));
    for (; i < n; i++) halves[i] = float_to_half(x[i]);
}

// The largest magnitude of each block becomes 127.
template <>
INLINE void store_row<Q8_0>(uint8_t* out, const float* x, uint32_t n) {
    for (uint32_t first = 0; first < n; first += BLOCK, out += Q8_0::BYTES) {
        float largest = 0;
        for (uint32_t i = first; i < first + BLOCK; i++)
            largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
        // Far below the smallest half scale, the reciprocal is not a float either.
        const float quants = largest > 1e-30f ? 127.0f / largest : 0.0f;
        store(out, float_to_half(largest / 127.0f));
        for (int i = 0; i < BLOCK; i += W) {
            const vf shift = splat(0x1.8p23f);  // rounds to nearest even
            const vi rounded = convert<vi>((load<vf>(x + first + i) * quants + shift) - shift);
            store(out + 2 + i, convert<vi8>(rounded));
        }
    }
}

// head = x, normalised or as it is.
template <bool QK_NORM>
INLINE void load_head(const RopeKvParams& p, const float* x, const float* norm_weight, float* head) {
    const float scale = QK_NORM ? rms_scale(x, p.head_dim, p.eps) : 1.0f;
    if (QK_NORM)
        for (uint32_t i = 0; i < p.head_dim; i++) head[i] = x[i] * (scale * norm_weight[i]);
    else
        std::memcpy(head, x, p.head_dim * sizeof(float));
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
        const uint32_t position = step.pos + t;
        const size_t cache_row = size_t(l.buffer<const uint32_t>(2)[position / KV_PAGE]) * KV_PAGE + position % KV_PAGE;
        const Rotation rotation(p, float(position), l.buffer<const float>(6));
        for (uint32_t head = heads.begin; head < heads.end; head++) {
            if (head < p.n_head) {
                const size_t row = size_t(t) * p.n_head + head;
                load_head<QK_NORM>(p, l.buffer<const float>(3) + row * p.q_stride, l.buffer<const float>(7),
                                   rotation.head);
                rotate_head<NEOX>(p, rotation);
                store_row<F32>(l.buffer<uint8_t>(9) + row_bytes<F32>(p.head_dim) * row, rotation.head, p.head_dim);
                continue;
            }
            const uint32_t kv_head = (head - p.n_head) % p.n_head_kv;
            const size_t from = (size_t(t) * p.n_head_kv + kv_head) * p.head_dim;
            const size_t to = (cache_row * p.n_head_kv + kv_head) * row_bytes<KV>(p.head_dim);
            if (head < p.n_head + p.n_head_kv) {
                load_head<QK_NORM>(p, l.buffer<const float>(4) + from, l.buffer<const float>(8), rotation.head);
                rotate_head<NEOX>(p, rotation);
                store_row<KV>(l.buffer<uint8_t>(10) + to, rotation.head, p.head_dim);
            } else {
                store_row<KV>(l.buffer<uint8_t>(11) + to, l.buffer<const float>(5) + from, p.head_dim);
            }
        }
    }
}

}  // namespace

#define EMBED(name, T) {"embed_" name, embed<T>, 1},
#define ROPE_KV(name, T, neox)                                                                                         \
    {"rope_kv_" name, rope_kv<T, neox, false>, 1}, {"rope_kv_" name "_qknorm", rope_kv<T, neox, true>, 1},

NATIVE_TABLE(rows) = {
    TENSOR_TYPES(EMBED) ROPE_KV("norm_f32", F32, false) ROPE_KV("norm_f16", F16, false)
        ROPE_KV("norm_q8_0", Q8_0, false) ROPE_KV("neox_f32", F32, true) ROPE_KV("neox_f16", F16, true)
            ROPE_KV("neox_q8_0", Q8_0, true){"rms_norm", rms_norm, 1},
    {"rms_norm_add", rms_norm_add<false>, 1},
    {"rms_norm_add_norm", rms_norm_add<true>, 1},
    {"add", add, 1},
    {"swiglu", swiglu, 1},
    {"geglu", geglu, 1},
    {"take_last_row", take_last_row, 1},
    {},
};

}  // namespace zinc
