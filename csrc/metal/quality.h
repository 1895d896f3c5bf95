// The priority that macOS gives this process while it works.
#pragma once

#import <Foundation/Foundation.h>
#include <pthread.h>
#include <pthread/qos.h>

#include <mutex>

#include "metal/objc.h"

namespace zinc {

// While one exists, this thread runs at the priority of work that a user waits for. At the default priority, a Mac on
// battery may choose an efficiency core for the thread, and a step waits for its commit. A priority that the thread set
// itself stays.
class Effort {
  public:
    Effort() : override_(pthread_override_qos_class_start_np(pthread_self(), QOS_CLASS_USER_INITIATED, 0)) {}
    ~Effort() {
        if (override_) pthread_override_qos_class_end_np(override_);
    }
    Effort(const Effort&) = delete;

  private:
    const pthread_override_t override_;
};

// Tells macOS between begin() and end() that a user waits, so that the process does not nap while its terminal is
// hidden. The machine may still go to sleep.
class Activity {
  public:
    ~Activity() { end(); }

    void begin() {
        const std::lock_guard lock(mutex_);
        if (token_) return;
        try {
            guarded([&] {
                token_ =
                    [NSProcessInfo.processInfo beginActivityWithOptions:NSActivityUserInitiatedAllowingIdleSystemSleep
                                                                 reason:@"zincmetal computes"];
            });
        } catch (const std::exception&) {  // work goes on without it
        }
    }

    void end() noexcept {
        const std::lock_guard lock(mutex_);
        if (!token_) return;
        try {
            guarded([&] { [NSProcessInfo.processInfo endActivity:token_]; });
        } catch (...) {  // it ends with its object
        }
        token_ = nil;
    }

  private:
    std::mutex mutex_;
    id<NSObject> token_;
};

}  // namespace zinc
