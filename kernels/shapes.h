// The division of kernels' work. The host launches by these numbers: it reads this list, by name.
#pragma once

#include "params.h"

// The value for Apple's GPUs and the CPU, then the value for NVIDIA's: each kind of GPU has its own best sizes.
#if defined(__CUDACC__) || defined(ZINC_CUDA)
#define PER_DEVICE(apple, nvidia) nvidia
#else
#define PER_DEVICE(apple, nvidia) apple
#endif

#define KERNEL_SHAPES(S)                                                                                               \
    S(EMBED_THREADS, 64)                                                                                               \
    S(EMBED_COLUMNS, 1024) /* of a threadgroup: 16 per thread */                                                       \
    S(MUL_MV_SIMDGROUPS, 2)                                                                                            \
    S(MUL_MV_ROWS, 2)       /* rows of weights per simdgroup, of both matrices together for swiglu */                  \
    S(MOE_MIX_THREADS, 128) /* share MOE_MIX_ROWS rows of all chosen experts */                                        \
    S(MOE_MIX2_THREADS, 96) /* the same, with a shared expert: nine divide by three */                                 \
    S(MOE_MIX_ROWS, 2)                                                                                                 \
    S(MUL_MM_THREADS, 128)                                                                                             \
    S(MUL_MM_ROWS, 64)                    /* rows of weights per threadgroup, of both matrices together for swiglu */  \
    S(MUL_MM_TOKENS, PER_DEVICE(32, 64))  /* tokens per threadgroup */                                                 \
    S(MUL_MM_COLUMNS, PER_DEVICE(32, 64)) /* columns of either staged at a time */                                     \
    S(MOE_MM_TOKENS, 32)                  /* slots of an expert per threadgroup */                                     \
    S(MOE_SORT_THREADS, 512)                                                                                           \
    S(KV_PAGE, 64)                       /* positions in a page of the KV cache */                                     \
    S(ATTENTION_DECODE_THREADS, 256)     /* at most: any whole number of simdgroups will do */                         \
    S(ATTENTION_PREFILL_THREADS, 128)    /* exactly */                                                                 \
    S(ATTENTION_PREFILL_QUERIES, 32)     /* rows of the step per threadgroup */                                        \
    S(ATTENTION_PREFILL_QUERIES_256, 16) /* the same, of heads of more than 128 */                                     \
    S(ATTENTION_SPLIT_KEYS, 32)          /* in the smallest part of a row's keys */                                    \
    S(SSM_MAX_HEAD, 256)                 /* d_k and d_v */                                                             \
    S(SSM_MAX_CONV, 8)                   /* d_conv */                                                                  \
    S(SSM_CONV_THREADS, 128)             /* at most: any whole number of simdgroups will do */                         \
    S(SSM_CONV_TOKENS, 16)               /* per threadgroup */                                                         \
    S(SSM_DELTA_THREADS, 128)            /* exactly */                                                                 \
    S(SSM_DELTA_FLOATS, 4096)            /* of the state per threadgroup: columns times the class of d_k */            \
    S(SSM_DELTA_TILE, 1024)              /* floats of q, and of k, that a threadgroup stages at a time */              \
    S(SSM_NORM_THREADS, 128)             /* a simdgroup per head */                                                    \
    S(SSM_STEP_THREADS, 512)             /* any whole number of simdgroups will do */                                  \
    S(NORM_THREADS, 512)                 /* any whole number of simdgroups will do */                                  \
    S(NORM_KEPT, 8)                      /* floats of a row that a thread keeps in registers */                        \
    S(ELEMENTWISE_THREADS, 256)                                                                                        \
    S(ELEMENTWISE_COLUMNS, 1024) /* of a row, per threadgroup */                                                       \
    S(ARGMAX_THREADS, 256)                                                                                             \
    S(ARGMAX_COLUMNS, 4096) /* logits per threadgroup, about */                                                        \
    S(CANDIDATES_THREADS, 256)                                                                                         \
    S(CANDIDATES_FINAL_THREADS, 512)                                                                                   \
    S(CANDIDATES_COLUMNS, 4096) /* logits per part, about */

#define KERNEL_SHAPE_VALUE(name, value) name = value,
enum : u32 { KERNEL_SHAPES(KERNEL_SHAPE_VALUE) };

// The sizes that kernels are compiled for. A class serves all sizes up to it, and above the next smaller class.
#define HEAD_CLASSES_OF(CLASS, kv, KV) /* head_dim of attention; a multiple of HEAD_MULTIPLE */                        \
    CLASS(kv, KV, 32) CLASS(kv, KV, 64) CLASS(kv, KV, 96) CLASS(kv, KV, 128) CLASS(kv, KV, 256)
#define SSM_CLASSES(CLASS) CLASS(64) CLASS(128) CLASS(256) /* d_k of a recurrent layer */
#define EXPERT_CLASSES(CLASS) CLASS(256) CLASS(1024)       /* experts that moe_topk chooses among */

// Limits that the parameters of kernels have, and the host must know.
#define KERNEL_LIMITS(S) S(HEAD_MULTIPLE) S(MAX_EXPERTS_USED) S(STACK_MATRICES)
