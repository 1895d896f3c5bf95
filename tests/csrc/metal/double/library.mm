// Libraries, functions and pipelines. The kernels themselves were compiled into this module; a library is their names.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <regex>
#include <sstream>

#include "conditions.h"
#include "foundation.h"
#include "library.h"
#include "objects.h"
#include "rules.h"

using namespace metal_double;

NSErrorDomain const MTLLibraryErrorDomain = @"MTLLibraryErrorDomain";

namespace {

// Runs the preprocessor over MSL; what it says when it refuses.
std::string preprocess(const std::string& source, int version, std::string& failure) {
    char name[] = "/tmp/metal_double_XXXXXX";
    const int file = mkstemp(name);
    if (file < 0) broken("host", "no temporary file");
    close(file);
    std::ofstream(name) << source;
    const std::string command = std::string(METAL_DOUBLE_CXX) +
                                " -E -P -x c++ -D__METAL_VERSION__=" + std::to_string(version) + " " + name + " 2>&1";
    std::string output;
    FILE* pipe = popen(command.c_str(), "r");
    if (!pipe) broken("host", "no preprocessor: %s", command.c_str());
    char part[4096];
    for (size_t n; (n = fread(part, 1, sizeof(part), pipe)) > 0;) output.append(part, n);
    if (pclose(pipe) != 0) failure = output;
    unlink(name);
    return output;
}

// A compiler on a Mac finds the standard library, from Metal 4 on with tensor operations, and no file of ours.
std::string without_standard_headers(const std::string& source, int version) {
    static const std::regex usual("#[ \t]*include[ \t]*<[a-z_]*>"), tensors("#[ \t]*include[ \t]*<Metal[A-Za-z/.]*>");
    const std::string rest = std::regex_replace(source, usual, "");
    return version < 400 ? rest : std::regex_replace(rest, tensors, "");
}

// KERNEL("a_" "b", f<...>) came out as `template [[host_name("a_" "b")]] ...`.
std::vector<std::string> host_names(const std::string& text) {
    static const std::regex attribute(R"(host_name\(([^)]*)\))"), literal("\"([^\"]*)\"");
    std::vector<std::string> names;
    for (std::sregex_iterator at(text.begin(), text.end(), attribute), end; at != end; ++at) {
        const std::string parts = (*at)[1];
        std::string name;
        for (std::sregex_iterator part(parts.begin(), parts.end(), literal); part != end; ++part) name += (*part)[1];
        names.push_back(name);
    }
    return names;
}

// True if a source holds the text, or has this name: others may include it.
bool is_meant(const std::string& source, const std::string& text) {
    if (!text.ends_with(".metal")) return source.find(text) != std::string::npos;
    return source.starts_with("#line 1 \"" + text + "\"");
}

}  // namespace

namespace metal_double {

std::vector<std::string> compile(const std::string& source, MTLLanguageVersion language, std::string& failure) {
    const auto refused = condition("library");
    const int version = static_cast<int>((language >> 16) * 100 + (language & 0xffff) * 10);
    if (refused && is_meant(source, *refused)) {
        failure = "program_source:1:1: error: " + *refused;
        return {};
    }
    const std::string text = preprocess(without_standard_headers(source, version), version, failure);
    return failure.empty() ? host_names(text) : std::vector<std::string>();
}

std::vector<std::string> load(const std::string& path, std::string& failure) {
    std::ifstream file(path);
    std::string line;
    std::vector<std::string> names;
    if (!std::getline(file, line) || line != "metal double library") failure = "Invalid library file";
    while (failure.empty() && std::getline(file, line)) names.push_back(line);
    return names;
}

}  // namespace metal_double

@implementation MTLCompileOptions
@synthesize languageVersion, mathMode, mathFloatingPointFunctions, fastMathEnabled;
- (instancetype)init {
    fastMathEnabled = YES;
    mathMode = MTLMathModeFast;
    return self;
}
- (void)setLanguageVersion:(MTLLanguageVersion)version {
    if (version == MTLLanguageVersion3_1) need_macos(14.0, "MTLLanguageVersion3_1");
    if (version == MTLLanguageVersion4_0) need_macos(26.0, "MTLLanguageVersion4_0");
    languageVersion = version;
}
- (void)setMathMode:(MTLMathMode)mode {
    need_macos(15.0, "MTLCompileOptions.mathMode");
    mathMode = mode;
}
- (void)setMathFloatingPointFunctions:(MTLMathFloatingPointFunctions)functions {
    need_macos(15.0, "MTLCompileOptions.mathFloatingPointFunctions");
    mathFloatingPointFunctions = functions;
}
@end

@implementation DoubleFunction
@synthesize name;
@end

@implementation DoubleLibrary {
    std::vector<std::string> names;
}
@synthesize label;

- (instancetype)initWithNames:(const std::vector<std::string>&)all {
    names = all;
    return self;
}
- (NSArray<NSString*>*)functionNames {
    std::vector<id> strings;
    for (const std::string& name : names) strings.push_back(string(name));
    return array(strings);
}
- (id<MTLFunction>)newFunctionWithName:(NSString*)wanted {
    if (std::find(names.begin(), names.end(), text(wanted)) == names.end()) return nil;
    DoubleFunction* function = [[DoubleFunction alloc] init];
    function.name = wanted;
    return function;
}
@end

@implementation MTLComputePipelineDescriptor
@end

@implementation MTLBinaryArchiveDescriptor
@end

// A file of its own, with a line for each kernel and number of threads.
@implementation DoubleArchive
@synthesize label;
- (std::string)entryOf:(MTLComputePipelineDescriptor*)descriptor {
    return text(descriptor.computeFunction.name) + " " + std::to_string(descriptor.maxTotalThreadsPerThreadgroup);
}
- (BOOL)readFrom:(const std::string&)path {
    std::ifstream file(path);
    std::string line;
    if (!std::getline(file, line) || line != "metal double archive") return NO;
    while (std::getline(file, line)) entries.insert(line);
    return YES;
}
- (BOOL)holds:(MTLComputePipelineDescriptor*)descriptor {
    return entries.count([self entryOf:descriptor]) != 0;
}
- (BOOL)addComputePipelineFunctionsWithDescriptor:(MTLComputePipelineDescriptor*)descriptor
                                            error:(NSError* __autoreleasing*)error {
    if (condition("archive_add")) {
        if (error) *error = metal_double::error(@"MTLBinaryArchiveDomain", 3, "Compilation failure");
        return NO;
    }
    entries.insert([self entryOf:descriptor]);
    return YES;
}
- (BOOL)serializeToURL:(NSURL*)url error:(NSError* __autoreleasing*)error {
    std::ofstream file(text(url.path));
    file << "metal double archive\n";
    for (const std::string& entry : entries) file << entry << "\n";
    file.close();
    if (is_due("archive_written")) raise("NSInvalidArgumentException", "the double was told to raise");
    if (file) return YES;
    if (error) *error = metal_double::error(@"NSCocoaErrorDomain", 512, "The file could not be written");
    return NO;
}
@end

@interface DoubleBinding : NSObject <MTLBufferBinding>
@property(readwrite, copy) NSString* name;
@property(readwrite) NSUInteger index;
@property(readwrite) MTLBindingAccess access;
@property(readwrite) NSUInteger bufferAlignment;
@property(readwrite) NSUInteger bufferDataSize;
@end
@implementation DoubleBinding
- (MTLBindingType)type {
    return MTLBindingTypeBuffer;
}
- (BOOL)isUsed {
    return YES;
}
@end

@interface MTLComputePipelineReflection ()
@property(nonnull, readwrite, strong) NSArray<id<MTLBinding>>* bindings;
@end
@implementation MTLComputePipelineReflection
@synthesize bindings;
- (NSArray<id<MTLBinding>>*)bindings {
    need_macos(13.0, "MTLComputePipelineReflection.bindings");
    return bindings;
}
- (void)setBindings:(NSArray<id<MTLBinding>>*)all {
    bindings = all;
}
@end

@implementation DoublePipeline
- (NSUInteger)threadExecutionWidth {
    return WIDTH;
}
- (NSUInteger)staticThreadgroupMemoryLength {
    return 0;  // fibres find out when they run
}
@end

namespace metal_double {

NSArray* bindings_of(const KernelInfo& kernel) {
    std::vector<id> all;
    for (uint32_t i = 0; i <= kernel.n_buffers; i++) {
        DoubleBinding* binding = [[DoubleBinding alloc] init];
        binding.index = i;
        binding.name = string(i ? "buffer" + std::to_string(i) : "p");
        binding.bufferDataSize = i ? kernel.buffers[i - 1].element_bytes : kernel.params_bytes;
        binding.bufferAlignment = i ? kernel.buffers[i - 1].alignment : 4;
        binding.access = i && kernel.buffers[i - 1].writable ? MTLBindingAccessReadWrite : MTLBindingAccessReadOnly;
        all.push_back(binding);
    }
    return array(all);
}

// What registers leave a kernel: a number N where a condition is "NAME:N".
static NSUInteger max_threads(const char* key, const std::string& kernel) {
    const std::string limited = condition(key).value_or("");
    if (limited.rfind(kernel + ":", 0) != 0) return MAX_THREADS;
    return std::stoul(limited.substr(kernel.size() + 1));
}

DoublePipeline* pipeline(DoubleDevice* device, MTLComputePipelineDescriptor* descriptor,
                         MTLComputePipelineReflection* __strong* reflection, std::string& failure) {
    if (!descriptor.computeFunction) broken("pipeline", "a pipeline descriptor without a function");
    const std::string name = text(descriptor.computeFunction.name);
    if (condition("pipeline") == name) {
        failure = "Compilation failed";
        return nil;
    }
    const KernelInfo* kernel = find_kernel(name);
    if (!kernel) broken("stale-build", "kernel %s was not compiled into this module", name.c_str());
    DoublePipeline* pipeline = [[DoublePipeline alloc] init];
    pipeline->kernel = kernel;
    pipeline->whole_simdgroups = descriptor.threadGroupSizeIsMultipleOfThreadExecutionWidth;
    pipeline.device = device;
    pipeline.label = descriptor.label;
    // With a number asked for, the compiler spends no more registers than that many threads can have.
    const NSUInteger asked = descriptor.maxTotalThreadsPerThreadgroup;
    if (asked > MAX_THREADS) broken("pipeline", "maxTotalThreadsPerThreadgroup of %lu", asked);
    const NSUInteger left = asked ? asked : max_threads("threads", name);
    pipeline.maxTotalThreadsPerThreadgroup = std::min(left, max_threads("threads_at_most", name));
    if (reflection) {
        *reflection = [[MTLComputePipelineReflection alloc] init];
        (*reflection).bindings = bindings_of(*kernel);
    }
    return pipeline;
}

}  // namespace metal_double
