// A trace of the GPU's work, for Xcode.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <string>

#include "metal/objc.h"

namespace zinc {

// A process has one capture at a time. It holds the work that is both made and committed before it stops.
inline void start_capture_of(id<MTLCommandQueue> queue, const std::string& path) {
    MTLCaptureManager* manager = MTLCaptureManager.sharedCaptureManager;
    if (![manager supportsDestination:MTLCaptureDestinationGPUTraceDocument])
        throw DeviceError("this process may not write GPU traces; start it with METAL_CAPTURE_ENABLED=1");
    if (manager.isCapturing) throw DeviceError("a GPU trace is being written already; stop that first");
    MTLCaptureDescriptor* descriptor = [[MTLCaptureDescriptor alloc] init];
    descriptor.captureObject = queue;
    descriptor.destination = MTLCaptureDestinationGPUTraceDocument;
    descriptor.outputURL = [NSURL fileURLWithPath:ns_string(path)];
    NSError* error = nil;
    if (![manager startCaptureWithDescriptor:descriptor error:&error])
        throw DeviceError("no GPU trace can be written to " + path + ": " + describe(error) +
                          "; its name must end in .gputrace, and no file of that name may be there");
}

inline void stop_capture_of_any() {
    MTLCaptureManager* manager = MTLCaptureManager.sharedCaptureManager;
    if (!manager.isCapturing) throw DeviceError("no GPU trace is being written");
    [manager stopCapture];
}

}  // namespace zinc
