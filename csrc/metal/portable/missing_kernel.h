// The error for a kernel that the library does not have. Plain C++ without Metal, so that every machine can test it.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <vector>

namespace zinc {

inline std::string join(const std::vector<std::string>& parts, const std::string& separator) {
    std::string out;
    for (const std::string& part : parts) out += (out.empty() ? "" : separator) + part;
    return out;
}

// Insertions, deletions and substitutions from one string to the other.
inline size_t edit_distance(const std::string& a, const std::string& b) {
    std::vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
    for (size_t i = 1; i <= a.size(); ++i) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b.size(); ++j) {
            const size_t substitute = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = std::min({substitute, row[j] + 1, row[j - 1] + 1});
        }
    }
    return row[b.size()];
}

inline std::vector<std::string> closest_names(const std::string& name, std::vector<std::string> names, size_t count) {
    std::stable_sort(names.begin(), names.end(), [&](const std::string& a, const std::string& b) {
        return edit_distance(name, a) < edit_distance(name, b);
    });
    names.resize(std::min(names.size(), count));
    return names;
}

// broken: the compiler's message, by source that does not compile.
inline std::string missing_kernel_text(const std::string& name, const std::vector<std::string>& names,
                                       const std::map<std::string, std::string>& broken) {
    if (names.empty()) return "no kernel '" + name + "': the kernel library holds none; reinstall zincmetal";
    if (!broken.empty()) {
        std::vector<std::string> first_lines;
        for (const auto& [file, words] : broken) first_lines.push_back(words.substr(0, words.find('\n')));
        return "no kernel '" + name + "': " + join(first_lines, "; ") + " (python -m zincmetal.check says all of it)";
    }
    return "no kernel '" + name + "'; the closest of " + std::to_string(names.size()) + " are " +
           join(closest_names(name, names, 3), ", ");
}

}  // namespace zinc
