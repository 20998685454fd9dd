// Memory under nvcc (see common/device.cuh).
#pragma once

#include <type_traits>

#include "common/number.cuh"

namespace gptkernels {

// The unsigned type of BYTES bytes that one load or store moves.
template <int BYTES>
using Word = std::conditional_t<BYTES == 2, unsigned short,
                                std::conditional_t<BYTES == 4, unsigned, std::conditional_t<BYTES == 8, uint2, uint4>>>;

template <class T>
struct Global {
    T* pointer = nullptr;

    Global() = default;
    __host__ __device__ Global(T* pointer) : pointer(pointer) {}
    template <class U>
        requires(std::is_same_v<const U, T>)
    __host__ __device__ Global(Global<U> other) : pointer(other.pointer) {}

    // An element: of a const T its value, read past the coherent cache.
    DEVICE decltype(auto) operator[](int64_t i) const {
        if constexpr (std::is_const_v<T>) {
            auto word = __ldg(reinterpret_cast<const Word<sizeof(T)>*>(pointer + i));
            std::remove_const_t<T> x;
            memcpy(&x, &word, sizeof x);
            return x;
        } else return static_cast<T&>(pointer[i]);
    }
    DEVICE Global operator+(int64_t i) const { return Global(pointer + i); }
    __host__ __device__ explicit operator bool() const { return pointer != nullptr; }
    template <class U>
    DEVICE Global<U> as() const {
        return Global<U>(reinterpret_cast<U*>(pointer));
    }
};

// Shared memory by its own 32-bit address, which is also what ldmatrix and cp.async take.
template <class T>
struct Shared {
    uint32_t address;

    DEVICE explicit Shared(uint32_t address) : address(address) {}
    template <class U>
        requires(std::is_same_v<const U, T>)
    DEVICE Shared(Shared<U> other) : address(other.address) {}

    DEVICE T& operator[](int i) const {
        return *reinterpret_cast<T*>(__cvta_shared_to_generic(address + i * (int)sizeof(T)));
    }
    DEVICE Shared operator+(int i) const { return Shared(address + i * (int)sizeof(T)); }
    template <class U>
    DEVICE Shared<U> as() const {
        return Shared<U>(address);
    }
};

// An array of a block, whose size is known at compile time.
#define SHARED_ARRAY(T, name, count)                                        \
    __shared__ alignas(16) unsigned char name##_bytes[sizeof(T) * (count)]; \
    Shared<T> name((uint32_t)__cvta_generic_to_shared(name##_bytes))

extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];

// count elements of the launch's shared memory from a byte on; the count is what csrc/simt checks.
template <class T>
DEVICE Shared<T> dynamic_shared(int byte, [[maybe_unused]] int count) {
    return Shared<T>((uint32_t)__cvta_generic_to_shared(dynamic_shared_bytes) + byte);
}

// N elements from p on, in as few accesses as 16 bytes allow; p is aligned to one access.
template <int N, class T>
DEVICE auto load(Global<T> p) {
    using Element = std::remove_const_t<T>;
    constexpr int BYTES = N * sizeof(T) < 16 ? N * sizeof(T) : 16, COUNT = N * sizeof(T) / BYTES;
    static_assert(COUNT * BYTES == N * sizeof(T) && (BYTES & (BYTES - 1)) == 0);
    Vector<Element, N> v;
    UNROLL
    for (int i = 0; i < COUNT; ++i) {
        auto* from = reinterpret_cast<const Word<BYTES>*>(p.pointer) + i;
        Word<BYTES> word;
        if constexpr (std::is_const_v<T>) word = __ldg(from);
        else word = *from;
        memcpy(reinterpret_cast<char*>(&v) + i * BYTES, &word, BYTES);
    }
    return v;
}

template <int N, class T>
DEVICE auto load(Shared<T> p) {
    constexpr int BYTES = N * sizeof(T) < 16 ? N * sizeof(T) : 16, COUNT = N * sizeof(T) / BYTES;
    static_assert(COUNT * BYTES == N * sizeof(T) && (BYTES & (BYTES - 1)) == 0);
    Vector<std::remove_const_t<T>, N> v;
    UNROLL
    for (int i = 0; i < COUNT; ++i) {
        Word<BYTES> word = p.template as<Word<BYTES>>()[i];
        memcpy(reinterpret_cast<char*>(&v) + i * BYTES, &word, BYTES);
    }
    return v;
}

template <class T, int N>
DEVICE void store(Global<T> p, const Vector<T, N>& v) {
    constexpr int BYTES = N * sizeof(T) < 16 ? N * sizeof(T) : 16, COUNT = N * sizeof(T) / BYTES;
    UNROLL
    for (int i = 0; i < COUNT; ++i) {
        Word<BYTES> word;
        memcpy(&word, reinterpret_cast<const char*>(&v) + i * BYTES, BYTES);
        auto* to = reinterpret_cast<Word<BYTES>*>(p.pointer) + i;
        if constexpr (BYTES == 16)  // which nvcc may split into four stores
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x),
                         "r"(word.y), "r"(word.z), "r"(word.w)
                         : "memory");
        else *to = word;
    }
}

template <class T, int N>
DEVICE void store(Shared<T> p, const Vector<T, N>& v) {
    constexpr int BYTES = N * sizeof(T) < 16 ? N * sizeof(T) : 16, COUNT = N * sizeof(T) / BYTES;
    UNROLL
    for (int i = 0; i < COUNT; ++i) {
        Word<BYTES> word;
        memcpy(&word, reinterpret_cast<const char*>(&v) + i * BYTES, BYTES);
        // A packet of floats nvcc splits into four stores of four conflicts each, until the assembler joins them.
        if constexpr (BYTES == 16 && std::is_same_v<T, float>)
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(p.address + 16 * i), "r"(word.x), "r"(word.y),
                         "r"(word.z), "r"(word.w)
                         : "memory");
        else p.template as<Word<BYTES>>()[i] = word;
    }
}

DEVICE float atomicAdd(Global<float> p, float x) { return ::atomicAdd(p.pointer, x); }

// ldmatrix: lane i gives the address of row i (16 bytes) of the 8x8 matrices of 16-bit elements, eight lanes a matrix.
// Register m of lane i is elements 2 (i % 4) and the next of row i / 4 of matrix m; with _trans of column i / 4.
#define GPTKERNELS_LDMATRIX(suffix, modifier)                                                                          \
    template <class T>                                                                                                 \
    DEVICE void ldmatrix_x1##suffix(uint32_t& r, Shared<T> row) {                                                      \
        asm volatile("ldmatrix.sync.aligned.m8n8.x1" modifier ".shared.b16 {%0}, [%1];" : "=r"(r) : "r"(row.address)); \
    }                                                                                                                  \
    template <class T>                                                                                                 \
    DEVICE void ldmatrix_x2##suffix(uint32_t (&r)[2], Shared<T> row) {                                                 \
        asm volatile("ldmatrix.sync.aligned.m8n8.x2" modifier ".shared.b16 {%0, %1}, [%2];"                            \
                     : "=r"(r[0]), "=r"(r[1])                                                                          \
                     : "r"(row.address));                                                                              \
    }                                                                                                                  \
    template <class T>                                                                                                 \
    DEVICE void ldmatrix_x4##suffix(uint32_t (&r)[4], Shared<T> row) {                                                 \
        asm volatile("ldmatrix.sync.aligned.m8n8.x4" modifier ".shared.b16 {%0, %1, %2, %3}, [%4];"                    \
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                                  \
                     : "r"(row.address));                                                                              \
    }
GPTKERNELS_LDMATRIX(, "")
GPTKERNELS_LDMATRIX(_trans, ".trans")
#undef GPTKERNELS_LDMATRIX

// Start copying 16 bytes, of which the first `bytes` are read and the others become zero. Before sm_80, which has no
// such copy, it is a load and a store.
template <class T, class U>
DEVICE void cp_async16(Shared<T> to, Global<U> from, int bytes = 16) {
    static_assert(std::is_same_v<T, std::remove_const_t<U>>);
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address),
                 "l"(__cvta_generic_to_global(from.pointer)), "r"(bytes)
                 : "memory");
#else
    constexpr int N = PACKET<T>;
    Vector<T, N> v = {};
    if (bytes == 16) v = load<N>(from);
    else UNROLL
    for (int i = 0; i < N; ++i)
        if (i * (int)sizeof(T) < bytes) v[i] = from[i];
    store(to, v);
#endif
}

DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most the N latest groups of this thread are under way; other threads see the data after a barrier.
template <int N>
DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace gptkernels
