// How the double speaks up: a broken rule ends the process, as Metal's own validation layer does.
#pragma once

namespace metal_double {

// Prints "metal double: RULE: what happened" and aborts. Tests look for the rule's name.
[[noreturn]] void broken(const char* rule, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace metal_double
