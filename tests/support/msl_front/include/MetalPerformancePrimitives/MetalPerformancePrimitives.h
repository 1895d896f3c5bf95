// matmul2d as Apple's MPPTensorOpsMatMul2d.h declares it: operands that are not const, and lvalues.
#pragma once
#include <metal_tensor>

namespace mpp {
namespace tensor_ops {

struct matmul2d_descriptor {
    enum class mode { multiply, multiply_accumulate };
    int m, n, k;
    bool transpose_left, transpose_right, relaxed_precision;
    mode matmul_mode;
    constexpr matmul2d_descriptor(int m, int n, int k, bool left = false, bool right = false, bool relaxed = false,
                                  mode mode = mode::multiply)
        : m(m), n(n), k(k), transpose_left(left), transpose_right(right), relaxed_precision(relaxed),
          matmul_mode(mode) {}
};

template <class T>
constexpr bool is_half = false;
template <>
constexpr bool is_half<half> = true;

template <matmul2d_descriptor Descriptor, class Scope>
struct matmul2d {
    matmul2d() = default;
    template <class Left, class Right, class Element>
    metal::cooperative_tensor<Element, Left, Right> get_destination_cooperative_tensor() const {
        static_assert(is_half<typename Left::value_type> && is_half<typename Right::value_type>, "declared for halves");
        return metal::cooperative_tensor<Element, Left, Right>();
    }
    template <class Left, class Right, class Destination>
    void run(thread Left&, thread Right&, thread Destination&) const {
        metal::tensor_operation();
    }
};

}  // namespace tensor_ops
}  // namespace mpp
