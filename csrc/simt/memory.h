// Global and shared memory, every access of which is checked and counted (see common/device.cuh).
#pragma once

#include <cstring>
#include <tuple>
#include <type_traits>

#include "common/number.cuh"
#include "simt/engine.h"

namespace gptkernels {

// What p[i] is where it can be written: reading and writing it are accesses.
template <class P>
class Element {
  public:
    using T = typename P::Type;

    DEVICE explicit Element(P p) : p(p) {}
    DEVICE operator T() const { return p.read(); }
    DEVICE Element& operator=(T x) {
        p.write(x);
        return *this;
    }
    DEVICE Element& operator=(const Element& other) { return *this = (T)other; }
    DEVICE Element& operator+=(T x) { return *this = (T) * this + x; }
    Element(const Element&) = default;

  private:
    P p;
};

template <class T>
struct Global {
    using Type = T;

    T* pointer = nullptr;
    simt::Extent extent = {nullptr, nullptr};

    Global() = default;
    Global(T* pointer) : pointer(pointer), extent(simt::extent_of(pointer)) {}
    Global(T* pointer, simt::Extent extent) : pointer(pointer), extent(extent) {}
    template <class U>
        requires(std::is_same_v<const U, T>)
    DEVICE Global(Global<U> other) : pointer(other.pointer), extent(other.extent) {}

    DEVICE auto operator[](int64_t i) const {
        if constexpr (std::is_const_v<T>) return (*this + i).read();
        else return Element(*this + i);
    }
    DEVICE Global operator+(int64_t i) const {
        return {reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(pointer) + (uintptr_t)i * sizeof(T)), extent};
    }
    explicit operator bool() const { return pointer != nullptr; }
    template <class U>
    DEVICE Global<U> as() const {
        return {reinterpret_cast<U*>(pointer), extent};
    }

    DEVICE auto read() const {
        std::remove_const_t<T> x;
        memset(&x, 0xff, sizeof x);
        if (simt::global_access(simt::Class::LOAD_GLOBAL, pointer, sizeof x, extent)) memcpy(&x, pointer, sizeof x);
        return x;
    }
    DEVICE void write(T x) const {
        if (simt::global_access(simt::Class::STORE_GLOBAL, pointer, sizeof x, extent)) memcpy(pointer, &x, sizeof x);
    }
};

template <class T>
struct Shared {
    using Type = T;

    uint32_t address, begin, end;  // of the array that it points into

    DEVICE Shared(uint32_t address, uint32_t begin, uint32_t end) : address(address), begin(begin), end(end) {}
    template <class U>
        requires(std::is_same_v<const U, T>)
    DEVICE Shared(Shared<U> other) : address(other.address), begin(other.begin), end(other.end) {}

    DEVICE auto operator[](int i) const {
        if constexpr (std::is_const_v<T>) return (*this + i).read();
        else return Element(*this + i);
    }
    DEVICE Shared operator+(int i) const { return {address + (uint32_t)i * (uint32_t)sizeof(T), begin, end}; }
    template <class U>
    DEVICE Shared<U> as() const {
        return {address, begin, end};
    }

    DEVICE auto read() const {
        std::remove_const_t<T> x;
        memset(&x, 0xff, sizeof x);
        if (simt::shared_access(simt::Class::LOAD_SHARED, address, sizeof x, begin, end))
            memcpy(&x, simt::shared_memory() + address, sizeof x);
        return x;
    }
    DEVICE void write(T x) const {
        if (simt::shared_access(simt::Class::STORE_SHARED, address, sizeof x, begin, end))
            memcpy(simt::shared_memory() + address, &x, sizeof x);
    }
};

#define SHARED_ARRAY(T, name, count)                                                                   \
    static const char name##_key = 0;                                                                  \
    const uint32_t name##_begin = ::gptkernels::simt::static_shared(&name##_key, sizeof(T) * (count)); \
    const ::gptkernels::Shared<T> name(name##_begin, name##_begin, name##_begin + (uint32_t)sizeof(T) * (count))

template <class T>
DEVICE Shared<T> dynamic_shared(int byte, int count) {
    uint32_t begin = (uint32_t)byte, end = begin + (uint32_t)(count * (int)sizeof(T));
    if (end > simt::dynamic_shared_size())
        simt::violation(simt::Violation::OUT_OF_BOUNDS_SHARED, "an array up to byte %u, the launch gave %u", end,
                        simt::dynamic_shared_size());
    return {begin, begin, end};
}

// N elements, in accesses of up to 16 bytes.
template <int N, template <class> class Pointer, class T>
DEVICE auto load(Pointer<T> p) {
    constexpr int BYTES = N * sizeof(T) < 16 ? N * sizeof(T) : 16, COUNT = N * sizeof(T) / BYTES;
    static_assert(COUNT * BYTES == N * sizeof(T) && (BYTES & (BYTES - 1)) == 0);
    struct Access {
        char bytes[BYTES];
    };
    Vector<std::remove_const_t<T>, N> v;
    for (int i = 0; i < COUNT; ++i) {
        Access access = (p.template as<const Access>() + i).read();
        memcpy(reinterpret_cast<char*>(&v) + i * BYTES, &access, BYTES);
    }
    return v;
}

template <template <class> class Pointer, class T, int N>
DEVICE void store(Pointer<T> p, const Vector<T, N>& v) {
    constexpr int BYTES = N * sizeof(T) < 16 ? N * sizeof(T) : 16, COUNT = N * sizeof(T) / BYTES;
    struct Access {
        char bytes[BYTES];
    };
    for (int i = 0; i < COUNT; ++i) {
        Access access;
        memcpy(&access, reinterpret_cast<const char*>(&v) + i * BYTES, BYTES);
        (p.template as<Access>() + i).write(access);
    }
}

DEVICE float atomicAdd(Global<float> p, float x) {
    if (!simt::global_access(simt::Class::ATOMIC, p.pointer, sizeof x, p.extent)) return NAN;
    float old = *p.pointer;
    *p.pointer = old + x;
    return old;
}

template <class T, class U>
DEVICE void cp_async16(Shared<T> to, Global<U> from, int bytes = 16) {
    static_assert(std::is_same_v<T, std::remove_const_t<U>>);
    simt::copy_start(to.address, to.begin, to.end, from.pointer, bytes, from.extent);
}
DEVICE void cp_async_commit() { simt::copy_commit(); }
template <int N>
DEVICE void cp_async_wait() {
    simt::copy_wait(N);
}

}  // namespace gptkernels
