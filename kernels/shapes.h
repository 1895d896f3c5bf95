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
    S(BEGIN_THREADS, 256)                                                                                              \
    S(ACCEPT_THREADS, 64)                                                                                              \
    S(EMBED_THREADS, 64)                                                                                               \
    S(EMBED_COLUMNS, 1024) /* of a threadgroup: 16 per thread */                                                       \
    S(MUL_MV_SIMDGROUPS, 2)                                                                                            \
    S(MUL_MV_TILE_SIMDGROUPS, PER_DEVICE(2, 8))  /* of types that have a tile: mul_mv_shares.h */                      \
    S(TILE_ROWS, 16)                             /* of weights in a threadgroup of these, of both matrices together */ \
    S(MUL_FEW_TILE_SIMDGROUPS, PER_DEVICE(0, 4)) /* of these types, for two rows of activations; 0: there are none */  \
    S(MUL_MV_ROWS, 2)                  /* rows of weights per simdgroup, of both matrices together for swiglu */       \
    S(FOLDED_NORMS, PER_DEVICE(1, 0))  /* 1: products of one row compute the norm that they read: bench/h200 */        \
    S(FOLDED_CHOICE, PER_DEVICE(1, 0)) /* 1: the first product of one row with its experts chooses them */             \
    S(MOE_MIX_THREADS, 128)            /* share MOE_MIX_ROWS rows of all chosen experts */                             \
    S(MOE_MIX2_THREADS, 96)            /* of moe_mv_mix with a shared expert: nine divide by three */                  \
    S(MOE_MIX_ROWS, 2)                                                                                                 \
    S(MOE_CHOOSE_THREADS, 256) /* at least, of moe_mv that chooses: each threadgroup chooses again */                  \
    S(MUL_MM_THREADS, PER_DEVICE(128, 256))                                                                            \
    S(MUL_MM_ROWS, PER_DEVICE(64, 128))   /* rows of weights per threadgroup, of both matrices together for swiglu */  \
    S(MUL_MM_TOKENS, PER_DEVICE(32, 64))  /* tokens per threadgroup */                                                 \
    S(MUL_MM_COLUMNS, PER_DEVICE(32, 64)) /* columns of either staged at a time, as halves; as floats 32 */            \
    S(MUL_MM_DEEP, PER_DEVICE(1, 4))      /* 8x8 matrices along the columns that are multiplied at a time */           \
    S(COOP_THREADS, 128)                  /* exactly, of the tiles that Metal 4's tensor operations multiply */        \
    S(COOP_ROWS, 64)                      /* as MUL_MM_ROWS */                                                         \
    S(COOP_TOKENS, 64)                    /* as MUL_MM_TOKENS; of experts MOE_MM_TOKENS */                             \
    S(COOP_COLUMNS, 32)                   /* as MUL_MM_COLUMNS */                                                      \
    S(FEW_ROWS, PER_DEVICE(16, 32))       /* rows of weights per tile of mul_few, of both matrices together */         \
    S(FEW_STACK_ROWS, 2)                  /* rows of weights per simdgroup of mul_few_stack */                         \
    S(FEW_STACK_TOKENS, PER_DEVICE(8, 2)) /* the largest class of mul_few_stack */                                     \
    S(FEW_SIMDGROUPS, 4)                  /* of a threadgroup with tiles of FEW_ROWS */                                \
    S(FEW_SMALL_ROWS, PER_DEVICE(0, 16))  /* of a tile of a small matrix, with more simdgroups; 0: there are none */   \
    S(FEW_COLUMNS, 64)                    /* staged at a time */                                                       \
    S(FEW_THREADGROUPS, PER_DEVICE(256, 512)) /* that fill a device: below, simdgroups share rows of weights */        \
    S(FEW_ANY_ROWS, PER_DEVICE(0, 1))         /* 1: mul_few of 8 and more takes any number of rows */                  \
    S(MOE_MM_THREADS, 128)                                                                                             \
    S(MOE_MM_ROWS, PER_DEVICE(64, 128)) /* as MUL_MM_ROWS */                                                           \
    S(MOE_MM_TOKENS, 32)                /* slots of an expert per threadgroup */                                       \
    S(MOE_SORT_THREADS, 512)                                                                                           \
    S(MOE_FEW_ROWS, 32)                            /* most rows of a step for moe_route and moe_few */                 \
    S(MOE_FEW_THREADGROUPS, PER_DEVICE(1024, 256)) /* that run side by side, about */                                  \
    S(MOE_FEW_TURNS, 4)                            /* shares of an expert that one of more takes, at most */           \
    S(MOE_FEW_WEIGHT_ROWS, 4)                      /* per simdgroup, of both matrices together for swiglu */           \
    S(MOE_FEW_SHARE_ROWS, 32)     /* rows of weights that simdgroups of a threadgroup take together */                 \
    S(MOE_FEW_SHARE_COLUMNS, 256) /* more columns of these are for more simdgroups */                                  \
    S(MOE_FEW_THREADS, 128)                                                                                            \
    S(MOE_ROUTE_THREADS, PER_DEVICE(512, 1024))                                                                        \
    S(SSM_STEP_LEAST_THREADS, PER_DEVICE(512, 128))                                                                    \
    S(KV_PAGE, 64)                                       /* positions in a page of the KV cache */                     \
    S(ATTENTION_DECODE_THREADS, 256)                     /* at most: any whole number of simdgroups will do */         \
    S(ATTENTION_PREFILL_THREADS, 128)                    /* exactly */                                                 \
    S(ATTENTION_PREFILL_QUERIES, PER_DEVICE(32, 64))     /* rows of the step per threadgroup */                        \
    S(ATTENTION_PREFILL_QUERIES_256, PER_DEVICE(16, 64)) /* of heads of more than 128 */                               \
    S(ATTENTION_PREFILL_QUERIES_512, PER_DEVICE(8, 32))  /* of heads of more than 256 */                               \
    S(ATTENTION_LATENT_THREADS, 256)                     /* exactly */                                                 \
    S(ATTENTION_LATENT_QUERIES, 16)                      /* heads of rows per threadgroup */                           \
    S(LATENT_MAX_ROT, 64)                                /* dimensions of latent attention that rotate */              \
    S(ATTENTION_SPLIT_KEYS, 32)                          /* in the smallest share of a row's keys */                   \
    S(SSM_MAX_HEAD, 256)                                 /* d_k and d_v */                                             \
    S(SSM_MAX_CONV, 8)                                   /* d_conv */                                                  \
    S(SSM_CONV_THREADS, 128)                             /* at most: any whole number of simdgroups will do */         \
    S(SSM_CONV_TOKENS, 16)                               /* per threadgroup */                                         \
    S(SSM_DELTA_THREADS, 128)                            /* exactly; also of mamba2_scan, as the next one */           \
    S(SSM_DELTA_FLOATS, 4096)   /* of the state per threadgroup: columns times the class of d_k */                     \
    S(SSM_DELTA_TILE, 1024)     /* floats of either vector that mamba2_scan stages at a time */                        \
    S(SSM_NORM_THREADS, 128)    /* a simdgroup per head */                                                             \
    S(SSM_STEP_THREADS, 512)    /* any whole number of simdgroups will do */                                           \
    S(MAMBA2_CONV_THREADS, 256) /* exactly: a channel each */                                                          \
    S(MAMBA2_STEP_THREADS, 256) /* any whole number of simdgroups will do */                                           \
    S(MAMBA2_NORM_THREADS, 256) /* any whole number of simdgroups will do */                                           \
    S(SHORT_CONV_TAPS, 8)       /* at most */                                                                          \
    S(SHORT_CONV_THREADS, 128)  /* exactly */                                                                          \
    S(SHORT_CONV_TOKENS, 8)     /* rows of the step per threadgroup */                                                 \
    S(NORM_THREADS, 512)        /* any whole number of simdgroups will do */                                           \
    S(NORM_KEPT, 8)             /* floats of a row that a thread keeps in registers */                                 \
    S(ELEMENTWISE_THREADS, 256)                                                                                        \
    S(ELEMENTWISE_COLUMNS, 1024) /* of a row, per threadgroup */                                                       \
    S(ARGMAX_THREADS, 256)                                                                                             \
    S(ARGMAX_COLUMNS, 4096) /* logits per threadgroup, about */                                                        \
    S(DRAW_THREADS, 512)    /* exactly */                                                                              \
    S(DRAW_COLUMNS, 4096)   /* logits per share, at most */

#define KERNEL_SHAPE_VALUE(name, value) name = value,
enum : u32 { KERNEL_SHAPES(KERNEL_SHAPE_VALUE) };

// The sizes that kernels are compiled for. A class serves all sizes up to it, and above the next smaller class.
#define HEAD_CLASSES_OF(CLASS, kv, KV) /* head_dim of attention; a multiple of HEAD_MULTIPLE */                        \
    CLASS(kv, KV, 32)                                                                                                  \
    CLASS(kv, KV, 64) CLASS(kv, KV, 96) CLASS(kv, KV, 128) CLASS(kv, KV, 256) CLASS(kv, KV, 512)
#define LATENT_CLASSES_OF(CLASS, kv, KV) CLASS(kv, KV, 128) CLASS(kv, KV, 512) /* latent dimensions of attention */
#define SSM_CLASSES(CLASS) CLASS(64) CLASS(128) CLASS(256)                     /* d_k of a recurrent layer */

// Limits that the parameters of kernels have, and the host must know.
#define KERNEL_LIMITS(S)                                                                                               \
    S(HEAD_MULTIPLE)                                                                                                   \
    S(LATENT_MULTIPLE)                                                                                                 \
    S(MAX_EXPERTS)                                                                                                     \
    S(MAX_EXPERTS_USED) S(MAX_GROUPS) S(STACK_MATRICES) S(STEP_RING) S(MAX_OUT) S(DRAW_TRIES) S(MAMBA2_HEAD_MULTIPLE)
