// The names of the kernels in a source, without a compiler. So a source is compiled only if its kernels are asked for.
// Plain C++ without Metal, so that every machine can test it; metal/library.h is the only user.
#pragma once

#include <algorithm>
#include <cctype>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace zinc {

// Reads the names in KERNEL("name", ..) rows, through the macros that write them. It has the preprocessor's features
// that kernel files use, and skips text that it does not understand.
class KernelNames {
  public:
    // Of a source without includes (SourceFlattener); names that are defined from outside are in `defined`.
    static std::vector<std::string> of(const std::string& source, std::vector<std::string> defined = {}) {
        KernelNames reader;
        for (const std::string& name : defined) reader.macros_[name] = {};
        for (const std::string& line : logical_lines(source)) reader.line(line);
        return reader.names_;
    }

  private:
    struct Macro {
        bool is_function = false;
        std::vector<std::string> parameters;
        std::string body;
    };
    static constexpr int deepest = 32;

    // Without comments, and with continued lines joined.
    static std::vector<std::string> logical_lines(const std::string& source) {
        std::vector<std::string> lines(1);
        for (size_t i = 0; i < source.size(); ++i) {
            const std::string_view two = std::string_view(source).substr(i, 2);
            if (two == "//") {
                i = std::min(source.find('\n', i), source.size()) - 1;
            } else if (two == "/*") {
                i = std::min(source.find("*/", i + 2), source.size() - 2) + 1;
                lines.back() += ' ';
            } else if (two == "\\\n") {
                ++i;
            } else if (source[i] == '"') {
                const size_t end = string_end(source, i);
                lines.back() += source.substr(i, end - i);
                i = end - 1;
            } else if (source[i] == '\n') {
                lines.emplace_back();
            } else {
                lines.back() += source[i];
            }
        }
        return lines;
    }

    static size_t string_end(std::string_view text, size_t begin) {
        size_t i = begin + 1;
        while (i < text.size() && text[i] != '"') i += text[i] == '\\' ? 2 : 1;
        return std::min(i + 1, text.size());
    }

    static bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }

    static std::string_view trim(std::string_view s) {
        const size_t first = s.find_first_not_of(" \t\r");
        if (first == s.npos) return {};
        return s.substr(first, s.find_last_not_of(" \t\r") - first + 1);
    }

    static std::string_view word_at(std::string_view text, size_t begin) {
        size_t end = begin;
        while (end < text.size() && is_word(text[end])) ++end;
        return text.substr(begin, end - begin);
    }

    bool active() const {
        for (const int state : conditions_)
            if (state != 1) return false;
        return true;
    }

    void line(const std::string& whole) {
        const std::string_view text = trim(whole);
        if (text.starts_with('#')) return directive(trim(text.substr(1)));
        if (active()) expand(std::string(text), 0);
    }

    void directive(std::string_view text) {
        const std::string_view verb = word_at(text, 0);
        const std::string_view rest = trim(text.substr(verb.size()));
        if (verb.starts_with("if")) {
            conditions_.push_back(holds(verb, rest) ? 1 : 0);
        } else if (verb.starts_with("el") && !conditions_.empty()) {  // after a branch that was taken: 2, for good
            int& state = conditions_.back();
            state = state == 0 && (verb == "else" || holds(verb, rest)) ? 1 : 2 * (state != 0);
        } else if (verb == "endif" && !conditions_.empty()) {
            conditions_.pop_back();
        } else if (verb == "define" && active()) {
            define(rest);
        } else if (verb == "undef" && active()) {
            macros_.erase(std::string(rest));
        }
    }

    // #ifdef, #ifndef, and an #if or #elif of defined(..) || defined(..).
    bool holds(std::string_view verb, std::string_view rest) const {
        const auto is_defined = [&](std::string_view name) { return macros_.count(std::string(name)) != 0; };
        if (verb == "ifdef" || verb == "ifndef") return is_defined(word_at(rest, 0)) == (verb == "ifdef");
        bool any = rest == "1";
        for (size_t at = 0; (at = rest.find("defined(", at)) != rest.npos;)
            any = is_defined(word_at(rest, at += 8)) || any;
        return any;
    }

    void define(std::string_view text) {
        Macro macro;
        const std::string_view name = word_at(text, 0);
        size_t at = name.size();
        if (at < text.size() && text[at] == '(') {
            macro.is_function = true;
            const size_t close = text.find(')', at);
            macro.parameters = split(text.substr(at + 1, std::min(close, text.size()) - at - 1));
            at = std::min(close, text.size() - 1) + 1;
        }
        macro.body = trim(text.substr(at));
        if (name != "KERNEL" && name != "KERNEL_UNROLLED") macros_[std::string(name)] = macro;
    }

    // Splits at commas outside brackets.
    static std::vector<std::string> split(std::string_view text) {
        std::vector<std::string> parts(1);
        int depth = 0;
        for (size_t i = 0; i < text.size(); ++i) {
            if (text[i] == '"') {
                const size_t end = string_end(text, i);
                parts.back() += text.substr(i, end - i);
                i = end - 1;
                continue;
            }
            depth += (text[i] == '(') - (text[i] == ')');
            if (text[i] == ',' && depth == 0)
                parts.emplace_back();
            else
                parts.back() += text[i];
        }
        for (std::string& part : parts) part = trim(part);
        return parts;
    }

    // The position behind the bracket that closes the bracket at `open`, or npos if none closes it.
    static size_t closing(std::string_view text, size_t open) {
        int depth = 0;
        for (size_t i = open; i < text.size(); ++i) {
            if (text[i] == '"') {
                i = string_end(text, i) - 1;
                continue;
            }
            depth += (text[i] == '(') - (text[i] == ')');
            if (depth == 0) return i;
        }
        return text.npos;
    }

    // Finds KERNEL rows, and expands other macros.
    void expand(const std::string& text, int depth) {
        for (size_t at = 0; at < text.size();) {
            if (text[at] == '"') {
                at = string_end(text, at);
                continue;
            }
            const std::string name(word_at(text, at));
            if (name.empty()) {
                ++at;
                continue;
            }
            at += name.size();
            const bool is_kernel = name == "KERNEL" || name == "KERNEL_UNROLLED";
            const auto macro = macros_.find(name);
            if (at >= text.size() || text[at] != '(' || depth > deepest) continue;
            if (!is_kernel && (macro == macros_.end() || !macro->second.is_function)) continue;
            const size_t close = closing(text, at);
            if (close == text.npos) return;
            const std::vector<std::string> arguments = split(std::string_view(text).substr(at + 1, close - at - 1));
            if (is_kernel)
                add(arguments[name == "KERNEL" ? 0 : std::min<size_t>(1, arguments.size() - 1)]);
            else
                expand(substitute(macro->second, arguments), depth + 1);
            at = close + 1;
        }
    }

    static std::string substitute(const Macro& macro, const std::vector<std::string>& arguments) {
        std::string out;
        const std::string& body = macro.body;
        for (size_t at = 0; at < body.size();) {
            if (body[at] == '"') {
                const size_t end = string_end(body, at);
                out += body.substr(at, end - at);
                at = end;
                continue;
            }
            const std::string_view pasted = std::string_view(body).substr(at, 2);
            const bool quotes = body[at] == '#' && pasted != "##";
            if (pasted == "##") {
                at += 2;
                continue;
            }
            const size_t begin = at + quotes;
            const std::string word(word_at(body, begin));
            if (word.empty()) {
                out += body[at++];
                continue;
            }
            const std::string* value = argument(macro, arguments, word);
            const std::string text = value ? *value : word;
            out += quotes && value ? '"' + text + '"' : text;
            at = begin + word.size();
        }
        return out;
    }

    static const std::string* argument(const Macro& macro, const std::vector<std::string>& arguments,
                                       const std::string& name) {
        for (size_t i = 0; i < macro.parameters.size() && i < arguments.size(); ++i)
            if (macro.parameters[i] == name) return &arguments[i];
        return nullptr;
    }

    // "mul_mv_" "q4_k" is mul_mv_q4_k.
    void add(const std::string& literals) {
        std::string name;
        for (size_t at = 0; (at = literals.find('"', at)) != literals.npos;) {
            const size_t end = string_end(literals, at);
            name += literals.substr(at + 1, end - at - 2);
            at = end;
        }
        if (!name.empty()) names_.push_back(name);
    }

    std::map<std::string, Macro> macros_;
    std::vector<int> conditions_;  // of each open #if: 0 not yet, 1 now, 2 no more
    std::vector<std::string> names_;
};

}  // namespace zinc
