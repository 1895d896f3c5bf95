// Begins a step: what the host has described becomes what the other kernels read. And ends a step that verifies drafts.
#include "kv_cache.h"
#include "shapes.h"

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
    uint drafted;

    METAL_FUNC void load(device const Row* row) {
        pos = row->pos;
        pages = row->pages;
        token = row->token;
        drafted = row->drafted;
    }
};

// The first kernel of every plan. It takes the place of the ring that step number + 1 has. A row's token is its id, or
// what an output of the step before has chosen. It also goes to `history`, at the place of the row's keys. The pages of
// a row may be those that this step writes to its table. A row behind a draft comes as many positions later as the step
// before has accepted tokens of it.
// Grid: 1. Threads: BEGIN_THREADS.
template <class Id>
kernel void begin_step(constant BeginParams& p [[buffer(0)]], device const Step* next_step [[buffer(1)]],
                       device const Row* next_rows [[buffer(2)]], device const uint* next_outs [[buffer(3)]],
                       device const PageWrite* next_pages [[buffer(4)]], device const Draw* next_draws [[buffer(5)]],
                       device const Id* chosen [[buffer(6)]], device const uint* accepted [[buffer(7)]],
                       device Step* step [[buffer(8)]], device Row* rows [[buffer(9)]],
                       device Id* tokens [[buffer(10)]], device uint* out_rows [[buffer(11)]],
                       device uint* pages [[buffer(12)]], device Draw* draws [[buffer(13)]],
                       device Id* history [[buffer(14)]], GRID_IDS) {
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
        Id id = row.token;
        uint later = 0;
        if (row.token < 0) {
            const uint output = uint(-1 - row.token);
            if (row.drafted > 0) later = min(accepted[output], row.drafted);
            id = chosen[output + later];
        }
        tokens[t] = id;
        history[cache_row(pages + row.pages, row.pos + later)] = id;
        if (later > 0) rows[t].pos = row.pos + later;
    }
    if (tid == 0) {
        step->n_tokens = n_tokens;
        step->n_single = n_single;
        step->n_out = n_out;
        step->n_page_writes = n_page_writes;
        step->number = number;
    }
}

// The last kernel of a plan that verifies drafts. Counts, from each output on, the rows after its row in the run whose
// tokens were drawn in their places, up to the first that was not: to `accepted` for the next step, and to `results`
// for the host. All rows after an output in its run are outputs.
// Grid: 1. Threads: ACCEPT_THREADS.
template <class Id>
kernel void accept_drafts(constant AcceptParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                          device const Row* rows [[buffer(2)]], device const Id* tokens [[buffer(3)]],
                          device const uint* out_rows [[buffer(4)]], device const Id* chosen [[buffer(5)]],
                          device uint* accepted [[buffer(6)]], device Choice* results [[buffer(7)]], GRID_IDS) {
    static_assert(uint(ACCEPT_THREADS) >= uint(MAX_OUT), "a thread for each output");
    TG_ARRAY(uint, right, MAX_OUT);  // by output: 1 if the row after its row has the token that it has chosen
    const uint n_out = min(step->n_out, p.outs);
    if (tid < n_out) {
        const uint row = out_rows[tid];
        const Id id = chosen[tid];
        right[tid] = row + 1 < rows[row].end && id >= 0 && tokens[row + 1] == id ? 1 : 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (tid >= n_out) return;
    uint n = 0;
    while (tid + n < n_out && right[tid + n] != 0) n++;
    accepted[tid] = n;
    results[step->number % STEP_RING * MAX_OUT + tid].accepted = n;
}

KERNEL("begin_step", begin_step<int>)
KERNEL("accept_drafts", accept_drafts<int>)
