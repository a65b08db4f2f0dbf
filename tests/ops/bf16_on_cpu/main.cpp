// bf16_product on numbers from stdin, its result to stdout: unit m n k a_stride b_stride out_stride. NaN stands before
// and after each operand and in fresh memory, so that a read beyond shows in the result; a write beyond ends the
// program.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "bf16_product.cpp"

constexpr size_t kGuard = 4096;

void* operator new(size_t bytes, std::align_val_t) {
    auto* whole = static_cast<char*>(std::aligned_alloc(kGuard, 2 * kGuard + (bytes + kGuard - 1) / kGuard * kGuard));
    std::memset(whole, 0xFF, 2 * kGuard + bytes);
    std::memcpy(whole, &bytes, sizeof bytes);
    return whole + kGuard;
}

void operator delete(void* at, std::align_val_t) noexcept {
    const char* whole = static_cast<char*>(at) - kGuard;
    size_t bytes;
    std::memcpy(&bytes, whole, sizeof bytes);
    const auto untouched = [](char c) { return c == '\xFF'; };
    need(std::all_of(whole + sizeof bytes, whole + kGuard, untouched), "a write before the packed operand");
    need(std::all_of(whole + kGuard + bytes, whole + 2 * kGuard + bytes, untouched), "a write behind it");
    std::free(const_cast<char*>(whole));
}

int main(int, char** arguments) {
    const auto number = [&](int i) { return static_cast<int64_t>(std::atoll(arguments[i])); };
    const int64_t m = number(2), n = number(3), k = number(4);
    const auto read = [](int64_t count) {
        std::vector<uint16_t> x(static_cast<size_t>(count) + 2 * kGuard, 0x7FC0);
        need(std::fread(x.data() + kGuard, 2, static_cast<size_t>(count), stdin) == static_cast<size_t>(count),
             "stdin");
        return x;
    };
    const auto a = read(m * number(5)), b = read(n * number(6));
    std::vector<float> out(static_cast<size_t>(m * number(7)) + 2 * kGuard, 7.0f);
    efftune::ProductArgs args{};
    args.a = a.data() + kGuard, args.b = b.data() + kGuard, args.out = out.data() + kGuard;
    args.m = m, args.n = n, args.k = k;
    args.a_stride = number(5), args.b_stride = number(6), args.out_stride = number(7);
    efftune::bf16_product(args, static_cast<efftune::Bf16Unit>(number(1)), 2);
    std::fwrite(out.data(), sizeof(float), out.size(), stdout);  // with what stands around it
}
