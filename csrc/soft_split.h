// What the soft split, the soft composition and fold-normalise-unfold are asked to do, without a torch header:
// the seam between the operators (tensors, checks, streams) and the kernels (pointers).
#pragma once

#include <cstdint>

#include "geometry.h"

namespace t2t_fast {

enum class Element { float16, bfloat16, float32, float64 };

// An image (B, C, H, W) by its strides in elements: NCHW, channels-last, tokens with a grid and slices alike.
template <typename Pointer>
struct Image {
  Pointer data;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
};

// Tokens (B, h*w, C*kh*kw), contiguous; column c*kh*kw + dy*kw + dx.
struct SplitShape {
  int64_t batch, channels;
  Axis<int64_t> rows, columns;
  Element element;
};

}  // namespace t2t_fast
