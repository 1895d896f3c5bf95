// Objective-C for all of the Metal backend: strings, and exceptions that stay inside.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <exception>
#include <string>
#include <utility>

#include "core/device.h"

#if !__has_feature(objc_arc)
#error "the Metal backend needs -fobjc-arc"
#endif

// Residency sets and math modes came with the macOS 15 SDK; an older SDK builds a backend without them.
#if __has_include(<Metal/MTLResidencySet.h>)
#define ZINC_SDK_15 1
#else
#define ZINC_SDK_15 0
#endif

namespace zinc {

inline std::string text(NSString* string) { return string.UTF8String ? std::string(string.UTF8String) : std::string(); }

inline NSString* ns_string(const std::string& string) {
    NSString* result = [[NSString alloc] initWithBytes:string.data()
                                                length:string.size()
                                              encoding:NSUTF8StringEncoding];
    if (!result) throw DeviceError("not valid UTF-8: " + string);
    return result;
}

inline std::string describe(NSError* error) { return error ? text(error.localizedDescription) : "no reason given"; }

// Leaks an object of a fork's parent in the child, without a release: it is a copy of a connection of the parent.
template <class T>
void leave_behind(T& object) {
    new T(object);
}

// Runs body in an autorelease pool. A C++ exception that crossed the pool's scope would leave it undrained. An
// NSException must not leave the backend. So both are thrown as C++ exceptions after the pool.
template <class Body>
void guarded(Body body) {
    std::exception_ptr failure;
    @autoreleasepool {
        try {
            @try {
                body();
            } @catch (NSException* exception) {
                throw DeviceError("Metal raised " + text(exception.name) + ": " + text(exception.reason));
            } @catch (id) {
                throw DeviceError("Metal raised an object that is no NSException");
            }
        } catch (...) {
            failure = std::current_exception();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace zinc
