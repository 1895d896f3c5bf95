// Metal's errors in words: why memory was refused, why a command buffer failed, and what to do. Plain C++ without
// Metal, so that every machine can test it.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/device.h"

namespace zinc {

inline std::string refusal_text(const std::string& verb, uint64_t bytes, uint64_t in_use, uint64_t recommended) {
    return "Metal refused to " + verb + " " + std::to_string(bytes) + " bytes; " + std::to_string(in_use) +
           " are in use and " + std::to_string(recommended) +
           " recommended at most; use a smaller context or model, or close other programs";
}

// The failure of a command buffer.
struct Failure {
    std::string text;            // empty if it succeeded
    bool passes = false;         // the device can be used again; otherwise this one goes on failing
    bool out_of_memory = false;  // of the GPU
    bool took_too_long = false;  // for the driver
};

[[noreturn]] inline void throw_failure(const Failure& failure) {
    if (failure.out_of_memory) throw OutOfMemoryError(failure.text);
    throw DeviceError(failure.text);
}

struct ErrorWords {
    const char* what;
    const char* remedy;
    bool passes = false, out_of_memory = false, took_too_long = false;
};

constexpr ErrorWords TIMEOUT = {.what = "timeout: the GPU took too long or hung",
                                .remedy = "close other GPU programs, and report it as a bug if it stays",
                                .took_too_long = true};
constexpr ErrorWords PAGE_FAULT = {.what = "GPU page fault: a kernel touched memory that is not mapped",
                                   .remedy = "keep the model file in place while it is open; otherwise report it as a "
                                             "bug"};
constexpr ErrorWords BANNED = {.what = "access revoked: this process caused too many timeouts or hangs",
                               .remedy = "restart the process"};
constexpr ErrorWords OUT_OF_MEMORY = {.what = "out of memory",
                                      .remedy = "use a smaller model or context, or close other programs",
                                      .passes = true,
                                      .out_of_memory = true};
constexpr ErrorWords VICTIM = {.what = "another program's GPU error took it down",
                               .remedy = "run it again; if it stays, close other GPU programs",
                               .passes = true};
constexpr ErrorWords DISPLAY_WAITED = {.what = "stopped by macOS: it kept the display waiting",
                                       .remedy = "run it again; if it stays, close other GPU programs, or let the "
                                                 "display sleep meanwhile",
                                       .passes = true,
                                       .took_too_long = true};

// The number of the driver's own error. It stands in the text: "Words (0000000e:kIOGPUCommandBuffer...)".
inline std::optional<unsigned long> driver_error(const std::string& description) {
    constexpr size_t digits = 8;
    for (size_t at = 0; (at = description.find('(', at)) != description.npos;) {
        const std::string number = description.substr(++at, digits);
        const auto is_hex = [](unsigned char c) { return std::isxdigit(c) != 0; };
        if (number.size() == digits && std::all_of(number.begin(), number.end(), is_hex) &&
            description.compare(at + digits, 1, ":") == 0)
            return std::stoul(number, nullptr, 16);
    }
    return std::nullopt;
}

// Tells apart the errors of the driver for which Metal has one code.
inline std::optional<ErrorWords> driver_error_words(const std::string& description) {
    const std::optional<unsigned long> number = driver_error(description);
    if (!number) return std::nullopt;
    switch (*number) {
    case 0x2:  // Timeout
    case 0x3:  // Hang
        return TIMEOUT;
    case 0x4:  // SubmissionsIgnored
        return BANNED;
    case 0x5:  // InnocentVictim
        return VICTIM;
    case 0x8:  // OutOfMemory
        return OUT_OF_MEMORY;
    case 0xb:  // PageFault
        return PAGE_FAULT;
    case 0xe:  // ImpactingInteractivity, so named from macOS 26 on
        return DISPLAY_WAITED;
    default:
        return std::nullopt;
    }
}

// MTLCommandBufferError by its value, for the codes of any macOS.
inline ErrorWords code_words(long code) {
    switch (code) {
    case 1:
        return {"internal error", "run again; if it stays, update macOS and report it with this message"};
    case 2:
        return TIMEOUT;
    case 3:
        return PAGE_FAULT;
    case 4:
        return BANNED;
    case 7:
        return {"not permitted: this process may not use the GPU", "run it outside the sandbox or in a login session"};
    case 8:
        return OUT_OF_MEMORY;
    case 9:
        return {"invalid resource: a buffer was gone before the GPU was done with it", "report it as a bug"};
    case 10:
        return {"memoryless resources exhausted", "close other GPU programs"};
    case 11:
        return {"device removed", "reattach the GPU and restart the process"};
    case 12:
        return {"stack overflow in a kernel", "report it as a bug"};
    default:
        return {"unknown error", "update macOS and report it with this message"};
    }
}

// The end of one encoder, from MTLCommandBufferEncoderInfo.
struct EncoderEnd {
    std::string label;
    long state = 0;  // MTLCommandEncoderErrorState
};

inline std::string encoder_end_text(const EncoderEnd& end) {
    static const char* const words[] = {"unknown", "completed", "affected", "pending", "faulted"};
    const bool known = end.state >= 0 && end.state < 5;
    return end.label + " " + (known ? words[end.state] : "in state " + std::to_string(end.state));
}

// The remedy after a failed step: its tokens are not in the sequence, and a recurrent state may have changed.
inline const char* how_to_go_on(const ErrorWords& words) {
    return words.passes ? "; what was computed is lost: prompt again to go on" : "; open the model again to go on";
}

// domain_is_metal tells a MTLCommandBufferError from any other NSError.
inline Failure command_buffer_failure(bool domain_is_metal, long code, const std::string& description,
                                      const std::vector<EncoderEnd>& encoders) {
    const ErrorWords words = driver_error_words(description).value_or(code_words(domain_is_metal ? code : 0));
    std::string text = "the GPU did not finish a command buffer: " + std::string(words.what) + " (code " +
                       std::to_string(code) + ": " + description + ")";
    for (const EncoderEnd& end : encoders) {
        if (end.state != 1 && end.state != 3) text += "; " + encoder_end_text(end);  // completed, pending: not to blame
    }
    text += std::string("; ") + words.remedy + how_to_go_on(words);
    if (encoders.empty()) text += "; ZINCMETAL_METAL_DEBUG=1 shows which kernels were running";
    return {text, words.passes, words.out_of_memory, words.took_too_long};
}

}  // namespace zinc
