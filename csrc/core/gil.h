// The global interpreter lock, released while the core works. It replaces pybind11's guards, which end the process if
// the interpreter ends during the work.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace zinc {

// For a thread that comes back to an interpreter which has ended, or is about to end. It must not run Python. It must
// not unwind: destructors of its callers would run Python, and C++ ends a process whose destructor does not return. So
// it waits for the end of the process.
[[noreturn]] inline void wait_for_the_end() {
    for (;;) pause();
}

// Takes the lock for a thread state. An ending interpreter makes its daemon threads exit here. glibc does that by an
// exception that nothing may catch for good, so the thread stays inside the handler.
inline void take_gil(PyThreadState* state) {
    try {
        PyEval_RestoreThread(state);
    } catch (...) {
        wait_for_the_end();
    }
}

// Lets other Python threads run for the length of a scope.
class Unlocked {
  public:
    Unlocked() : state_(PyEval_SaveThread()) {}
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;
    ~Unlocked() { take_gil(state_); }

  private:
    PyThreadState* const state_;
};

// Takes the lock for the length of a scope, on any thread; a thread that has it keeps it.
class Locked {
  public:
    Locked() {
        try {
            state_ = PyGILState_Ensure();
        } catch (...) {
            wait_for_the_end();
        }
    }
    Locked(const Locked&) = delete;
    Locked& operator=(const Locked&) = delete;
    ~Locked() { PyGILState_Release(state_); }

  private:
    PyGILState_STATE state_;
};

}  // namespace zinc
