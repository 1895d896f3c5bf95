#include "quant_dot.h"

// out[t] = scale * table[tokens[t] - first], 16 weights per thread. Rows of other windows stay as they are.
// Grid: (ceil(n_embd / EMBED_COLUMNS), T). Threads: EMBED_THREADS.
template <class Q>
kernel void embed(constant EmbedParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                  device const int* tokens [[buffer(2)]], device const uchar* table [[buffer(3)]],
                  device float* out [[buffer(4)]], GRID_IDS) {
    const uint part = tg.x * n_sg * SIMD + tid;
    if (tg.y >= step->n_tokens || run_column<Q>(part, 0) >= p.n_embd) return;
    // The host refuses ids outside the vocabulary. No id may read outside the table.
    const uint row_of_table = min(uint(tokens[tg.y]), p.n_vocab - 1) - p.first;
    if (row_of_table >= p.n_rows) return;

    float4 w[4];
    Q::weights(table + ulong(row_of_table) * p.row_bytes, part, p.n_embd, w);
    device float* row = out + ulong(tg.y) * p.n_embd;
    UNROLL for (uint i = 0; i < PART; i++) {
        const uint column = run_column<Q>(part, i / RUN) + i % RUN;
        if (column < p.n_embd) row[column] = p.scale * w[i / 4][i % 4];
    }
}

#define EMBED(type, Q) KERNEL("embed_" type, embed<Q>)
TENSOR_TYPES(EMBED)
