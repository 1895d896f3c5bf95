// The backend under a poll that ends a call: what an interrupt of the keyboard does, without a keyboard.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>

#include "conditions.h"
#include "core/device.h"
#include "params.h"

using namespace zinc;

namespace {

constexpr uint32_t N = 256;

// Steps that each add 1 to what the step before left, one dispatch after another.
struct Sum {
    explicit Sum(uint32_t n_dispatches) {
        const auto of = [&](float value) {
            auto buffer = device->alloc(N * sizeof(float));
            for (uint32_t i = 0; i < N; i++) buffer->write(i * sizeof(float), &value, sizeof(value));
            return buffer;
        };
        auto step = device->alloc(sizeof(Step)), one = of(1);
        Step one_token{};
        one_token.n_tokens = 1;
        step->write(0, &one_token, sizeof(one_token));
        out = of(0);
        Dispatch d;
        d.pipeline = device->pipeline("add");
        const ElementwiseParams params = {u32(N)};
        d.params.resize(sizeof(params));
        std::memcpy(d.params.data(), &params, sizeof(params));
        const size_t bytes = N * sizeof(float);
        d.bindings = {{step, 0, sizeof(Step)}, {out, 0, bytes}, {one, 0, bytes}, {out, 0, bytes}};
        d.threads = 64;
        d.barrier = true;
        recording = device->record({n_dispatches, d});
    }
    float value() const {
        float first;
        out->read(0, &first, sizeof(first));
        return first;
    }

    std::unique_ptr<Device> device = open_device({0, true, std::getenv("DOUBLE_KERNELS")});
    std::shared_ptr<Buffer> out;
    std::unique_ptr<Recording> recording;
};

struct Interrupt {};

Poll after(int n, int& asked) {
    return [n, &asked] {
        if (++asked >= n) throw Interrupt();
    };
}

bool is_interrupted(const std::function<void()>& call) {
    try {
        call();
        return false;
    } catch (const Interrupt&) {
        return true;
    }
}

}  // namespace

// Prints what an interrupt between command buffers leaves, what one of a wait does, and that the device goes on.
extern "C" __attribute__((visibility("default"))) void metal_double_interrupt() {
    constexpr uint32_t n_dispatches = 40;
    Sum sum(n_dispatches);
    Device& device = *sum.device;
    metal_double_set("pace=50000");
    for (int i = 0; i < 3; i++) device.wait(device.submit(*sum.recording));  // now it is known how long they take
    const float whole = sum.value();
    int asked = 0;
    const bool of_submit = is_interrupted([&] { device.submit(*sum.recording, after(3, asked)); });
    const float done = sum.value() - whole;
    std::printf("submit %d, some %d, ", of_submit, done > 0 && done < n_dispatches);

    metal_double_set("pace=;slow=300");
    Sum other(1);
    const uint64_t first = other.device->submit(*other.recording);
    other.device->submit(*other.recording);
    asked = 0;
    const bool of_wait = is_interrupted([&] { other.device->wait(first, after(1, asked)); });
    std::printf("wait %d, both ended %d, ", of_wait, other.value() == 2);

    metal_double_set("");
    const float before = sum.value();
    device.wait(device.submit(*sum.recording));
    std::printf("goes on %d\n", sum.value() == before + n_dispatches);
    std::fflush(stdout);
}
