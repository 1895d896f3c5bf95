// The compiled kernels, from the metallib or from their sources.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "metal/objc.h"
#include "metal/times.h"
#include "metal/portable/names.h"
#include "metal/portable/limits.h"
#include "metal/portable/missing_kernel.h"
#include "metal/portable/source.h"

namespace zinc {

// The source of the kernels: a folder, and whether its metallib counts. ZINCMETAL_KERNELS names another folder,
// ZINCMETAL_METALLIB=0 ignores the metallib.
struct KernelChoice {
    std::filesystem::path folder;
    bool metallib = true, folder_is_chosen = false;
    std::string remarks;  // choices of the environment

    static KernelChoice of(const std::string& usual_folder) {
        KernelChoice choice;
        choice.folder = usual_folder;
        if (const char* folder = std::getenv("ZINCMETAL_KERNELS"); folder && *folder) {
            choice.folder = folder;
            choice.folder_is_chosen = true;
            choice.remarks += " in " + std::string(folder) + " (ZINCMETAL_KERNELS)";
        }
        if (const char* metallib = std::getenv("ZINCMETAL_METALLIB"); metallib && std::string(metallib) == "0") {
            choice.metallib = false;
            choice.remarks += ", no metallib (ZINCMETAL_METALLIB=0)";
        }
        return choice;
    }

    // For a folder without kernels.
    const char* remedy() const {
        return folder_is_chosen ? "ZINCMETAL_KERNELS must name a folder of .metal files" : "reinstall zincmetal";
    }

    std::string key() const { return folder.string() + (metallib ? "" : " as text"); }
};

// Every GPU of Metal 4 has tensor operations. From Apple10 on they reach matrix units of their own: before, simdgroup
// matrices are as fast.
inline bool has_tensor_operations(id<MTLDevice> device) {
    if (@available(macOS 26.0, *)) {
        return [device supportsFamily:static_cast<MTLGPUFamily>(APPLE10)] &&
               [device supportsFamily:static_cast<MTLGPUFamily>(METAL4)];
    }
    return false;
}

// The kernels of a folder, by name: from zincmetal.metallib if it loads, else compiled from the sources. A source is
// compiled when one of its kernels is first asked for. A source that does not compile costs only its own kernels: plans
// may have replacements for them. Where the GPU has tensor operations, zincmetal_4.metallib comes first, and sources
// that know such operations are compiled with COOPERATIVE, as Metal 4.
class KernelLibrary {
  public:
    KernelLibrary(id<MTLDevice> device, const KernelChoice& choice, Times& times)
        : device_(device), choice_(choice), times_(times), tensor_operations_(has_tensor_operations(device)) {
        compile_options(false);  // throws if macOS is too old: a metallib may load there, but its kernels do not build
        if (@available(macOS 13.3, *)) device.shouldMaximizeConcurrentCompilation = YES;
        if (choice.metallib && tensor_operations_ && load("zincmetal_4.metallib")) return;
        if (choice.metallib && load("zincmetal.metallib")) return;
        read_sources();
    }

    id<MTLFunction> function(const std::string& name) {
        const auto found = sources_of_.find(name);
        if (found == sources_of_.end()) return function_of_any(name);
        if (!metallib_) compile(*found->second);
        const Source* source = found->second;
        const id<MTLLibrary> library = metallib_ ? metallib_ : source->library;
        id<MTLFunction> function = [library newFunctionWithName:ns_string(name)];
        if (!function && metallib_) throw DeviceError("the kernel library lists '" + name + "' but does not give it");
        if (!function) throw DeviceError(missing_kernel_text(name, listed(), {{source->file, source->refusal}}));
        return function;
    }

    // Compiles the sources of these kernels, all at once. The compiler is another process and takes about a second for
    // each.
    void prepare(const std::vector<std::string>& kernels) {
        std::vector<Source*> wanted;
        for (const std::string& kernel : kernels) {
            const auto found = sources_of_.find(kernel);
            if (found != sources_of_.end() && found->second) wanted.push_back(found->second);
        }
        compile(std::move(wanted));
    }

    // The kernels of the sources that compile; this compiles all of them.
    std::vector<std::string> names() {
        if (metallib_) return listed();
        compile_all();
        std::vector<std::string> names;
        for (const auto& source : sources_) {
            if (!source->library) continue;
            for (NSString* name in source->library.functionNames) names.push_back(text(name));
        }
        if (names.empty()) throw DeviceError(failure_text());
        std::sort(names.begin(), names.end());
        return names;
    }

    // True if there are kernels of tensor operations.
    bool has_cooperative_kernels() const {
        const auto is_one = [](const auto& entry) { return entry.first.find("_coop_") != std::string::npos; };
        return tensor_operations_ && std::any_of(sources_of_.begin(), sources_of_.end(), is_one);
    }

    // For example "274 from 20 source files".
    std::string summary() const {
        std::string summary = std::to_string(sources_of_.size()) + " from ";
        summary += metallib_ ? metallib_name_ : std::to_string(sources_.size()) + " source files";
        return summary + choice_.remarks + (metallib_failure_.empty() ? "" : " (" + metallib_failure_ + ")");
    }

    // The compiler's message for each source that it refused. Under "warnings SOURCE": its warnings about a source that
    // compiles.
    Times::List words() const {
        Times::List list;
        for (const auto& source : sources_) {
            if (!source->compiled) continue;
            if (!source->refusal.empty()) list.emplace_back(source->file, source->refusal);
            if (!source->warnings.empty()) list.emplace_back("warnings " + source->file, source->warnings);
        }
        return list;
    }

    // Tells one set of kernels from another.
    uint64_t hash() const { return hash_; }

  private:
    struct Source {
        std::string file, flat;    // its name, and its text with all that it includes
        bool cooperative = false;  // it knows tensor operations
        std::once_flag once;
        std::atomic<bool> compiled = false;
        id<MTLLibrary> library;
        std::string refusal, warnings;
    };

    bool load(const std::string& name) {
        const std::filesystem::path file = choice_.folder / name;
        std::error_code unreadable;
        if (!std::filesystem::exists(file, unreadable)) return false;
        const Stopwatch watch;
        NSError* error = nil;
        metallib_ = [device_ newLibraryWithURL:[NSURL fileURLWithPath:ns_string(file.string())] error:&error];
        if (!metallib_) {
            metallib_failure_ = file.string() + " does not load: " + describe(error);
            return false;
        }
        for (NSString* kernel in metallib_.functionNames) sources_of_[text(kernel)] = nullptr;
        add_to_hash(read_text(file));
        times_.note("load " + name, watch.seconds());
        metallib_name_ = name;
        return true;
    }

    void read_sources() {
        const Stopwatch watch;
        const std::vector<std::string> files = kernel_files(choice_.folder);
        if (files.empty()) {
            const std::string none = "no kernel sources in " + choice_.folder.string() + "; " + choice_.remedy();
            throw DeviceError(metallib_failure_.empty() ? none : metallib_failure_ + "; " + none);
        }
        for (const std::string& file : files) {
            sources_.push_back(std::make_unique<Source>());
            Source& source = *sources_.back();
            source.file = file;
            try {
                source.flat = SourceFlattener(choice_.folder).flatten(file);
            } catch (const DeviceError& error) {  // a source that cannot be read
                source.refusal = error.what();
                source.compiled = true;
                continue;
            }
            source.cooperative =
                tensor_operations_ && source.flat.find("MetalPerformancePrimitives") != source.flat.npos;
            if (source.cooperative) source.flat = COOPERATIVE + source.flat;
            add_to_hash(source.flat);
            for (const std::string& name : KernelNames::of(source.flat, {"__METAL_VERSION__"}))
                sources_of_[name] = &source;
        }
        times_.note("read the kernel sources", watch.seconds());
    }

    // A kernel of a source whose names are written in another way.
    id<MTLFunction> function_of_any(const std::string& name) {
        compile_all();
        std::map<std::string, std::string> refusals;
        for (const auto& source : sources_) {
            if (!source->refusal.empty()) refusals[source->file] = source->refusal;
            id<MTLFunction> function = [source->library newFunctionWithName:ns_string(name)];
            if (function) return function;
        }
        throw DeviceError(missing_kernel_text(name, listed(), refusals));
    }

    std::vector<std::string> listed() const {
        std::vector<std::string> names;
        for (const auto& entry : sources_of_) names.push_back(entry.first);
        return names;
    }

    // The error for a folder in which no source compiles.
    std::string failure_text() const {
        std::vector<std::string> failures;
        if (!metallib_failure_.empty()) failures.push_back(metallib_failure_);
        for (const auto& source : sources_)
            if (!source->refusal.empty()) failures.push_back(source->refusal);
        return failures.empty() ? "the sources in " + choice_.folder.string() + " hold no kernel; reinstall zincmetal"
                                : join(failures, "\n");
    }

    void compile_all() {
        std::vector<Source*> all;
        for (const auto& source : sources_) all.push_back(source.get());
        compile(std::move(all));
    }

    void compile(std::vector<Source*> wanted) {
        std::sort(wanted.begin(), wanted.end());
        wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
        const auto how = std::launch::async | std::launch::deferred;  // deferred if no thread can be started
        std::vector<std::future<void>> jobs;
        for (Source* source : wanted)
            if (!source->compiled) jobs.push_back(std::async(how, [this, source] { compile(*source); }));
        for (std::future<void>& job : jobs) job.get();
    }

    // Compiles a source once; the compiler's message is kept with it.
    void compile(Source& source) {
        std::call_once(source.once, [&] {
            if (source.compiled) return;
            const Stopwatch watch;
            try {
                guarded([&] { make_library(source); });
            } catch (const std::exception& error) {
                source.refusal = error.what();
            }
            times_.note("compile " + std::filesystem::path(source.file).stem().string(), watch.seconds());
            source.compiled = true;
        });
    }

    // The kernels of a source that does not compile with tensor operations are those that do without.
    void make_library(Source& source) const {
        NSError* error = nil;
        source.library = library_of(source.flat, source.cooperative, &error);
        if (!source.library && source.cooperative) {
            source.refusal = source.file + " does not compile with tensor operations: " + describe(error);
            source.library = library_of(source.flat.substr(std::size(COOPERATIVE) - 1), false, &error);
        }
        if (!source.library) throw DeviceError(source.file + " does not compile: " + describe(error));
        source.library.label = ns_string(source.file);
        if (error) source.warnings = describe(error);  // with a library it holds warnings at most
        source.flat = {};
    }

    id<MTLLibrary> library_of(const std::string& source, bool cooperative, NSError* __autoreleasing* error) const {
        return [device_ newLibraryWithSource:ns_string(source) options:compile_options(cooperative) error:error];
    }

    static MTLCompileOptions* compile_options(bool cooperative) {
        MTLCompileOptions* options = [[MTLCompileOptions alloc] init];
        if (@available(macOS 14.0, *)) {
            options.languageVersion = MTLLanguageVersion3_1;  // of macOS 14, the oldest we support
            if (cooperative) options.languageVersion = METAL_4;
        } else {
            throw DeviceError(
                "the kernels are written in Metal Shading Language 3.1, which needs macOS 14; this is macOS " +
                text(NSProcessInfo.processInfo.operatingSystemVersionString) + "; ZINCMETAL_DEVICE=cpu runs without");
        }
        use_safe_math(options);
        return options;
    }

    // Safe math: masks are infinities, and NaN must be visible in the logits. Fast math may assume both away.
    // (preserveInvariance concerns vertex positions only.)
    static void use_safe_math(MTLCompileOptions* options) {
#if ZINC_SDK_15
        if (@available(macOS 15.0, *)) {
            options.mathMode = MTLMathModeSafe;
            options.mathFloatingPointFunctions = MTLMathFloatingPointFunctionsPrecise;
            return;
        }
#endif
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wdeprecated-declarations"
        options.fastMathEnabled = NO;
#pragma clang diagnostic pop
    }

    // FNV-1a.
    void add_to_hash(const std::string& bytes) {
        for (const char c : bytes) hash_ = (hash_ ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
    }

    static constexpr char COOPERATIVE[] = "#define COOPERATIVE 1\n";
    static constexpr auto METAL_4 = static_cast<MTLLanguageVersion>(4 << 16);  // by value: it is not in every SDK

    const id<MTLDevice> device_;
    const KernelChoice choice_;
    Times& times_;
    const bool tensor_operations_;
    id<MTLLibrary> metallib_;
    std::string metallib_name_, metallib_failure_;
    std::vector<std::unique_ptr<Source>> sources_;
    std::map<std::string, Source*> sources_of_;  // by kernel; null if the metallib holds it
    uint64_t hash_ = 0xcbf29ce484222325u;
};

}  // namespace zinc
