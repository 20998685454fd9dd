// The two GELUs and their slopes in fp32, on one exponential and one reciprocal.
#pragma once

#include "common/device.cuh"

namespace gptkernels {

struct GeluAt {
    float value, slope;
};

// x s, s = (1 + tanh u)/2 = 1/(1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3): without tanh's cancellation.
template <bool SLOPE>
DEVICE GeluAt gelu_tanh(float x) {
    float square = x * x;
    float e = exp2_approx(x * (-2.302208198f - 0.1029432396f * square));  // -2 log2(e) sqrt(2/pi) (1, 0.044715)
    float s = rcp_approx(1.0f + e), value = x * s;
    if (!SLOPE) return {value, 0.0f};
    float rest = fminf(e, 1e38f) * s;  // 1 - s; where e is infinite s is 0, and so must the product be
    return {value, s + value * rest * (1.595769122f + 0.2140644488f * square)};  // (x s)' = s + x s (1 - s) d2u/dx
}

// x P(normal <= x). P(normal <= -|x|) = e^(-x^2/2) w/2, w = erfcx(|x|/sqrt 2) = t R(t), t = 1/(1 + 0.35 |x|/sqrt 2): R
// is a polynomial fitted to relative error 7e-9 for |x| up to 13, beyond which the factor before it is 0.
template <bool SLOPE>
DEVICE GeluAt gelu_erf(float x) {
    float t = rcp_approx(1.0f + 0.247487373f * fabsf(x));
    float w = 0.0378750207f * t - 0.155879176f;
    w = w * t + 0.173773002f;
    w = w * t - 0.0166566689f;
    w = w * t + 0.077063159f;
    w = w * t + 0.151863675f;
    w = w * t + 0.148981255f;
    w = w * t + 0.188423067f;
    w = w * t + 0.197068915f;
    w = w * t + 0.197487758f;
    float e = exp2_approx(-0.7213475204f * (x * x));  // log2(e)/2
    float below = 0.5f * e * (w * t);
    float probability = x < 0.0f ? below : 1.0f - below;
    return {x * probability, SLOPE ? probability + x * e * 0.39894228f : 0.0f};  // 1/sqrt(2 pi)
}

template <bool TANH, bool SLOPE>
DEVICE GeluAt gelu(float x) {
    if constexpr (TANH) return gelu_tanh<SLOPE>(x);
    else return gelu_erf<SLOPE>(x);
}

}  // namespace gptkernels
