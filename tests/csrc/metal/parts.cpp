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

#include "metal/portable/cache.h"
#include "metal/portable/errors.h"
#include "metal/portable/heartbeat.h"
#include "metal/portable/in_flight.h"
#include "metal/portable/launches.h"
#include "metal/portable/names.h"
#include "metal/portable/pieces.h"
#include "metal/portable/check_arguments.h"
#include "metal/portable/limits.h"
#include "metal/portable/missing_kernel.h"
#include "metal/portable/source.h"

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
    const Failure failure = command_buffer_failure(a.at(0) == "1", std::stol(a.at(1)), a.at(2), ends);
    std::cout << failure.text << "\n"
              << (failure.passes ? "passes" : "lasts") << (failure.out_of_memory ? " out of memory" : "")
              << (failure.took_too_long ? " took too long" : "");
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

struct PrintedEncoder {
    PrintedEncoder() { std::puts("encoder"); }
    void barrier() { std::puts("barrier"); }
    void set_pipeline(const Pipeline& pipeline) { std::printf("pipeline %s\n", pipeline.name.c_str()); }
    void set_params(const std::vector<uint8_t>&) {}
    void set_buffer(const Buffer&, uint64_t offset, uint32_t index) {
        std::printf("buffer %u+%u\n", index, unsigned(offset));
    }
    void set_offset(uint64_t offset, uint32_t index) { std::printf("offset %u+%u\n", index, unsigned(offset)); }
    void dispatch(const Dispatch&) { std::puts("dispatch"); }
};

// each(0|1) first, then dispatches like "kernel:0+16,1+0" (buffer number + offset), "!"
// first for a barrier. Prints one line for each call to the encoder, from the first-th dispatch on.
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
    const size_t begin = std::stoul(a.at(1));
    encode_dispatches(dispatches, begin, dispatches.size(), a.at(0) == "1",
                      [](const Dispatch&) { return PrintedEncoder(); });
}

std::string caught(const std::function<void()>& body) {
    try {
        body();
        return "nothing";
    } catch (const OutOfMemoryError& error) {
        return std::string("memory: ") + error.what();
    } catch (const DeviceError& error) {
        return error.what();
    } catch (int) {
        return "an interrupt";
    }
}

const Failure LASTS{"lasting"}, PASSES{"passing", true}, MEMORY{"no memory", true, true};

// A submission of one command buffer; their numbers are the same where all are such.
uint64_t submit(InFlight& in_flight) {
    in_flight.begin();
    return in_flight.begin_command_buffer();
}

void end(InFlight& in_flight, uint64_t number, double start, double end, const Failure& failure = {}) {
    in_flight.finished(static_cast<uint32_t>(number % InFlight::limit), start, end, failure);
}

// The limit holds: one begin() more waits until the oldest has ended, even if others have.
void bounded(const Arguments&) {
    InFlight in_flight({60});
    for (uint32_t i = 0; i < InFlight::limit; ++i) submit(in_flight);
    std::atomic<uint64_t> ticket{0};
    std::thread submitter([&] { ticket = submit(in_flight); });
    end(in_flight, 2, 3, 5);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    std::cout << "before " << ticket;
    end(in_flight, 1, 1, 2);
    submitter.join();
    std::cout << " after " << ticket;
    for (uint64_t t = 3; t <= InFlight::limit + 1; ++t) end(in_flight, t, double(t), double(t) + 1);
    std::cout << " idle " << in_flight.idle();
}

// A wait is for its submission and those before it, in whatever order they end, and not for one after it.
void tickets(const Arguments&) {
    InFlight in_flight({60});
    for (int i = 0; i < 3; ++i) std::cout << submit(in_flight) << " ";
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
    for (uint32_t i = 0; i < InFlight::limit; ++i) end(in_flight, submit(in_flight), 7, 8);
    std::cout << "old " << in_flight.wait(3).gpu_end << " new " << in_flight.wait(4).gpu_end << " none "
              << in_flight.wait(99).gpu_end;
}

// Whoever waits until all is idle waits for what was in flight then, and not for what another thread commits meanwhile.
void idle(const Arguments&) {
    InFlight in_flight({60});
    submit(in_flight);
    std::atomic<bool> idle{false};
    std::thread waiter([&] { idle = in_flight.idle(); });
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    submit(in_flight);
    end(in_flight, 1, 1, 2);
    waiter.join();
    std::cout << "idle " << idle;
}

// A submission of several command buffers: two of them are in flight at a time, and its times are from the first to the
// last of them.
void several(const Arguments&) {
    InFlight in_flight({60});
    const uint64_t before = submit(in_flight);
    const uint64_t ticket = in_flight.begin();
    std::atomic<uint64_t> begun{0};
    std::thread submitter([&] {
        for (int i = 0; i < 4; ++i) begun = in_flight.begin_command_buffer();
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    std::cout << "begun " << begun;
    end(in_flight, before, 1, 2);
    end(in_flight, 2, 2, 3);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    std::cout << " then " << begun;
    end(in_flight, 3, 3, 4);
    submitter.join();
    end(in_flight, 4, 5, 6);
    end(in_flight, 5, 6, 8);
    const RunTimes times = in_flight.wait(ticket);
    std::cout << " of ticket " << ticket << " from " << times.gpu_start << " to " << times.gpu_end;
}

// The first failure that lasts stays, whatever follows, and every call throws it.
void sticky(const Arguments&) {
    InFlight in_flight({60});
    for (int i = 0; i < 3; ++i) submit(in_flight);
    end(in_flight, 1, 0, 0, LASTS);
    end(in_flight, 2, 0, 0, {"second"});
    end(in_flight, 3, 1, 2);
    std::cout << caught([&] { in_flight.wait(3); }) << " " << caught([&] { in_flight.begin(); }) << " "
              << caught([&] { in_flight.check(); }) << " idle " << in_flight.idle();
}

// A wait that throws is over when all that is in flight has ended: its caller may write to what that uses.
void throwing(const Arguments&) {
    InFlight in_flight({60});
    for (int i = 0; i < 4; ++i) submit(in_flight);
    std::atomic<bool> told{false};
    const auto late = [&](uint64_t number) {
        return std::thread([&, number] {
            std::this_thread::sleep_for(std::chrono::milliseconds(150));
            std::cout << "told " << told << " ";
            end(in_flight, number, 1, 2);
        });
    };
    end(in_flight, 1, 0, 0, PASSES);
    end(in_flight, 2, 1, 2);
    end(in_flight, 3, 1, 2);
    std::thread gpu = late(4);
    std::cout << caught([&] { in_flight.wait(1); }) << " ";
    told = true;
    gpu.join();
    for (int i = 0; i < 2; ++i) submit(in_flight);
    told = false;
    gpu = late(6);
    const Poll poll = [&] {
        end(in_flight, 5, 1, 2);
        throw 1;
    };
    std::cout << caught([&] { in_flight.wait(5, poll); });
    told = true;
    gpu.join();
}

// One that passes takes down what is in flight with it, whether that ended well or not, and nothing later.
void passing(const Arguments&) {
    InFlight in_flight({60});
    for (int i = 0; i < 3; ++i) submit(in_flight);
    end(in_flight, 1, 1, 2);
    end(in_flight, 2, 0, 0, MEMORY);
    std::atomic<uint64_t> next{0};
    std::thread submitter([&] { next = submit(in_flight); });
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    std::cout << "in flight " << next;
    end(in_flight, 3, 2, 3);
    submitter.join();
    end(in_flight, 4, 3, 4);
    std::cout << " then " << next;
    for (uint64_t ticket = 1; ticket <= 4; ++ticket) std::cout << ", " << caught([&] { in_flight.wait(ticket); });
    std::cout << ", check " << caught([&] { in_flight.check(); });
    end(in_flight, submit(in_flight), 0, 0, PASSES);
    std::cout << ", " << caught([&] { in_flight.wait(5); }) << ", " << caught([&] { in_flight.wait(2); });
}

// Of a submission one of whose command buffers failed, no more are committed.
void passing_within(const Arguments&) {
    InFlight in_flight({60});
    in_flight.begin();
    end(in_flight, in_flight.begin_command_buffer(), 0, 0, PASSES);
    std::cout << caught([&] { in_flight.begin_command_buffer(); });
    in_flight.drop();
    end(in_flight, submit(in_flight), 1, 2);
    std::cout << " " << caught([&] { in_flight.wait(2); });
}

// Nobody waits for it. What fails is told once: by a wait for what is behind it, or else by the next begin().
void unawaited(const Arguments&) {
    InFlight in_flight({60});
    const auto begin = [&] {
        in_flight.begin({}, false);
        return in_flight.begin_command_buffer();
    };
    end(in_flight, begin(), 1, 2);
    end(in_flight, begin(), 0, 0, PASSES);
    std::cout << caught([&] { in_flight.begin(); }) << " ";
    end(in_flight, submit(in_flight), 3, 4);
    std::cout << in_flight.wait(3).gpu_end << " ";
    const uint64_t alone = begin(), behind = submit(in_flight);
    end(in_flight, alone, 0, 0, MEMORY);
    end(in_flight, behind, 5, 6);
    std::cout << caught([&] { in_flight.wait(5); }) << " ";
    end(in_flight, submit(in_flight), 7, 8);
    std::cout << in_flight.wait(6).gpu_end;
}

// Each wait asks, about every 50 ms, and ends when the answer is a throw: after what was committed.
void polled(const Arguments&) {
    InFlight in_flight({60});
    submit(in_flight);
    int asked = 0;
    std::atomic<bool> interrupted{false}, all{false};
    std::thread gpu([&] {
        while (!interrupted) std::this_thread::yield();
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        end(in_flight, 1, 1, 2);
    });
    const Poll poll = [&] {
        if (++asked < 3) return;
        interrupted = true;
        throw 1;
    };
    std::cout << caught([&] { in_flight.wait(1, poll); }) << " after " << asked << ", ended "
              << in_flight.wait(1).gpu_end;
    gpu.join();
    for (uint32_t i = 0; i < InFlight::limit; ++i) submit(in_flight);
    asked = 0;
    interrupted = false;
    gpu = std::thread([&] {
        while (!interrupted) std::this_thread::yield();
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        all = true;
        for (uint64_t n = 2; n <= InFlight::limit + 1; ++n) end(in_flight, n, 2, 3);
    });
    std::cout << ", full: " << caught([&] { in_flight.begin(poll); }) << " after all " << all;
    gpu.join();
    std::cout << ", goes on " << in_flight.begin();
}

// Patience is for a GPU that does nothing, not for a machine that sleeps: the command buffer ends at a line of input.
void asleep(const Arguments&) {
    InFlight in_flight({2});
    const uint64_t ticket = submit(in_flight);
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
    InFlight in_flight({0.1});
    in_flight.abandon(submit(in_flight));
    std::cout << "idle " << in_flight.idle() << "\n";
    const uint64_t ticket = submit(in_flight);
    std::cout << caught([&] { in_flight.wait(ticket); }) << "\n" << caught([&] { in_flight.begin(); }) << "\n";
    std::cout << "idle " << in_flight.idle() << "\n";
}

// The first command buffer pages the whole file in: unless somebody chose a patience, it begins when that has ended.
void first(const Arguments&) {
    InFlight in_flight({0.1, false});
    submit(in_flight);
    std::thread gpu([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(500));
        end(in_flight, 1, 1, 2);
    });
    std::cout << caught([&] { in_flight.wait(1); });
    gpu.join();
    submit(in_flight);
    std::cout << ", then: " << caught([&] { in_flight.wait(2); });
}

// Seconds that each dispatch takes, then rounds of the same recording: the longest command buffer of each, and how
// many. "stop" for a round in which the driver stops the first of them.
void pieces(const Arguments& a) {
    std::vector<double> truth;
    size_t at = 0;
    for (; at < a.size() && a[at] != "rounds"; ++at) {
        const size_t times = a[at].find('x');
        for (unsigned long n = std::stoul(a[at].substr(times + 1)); n > 0; --n) truth.push_back(std::stod(a[at]));
    }
    Dispatch d;
    d.pipeline = pipeline_named("mul_mm");
    d.grid[0] = 2048;
    d.threads = 128;
    for (const size_t bytes : {9u << 20, 8u << 20, 8u << 20}) d.bindings.push_back({buffer_of(bytes), 0, bytes});
    Pieces pieces(std::vector<Dispatch>(truth.size(), d));
    InFlight in_flight({60});
    for (++at; at < a.size(); ++at) {
        const double scale = a[at] == "stop" ? 1 : std::stod(a[at]);
        double longest = 0, clock = 1;
        int n = 0;
        in_flight.begin();
        for (size_t begin = 0; begin < truth.size(); ++n) {
            const uint64_t number = in_flight.begin_command_buffer();
            pieces.learn(in_flight);
            const size_t stop = pieces.end_of(begin);
            pieces.committed(begin, stop, number);
            double seconds = 0;
            for (; begin < stop; ++begin) seconds += truth[begin] * scale;
            longest = std::max(longest, seconds);
            if (a[at] == "stop" && n == 0) {
                end(in_flight, number, 0, 0, {"it kept the display waiting", true, false, true});
                begin = truth.size();
            } else {
                end(in_flight, number, clock, clock + seconds);
            }
            clock += seconds;
        }
        std::printf("%d %.0f\n", n, longest * 1e3);
    }
}

void guess(const Arguments& a) {
    Dispatch d;
    d.pipeline = pipeline_named("k");
    d.grid[0] = static_cast<uint32_t>(std::stoul(a.at(0)));
    d.threads = static_cast<uint32_t>(std::stoul(a.at(1)));
    for (size_t i = 2; i < a.size(); ++i) d.bindings.push_back({buffer_of(std::stoul(a[i])), 0, std::stoul(a[i])});
    std::printf("%.9f", guessed_seconds(d));
}

void names(const Arguments& a) {
    const std::string text = SourceFlattener(a.at(0)).flatten(a.at(1));
    for (const std::string& name : KernelNames::of(text, {"__METAL_VERSION__"})) std::puts(name.c_str());
}

// Beats while it is touched, rests once after, has no thread then, and begins anew.
void heartbeat(const Arguments&) {
    std::atomic<int> beats{0}, rests{0};
    std::atomic<bool> in_use{false};
    const auto until = [](auto holds) {
        for (int i = 0; i < 10000 && !holds(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        return holds();
    };
    Heartbeat heart(0.01, 0.2, [&](double) { return ++beats, in_use.load(); }, [&] { ++rests; });
    std::cout << "before " << heart.running();
    heart.touch();
    std::cout << " beats " << until([&] { return beats >= 3; }) << " rests " << until([&] { return rests == 1; });
    std::cout << " thread " << !until([&] { return !heart.running(); });
    int before = beats;
    in_use = true;
    heart.touch();
    std::cout << " again " << until([&] { return beats > before; });
    std::this_thread::sleep_for(std::chrono::milliseconds(400));
    before = beats;
    std::cout << " in use " << until([&] { return beats > before; });
    heart.stop();
    std::cout << " stopped " << heart.running() << " rests " << rests;
    Heartbeat none(0.01, 0, [&](double) { return ++beats, in_use.load(); }, [&] { ++rests; });
    none.touch();
    std::cout << " none " << none.running();
}

// key content: what the cache file of the key holds, before and after the content is written ("-": a writer that
// fails).
void cache(const Arguments& a) {
    const CacheFile file = CacheFile::of(a.at(0));
    std::cout << (file.path.empty() ? "off" : file.path.filename().string());
    if (file.path.empty()) return;
    if (file.exists()) std::cout << " " << read_text(file.path);
    const std::string failure = file.replace([&](const std::filesystem::path& path) {
        std::ofstream(path) << a.at(1);
        return std::string(a.at(1) == "-" ? "refused" : "");
    });
    std::cout << (failure.empty() ? "" : " " + failure);
}

}  // namespace

int main(int argc, char** argv) {
    const std::pair<const char*, void (*)(const Arguments&)> commands[] = {
        {"flatten", flatten},   {"dispatch", dispatch},   {"wrap", wrap},       {"failure", failure},
        {"missing", missing},   {"launches", launches},   {"bounded", bounded}, {"tickets", tickets},
        {"several", several},   {"sticky", sticky},       {"passing", passing}, {"passing_within", passing_within},
        {"throwing", throwing}, {"unawaited", unawaited}, {"polled", polled},   {"asleep", asleep},
        {"lost", lost},         {"first", first},         {"pieces", pieces},   {"guess", guess},
        {"names", names},       {"heartbeat", heartbeat}, {"cache", cache},     {"idle", idle}};
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
