#include "probe.h"

// One planted fault per number; tests/test_msl_checker.py says which message each must give. Two simdgroups of threads;
// in and out have one element per thread, and in has the value of its index.
enum Fault {
    NO_FAULT,
    NO_BARRIER,
    NO_SIMDGROUP_BARRIER,
    BARRIER_WITHOUT_MEMORY,
    BARRIER_FOR_OTHER_MEMORY,
    SIMD_SUM_IS_NO_BARRIER,
    SIMDGROUP_BARRIER,
    SIMDGROUP_BARRIER_ACROSS_SIMDGROUPS,
    WRITE_AFTER_READ,
    WRITE_TWICE,
    READ_UNWRITTEN,
    ATOMIC_UNWRITTEN,
    ATOMIC_STORED,
    ARRAY_PAST_END,
    ARRAY_BEFORE_START,
    TOO_MUCH_THREADGROUP_MEMORY,
    BARRIER_NOT_REACHED,
    BARRIER_IN_TWO_PLACES,
    SIMD_SUM_NOT_REACHED,
    SIMD_SUM_AND_MAX,
    BARRIER_AND_SIMD_SUM,
    OWN_ARRAY_PAST_END,
    OWN_ARRAY_BEFORE_START,
    FIELD_PAST_END,
    VECTOR_PAST_END,
    READ_PAST_END,
    READ_BEFORE_START,
    WRITE_PAST_END,
    WRITE_BEFORE_START,
    READ_FAR_AWAY,
    WRITE_TO_INPUT,
    WRITE_TO_PARAMS,
    MISALIGNED,
    DEVICE_NO_BARRIER,
    DEVICE_BARRIER_FOR_OTHER_MEMORY,
    DEVICE_BARRIER,
    TWO_THREADGROUPS_WRITE,
    THREADGROUP_READS_ANOTHER,
    THREADGROUP_WRITES_WHAT_ANOTHER_READ,
    ATOMIC_AND_PLAIN,
    N_FAULTS
};

template <int fault>
METAL_FUNC void use_threadgroup_memory(device const float* in, device float* out, threadgroup float* shared, uint tid,
                                       uint lane) {
    if (fault == READ_UNWRITTEN) {
        out[tid] = shared[tid];
        return;
    }
    if (fault == ATOMIC_UNWRITTEN || fault == ATOMIC_STORED) {
        threadgroup atomic_float* sums = reinterpret_cast<threadgroup atomic_float*>(shared);
        if (fault == ATOMIC_STORED) atomic_store_explicit(&sums[tid], 0.0f, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&sums[tid & 7], in[tid], memory_order_relaxed);
        return;
    }
    shared[tid] = in[tid];
    if (fault == WRITE_TWICE) shared[tid ^ 1] = 0.0f;
    if (fault == BARRIER_WITHOUT_MEMORY) threadgroup_barrier(mem_flags::mem_none);
    if (fault == BARRIER_FOR_OTHER_MEMORY) threadgroup_barrier(mem_flags::mem_device);
    if (fault == SIMD_SUM_IS_NO_BARRIER) out[tid] = simd_sum(in[tid]);
    if (fault == SIMDGROUP_BARRIER || fault == SIMDGROUP_BARRIER_ACROSS_SIMDGROUPS)
        simdgroup_barrier(mem_flags::mem_threadgroup);
    const bool full = fault == NO_FAULT || fault == WRITE_AFTER_READ || fault == ARRAY_PAST_END || fault == ARRAY_BEFORE_START;
    if (full) threadgroup_barrier(mem_flags::mem_threadgroup);

    const bool near = fault == NO_SIMDGROUP_BARRIER || fault == SIMD_SUM_IS_NO_BARRIER || fault == SIMDGROUP_BARRIER;
    // Without a barrier from a thread that runs earlier, so that the fault is the order and not the lack of a value.
    int other = int(near ? tid & ~1u : full ? tid ^ 32 : tid & 31);
    if (fault == ARRAY_PAST_END) other = int(tid) + 1;
    if (fault == ARRAY_BEFORE_START) other = int(tid) - 1;
    out[tid] = shared[other];
    if (fault == WRITE_AFTER_READ && tid < 32) shared[tid] = 0.0f;
}

template <int fault> METAL_FUNC void diverge(device const float* in, device float* out, uint tid, uint lane) {
    float x = in[tid];
    if (fault == BARRIER_NOT_REACHED && tid < 40) threadgroup_barrier(mem_flags::mem_device);
    if (fault == BARRIER_IN_TWO_PLACES) {
        if (tid < 40)
            threadgroup_barrier(mem_flags::mem_device);
        else
            threadgroup_barrier(mem_flags::mem_device);
    }
    if (fault == SIMD_SUM_NOT_REACHED && lane < 16) x = simd_sum(x);
    if (fault == SIMD_SUM_AND_MAX) x = lane < 16 ? simd_sum(x) : simd_max(x);
    if (fault == BARRIER_AND_SIMD_SUM) {
        if (tid == 7) threadgroup_barrier(mem_flags::mem_device);
        x = simd_sum(x);
    }
    out[tid] = x;
}

struct Pair {
    float first[8], second[8];
};

template <int fault> METAL_FUNC void leave_an_array(device const float* in, device float* out, uint tid) {
    const int i = tid == 11 ? 8 : 7;
    float own[8];
    for (int j = 0; j < 8; j++) own[j] = in[j];
    if (fault == OWN_ARRAY_PAST_END) out[tid] = own[i];
    if (fault == OWN_ARRAY_BEFORE_START) out[tid] = own[7 - i];
    if (fault == VECTOR_PAST_END) out[tid] = float4(own[0])[i - 4];
    if (fault == FIELD_PAST_END) out[tid] = reinterpret_cast<device const Pair*>(in)->first[i];
}

template <int fault>
METAL_FUNC void leave_the_bindings(constant ProbeParams& p, device const float* in, device float* out, uint tid) {
    if (fault == READ_PAST_END) out[tid] = in[tid + 1];
    if (fault == READ_BEFORE_START) out[tid] = in[int(tid) - 1];
    if (fault == WRITE_PAST_END) out[tid + 1] = 0.0f;
    if (fault == WRITE_BEFORE_START) out[int(tid) - 1] = 0.0f;
    if (fault == READ_FAR_AWAY) out[tid] = in[tid + (ulong(1) << 32)];
    if (fault == WRITE_TO_INPUT) const_cast<device float*>(in)[tid] = 0.0f;
    if (fault == WRITE_TO_PARAMS && tid == 3) const_cast<device u32&>(p.n) = 0;
    if (fault == MISALIGNED && tid == 0) *reinterpret_cast<device float4*>(out) = *reinterpret_cast<device const float4*>(in + 1);
}

template <int fault>
METAL_FUNC void share_device_memory(device const float* in, device float* out, uint tg, uint tid) {
    if (fault == DEVICE_NO_BARRIER || fault == DEVICE_BARRIER || fault == DEVICE_BARRIER_FOR_OTHER_MEMORY) {
        out[tid] = in[tid];
        if (fault == DEVICE_BARRIER) threadgroup_barrier(mem_flags::mem_device);
        if (fault == DEVICE_BARRIER_FOR_OTHER_MEMORY) threadgroup_barrier(mem_flags::mem_threadgroup);
        const float x = out[tid ^ 33];
        if (fault == DEVICE_BARRIER) threadgroup_barrier(mem_flags::mem_device);
        out[tid] = x;
    }
    if (fault == TWO_THREADGROUPS_WRITE && tid == 5) out[5] = float(tg);
    if (fault == THREADGROUP_READS_ANOTHER && tid == 0) out[tg] = tg == 1 ? out[0] : 1.0f;
    if (fault == THREADGROUP_WRITES_WHAT_ANOTHER_READ) {
        if (tg == 0 && tid == 0) out[0] = out[1];
        if (tg == 1 && tid == 0) out[1] = 1.0f;
    }
    if (fault == ATOMIC_AND_PLAIN) {
        atomic_fetch_add_explicit(reinterpret_cast<device atomic_float*>(out), 1.0f, memory_order_relaxed);
        if (tid == 9) out[0] = 0.0f;
    }
}

template <int fault>
kernel void probe_fault(constant ProbeParams& p [[buffer(0)]], device const float* in [[buffer(1)]],
                        device float* out [[buffer(2)]], GRID_IDS) {
    TG_ARRAY(float, before, 64);
    TG_ARRAY(float, shared, fault == TOO_MUCH_THREADGROUP_MEMORY ? 8192 : 64);
    before[tid] = 0.0f;
    if (fault <= TOO_MUCH_THREADGROUP_MEMORY) use_threadgroup_memory<fault>(in, out, shared, tid, lane);
    if (fault >= BARRIER_NOT_REACHED && fault <= BARRIER_AND_SIMD_SUM) diverge<fault>(in, out, tid, lane);
    if (fault >= OWN_ARRAY_PAST_END && fault <= VECTOR_PAST_END) leave_an_array<fault>(in, out, tid);
    if (fault >= READ_PAST_END && fault <= MISALIGNED) leave_the_bindings<fault>(p, in, out, tid);
    if (fault >= DEVICE_NO_BARRIER) share_device_memory<fault>(in, out, tg.x, tid);
}

// out[i] = in[i] + 1: two of these after another need a barrier where one reads what the other writes.
kernel void probe_increment(constant ProbeParams& p [[buffer(0)]], device const float* in [[buffer(1)]],
                            device float* out [[buffer(2)]], GRID_IDS) {
    const uint i = tg.x * n_sg * SIMD + tid;
    if (i < p.n) out[i] = in[i] + 1.0f;
}

#define FAULT(name) KERNEL("probe_fault_" #name, probe_fault<name>)
FAULT(NO_FAULT)
FAULT(NO_BARRIER)
FAULT(NO_SIMDGROUP_BARRIER)
FAULT(BARRIER_WITHOUT_MEMORY)
FAULT(BARRIER_FOR_OTHER_MEMORY)
FAULT(SIMD_SUM_IS_NO_BARRIER)
FAULT(SIMDGROUP_BARRIER_ACROSS_SIMDGROUPS)
FAULT(WRITE_AFTER_READ)
FAULT(WRITE_TWICE)
FAULT(READ_UNWRITTEN)
FAULT(ATOMIC_UNWRITTEN)
FAULT(ATOMIC_STORED)
FAULT(ARRAY_PAST_END)
FAULT(ARRAY_BEFORE_START)
FAULT(TOO_MUCH_THREADGROUP_MEMORY)
FAULT(BARRIER_NOT_REACHED)
FAULT(BARRIER_IN_TWO_PLACES)
FAULT(SIMD_SUM_NOT_REACHED)
FAULT(SIMD_SUM_AND_MAX)
FAULT(BARRIER_AND_SIMD_SUM)
FAULT(OWN_ARRAY_PAST_END)
FAULT(OWN_ARRAY_BEFORE_START)
FAULT(FIELD_PAST_END)
FAULT(VECTOR_PAST_END)
FAULT(READ_PAST_END)
FAULT(READ_BEFORE_START)
FAULT(WRITE_PAST_END)
FAULT(WRITE_BEFORE_START)
FAULT(READ_FAR_AWAY)
FAULT(WRITE_TO_INPUT)
FAULT(WRITE_TO_PARAMS)
FAULT(MISALIGNED)
FAULT(DEVICE_NO_BARRIER)
FAULT(DEVICE_BARRIER_FOR_OTHER_MEMORY)
FAULT(DEVICE_BARRIER)
FAULT(SIMDGROUP_BARRIER)
FAULT(TWO_THREADGROUPS_WRITE)
FAULT(THREADGROUP_READS_ANOTHER)
FAULT(THREADGROUP_WRITES_WHAT_ANOTHER_READ)
FAULT(ATOMIC_AND_PLAIN)
KERNEL("probe_increment", probe_increment)
