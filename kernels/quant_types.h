// The one list of tensor types: T("<the name in quants.py>", <type>). Every family of kernels is instantiated from it,
// also the native kernels of the CPU, and the host reads the names. Plain<B> holds weights as they are, Quantised<B> in
// blocks. No kernel takes experts of type f32 or bf16.
#pragma once

#define LOW_BIT_TYPES(T)                                                                                               \
    T("q4_0", Quantised<Q4_0>)                                                                                         \
    T("q4_1", Quantised<Q4_1>)                                                                                         \
    T("q5_0", Quantised<Q5_0>)                                                                                         \
    T("q5_1", Quantised<Q5_1>)                                                                                         \
    T("q4_k", Quantised<Q4_K>)                                                                                         \
    T("q5_k", Quantised<Q5_K>)                                                                                         \
    T("q6_k", Quantised<Q6_K>)
#define EXPERT_TYPES(T)                                                                                                \
    T("f16", Plain<F16>)                                                                                               \
    T("q8_0", Quantised<Q8_0>)                                                                                         \
    LOW_BIT_TYPES(T)
#define TENSOR_TYPES(T)                                                                                                \
    T("f32", Plain<F32>)                                                                                               \
    T("bf16", Plain<BF16>)                                                                                             \
    EXPERT_TYPES(T)
