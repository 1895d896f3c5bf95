// What the double plays: which Mac, which macOS, and what fails. Set by the environment variable METAL_DOUBLE and by
// metal_double_set(), both "key=value;key=value", where no value takes a condition back, and no text all of them:
//   macos=15.0  family=Apple9  memory=BYTES  max_buffer=BYTES    the machine
//   device=none  device=listed  queue=none  residency=none      what it does not have
//   alloc=N  wrap=N  command_buffer=N  encoder=N  the N-th from now is refused
//   exception=N                                  the N-th allocation from now raises an NSException
//   archive=N  archive_written=N                 the same of the N-th archive that is opened, or written
//   archive_add=none                             archives take no kernel
//   library=TEXT  pipeline=NAME                  a source that holds TEXT or is called so (NAME.metal), or this kernel,
//                                                does not compile
//   threads=NAME:N                               this kernel's registers leave it N threads, unless it asks for more
//   threads_at_most=NAME:N                       the same, whatever it asks for
//   gpu=N:CODE  hang=N                           the N-th command buffer from now fails with this code, or never ends;
//                                                CODE may be a word of the driver's: words_of in commands.mm has them
//   pace=MICROSECONDS                            what a dispatch takes on the GPU's clock
//   warn=TEXT                                    a source that holds TEXT compiles with a warning
//   meet=N                                       a pipeline is built when N are being built at a time
//   capture=none  driver=loaded                  no traces; another library has opened Metal before
//   slow=MILLISECONDS                            before a command buffer begins
//   native=0                                     no native kernels
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace metal_double {

std::optional<std::string> condition(const std::string& key);
// Counts down the number that begins the value: true for the N-th call. `rest` gets what follows a colon.
bool is_due(const std::string& key, std::string* rest = nullptr);
bool macos_at_least(double version);
// Names the misuse where the macOS that is played has no such API.
void need_macos(double version, const char* api);

}  // namespace metal_double

// For tests, through ctypes. The report is JSON: live objects by class, what was encoded so far, and the longest
// command buffer since the report before.
extern "C" __attribute__((visibility("default"))) void metal_double_set(const char* conditions);
extern "C" __attribute__((visibility("default"))) const char* metal_double_report();
