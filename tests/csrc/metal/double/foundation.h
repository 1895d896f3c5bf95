// How the double makes objects of its Foundation.
#pragma once

#import <Foundation/Foundation.h>

#include <map>
#include <string>
#include <vector>

namespace metal_double {

NSString* string(const std::string& text);
std::string text(NSString* string);
NSArray* array(const std::vector<id>& objects);
NSError* error(NSErrorDomain domain, NSInteger code, const std::string& description, NSString* key = nil,
               id value = nil);
[[noreturn]] void raise(const std::string& name, const std::string& reason);

}  // namespace metal_double
