// The device: what this Mac is, and the objects that it gives.
#include <algorithm>
#include <fstream>

#include "conditions.h"
#include "foundation.h"
#include "library.h"
#include "objects.h"
#include "rules.h"

using namespace metal_double;

constexpr uint64_t GIGABYTE = 1 << 30;

@implementation MTLArchitecture
- (NSString*)name {
    return @"applegpu_double";
}
@end

@implementation DoubleDevice
// "Apple9", and every family before it.
- (NSInteger)family {
    return 1000 + std::stol(condition("family").value_or("Apple9").substr(5));
}
- (BOOL)supportsFamily:(MTLGPUFamily)family {
    if (family == MTLGPUFamilyMac2) return YES;
    if (family == MTLGPUFamilyMetal3) return macos_at_least(13.0);
    if (family == MTLGPUFamilyMetal4) return macos_at_least(26.0);
    return family > 1000 && family <= self.family;
}
@synthesize shouldMaximizeConcurrentCompilation;
- (uint64_t)registryID {
    return 0x100000abc;
}
- (NSString*)name {
    return string("Metal double (" + condition("family").value_or("Apple9") + ")");
}
- (MTLArchitecture*)architecture {
    need_macos(14.0, "MTLDevice.architecture");
    return [[MTLArchitecture alloc] init];
}
- (MTLSize)maxThreadsPerThreadgroup {
    return MTLSizeMake(MAX_THREADS, MAX_THREADS, MAX_THREADS);
}
- (BOOL)hasUnifiedMemory {
    return YES;
}
- (BOOL)supportsRaytracing {
    return YES;
}
- (NSUInteger)maxThreadgroupMemoryLength {
    return zinc::msl::max_threadgroup_bytes;
}
- (uint64_t)memory {
    const auto bytes = condition("memory");
    return bytes ? std::stoull(*bytes) : 64 * GIGABYTE;
}
// As Macs report it: two thirds of the memory, or three quarters where there is much.
- (uint64_t)recommendedMaxWorkingSetSize {
    return self.memory > 36 * GIGABYTE ? self.memory / 4 * 3 : self.memory / 3 * 2;
}
- (NSUInteger)maxBufferLength {
    const auto bytes = condition("max_buffer");
    return bytes ? std::stoull(*bytes) : self.memory / 2;
}
- (NSUInteger)currentAllocatedSize {
    return allocated;
}

- (id<MTLCommandQueue>)newCommandQueue {
    if (condition("queue") == "none") return nil;
    DoubleQueue* queue = [[DoubleQueue alloc] init];
    queue.device = self;
    return queue;
}

// Whether a buffer of this length can be had.
- (BOOL)allows:(NSUInteger)length refusal:(const char*)key {
    if (length == 0 || length > self.maxBufferLength)
        broken("buffer-length", "a buffer of %lu bytes; 1 to %lu can be had", length, self.maxBufferLength);
    if (is_due("exception")) raise("NSInvalidArgumentException", "the double was told to raise");
    return !is_due(key) && allocated + length <= self.memory;
}
- (id<MTLBuffer>)newBufferWithLength:(NSUInteger)length options:(MTLResourceOptions)options {
    if (![self allows:length refusal:"alloc"]) return nil;
    return [[DoubleBuffer alloc] initWithDevice:self length:length options:options];
}
- (id<MTLBuffer>)newBufferWithBytesNoCopy:(void*)pointer
                                   length:(NSUInteger)length
                                  options:(MTLResourceOptions)options
                              deallocator:(void (^)(void*, NSUInteger))deallocator {
    if (![self allows:length refusal:"wrap"]) return nil;
    return [[DoubleBuffer alloc] initWithDevice:self
                                        pointer:pointer
                                         length:length
                                        options:options
                                    deallocator:deallocator];
}

- (id<MTLLibrary>)libraryOf:(const std::vector<std::string>&)names
                    failure:(const std::string&)failure
                       code:(MTLLibraryError)code
                      error:(NSError* __autoreleasing*)error {
    if (failure.empty()) return [[DoubleLibrary alloc] initWithNames:names];
    if (error) *error = metal_double::error(MTLLibraryErrorDomain, NSInteger(code), failure);
    return nil;
}
- (id<MTLLibrary>)newLibraryWithURL:(NSURL*)url error:(NSError* __autoreleasing*)error {
    std::string failure;
    const auto names = load(text(url.path), failure);
    return [self libraryOf:names failure:failure code:MTLLibraryErrorFileNotFound error:error];
}
- (id<MTLLibrary>)newLibraryWithSource:(NSString*)source
                               options:(MTLCompileOptions*)options
                                 error:(NSError* __autoreleasing*)error {
    // Masks are infinities and NaN must be seen, both of which fast math, the default, may assume away.
    const bool modes = macos_at_least(15.0);
    if (!options || (modes ? options.mathMode != MTLMathModeSafe : options.fastMathEnabled) ||
        (modes && options.mathFloatingPointFunctions != MTLMathFloatingPointFunctionsPrecise))
        broken("fast-math", "a library is compiled with fast math");
    std::string failure;
    const auto names = compile(text(source), options.languageVersion, failure);
    count(&Totals::compiled);
    const auto warns = condition("warn");
    if (warns && text(source).find(*warns) != std::string::npos && failure.empty() && error)
        *error = metal_double::error(MTLLibraryErrorDomain, 4, "program_source:1:1: warning: " + *warns);
    return [self libraryOf:names failure:failure code:MTLLibraryErrorCompileFailure error:error];
}
- (id<MTLBinaryArchive>)newBinaryArchiveWithDescriptor:(MTLBinaryArchiveDescriptor*)descriptor
                                                 error:(NSError* __autoreleasing*)error {
    if (is_due("archive")) raise("NSInvalidArgumentException", "the double was told to raise");
    DoubleArchive* archive = [[DoubleArchive alloc] init];
    archive.device = self;
    if (!descriptor.url || [archive readFrom:text(descriptor.url.path)]) return archive;
    if (error) *error = metal_double::error(@"MTLBinaryArchiveDomain", 1, "Invalid file");
    return nil;
}

- (id<MTLComputePipelineState>)newComputePipelineStateWithDescriptor:(MTLComputePipelineDescriptor*)descriptor
                                                             options:(MTLPipelineOption)options
                                                          reflection:
                                                              (MTLAutoreleasedComputePipelineReflection*)reflection
                                                               error:(NSError* __autoreleasing*)error {
    std::string failure;
    MTLComputePipelineReflection* told = nil;
    const bool tell = reflection && (options & MTLPipelineOptionArgumentInfo);
    bool archived = false;
    for (DoubleArchive* archive in descriptor.binaryArchives) archived = archived || [archive holds:descriptor];
    if ((options & MTLPipelineOptionFailOnBinaryArchiveMiss) && !archived) return nil;
    if (const auto together = condition("meet")) meet(std::stol(*together));
    count(archived ? &Totals::archived : &Totals::built);
    DoublePipeline* state = pipeline(self, descriptor, tell ? &told : nullptr, failure);
    if (tell) *reflection = told;
    if (!state && error) *error = metal_double::error(MTLLibraryErrorDomain, MTLLibraryErrorCompileFailure, failure);
    return state;
}

- (id<MTLResidencySet>)newResidencySetWithDescriptor:(MTLResidencySetDescriptor*)descriptor
                                               error:(NSError* __autoreleasing*)error {
    need_macos(15.0, "newResidencySetWithDescriptor:error:");
    if (![self supportsFamily:MTLGPUFamilyApple6]) broken("residency", "device does not support residency sets");
    if (condition("residency") == "none") {
        if (error) *error = metal_double::error(@"MTLResidencySetErrorDomain", 1, "no residency sets");
        return nil;
    }
    DoubleResidencySet* set = [[DoubleResidencySet alloc] init];
    count(&Totals::residency_sets);
    set.label = descriptor.label;
    return set;
}
@end

id<MTLDevice> MTLCreateSystemDefaultDevice() {
    const std::string device = condition("device").value_or("");
    return device == "none" || device == "listed" ? nil : [[DoubleDevice alloc] init];
}

NSArray<id<MTLDevice>>* MTLCopyAllDevices() {
    if (condition("device") == "none") return array({});
    return array({[[DoubleDevice alloc] init]});
}
