// The objects that all devices of a process on one GPU share, and the objects of each device.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>
#include <mach-o/dyld.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "metal/objc.h"
#include "metal/pipelines.h"
#include "metal/quality.h"
#include "metal/residency.h"
#include "metal/times.h"
#include "metal/portable/heartbeat.h"
#include "metal/portable/in_flight.h"

namespace zinc {

// A number of seconds from the environment.
inline double seconds_from(const char* variable, double usual) {
    const char* chosen = std::getenv(variable);
    char* end = nullptr;
    const double value = chosen ? std::strtod(chosen, &end) : usual;
    return chosen && (end == chosen || value < 0) ? usual : value;
}

// One GPU with one set of kernels: their code, and the memory that stays resident. The last device or buffer that uses
// it releases it.
class Context {
  public:
    // The context of the open devices, or a new context.
    static std::shared_ptr<Context> of(id<MTLDevice> device, const KernelChoice& choice, const Stopwatch& opening) {
        Open& open = Open::all();
        const std::lock_guard lock(open.mutex);
        std::weak_ptr<Context>& known = open.contexts[{device.registryID, choice.key()}];
        std::shared_ptr<Context> context = known.lock();
        if (!context) known = context = std::make_shared<Context>(device, choice, opening);
        return context;
    }

    Context(id<MTLDevice> device, const KernelChoice& choice, const Stopwatch& opening)
        : device(device), pipelines(device, choice, times), residency(device),
          heartbeat_(
              PERIOD, std::max(KEEP_ACTIVE, keep_), [this](double idle) { return beat(idle); }, [this] { rest(); }) {
        times.note("open the device", opening.seconds());
    }

    // A step is in flight while one exists.
    class Use {
      public:
        explicit Use(Context& context) : context_(context) {
            ++context_.n_uses_;
            context_.activity_.begin();
            if (context_.has_worked_) context_.heartbeat_.touch();
        }
        ~Use() {
            const bool last = --context_.n_uses_ == 0;
            // Only after the GPU has done some work: macOS does not release memory that was requested before.
            if (context_.has_worked_)
                context_.heartbeat_.touch();
            else if (last)
                context_.activity_.end();
        }
        Use(const Use&) = delete;
        void worked() { context_.has_worked_ = true; }

      private:
        Context& context_;
        const Effort effort_;
    };

    void count_buffer() { ++n_buffers_; }
    // Without devices there is nothing to keep.
    void forget_buffer() {
        if (--n_buffers_ == 0) heartbeat_.stop();
    }

    const id<MTLDevice> device;
    Times times;
    Pipelines pipelines;
    Residency residency;

  private:
    static constexpr double PERIOD = 0.25;     // seconds; macOS takes memory back after one second
    static constexpr double KEEP_ACTIVE = 1;   // from one step to the next of a user who waits
    static constexpr double KEEP_WIRED = 180;  // from one turn of a chat to the next

    struct Open {
        std::mutex mutex;
        std::map<std::pair<uint64_t, std::string>, std::weak_ptr<Context>> contexts;
        const OpeningProcess process;

        static Open& all() {
            static Open open;
            return open;
        }
        // If the process ends with a device open, no thread of ours may run when Metal's objects end.
        ~Open() {
            if (process.is_another()) return;
            for (auto& [key, known] : contexts)
                if (const std::shared_ptr<Context> context = known.lock()) context->heartbeat_.stop();
        }
    };

    // On the heartbeat's thread.
    bool beat(double idle) noexcept {
        const bool in_use = n_uses_ > 0;
        if (in_use) idle = 0;
        try {
            guarded([&] {
                if (idle < keep_)
                    residency.keep();
                else if (!in_use)
                    residency.let_go();
            });
        } catch (...) {  // memory that is taken back costs time, and nothing else
        }
        if (idle >= KEEP_ACTIVE) activity_.end();
        return in_use;
    }

    void rest() noexcept {
        try {
            guarded([&] { residency.let_go(); });
        } catch (...) {
        }
        activity_.end();
    }

    const double keep_ = seconds_from("ZINCMETAL_METAL_KEEP_WIRED", KEEP_WIRED);
    std::atomic<int> n_uses_{0}, n_buffers_{0};
    std::atomic<bool> has_worked_{false};
    Activity activity_;
    Heartbeat heartbeat_;
};

// The queue of one open device, and the work in flight there. The device's buffers and recordings share it.
struct Queue {
    explicit Queue(std::shared_ptr<Context> shared)
        : context(std::move(shared)), metal([context->device newCommandQueue]),
          debug(std::getenv("ZINCMETAL_METAL_DEBUG") != nullptr), in_flight(std::make_shared<InFlight>(patience())) {
        if (!metal) throw DeviceError("Metal gave no command queue on " + text(context->device.name));
        metal.label = @"zincmetal";
        context->residency.attach(metal);
    }
    ~Queue() {
        try {
            guarded([&] { context->residency.detach(metal); });
        } catch (...) {  // a destructor has nobody to tell
        }
    }
    Queue(const Queue&) = delete;

    static Patience patience() {
        const double chosen = seconds_from("ZINCMETAL_METAL_TIMEOUT", 0);
        return chosen > 0 ? Patience{chosen, true} : Patience{120, false};
    }

    const std::shared_ptr<Context> context;
    const id<MTLCommandQueue> metal;
    const bool debug;  // one encoder per dispatch, so that an error names the kernel
    const std::shared_ptr<InFlight> in_flight;
    std::atomic<uint64_t> last_copies{0};  // the last command buffer of copies; 0 if there was none
    const OpeningProcess process;
};

// macOS stops work that keeps the display waiting. It is more patient if a variable is set in the environment when the
// process makes its first device. zincmetal/watchdog.py sets that variable at import, and marks it as set.
inline std::string watchdog_words(bool driver_was_there) {
    const char* value = std::getenv("AGX_RELAX_CDM_CTXSTORE_TIMEOUT");
    if (!value) return "as macOS has it: AGX_RELAX_CDM_CTXSTORE_TIMEOUT is not set";
    const char* ours = std::getenv("ZINCMETAL_RELAXED");
    const bool set_by_us = ours && std::strcmp(ours, value) == 0;
    std::string words = std::string("AGX_RELAX_CDM_CTXSTORE_TIMEOUT=") + value;
    words += set_by_us ? " by zincmetal" : " by the user";
    if (set_by_us && driver_was_there)
        words += ", and another library had opened Metal before: without effect, if before zincmetal was imported";
    return words;
}

// True if a device was made in this process. The driver of Apple's GPUs is loaded with the first device.
inline bool driver_is_loaded() {
    for (uint32_t i = 0; i < _dyld_image_count(); ++i) {
        const char* name = _dyld_get_image_name(i);
        if (name && std::strstr(name, "/AGXMetal")) return true;
    }
    return false;
}

}  // namespace zinc
