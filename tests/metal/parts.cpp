// Drives the parts of the Metal backend that need no Metal. One command per run; the Python tests read what it prints.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>
#include <thread>

#include "metal_in_flight.h"
#include "metal_launches.h"
#include "metal_rules.h"
#include "metal_source.h"

using namespace zinc;

namespace {

using Arguments = std::vector<std::string>;

std::shared_ptr<Pipeline> pipeline_named(const std::string& name, uint32_t max_threads = 1024) {
    auto pipeline = std::make_shared<Pipeline>();
    pipeline->name = name;
    pipeline->limits = {max_threads, 32, 0};
    return pipeline;
}

std::shared_ptr<Buffer> buffer_of(size_t bytes) {
    auto buffer = std::make_shared<Buffer>();
    buffer->bytes = bytes;
    return buffer;
}

void flatten(const Arguments& a) { std::cout << SourceFlattener(a.at(0)).flatten(a.at(1)); }

// A dispatch of a kernel with parameters of 8 bytes and one buffer of 4-byte elements, changed by name=value.
void dispatch(const Arguments& a) {
    Dispatch d;
    d.pipeline = pipeline_named("k", 512);
    d.params.resize(8);
    d.threads = 64;
    d.bindings = {{buffer_of(4096), 0, 4096}};
    for (const std::string& change : a) {
        const size_t equal = change.find('=');
        const std::string name = change.substr(0, equal);
        const unsigned long value = std::stoul(change.substr(equal + 1));
        if (name == "threads") d.threads = static_cast<uint32_t>(value);
        if (name == "grid_y") d.grid[1] = static_cast<uint32_t>(value);
        if (name == "params") d.params.resize(value);
        if (name == "offset") d.bindings[0].offset = value;
        if (name == "bytes") d.bindings[0].bytes = value;
        if (name == "buffers") d.bindings.resize(value, d.bindings[0]);
        if (name == "unset") d.bindings[0].buffer.reset();
        if (name == "no_kernel") d.pipeline.reset();
    }
    check_dispatch(d, {{"p", 0, 4, 8}, {"x", 1, 4, 4}}, 7);
}

void wrap(const Arguments& a) {
    check_wrap(reinterpret_cast<void*>(std::stoul(a.at(0))), std::stoul(a.at(1)), 16384, 1 << 20);
}

// domain(0|1) code description [label state]...
void failure(const Arguments& a) {
    std::vector<EncoderEnd> ends;
    for (size_t i = 3; i + 1 < a.size(); i += 2) ends.push_back({a[i], std::stol(a[i + 1])});
    std::cout << command_buffer_failure(a.at(0) == "1", std::stol(a.at(1)), a.at(2), ends);
}

// name, then "source.metal: words" of what does not compile, or names of kernels.
void missing(const Arguments& a) {
    Arguments names;
    std::map<std::string, std::string> broken;
    for (size_t i = 1; i < a.size(); ++i) {
        const size_t colon = a[i].find(": ");
        if (colon == std::string::npos)
            names.push_back(a[i]);
        else
            broken[a[i].substr(0, colon)] = a[i].substr(colon + 2);
    }
    std::cout << missing_kernel_text(a.at(0), names, broken);
}

// encoding(concurrent|serial) each(0|1), then dispatches like "kernel:0+16,1+0" (buffer number + offset), "!" first for
// a barrier. Prints one line for each call to the encoder.
void launches(const Arguments& a) {
    std::vector<std::shared_ptr<Pipeline>> pipelines;
    std::vector<std::shared_ptr<Buffer>> buffers;
    for (int i = 0; i < 10; ++i) buffers.push_back(buffer_of(1024));
    std::vector<Dispatch> dispatches;
    for (size_t i = 2; i < a.size(); ++i) {
        Dispatch d;
        d.barrier = a[i][0] == '!';
        std::istringstream in(a[i].substr(d.barrier));
        std::string name, binding;
        std::getline(in, name, ':');
        for (const auto& p : pipelines)
            if (p->name == name) d.pipeline = p;
        if (!d.pipeline) pipelines.push_back(d.pipeline = pipeline_named(name));
        while (std::getline(in, binding, ',')) {
            d.bindings.push_back({buffers.at(binding[0] - '0'), std::stoul(binding.substr(2)), 0});
        }
        dispatches.push_back(d);
    }
    const Encoding encoding = a.at(0) == "serial" ? Encoding::serial : Encoding::concurrent;
    for (const Launch& launch : launches_of(dispatches, encoding, a.at(1) == "1")) {
        if (launch.new_encoder) std::puts("encoder");
        if (launch.barrier) std::puts("barrier");
        if (launch.new_pipeline) std::printf("pipeline %s\n", launch.dispatch->pipeline->name.c_str());
        for (const Bind& bind : launch.binds) {
            std::printf("%s %u+%u\n", bind.buffer ? "buffer" : "offset", bind.index, unsigned(bind.offset));
        }
        std::puts("dispatch");
    }
}

std::string caught(const std::function<void()>& body) {
    try {
        body();
        return "nothing";
    } catch (const DeviceError& error) {
        return error.what();
    }
}

void end(InFlight& in_flight, uint64_t ticket, double start, double end, const std::string& failure = "") {
    in_flight.finished(static_cast<uint32_t>(ticket % InFlight::limit), start, end, failure);
}

// The limit holds: one begin() more waits until the oldest has ended, even if others have.
void bounded(const Arguments&) {
    InFlight in_flight(60);
    for (uint32_t i = 0; i < InFlight::limit; ++i) in_flight.begin();
    std::atomic<uint64_t> ticket{0};
    std::thread submitter([&] { ticket = in_flight.begin(); });
    end(in_flight, 2, 3, 5);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    std::cout << "before " << ticket;
    end(in_flight, 1, 1, 2);
    submitter.join();
    std::cout << " after " << ticket;
    for (uint64_t t = 3; t <= InFlight::limit + 1; ++t) end(in_flight, t, double(t), double(t) + 1);
    std::cout << " idle " << in_flight.idle();
}

// A wait is for its command buffer and those before it, in whatever order they end, and not for one after it.
void tickets(const Arguments&) {
    InFlight in_flight(60);
    for (int i = 0; i < 3; ++i) std::cout << in_flight.begin() << " ";
    std::atomic<bool> over{false};
    std::thread waiter([&] {
        const RunTimes times = in_flight.wait(2);
        over = true;
        std::cout << "times " << times.gpu_start << " " << times.gpu_end;
    });
    end(in_flight, 2, 3, 4);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    std::cout << "over " << over << " ";
    end(in_flight, 1, 1, 2);
    waiter.join();
    std::cout << " again " << in_flight.wait(1).gpu_end << "\n";
    end(in_flight, 3, 5, 6);
    for (uint32_t i = 0; i < InFlight::limit; ++i) end(in_flight, in_flight.begin(), 7, 8);
    std::cout << "old " << in_flight.wait(3).gpu_end << " new " << in_flight.wait(4).gpu_end << " none "
              << in_flight.wait(99).gpu_end;
}

// The first failure stays, whatever follows, and every call throws it.
void sticky(const Arguments&) {
    InFlight in_flight(60);
    for (int i = 0; i < 3; ++i) in_flight.begin();
    end(in_flight, 1, 0, 0, "first");
    end(in_flight, 2, 0, 0, "second");
    end(in_flight, 3, 1, 2);
    std::cout << caught([&] { in_flight.wait(3); }) << " " << caught([&] { in_flight.begin(); }) << " "
              << caught([&] { in_flight.check(); }) << " idle " << in_flight.idle();
}

// Patience is for a GPU that does nothing, not for a machine that sleeps: the command buffer ends at a line of input.
void asleep(const Arguments&) {
    InFlight in_flight(2);
    const uint64_t ticket = in_flight.begin();
    std::thread gpu([&] {
        std::cin.get();
        end(in_flight, ticket, 1, 2);
    });
    std::cout << "waits" << std::endl;
    std::cout << "ended at " << in_flight.wait(ticket).gpu_end;
    gpu.join();
}

// A command buffer that never completes ends the wait, not the process; an abandoned one does not count.
void lost(const Arguments&) {
    InFlight in_flight(0.1);
    in_flight.abandon(in_flight.begin());
    std::cout << "idle " << in_flight.idle() << "\n";
    const uint64_t ticket = in_flight.begin();
    std::cout << caught([&] { in_flight.wait(ticket); }) << "\n" << caught([&] { in_flight.begin(); }) << "\n";
    std::cout << "idle " << in_flight.idle() << "\n";
}

}  // namespace

int main(int argc, char** argv) {
    const std::pair<const char*, void (*)(const Arguments&)> commands[] = {
        {"flatten", flatten}, {"dispatch", dispatch}, {"wrap", wrap},       {"failure", failure},
        {"missing", missing}, {"launches", launches}, {"bounded", bounded}, {"tickets", tickets},
        {"sticky", sticky},   {"asleep", asleep},     {"lost", lost}};
    const Arguments arguments(argv + std::min(argc, 2), argv + argc);
    for (const auto& [name, run] : commands) {
        if (argc < 2 || std::strcmp(name, argv[1]) != 0) continue;
        try {
            run(arguments);
            return 0;
        } catch (const DeviceError& error) {
            std::cout << error.what();
            return 1;
        }
    }
    return 2;
}
