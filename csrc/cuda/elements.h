// The element types of the kernels, and the type in which each is summed; on the CPU for the tests.
#pragma once

#include <cstdint>
#include <cstring>

#include "../geometry.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace t2t_fast::cuda {

// 16 bytes that move as one access.
template <typename T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// Half types are summed in float32.
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

T2T_FAST_HOST_DEVICE float to_sum(float value) { return value; }
T2T_FAST_HOST_DEVICE double to_sum(double value) { return value; }

T2T_FAST_HOST_DEVICE float to_sum(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
#endif
}

// Ring elements as tokens or pixels: copied where the type is the same, else rounded to nearest even.
template <typename T>
T2T_FAST_HOST_DEVICE void convert(const T& from, T& to) {
  to = from;
}

T2T_FAST_HOST_DEVICE void convert(const float& from, BFloat16& to) {
#if defined(__CUDA_ARCH__)
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(from));
#else
  uint32_t bits;
  std::memcpy(&bits, &from, sizeof(bits));
  to.bits = static_cast<uint16_t>(from != from ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

#if defined(__CUDACC__)
T2T_FAST_HOST_DEVICE float to_sum(Float16 value) { return __half2float(__half(__half_raw{value.bits})); }
T2T_FAST_HOST_DEVICE void convert(const float& from, Float16& to) { to.bits = __half_raw(__float2half_rn(from)).x; }
#endif

// A vector to global memory; spelled out, as the compiler would take a store apart that shares values with a branch
// that stores single elements.
template <typename T>
T2T_FAST_HOST_DEVICE void store_pack(T* global, const Pack<T>& pack) {
#if defined(__CUDA_ARCH__)
  uint4 bits;
  memcpy(&bits, &pack, sizeof(bits));
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(bits.x), "r"(bits.y), "r"(bits.z),
               "r"(bits.w)
               : "memory");
#else
  *reinterpret_cast<Pack<T>*>(global) = pack;
#endif
}

// From global to shared memory, both aligned to 16 bytes; done at the end of the phase.
template <typename T>
T2T_FAST_HOST_DEVICE void copy_async(T* shared, const T* global) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global)
      : "memory");
#else
  *reinterpret_cast<Pack<T>*>(shared) = *reinterpret_cast<const Pack<T>*>(global);
#endif
}

}  // namespace t2t_fast::cuda
