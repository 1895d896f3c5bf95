// Native embedding: rows of a table of every type, as floats.
#include "cpu/native/quants.h"
#include "cpu/native/register.h"

namespace zinc {
namespace {

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

}  // namespace

#define EMBED(name, T) {"embed_" name, embed<T>, 1},

NATIVE_TABLE(embed) = {TENSOR_TYPES(EMBED){}};

}  // namespace zinc
