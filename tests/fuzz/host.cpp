// libFuzzer over maps of files that change: open, read, cut, grow, write, close, in the order that the input says.
// Bytes that the file has are read as they are, bytes that it has lost read as zeros and mark the map as damaged.
// clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -Icsrc tests/fuzz/host.cpp csrc/host/bus_guard.cpp
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#include <algorithm>
#include <vector>

#include "host/bus_guard.h"

namespace {

constexpr size_t N_MAPS = 4, MOST_BYTES = 1 << 16;

struct Opened {
    zinc::GuardedMap* map;
    int fd;
    size_t least;  // bytes that the file has had ever since
};

// Files in memory that no map has: the system takes longer to make one than for all else.
std::vector<int>& spare = *new std::vector<int>;

void check(bool held) {
    if (!held) abort();
}

void read_at(const Opened& opened, size_t at) {
    const size_t bytes = opened.map->bytes(), page = size_t(sysconf(_SC_PAGESIZE));
    at %= bytes;
    const auto* memory = static_cast<const volatile uint8_t*>(opened.map->memory());
    const uint8_t seen = memory[at];
    const size_t kept = (opened.least + page - 1) / page * page;
    if (at >= kept) check(seen == 0);
    if (opened.least >= bytes) check(!opened.map->damage().damaged);
}

int empty_file() {
    if (spare.empty()) return memfd_create("fuzz", 0);
    const int fd = spare.back();
    spare.pop_back();
    check(ftruncate(fd, 0) == 0);
    return fd;
}

void give_up(const Opened& one) {
    one.map->close();
    spare.push_back(one.fd);
}

void resize(std::vector<Opened>& all, Opened& one, size_t bytes) {
    check(ftruncate(one.fd, off_t(bytes)) == 0);
    for (Opened& other : all)
        if (other.fd == one.fd) other.least = std::min(other.least, bytes);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n) {
    std::vector<Opened> all;
    for (size_t i = 0; i + 3 <= n; i += 3) {
        const size_t value = size_t(data[i + 1]) << 8 | data[i + 2];
        const uint8_t what = data[i] % 6;
        if (what == 0 && all.size() < N_MAPS) {
            const int fd = empty_file();
            const size_t bytes = value % MOST_BYTES + 1;
            check(fd >= 0 && ftruncate(fd, off_t(bytes)) == 0);
            auto* map = zinc::GuardedMap::open(fd, bytes, "fuzz");
            check(map && map->bytes() == bytes && !map->damage().damaged);
            all.push_back({map, fd, bytes});
        }
        if (all.empty()) continue;
        Opened& one = all[data[i] / 6 % all.size()];
        const uint8_t byte = uint8_t(value);
        if (what == 1 || what == 2) read_at(one, value);
        if (what == 3) resize(all, one, value % MOST_BYTES);
        if (what == 4 && one.least) check(pwrite(one.fd, &byte, 1, off_t(value % one.least)) == 1);
        if (what == 5) {
            give_up(one);
            all.erase(all.begin() + (&one - all.data()));
        }
    }
    for (const Opened& one : all) give_up(one);
    return 0;
}
