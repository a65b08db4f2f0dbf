// Norms, selection and gathering of rows. The selection works on integers, in the order of efftune/ops/sample_rows.py,
// and draws the same rows: sums of integers are exact.
#include "sample_rows.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace efftune {

struct RowNormsArgs {
    const void* x;
    int64_t stride;  // elements from row to row
    float* out;
    int64_t rows, cols;
    Dtype dtype;
};

}  // namespace efftune

#define EFFTUNE_KERNELS "sample_rows_kernels.h"
#include "multiversion.h"

namespace efftune {
namespace {

using Codes = std::vector<int64_t>;

// Scores as integers below 2^62 / M, positive ones at least 1; returns whether uniform ones had to take their place.
bool quantize(const SelectRowsArgs& a, Codes& codes) {
    float largest = 0.0f;
    bool valid = true;
    int64_t positive = 0;
    for (int64_t i = 0; i < a.rows; ++i) {
        const float s = a.scores[i];
        valid &= s >= 0.0f && s <= std::numeric_limits<float>::max();  // false for NaN
        largest = s > largest ? s : largest;
        positive += s > 0.0f;
    }
    int bits = 62;
    while ((int64_t{1} << (62 - bits)) < a.rows) --bits;
    const int64_t one = int64_t{1} << bits;
    if (!valid || positive == 0) {
        std::fill(codes.begin(), codes.end(), one);
        return true;
    }
    const double scale = static_cast<double>(one), most = largest;
    for (int64_t i = 0; i < a.rows; ++i) {
        const auto code = static_cast<int64_t>(a.scores[i] / most * scale);
        codes[i] = std::max<int64_t>(code, a.scores[i] > 0.0f || positive < a.kept);
    }
    return false;
}

// Rows in the order of their Philox words, equal words in that of their indices: a radix sort by 11 bits at a time.
std::vector<uint32_t> random_order(const SelectRowsArgs& a) {
    struct Entry {
        uint32_t key, row;
    };
    std::vector<Entry> from(a.rows), to(a.rows);
    for (int64_t i = 0; i < a.rows; i += 4) {
        const Words w = philox(a.seed, static_cast<uint64_t>(i) / 4, a.stream, kOrder);
        const uint32_t keys[4] = {w.w0, w.w1, w.w2, w.w3};
        for (int64_t j = i; j < std::min(i + 4, a.rows); ++j) from[j] = {keys[j - i], static_cast<uint32_t>(j)};
    }
    for (int shift = 0; shift < 32; shift += 11) {
        std::array<uint32_t, 2048> start{};
        for (const Entry& e : from) ++start[e.key >> shift & 2047u];
        uint32_t sum = 0;
        for (uint32_t& s : start) sum += std::exchange(s, sum);
        for (const Entry& e : from) to[start[e.key >> shift & 2047u]++] = e;
        from.swap(to);
    }
    std::vector<uint32_t> order(a.rows);
    std::transform(from.begin(), from.end(), order.begin(), [](const Entry& e) { return e.row; });
    return order;
}

double uniform(const SelectRowsArgs& a, int64_t t) {
    const Words w = philox(a.seed, static_cast<uint64_t>(t) / 2, a.stream, kUniform);
    const uint64_t high = t % 2 ? w.w2 : w.w0, low = t % 2 ? w.w3 : w.w1;
    return static_cast<double>(high << 21 | low >> 11) * 0x1p-53;
}

// A number in [0, rest).
int64_t point(const SelectRowsArgs& a, int64_t t, int64_t rest) {
    return std::min(static_cast<int64_t>(uniform(a, t) * static_cast<double>(rest)), rest - 1);
}

struct Taken {
    int64_t count, rest;      // rows taken with weight 1, and the mass of the others
    std::vector<char> taken;  // for each row
};

// Water-filling: whose share of the draws that remain exceeds 1 is taken; that raises the share of the others, until
// nothing changes. The set only grows, so there are at most `kept` rounds, and a handful in practice.
Taken take_saturated(const SelectRowsArgs& a, const Codes& codes, int64_t total) {
    Taken t{0, total, std::vector<char>(a.rows)};
    for (;;) {
        const int64_t left = a.kept - t.count, rest = t.rest;
        int64_t count = 0, mass = 0;
        for (int64_t i = 0; i < a.rows; ++i) {
            const bool saturated = codes[i] * left > rest;
            t.taken[i] = saturated;
            count += saturated;
            mass += saturated ? codes[i] : 0;
        }
        if (count == t.count) return t;
        t.count = count, t.rest = total - mass;
    }
}

Taken take_largest(const SelectRowsArgs& a, const Codes& codes, int64_t total) {
    Taken t{0, total, std::vector<char>(a.rows)};
    if (a.sampler == Sampler::kCrs) return t;
    std::vector<uint32_t> order(a.rows);
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(), [&](uint32_t i, uint32_t j) { return codes[i] > codes[j]; });
    double least = std::numeric_limits<double>::infinity();
    int64_t below = total;
    for (int64_t c = 0; c < a.kept && a.sampler == Sampler::kWta; below -= codes[order[c++]]) {
        const double ratio = static_cast<double>(below) / static_cast<double>(a.kept - c);
        if (ratio < least) least = ratio, t.count = c;
    }
    if (a.sampler == Sampler::kTopk) t.count = a.kept;
    for (int64_t c = 0; c < t.count; ++c) {
        t.taken[order[c]] = true;
        t.rest -= codes[order[c]];
    }
    return t;
}

}  // namespace

static void row_norms(const RowNormsArgs& args, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (args.rows * args.cols > 16384)
    for (int64_t row = 0; row < args.rows; ++row) EFFTUNE_DISPATCH(row_norm(args, row));
}

struct GatherRowsArgs {
    const void* x;
    const int64_t* idx;
    void* out;
    int64_t cols, stride, kept;
    int itemsize;
};

static void gather_rows(const GatherRowsArgs& args, int threads) {
    const int64_t bytes = args.cols * args.itemsize, stride = args.stride * args.itemsize;
#pragma omp parallel for schedule(static) num_threads(threads) if (args.kept * bytes > 65536)
    for (int64_t s = 0; s < args.kept; ++s)
        memcpy(static_cast<char*>(args.out) + s * bytes, static_cast<const char*>(args.x) + args.idx[s] * stride,
               static_cast<size_t>(bytes));
}

static void select_rows(const SelectRowsArgs& a) {
    if (a.kept >= a.rows) {
        std::iota(a.idx, a.idx + a.rows, int64_t{0});
        std::fill(a.weight, a.weight + a.rows, 1.0f);
        *a.fallback = 0;
        return;
    }
    const bool systematic = a.sampler == Sampler::kSystematic;
    Codes codes(a.rows), cumulative(a.rows);
    *a.fallback = quantize(a, codes);
    const int64_t total = std::accumulate(codes.begin(), codes.end(), int64_t{0});
    const Taken t = (systematic ? take_saturated : take_largest)(a, codes, total);
    const int64_t n = a.kept - t.count, rest = t.rest;
    int64_t* end = a.idx;
    for (int64_t i = 0; i < a.rows; ++i)
        if (t.taken[i]) *end++ = i;

    if (n > 0) {
        std::vector<uint32_t> order;
        if (systematic) order = random_order(a);
        int64_t sum = 0;
        for (int64_t i = 0; i < a.rows; ++i) {
            const int64_t row = systematic ? order[i] : i;
            cumulative[i] = sum += t.taken[row] ? 0 : codes[row];
        }
        if (systematic) {
            const int64_t r = point(a, 0, rest);
            for (int64_t d = 0, i = 0; d < n; ++d) {
                const int64_t at = d * (rest / n) + (r + d * (rest % n)) / n;  // (r + d·rest) / n would overflow
                while (cumulative[i] <= at) ++i;
                *end++ = order[i];
            }
        } else {
            for (int64_t d = t.count; d < a.kept; ++d)
                *end++ = std::upper_bound(cumulative.begin(), cumulative.end(), point(a, d, rest)) - cumulative.begin();
        }
    }
    std::sort(a.idx, end);
    for (int64_t s = 0; s < a.kept; ++s) {
        const int64_t row = a.idx[s];
        const double weight = static_cast<double>(rest) / static_cast<double>(n * codes[row]);
        a.weight[s] = t.taken[row] ? 1.0f : static_cast<float>(weight);
    }
}

static const Register registered_norms("row_norms", [](Call& call) {
    RowNormsArgs a{};
    call.read(a.x, a.stride, a.out, a.rows, a.cols, a.dtype);
    const int threads = call.threads();
    call.check(a.rows >= 0 && a.cols >= 0, "row_norms takes sizes of at least 0.");
    call.run([&] { row_norms(a, threads); });
});

static const Register registered_select("select_rows", [](Call& call) {
    void* cuda_stream = nullptr;
    const SelectRowsArgs a = read_select_rows(call, &cuda_stream);
    call.check(a.rows >= 0 && a.rows < (int64_t{1} << 31) && a.kept > 0,
               "select_rows takes fewer than 2^31 rows and keeps at least one.");
    call.run([&] { select_rows(a); });
});

static const Register registered_gather("gather_rows", [](Call& call) {
    GatherRowsArgs a{};
    int64_t rows = 0;
    call.read(a.x, a.idx, a.out, rows, a.cols, a.stride, a.kept, a.itemsize);
    const int threads = call.threads();
    call.check(a.itemsize > 0, "gather_rows takes elements of at least one byte.");
    check_rows(call, a.idx, a.kept, rows, a.cols);
    call.run([&] { gather_rows(a, threads); });
});

}  // namespace efftune
