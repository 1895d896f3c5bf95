// What the double's classes ask of the Objective-C runtime, beside the calls that the compiler makes by itself.
#pragma once

#include <map>
#include <string>

extern "C" {
// A new object of a class, with a retain count of 1 and all instance variables zero or default constructed.
void* metal_double_new(const void* object_class);
// Whether the pointer is to an object that has not been deallocated yet.
bool metal_double_is_live(const void* object);
const char* metal_double_class_name(const void* object);
}

namespace metal_double {

// How many objects there are of each class, blocks included: what is left at the end has leaked.
std::map<std::string, long> live_objects();

}  // namespace metal_double
