// The times of opening a device and making its kernels, for a report from a Mac.
#pragma once

#include <chrono>
#include <cstdio>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace zinc {

class Stopwatch {
  public:
    double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - began_).count(); }

  private:
    const std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
};

class Times {
  public:
    using List = std::vector<std::pair<std::string, std::string>>;

    void note(const std::string& what, double seconds) {
        const std::lock_guard lock(mutex_);
        list_.emplace_back("time to " + what, text(seconds));
    }

    void note_pipeline(const std::string& kernel, double seconds, bool archived) {
        const std::lock_guard lock(mutex_);
        ++n_;
        n_archived_ += archived;
        total_ += seconds;
        if (seconds > slowest_.second) slowest_ = {kernel, seconds};
    }

    List list() const {
        const std::lock_guard lock(mutex_);
        List list = list_;
        if (n_) {
            list.emplace_back("time to build pipelines", text(total_) + " for " + std::to_string(n_) + ", of which " +
                                                             std::to_string(n_archived_) +
                                                             " came from the archive; the slowest, " + slowest_.first +
                                                             ", " + text(slowest_.second));
        }
        return list;
    }

  private:
    static std::string text(double seconds) {
        char words[32];
        std::snprintf(words, sizeof(words), "%.3f s", seconds);
        return words;
    }

    mutable std::mutex mutex_;
    List list_;
    int n_ = 0, n_archived_ = 0;
    double total_ = 0;
    std::pair<std::string, double> slowest_{"", 0};
};

}  // namespace zinc
