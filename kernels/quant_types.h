// The one list of tensor types: T("<the name in quants.py>", <type>). Every family of kernels is instantiated from it,
// also the native kernels of the CPU, and the host reads the names. Plain<B> holds weights as they are, Quantised<B> in
// blocks.
//
// A family's source, for example mul_mv.metal, has the kernels of the types that most files are of. Other types come in
// groups, and a group has sources of its own, types_GROUP.metal and csrc/cpu/native/types_GROUP.cpp, with the kernels
// of all families for its types; they alone include its blocks. So a build compiles groups side by side, no source
// grows with the number of types, and a Mac without a metallib compiles the groups of the types in a file and no
// others.
#pragma once

#define USUAL_LOW_BIT_TYPES(T)                                                                                         \
    T("q4_0", Quantised<Q4_0>)                                                                                         \
    T("q4_1", Quantised<Q4_1>)                                                                                         \
    T("q5_0", Quantised<Q5_0>)                                                                                         \
    T("q5_1", Quantised<Q5_1>)                                                                                         \
    T("q4_k", Quantised<Q4_K>)                                                                                         \
    T("q5_k", Quantised<Q5_K>)                                                                                         \
    T("q6_k", Quantised<Q6_K>)
#define USUAL_HALVED_TYPES(T) /* whose products of many rows round to halves */                                        \
    T("bf16", Plain<BF16>)                                                                                             \
    T("f16", Plain<F16>)                                                                                               \
    T("q8_0", Quantised<Q8_0>)                                                                                         \
    USUAL_LOW_BIT_TYPES(T)
#define USUAL_TENSOR_TYPES(T) T("f32", Plain<F32>) USUAL_HALVED_TYPES(T)

// The groups.
#define IQ4_TYPES(T)                                                                                                   \
    T("iq4_nl", Quantised<IQ4_NL>)                                                                                     \
    T("iq4_xs", Quantised<IQ4_XS>)
#define IQ3_TYPES(T)                                                                                                   \
    T("iq3_s", Quantised<IQ3_S>)                                                                                       \
    T("iq3_xxs", Quantised<IQ3_XXS>)
#define LOW_K_TYPES(T)                                                                                                 \
    T("q3_k", Quantised<Q3_K>)                                                                                         \
    T("q2_k", Quantised<Q2_K>)
#define IQ2_TYPES(T)                                                                                                   \
    T("iq2_s", Quantised<IQ2_S>)                                                                                       \
    T("iq2_xs", Quantised<IQ2_XS>)                                                                                     \
    T("iq2_xxs", Quantised<IQ2_XXS>)
#define IQ1_TYPES(T)                                                                                                   \
    T("iq1_m", Quantised<IQ1_M>)                                                                                       \
    T("iq1_s", Quantised<IQ1_S>)
#define FP4_TYPES(T)                                                                                                   \
    T("mxfp4", Quantised<MXFP4>)                                                                                       \
    T("nvfp4", Quantised<NVFP4>)
#define TINY_TYPES(T)                                                                                                  \
    T("tq1_0", Quantised<TQ1_0>)                                                                                       \
    T("tq2_0", Quantised<TQ2_0>)                                                                                       \
    T("q1_0", Quantised<Q1_0>)                                                                                         \
    T("q2_0", Quantised<Q2_0>)
#define GROUPED_TYPES(T) IQ4_TYPES(T) IQ3_TYPES(T) LOW_K_TYPES(T) IQ2_TYPES(T) IQ1_TYPES(T) FP4_TYPES(T) TINY_TYPES(T)

// All types: for the host.
#define ALL_TENSOR_TYPES(T) USUAL_TENSOR_TYPES(T) GROUPED_TYPES(T)

// The types of this source: a group's source defines SOURCE_TYPES.
#ifdef SOURCE_TYPES
#define LOW_BIT_TYPES(T) SOURCE_TYPES(T)
#define HALVED_TYPES(T) SOURCE_TYPES(T)
#define TENSOR_TYPES(T) SOURCE_TYPES(T)
#else
#define LOW_BIT_TYPES(T) USUAL_LOW_BIT_TYPES(T)
#define HALVED_TYPES(T) USUAL_HALVED_TYPES(T)
#define TENSOR_TYPES(T) USUAL_TENSOR_TYPES(T)
#endif
