// Switching between stacks of one OS thread.
#pragma once

#include <cstddef>
#include <vector>

namespace zinc::msl {

struct Stack {
    char* bottom = nullptr;  // lowest usable address, above a guard page
    char* top = nullptr;
};

// Stacks that fibres take and give back; they grow in number with use and are unmapped together.
class StackPool {
  public:
    StackPool() = default;
    StackPool(const StackPool&) = delete;
    StackPool& operator=(const StackPool&) = delete;
    ~StackPool();
    Stack take();  // throws std::bad_alloc; never while fibres run after reserve()
    void give(Stack stack) { free_.push_back(stack); }
    void reserve(size_t count);  // at least so many can be taken before one comes back
    void give_all() { free_ = all_; }
    size_t size() const { return all_.size(); }

  private:
    std::vector<Stack> all_, free_;
};

// The saved stack pointer of a fibre that will run entry() on the stack when switched to. entry never returns.
void* prepare_fibre(Stack stack, void (*entry)());

}  // namespace zinc::msl

// Saves the running fibre's registers on its stack and its stack pointer in *save; goes on where `load` was saved.
extern "C" void zinc_msl_switch(void** save, void* load);
