// The Python side of the kernels: the module EFFTUNE_MODULE, _cpu or _cuda, of all that is registered in what it is
// linked with.
#include <Python.h>

#include <cstdarg>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "register.h"

namespace efftune {
namespace {

struct Raised {};  // thrown where Python's error is set

class PythonCall final : public Call {
public:
    PythonCall(const char* name, PyObject* const* arguments, Py_ssize_t count) : name_(name) {
        levels_[0] = {nullptr, arguments, count, 0};
    }
    PythonCall(const PythonCall&) = delete;
    ~PythonCall() {
        while (depth_ > 0) Py_DECREF(levels_[depth_--].sequence);
        Py_XDECREF(answer_);
    }

    PyObject* answered() { return answer_ ? std::exchange(answer_, nullptr) : Py_NewRef(Py_None); }

    bool none() override {
        if (next() == Py_None) return true;
        --levels_[depth_].next;
        return false;
    }

    [[noreturn]] void raise(Error error, const char* format, ...) override {
        va_list values;
        va_start(values, format);
        PyErr_FormatV(error == Error::kValue   ? PyExc_ValueError
                      : error == Error::kIndex ? PyExc_IndexError
                                               : PyExc_RuntimeError,
                      format, values);
        va_end(values);
        throw Raised();
    }

    void end() override {
        const Level& level = levels_[0];
        if (level.next < level.count)
            fail(PyExc_TypeError, std::to_string(level.next) + " arguments, not " + std::to_string(level.count));
    }

    void answer(double number) override { answer_ = made(PyFloat_FromDouble(number)); }
    void answer(const char* text) override { answer_ = made(PyUnicode_FromString(text)); }

protected:
    uint64_t integer(int64_t least, uint64_t most) override {
        PyObject* const item = next();
        PyObject* const number = PyLong_Check(item) ? Py_NewRef(item) : PyNumber_Index(item);
        if (!number) mismatch("an integer", item);
        int overflow = 0;
        const long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
        uint64_t bits = static_cast<uint64_t>(value);
        if (overflow > 0) {
            bits = PyLong_AsUnsignedLongLong(number);
            if (PyErr_Occurred()) PyErr_Clear(), overflow = -1;
        }
        Py_DECREF(number);
        const bool negative = overflow == 0 && value < 0;
        if (overflow >= 0 && (negative ? value >= least : bits <= most)) return bits;
        fail(PyExc_ValueError,
             "an integer from " + std::to_string(least) + " to " + std::to_string(most) + " as " + place() + ", not %R",
             item);
    }

    double real() override {
        PyObject* const item = next();
        const double value = PyFloat_AsDouble(item);
        if (value == -1.0 && PyErr_Occurred()) mismatch("a number", item);
        return value;
    }

    bool flag() override {
        PyObject* const item = next();
        if (!PyBool_Check(item)) mismatch("True or False", item);
        return item == Py_True;
    }

    int index_of(const char* const* names, size_t count, const char* sentence) override {
        PyObject* const item = next();
        if (!PyUnicode_Check(item)) mismatch("a name", item);
        const char* const text = PyUnicode_AsUTF8(item);
        if (!text) throw Raised();
        for (size_t i = 0; i < count; ++i)
            if (strcmp(text, names[i]) == 0) return static_cast<int>(i);
        check(!sentence, sentence);
        std::string known;
        for (size_t i = 0; i < count; ++i) known.append(i == 0 ? "" : i + 1 < count ? ", " : " or ").append(names[i]);
        fail(PyExc_ValueError, known + " as " + place() + ", not %R", item);
    }

    size_t enter() override {
        PyObject* const item = next();
        PyObject* const sequence =
            PyUnicode_Check(item) || PyBytes_Check(item) ? nullptr : PySequence_Fast(item, "not a sequence");
        if (!sequence) mismatch("a list or tuple", item);
        levels_[++depth_] = {sequence, nullptr, PySequence_Fast_GET_SIZE(sequence), 0};
        return static_cast<size_t>(levels_[depth_].count);
    }

    void leave() override {
        const Level left = levels_[depth_--];
        Py_DECREF(left.sequence);
        if (left.next < left.count)
            fail(PyExc_TypeError,
                 std::to_string(left.next) + " items in " + place() + ", not " + std::to_string(left.count));
    }

    void unlock() override { thread_ = PyEval_SaveThread(); }
    void lock() override { PyEval_RestoreThread(thread_); }

private:
    struct Level {
        PyObject* sequence;  // a new reference, but for the call itself
        PyObject* const* arguments;
        Py_ssize_t count, next;
    };

    // The next argument or item, borrowed.
    PyObject* next() {
        Level& level = levels_[depth_];
        if (!level.sequence && level.next < level.count) return level.arguments[level.next++];
        // Asked again: what converts an item to a number may have changed the list.
        if (level.sequence && level.next < PySequence_Fast_GET_SIZE(level.sequence))
            return PySequence_Fast_GET_ITEM(level.sequence, level.next++);
        const std::string more = "more than " + std::to_string(level.next);
        fail(PyExc_TypeError, more + (depth_ == 0 ? " arguments" : " items in " + place(depth_ - 1)));
    }

    // Which was read last.
    std::string place() const { return place(depth_); }
    std::string place(int depth) const {
        std::string text = "argument " + std::to_string(levels_[0].next);
        for (int i = 1; i <= depth; ++i) text = "item " + std::to_string(levels_[i].next) + " of " + text;
        return text;
    }

    // Raises "<name> takes <what>."; %R in it is the item.
    [[noreturn]] void fail(PyObject* type, const std::string& what, PyObject* item = nullptr) const {
        PyErr_Clear();
        PyErr_Format(type, (std::string(name_) + " takes " + what + ".").c_str(), item);
        throw Raised();
    }

    [[noreturn]] void mismatch(const char* wanted, PyObject* item) const {
        fail(PyExc_TypeError, wanted + (" as " + place()) + ", not " + Py_TYPE(item)->tp_name);
    }

    static PyObject* made(PyObject* object) {
        if (!object) throw Raised();
        return object;
    }

    const char* name_;
    Level levels_[4];
    int depth_ = 0;
    PyObject* answer_ = nullptr;
    PyThreadState* thread_ = nullptr;
};

PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
    const auto* const which = static_cast<const Register*>(PyCapsule_GetPointer(self, nullptr));
    try {
        PythonCall call(which->name, arguments, count);
        which->function(call);
        call.end();
        return call.answered();
    } catch (const Raised&) {
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// The function of the module that `which` registers; it and its definition live as long as the process.
PyObject* function(const Register& which, PyObject* module_name) {
    const auto entry = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call));
    PyObject* const self = PyCapsule_New(const_cast<Register*>(&which), nullptr, nullptr);
    if (!self) return nullptr;
    auto* const definition = new PyMethodDef{which.name, entry, METH_FASTCALL, nullptr};
    PyObject* const made = PyCFunction_NewEx(definition, self, module_name);
    Py_DECREF(self);
    return made;
}

}  // namespace
}  // namespace efftune

#define EFFTUNE_JOIN(a, b) a##b
#define EFFTUNE_INIT(name) EFFTUNE_JOIN(PyInit_, name)
#define EFFTUNE_QUOTE(name) #name
#define EFFTUNE_TEXT(name) EFFTUNE_QUOTE(name)

PyMODINIT_FUNC EFFTUNE_INIT(EFFTUNE_MODULE)() {
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, EFFTUNE_TEXT(EFFTUNE_MODULE),
                                     "efftune's compiled kernels; call them through efftune.ops.", -1};
    PyObject* const module = PyModule_Create(&definition);
    PyObject* const name = module ? PyModule_GetNameObject(module) : nullptr;
    for (const efftune::Register* r = efftune::registered; r && !PyErr_Occurred(); r = r->next) {
        if (PyObject_HasAttrString(module, r->name)) {
            PyErr_Format(PyExc_ImportError, "Two operators of %U register %s.", name, r->name);
            break;
        }
        PyObject* const function = efftune::function(*r, name);
        if (function) PyModule_AddObjectRef(module, r->name, function);
        Py_XDECREF(function);
    }
    Py_XDECREF(name);
    if (!PyErr_Occurred()) return module;
    Py_XDECREF(module);
    return nullptr;
}
