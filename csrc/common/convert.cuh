// Vectors of numbers in memory as vectors of floats in registers, for element types that are known at compile time and
// for those that are not.
#pragma once

#include <type_traits>

#include "common/device.cuh"
#include "common/dtype.h"

namespace gptkernels {

// Two at a time where there are two: one instruction rounds two floats.
template <class T, int N>
DEVICE Vector<float, N> to_floats(const Vector<T, N>& v) {
    Vector<float, N> f;
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
        uint32_t pairs[N / 2];
        memcpy(pairs, &v, sizeof pairs);
        UNROLL
        for (int i = 0; i < N / 2; ++i) {
            float2 two = unpack2<T>(pairs[i]);
            f[2 * i] = two.x;
            f[2 * i + 1] = two.y;
        }
    } else {
        UNROLL
        for (int i = 0; i < N; ++i) f[i] = to_float(v[i]);
    }
    return f;
}

template <class T, int N>
DEVICE Vector<T, N> from_floats(const Vector<float, N>& f) {
    Vector<T, N> v;
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
        uint32_t pairs[N / 2];
        UNROLL
        for (int i = 0; i < N / 2; ++i) pairs[i] = pack2<T>(f[2 * i], f[2 * i + 1]);
        memcpy(&v, pairs, sizeof pairs);
    } else {
        UNROLL
        for (int i = 0; i < N; ++i) v[i] = from_float<T>(f[i]);
    }
    return v;
}

// a + b, rounded to their type.
template <class T, int N>
DEVICE Vector<T, N> add(const Vector<T, N>& a, const Vector<T, N>& b) {
    Vector<T, N> sum;
    if constexpr (sizeof(T) == 2) {
        uint32_t x[N / 2], y[N / 2];
        memcpy(x, &a, sizeof x);
        memcpy(y, &b, sizeof y);
        UNROLL
        for (int i = 0; i < N / 2; ++i) x[i] = add2<T>(x[i], y[i]);
        memcpy(&sum, x, sizeof x);
    } else {
        UNROLL
        for (int i = 0; i < N; ++i) sum[i] = a[i] + b[i];
    }
    return sum;
}

// The element type of an array whose type the kernel looks up as it runs: a load is a branch, the same for all lanes.
struct any {};

template <class Word>
struct AnyGlobal {
    Global<Word> words;
    Type type;
    explicit __device__ __host__ operator bool() const { return (bool)words; }
};

template <class T>
using In = std::conditional_t<std::is_same_v<T, any>, AnyGlobal<const uint16_t>, Global<const T>>;
template <class T>
using Out = std::conditional_t<std::is_same_v<T, any>, AnyGlobal<uint16_t>, Global<T>>;

template <class T>
In<T> input(Array a) {
    if constexpr (std::is_same_v<T, any>) return {static_cast<const uint16_t*>(a.data), a.type};
    else return static_cast<const T*>(a.data);
}
template <class T>
Out<T> output(MutableArray a) {
    if constexpr (std::is_same_v<T, any>) return {static_cast<uint16_t*>(a.data), a.type};
    else return static_cast<T*>(a.data);
}

// N elements from element i on, as they are; floats where the type is looked up.
template <int N, class T>
DEVICE Vector<T, N> load_raw(Global<const T> p, int64_t i) {
    return load<N>(p + i);
}
template <int N>
DEVICE Vector<float, N> load_raw(const AnyGlobal<const uint16_t>& p, int64_t i) {
    if (p.type == Type::FLOAT32) return load<N>(p.words.template as<const float>() + i);
    Vector<uint16_t, N> v = load<N>(p.words + i);
    bool is_bf16 = p.type == Type::BFLOAT16;
    Vector<float, N> f;
    UNROLL
    for (int j = 0; j < N; ++j) f[j] = is_bf16 ? to_float(bf16{v[j]}) : to_float(fp16{v[j]});
    return f;
}

template <int N, class Pointer>
DEVICE Vector<float, N> load_floats(const Pointer& p, int64_t i) {
    return to_floats(load_raw<N>(p, i));
}

// The type of load_raw's elements.
template <class T>
using Raw = std::conditional_t<std::is_same_v<T, any>, float, T>;

template <class T, int N>
DEVICE void store_raw(Global<T> p, int64_t i, const Vector<T, N>& v) {
    store(p + i, v);
}

// Store N floats, rounded to the array's type; returns what a reader of the array gets.
template <class T, int N>
DEVICE Vector<float, N> store_floats(Global<T> p, int64_t i, const Vector<float, N>& f) {
    Vector<T, N> v = from_floats<T>(f);
    store(p + i, v);
    return to_floats(v);
}
template <int N>
DEVICE Vector<float, N> store_floats(const AnyGlobal<uint16_t>& p, int64_t i, const Vector<float, N>& f) {
    if (p.type == Type::FLOAT32) return store_floats(p.words.template as<float>(), i, f);
    if (p.type == Type::BFLOAT16) return store_floats(p.words.template as<bf16>(), i, f);
    return store_floats(p.words.template as<fp16>(), i, f);
}

}  // namespace gptkernels
