// The largest of many scores without a sort: their histogram, then those above a bin, and the best of that bin.
#include <algorithm>
#include <vector>

#include "register.h"

namespace efftune {

constexpr int kShift = 17, kBins = 1 << (32 - kShift);  // the sign, the exponent and six bits
constexpr int kBatch = 64;
constexpr uint32_t kInfinity = 0xFF800000u;  // as a key

struct TopkFound {
    std::vector<int32_t> above;
    std::vector<uint64_t> within;  // how far below the bin's end, << 32, and the index: the less the better
};

}  // namespace efftune

#define EFFTUNE_KERNELS "topk_entries_kernels.h"
#include "multiversion.h"

namespace efftune {

// f(part, from, to) for `parts` parts of count scores, each in a thread.
template <class F>
static void in_parts(int64_t count, int parts, const F& f) {
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
    for (int part = 0; part < parts; ++part) f(part, count * part / parts, count * (part + 1) / parts);
}

static int parts_of(int64_t count, int threads) { return count < 1 << 17 ? 1 : threads; }

static bool topk_count(const float* scores, int64_t count, int64_t* bins, int threads) {
    const int parts = parts_of(count, threads);
    std::vector<std::vector<uint32_t>> counts(parts);
    std::vector<char> nan(parts);
    in_parts(count, parts, [&](int part, int64_t from, int64_t to) {
        counts[part].resize(kBins);
        nan[part] = EFFTUNE_DISPATCH(topk_count(scores + from, to - from, counts[part].data()));
    });
    for (const auto& part : counts)
        for (int b = 0; b < kBins; ++b) bins[b] += part[b];
    return std::any_of(nan.begin(), nan.end(), [](char c) { return c != 0; });
}

struct TopkArgs {
    const float* scores;
    int64_t count;
    uint32_t first, bin;
    int32_t* above;
    uint64_t* within;
    int64_t above_room, within_room;
    int64_t* found;  // how many there were above, which may be more than there is room for, and within
};

static void topk_collect(const TopkArgs& a, int threads) {
    const int parts = parts_of(a.count, threads);
    std::vector<TopkFound> found(parts);
    // Where enough are there, only what is better matters: of equal scores that is none. So they need no memory.
    const bool full = a.found[1] == a.within_room;
    const uint64_t worst = full ? *std::max_element(a.within, a.within + a.within_room) : UINT64_MAX;
    in_parts(a.count, parts, [&](int part, int64_t from, int64_t to) {
        const auto first = static_cast<uint32_t>(a.first + from);
        EFFTUNE_DISPATCH(topk_collect(a.scores + from, to - from, first, a.bin, worst, found[part]));
    });
    std::vector<uint64_t> within(a.within, a.within + a.found[1]);
    for (const TopkFound& part : found) {
        const auto count = static_cast<int64_t>(part.above.size());
        if (count <= a.above_room - a.found[0]) std::copy(part.above.begin(), part.above.end(), a.above + a.found[0]);
        a.found[0] += count;
        within.insert(within.end(), part.within.begin(), part.within.end());
    }
    if (static_cast<int64_t>(within.size()) > a.within_room) {
        std::vector<uint64_t> sorted = within;
        const auto last = sorted.begin() + a.within_room - 1;
        std::nth_element(sorted.begin(), last, sorted.end());
        within.erase(std::remove_if(within.begin(), within.end(), [&](uint64_t rank) { return rank > *last; }),
                     within.end());
    }
    std::copy(within.begin(), within.end(), a.within);
    a.found[1] = static_cast<int64_t>(within.size());
}

// Both are in the order of indices.
static void topk_merge(const int32_t* above, int64_t count, const uint64_t* within, int64_t need, int32_t* out) {
    for (int64_t i = 0; i < need; ++i) {
        const auto index = static_cast<int32_t>(within[i] & 0x7FFFFFFFu);
        const int32_t* const next = std::lower_bound(above, above + count, index);
        out = std::copy(above, next, out);
        *out++ = index;
        count -= next - above, above = next;
    }
    std::copy(above, above + count, out);
}

static const Register registered_count("topk_count", [](Call& call) {
    const float* scores = nullptr;
    int64_t count = 0, *bins = nullptr;
    call.read(scores, count, bins);
    const int threads = call.threads();
    call.check(count >= 0, "topk_count takes a count of at least 0.");
    bool nan = false;
    call.run([&] { nan = topk_count(scores, count, bins, threads); });
    call.answer(nan ? 1.0 : 0.0);
});

static const Register registered_collect("topk_collect", [](Call& call) {
    TopkArgs a{};
    call.read(a.scores, a.count, a.first, a.bin, a.above, a.above_room, a.within, a.within_room, a.found);
    const int threads = call.threads();
    call.check(a.count >= 0 && a.above_room >= 0 && a.within_room > 0,
               "topk_collect takes counts of at least 0, and some room.");
    call.check(a.bin < kBins, "topk_collect takes a bin that there is.");
    call.check(a.found[0] >= 0 && a.found[1] >= 0 && a.found[1] <= a.within_room,
               "topk_collect takes numbers of what was found that there is room for.");
    call.run([&] { topk_collect(a, threads); });
});

static const Register registered_merge("topk_merge", [](Call& call) {
    const int32_t* above = nullptr;
    const uint64_t* within = nullptr;
    int32_t* out = nullptr;
    int64_t count = 0, need = 0;
    call.read(above, count, within, need, out);
    call.check(count >= 0 && need >= 0, "topk_merge takes counts of at least 0.");
    call.run([&] { topk_merge(above, count, within, need, out); });
});

}  // namespace efftune
