// The arguments of the soft split, the soft composition and fold-normalise-unfold as plain structs, without a torch
// header: the interface between the operators (tensors, checks, streams) and the kernels (pointers).
#pragma once

#include <cstdint>

#include "geometry.h"
#include "half.h"

namespace t2t_fast {

enum class Element { float16, bfloat16, float32, float64 };

// An image (B, C, H, W) by its strides in elements: NCHW, channels-last, tokens with a grid and slices alike.
template <typename Pointer>
struct Image {
  Pointer data;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
};

// The split of images (batch, channels, rows.pixels, columns.pixels) into tokens (batch, tokens(), width()):
// contiguous, column c*kh*kw + dy*kw + dx.
struct SplitShape {
  int64_t batch, channels;
  Axis<int64_t> rows, columns;
  Element element;

  T2T_FAST_HOST_DEVICE int64_t tokens() const { return rows.tokens * columns.tokens; }
  T2T_FAST_HOST_DEVICE int64_t taps() const { return rows.kernel * columns.kernel; }
  T2T_FAST_HOST_DEVICE int64_t width() const { return channels * taps(); }
};

// Calls `run` with a null pointer of the element's type.
template <typename Run>
auto with_type(Element element, const Run& run) {
  switch (element) {
    case Element::float16: return run(static_cast<Float16*>(nullptr));
    case Element::bfloat16: return run(static_cast<BFloat16*>(nullptr));
    case Element::float32: return run(static_cast<float*>(nullptr));
    default: return run(static_cast<double*>(nullptr));
  }
}

}  // namespace t2t_fast
