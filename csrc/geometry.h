// Index arithmetic of the sliding window, the same for CPU and CUDA: which pixel a tap reads, which tokens cover a
// pixel.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define T2T_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define T2T_FAST_HOST_DEVICE inline
#endif

namespace t2t_fast {

// One axis of a window over an image: `tokens` windows of `kernel` pixels, `stride` apart, the first at -padding.
// Index: int64_t for what reaches into tensors; int32_t will do inside a tile of one.
template <typename Index>
struct Axis {
  Index pixels, tokens, kernel, stride, padding;
};

template <typename Index>
T2T_FAST_HOST_DEVICE Index token_count(Index pixels, Index kernel, Index stride, Index padding) {
  return (pixels + 2 * padding - kernel) / stride + 1;
}

// The pixel that `tap` of `token` reads; outside the image (padding) where it is negative or >= axis.pixels.
template <typename Index>
T2T_FAST_HOST_DEVICE Index pixel_of(const Axis<Index>& axis, Index token, Index tap) {
  return token * axis.stride - axis.padding + tap;
}

template <typename Index>
T2T_FAST_HOST_DEVICE bool inside(const Axis<Index>& axis, Index pixel) {
  return pixel >= 0 && pixel < axis.pixels;
}

// The tokens first_token..last_token cover a pixel of the image; none where last_token < first_token.
template <typename Index>
T2T_FAST_HOST_DEVICE Index first_token(const Axis<Index>& axis, Index pixel) {
  const Index start = pixel + axis.padding - axis.kernel + 1;  // the earliest window that still reaches the pixel
  return start <= 0 ? 0 : (start + axis.stride - 1) / axis.stride;
}

template <typename Index>
T2T_FAST_HOST_DEVICE Index last_token(const Axis<Index>& axis, Index pixel) {
  const Index token = (pixel + axis.padding) / axis.stride;
  return token < axis.tokens ? token : axis.tokens - 1;
}

// The tap with which `token` reads `pixel`; in [0, kernel) for the tokens that cover it.
template <typename Index>
T2T_FAST_HOST_DEVICE Index tap_of(const Axis<Index>& axis, Index token, Index pixel) {
  return pixel + axis.padding - token * axis.stride;
}

// How many tokens cover a pixel along this axis; the count of a two-dimensional window is the product of both axes'.
template <typename Index>
T2T_FAST_HOST_DEVICE Index overlap(const Axis<Index>& axis, Index pixel) {
  const Index count = last_token(axis, pixel) - first_token(axis, pixel) + 1;
  return count > 0 ? count : 0;
}

// Division by a number known before the launch, as a multiplication and a shift; for 0 <= n < 2^31.
struct Divider {
  uint32_t divisor, multiplier, shift;
};

// 1 <= divisor < 2^31.
inline Divider divider(int64_t divisor) {
  uint32_t shift = 0;
  while ((int64_t{1} << shift) < divisor) ++shift;
  const uint64_t excess = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
  return {static_cast<uint32_t>(divisor), static_cast<uint32_t>((excess << 32) / static_cast<uint64_t>(divisor) + 1),
          shift};
}

T2T_FAST_HOST_DEVICE int32_t divide(const Divider& by, int32_t n) {
  const uint32_t number = static_cast<uint32_t>(n);
  const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(number) * by.multiplier) >> 32);
  return static_cast<int32_t>((high + number) >> by.shift);
}

}  // namespace t2t_fast
