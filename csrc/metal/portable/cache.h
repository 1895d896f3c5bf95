// The folder in which compiled kernels wait for the next start. Plain C++ without Metal, so that every machine can test
// it; metal/archive.h is the only user.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace zinc {

// One file of the user's cache. It is written as a whole or not at all. An empty path: there is no cache.
// ZINCMETAL_CACHE names another folder, or is 0 for none.
class CacheFile {
  public:
    // `key` names everything that the content depends on.
    static CacheFile of(const std::string& key) {
        uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
        for (const char c : key) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
        char name[32];
        std::snprintf(name, sizeof(name), "%016llx", static_cast<unsigned long long>(hash));
        const std::filesystem::path folder = default_folder();
        return {folder.empty() ? folder : folder / (std::string(name) + SUFFIX)};
    }

    bool exists() const {
        std::error_code error;
        return !path.empty() && std::filesystem::is_regular_file(path, error);
    }

    void remove() const {
        std::error_code error;
        std::filesystem::remove(path, error);
    }

    // Replaces the file: write(path) writes another one, which takes its place. Returns the error, or nothing. Only the
    // newest files are kept: files of older systems and kernels serve nobody.
    std::string replace(const std::function<std::string(const std::filesystem::path&)>& write) const {
        std::error_code error;
        std::filesystem::create_directories(path.parent_path(), error);
        const Fresh fresh{path.string() + "." + std::to_string(getpid()) + ".new"};
        std::string failure = error ? error.message() : write(fresh.path);
        if (failure.empty()) {
            std::filesystem::rename(fresh.path, path, error);
            if (error) failure = error.message();
        }
        remove_old();
        return failure;
    }

    const std::filesystem::path path;

  private:
    static constexpr const char* SUFFIX = ".pipelines";
    static constexpr size_t MOST_FILES = 8;

    // A file that is removed unless it took the place of another, also if writing throws.
    struct Fresh {
        ~Fresh() {
            std::error_code error;
            std::filesystem::remove(path, error);
        }
        const std::filesystem::path path;
    };

    static std::filesystem::path default_folder() {
        const char* chosen = std::getenv("ZINCMETAL_CACHE");
        if (chosen && *chosen) return std::string(chosen) == "0" ? std::filesystem::path() : chosen;
        const char* home = std::getenv("HOME");
        if (!home || !*home) return {};
        return std::filesystem::path(home) / "Library" / "Caches" / "zincmetal";
    }

    void remove_old() const {
        std::vector<std::pair<std::filesystem::file_time_type, std::filesystem::path>> files;
        std::error_code error;
        for (const auto& entry : std::filesystem::directory_iterator(path.parent_path(), error))
            if (entry.path().extension() == SUFFIX) files.emplace_back(entry.last_write_time(error), entry.path());
        std::sort(files.rbegin(), files.rend());
        for (size_t i = MOST_FILES; i < files.size(); ++i) std::filesystem::remove(files[i].second, error);
    }
};

}  // namespace zinc
