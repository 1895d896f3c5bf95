// Tiles of mul_mm_tile.h that Metal 4's tensor operations multiply. From Apple10 (M5) on they reach matrix units that
// simdgroup matrices do not reach. All simdgroups of a threadgroup multiply a tile together, and the sums are a
// cooperative tensor: each thread has some, and only the operation knows which.
//
// Staged values lie row by row, as matmul2d takes them. The type of its operands must not be const.
#pragma once

#include "mul_mm_tile.h"

#ifdef COOPERATIVE
#include <metal_tensor>
#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>

template <uint THREADS_, uint ROWS_, uint TOKENS_, uint COLUMNS_>
struct CooperativeShape {
    typedef half T;
    typedef TensorOperations Multiplier;
    static constant constexpr uint THREADS = THREADS_, ROWS = ROWS_, TOKENS = TOKENS_, COLUMNS = COLUMNS_;
    static constant constexpr bool HALVES = true;
    static constant constexpr uint PARTS = COLUMNS / PART, RUNS = COLUMNS / RUN;
    // Sizes are in vectors of 16 bytes from here on: a run is one.
    static constant constexpr uint VECTORS = 1, STAGED = (ROWS + TOKENS) * RUNS, Y = ROWS * TOKENS / 4;
    static constant constexpr uint BUFFERS = 32 * STAGED <= MAX_TILE_BYTES ? 2 : 1;
    static constant constexpr uint SIZE = BUFFERS * STAGED > Y ? BUFFERS* STAGED : Y;
    static_assert(16 * SIZE <= MAX_TILE_BYTES, "threadgroup memory");

    // The place of a run, `run` of the step, of a row or token.
    static METAL_FUNC uint w_place(uint row, uint run) { return row * RUNS + run; }
    static METAL_FUNC uint x_place(uint token, uint run) { return (ROWS + token) * RUNS + run; }
};

typedef CooperativeShape<COOP_THREADS, COOP_ROWS, COOP_TOKENS, COOP_COLUMNS> MulMmCooperative;

typedef dextents<int, 2> Extents;  // columns, rows
typedef tensor<threadgroup half, Extents, tensor_inline> StagedTensor;
typedef tensor<threadgroup float, Extents, tensor_inline> SumsTensor;

// The product of a step: [TOKENS, COLUMNS] by [ROWS, COLUMNS] transposed, added to [TOKENS, ROWS].
template <class Shape>
using CooperativeProduct =
    mpp::tensor_ops::matmul2d<mpp::tensor_ops::matmul2d_descriptor(
                                  int(Shape::TOKENS), int(Shape::ROWS), int(Shape::COLUMNS), false, true, false,
                                  mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate),
                              execution_simdgroups<int(Shape::THREADS / SIMD)>>;

template <class Shape, class Sums>
METAL_FUNC void multiply_staged(thread Sums& sums, threadgroup uint4* staged, TensorOperations) {
    StagedTensor w((threadgroup half*)staged, Extents(Shape::COLUMNS, Shape::ROWS));
    StagedTensor x((threadgroup half*)(staged + Shape::x_place(0, 0)), Extents(Shape::COLUMNS, Shape::TOKENS));
    CooperativeProduct<Shape>().run(x, w, sums);
}
template <class Shape, class Sums>
METAL_FUNC void store_sums(thread Sums& sums, threadgroup float* y, TensorOperations) {
    SumsTensor all(y, Extents(Shape::ROWS, Shape::TOKENS));
    sums.store(all);
}

template <class Shape, class Staging>
METAL_FUNC void sum_tile(thread Staging& stage, uint k, threadgroup uint4* tile, uint, TensorOperations) {
    CooperativeProduct<Shape> product;
    auto sums = product.template get_destination_cooperative_tensor<StagedTensor, StagedTensor, float>();
    UNROLL for (ushort i = 0; i < sums.get_capacity(); i++) {
        if (sums.is_valid_element(i)) sums[i] = 0.0f;
    }
    sum_steps<Shape>(stage, k, tile, sums);
}
#endif
