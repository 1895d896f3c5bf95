#include "probe.h"

// x is a lane's own value, u its own lane number to read from, d the same small distance in all lanes.
#define SIMD_OPERATIONS(OP)                                                                                    \
    OP(simd_sum(x))                                                                                            \
    OP(simd_product(x))                                                                                        \
    OP(simd_max(x))                                                                                            \
    OP(simd_min(x))                                                                                            \
    OP(simd_prefix_inclusive_sum(x))                                                                           \
    OP(simd_prefix_exclusive_sum(x))                                                                           \
    OP(simd_prefix_inclusive_product(x))                                                                       \
    OP(simd_prefix_exclusive_product(x))                                                                       \
    OP(simd_shuffle(x, u))                                                                                     \
    OP(simd_broadcast(x, d))                                                                                   \
    OP(simd_broadcast_first(x))                                                                                \
    OP(simd_shuffle_xor(x, d))                                                                                 \
    OP(simd_shuffle_up(x, d))                                                                                  \
    OP(simd_shuffle_down(x, d))                                                                                \
    OP(simd_shuffle_rotate_up(x, d))                                                                           \
    OP(simd_shuffle_rotate_down(x, d))                                                                         \
    OP(quad_sum(x))                                                                                            \
    OP(quad_product(x))                                                                                        \
    OP(quad_max(x))                                                                                            \
    OP(quad_min(x))                                                                                            \
    OP(quad_shuffle(x, u % 4))                                                                                 \
    OP(quad_broadcast(x, d % 4))                                                                               \
    OP(quad_shuffle_xor(x, d % 4))                                                                             \
    OP(quad_shuffle_up(x, d % 4))                                                                              \
    OP(quad_shuffle_down(x, d % 4))

#define BIT_OPERATIONS(OP)                                                                                     \
    OP(simd_and(x))                                                                                            \
    OP(simd_or(x))                                                                                             \
    OP(simd_xor(x))                                                                                            \
    OP(uint(ulong(simd_ballot(x % 3 == 0))))                                                                   \
    OP(uint(simd_all(x % 3 == 0)))                                                                             \
    OP(uint(simd_all(x == x)))                                                                                 \
    OP(uint(simd_any(x % 3 == 0)))                                                                             \
    OP(uint(simd_any(x != x)))

#define STORE(expression) Components<V, N>::store(V(expression), out + (ulong(k++) * p.n + i) * N);

template <class T, int N>
kernel void probe_simd(constant ProbeParams& p [[buffer(0)]], device const T* in [[buffer(1)]],
                       device const uint* from [[buffer(2)]], device T* out [[buffer(3)]], GRID_IDS) {
    typedef typename VectorOf<T, N>::type V;
    const uint i = tg.x * n_sg * SIMD + tid;
    const V x = Components<V, N>::load(in + i * N);
    const uint u = from[i], d = p.variant;
    uint k = 0;
    SIMD_OPERATIONS(STORE)
}

kernel void probe_simd_bits(constant ProbeParams& p [[buffer(0)]], device const uint* in [[buffer(1)]],
                            device uint* out [[buffer(2)]], GRID_IDS) {
    typedef uint V;
    constexpr int N = 1;
    const uint i = tg.x * n_sg * SIMD + tid;
    const uint x = in[i];
    uint k = 0;
    BIT_OPERATIONS(STORE)
}

// out[0] = A B + C, out[1] = A^T B, out[2] = 2 on the diagonal, out[3] = A with its thread elements doubled, out[4] =
// A^T stored transposed; A lies inside a wider matrix and goes through threadgroup memory.
template <class T>
kernel void probe_matrix(constant ProbeParams& p [[buffer(0)]], device const T* wide [[buffer(1)]],
                         device const T* b [[buffer(2)]], device const float* c [[buffer(3)]],
                         device float* out [[buffer(4)]], GRID_IDS) {
    TG_ARRAY(T, tile, 2 * 64);
    threadgroup T* mine = tile + sg * 64;
    simdgroup_matrix<T, 8, 8> A, At, B;
    simdgroup_float8x8 C, D;
    device float* target = out + ulong(tg.x * n_sg + sg) * 5 * 64;
    simdgroup_load(A, wide, p.n, ulong2(3, 2));
    simdgroup_load(B, b);
    simdgroup_load(C, c, 8);
    simdgroup_multiply_accumulate(D, A, B, C);
    simdgroup_store(D, target, 8);
    simdgroup_store(A, mine, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(At, mine, 8, ulong2(0, 0), true);
    D = make_filled_simdgroup_matrix<float, 8>(7.0f);
    simdgroup_multiply(D, At, B);
    simdgroup_store(D, target + 64, 8);
    simdgroup_store(simdgroup_float8x8(2.0f), target + 128, 8);
    D = make_filled_simdgroup_matrix<float, 8>(0.0f);
    D.thread_elements()[0] = 2.0f * float(A.thread_elements()[0]);
    D.thread_elements()[1] = 2.0f * float(A.thread_elements()[1]);
    simdgroup_store(D, target + 192, 8);
    D.thread_elements() = float2(At.thread_elements());
    simdgroup_store(D, target + 256, 8, ulong2(0, 0), true);
}

// All threads of all threadgroups on the same few counters.
kernel void probe_atomics(constant ProbeParams& p [[buffer(0)]], device const int* in [[buffer(1)]],
                          device atomic_int* ints [[buffer(2)]], device atomic_uint* uints [[buffer(3)]],
                          device atomic_float* sum [[buffer(4)]], GRID_IDS) {
    const int x = in[tg.x * n_sg * SIMD + tid];
    atomic_fetch_add_explicit(&ints[0], x, memory_order_relaxed);
    atomic_fetch_sub_explicit(&ints[1], x, memory_order_relaxed);
    atomic_fetch_max_explicit(&ints[2], x, memory_order_relaxed);
    atomic_fetch_min_explicit(&ints[3], x, memory_order_relaxed);
    atomic_fetch_or_explicit(&uints[0], uint(x), memory_order_relaxed);
    atomic_fetch_and_explicit(&uints[1], uint(x), memory_order_relaxed);
    atomic_fetch_xor_explicit(&uints[2], uint(x), memory_order_relaxed);
    if (tid == 0) atomic_store_explicit(&uints[3], 5u, memory_order_relaxed);
    atomic_exchange_explicit(&uints[4], 6u + atomic_load_explicit(&uints[3], memory_order_relaxed) * 0u,
                             memory_order_relaxed);
    atomic_fetch_add_explicit(sum, float(x), memory_order_relaxed);
}

// Ids as GRID_IDS gives them, six per thread.
kernel void probe_ids(constant ProbeParams& p [[buffer(0)]], device uint* out [[buffer(1)]], GRID_IDS) {
    const uint threadgroup_number = (tg.z * n_tg.y + tg.y) * n_tg.x + tg.x;
    device uint* mine = out + ulong(threadgroup_number * n_sg * SIMD + tid) * 6;
    mine[0] = tg.x + 100 * tg.y + 10000 * tg.z;
    mine[1] = n_tg.x + 100 * n_tg.y + 10000 * n_tg.z;
    mine[2] = tid;
    mine[3] = sg;
    mine[4] = lane;
    mine[5] = n_sg;
}

KERNEL("probe_simd_float1", probe_simd<float, 1>)
KERNEL("probe_simd_half1", probe_simd<half, 1>)
KERNEL("probe_simd_int1", probe_simd<int, 1>)
KERNEL("probe_simd_uchar1", probe_simd<uchar, 1>)
KERNEL("probe_simd_float4", probe_simd<float, 4>)
KERNEL("probe_simd_bits", probe_simd_bits)
KERNEL("probe_matrix_float", probe_matrix<float>)
KERNEL("probe_matrix_half", probe_matrix<half>)
KERNEL("probe_matrix_bfloat", probe_matrix<bfloat>)
KERNEL("probe_atomics", probe_atomics)
KERNEL("probe_ids", probe_ids)
