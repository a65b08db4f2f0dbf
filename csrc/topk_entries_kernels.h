// Scores in bins, and those of a bin and above. Compiled once per instruction set by multiversion.h, hence no include
// guard and no headers.

// What sorts kBatch scores as integers.
static inline void keys_of(const float* scores, int64_t count, uint32_t (&keys)[kBatch]) {
    float padded[kBatch];
    if (count < kBatch) {
        memcpy(padded, scores, static_cast<size_t>(count) * sizeof *scores);
        for (int64_t i = count; i < kBatch; ++i) padded[i] = 0.0f;
        scores = padded;
    }
#pragma omp simd
    for (int i = 0; i < kBatch; ++i) {
        const uint32_t bits = as_bits(scores[i] + 0.0f);  // -0 is 0
        keys[i] = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
    }
}

// Adds the scores to the bins, and returns whether one is NaN.
template <class Count>
__attribute__((noinline)) static bool topk_count(const float* scores, int64_t count, Count* bins) {
    uint32_t nan = 0;
    for (int64_t at = 0; at < count; at += kBatch) {
        uint32_t keys[kBatch];
        const int64_t here = count - at < kBatch ? count - at : kBatch;
        keys_of(scores + at, here, keys);
#pragma omp simd reduction(| : nan)
        for (int i = 0; i < kBatch; ++i) nan |= (keys[i] > kInfinity) | (keys[i] < ~kInfinity);
        for (int64_t i = 0; i < here; ++i) ++bins[keys[i] >> kShift];
    }
    return nan != 0;
}

// Appends the scores above the bin to found.above, and those in it to found.within.
__attribute__((noinline)) static void topk_collect(const float* scores, int64_t count, uint32_t first, uint32_t bin,
                                                   uint64_t worst, TopkFound& found) {
    const uint32_t least = bin << kShift, most = least | ((1u << kShift) - 1);
    for (int64_t at = 0; at < count; at += kBatch) {
        uint32_t keys[kBatch], any = 0;
        const int64_t here = count - at < kBatch ? count - at : kBatch;
        keys_of(scores + at, here, keys);
#pragma omp simd reduction(| : any)
        for (int i = 0; i < kBatch; ++i) any |= keys[i] >= least;
        if (!any) continue;
        int hits = 0;
        uint8_t hit[kBatch];
        for (int64_t i = 0; i < here; ++i) {
            hit[hits] = static_cast<uint8_t>(i);
            hits += keys[i] >= least;  // a branch would be guessed wrong
        }
        for (int h = 0; h < hits; ++h) {
            const uint32_t key = keys[hit[h]], index = first + static_cast<uint32_t>(at + hit[h]);
            const uint64_t rank = static_cast<uint64_t>(most - key) << 32 | index;
            if (key > most)
                found.above.push_back(static_cast<int32_t>(index));
            else if (rank < worst)
                found.within.push_back(rank);
        }
    }
}
