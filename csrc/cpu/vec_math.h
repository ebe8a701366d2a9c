// Scalar functions written so that the compiler turns loops over them into vector code: no branches, no calls.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(CCE_NO_CLONES)
// One copy of the function for each instruction set, chosen once when the library is loaded.
#define CCE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CCE_CLONES
#endif
#define CCE_INLINE inline __attribute__((always_inline))

namespace cce::cpu {

// bfloat16 as its bit pattern; conversions round to nearest even and keep NaN a NaN.
struct BF16 {
  uint16_t bits;
};

CCE_INLINE float to_float(BF16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

CCE_INLINE BF16 to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = 0x7fc0u;
  return BF16{static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}

// exp for fp32: Cody-Waite reduction by ln 2 in two parts, then the degree-6 Taylor-like polynomial (coefficients from
// a Chebyshev fit on [-ln2/2, ln2/2]); about 1 ulp. Below the smallest normal number the result is 0.
CCE_INLINE float exp(float x) {
  const float clamped = x < -87.33f ? -87.33f : (x > 88.72f ? 88.72f : x);
  const float magic =
      12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const float shifted = clamped * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t e, bits;
  std::memcpy(&e, &shifted, sizeof e);
  std::memcpy(&bits, &p, sizeof bits);
  bits += e << 23;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  y = x < -87.33f ? 0.0f : y;
  y = x > 88.72f ? std::numeric_limits<float>::infinity() : y;
  return x == x ? y : x;
}
CCE_INLINE double exp(double x) { return std::exp(x); }

struct HostMath {
  // tanh through exp(-2|x|): absolute error about 1e-7, which is what a logit in fp32 carries anyway. Small arguments
  // go through the odd polynomial, where the quotient would cancel.
  static CCE_INLINE float tanh(float x) {
    const float ax = std::fabs(x);
    const float q = exp(-2.0f * ax);
    // One rounding where it matters: softcap's derivative 1 - tanh^2 lives on the distance to 1.
    const float far = 1.0f - 2.0f * q / (1.0f + q);
    const float x2 = x * x;
    const float near =
        ax *
        (1.0f + x2 * (-0.33333333f + x2 * (0.13333334f + x2 * (-0.05396825f + x2 * 0.02186949f))));
    return std::copysign(ax < 0.25f ? near : far, x);
  }
  static CCE_INLINE double tanh(double x) { return std::tanh(x); }
};

}  // namespace cce::cpu
