// How an operator's source makes functions of efftune._cpu or efftune._cuda: a Register for each, with what it does
// when Python calls it. Data pointers come as integers, sizes in elements, no tensors; the callers in efftune/ops check
// devices, shapes and strides.
//
// module.cpp implements Call. Nothing of Python is included here, and nothing need be linked: so an operator compiles
// in a second, and its kernels run in a program without Python, too.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "numeric.h"

namespace efftune {

// One call: its arguments, read in their order. One that is missing or of another kind raises TypeError, one out of
// range ValueError, in a sentence that names its place.
class Call {
public:
    // The next arguments, each as the type of its variable: pointers are addresses, 0 is nullptr; of integers, those
    // that the type holds; lists and tuples are vectors, or arrays of just this length.
    template <class... T>
    void read(T&... values) {
        (take(values), ...);
    }

    // The next argument, a list or tuple of just these.
    template <class... T>
    void read_tuple(T&... values) {
        enter();
        (take(values), ...);
        leave();
    }

    // Whether the next argument is None, which is then read.
    virtual bool none() = 0;

    // The next argument, a name: its index in the table, of names or of structs with a name. Of one that is not there
    // the sentence is said, or the names that are.
    template <size_t N>
    int choice(const char* const (&table)[N], const char* sentence = nullptr) {
        return index_of(table, N, sentence);
    }
    template <class Entry, size_t N>
    int choice(const Entry (&table)[N]) {
        const char* names[N];
        for (size_t i = 0; i < N; ++i) names[i] = table[i].name;
        return index_of(names, N, nullptr);
    }

    // The next argument, how many threads the kernel may run.
    int threads() {
        const auto count = static_cast<int>(integer(std::numeric_limits<int>::min(), std::numeric_limits<int>::max()));
        check(count > 0, "The kernels take at least one thread.");
        return count;
    }

    void check(bool ok, const char* sentence) {
        if (!ok) raise(Error::kValue, "%s", sentence);
    }

    enum class Error { kValue, kIndex, kRuntime };

    // What PyErr_Format makes of it; does not return.
    [[noreturn]] virtual void raise(Error error, const char* format, ...) = 0;

    // Raises TypeError if arguments are left.
    virtual void end() = 0;

    // kernel(), while other Python threads run. The arguments have been read.
    template <class F>
    void run(const F& kernel) {
        struct Unlocked {
            Call& call;
            explicit Unlocked(Call& call) : call(call) { call.unlock(); }
            ~Unlocked() { call.lock(); }
        };
        end();
        const Unlocked unlocked(*this);
        kernel();
    }

    // What the call returns, in place of None.
    virtual void answer(double number) = 0;
    virtual void answer(const char* text) = 0;

protected:
    virtual uint64_t integer(int64_t least, uint64_t most) = 0;
    virtual double real() = 0;
    virtual bool flag() = 0;
    virtual int index_of(const char* const* names, size_t count, const char* sentence) = 0;
    virtual size_t enter() = 0;  // into the next argument, a list or tuple: how many items there are to read
    virtual void leave() = 0;    // raises TypeError if items are left
    virtual void unlock() = 0;
    virtual void lock() = 0;
    ~Call() = default;

private:
    template <class T>
    void take(T*& value) {
        value = reinterpret_cast<T*>(static_cast<uintptr_t>(integer(0, UINTPTR_MAX)));
    }
    template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
    void take(T& value) {
        value = static_cast<T>(integer(std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
    }
    void take(float& value) { value = static_cast<float>(real()); }
    void take(bool& value) { value = flag(); }
    void take(Dtype& value) { value = static_cast<Dtype>(choice(kDtypeNames)); }
    template <class T, size_t N>
    void take(std::array<T, N>& values) {
        enter();
        for (T& value : values) take(value);
        leave();
    }
    template <class T>
    void take(std::vector<T>& values) {
        values.resize(enter());
        for (T& value : values) take(value);
        leave();
    }
};

// A function of the module, for which one of these stands outside of every function.
struct Register {
    const char* name;
    void (*function)(Call& call);
    const Register* next;

    Register(const char* name, void (*function)(Call& call));
};

inline const Register* registered = nullptr;  // the last, which leads to the others

inline Register::Register(const char* name, void (*function)(Call& call))
    : name(name), function(function), next(registered) {
    registered = this;
}

}  // namespace efftune
