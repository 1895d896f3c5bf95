// The compiled kernels, from the metallib or from their sources.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <filesystem>
#include <future>
#include <map>
#include <string>
#include <vector>

#include "metal/objc.h"
#include "metal_rules.h"
#include "metal_source.h"

namespace zinc {

// The kernels of a folder, by name: from zincmetal.metallib where it loads, else compiled from the sources. A source
// that does not compile costs its own kernels alone: plans may do without them.
class KernelLibrary {
  public:
    KernelLibrary(id<MTLDevice> device, const std::filesystem::path& folder) : device_(device) {
        compile_options();  // throws where macOS is too old: a metallib may load there, and its kernels do not build
        std::string failure;
        if (!load(folder / "zincmetal.metallib", failure)) compile_all(folder, failure);
    }

    id<MTLFunction> function(const std::string& name) const {
        const auto found = by_name_.find(name);
        if (found == by_name_.end()) throw DeviceError(missing_kernel_text(name, names(), broken_));
        id<MTLFunction> function = [found->second newFunctionWithName:ns_string(name)];
        if (!function) throw DeviceError("the kernel library lists '" + name + "' but does not give it");
        return function;
    }

    std::vector<std::string> names() const {
        std::vector<std::string> names;
        for (const auto& entry : by_name_) names.push_back(entry.first);
        return names;
    }

    const std::string& origin() const { return origin_; }

    // The compiler's words, by source that it refused.
    const std::map<std::string, std::string>& broken() const { return broken_; }

  private:
    bool load(const std::filesystem::path& file, std::string& failure) {
        std::error_code unreadable;
        if (!std::filesystem::exists(file, unreadable)) return false;
        NSError* error = nil;
        id<MTLLibrary> library = [device_ newLibraryWithURL:[NSURL fileURLWithPath:ns_string(file.string())]
                                                      error:&error];
        if (!library) {
            failure = file.string() + " does not load: " + describe(error);
            return false;
        }
        add(library);
        origin_ = "zincmetal.metallib";
        return true;
    }

    // All files at once: the compiler is another process and takes a second or so for each.
    void compile_all(const std::filesystem::path& folder, const std::string& metallib_failure) {
        const std::vector<std::string> files = kernel_files(folder);
        if (files.empty()) {
            const std::string none = "no kernel sources in " + folder.string() + "; reinstall zincmetal";
            throw DeviceError(metallib_failure.empty() ? none : metallib_failure + "; " + none);
        }
        const auto how = std::launch::async | std::launch::deferred;  // deferred where no thread is to be had
        std::vector<std::future<id<MTLLibrary>>> jobs;
        for (const std::string& file : files) {
            jobs.push_back(std::async(how, [this, &folder, &file] { return compile(folder, file); }));
        }
        for (size_t i = 0; i < files.size(); ++i) {
            try {
                add(jobs[i].get());
            } catch (const std::exception& error) {
                broken_[files[i]] = error.what();
            }
        }
        origin_ = std::to_string(files.size() - broken_.size()) + " source files";
        if (!metallib_failure.empty()) origin_ += " (" + metallib_failure + ")";
        if (by_name_.empty()) throw DeviceError(failure_text(metallib_failure));
    }

    // Of a folder of which nothing compiles.
    std::string failure_text(const std::string& metallib_failure) const {
        std::vector<std::string> failures;
        if (!metallib_failure.empty()) failures.push_back(metallib_failure);
        for (const auto& [file, words] : broken_) failures.push_back(words);
        return join(failures, "\n");
    }

    id<MTLLibrary> compile(const std::filesystem::path& folder, const std::string& file) const {
        id<MTLLibrary> library;
        guarded([&] {
            NSString* source = ns_string(SourceFlattener(folder).flatten(file));
            NSError* error = nil;
            library = [device_ newLibraryWithSource:source options:compile_options() error:&error];
            // With a library the error holds warnings at most.
            if (!library) throw DeviceError(file + " does not compile: " + describe(error));
            library.label = ns_string(file);
        });
        return library;
    }

    static MTLCompileOptions* compile_options() {
        MTLCompileOptions* options = [[MTLCompileOptions alloc] init];
        if (@available(macOS 14.0, *)) {
            options.languageVersion = MTLLanguageVersion3_1;  // of macOS 14, the oldest we support
        } else {
            throw DeviceError(
                "the kernels are written in Metal Shading Language 3.1, which needs macOS 14; this is macOS " +
                text(NSProcessInfo.processInfo.operatingSystemVersionString) + "; ZINCMETAL_DEVICE=cpu runs without");
        }
        use_safe_math(options);
        return options;
    }

    // Safe math: masks are infinities and NaN must reach the logits to be seen, both of which fast math may assume
    // away. (preserveInvariance concerns vertex positions only.)
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

    void add(id<MTLLibrary> library) {
        for (NSString* name in library.functionNames) by_name_[text(name)] = library;
    }

    const id<MTLDevice> device_;
    std::map<std::string, id<MTLLibrary>> by_name_;
    std::map<std::string, std::string> broken_;
    std::string origin_;
};

}  // namespace zinc
