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

enum : u32 {
    HEAD_MULTIPLE = 4,      // head_dim is a multiple of this: heads are read as float4
    MAX_EXPERTS = 1024,     // experts of a mixture: a simdgroup has a bit for each in its lanes' words
    MAX_EXPERTS_USED = 32,  // experts that a row meets: a lane of a simdgroup chooses each
    MAX_GROUPS = 32,        // groups of experts: a lane keeps the key of each
    STACK_MATRICES = 4,     // matrices that meet one x in one dispatch
    STEP_RING = 4,          // places for descriptions and results of steps: more than steps can be in flight
    LATENT_MULTIPLE = 32,   // the parts of a row of latent attention are multiples of this
    MAX_OUT = 64,           // outputs of a step: rows whose logits are wanted
};

// ---- A step: T rows, each of a sequence, at a position
// ---------------------------------------------------------------
//
// A compiled plan never changes. What changes from step to step stands in buffers that kernels read: step, rows,
// tokens, out_rows, pages and draws. The host describes step number n in place n % STEP_RING of the buffers next_step,
// next_rows, next_outs, next_pages and next_draws, which it shares with the device. The kernel begin_step, the first of
// every plan, copies that place to the buffers that the other kernels read. So the host may describe and submit a step
// while the step before it runs.
//
// Rows of one sequence at consecutive positions lie side by side: a run. Runs of one row come first.

struct Step {
    u32 n_tokens;       // rows that are real; a plan for T rows runs with n_tokens <= T
    u32 n_single;       // of these, from the first on: runs of one row
    u32 n_out;          // outputs: output i is the logits of row out_rows[i]
    u32 n_page_writes;  // entries of next_pages
    u32 number;         // of this step; begin_step counts it
    u32 reserved[3];
};

struct Row {
    u32 pos;       // position in its sequence
    u32 begin;     // the first row of its run
    u32 end;       // the row after the last of its run
    u32 pages;     // where the page table of its sequence begins in the buffer `pages`
    u32 slot;      // state slot that its run begins with; of no meaning at position 0, where states are zero
    u32 slot_out;  // state slot that takes the state at the end of its run; may be `slot`
    i32 token;     // the id; or -1 - i: the id that output i of the step before has chosen
    // Tokens of the draft after that output i, which the step before verifies, or 0. This row, a run of its own, is as
    // many positions and outputs later as are accepted.
    u32 drafted;
};

// Makes entry `at` of the buffer `pages` the page `page`.
struct PageWrite {
    u32 at;
    u32 page;
};

struct BeginParams {
    u32 max_rows;         // places of next_rows, by place of the ring
    u32 max_page_writes;  // of next_pages
};

// The result of an output: place n % STEP_RING of the buffer `results`, [STEP_RING, MAX_OUT], which the host reads.
struct Choice {
    i32 id;            // the chosen token; -1 if no logit allows a choice
    u32 n_not_finite;  // logits that are infinite or not a number: then there is no id
    float logprob;     // log-probability of the id under the logits as they are, if the plan computes it
    u32 flags;         // CHOICE_*
    u32 accepted;      // of the rows after the output's, in its run: those before the first whose token is not the one
                       // that was drawn in its place. A plan that verifies drafts counts them; 0 in others
};

struct AcceptParams {
    u32 outs;  // the most outputs of the plan
};

struct EmbedParams {
    u32 n_embd;
    u32 row_bytes;  // of the embedding table
    u32 n_vocab;
    u32 first;  // the token of the first row that is bound: a table larger than a buffer is bound in windows
    u32 n_rows;
    float scale;
};

// Norms of vectors: `groups` of them, side by side, are a row of the step.
struct NormParams {
    u32 n;         // length of a vector
    u32 groups;    // at least 1
    u32 weighted;  // 1: the normalised vector is multiplied by a weight [n]
    u32 scaled;    // 1: the sum with the residual is multiplied by a weight [1]
    float eps;
    float next_eps;  // of the norm of that sum
    float scale;     // the normalised vector is multiplied by this
};

// mul_mv, mul_few and mul_mm: Y[t, m] = sum_k W[m, k] X[t, k], W quantised and row-major, X and Y float32 and
// contiguous.
struct MatMulParams {
    u32 k;          // columns of W: the inner dimension
    u32 m;          // rows of W: the outputs per token
    u32 row_bytes;  // bytes from one row of W to the next
    // Floats from one token's values to the next token's, if an epilogue reads them:
    u32 residual_stride;  // m, or 0 for one vector (a bias) that is added to every token
    u32 scale_stride;     // of the factors of mix
    u32 has_bias;         // of mul_mv_add: 1: m biases are added, too
    u32 normed;           // of one row: 1: X stands for its RMSNorm, with a weight [k]
    float eps;            // of the norm
};

enum : u32 { FEW_STORE, FEW_ADD, FEW_MIX, FEW_SILU = 0, FEW_GELU };  // what mul_few does with its products

struct MulFewParams {
    u32 k;
    u32 m;
    u32 row_bytes;
    u32 residual_stride;  // as in MatMulParams
    u32 scale_stride;
    u32 kind;     // FEW_STORE, FEW_ADD or FEW_MIX; of mul_few_gated FEW_SILU or FEW_GELU
    u32 k_split;  // simdgroups that share the columns of a row: a divisor of those of a threadgroup
    u32 rows;     // of X and Y, at most the kernel's class; fewer than the tokens of a step if they are its outputs
};

// Up to STACK_MATRICES matrices that meet one x: each of the kernel's type, or f32.
struct StackParams {
    u32 k;
    u32 pair;                       // matrices 2 and 3 are gate and up, of one shape and type: out 2 = silu(gate) up
    u32 m[STACK_MATRICES];          // rows; 0 if there is no matrix i
    u32 row_bytes[STACK_MATRICES];  // bytes from one row to the next
    u32 is_f32[STACK_MATRICES];
    u32 has_bias;  // 1: a bias is added to the products of each matrix, m[i] of them; there is no pair then
    u32 normed;    // as in MatMulParams
    float eps;
};

enum : u32 {
    EXPERT_STORE = 0,    // what the kernels of one matrix do with a product: store it,
    EXPERT_RELU2 = 1,    // or max(it, 0)^2
    EXPERT_SILU = 0,     // what the kernels of gate and up do: silu(gate) up,
    EXPERT_GELU = 1,     // gelu(gate) up,
    EXPERT_CLAMPED = 2,  // or the clamped SwiGLU of gpt-oss
};

// A mixture of experts: W is n_expert matrices of m rows of k columns. Every row of the step meets n_used of them.
struct MoeParams {
    u32 k;
    u32 m;
    u32 row_bytes;
    u32 expert_bytes;  // from one expert's matrix to the next
    u32 n_expert;
    u32 n_used;
    u32 kind;      // EXPERT_*
    u32 has_bias;  // 1: every expert has m biases for each matrix
    u32 alone;     // 1: the sum of moe_mv_mix has no residual
    u32 normed;    // of the others: as in MatMulParams
    float eps;
};

// A mixture with a shared expert: a matrix of m rows whose width and type may differ.
struct MoeSharedParams {
    u32 k;
    u32 m;
    u32 row_bytes;
    u32 expert_bytes;
    u32 n_expert;
    u32 n_used;
    u32 has_bias;  // of the routed experts
    u32 k_shared;
    u32 row_bytes_shared;
};

enum : u32 {
    SCORE_LOGIT = 0,  // an expert's score is its logit, and the weights are a softmax over the chosen
    SCORE_SOFTMAX,    // the score, and the weight, is the expert's share of a softmax over all
    SCORE_SIGMOID,    // or the sigmoid of its logit
};
enum : u32 { SHARED_NONE, SHARED_GATED, SHARED_WHOLE };  // the shared expert's weight: 0, the sigmoid of a logit, 1

// The choice of experts: the n_used with the largest scores, or sums of score and bias.
struct TopKParams {
    u32 n_expert;      // at most MAX_EXPERTS
    u32 n_used;        // at most MAX_EXPERTS_USED
    u32 shared;        // SHARED_*
    u32 score;         // SCORE_*
    u32 normalised;    // 1: the weights are divided by their sum
    u32 has_bias;      // 1: every expert has a bias, for the choice only
    u32 has_scales;    // 1: every expert has a scale, a factor of its weight
    u32 n_group;       // groups of experts that follow each other, at most MAX_GROUPS; 1: no groups
    u32 n_group_used;  // experts of these groups are chosen: those with the largest sums of their two best
    float scale;       // factor of all weights
};

// moe_mv and moe_mv_gated: products with experts that are given, or that the kernel chooses first.
struct MoeMvParams {
    MoeParams experts;
    TopKParams choice;  // n_used is 0 if the experts are given
};

// moe_mm: W is n_expert matrices of m rows of k columns. Slot t * n_used + j is row t's place for its j-th expert.
struct MoeMmParams {
    u32 k;
    u32 m;
    u32 row_bytes;
    u32 expert_bytes;  // from one expert's matrix to the next
    u32 n_expert;
    u32 x_div;  // a slot reads row slot / x_div of X: n_used if X has a row per row of the step, 1 if per slot
    u32 kind;   // EXPERT_*
    u32 has_bias;
};

struct MoeSortParams {
    u32 n_expert;  // at most MAX_EXPERTS
    u32 n_used;
    u32 max_tiles;  // room for tiles; min(slots, ceil(slots / MOE_MM_TOKENS) + n_expert) are enough
};

struct MoeMixParams {
    u32 n;  // row length
    u32 n_used;
    u32 alone;  // 1: there is no residual
};

// The cache of one layer is [n_pages * KV_PAGE, n_head_kv, head_dim] for k and again for v, for all sequences. The page
// table of row t begins at table = pages + rows[t].pages: position i of its sequence is row table[i / KV_PAGE] *
// KV_PAGE
// + i % KV_PAGE. The buffer `history` has the token ids at the same places, i32 [n_pages * KV_PAGE]. A q8_0 cache holds
// blocks of 32 elements.

// Per head: optional RMSNorm of q and k, rotary embedding of q and k, then k and v into the cache.
struct RopeKvParams {
    u32 n_head;
    u32 n_head_kv;  // 0: only q is rotated, and no cache is written
    u32 head_dim;
    u32 q_stride;     // floats from one head of q to the next: head_dim, or more if a gate follows each head
    u32 n_rot;        // dimensions that rotate, from the first
    u32 v_norm;       // 1: each head of v is normalised, without a weight
    float eps;        // of the per-head norms
    float magnitude;  // cos and sin are multiplied by this (YaRN); 1 otherwise
    // q is multiplied by 1 + temperature ln(1 + floor(position / temperature_length)); 0: it is not
    float temperature;
    u32 temperature_length;
};

struct AttentionParams {
    u32 n_head;
    u32 n_head_kv;
    u32 head_dim;
    u32 window;       // positions that a row sees, itself among them; 0: all
    u32 gate_stride;  // floats from the gate of one head to the next: the last head_dim of them gate it; 0: no gate
    u32 n_split;      // shares of a row's keys; 1 except in attention_split and attention_merge
    u32 singles;      // 1: attention_decode takes only the first n_single rows, attention_prefill only the others
    u32 both_ways;    // 1: a row sees the later positions of its run too, and a window reaches half of it to each side
    u32 has_sinks;    // 1: a head has a sink: a score with no value, which takes a share of the softmax
    float scale;      // of q·k
};

// Latent attention. The cache of a layer is [n_pages * KV_PAGE, latent + n_rot]: a row for all heads.
struct LatentParams {
    u32 n_head;
    u32 latent;   // a multiple of LATENT_MULTIPLE
    u32 n_rot;    // the same, at most LATENT_MAX_ROT
    u32 n_split;  // shares of a row's keys; 1 except in attention_latent_split
    float scale;  // of q·k
};

struct RopeLatentParams {
    u32 n_head;
    u32 n_still;  // dimensions of a query head that do not rotate
    u32 latent;
    u32 n_rot;
    float eps;        // of the norm of the latent vector
    float magnitude;  // this and the others as in RopeKvParams
    float temperature;
    u32 temperature_length;
};

// mul_heads: out[t, h, m] = sum_k W[h, m, k] x[t, h, k]
struct HeadsParams {
    u32 k;
    u32 m;
    u32 row_bytes;
    u32 head_bytes;  // from one head's matrix to the next
    u32 n_head;
};

// The gated delta rule of a recurrent layer. A row of the step has `channels` = 2 n_k_head d_k + n_v_head d_v inputs:
// the heads of q, then of k, then of v. v head h uses q and k head h / repeat % n_k_head. d_k and d_v are multiples of
// 32. The alphas, and the betas, of a row lie in n_v_head / repeat groups, gate_step floats from one group to the next.
struct SsmParams {
    u32 n_k_head;
    u32 n_v_head;   // a multiple of n_k_head
    u32 repeat;     // v heads side by side with one k head: 1, or n_v_head / n_k_head
    u32 gate_step;  // repeat, or more if betas lie between the alphas
    u32 d_k;        // at most SSM_MAX_HEAD
    u32 d_v;        // at most SSM_MAX_HEAD
    u32 d_conv;     // taps of the causal convolution: 2 .. SSM_MAX_CONV
    float norm_eps;
    float l2_eps;  // q and k are divided by sqrt(|x|^2 + l2_eps)
};

enum : u32 { MAMBA2_HEAD_MULTIPLE = 16 };  // d_head is a multiple of this: a simdgroup's columns, a vector's lanes

// A Mamba2 layer. A row of the step has inputs [z | x | B | C | dt]: z and x of n_head heads of d_head, B and C of
// n_group groups of d_state, dt of each head. x, B and C are the channels of the convolution. Head h uses group h /
// (n_head / n_group).
struct Mamba2Params {
    u32 n_head;  // a multiple of n_group
    u32 n_group;
    u32 d_head;   // a multiple of MAMBA2_HEAD_MULTIPLE, at most SSM_MAX_HEAD
    u32 d_state;  // a multiple of 32, at most SSM_MAX_HEAD
    u32 d_conv;   // taps of the causal convolution: 2 .. SSM_MAX_CONV
    float norm_eps;
};

struct ShortConvParams {
    u32 n;     // channels
    u32 taps;  // of the convolution: 2 .. SHORT_CONV_TAPS
};

struct ElementwiseParams {
    u32 n;  // elements per row
};

// Rows of n elements beside longer rows, of which n elements are taken.
struct SliceParams {
    u32 n;
    u32 stride;  // elements from one of the longer rows to the next
};

struct LogitParams {
    u32 n;        // logits of an output
    float scale;  // x = logit * scale, then cap * tanh(x / cap) if there is a cap
    float cap;    // 0: none
};

struct ArgmaxParams {
    u32 n;       // logits
    u32 n_part;  // partial results: threadgroups of argmax_partial
};

// ---- Draws ----------------------------------------------------------------------------------------------------------

enum : u32 {
    CHOICE_FORBIDDEN = 1,  // Choice.flags: no token is left to choose
    DRAW_KEPT = 64,        // the largest logits of a share of them
    DRAW_TRIES = 3,        // launches of draw_try in a plan
    MAX_LOGPROBS = 20,     // ranked tokens of a Logprobs
};

// How the token after an output is drawn. Fields mean what SamplingParams says; `Sampler` is the reference.
struct Draw {
    float temperature;  // 0: the most probable token
    u32 top_k;          // 0: off
    float top_p;
    float min_p;
    float typical_p;
    float repeat_penalty;
    float presence_penalty;
    float frequency_penalty;
    u32 repeat_last_n;  // tokens that the penalties count; 0: none
    u32 key_low;        // the key of the draw's noise (sampling/noise.py), 64 bits
    u32 key_high;
    u32 bias_at;  // entries of the buffer `biases`, from this one on
    u32 n_bias;
    u32 mask_at;     // word of the buffer `masks` where the bits of the allowed tokens begin, if has_mask
    u32 has_mask;    // 1: tokens whose bit is 0 are forbidden
    u32 n_logprobs;  // ranked tokens whose log-probabilities are wanted, at most MAX_LOGPROBS
    u32 pos;         // position of the row that the output belongs to
    u32 pages;       // its page table
    u32 reserved[2];
};

struct Bias {
    i32 id;
    float value;
};

// The most probable tokens of an output, from its logits as they are: place n % STEP_RING of the buffer `logprobs`,
// [STEP_RING, MAX_OUT], which the host reads.
struct Logprobs {
    u32 n;
    u32 reserved;
    i32 id[MAX_LOGPROBS];
    float logprob[MAX_LOGPROBS];
};

struct DrawParams {
    u32 n;       // logits
    u32 n_part;  // shares of the logits
    u32 tried;   // launches of draw_try before this one
};

// The largest of some logits, in any order. Every other one ranks at or below `floor`. A logit's rank is its sort key,
// then the complement of its id.
struct DrawKept {
    u32 n;
    u32 floor_key;
    u32 floor_id;
    u32 key[DRAW_KEPT];
    u32 id[DRAW_KEPT];
};

// What draw_scan finds in a share of an output's logits.
struct DrawPart {
    u32 n_not_finite;      // of the logits as they are
    float before_largest;  // of the logits as they are; log-probabilities need them
    float before_sum;
    u32 n;          // logits that allow a choice, after the changes
    float largest;  // of these
    float sum_exp;  // of exp(x - largest)
    float sum_x_exp;
    u32 best_key;  // the token with the best score, if there are no filters
    u32 best_id;
    DrawKept kept;
    DrawKept before;  // of the logits as they are, if they change and log-probabilities are wanted
};

enum : u32 {
    DRAW_DONE = 0,          // the token is chosen
    DRAW_BY_RANK = 1,       // of the tokens in the order of their ranks, the first ones are left
    DRAW_BY_SURPRISAL = 2,  // of the tokens in the order of typical-p, the first ones are left
    DRAW_OPEN = 3,          // draw_finish finds out which tokens are left
};

// How far the draw of an output has come.
struct DrawState {
    u32 mode;     // DRAW_DONE ..
    u32 try_key;  // the sort key of the token that is tried; 0 if there is none yet
    u32 try_id;
    u32 most;       // tokens that are left, by rank
    float wanted;   // tokens are left until their weights sum up to this
    float largest;  // logit; weights are exp(x - largest)
    float least;    // x - largest of tokens that are left
    float log_sum;  // of all weights
    float entropy;
    float log_sum_exp;  // of the logits as they are
};

// A share of the logits, seen from the token that is tried.
struct DrawTry {
    u32 n;           // tokens before it
    float sum;       // their weights
    u32 best_score;  // the sort key of the best score among them; 0 if there is none
    u32 best_key;
    u32 best_id;
};
