// Windows of an image as rows of a tile, and back. Part of kernels.inl.
//
// The order of a row's values is the one in which memory holds them: tap-major ((dy, dx, c), whole pixels are copied)
// where channels are adjacent, upstream's channel-major ((c, dy, dx)) otherwise. The small weights follow (see
// ordered_column), never the tokens.

inline bool tap_major(const Split& split) { return split.image.channel_stride == 1; }

// Upstream's column c*taps + tap for a position in the row.
inline int64_t ordered_column(const Split& split, int64_t position) {
  if (!tap_major(split)) return position;
  return position % split.channels * split.taps() + position / split.channels;
}

// The taps [first, last) of a window starting at `pixel` that lie inside the image.
struct Inside {
  int64_t first, last;
};

inline Inside inside_taps(const Axis<int64_t>& axis, int64_t pixel) {
  const int64_t first = std::min(std::max<int64_t>(0, -pixel), axis.kernel);
  return {first, std::max(first, std::min(axis.kernel, axis.pixels - pixel))};
}

inline void zero_floats(float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0;
}

inline void pack_pixels(const Split& split, const float* image, int64_t y0, int64_t x0, float* to) {
  const int64_t channels = split.channels, window_row = split.columns.kernel * channels;
  const Inside dx = inside_taps(split.columns, x0);
  const bool dense = split.image.column_stride == channels;
  for (int64_t dy = 0; dy < split.rows.kernel; ++dy, to += window_row) {
    if (!inside(split.rows, y0 + dy) || dx.first == dx.last) {
      zero_floats(to, window_row);
      continue;
    }
    const float* from = image + (y0 + dy) * split.image.row_stride + (x0 + dx.first) * split.image.column_stride;
    zero_floats(to, dx.first * channels);
    if (dense) {
      std::memcpy(to + dx.first * channels, from, (dx.last - dx.first) * channels * sizeof(float));
    } else {
      for (int64_t x = dx.first; x < dx.last; ++x, from += split.image.column_stride)
        std::memcpy(to + x * channels, from, channels * sizeof(float));
    }
    zero_floats(to + dx.last * channels, window_row - dx.last * channels);
  }
}

inline void pack_planes(const Split& split, const float* image, int64_t y0, int64_t x0, float* to) {
  const int64_t kernel = split.columns.kernel, step = split.image.column_stride;
  const Inside dx = inside_taps(split.columns, x0);
  const bool plain = step == 1 && dx.last - dx.first == kernel;
  // The paper's first window, 7 x 7, inside the image: rows of 7 floats as one move of 8 where the image's row goes on.
  // The next row overwrites the eighth. The hardware's prefetcher cannot follow 21 streams.
  if (plain && kernel == 7 && split.rows.kernel == 7 && x0 + 8 <= split.columns.pixels && y0 >= 0 &&
      y0 + 7 <= split.rows.pixels) {
    const float* from = image + y0 * split.image.row_stride + x0;
    for (int64_t c = 0; c < split.channels; ++c, to += 49, from += split.image.channel_stride)
      for (int64_t dy = 0; dy < 7; ++dy) {
        __builtin_prefetch(from + dy * split.image.row_stride + 64);
        std::memcpy(to + 7 * dy, from + dy * split.image.row_stride, 8 * sizeof(float));
      }
    return;
  }
  for (int64_t c = 0; c < split.channels; ++c) {
    for (int64_t dy = 0; dy < split.rows.kernel; ++dy, to += kernel) {
      if (!inside(split.rows, y0 + dy) || dx.first == dx.last) {
        zero_floats(to, kernel);
        continue;
      }
      const float* from =
          image + c * split.image.channel_stride + (y0 + dy) * split.image.row_stride + (x0 + dx.first) * step;
      if (plain) {
        std::memcpy(to, from, kernel * sizeof(float));
      } else {
        zero_floats(to, dx.first);
        for (int64_t x = dx.first; x < dx.last; ++x, from += step) to[x] = *from;
        zero_floats(to + dx.last, kernel - dx.last);
      }
    }
  }
}

// A token of an image as a row of padded(width) floats. One float beyond it may be written.
inline void pack_patch(const Split& split, int64_t image, int64_t token, float* to) {
  const int64_t width = split.width();
  const float* data = split.image.data + image * split.image.batch_stride;
  const int64_t y0 = pixel_of<int64_t>(split.rows, token / split.columns.tokens, 0);
  const int64_t x0 = pixel_of<int64_t>(split.columns, token % split.columns.tokens, 0);
  const int64_t wide = padded(width);
  // A whole register, written first: LayerNorm soon reads it as one, and a load of single floats that are still in
  // the store buffer stalls.
  if (width < wide) store(to + wide - LANES, Vec{});
  tap_major(split) ? pack_pixels(split, data, y0, x0, to) : pack_planes(split, data, y0, x0, to);
  if (width < wide) to[width] = 0;
}

// Adds a token's row to the pixels that it covers, within image rows [row_begin, row_end).
inline void fold_patch(const Split& split, const float* from, int64_t token, float* image, const Image<float*>& out,
                       int64_t row_begin, int64_t row_end) {
  const int64_t channels = split.channels;
  const int64_t y0 = pixel_of<int64_t>(split.rows, token / split.columns.tokens, 0);
  const int64_t x0 = pixel_of<int64_t>(split.columns, token % split.columns.tokens, 0);
  const Inside dx = inside_taps(split.columns, x0);
  for (int64_t dy = 0; dy < split.rows.kernel; ++dy) {
    const int64_t y = y0 + dy;
    if (y < row_begin || y >= row_end) continue;
    for (int64_t x = dx.first; x < dx.last; ++x) {
      float* to = image + y * out.row_stride + (x0 + x) * out.column_stride;
      if (tap_major(split)) {
        const float* row = from + (dy * split.columns.kernel + x) * channels;
        for (int64_t c = 0; c < channels; ++c) to[c] += row[c];
      } else {
        const float* row = from + dy * split.columns.kernel + x;
        for (int64_t c = 0; c < channels; ++c) to[c * out.channel_stride] += row[c * split.taps()];
      }
    }
  }
}

// Sets rows [row_begin, row_end) of an image to zero.
inline void clear_rows(const Split& split, const Image<float*>& out, int64_t image, int64_t row_begin,
                       int64_t row_end) {
  float* data = out.data + image * out.batch_stride + row_begin * out.row_stride;
  const int64_t floats = (row_end - row_begin) * out.row_stride;
  if (tap_major(split)) return clear(data, floats);
  for (int64_t c = 0; c < split.channels; ++c) clear(data + c * out.channel_stride, floats);
}
