#include "simt/log.h"

#include <algorithm>
#include <tuple>

namespace gptkernels::simt {
namespace {

// The lanes of one warp-instruction.
struct Group {
    Entry first;
    int count = 0;
    uint8_t lane[32];
    uint64_t address[32];

    void add(int from, const Entry& entry) {
        if (count == 0) first = entry;
        lane[count] = (uint8_t)from;
        address[count++] = entry.address;
    }
};

void count_global(Counter& counter, const Group& group) {
    uint64_t sorted[32];
    std::copy_n(group.address, group.count, sorted);
    if (!std::is_sorted(sorted, sorted + group.count)) std::sort(sorted, sorted + group.count);
    int addresses = 1, sectors = 1;
    for (int i = 1; i < group.count; ++i) {
        addresses += sorted[i] != sorted[i - 1];
        sectors += sorted[i] / 32 != sorted[i - 1] / 32;
    }
    counter.sectors += sectors;
    counter.ideal_sectors += (addresses * group.first.bytes + 31) / 32;
}

// The most distinct words that one bank has to give.
int wavefronts(const uint32_t* words, int count) {
    uint32_t in_bank[32][32];
    int used[32] = {}, most = 0;
    for (int i = 0; i < count; ++i) {
        uint32_t bank = words[i] % 32, *begin = in_bank[bank], *end = begin + used[bank];
        if (std::find(begin, end, words[i]) == end) {
            if (used[bank] == 32) return 32;
            *end = words[i];
            most = std::max(most, ++used[bank]);
        }
    }
    return most;
}

// An access of 8 or 16 bytes a lane goes by halves or quarters of the warp, unless all of it is one word a bank.
void count_shared(Counter& counter, const Group& group) {
    int words_each = std::max(1, group.first.bytes / 4), lanes_a_pass = 32 / words_each;
    uint32_t words[128];
    int begin = 0, all = 0, total = 0, passes = 0;
    for (int pass = 0, i = 0; pass < words_each; ++pass, begin = all) {
        for (; i < group.count && group.lane[i] < (pass + 1) * lanes_a_pass; ++i)
            for (int w = 0; w < words_each; ++w) words[all++] = (uint32_t)(group.address[i] / 4) + w;
        if (all == begin) continue;
        total += wavefronts(words + begin, all - begin);
        ++passes;
    }
    bool at_once = passes > 1 && wavefronts(words, all) == 1;
    counter.wavefronts += at_once ? 1 : total;
    counter.ideal_wavefronts += at_once ? 1 : passes;
}

void count_group(KernelReport& kernel, const Group& group) {
    Counter& counter = kernel.counters[(int)group.first.c];
    bool copies_from = group.first.c == Class::CP_ASYNC && !group.first.shared;
    if (!copies_from) {  // a copy is logged twice
        ++counter.instructions;
        counter.bytes += group.count * group.first.bytes;
    }
    if (group.first.shared) count_shared(counter, group);
    else count_global(counter, group);
}

// What a lane logged, told apart by site and by how often the lane was there before.
struct Occurrence {
    uint32_t site;
    bool shared;
    uint32_t repeat;
    uint8_t lane;
    const Entry* entry;
    auto key() const { return std::tuple(site, shared, repeat); }
};

}  // namespace

void WarpLog::settle(KernelReport& kernel) {
    // As long as all lanes did the same, entry i of all lanes is one instruction.
    size_t shortest = lanes[0].size(), i = 0;
    for (auto& lane : lanes) shortest = std::min(shortest, lane.size());
    for (; i < shortest; ++i) {
        const Entry& first = lanes[0][i];
        bool same = true;
        for (auto& lane : lanes) same &= lane[i].site == first.site && lane[i].shared == first.shared;
        if (!same) break;
        Group group;
        for (int lane = 0; lane < 32; ++lane) group.add(lane, lanes[lane][i]);
        count_group(kernel, group);
    }
    std::vector<Occurrence> rest;
    for (int lane = 0; lane < 32; ++lane) {
        size_t begin = rest.size();
        for (size_t j = i; j < lanes[lane].size(); ++j) {
            const Entry& entry = lanes[lane][j];
            uint32_t repeat = 0;
            for (size_t k = rest.size(); k-- > begin;)
                if (rest[k].site == entry.site && rest[k].shared == entry.shared) {
                    repeat = rest[k].repeat + 1;
                    break;
                }
            rest.push_back({entry.site, entry.shared, repeat, (uint8_t)lane, &entry});
        }
    }
    std::stable_sort(rest.begin(), rest.end(), [](auto& a, auto& b) { return a.key() < b.key(); });
    for (size_t j = 0; j < rest.size();) {
        Group group;
        auto key = rest[j].key();
        for (; j < rest.size() && rest[j].key() == key; ++j) group.add(rest[j].lane, *rest[j].entry);
        count_group(kernel, group);
    }
    for (auto& lane : lanes) lane.clear();
}

void count_ldmatrix(KernelReport& kernel, const uint32_t* rows, int matrices) {
    Counter& counter = kernel.counters[(int)Class::LDMATRIX];
    for (int m = 0; m < matrices; ++m) {
        uint32_t words[32], groups = 0;
        for (int r = 0; r < 8; ++r) groups |= 1u << (rows[8 * m + r] / 16 % 8);
        for (int w = 0; w < 32; ++w) words[w] = rows[8 * m + w / 4] / 4 + w % 4;
        counter.wavefronts += groups == 0xff ? 1 : wavefronts(words, 32);
    }
    ++counter.instructions;
    counter.bytes += 128 * matrices;
    counter.ideal_wavefronts += matrices;
}

}  // namespace gptkernels::simt
