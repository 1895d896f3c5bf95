// Begins a step: what the host has described becomes what the other kernels read.
#include "kv_cache.h"

constant constexpr uint ROW_WORDS = sizeof(Row) / sizeof(uint);

// Copies the words from `first` on, of n, thread by thread.
METAL_FUNC void copy_words(device uint* to, device const uint* from, uint n, uint first, uint n_threads) {
    for (uint i = first; i < n; i += n_threads) to[i] = from[i];
}

// What this kernel uses of a row.
struct RowStart {
    uint pos;
    uint pages;
    int token;

    METAL_FUNC void load(device const Row* row) {
        pos = row->pos;
        pages = row->pages;
        token = row->token;
    }
};

// The first kernel of every plan. It takes the place of the ring that step number + 1 has. A row's token is its id, or
// what an output of the step before has chosen. It also goes to `history`, at the place of the row's keys. The pages of
// a row may be those that this step writes to its table.
// Grid: 1. Threads: BEGIN_THREADS.
template <class Id>
kernel void begin_step(constant BeginParams& p [[buffer(0)]], device const Step* next_step [[buffer(1)]],
                       device const Row* next_rows [[buffer(2)]], device const uint* next_outs [[buffer(3)]],
                       device const PageWrite* next_pages [[buffer(4)]], device const Draw* next_draws [[buffer(5)]],
                       device const Id* chosen [[buffer(6)]], device Step* step [[buffer(7)]],
                       device Row* rows [[buffer(8)]], device Id* tokens [[buffer(9)]],
                       device uint* out_rows [[buffer(10)]], device uint* pages [[buffer(11)]],
                       device Draw* draws [[buffer(12)]], device Id* history [[buffer(13)]], GRID_IDS) {
    const uint n_threads = n_sg * SIMD;
    const uint number = step->number + 1, place = number % STEP_RING;
    device const Step* next = next_step + place;
    device const Row* from = next_rows + ulong(place) * p.max_rows;
    device const PageWrite* writes = next_pages + ulong(place) * p.max_page_writes;
    // The memory of the host is far away. So the first rows and writes are loaded at once with the numbers of them.
    RowStart row;
    row.load(from + min(tid, p.max_rows - 1));
    const uint word = ((device const uint*)from)[min(tid, p.max_rows * ROW_WORDS - 1)];
    const uint write_at = writes[min(tid, p.max_page_writes - 1)].at,
               write_page = writes[min(tid, p.max_page_writes - 1)].page;
    const uint n_tokens = next->n_tokens, n_single = next->n_single, n_out = next->n_out,
               n_page_writes = next->n_page_writes;

    if (tid < n_page_writes) pages[write_at] = write_page;
    for (uint i = tid + n_threads; i < n_page_writes; i += n_threads) pages[writes[i].at] = writes[i].page;
    if (tid < n_tokens * ROW_WORDS) ((device uint*)rows)[tid] = word;
    copy_words((device uint*)rows, (device const uint*)from, n_tokens * ROW_WORDS, tid + n_threads, n_threads);
    copy_words(out_rows, next_outs + place * MAX_OUT, n_out, tid, n_threads);
    copy_words((device uint*)draws, (device const uint*)(next_draws + place * MAX_OUT),
               n_out * uint(sizeof(Draw) / sizeof(uint)), tid, n_threads);
    threadgroup_barrier(mem_flags::mem_device);  // the tables are there, and all threads have read the number
    for (uint t = tid; t < n_tokens; t += n_threads) {
        if (t != tid) row.load(from + t);
        const Id id = row.token >= 0 ? row.token : chosen[-1 - row.token];
        tokens[t] = id;
        history[cache_row(pages + row.pages, row.pos)] = id;
    }
    if (tid == 0) {
        step->n_tokens = n_tokens;
        step->n_single = n_single;
        step->n_out = n_out;
        step->n_page_writes = n_page_writes;
        step->number = number;
    }
}

KERNEL("begin_step", begin_step<int>)
