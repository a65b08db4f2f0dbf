// Groups of pack_act and unpack_act. Compiled once per instruction set by multiversion.h, hence no include guard and no
// headers.

#include "philox_lanes.h"

// body(0) .. body(n - 1), in loops whose counts are known: of a loop over n GCC leaves a group of 32 half scalar.
template <class Body>
static EFFTUNE_INLINE void each(int n, const Body& body) {
    int i = 0;
    for (; i + 64 <= n; i += 64) {
#pragma omp simd
        for (int k = i; k < i + 64; ++k) body(k);
    }
    for (; i + 32 <= n; i += 32) {
#pragma omp simd
        for (int k = i; k < i + 32; ++k) body(k);
    }
    for (; i < n; ++i) body(i);
}

// Floats as integers of the same order, and back: NaN and infinities lie at the two ends.
static inline int16_t order(uint16_t h) {
    const auto s = static_cast<int16_t>(h);
    return static_cast<int16_t>(s ^ ((s >> 15) & 0x7FFF));
}
static inline int32_t order(float x) {
    const auto s = static_cast<int32_t>(as_bits(x));
    return s ^ ((s >> 31) & 0x7FFFFFFF);
}
static inline uint16_t unorder(int16_t key) { return static_cast<uint16_t>(order(static_cast<uint16_t>(key))); }
static inline float unorder(int32_t key) {
    return as_float(static_cast<uint32_t>(order(as_float(static_cast<uint32_t>(key)))));
}

constexpr int kPiece = 256;  // elements quantised at a time
constexpr float kFraction = 131072.0f, kSmallest = 0x1p-100f;

// The 16-bit draws of consecutive elements, made many at a time and in order; all one half to round to nearest.
struct Draws {
    static constexpr int kBlocks = 256, kElements = 8 * kBlocks;
    const PackArgs& p;
    const uint64_t last;  // one after the last element that will be asked for
    uint64_t begin = 0, end = 0;
    alignas(64) uint32_t words[4][kBlocks];
    alignas(64) uint32_t ordered[4 * kBlocks];

    Draws(const PackArgs& p, uint64_t last) : p(p), last(last) {
        for (int j = 0; j < kPiece / 2; ++j) ordered[j] = 0x80008000u;
    }

    const uint16_t* at(uint64_t element, int n) {
        const auto* halves = reinterpret_cast<const uint16_t*>(ordered);
        if (!p.stochastic) return halves;
        if (element < begin || element + n > end) make(element);
        return halves + (element - begin);
    }

    void make(uint64_t element) {
        begin = element & ~uint64_t{7};
        const uint64_t wanted = last - begin < kElements ? last - begin : kElements;
        const int blocks = (static_cast<int>(wanted) + 127) / 128 * 16;
        fill_words(words, blocks, p.seed, begin / 8, p.stream, kRounding);
#pragma omp simd
        for (int j = 0; j < blocks; ++j) {
            ordered[4 * j] = words[0][j], ordered[4 * j + 1] = words[1][j];
            ordered[4 * j + 2] = words[2][j], ordered[4 * j + 3] = words[3][j];
        }
        end = begin + 8 * static_cast<uint64_t>(blocks);
    }
};

static EFFTUNE_INLINE uint8_t quantize(float above_low, float inverse, float top, uint16_t draw) {
    const float scaled = above_low * inverse, positive = scaled > 0.0f ? scaled : 0.0f;  // NaN becomes 0
    return static_cast<uint8_t>((static_cast<int32_t>(positive < top ? positive : top) + 2 * draw + 1) >> 17);
}

template <class T>
static inline void quantize_piece(const typename T::Storage* x, int n, float low, float inverse, float top,
                                  const uint16_t* draw, uint8_t* codes) {
    each(n, [=](int i) { codes[i] = quantize(T::load(x[i]) - low, inverse, top, draw[i]); });
}

// Element 2j in the low half of byte j; the high half after an odd last element is 0.
static inline void join_halves(const uint8_t* codes, int n, uint8_t* out) {
    each(n / 2, [=](int j) {
        uint16_t pair;
        memcpy(&pair, codes + 2 * j, 2);
        out[j] = static_cast<uint8_t>(pair | pair >> 4);
    });
    if (n % 2) out[n / 2] = codes[n - 1];
}

// The least and the greatest of a group; one of them is not finite if any element is not.
template <class T>
static inline void group_range(const typename T::Storage* x, int64_t n, float& least, float& most) {
    auto low = order(x[0]), high = low;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t i = 0; i < n; ++i) {
        const auto key = order(x[i]);
        low = key < low ? key : low;
        high = key > high ? key : high;
    }
    least = T::load(unorder(low));
    most = T::load(unorder(high));
}

constexpr int kRun = 16;  // groups whose stats are computed together, to overlap the latencies of two divisions

struct Run {
    float least[kRun], most[kRun];
    uint32_t low[kRun], scale[kRun];  // bits of the floats
    float inverse[kRun];
};

static inline void group_stats(Run& r, float levels) {
#pragma omp simd
    for (int j = 0; j < kRun; ++j) {
        const float least = r.least[j] + 0.0f;  // -0 becomes 0
        const uint32_t up = as_bits(least) >> 31 ? 0xFFFFu : 0u, low = (as_bits(least) + up) & 0xFFFF0000u;
        const float extent = r.most[j] - as_float(low);
        const float rounded = as_float((as_bits(extent / levels) + 0xFFFFu) & 0xFFFF0000u);
        const float scale = rounded < kSmallest ? kSmallest : rounded;
        // A negative NaN may have been rounded to a finite number, hence both.
        const bool finite = (extent <= 0x1.fffffep127f) & (least == least), constant = extent == 0.0f;
        r.low[j] = finite ? low : 0x7FC00000u;
        r.scale[j] = finite ? (constant ? 0u : as_bits(scale)) : 0x7FC00000u;
        r.inverse[j] = finite & !constant ? kFraction / scale : 0.0f;
    }
}

// Where a group lies, counted over all rows.
struct Place {
    int64_t cols, group, row, col;

    Place(int64_t cols, int64_t group, int64_t at) : cols(cols), group(group) {
        const int64_t groups = (cols + group - 1) / group;
        row = at / groups, col = at % groups * group;
    }
    int64_t size() const { return cols - col < group ? cols - col : group; }
    void next() {
        col += group;
        if (col >= cols) col = 0, ++row;
    }
    int64_t element() const { return row * cols + col; }
    int64_t byte(int bits) const { return bits == 8 ? element() : row * ((cols + 1) / 2) + col / 2; }
};

template <class T>
static inline void pack_groups_of(const PackArgs& p, int64_t begin, int64_t end) {
    const auto* x = static_cast<const typename T::Storage*>(p.x);
    const float levels = p.bits == 8 ? 255.0f : 15.0f;
    Place ranged(p.cols, p.group, begin), at = ranged;
    Draws draws(p, Place(p.cols, p.group, end).element());
    Run run{};
    alignas(64) uint8_t whole[kPiece];
    for (int64_t g = begin; g < end; g += kRun) {
        const int count = end - g < kRun ? static_cast<int>(end - g) : kRun;
        for (int j = 0; j < count; ++j, ranged.next())
            group_range<T>(x + ranged.row * p.stride + ranged.col, ranged.size(), run.least[j], run.most[j]);
        group_stats(run, levels);
        for (int j = 0; j < count; ++j, at.next()) {
            p.stats[2 * (g + j)] = static_cast<uint16_t>(run.low[j] >> 16);
            p.stats[2 * (g + j) + 1] = static_cast<uint16_t>(run.scale[j] >> 16);
            const auto* from = x + at.row * p.stride + at.col;
            uint8_t* codes = p.codes + at.byte(p.bits);
            const int64_t n = at.size();
            for (int64_t i = 0; i < n; i += kPiece) {
                const int m = n - i < kPiece ? static_cast<int>(n - i) : kPiece;
                uint8_t* to = p.bits == 8 ? codes + i : whole;
                const float low = as_float(run.low[j]), inverse = run.inverse[j], top = levels * kFraction;
                quantize_piece<T>(from + i, m, low, inverse, top, draws.at(at.element() + i, m), to);
                if (p.bits == 4) join_halves(whole, m, codes + i / 2);
            }
        }
    }
}

// Groups begin..end, counted over all rows: their elements are consecutive in contiguous x.
__attribute__((noinline)) static void pack_groups(const PackArgs& p, int64_t begin, int64_t end) {
    visit(p.dtype, [&](auto type) { pack_groups_of<decltype(type)>(p, begin, end); });
}

template <class T>
static inline void unpack_piece(const uint8_t* codes, int n, float low, float scale, typename T::Storage* out) {
    each(n, [=](int i) { out[i] = T::store(low + scale * static_cast<float>(codes[i])); });
}

static inline void split_halves(const uint8_t* codes, int n, uint8_t* out) {
    each((n + 1) / 2, [=](int j) {
        const auto pair = static_cast<uint16_t>((codes[j] | codes[j] << 4) & 0x0F0F);
        memcpy(out + 2 * j, &pair, 2);
    });
}

template <class T>
static inline void unpack_groups_of(const UnpackArgs& u, int64_t begin, int64_t end) {
    Place at(u.cols, u.group, begin);
    alignas(64) uint8_t whole[kPiece];
    for (int64_t g = begin; g < end; ++g, at.next()) {
        const float low = BFloat16::load(u.stats[2 * g]), scale = BFloat16::load(u.stats[2 * g + 1]);
        const uint8_t* codes = u.codes + at.byte(u.bits);
        auto* out = static_cast<typename T::Storage*>(u.out) + at.element();
        const int64_t n = at.size();
        for (int64_t i = 0; i < n; i += kPiece) {
            const int m = n - i < kPiece ? static_cast<int>(n - i) : kPiece;
            if (u.bits == 4) split_halves(codes + i / 2, m, whole);
            unpack_piece<T>(u.bits == 8 ? codes + i : whole, m, low, scale, out + i);
        }
    }
}

__attribute__((noinline)) static void unpack_groups(const UnpackArgs& u, int64_t begin, int64_t end) {
    visit(u.dtype, [&](auto type) { unpack_groups_of<decltype(type)>(u, begin, end); });
}
