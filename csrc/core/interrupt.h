// Ctrl-C while the core works.
#pragma once

#include <pybind11/pybind11.h>

#include <ctime>

#include "core/gil.h"

namespace zinc {

// The thread that Python handles signals on, as PyThread_get_thread_ident() numbers it.
inline unsigned long main_thread() {
    namespace py = pybind11;
    return py::cast<unsigned long>(py::module_::import("threading").attr("main_thread")().attr("ident"));
}

// Lets other Python threads run for the length of a scope, as Unlocked. Its call operator listens for signals, at most
// every 50 ms, and throws the exception that a signal handler raised. Python handles signals only on the main thread.
class Interruptible {
  public:
    explicit Interruptible(unsigned long main) : listens_(PyThread_get_thread_ident() == main) {}
    Interruptible(const Interruptible&) = delete;
    Interruptible& operator=(const Interruptible&) = delete;
    ~Interruptible() { take_gil(state_); }

    bool listens() const { return listens_; }

    void operator()() {
        if (milliseconds() < next_) return;
        take_gil(state_);
        const bool raised = PyErr_CheckSignals() != 0;
        if (raised) {
            pybind11::error_already_set error;  // takes the exception while the lock is held
            state_ = PyEval_SaveThread();
            throw error;
        }
        state_ = PyEval_SaveThread();
        next_ = milliseconds() + PERIOD;
    }

  private:
    static constexpr long PERIOD = 50;

    // A clock that costs a few nanoseconds: it is read thousands of times in a step.
    static long milliseconds() {
        timespec now{};
#ifdef CLOCK_MONOTONIC_COARSE
        clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
#else
        clock_gettime(CLOCK_MONOTONIC, &now);
#endif
        return long(now.tv_sec) * 1000 + now.tv_nsec / 1000000;
    }

    PyThreadState* state_ = PyEval_SaveThread();
    const bool listens_;
    long next_ = milliseconds() + PERIOD;
};

}  // namespace zinc
