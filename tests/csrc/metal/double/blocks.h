// Blocks, as clang's -fblocks lays them out.
#pragma once

extern "C" {
void* _Block_copy(const void* block);
void _Block_release(const void* block);
}

namespace metal_double {

bool is_block_class(const void* isa);
long live_blocks();  // on the heap

}  // namespace metal_double
