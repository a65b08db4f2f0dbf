// Which of multiversion.h's instruction sets is taken: 2 is AVX-512, 1 is AVX2, 0 what every processor has.
#pragma once

namespace efftune {

inline int isa_limit = 2;  // tests lower it, to hold the instruction sets against each other

inline int isa() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    static const int best =
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
            ? 2
        : __builtin_cpu_supports("avx2") ? 1
                                         : 0;
    return best < isa_limit ? best : isa_limit;
#else
    return 0;
#endif
}

}  // namespace efftune
