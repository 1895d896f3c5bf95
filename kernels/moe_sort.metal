#include "reduce.h"
#include "shapes.h"

// Sorts the slots of a step by expert, and the slots of one expert by number. Slot t * n_used + j is row t's place for
// its j-th expert. Cuts the slots into tiles: runs of at most MOE_MM_TOKENS slots of one expert.
//
// A counting sort in one threadgroup. Every simdgroup takes a run of the slots and has separate counts. The sums of all
// counts are the places of its slots. Within a simdgroup a slot's place comes from its rank among the lanes of its
// expert. Nothing depends on the order of threads.

constant constexpr uint SORT_COUNTS =
    7168;  // as many simdgroups sort as have room for their counts: 7 for 1,024 experts

// The lanes whose slot is live and has this lane's expert.
METAL_FUNC uint peers(uint expert, bool live, uint n_expert) {
    uint same = uint(simd_vote::vote_t(simd_ballot(live)));
    for (uint bit = 1; bit < n_expert; bit *= 2) {
        const uint votes = uint(simd_vote::vote_t(simd_ballot((expert & bit) != 0)));
        same &= (expert & bit) != 0 ? votes : ~votes;
    }
    return same;
}

// One simdgroup's slots, [first, end).
struct SortRun {
    device const int* ids;
    threadgroup uint* counts;  // its own, per expert
    uint first, end, n_expert, lane;

    // Calls place(slot, n) for every slot, n being counts[its expert] and the slots of that expert before it.
    template <class Place>
    METAL_FUNC void walk(Place place) const {
        for (uint at = first; at < end; at += SIMD) {
            const uint slot = at + lane;
            const bool live = slot < end;
            const uint expert = live ? min(uint(ids[slot]), n_expert - 1) : 0;
            const uint same = peers(expert, live, n_expert), rank = popcount(same & ((1u << lane) - 1));
            if (live) place.put(slot, counts[expert] + rank);
            simdgroup_barrier(mem_flags::mem_threadgroup);  // all have read
            if (live && rank == 0) counts[expert] += popcount(same);
            simdgroup_barrier(mem_flags::mem_threadgroup);
        }
    }
};

struct PlaceNowhere {
    METAL_FUNC void put(uint, uint) const {}
};

struct PlaceInto {
    device int* slots;
    METAL_FUNC void put(uint slot, uint at) const { slots[at] = int(slot); }
};

// Grid: 1. Threads: MOE_SORT_THREADS.
template <uint TILE>
kernel void moe_sort(constant MoeSortParams& p [[buffer(0)]], device const Step* step [[buffer(1)]],
                     device const int* ids [[buffer(2)]], device int* slots [[buffer(3)]],
                     device int4* tiles [[buffer(4)]], device int* n_tiles [[buffer(5)]], GRID_IDS) {
    TG_ARRAY(uint, counts, SORT_COUNTS);
    TG_ARRAY(uint, sums, SIMD);
    const uint n_slots = step->n_tokens * p.n_used, n_threads = n_sg * SIMD;
    const uint n_runs = min(n_sg, SORT_COUNTS / p.n_expert);
    const uint each = (n_slots + n_runs * SIMD - 1) / (n_runs * SIMD) * SIMD;  // whole simdgroups
    for (uint i = tid; i < n_runs * p.n_expert; i += n_threads) counts[i] = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const uint first = sg < n_runs ? min(sg * each, n_slots) : n_slots, run = min(sg, n_runs - 1);
    const SortRun mine{ids, counts + run * p.n_expert, first, min(first + each, n_slots), p.n_expert, lane};
    mine.walk(PlaceNowhere{});
    threadgroup_barrier(mem_flags::mem_threadgroup);

    uint slots_before = 0, tiles_before = 0;  // of the experts of earlier rounds
    for (uint base = 0; base < p.n_expert; base += n_threads) {
        const uint expert = base + tid;
        uint count = 0, all_slots, all_tiles;
        for (uint r = 0; r < n_runs && expert < p.n_expert; r++) count += counts[r * p.n_expert + expert];
        const uint begin = slots_before + threadgroup_prefix(count, sums, all_slots, sg, lane, n_sg);
        const uint n = (count + TILE - 1) / TILE;
        const uint tile = tiles_before + threadgroup_prefix(n, sums, all_tiles, sg, lane, n_sg);
        for (uint i = 0; i < n && tile + i < p.max_tiles; i++) {
            const uint from = begin + i * TILE;
            tiles[tile + i] = int4(int(expert), int(from), int(min(from + TILE, begin + count)), 0);
        }
        for (uint r = 0, at = begin; r < n_runs && expert < p.n_expert; r++) {
            const uint here = counts[r * p.n_expert + expert];
            counts[r * p.n_expert + expert] = at;
            at += here;
        }
        slots_before += all_slots;
        tiles_before += all_tiles;
    }
    if (tid == 0) n_tiles[0] = int(min(tiles_before, p.max_tiles));
    threadgroup_barrier(mem_flags::mem_threadgroup);
    mine.walk(PlaceInto{slots});
}

KERNEL("moe_sort", moe_sort<MOE_MM_TOKENS>)
