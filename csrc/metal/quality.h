// How macOS is to treat this process while it works.
#pragma once

#import <Foundation/Foundation.h>
#include <pthread.h>
#include <pthread/qos.h>

#include <mutex>

#include "metal/objc.h"

namespace zinc {

// While one exists, this thread runs at the priority of work that a user waits for: at the default, the scheduler of a
// Mac on battery may choose an efficiency core for it, and a step waits for its commit. A priority that the thread has
// asked for itself stays.
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

// Tells macOS between begin() and end() that a user waits, so that it does not let the process nap where its terminal
// is hidden. The machine may still go to sleep.
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
        } catch (const std::exception&) {  // it works without
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
