// The element types. float16 and bfloat16 are bits, to and from float, rounded to nearest even; on a CPU by integer
// arithmetic that any compiler vectorises, so no instruction set is needed.
#pragma once

#include <cstdint>
#include <cstring>

#include "geometry.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace t2t_fast {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

T2T_FAST_HOST_DEVICE float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

T2T_FAST_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

T2T_FAST_HOST_DEVICE float widen(float value) { return value; }
T2T_FAST_HOST_DEVICE double widen(double value) { return value; }
T2T_FAST_HOST_DEVICE float widen(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

T2T_FAST_HOST_DEVICE float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__half(__half_raw{value.bits}));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  // The product moves the exponent's bias from 15 to 127 and is exact for subnormal numbers too; infinity and NaN
  // would become 2^16 and above, so their exponent is filled again.
  const uint32_t finite = bits_of(float_from_bits(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
  return float_from_bits(sign | finite | special);
#endif
}

T2T_FAST_HOST_DEVICE void narrow(float value, float& out) { out = value; }
T2T_FAST_HOST_DEVICE void narrow(double value, double& out) { out = value; }

T2T_FAST_HOST_DEVICE void narrow(float value, BFloat16& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
#endif
}

T2T_FAST_HOST_DEVICE void narrow(float value, Float16& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __half_raw(__float2half_rn(value)).x;
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // A normal result: the bias moves from 127 to 15; the carry of the rounding may reach the exponent, up to infinity.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // A subnormal one: adding 0.5 leaves it, rounded by the addition, in the low bits.
  const uint32_t subnormal = bits_of(float_from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;  // 65536 and above
  result = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x1ffu) : result;
  out.bits = static_cast<uint16_t>(sign | result);
#endif
}

// In which type elements are summed: double in double, all others in float32.
template <typename T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <typename T>
using Sum = typename SumOf<T>::type;

// The unsigned integer of an element's size.
template <int Bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint64_t;
};

}  // namespace t2t_fast
