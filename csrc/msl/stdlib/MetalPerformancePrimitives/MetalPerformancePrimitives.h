// The stand-in for Apple's MetalPerformancePrimitives: matmul2d of halves that lie row by row, the right ones
// transposed.
#pragma once

namespace mpp::tensor_ops {

struct matmul2d_descriptor {
    enum class mode { multiply, multiply_accumulate };
    int m, n, k;
    bool transpose_left, transpose_right, relaxed_precision;
    mode matmul_mode;

    constexpr matmul2d_descriptor(int m_, int n_, int k_, bool left = false, bool right = false, bool relaxed = false,
                                  mode mode_ = mode::multiply)
        : m(m_), n(n_), k(k_), transpose_left(left), transpose_right(right), relaxed_precision(relaxed),
          matmul_mode(mode_) {}
};

// destination[m, n] (+)= left[m, k] right[n, k]^T
template <matmul2d_descriptor D, class Scope>
struct matmul2d {
    static_assert(!D.transpose_left && D.transpose_right, "the stand-in has left and right tensors of k columns");
    using Destination = metal::shared_floats<D.m, D.n, Scope::THREADS>;

    template <class Left, class Right, class Element>
    METAL_FUNC Destination get_destination_cooperative_tensor() const {
        static_assert(metal::is_same_v<typename Left::element_type, metal::half> &&
                      metal::is_same_v<typename Right::element_type, metal::half> && metal::is_same_v<Element, float>);
        Destination made;
        for (uint i = 0; i < Destination::SHARE + 1; i++) made.elements[i] = as_type<float>(0x7fc00000u);  // as found
        return made;
    }

    template <class Left, class Right>
    METAL_FUNC void run(Left& left, Right& right, Destination& destination, MSL_SITE) const {
        metal::detail::arrive("matmul2d", file, line);
        destination.each([&](float& element, int n, int m) {
            float sum = D.matmul_mode == matmul2d_descriptor::mode::multiply ? 0.0f : element;
            for (int k = 0; k < D.k; k++) sum += float(left.get(k, m)) * float(right.get(k, n));
            element = sum;
        });
    }
};

}  // namespace mpp::tensor_ops
