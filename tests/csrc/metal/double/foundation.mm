#include "foundation.h"

#include <cstring>
#include <mutex>
#include <set>

#include "conditions.h"
#include "execute.h"
#include "rules.h"
#include "runtime.h"

using metal_double::broken;

extern "C" void objc_exception_throw(id object) __attribute__((noreturn));
static id new_object(Class c) NS_RETURNS_RETAINED;
static id new_object(Class c) { return (__bridge_transfer id)metal_double_new((__bridge const void*)c); }

#pragma clang diagnostic ignored "-Wincomplete-implementation"

@implementation NSObject
+ (instancetype)alloc {
    return new_object(self);
}
+ (Class)class {
    return self;
}
- (instancetype)init {
    return self;
}
- (void)dealloc {
}
- (BOOL)isEqual:(id)object {
    return self == object;
}
@end

// ---- strings: NSString is what its subclasses have in common

@interface StoredString : NSString {
  @public
    std::string stored;
}
@end

@interface NSConstantString : NSString {  // as the compiler lays out a literal
    uint32_t flags, length, bytes, hash;
    const char* data;
}
@end

@interface TinyString : NSString  // a literal of up to 8 ASCII characters: the pointer itself
@end

@implementation NSString
+ (instancetype)alloc {
    return new_object(self == NSString.class ? StoredString.class : self);
}
+ (instancetype)stringWithUTF8String:(const char*)text {
    return text ? metal_double::string(text) : nil;
}
- (const char*)UTF8String {
    broken("abstract", "a string without characters");
}
- (instancetype)initWithBytes:(const void*)bytes length:(NSUInteger)length encoding:(NSStringEncoding)encoding {
    broken("abstract", "a string without memory");
}
- (BOOL)isEqualToString:(NSString*)other {
    return !strcmp(self.UTF8String, other.UTF8String);
}
@end

// Whether the bytes are UTF-8: no stray or missing continuation, nothing overlong, no surrogate, up to U+10FFFF.
static bool is_utf8(const uint8_t* at, const uint8_t* end) {
    while (at < end) {
        const int more = *at < 0x80 ? 0 : *at < 0xc2 ? -1 : *at < 0xe0 ? 1 : *at < 0xf0 ? 2 : *at < 0xf5 ? 3 : -1;
        if (more < 0 || end - at <= more) return false;
        uint32_t code = more ? *at & (0x3fu >> more) : *at;
        for (int i = 1; i <= more; i++) {
            if ((at[i] & 0xc0) != 0x80) return false;
            code = code << 6 | (at[i] & 0x3f);
        }
        const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
        if (code < least[more] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return false;
        at += more + 1;
    }
    return true;
}

@implementation StoredString
- (instancetype)initWithBytes:(const void*)bytes length:(NSUInteger)length encoding:(NSStringEncoding)encoding {
    const auto* begin = static_cast<const uint8_t*>(bytes);
    if (encoding != NSUTF8StringEncoding || !is_utf8(begin, begin + length)) return nil;
    stored.assign(reinterpret_cast<const char*>(begin), length);
    return self;
}
- (const char*)UTF8String {
    return stored.c_str();
}
@end

@implementation NSConstantString
- (const char*)UTF8String {
    return data;
}
@end

@implementation TinyString
- (const char*)UTF8String {
    static std::set<std::string>* const known = new std::set<std::string>;
    static std::mutex mutex;
    const auto bits = reinterpret_cast<uint64_t>((__bridge void*)self);
    std::string characters;
    for (unsigned i = 0; i < (bits >> 3 & 15); i++) characters += char(bits >> (57 - 7 * i) & 127);
    const std::lock_guard lock(mutex);
    return known->insert(characters).first->c_str();
}
@end

// ---- collections

@interface NSArray () {
  @public
    std::vector<id> objects;
}
@end

@implementation NSArray
+ (instancetype)arrayWithObjects:(const id[])objects count:(NSUInteger)count {
    return metal_double::array(std::vector<id>(objects, objects + count));
}
- (NSUInteger)count {
    return objects.size();
}
- (id)firstObject {
    return objects.empty() ? nil : objects[0];
}
- (NSUInteger)countByEnumeratingWithState:(NSFastEnumerationState*)state
                                  objects:(id __unsafe_unretained[])buffer
                                    count:(NSUInteger)n {
    static unsigned long never_changes = 0;
    state->mutationsPtr = &never_changes;
    state->itemsPtr = buffer;
    NSUInteger given = 0;
    while (given < n && state->state < objects.size()) buffer[given++] = objects[state->state++];
    return given;
}
@end

@interface NSDictionary () {
  @public
    std::map<std::string, id> values;
}
@end

@implementation NSDictionary
- (id)objectForKeyedSubscript:(NSString*)key {
    const auto found = values.find(key.UTF8String);
    return found == values.end() ? nil : found->second;
}
@end

// ---- the rest

@interface NSError ()
@property(readwrite, copy) NSErrorDomain domain;
@property(readwrite) NSInteger code;
@property(readwrite, copy) NSDictionary* userInfo;
@property(readwrite, copy) NSString* localizedDescription;
@end
@implementation NSError
@end

@interface NSException ()
@property(readwrite, copy) NSExceptionName name;
@property(readwrite, copy) NSString* reason;
@end
@implementation NSException
@end

@interface NSURL ()
@property(readwrite, copy) NSString* path;
@end
@implementation NSURL
+ (NSURL*)fileURLWithPath:(NSString*)path {
    NSURL* url = [[NSURL alloc] init];
    url.path = path;
    return url;
}
@end

@interface DoubleActivity : NSObject
@end
@implementation DoubleActivity
@end

@implementation NSProcessInfo
+ (NSProcessInfo*)processInfo {
    return [[NSProcessInfo alloc] init];
}
- (NSString*)operatingSystemVersionString {
    return metal_double::string("Version " + metal_double::condition("macos").value_or("15.0") + " (double)");
}
- (id<NSObject>)beginActivityWithOptions:(NSActivityOptions)options reason:(NSString*)reason {
    if (!reason.UTF8String[0]) broken("activity", "an activity without a reason");
    if (options & (1ULL << 20)) broken("activity", "an activity keeps the machine from going to sleep");
    metal_double::count(&metal_double::Totals::activities);
    return [[DoubleActivity alloc] init];
}
- (void)endActivity:(id<NSObject>)activity {
    metal_double::count(&metal_double::Totals::activities, -1);
}
@end

extern "C" bool metal_double_is_kind(const void* object, const char* class_name) {
    return !strcmp(metal_double_class_name(object), class_name);
}

namespace metal_double {

NSString* string(const std::string& text) {
    return [[NSString alloc] initWithBytes:text.data() length:text.size() encoding:NSUTF8StringEncoding];
}

std::string text(NSString* string) { return string ? string.UTF8String : ""; }

NSArray* array(const std::vector<id>& objects) {
    NSArray* result = [[NSArray alloc] init];
    result->objects = objects;
    return result;
}

NSError* error(NSErrorDomain domain, NSInteger code, const std::string& description, NSString* key, id value) {
    NSError* result = [[NSError alloc] init];
    result.domain = domain;
    result.code = code;
    result.localizedDescription = string(description);
    NSDictionary* info = [[NSDictionary alloc] init];
    if (key) info->values[text(key)] = value;
    result.userInfo = info;
    return result;
}

void raise(const std::string& name, const std::string& reason) {
    NSException* exception = [[NSException alloc] init];
    exception.name = string(name);
    exception.reason = string(reason);
    objc_exception_throw(exception);
}

}  // namespace metal_double
