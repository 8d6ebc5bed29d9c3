// One element of the output at a time, for windows that no tile holds (plan.h).
#pragma once

#include "../soft_split.h"
#include "elements.h"

namespace t2t_fast::cuda {

// Sums in the order of the tiled kernels.
template <typename T>
T2T_FAST_HOST_DEVICE Sum<T> covering_sum(const SplitShape& shape, const T* tokens, int64_t batch, int64_t channel,
                                         int64_t y, int64_t x) {
  const Axis<int64_t>&rows = shape.rows, &columns = shape.columns;
  const int64_t taps = rows.kernel * columns.kernel, width = shape.channels * taps;
  const int64_t first = first_token(rows, y), last = last_token(rows, y);
  const int64_t left = first_token(columns, x), count = last_token(columns, x) - left + 1;
  const T* base = tokens + (batch * rows.tokens * columns.tokens + left) * width + channel * taps;
  Sum<T> total{};
  for (int64_t row = first; row <= last; ++row) {
    const int64_t tap = tap_of(rows, row, y) * columns.kernel + tap_of(columns, left, x);
    const T* at = base + row * columns.tokens * width + tap;
    Sum<T> sum{};
#pragma unroll 1
    for (int64_t n = 0; n < count; ++n, at += width - columns.stride) sum += to_sum(*at);
    total = row == first ? sum : total + sum;
  }
  return total;
}

struct TokenElement {
  int64_t batch, channel, y, x;
};

// The pixel that element `i` of the tokens shows.
T2T_FAST_HOST_DEVICE TokenElement token_element(const SplitShape& shape, int64_t i) {
  const Axis<int64_t>&rows = shape.rows, &columns = shape.columns;
  const int64_t dx = i % columns.kernel;
  i /= columns.kernel;
  const int64_t dy = i % rows.kernel;
  i /= rows.kernel;
  TokenElement element;
  element.channel = i % shape.channels;
  i /= shape.channels;
  element.x = pixel_of(columns, i % columns.tokens, dx);
  i /= columns.tokens;
  element.y = pixel_of(rows, i % rows.tokens, dy);
  element.batch = i / rows.tokens;
  return element;
}

template <typename T>
T2T_FAST_HOST_DEVICE void split_element(const SplitShape& shape, const Image<const T*>& image, T* tokens, int64_t i) {
  const TokenElement at = token_element(shape, i);
  T value{};
  if (inside(shape.rows, at.y) && inside(shape.columns, at.x)) {
    value = image.data[at.batch * image.batch_stride + at.channel * image.channel_stride + at.y * image.row_stride +
                       at.x * image.column_stride];
  }
  tokens[i] = value;
}

template <typename T>
T2T_FAST_HOST_DEVICE void compose_element(const SplitShape& shape, const T* tokens, const Image<T*>& image, int64_t i) {
  const int64_t x = i % shape.columns.pixels;
  i /= shape.columns.pixels;
  const int64_t y = i % shape.rows.pixels;
  i /= shape.rows.pixels;
  const int64_t channel = i % shape.channels, batch = i / shape.channels;
  convert(covering_sum(shape, tokens, batch, channel, y, x),
          image.data[batch * image.batch_stride + channel * image.channel_stride + y * image.row_stride +
                     x * image.column_stride]);
}

template <typename T>
T2T_FAST_HOST_DEVICE void project_element(const SplitShape& shape, const T* tokens, T* out, int64_t i) {
  const TokenElement at = token_element(shape, i);
  Sum<T> value{};
  if (inside(shape.rows, at.y) && inside(shape.columns, at.x)) {
    const Sum<T> count = static_cast<Sum<T>>(overlap(shape.rows, at.y) * overlap(shape.columns, at.x));
    value = covering_sum(shape, tokens, at.batch, at.channel, at.y, at.x) / count;
  }
  convert(value, out[i]);
}

}  // namespace t2t_fast::cuda
