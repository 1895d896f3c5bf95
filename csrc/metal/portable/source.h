// Metal compiles a kernel file from one string and has no include path. So the included files are spliced in here.
// Plain C++ without Metal, so that every machine can test it.
#pragma once

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "core/device.h"

namespace zinc {

inline std::string read_text(const std::filesystem::path& file) {
    std::ifstream in(file, std::ios::binary);
    std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    if (!in.is_open() || in.bad()) throw DeviceError("cannot read the kernel source " + file.string());
    return text;
}

// Splices `#include "file"` of a kernel folder. `#include <...>` stays: it is the compiler's own.
class SourceFlattener {
  public:
    explicit SourceFlattener(std::filesystem::path folder) : folder_(std::move(folder)) {}

    // The text of folder/name with its includes in place. With its #line marks the compiler's messages name the file
    // and line that a person can open.
    std::string flatten(const std::string& name) {
        out_.clear();
        open_.clear();
        splice(name);
        return std::move(out_);
    }

  private:
    // Every splice of a header gets a guard with its name. It is not dropped after the first splice: an include under a
    // false #if must not hide a later include.
    void splice(const std::string& name) {
        open_.push_back(name);
        const std::string text = read_text(folder_ / name);
        bool in_comment = false;
        size_t number = 0;
        mark(1, name);
        for (size_t begin = 0; begin < text.size(); ++number) {
            const size_t end = std::min(text.find('\n', begin), text.size());
            line(name, std::string_view(text).substr(begin, end - begin), number + 1, in_comment);
            begin = end + 1;
        }
        open_.pop_back();
    }

    void line(const std::string& file, std::string_view text, size_t number, bool& in_comment) {
        const bool was_in_comment = in_comment;
        in_comment = ends_in_comment(text, in_comment);
        const std::string header = was_in_comment ? "" : included_file(text);
        if (!header.empty()) return include(file, header, number);
        // "#pragma once" means nothing in a main file but a warning; its line stays, empty, for the numbering.
        if (was_in_comment || directive(text) != "pragma once") out_ += text;
        out_ += '\n';
    }

    void include(const std::string& file, const std::string& header, size_t number) {
        const bool cyclic = std::find(open_.begin(), open_.end(), header) != open_.end();
        if (!cyclic && !std::filesystem::is_regular_file(folder_ / header)) {
            throw DeviceError(file + ":" + std::to_string(number) + ": the included file \"" + header +
                              "\" is not in the kernel folder " + folder_.string() + "; reinstall zincmetal");
        }
        if (!cyclic) {
            const std::string guard = guard_name(header);
            out_ += "#ifndef " + guard + "\n#define " + guard + "\n";
            splice(header);
            out_ += "#endif\n";
        }
        mark(number + 1, file);
    }

    void mark(size_t number, const std::string& file) {
        out_ += "#line " + std::to_string(number) + " \"" + file + "\"\n";
    }

    // True if a block comment is open after this line. String literals of kernels hold no comment marks.
    static bool ends_in_comment(std::string_view text, bool open) {
        for (size_t i = 0; i + 1 < text.size(); ++i) {
            const std::string_view two = text.substr(i, 2);
            if (!open && two == "//") return false;
            if (two == (open ? "*/" : "/*")) {
                open = !open;
                ++i;
            }
        }
        return open;
    }

    // "include "a.h"" or "pragma once": a directive without its '#', outer blanks and trailing comment.
    static std::string_view directive(std::string_view text) {
        const auto trim = [](std::string_view s) {
            const size_t first = s.find_first_not_of(" \t\r");
            if (first == s.npos) return std::string_view();
            return s.substr(first, s.find_last_not_of(" \t\r") - first + 1);
        };
        text = trim(text.substr(0, text.find("//")));
        return text.starts_with('#') ? trim(text.substr(1)) : std::string_view();
    }

    static std::string included_file(std::string_view text) {
        std::string_view rest = directive(text);
        if (!rest.starts_with("include")) return "";
        const size_t open = rest.find('"');
        const size_t close = open == rest.npos ? rest.npos : rest.find('"', open + 1);
        if (close == rest.npos) return "";
        return std::string(rest.substr(open + 1, close - open - 1));
    }

    static std::string guard_name(const std::string& header) {
        std::string name = "ZINC_SPLICED_";
        for (const char c : header) name += std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
        return name;
    }

    std::filesystem::path folder_;
    std::string out_;
    std::vector<std::string> open_;  // the files being spliced, outermost first
};

// The .metal files of a folder, in an order that does not depend on the file system.
inline std::vector<std::string> kernel_files(const std::filesystem::path& folder) {
    std::vector<std::string> names;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
        if (entry.path().extension() == ".metal") names.push_back(entry.path().filename().string());
    }
    std::sort(names.begin(), names.end());
    return names;
}

}  // namespace zinc
