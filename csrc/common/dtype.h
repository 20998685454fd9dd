// Arrays of a dtype that is known when the program runs, as the CUDA launchers take them; plain C++ for both compilers.
#pragma once

#include <cstdint>

namespace gptkernels {

enum class Type : int { FLOAT32, BFLOAT16, FLOAT16 };
constexpr int bytes_of(Type type) { return type == Type::FLOAT32 ? 4 : 2; }

// A null pointer is an input or output that does not exist.
struct Array {
    const void* data;
    Type type;
};
struct MutableArray {
    void* data;
    Type type;
};

}  // namespace gptkernels
