// What the operators on single entries of a matrix share.
#pragma once

#include "register.h"

namespace efftune {

// Raises ValueError unless the indices rise, from 0 on, and end below `size`.
inline void check_entries(Call& call, const int32_t* indices, int64_t count, int64_t size) {
    bool rise = count == 0 || (indices[0] >= 0 && indices[count - 1] < size);
    for (int64_t s = 1; s < count; ++s) rise &= indices[s - 1] < indices[s];
    call.check(rise, "The kernels take indices of entries that rise, from 0 on, and end below N·K.");
}

}  // namespace efftune
