// One piece of a row of act(gate) up, or of its gradients. Compiled once per instruction set by multiversion.h, hence
// no include guard and no headers. Values pass through short float32 buffers, so that types and activations are
// compiled side by side and not for every pair.

constexpr int kGluBatch = 256;

struct Curve {
    float value, slope;
};

struct Silu {
    static EFFTUNE_INLINE float power(float x) { return exp_decay(x); }
    static EFFTUNE_INLINE Curve at(float x, float power) {
        const Logistic s = logistic(x, power);
        return {x * s.value, s.value * (1.0f + x * s.rest)};
    }
};

struct Gelu {
    static EFFTUNE_INLINE float power(float x) { return exp_bell(x); }
    static EFFTUNE_INLINE Curve at(float x, float power) {
        const Normal n = normal(x, power);
        return {x * n.cdf, n.cdf + x * n.pdf};
    }
};

struct GeluTanh {  // (1 + tanh(u)) / 2 is the logistic function of 2u
    static constexpr float kScale = 1.59576912160573071f, kCube = 0.044715f;  // 2 sqrt(2 / pi)
    static EFFTUNE_INLINE float power(float x) { return exp_decay(kScale * (x * (1.0f + kCube * (x * x)))); }
    static EFFTUNE_INLINE Curve at(float x, float power) {
        const Logistic s = logistic(x, power);
        return {x * s.value, s.value + x * (s.value * s.rest) * (kScale * (1.0f + 3.0f * kCube * (x * x)))};
    }
};

struct Relu {
    static EFFTUNE_INLINE float power(float) { return 0.0f; }
    static EFFTUNE_INLINE Curve at(float x, float) { return {x < 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f}; }
};

struct Relu2 {
    static EFFTUNE_INLINE float power(float) { return 0.0f; }
    static EFFTUNE_INLINE Curve at(float x, float) {
        const float r = x < 0.0f ? 0.0f : x;
        return {r * r, 2.0f * r};
    }
};

template <class A>
static inline void curve(const float* x, float* value, float* slope, int count) {
    alignas(64) float power[kGluBatch];
#pragma omp simd
    for (int i = 0; i < count; ++i) power[i] = A::power(x[i]);
    if (slope) {
#pragma omp simd
        for (int i = 0; i < count; ++i) {
            const Curve c = A::at(x[i], power[i]);
            value[i] = c.value, slope[i] = c.slope;
        }
    } else {
#pragma omp simd
        for (int i = 0; i < count; ++i) value[i] = A::at(x[i], power[i]).value;
    }
}

struct NamedCurve {
    const char* name;
    void (*curve)(const float* x, float* value, float* slope, int count);
};

static constexpr NamedCurve kActivations[] = {
    {"silu", curve<Silu>}, {"gelu", curve<Gelu>},   {"gelu_tanh", curve<GeluTanh>},
    {"relu", curve<Relu>}, {"relu2", curve<Relu2>},
};

template <class T>
static inline void glu_batch(const GluArgs& a, int64_t row, int64_t col, int count) {
    using Storage = typename T::Storage;
    alignas(64) float x[kGluBatch], value[kGluBatch], slope[kGluBatch];
    const auto* gate = static_cast<const Storage*>(a.gate) + row * a.gate_stride + col;
    const auto* up = a.up ? static_cast<const Storage*>(a.up) + row * a.up_stride + col : nullptr;
#pragma omp simd
    for (int i = 0; i < count; ++i) x[i] = T::load(gate[i]);
    kActivations[a.activation].curve(x, value, a.dy ? slope : nullptr, count);
    if (!a.dy) {
        auto* y = static_cast<Storage*>(a.y) + row * a.cols + col;
        if (up) {
#pragma omp simd
            for (int i = 0; i < count; ++i) y[i] = T::store(value[i] * T::load(up[i]));
        } else {
#pragma omp simd
            for (int i = 0; i < count; ++i) y[i] = T::store(value[i]);
        }
        return;
    }
    const auto* dy = static_cast<const Storage*>(a.dy) + row * a.dy_stride + col;
    auto* dgate = static_cast<Storage*>(a.dgate) + row * a.cols + col;
    if (up) {
        auto* dup = static_cast<Storage*>(a.dup) + row * a.cols + col;
#pragma omp simd
        for (int i = 0; i < count; ++i) {
            const float d = T::load(dy[i]);
            dgate[i] = T::store(d * T::load(up[i]) * slope[i]);
            dup[i] = T::store(d * value[i]);
        }
    } else {
#pragma omp simd
        for (int i = 0; i < count; ++i) dgate[i] = T::store(T::load(dy[i]) * slope[i]);
    }
}

__attribute__((noinline)) static void glu_piece(const GluArgs& a, int64_t row, int64_t col, int64_t count) {
    for (int64_t i = 0; i < count; i += kGluBatch) {
        const int left = static_cast<int>(count - i < kGluBatch ? count - i : kGluBatch);
        visit(a.dtype, [&](auto type) { glu_batch<decltype(type)>(a, row, col + i, left); });
    }
}
