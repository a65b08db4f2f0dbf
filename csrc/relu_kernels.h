// A piece of relu with the bits of its derivative, and of its gradient. Compiled once per instruction set by
// multiversion.h, hence no include guard and no headers. Pieces begin at multiples of 8 elements: whole bytes.

constexpr int kReluBatch = 256;

template <class T>
static inline void relu_batch(const ReluArgs& a, int64_t begin, int count) {
    using Storage = typename T::Storage;
    alignas(64) uint8_t on[kReluBatch] = {};
    const auto* x = static_cast<const Storage*>(a.x) + begin;
    auto* y = static_cast<Storage*>(a.y) + begin;
#pragma omp simd
    for (int i = 0; i < count; ++i) {
        const bool positive = !(T::load(x[i]) <= 0.0f);  // NaN, too
        on[i] = positive;
        y[i] = T::load(x[i]) < 0.0f ? Storage(0) : x[i];  // -0 and NaN stay, as in torch
    }
    for (int i = 0; i < count; i += 8) {
        uint64_t eight;
        std::memcpy(&eight, on + i, 8);
        // Byte j holds 0 or 1 at bit 8j; the product brings it to bit 56 + j.
        a.bits[(begin + i) / 8] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
    }
}

template <class Storage>
static inline void relu_backward_batch(const ReluArgs& a, int64_t begin, int count) {
    const auto* dy = static_cast<const Storage*>(a.x) + begin;
    auto* dx = static_cast<Storage*>(a.y) + begin;
    const uint8_t* bits = a.bits + begin / 8;
#pragma omp simd
    for (int i = 0; i < count; ++i) dx[i] = (bits[i / 8] >> (i % 8)) & 1 ? dy[i] : Storage(0);
}

__attribute__((noinline)) static void relu_piece(const ReluArgs& a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kReluBatch) {
        const int count = static_cast<int>(end - i < kReluBatch ? end - i : kReluBatch);
        if (a.backward) {
            a.dtype == Dtype::kFloat32 ? relu_backward_batch<uint32_t>(a, i, count)
                                       : relu_backward_batch<uint16_t>(a, i, count);
            continue;
        }
        visit(a.dtype, [&](auto type) { relu_batch<decltype(type)>(a, i, count); });
    }
}
