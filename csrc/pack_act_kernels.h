// Groups of pack_act and unpack_act. Compiled once per instruction set by multiversion.h, hence no include guard and no
// headers.

#include "philox_lanes.h"

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

// The 16-bit draws of a run of elements, made many at a time and in order.
struct Draws {
    static constexpr int kBlocks = 256, kElements = 8 * kBlocks;
    alignas(64) uint32_t words[4][kBlocks];
    alignas(64) uint32_t ordered[4 * kBlocks];
    uint64_t begin = 0, end = 0;  // of the elements in `ordered`

    // n is at most kElements - 7; `last` bounds what is worth making.
    const uint16_t* at(const PackArgs& p, uint64_t element, int n, uint64_t last) {
        if (element < begin || element + n > end) {
            begin = element & ~uint64_t{7};
            const uint64_t want = last - begin < kElements ? last - begin : kElements;
            const int blocks = (static_cast<int>(want) + 127) / 128 * 16;
            fill_words(words, blocks, p.seed, begin / 8, p.stream, kRounding);
#pragma omp simd
            for (int j = 0; j < blocks; ++j) {
                ordered[4 * j] = words[0][j], ordered[4 * j + 1] = words[1][j];
                ordered[4 * j + 2] = words[2][j], ordered[4 * j + 3] = words[3][j];
            }
            end = begin + 8 * blocks;
        }
        return reinterpret_cast<const uint16_t*>(ordered) + (element - begin);
    }
};

constexpr int kPiece = 256;  // elements quantised at a time
constexpr float kFraction = 131072.0f, kSmallest = 0x1p-100f;

template <class T>
static inline void quantize_piece(const typename T::Storage* x, int n, float low, float inverse, float top,
                                  const uint16_t* draw, uint8_t* codes) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        const float scaled = (T::load(x[i]) - low) * inverse, above = scaled > 0.0f ? scaled : 0.0f;
        const int32_t position = static_cast<int32_t>(above < top ? above : top);
        codes[i] = static_cast<uint8_t>((position + 2 * draw[i] + 1) >> 17);
    }
}

template <class T>
static inline void quantize_piece_nearest(const typename T::Storage* x, int n, float low, float inverse, float top,
                                          uint8_t* codes) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        const float scaled = (T::load(x[i]) - low) * inverse, above = scaled > 0.0f ? scaled : 0.0f;
        const int32_t position = static_cast<int32_t>(above < top ? above : top);
        codes[i] = static_cast<uint8_t>((position + 65536) >> 17);
    }
}

// Element 2j in the low half of byte j; for an odd n, codes[n] is 0.
static inline void join_halves(const uint8_t* codes, int n, uint8_t* out) {
#pragma omp simd
    for (int j = 0; j < (n + 1) / 2; ++j) out[j] = static_cast<uint8_t>(codes[2 * j] | codes[2 * j + 1] << 4);
}

template <class T>
static inline void pack_group(const PackArgs& p, const typename T::Storage* x, int64_t n, uint64_t element,
                              uint64_t last, uint8_t* codes, uint16_t* stats, Draws& draws) {
    auto least = order(x[0]), most = least;
#pragma omp simd reduction(min : least) reduction(max : most)
    for (int64_t i = 0; i < n; ++i) {
        const auto key = order(x[i]);
        least = key < least ? key : least;
        most = key > most ? key : most;
    }
    const float levels = p.bits == 8 ? 255.0f : 15.0f;
    const float high = T::load(unorder(most)), least_value = T::load(unorder(least)) + 0.0f;  // -0 becomes 0
    const uint32_t least_bits = as_bits(least_value);
    const uint32_t low_bits = (least_bits >> 31 ? least_bits + 0xFFFFu : least_bits) & 0xFFFF0000u;
    const float low = as_float(low_bits), extent = high - low;
    // A negative NaN may round to a finite number, hence both.
    if (!(extent <= 0x1.fffffep127f) || least_value != least_value) {
        stats[0] = stats[1] = 0x7FC0u;
        memset(codes, 0, static_cast<size_t>(p.bits == 8 ? n : (n + 1) / 2));
        return;
    }
    const float rounded = as_float((as_bits(extent / levels) + 0xFFFFu) & 0xFFFF0000u);
    const float scale = extent == 0.0f ? 0.0f : rounded < kSmallest ? kSmallest : rounded;
    const float inverse = extent == 0.0f ? 0.0f : kFraction / scale;
    stats[0] = static_cast<uint16_t>(low_bits >> 16);
    stats[1] = static_cast<uint16_t>(as_bits(scale) >> 16);
    alignas(64) uint8_t whole[kPiece];
    for (int64_t i = 0; i < n; i += kPiece) {
        const int count = n - i < kPiece ? static_cast<int>(n - i) : kPiece;
        uint8_t* to = p.bits == 8 ? codes + i : whole;
        if (p.stochastic)
            quantize_piece<T>(x + i, count, low, inverse, levels * kFraction, draws.at(p, element + i, count, last),
                              to);
        else
            quantize_piece_nearest<T>(x + i, count, low, inverse, levels * kFraction, to);
        if (p.bits == 4) {
            if (count % 2) whole[count] = 0;
            join_halves(whole, count, codes + i / 2);
        }
    }
}

template <class T>
static inline void pack_groups_of(const PackArgs& p, int64_t begin, int64_t end) {
    const int64_t groups = (p.cols + p.group - 1) / p.group, width = p.bits == 8 ? p.cols : (p.cols + 1) / 2;
    Draws draws;
    int64_t row = begin / groups, col = begin % groups * p.group;
    const int64_t last = end / groups * p.cols + end % groups * p.group;
    for (int64_t g = begin; g < end; ++g) {
        const int64_t n = p.cols - col < p.group ? p.cols - col : p.group;
        pack_group<T>(p, static_cast<const typename T::Storage*>(p.x) + row * p.stride + col, n, row * p.cols + col,
                      last, p.codes + row * width + col * p.bits / 8, p.stats + 2 * g, draws);
        col += n;
        if (col == p.cols) col = 0, ++row;
    }
}

// Groups begin..end, counted over all rows: their elements are consecutive in contiguous x.
__attribute__((noinline)) static void pack_groups(const PackArgs& p, int64_t begin, int64_t end) {
    switch (p.dtype) {
        case Dtype::kFloat32:
            return pack_groups_of<Float32>(p, begin, end);
        case Dtype::kBFloat16:
            return pack_groups_of<BFloat16>(p, begin, end);
        case Dtype::kFloat16:
            return pack_groups_of<Float16>(p, begin, end);
    }
}

template <class T>
static inline void unpack_piece(const uint8_t* codes, int n, float low, float scale, typename T::Storage* out) {
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = T::store(low + scale * static_cast<float>(codes[i]));
}

static inline void split_halves(const uint8_t* codes, int n, uint8_t* out) {
#pragma omp simd
    for (int j = 0; j < (n + 1) / 2; ++j) out[2 * j] = codes[j] & 15, out[2 * j + 1] = codes[j] >> 4;
}

template <class T>
static inline void unpack_groups_of(const UnpackArgs& u, int64_t begin, int64_t end) {
    const int64_t groups = (u.cols + u.group - 1) / u.group, width = u.bits == 8 ? u.cols : (u.cols + 1) / 2;
    int64_t row = begin / groups, col = begin % groups * u.group;
    alignas(64) uint8_t whole[kPiece];
    for (int64_t g = begin; g < end; ++g) {
        const int64_t n = u.cols - col < u.group ? u.cols - col : u.group;
        const float low = BFloat16::load(u.stats[2 * g]), scale = BFloat16::load(u.stats[2 * g + 1]);
        const uint8_t* codes = u.codes + row * width + col * u.bits / 8;
        auto* out = static_cast<typename T::Storage*>(u.out) + row * u.cols + col;
        for (int64_t i = 0; i < n; i += kPiece) {
            const int count = n - i < kPiece ? static_cast<int>(n - i) : kPiece;
            if (u.bits == 4) split_halves(codes + i / 2, count, whole);
            unpack_piece<T>(u.bits == 8 ? codes + i : whole, count, low, scale, out + i);
        }
        col += n;
        if (col == u.cols) col = 0, ++row;
    }
}

__attribute__((noinline)) static void unpack_groups(const UnpackArgs& u, int64_t begin, int64_t end) {
    switch (u.dtype) {
        case Dtype::kFloat32:
            return unpack_groups_of<Float32>(u, begin, end);
        case Dtype::kBFloat16:
            return unpack_groups_of<BFloat16>(u, begin, end);
        case Dtype::kFloat16:
            return unpack_groups_of<Float16>(u, begin, end);
    }
}
