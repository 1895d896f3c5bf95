#include "conditions.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <thread>

#include "execute.h"
#include "rules.h"
#include "runtime.h"

namespace metal_double {
namespace {

struct Conditions {
    std::mutex mutex;
    std::map<std::string, std::string> values;

    Conditions() {
        if (const char* text = getenv("METAL_DOUBLE")) set(text);
    }
    void set(const std::string& text) {
        const std::lock_guard lock(mutex);
        if (text.empty()) values.clear();
        std::istringstream parts(text);
        for (std::string part; std::getline(parts, part, ';');) {
            const size_t at = part.find('=');
            if (at == std::string::npos) broken("conditions", "'%s' is not key=value", part.c_str());
            const std::string key = part.substr(0, at), value = part.substr(at + 1);
            values.erase(key);
            if (!value.empty()) values[key] = value;
        }
    }
};

Conditions& conditions() {
    static Conditions all;
    return all;
}

}  // namespace

std::optional<std::string> condition(const std::string& key) {
    const std::lock_guard lock(conditions().mutex);
    const auto found = conditions().values.find(key);
    return found == conditions().values.end() ? std::nullopt : std::optional(found->second);
}

bool is_due(const std::string& key, std::string* rest) {
    const std::lock_guard lock(conditions().mutex);
    const auto found = conditions().values.find(key);
    if (found == conditions().values.end()) return false;
    std::string& value = found->second;
    const size_t colon = value.find(':');
    const std::string after = colon == std::string::npos ? "" : value.substr(colon + 1);
    const long left = std::stol(value) - 1;
    if (left > 0) {
        value = std::to_string(left) + (after.empty() ? "" : ":" + after);
        return false;
    }
    conditions().values.erase(found);
    if (rest) *rest = after;
    return true;
}

bool macos_at_least(double version) { return std::stod(condition("macos").value_or("15.0")) >= version; }

void need_macos(double version, const char* api) {
    if (!macos_at_least(version)) broken("availability", "%s is of macOS %.1f", api, version);
}

}  // namespace metal_double

using namespace metal_double;

extern "C" {

const char* metal_double_macos(const char* wanted) {
    if (strncmp(wanted, "macOS ", 6)) broken("availability", "@available(%s) does not name a macOS", wanted);
    return macos_at_least(strtod(wanted + 6, nullptr)) ? "yes" : nullptr;
}

void metal_double_set(const char* text) { conditions().set(text); }

const char* metal_double_report() {
    static std::string text;
    wait_until_idle();
    const Totals totals = encoded();
    std::ostringstream json;
    json << "{\"command_buffers\": " << totals.command_buffers << ", \"encoders\": " << totals.encoders
         << ", \"dispatches\": " << totals.dispatches << ", \"barriers\": " << totals.barriers
         << ", \"resident_bytes\": " << totals.resident_bytes
         << ", \"residency_requests\": " << totals.residency_requests << ", \"wired_sets\": " << totals.wired_sets
         << ", \"residency_sets\": " << totals.residency_sets << ", \"compiled\": " << totals.compiled
         << ", \"built\": " << totals.built << ", \"archived\": " << totals.archived
         << ", \"captured\": " << totals.captured << ", \"activities\": " << totals.activities
         << ", \"efforts\": " << totals.efforts << ", \"n_efforts\": " << totals.n_efforts
         << ", \"longest\": " << take_longest() << ", \"live\": {";
    const char* separator = "";
    for (const auto& [name, n] : live_objects()) {
        json << separator << '"' << name << "\": " << n;
        separator = ", ";
    }
    json << "}}";
    text = json.str();
    return text.c_str();
}

}  // extern "C"
