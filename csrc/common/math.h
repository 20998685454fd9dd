// exp, the two GELUs and their derivatives on vectors, each within a few ulp of the function.
#pragma once

#include "common/vec.h"

namespace gptkernels {

// e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln(2)/2; the polynomial is the Taylor series to r^7/5040, below fp32's
// ulp. Below -87.3 the result would be denormal: it is 0. Above 88 it stays at e^88, so that 1/(1 + e^x) needs no
// check.
inline vf exp(vf x) {
    const vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low mantissa bits
    vf clamped = vmin(all(88.0f), x);   // in this order a NaN stays one
    vf shifted = clamped * 1.44269504f + magic;
    vf n = shifted - magic;
    vf r = clamped - n * 0.693145752f;  // ln 2 in two pieces: the first ends in zero bits, so that n times it is exact
    r = r - n * 1.42860677e-6f;
    vf p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vi exponent = (bits_of<vi>(shifted) - bits_of<vi>(magic) + 127) << 23;
    vf result = p * bits_of<vf>(exponent);
    return x < -87.3f ? vf{} : result;
}

// 2^y within 2e-9 of the function, relative, for y in [-126, 127]. y = n + f with |f| <= 1/2; the polynomial is the
// minimax one of degree 6 for 2^f, and n is added to its exponent.
inline vf exp2_normal(vf y) {
    const vf magic = all(12582912.0f);  // as in exp; the integer's low bits are then the float's
    vf shifted = y + magic;
    vf f = y - (shifted - magic);
    vf p = all(1.53458122e-4f);
    p = p * f + 1.33999312e-3f;
    p = p * f + 9.61848896e-3f;
    p = p * f + 5.55032878e-2f;
    p = p * f + 2.40226469e-1f;
    p = p * f + 6.93147206e-1f;
    p = p * f + 1.0f;
    return bits_of<vf>(bits_of<vi>(p) + (bits_of<vi>(shifted) << 23));
}

// A GELU and its derivative at the same place.
struct Gelu {
    vf value, slope;
};

// x s(2u), u = sqrt(2/pi) (x + 0.044715 x^3), s(y) = 1/(1 + e^-y): (1 + tanh u)/2 = s(2u), without tanh's cancellation.
// s and the slope are those of x within [-10, 10], where e^(-2u) is within 2^-126 and 2^126: beyond it s is 0 or 1, and
// the slope's second term would be e's smallest value times x^3.
inline Gelu gelu_tanh(vf x) {
    constexpr float c = 0.797884561f, log2_e = 1.44269504f;  // c = sqrt(2/pi)
    vf near = vmax(all(-10.0f), vmin(all(10.0f), x));        // in this order a NaN stays one
    vf square = near * near;
    vf e = exp2_normal(near * (square * (-2.0f * c * 0.044715f * log2_e) - 2.0f * c * log2_e));  // e^(-2u)
    vf s = 1.0f / (1.0f + e);
    vf slope_2u = square * (2.0f * c * 3.0f * 0.044715f) + 2.0f * c;
    return {x * s, s + near * s * (e * s) * slope_2u};  // s' = s (1 - s) = e s^2
}

// x P(normal <= x). P(normal <= -|x|) = e^(-x^2/2) w/2, w = erfcx(|x|/sqrt 2) = t R(t), t = 1/(1 + 0.35 |x|/sqrt 2):
// R is a polynomial fitted to relative error 7e-9 for |x| up to 13, beyond which the factor before it is 0.
inline Gelu gelu_erf(vf x) {
    vf distance = x < 0.0f ? -x : x;
    vf t = 1.0f / (1.0f + 0.247487373f * distance);
    vf w = all(0.0378750207f);
    w = w * t - 0.155879176f;
    w = w * t + 0.173773002f;
    w = w * t - 0.0166566689f;
    w = w * t + 0.077063159f;
    w = w * t + 0.151863675f;
    w = w * t + 0.148981255f;
    w = w * t + 0.188423067f;
    w = w * t + 0.197068915f;
    w = w * t + 0.197487758f;
    vf e = exp(-0.5f * x * x);
    vf below = 0.5f * e * (w * t);
    vf probability = x < 0.0f ? below : 1.0f - below;
    return {x * probability, probability + x * e * 0.39894228f};  // 1/sqrt(2 pi)
}

template <bool TANH>
inline Gelu gelu(vf x) {
    if constexpr (TANH) return gelu_tanh(x);
    else return gelu_erf(x);
}

}  // namespace gptkernels
