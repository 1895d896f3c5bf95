// One parameter struct per kernel family, shared by MSL, C++, CUDA and (through NumPy dtypes of the same names) Python.
// Rule: every field is a 32-bit uint, int or float, so that the layout is the same under every compiler.
#pragma once

#ifdef __METAL_VERSION__
typedef uint u32;
typedef int i32;
#else
#include <cstdint>
typedef uint32_t u32;
typedef int32_t i32;
#endif

#define LINE_WORDS 32  // of the longest cache line there is, 128 bytes
#define N_CHOSEN 4

enum : u32 {
    HEAD_MULTIPLE = 4,      // head_dim is a multiple of this: heads are read as float4
    MAX_EXPERTS_USED = 32,  // experts that a row meets: a lane of a simdgroup chooses each
    STACK_MATRICES = 4,     // matrices that meet one x in one dispatch
};

// The step buffer: all that changes between two replays of a compiled plan. Another buffer holds the token ids of the
// step. Row t of a step is at position pos + t of the sequence. argmax_final, which ends a greedy plan, writes the next
// step here, so that the next replay needs nothing from the host.
struct Step {
    u32 n_tokens;  // rows of this step that are real; a plan for T rows runs with n_tokens <= T
    u32 pos;       // position of row 0: the number of tokens already in the KV cache
    u32 n_chosen;  // ids that argmax_final has stored
    u32 reserved[LINE_WORDS - 3];
    // A ring: the i-th id is chosen[i % N_CHOSEN][0]. With two steps in flight two places are in use: the host reads
    // one id while the next step writes the other. There are four for two reasons. A power of two divides 2^32, where
    // n_chosen wraps around. And a third and a fourth step could be in flight. Each place is a separate cache line, so
    // that the host never reads a line that the device writes.
    i32 chosen[N_CHOSEN][LINE_WORDS];
};

struct EmbedParams {
    u32 n_embd;
    u32 row_bytes;  // of the embedding table
    u32 n_vocab;
    u32 first;  // the token of the first row that is bound: a table larger than a buffer is bound in windows
    u32 n_rows;
    float scale;
};

struct NormParams {
    u32 n;  // row length
    float eps;
};

// mul_mv and mul_mm: Y[t, m] = sum_k W[m, k] X[t, k], W quantised and row-major, X and Y float32 and contiguous.
struct MatMulParams {
    u32 k;          // columns of W: the inner dimension
    u32 m;          // rows of W: the outputs per token
    u32 row_bytes;  // bytes from one row of W to the next
    // Floats from one token's values to the next token's, if an epilogue reads them:
    u32 residual_stride;  // m, or 0 for one vector (a bias) that is added to every token
    u32 scale_stride;     // of the factors of mix
};

// Up to STACK_MATRICES matrices that meet one x: each of the kernel's type, or f32.
struct StackParams {
    u32 k;
    u32 pair;                       // matrices 2 and 3 are gate and up, of one shape and type: out 2 = silu(gate) up
    u32 m[STACK_MATRICES];          // rows; 0 if there is no such matrix
    u32 row_bytes[STACK_MATRICES];  // bytes from one row to the next
    u32 is_f32[STACK_MATRICES];
};

// A mixture of experts: W is n_expert matrices of m rows of k columns. Every row of the step meets n_used of them.
struct MoeParams {
    u32 k;
    u32 m;
    u32 row_bytes;
    u32 expert_bytes;  // from one expert's matrix to the next
    u32 n_expert;
    u32 n_used;
};

// A mixture with a shared expert: a matrix of m rows whose width and type may differ.
struct MoeSharedParams {
    u32 k;
    u32 m;
    u32 row_bytes;
    u32 expert_bytes;
    u32 n_expert;
    u32 n_used;
    u32 k_shared;
    u32 row_bytes_shared;
};

struct TopKParams {
    u32 n_expert;    // at most the last of EXPERT_CLASSES
    u32 n_used;      // at most MAX_EXPERTS_USED
    u32 has_shared;  // 1 if there is a shared expert, else 0
    float scale;     // the sum of the experts' weights
};

// moe_mm: W is n_expert matrices of m rows of k columns. Slot t * n_used + j is row t's place for its j-th expert.
struct MoeMmParams {
    u32 k;
    u32 m;
    u32 row_bytes;
    u32 expert_bytes;  // from one expert's matrix to the next
    u32 n_expert;
    u32 x_div;  // a slot reads row slot / x_div of X: n_used if X has a row per row of the step, 1 if per slot
};

struct MoeSortParams {
    u32 n_expert;  // at most the last of EXPERT_CLASSES
    u32 n_used;
    u32 max_tiles;  // room for tiles; min(slots, ceil(slots / MOE_MM_TOKENS) + n_expert) are enough
};

struct MoeMixParams {
    u32 n;  // row length
    u32 n_used;
};

// The cache of one layer is [n_pages * KV_PAGE, n_head_kv, head_dim] for k and again for v. Page p of the sequence lies
// at pages[p]: position i is row pages[i / KV_PAGE] * KV_PAGE + i % KV_PAGE. A q8_0 cache holds blocks of 32 elements.

// Per head: optional RMSNorm of q and k, rotary embedding of q and k, then k and v into the cache.
struct RopeKvParams {
    u32 n_head;
    u32 n_head_kv;
    u32 head_dim;
    u32 q_stride;     // floats from one head of q to the next: head_dim, or more if a gate follows each head
    u32 n_rot;        // dimensions that rotate, from the first
    float eps;        // of the per-head norms
    float magnitude;  // cos and sin are multiplied by this (YaRN); 1 otherwise
};

struct AttentionParams {
    u32 n_head;
    u32 n_head_kv;
    u32 head_dim;
    u32 window;       // positions that a row sees, itself among them; 0: all
    u32 gate_stride;  // head h of row t is gated from float (t * n_head + h) * gate_stride + head_dim on; 0: no gate
    u32 n_split;      // shares of a row's keys; 1 except in attention_split and attention_merge
    float scale;      // of q·k
};

// The gated delta rule of a recurrent layer. A row of the step has `channels` = 2 n_k_head d_k + n_v_head d_v inputs:
// the heads of q, then of k, then of v. v head h uses q and k head h % n_k_head. d_k and d_v are multiples of 32.
struct SsmParams {
    u32 n_k_head;
    u32 n_v_head;  // a multiple of n_k_head
    u32 d_k;       // at most SSM_MAX_HEAD
    u32 d_v;       // at most SSM_MAX_HEAD
    u32 d_conv;    // taps of the causal convolution: 2 .. SSM_MAX_CONV
    float norm_eps;
    float l2_eps;  // q and k are divided by sqrt(|x|^2 + l2_eps)
};

struct ElementwiseParams {
    u32 n;  // elements per row
};

struct ArgmaxParams {
    u32 n;       // logits
    u32 n_part;  // partial results: threadgroups of argmax_partial
};

enum : u32 { N_CANDIDATES = 256 };

// The host's view of the logits, from which it chooses the next token. It has the largest of n logits, in any order,
// and sums over all logits. A logit that is not finite counts only in n_not_finite.
struct Candidates {
    u32 n;             // candidates: N_CANDIDATES, or all finite logits if they are fewer
    u32 n_not_finite;  // logits that are infinite or not a number
    float largest;     // the largest logit
    float sum_exp;     // of exp(x - largest): the log-sum-exp is largest + log(sum_exp)
    float sum_x_exp;   // of (x - largest) exp(x - largest), for the entropy
    float logit[N_CANDIDATES];
    i32 id[N_CANDIDATES];  // the lowest ids, if there are more equal logits than places
};

struct CandidatesParams {
    u32 n;       // logits
    u32 n_part;  // sections of the logits, each with its own Candidates
};
