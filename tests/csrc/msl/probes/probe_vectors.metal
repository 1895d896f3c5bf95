#include "probe.h"

// Every swizzle of K letters, in lexicographic order of x y z w.
#define LETTERS_1(p) READ(p##x) READ(p##y) READ(p##z) READ(p##w)
#define LETTERS_2(p) LETTERS_1(p##x) LETTERS_1(p##y) LETTERS_1(p##z) LETTERS_1(p##w)
#define LETTERS_3(p) LETTERS_2(p##x) LETTERS_2(p##y) LETTERS_2(p##z) LETTERS_2(p##w)
#define LETTERS_4(p) LETTERS_3(p##x) LETTERS_3(p##y) LETTERS_3(p##z) LETTERS_3(p##w)

template <class T>
kernel void probe_swizzle_read(constant ProbeParams& p [[buffer(0)]], device const vec<T, 4>* in [[buffer(1)]],
                               device T* out2 [[buffer(2)]], device T* out3 [[buffer(3)]],
                               device vec<T, 4>* out4 [[buffer(4)]], GRID_IDS) {
    if (tid != 0) return;
    const vec<T, 4> v = in[0];
    uint k = 0;
#define READ(word)                                                                                             \
    {                                                                                                          \
        const vec<T, 2> w = v.word;                                                                            \
        out2[k++] = w.x;                                                                                       \
        out2[k++] = w.y;                                                                                       \
    }
    LETTERS_2()
#undef READ
    k = 0;
#define READ(word)                                                                                             \
    {                                                                                                          \
        const vec<T, 3> w = v.word;                                                                            \
        out3[k++] = w.x;                                                                                       \
        out3[k++] = w.y;                                                                                       \
        out3[k++] = w.z;                                                                                       \
    }
    LETTERS_3()
#undef READ
    k = 0;
#define READ(word) out4[k++] = v.word;
    LETTERS_4()
#undef READ
}

// Each word gets the first components of b in a copy of a.
#define WRITTEN_2(W) W(xy) W(xz) W(xw) W(yx) W(yz) W(yw) W(zx) W(zy) W(zw) W(wx) W(wy) W(wz)
#define WRITTEN_3(W)                                                                                           \
    W(xyz) W(xyw) W(xzy) W(xzw) W(xwy) W(xwz) W(yxz) W(yxw) W(yzx) W(yzw) W(ywx) W(ywz) W(zxy) W(zxw) W(zyx)   \
    W(zyw) W(zwx) W(zwy) W(wxy) W(wxz) W(wyx) W(wyz) W(wzx) W(wzy)
#define WRITTEN_4(W)                                                                                           \
    W(xyzw) W(xywz) W(xzyw) W(xzwy) W(xwyz) W(xwzy) W(yxzw) W(yxwz) W(yzxw) W(yzwx) W(ywxz) W(ywzx) W(zxyw)    \
    W(zxwy) W(zyxw) W(zywx) W(zwxy) W(zwyx) W(wxyz) W(wxzy) W(wyxz) W(wyzx) W(wzxy) W(wzyx)

template <class T>
kernel void probe_swizzle_write(constant ProbeParams& p [[buffer(0)]], device const vec<T, 4>* in [[buffer(1)]],
                                device vec<T, 4>* out [[buffer(2)]], GRID_IDS) {
    if (tid != 0) return;
    const vec<T, 4> a = in[0], b = in[1];
    uint k = 0;
#define WRITE_2(word)                                                                                          \
    {                                                                                                          \
        vec<T, 4> v = a;                                                                                       \
        v.word = b.xy;                                                                                         \
        out[k++] = v;                                                                                          \
    }
#define WRITE_3(word)                                                                                          \
    {                                                                                                          \
        vec<T, 4> v = a;                                                                                       \
        v.word = b.xyz;                                                                                        \
        out[k++] = v;                                                                                          \
    }
#define WRITE_4(word)                                                                                          \
    {                                                                                                          \
        vec<T, 4> v = a;                                                                                       \
        v.word = b;                                                                                            \
        out[k++] = v;                                                                                          \
    }
    WRITTEN_2(WRITE_2)
    WRITTEN_3(WRITE_3)
    WRITTEN_4(WRITE_4)
    // The same proxy type on both sides, overlap, and operators on swizzles.
    vec<T, 4> v = a;
    v.xy = b.xy;
    out[k++] = v;
    v = a;
    v.xyzw = v.wzyx;
    out[k++] = v;
    v = a;
    v.yz += b.xy;
    out[k++] = v;
    v = a;
    v.wx *= T(2);
    out[k++] = v;
    v = a;
    v.zyx = a.xyz + b.www;
    out[k++] = v;
}

// Constructors: everything that makes (1, 2, 3, 4), then the narrower ones padded with zeros.
template <class T>
kernel void probe_construct(constant ProbeParams& p [[buffer(0)]], device vec<T, 4>* out [[buffer(1)]], GRID_IDS) {
    typedef vec<T, 2> V2;
    typedef vec<T, 3> V3;
    typedef vec<T, 4> V4;
    if (tid != 0) return;
    const V2 ab(1, 2), cd(3, 4);
    const V3 abc(1, 2, 3), bcd(2, 3, 4);
    V4 built(0);
    built.x = 1;
    built.g = 2;
    built[2] = 3;
    built.a = 4;
    packed_vec<T, 4> loose = built;
    loose[3] = T(4);
    uint k = 0;
    out[k++] = V4(1, 2, 3, 4);
    out[k++] = V4(ab, cd);
    out[k++] = V4(ab, 3, 4);
    out[k++] = V4(1, V2(2, 3), 4);
    out[k++] = V4(1, 2, cd);
    out[k++] = V4(abc, 4);
    out[k++] = V4(1, bcd);
    out[k++] = V4(abc.xy, bcd.yz);
    out[k++] = V4(int4(1, 2, 3, 4));
    out[k++] = V4(float4(1.5f, 2.5f, 3.0f, 4.0f) - float4(0.5f, 0.5f, 0.0f, 0.0f));
    out[k++] = built;
    out[k++] = loose;
    out[k++] = V4(V3(V2(1, 2), 3), 4);
    out[k++] = V4(V2(0), V2(0));
    out[k++] = 0;
}

// Reductions of vectors to numbers, and MSL's other shapes of arguments.
kernel void probe_geometry(constant ProbeParams& p [[buffer(0)]], device const float3* in [[buffer(1)]],
                           device float* out [[buffer(2)]], GRID_IDS) {
    if (tid != 0) return;
    const float3 a = in[0], b = in[1];
    const float4 wide = float4(a, 1.0f);
    uint k = 0;
    out[k++] = dot(a, b);
    out[k++] = dot(wide.xy, b.yz);
    out[k++] = length(a);
    out[k++] = length_squared(b);
    out[k++] = distance(a, b);
    const float3 c = cross(a, b), n = normalize(a), m = max(a, 0.25f), q = clamp(b, -0.5f, 0.5f);
    out[k++] = c.x;
    out[k++] = c.y;
    out[k++] = c.z;
    out[k++] = n.x;
    out[k++] = n.y;
    out[k++] = n.z;
    out[k++] = m.x;
    out[k++] = m.y;
    out[k++] = m.z;
    out[k++] = q.x;
    out[k++] = q.y;
    out[k++] = q.z;
    out[k++] = all(a == a) ? 1.0f : 0.0f;
    out[k++] = any(a != a) ? 1.0f : 0.0f;
    out[k++] = as_type<float>(as_type<uint>(a.x) ^ 0x80000000u);
    out[k++] = float(as_type<ushort2>(a.y).x) + float(as_type<ushort2>(a.y).y) * 65536.0f;
    out[k++] = float(as_type<uchar4>(0x04030201u).z);
    out[k++] = float(mulhi(0x80000000u, 6u)) + float(mulhi(-1, 5));
    out[k++] = smoothstep(0.0f, 2.0f, 0.5f) + ldexp(1.5f, 3);
    out[k++] = float(sizeof(float3)) + 100.0f * float(alignof(half4)) + 10000.0f * float(sizeof(packed_float3));
}

KERNEL("probe_swizzle_read_float", probe_swizzle_read<float>)
KERNEL("probe_swizzle_read_half", probe_swizzle_read<half>)
KERNEL("probe_swizzle_read_uchar", probe_swizzle_read<uchar>)
KERNEL("probe_swizzle_write_float", probe_swizzle_write<float>)
KERNEL("probe_swizzle_write_half", probe_swizzle_write<half>)
KERNEL("probe_swizzle_write_int", probe_swizzle_write<int>)
KERNEL("probe_construct_float", probe_construct<float>)
KERNEL("probe_construct_half", probe_construct<half>)
KERNEL("probe_construct_bfloat", probe_construct<bfloat>)
KERNEL("probe_construct_ushort", probe_construct<ushort>)
KERNEL("probe_construct_long", probe_construct<long>)
KERNEL("probe_geometry", probe_geometry)
