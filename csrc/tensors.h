// Between torch's tensors and the kernels' plain structs, on LibTorch's stable ABI. Python has checked every argument
// with better texts (t2t_fast/functional.py); here only what keeps a kernel inside its memory is checked again.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/memory.h"
#include "soft_split.h"

namespace t2t_fast {

using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline void check(bool holds, const char* function, const char* text) {
  if (!holds) throw std::runtime_error(std::string("t2t_fast_native::") + function + ": " + text);
}

inline Element element_of(const Tensor& tensor, const char* function) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return Element::float16;
    case ScalarType::BFloat16: return Element::bfloat16;
    case ScalarType::Float: return Element::float32;
    case ScalarType::Double: return Element::float64;
    default: throw std::runtime_error(std::string("t2t_fast_native::") + function + ": the tensor must be floating");
  }
}

// The limits of t2t_fast/errors.py. Below them no sum or product that a kernel forms of sizes, strides and counts
// leaves int64: positions along an axis stay below 2^32, and a count times the bytes of an element or the threads below
// 2^63.
constexpr int64_t LARGEST = INT32_MAX;             // of a window or image along an axis, padding included
constexpr int64_t MOST_VALUES = int64_t{1} << 56;  // of a tensor, and of the unfolded tokens

// Checks that a tensor of these sizes, empty ones counted as 1, has no more values than allowed.
inline void check_count(const char* function, const Sizes& sizes) {
  int64_t count = 1;
  for (int64_t size : sizes) {
    check(size >= 0, function, "a size is negative");
    const int64_t factor = size > 1 ? size : 1;
    check(count <= MOST_VALUES / factor, function, "the sizes give more than 2^56 values");
    count *= factor;
  }
}

// Checks what both directions of a split need: the counts of its image and of its tokens.
inline SplitShape checked(const char* function, SplitShape shape) {
  check_count(function, {shape.batch, shape.channels, shape.rows.pixels, shape.columns.pixels});
  check_count(function, {shape.batch, shape.channels, shape.rows.tokens, shape.columns.tokens, shape.rows.kernel,
                         shape.columns.kernel});
  return shape;
}

// The shape of the split of an image (batch, channels, size[0], size[1]).
inline SplitShape split_shape(const char* function, int64_t batch, int64_t channels, const Sizes& size,
                              const Sizes& kernel, const Sizes& stride, const Sizes& padding, Element element) {
  Axis<int64_t> axes[2];
  check(size.size() == 2 && kernel.size() == 2 && stride.size() == 2 && padding.size() == 2, function,
        "size, kernel, stride and padding must be (height, width) pairs");
  for (int i = 0; i < 2; ++i) {
    check(kernel[i] >= 1 && stride[i] >= 1 && padding[i] >= 0 && size[i] >= 0, function,
          "kernel and stride must be at least 1, padding and size at least 0");
    check(kernel[i] <= LARGEST && stride[i] <= LARGEST && padding[i] <= LARGEST && size[i] <= LARGEST &&
              size[i] + 2 * padding[i] <= LARGEST,
          function, "kernel, stride and the padded image must be at most 2^31 - 1 along an axis");
    check(size[i] + 2 * padding[i] >= kernel[i], function, "the window must fit into the padded image");
    axes[i] = {size[i], token_count(size[i], kernel[i], stride[i], padding[i]), kernel[i], stride[i], padding[i]};
  }
  return checked(function, {batch, channels, axes[0], axes[1], element});
}

// The shape of the split whose tokens (batch, h*w, channels*kh*kw) these are.
inline SplitShape composition_shape(const char* function, const Tensor& tokens, const Sizes& size, const Sizes& kernel,
                                    const Sizes& stride, const Sizes& padding) {
  check(tokens.dim() == 3, function, "tokens must be 3-D");
  SplitShape shape =
      split_shape(function, tokens.size(0), 0, size, kernel, stride, padding, element_of(tokens, function));
  check(tokens.size(1) == shape.tokens(), function, "the number of tokens must be that of the window over the image");
  check(tokens.size(2) % shape.taps() == 0, function, "the token width must be a multiple of the window's pixels");
  shape.channels = tokens.size(2) / shape.taps();
  return checked(function, shape);
}

// The stride of an axis; 0 along an axis of one value, which may have any (a 1 stays, it tells the memory order).
inline int64_t stride_of(const Tensor& tensor, int64_t dim) {
  const int64_t stride = tensor.stride(dim);
  return tensor.size(dim) > 1 || stride == 1 ? stride : 0;
}

inline Image<const void*> image_of(const Tensor& image) {
  return {image.const_data_ptr(), stride_of(image, 0), stride_of(image, 1), stride_of(image, 2), stride_of(image, 3)};
}

// Uninitialised memory of `like`'s device, and of its dtype unless another one is given, all of which a kernel is going
// to write.
inline Tensor empty(const Sizes& size, const Tensor& like, bool channels_last = false,
                    std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  using torch::headeronly::MemoryFormat;
  Tensor tensor =
      torch::stable::empty(size, dtype.value_or(like.scalar_type()), std::nullopt, like.device(), std::nullopt,
                           channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (!like.is_cuda()) {
    const int64_t bytes = with_type(element_of(tensor, "empty"), [](auto* type) { return int64_t{sizeof(*type)}; });
    expect_full_use(tensor.mutable_data_ptr(), tensor.numel() * bytes);
  }
  return tensor;
}

inline Tensor empty_tokens(const SplitShape& shape, const Tensor& like) {
  return empty({shape.batch, shape.tokens(), shape.width()}, like);
}

inline Tensor empty_image(const SplitShape& shape, const Tensor& like, bool channels_last) {
  return empty({shape.batch, shape.channels, shape.rows.pixels, shape.columns.pixels}, like, channels_last);
}

}  // namespace t2t_fast
