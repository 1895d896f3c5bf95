// The cuts of a recording into command buffers. Plain C++ without Metal, so that every machine can test it;
// metal/recording.h is the only user.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <vector>

#include "metal/portable/in_flight.h"

namespace zinc {

// A rough upper bound of a dispatch's seconds on a slow GPU, for use before anything was measured. For a product of two
// matrices, the root of the product of three sizes is the number of multiplications. Other kernels are overestimated,
// within the number of threads.
inline double guessed_seconds(const Dispatch& d) {
    constexpr double per_product = 1.5e-12, per_thread = 150e-9;  // of an M1
    std::array<double, 3> largest{};
    for (const Binding& binding : d.bindings) {
        const auto smallest = std::min_element(largest.begin(), largest.end());
        *smallest = std::max(*smallest, static_cast<double>(binding.bytes));
    }
    double threads = d.threads;
    for (const uint32_t n : d.grid) threads *= n;
    const double products = std::sqrt(largest[0] * largest[1] * largest[2]) / 4;
    return std::max(1e-9, std::min(per_product * products, per_thread * threads));
}

// Cuts one recording into command buffers by the times of its dispatches so far. macOS stops a command buffer that
// keeps the display waiting, and an interrupt waits for the committed command buffers. So none is longer than
// `longest`, unless a single dispatch is. Threads may submit and wait at once.
class Pieces {
  public:
    static constexpr double longest = 0.1, aim = 0.075;  // seconds

    explicit Pieces(const std::vector<Dispatch>& dispatches) {
        for (const Dispatch& d : dispatches) seconds_.push_back(guessed_seconds(d));
        measured_.resize(dispatches.size());
    }

    size_t size() const { return seconds_.size(); }

    // The end of the command buffer that begins with this dispatch. The rest is divided evenly, or is one command
    // buffer if it is short.
    size_t end_of(size_t begin) const {
        const std::lock_guard lock(mutex_);
        const double left = sum(begin, size());
        if (left <= longest) return size();
        const double share = left / std::ceil(left / aim);
        double taken = seconds_[begin];
        size_t end = begin + 1;
        const auto is_nearer = [&](double next) { return taken + next / 2 <= share && taken + next <= longest; };
        while (end < size() && is_nearer(seconds_[end])) taken += seconds_[end++];
        return end;
    }

    // The dispatches [begin, end) went to this command buffer.
    void committed(size_t begin, size_t end, uint64_t number) {
        const std::lock_guard lock(mutex_);
        pieces_[number % InFlight::limit] = {begin, end, number};
    }

    // Learns from the command buffers that have ended.
    void learn(InFlight& in_flight) {
        const std::lock_guard lock(mutex_);
        for (Piece& piece : pieces_) {
            if (!piece.number) continue;
            InFlight::Ended ended{};
            const InFlight::State state = in_flight.state_of(piece.number, ended);
            if (state == InFlight::State::running) continue;
            if (state == InFlight::State::ended) learn(piece.begin, piece.end, ended);
            piece.number = 0;
        }
    }

  private:
    struct Piece {
        size_t begin, end;
        uint64_t number;  // 0: none
    };

    double sum(size_t begin, size_t end) const {
        double total = 0;
        for (size_t i = begin; i < end; ++i) total += seconds_[i];
        return total;
    }

    // A longer time than expected is believed at once, for the rest of the recording too. A shorter one is believed by
    // half: a step of fewer tokens may have been measured. Less than a sixteenth has another reason: the weights were
    // read from the disk before. A command buffer that the driver stopped took too long, for any measured time.
    void learn(size_t begin, size_t end, const InFlight::Ended& ended) {
        constexpr double fewer_tokens = 1. / 16, stopped = 4;
        if (begin == end || (ended.seconds <= 0 && !ended.took_too_long)) return;
        const double ratio = ended.took_too_long ? stopped : ended.seconds / sum(begin, end);
        const double factor = ratio > 1 ? ratio : ratio < fewer_tokens ? 4 * ratio : (1 + ratio) / 2;
        for (size_t i = 0; i < size(); ++i) {
            const bool own = begin <= i && i < end;
            if (own || factor > 1 || !measured_[i]) seconds_[i] *= factor;
            if (own) measured_[i] = true;
        }
    }

    mutable std::mutex mutex_;
    std::vector<double> seconds_;
    std::vector<bool> measured_;
    std::array<Piece, InFlight::limit> pieces_{};
};

}  // namespace zinc
