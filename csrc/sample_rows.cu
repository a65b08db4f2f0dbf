// Systematic selection of rows on a GPU by one block, without a number that the host would have to wait for. The same
// integers as efftune/ops/sample_rows.py and csrc/sample_rows.cpp, and so the same rows.
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "launch.h"
#include "sample_rows.h"

namespace efftune {
namespace {

constexpr int64_t kMaxCudaRows = 8192;
constexpr int kThreads = 512;  // with 32 rows each, for 16384 of them, registers would spill

struct Mass {
    int64_t count, sum;
};

struct Add {
    __device__ Mass operator()(const Mass& a, const Mass& b) const { return {a.count + b.count, a.sum + b.sum}; }
};

struct Larger {
    __device__ float operator()(float a, float b) const { return a > b ? a : b; }
};

// What turns a score into its integer. Scores are read again where they are needed: they stay in the cache, and
// registers are what the sort is short of.
struct Quantizer {
    const float* scores;
    double most, scale;
    bool uniform, at_least_one;

    __device__ int64_t operator()(int row) const {
        if (uniform) return static_cast<int64_t>(scale);
        const float s = scores[row];
        const int64_t code = static_cast<int64_t>(s / most * scale);
        return code > 0 ? code : (s > 0.0f || at_least_one);
    }
};

template <int kItems>
struct Shared {
    using Sort = cub::BlockRadixSort<uint32_t, kThreads, kItems, uint32_t>;
    union {
        typename Sort::TempStorage sort;
        cub::BlockReduce<Mass, kThreads>::TempStorage mass;
        cub::BlockReduce<float, kThreads>::TempStorage largest;
        cub::BlockScan<int64_t, kThreads>::TempStorage scan;
    } temporary;
    Mass mass;
    float largest;
    bool drawn[kThreads * kItems];  // by row
};

// Sum over the block, for every thread. The memory may be used again at once: the barrier is behind the reduction, and
// the next sum is written only when every thread has come to the next reduction and so has read this one.
template <class S>
__device__ Mass total(S& shared, Mass mine) {
    const Mass sum = cub::BlockReduce<Mass, kThreads>(shared.temporary.mass).Reduce(mine, Add());
    if (threadIdx.x == 0) shared.mass = sum;
    __syncthreads();
    return shared.mass;
}

// Sum over the threads before this one. A barrier has to follow before the memory is used again.
template <class S>
__device__ int64_t sum_before(S& shared, int64_t mine) {
    int64_t before;
    cub::BlockScan<int64_t, kThreads>(shared.temporary.scan).ExclusiveSum(mine, before);
    return before;
}

template <int kItems>
__global__ void __launch_bounds__(kThreads, 1) select_kernel(SelectRowsArgs a) {
    auto& shared = shared_memory<Shared<kItems>>();
    const int rows = static_cast<int>(a.rows), first = static_cast<int>(threadIdx.x) * kItems;

    // The largest score, how many are positive, and whether all of them are scores.
    float largest = 0.0f;
    bool invalid = false;
    Mass mine = {0, 0};
    for (int row = threadIdx.x; row < rows; row += kThreads) {
        const float s = a.scores[row];
        invalid |= !(s >= 0.0f && s <= 3.402823466e38f);  // true for NaN
        largest = s > largest ? s : largest;
        mine.count += s > 0.0f;
    }
    invalid = __syncthreads_or(invalid);
    largest = cub::BlockReduce<float, kThreads>(shared.temporary.largest).Reduce(largest, Larger());
    if (threadIdx.x == 0) shared.largest = largest;
    __syncthreads();
    const int64_t positive = total(shared, mine).count;
    int bits = 62;
    while ((int64_t{1} << (62 - bits)) < a.rows) --bits;
    const Quantizer code{a.scores, shared.largest, static_cast<double>(int64_t{1} << bits), invalid || positive == 0,
                         positive < a.kept};

    mine = {0, 0};
    for (int row = threadIdx.x; row < rows; row += kThreads) mine.sum += code(row);
    const int64_t sum = total(shared, mine).sum;

    // Water-filling, as take_saturated in sample_rows.cpp.
    int64_t taken = 0, n = a.kept, rest = sum;
    for (;;) {
        mine = {0, 0};
        for (int row = threadIdx.x; row < rows; row += kThreads) {
            const int64_t c = code(row);
            const bool saturated = c * n > rest;
            mine.count += saturated;
            mine.sum += saturated ? c : 0;
        }
        const Mass now = total(shared, mine);
        if (now.count == taken) break;
        taken = now.count, n = a.kept - taken, rest = sum - now.sum;
    }

    // Rows in random order, each thread with kItems consecutive ones. What lies behind the last row sorts to the end:
    // the sort is stable.
    uint32_t keys[kItems], order[kItems];
#pragma unroll
    for (int j = 0; j < kItems; j += 4) {
        const Words w = philox(a.seed, static_cast<uint64_t>(first + j) / 4, a.stream, kOrder);
        const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            keys[j + i] = first + j + i < rows ? words[i] : 0xFFFFFFFFu;
            order[j + i] = first + j + i;
        }
    }
    typename Shared<kItems>::Sort(shared.temporary.sort).Sort(keys, order);
    __syncthreads();

    // Widths side by side; a row is drawn if a point falls into its width. This thread looks for the first point that
    // is not before its rows, then walks along.
    int64_t width = 0;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
        const int row = static_cast<int>(order[j]);
        const int64_t c = row < rows ? code(row) : 0;
        width += c * n > rest ? 0 : c;
    }
    int64_t end = sum_before(shared, width);
    const Words w = philox(a.seed, 0, a.stream, kUniform);
    const double u = static_cast<double>(static_cast<uint64_t>(w.w0) << 21 | w.w1 >> 11) * 0x1p-53;
    const auto drawn_r = static_cast<int64_t>(u * static_cast<double>(rest));
    const int64_t r = drawn_r < rest ? drawn_r : rest - 1;
    const auto point = [&](int64_t d) { return d * (rest / n) + (r + d * (rest % n)) / n; };
    int64_t d = 0;
    for (int64_t above = n; d < above;) {
        const int64_t middle = (d + above) / 2;
        if (point(middle) < end) {
            d = middle + 1;
        } else {
            above = middle;
        }
    }
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
        const int row = static_cast<int>(order[j]);
        if (row >= rows) continue;
        const int64_t c = code(row);
        const bool saturated = c * n > rest;
        end += saturated ? 0 : c;
        const bool hit = !saturated && d < n && point(d) < end;
        d += hit;
        shared.drawn[row] = saturated || hit;
    }
    __syncthreads();

    // Out in the order of the rows.
    int64_t count = 0;
    for (int row = first; row < first + kItems && row < rows; ++row) count += shared.drawn[row];
    int64_t at = sum_before(shared, count);
    for (int row = first; row < first + kItems && row < rows; ++row) {
        if (!shared.drawn[row]) continue;
        const int64_t c = code(row);
        a.idx[at] = row;
        a.weight[at] = c * n > rest ? 1.0f : static_cast<float>(static_cast<double>(rest) / static_cast<double>(n * c));
        ++at;
    }
    if (threadIdx.x == 0) *a.fallback = code.uniform;
}

template <int kItems>
cudaError_t launch(const SelectRowsArgs& args, cudaStream_t stream) {
    constexpr int bytes = sizeof(Shared<kItems>);
    const cudaError_t error =
        cudaFuncSetAttribute(select_kernel<kItems>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    return launch_kernel(select_kernel<kItems>, 1, kThreads, bytes, stream, args);
}

__global__ void keep_all(SelectRowsArgs a) {
    for (int64_t i = threadIdx.x; i < a.rows; i += blockDim.x) a.idx[i] = i, a.weight[i] = 1.0f;
    if (threadIdx.x == 0) *a.fallback = 0;
}

cudaError_t select_rows(const SelectRowsArgs& args, cudaStream_t stream) {
    if (args.kept >= args.rows) return launch_kernel(keep_all, 1, 1024, 0, stream, args);
    return args.rows <= 4 * kThreads ? launch<4>(args, stream) : launch<kMaxCudaRows / kThreads>(args, stream);
}

// The stream is torch's current one; the caller sets the device.
const Register registered_select("select_rows", [](Call& call) {
    void* stream = nullptr;
    const SelectRowsArgs a = read_select_rows(call, &stream);
    call.end();
    call.check(
        a.rows >= 0 && (a.rows <= kMaxCudaRows || a.rows <= a.kept) && a.kept > 0 && a.sampler == Sampler::kSystematic,
        "select_rows on a GPU draws systematically, keeps at least one row and takes no more than one block sorts.");
    const cudaError_t error = select_rows(a, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess)
        call.raise(Call::Error::kRuntime, "select_rows did not start: %s", cudaGetErrorString(error));
});

}  // namespace
}  // namespace efftune
