// Elements of the kernels, one by one and as vectors; on the CPU for the tests.
#pragma once

#include <cstdint>

#include "../half.h"

namespace t2t_fast::cuda {

// 16 bytes that move as one access.
template <typename T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

template <typename T>
T2T_FAST_HOST_DEVICE Sum<T> to_sum(const T& value) {
  return widen(value);
}

// Ring elements as tokens or pixels: copied where the type is the same, else rounded.
template <typename T>
T2T_FAST_HOST_DEVICE void convert(const T& from, T& to) {
  to = from;
}
T2T_FAST_HOST_DEVICE void convert(const float& from, BFloat16& to) { narrow(from, to); }
T2T_FAST_HOST_DEVICE void convert(const float& from, Float16& to) { narrow(from, to); }

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
