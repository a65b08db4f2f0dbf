// What the operators on sampled rows share.
#pragma once

#include "register.h"

namespace efftune {

enum class Sampler : int { kSystematic = 0, kWta = 1, kCrs = 2, kTopk = 3 };  // as in efftune/ops/sample_rows.py

struct SelectRowsArgs {
    const float* scores;
    int64_t rows, kept;
    uint64_t seed;
    uint32_t stream;
    Sampler sampler;
    int64_t* idx;
    float* weight;
    int32_t* fallback;
};

// The arguments of select_rows in _cpu and in _cuda; the last is a GPU's stream.
inline SelectRowsArgs read_select_rows(Call& call, void** cuda_stream) {
    SelectRowsArgs a{};
    int sampler = 0;
    call.read(a.scores, a.rows, a.kept, a.seed, a.stream, sampler, a.idx, a.weight, a.fallback, *cuda_stream);
    call.check(sampler >= 0 && sampler <= 3, "select_rows takes a sampler from 0 to 3.");
    a.sampler = static_cast<Sampler>(sampler);
    return a;
}

// Of `count` rows that are taken of a matrix: raises IndexError where an index is not one of its rows.
inline void check_rows(Call& call, const int64_t* idx, int64_t count, int64_t rows, int64_t cols) {
    call.check(count >= 0 && rows >= 0 && cols >= 0, "gather_rows and scale_rows take sizes of at least 0.");
    for (int64_t s = 0; s < count; ++s) {
        if (idx[s] >= 0 && idx[s] < rows) continue;
        call.raise(Call::Error::kIndex,
                   "Row %lld is outside of a matrix with %lld rows; idx must come from the same number of rows.",
                   static_cast<long long>(idx[s]), static_cast<long long>(rows));
    }
}

}  // namespace efftune
