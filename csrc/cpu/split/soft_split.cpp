// Soft split, soft composition and fold-normalise-unfold on the CPU.
//
// A task owns a range of output rows (token rows of a split, image rows of a composition) of a block of channels and a
// tile of columns. Every sum runs over token rows and columns in ascending order whatever the ranges are, so results do
// not depend on the number of threads.
#include "../../tensors.h"
#include "planes.h"

namespace t2t_fast {
namespace {

constexpr int64_t kScratchBytes = 128 * 1024;  // of image rows; within the second-level cache of every CPU
constexpr int64_t kActiveLines = 256;          // cache lines that one token's runs lie in; within the first level
constexpr int64_t kLeastColumns = 1024;        // of a tile, if these are at least one token and at most 32
constexpr int64_t kGrain = 32768;              // elements that are worth a thread

// A range cut into parts of nearly equal size.
struct Parts {
  int64_t total, size, count;

  Parts(int64_t total_, int64_t most, int64_t multiple = 1) : total(total_) {
    count = std::max<int64_t>(1, (total + most - 1) / most);
    size = (total + count - 1) / count;
    size = (size + multiple - 1) / multiple * multiple;
    count = std::max<int64_t>(1, (total + size - 1) / size);
  }
  int64_t begin(int64_t part) const { return part * size; }
  int64_t end(int64_t part) const { return std::min(total, (part + 1) * size); }
};

// What one task computes rows of: some channels of a sample, `count` columns of the output from `first` on.
struct Piece {
  int64_t sample, channel, channels, first, count;
};

// An output cut into pieces.
struct Pieces {
  Parts blocks, tiles;  // of the channels and of the columns

  // `total` tokens or pixels along a row, `step` padded columns apart. Blocks are multiples of 16 channels, a whole
  // cache line of a channels-last image; the image rows of a tile fit into the scratch.
  Pieces(const SplitShape& shape, int64_t total, int64_t step, int64_t element_bytes)
      : blocks(channel_blocks(shape)), tiles(column_tiles(shape, blocks, total, step, element_bytes)) {}

  int64_t count(int64_t batch) const { return batch * blocks.count * tiles.count; }

  Piece at(int64_t index) const {
    const int64_t tile = index % tiles.count, block = index / tiles.count % blocks.count;
    const int64_t first = tiles.begin(tile), channel = blocks.begin(block);
    return {index / tiles.count / blocks.count, channel, blocks.end(block) - channel, first, tiles.end(tile) - first};
  }

 private:
  static Parts channel_blocks(const SplitShape& shape) {
    const int64_t most = std::max<int64_t>(16, kActiveLines / shape.rows.kernel / 16 * 16);
    return {shape.channels, std::max<int64_t>(1, std::min(shape.channels, most)), shape.channels > most ? 16 : 1};
  }

  static Parts column_tiles(const SplitShape& shape, const Parts& blocks, int64_t total, int64_t step, int64_t bytes) {
    const int64_t width = kScratchBytes / (shape.rows.kernel * blocks.size * bytes) - shape.columns.kernel;
    const int64_t least = std::clamp<int64_t>(kLeastColumns / step, 1, 32);  // one token where strides are huge
    return {std::max<int64_t>(total, 1), std::max(least, width / step)};
  }
};

// Runs `task(outer, begin, end)` over all of `outer` x [0, inner), cut anywhere.
template <typename Task>
void parallel_rows(int64_t outer, int64_t inner, int64_t elements_per_row, const Task& make_task) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_row));
  torch::stable::parallel_for(0, outer * inner, grain, [&](int64_t begin, int64_t end) {
    auto task = make_task();
    while (begin < end) {
      const int64_t index = begin / inner;
      const int64_t stop = std::min(end, (index + 1) * inner);
      task(index, begin - index * inner, stop - index * inner);
      begin = stop;
    }
  });
}

template <typename Word>
void soft_split(const SplitShape& shape, const Image<const Word*>& image, Word* tokens) {
  const Axis<int64_t>&rows = shape.rows, &columns = shape.columns;
  const Pieces pieces(shape, columns.tokens, columns.stride, sizeof(Word));
  const int64_t taps = shape.taps(), token_size = shape.width();
  const int64_t plane = plane_size((pieces.tiles.size - 1) * columns.stride + columns.kernel, sizeof(Word));

  auto make_task = [&] {
    return [&, scratch = Buffer<Word>(), under = std::vector<const char*>(rows.kernel)](int64_t index, int64_t begin,
                                                                                        int64_t end) mutable {
      const Piece piece = pieces.at(index);
      const int64_t b = piece.sample, channel = piece.channel, channels = piece.channels;
      const int64_t first_token = piece.first, count = piece.count;
      const int64_t width = (count - 1) * columns.stride + columns.kernel;
      const int64_t slot_size = channels * plane;
      Word* slots = scratch.reserve(rows.kernel * slot_size);
      const Word* source = image.data + b * image.batch_stride + channel * image.channel_stride;
      int64_t loaded = 0;  // padded rows below this one have been in the scratch
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t y = std::max(loaded, i * rows.stride); y < i * rows.stride + rows.kernel; ++y) {
          const int64_t pixel = y - rows.padding;
          Word* planes = slots + y % rows.kernel * slot_size;
          if (inside(rows, pixel)) {
            load_row(source + pixel * image.row_stride, image.channel_stride, image.column_stride, columns.pixels,
                     first_token * columns.stride - columns.padding, width, channels, planes, plane);
          } else {
            std::fill(planes, planes + slot_size, Word(0));
          }
        }
        loaded = i * rows.stride + rows.kernel;
        for (int64_t dy = 0; dy < rows.kernel; ++dy) {
          under[dy] = reinterpret_cast<const char*>(slots + (i * rows.stride + dy) % rows.kernel * slot_size);
        }
        Word* to = tokens + ((b * rows.tokens + i) * columns.tokens + first_token) * token_size + channel * taps;
        emit({reinterpret_cast<char*>(to), token_size * int64_t(sizeof(Word)), count, under.data(),
              plane * int64_t(sizeof(Word)), columns.stride * int64_t(sizeof(Word)), channels, rows.kernel,
              columns.kernel * int64_t(sizeof(Word))});
      }
    };
  };
  parallel_rows(pieces.count(shape.batch), rows.tokens, pieces.tiles.size * pieces.blocks.size * taps, make_task);
}

// Padded columns (or rows) that the tokens covering pixels begin .. end reach, and those pixels themselves.
struct Reach {
  int64_t first_token, last_token, begin, end;

  Reach(const Axis<int64_t>& axis, int64_t pixel_begin, int64_t pixel_end) {
    first_token = t2t_fast::first_token(axis, pixel_begin);
    last_token = t2t_fast::last_token(axis, pixel_end - 1);
    begin = pixel_begin + axis.padding;
    end = pixel_end + axis.padding;
    if (first_token <= last_token) {
      begin = std::min(begin, first_token * axis.stride);
      end = std::max(end, last_token * axis.stride + axis.kernel);
    }
  }
};

template <typename T>
void soft_composition(const SplitShape& shape, const Tokens<T>& tokens, T* image, bool channels_last) {
  using Sum = t2t_fast::Sum<T>;
  using Word = typename WordOf<sizeof(T)>::type;
  const Axis<int64_t>&rows = shape.rows, &columns = shape.columns;
  const Pieces pieces(shape, columns.pixels, 1, sizeof(Sum));

  auto make_task = [&] {
    return [&, composer = Composer<T>(shape, tokens), narrowed = Buffer<T>()](int64_t index, int64_t begin,
                                                                              int64_t end) mutable {
      const Piece piece = pieces.at(index);
      const int64_t b = piece.sample, channel = piece.channel, channels = piece.channels;
      const int64_t x = piece.first, count = piece.count;
      const Reach reach(columns, x, x + count);
      composer.start(b, channel, channel + channels, reach.first_token, reach.last_token, reach.begin,
                     reach.end - reach.begin);
      const int64_t offset = x + columns.padding - reach.begin;

      auto write = [&](int64_t y) {
        const Sum* sums = composer.row(y + rows.padding) + offset;
        if (!channels_last) {
          T* to = image + ((b * shape.channels + channel) * rows.pixels + y) * columns.pixels + x;
          for (int64_t c = 0; c < channels; ++c) {
            const Sum* from = sums + c * composer.plane();
            for (int64_t i = 0; i < count; ++i) narrow(from[i], to[c * rows.pixels * columns.pixels + i]);
          }
          return;
        }
        const T* planes;
        int64_t plane = composer.plane();
        if constexpr (std::is_same<T, Sum>::value) {
          planes = sums;
        } else {
          T* buffer = narrowed.reserve(channels * count);
          for (int64_t c = 0; c < channels; ++c) {
            for (int64_t i = 0; i < count; ++i) narrow(sums[c * plane + i], buffer[c * count + i]);
          }
          planes = buffer;
          plane = count;
        }
        T* to = image + ((b * rows.pixels + y) * columns.pixels + x) * shape.channels + channel;
        transpose(reinterpret_cast<const Word*>(planes), plane, reinterpret_cast<Word*>(to), shape.channels, channels,
                  count);
      };

      int64_t y = begin;
      const int64_t last = last_token(rows, end - 1);
      for (int64_t i = first_token(rows, begin); i <= last; ++i) {
        for (; y < end && y + rows.padding < i * rows.stride; ++y) write(y);
        const int64_t top = i * rows.stride - rows.padding;
        composer.add(i, std::max<int64_t>(0, begin - top), std::min(rows.kernel, end - top));
      }
      for (; y < end; ++y) write(y);
    };
  };
  parallel_rows(
      pieces.count(shape.batch), rows.pixels,
      pieces.tiles.size * pieces.blocks.size * std::max<int64_t>(1, rows.kernel * columns.kernel / rows.stride),
      make_task);
}

template <typename T>
void fused_fold_unfold(const SplitShape& shape, const Tokens<T>& tokens, T* out) {
  using Sum = t2t_fast::Sum<T>;
  const Axis<int64_t>&rows = shape.rows, &columns = shape.columns;
  const Pieces pieces(shape, columns.tokens, columns.stride, sizeof(Sum));
  const int64_t taps = shape.taps(), token_size = shape.width();
  const int64_t kept = rows.kernel + std::min(rows.kernel, rows.stride);  // normalised rows that wait for their tokens
  // The same window over the padded image, where no pixel is outside.
  const Axis<int64_t> padded_rows = {rows.pixels + 2 * rows.padding, rows.tokens, rows.kernel, rows.stride, 0};
  const Axis<int64_t> padded_columns = {columns.pixels + 2 * columns.padding, columns.tokens, columns.kernel,
                                        columns.stride, 0};

  auto make_task = [&] {
    return [&, composer = Composer<T>(shape, tokens), normalised = Buffer<T>(), counts = std::vector<Sum>(),
            under = std::vector<const char*>(rows.kernel)](int64_t index, int64_t begin, int64_t end) mutable {
      const Piece piece = pieces.at(index);
      const int64_t b = piece.sample, channel = piece.channel, channels = piece.channels;
      const int64_t token_begin = piece.first, count = piece.count;
      const int64_t x_begin = token_begin * columns.stride;
      const int64_t x_end = (token_begin + count - 1) * columns.stride + columns.kernel;
      const Reach reach(padded_columns, x_begin, x_end);
      const int64_t width = x_end - x_begin, offset = x_begin - reach.begin;
      composer.start(b, channel, channel + channels, reach.first_token, reach.last_token, reach.begin,
                     reach.end - reach.begin);
      const int64_t plane = plane_size(width, sizeof(T)), slot_size = channels * plane;
      T* slots = normalised.reserve(kept * slot_size);
      counts.resize(width);
      for (int64_t x = 0; x < width; ++x) {
        counts[x] = static_cast<Sum>(std::max<int64_t>(1, overlap(padded_columns, x_begin + x)));
      }
      // Pixels of the image among the tile's columns; padding stays 0.
      const int64_t left = std::min(width, std::max<int64_t>(0, columns.padding - x_begin));
      const int64_t right = std::max(left, std::min(width, columns.pixels + columns.padding - x_begin));

      auto normalise = [&](int64_t y) {
        T* planes = slots + y % kept * slot_size;
        if (!inside(rows, y - rows.padding)) {
          std::memset(planes, 0, slot_size * sizeof(T));
          return;
        }
        const Sum count_y = static_cast<Sum>(overlap(padded_rows, y));
        const Sum* sums = composer.row(y) + offset;
        for (int64_t c = 0; c < channels; ++c) {
          const Sum* from = sums + c * composer.plane();
          T* to = planes + c * plane;
          std::memset(to, 0, left * sizeof(T));
          for (int64_t x = left; x < right; ++x) narrow(from[x] / (counts[x] * count_y), to[x]);
          std::memset(to + right, 0, (width - right) * sizeof(T));
        }
      };

      auto emit_row = [&](int64_t i) {
        for (int64_t dy = 0; dy < rows.kernel; ++dy) {
          under[dy] = reinterpret_cast<const char*>(slots + (i * rows.stride + dy) % kept * slot_size);
        }
        T* to = out + ((b * rows.tokens + i) * columns.tokens + token_begin) * token_size + channel * taps;
        emit({reinterpret_cast<char*>(to), token_size * int64_t(sizeof(T)), count, under.data(),
              plane * int64_t(sizeof(T)), columns.stride * int64_t(sizeof(T)), channels, rows.kernel,
              columns.kernel * int64_t(sizeof(T))});
      };

      const int64_t y_begin = begin * rows.stride, y_end = (end - 1) * rows.stride + rows.kernel;
      const int64_t last = last_token(padded_rows, y_end - 1);
      int64_t y = y_begin, next = begin;  // the next row to normalise, the next token row to emit
      for (int64_t i = first_token(padded_rows, y_begin); next < end; ++i) {
        for (; y < std::min(y_end, i * rows.stride); ++y) {
          if (y % rows.stride < rows.kernel) {
            normalise(y);
          } else {
            y += rows.stride - y % rows.stride - 1;  // over the gap, to the next window
          }
        }
        for (; next < end && next * rows.stride + rows.kernel <= y; ++next) emit_row(next);
        if (i <= last) {
          const int64_t top = i * rows.stride;
          composer.add(i, std::max<int64_t>(0, y_begin - top), std::min(rows.kernel, y_end - top));
        }
      }
    };
  };
  parallel_rows(pieces.count(shape.batch), rows.tokens, 2 * pieces.tiles.size * pieces.blocks.size * taps, make_task);
}

template <typename T>
Tokens<T> tokens_of(const Tensor& tokens) {
  return {static_cast<const T*>(tokens.const_data_ptr()), tokens.stride(0), tokens.stride(1), tokens.stride(2)};
}

Tensor soft_split_cpu(const Tensor& x, Sizes kernel, Sizes stride, Sizes padding) {
  check(x.dim() == 4, "soft_split", "x must be 4-D");
  const SplitShape shape = split_shape("soft_split", x.size(0), x.size(1), {x.size(2), x.size(3)}, kernel, stride,
                                       padding, element_of(x, "soft_split"));
  Tensor tokens = empty_tokens(shape, x);
  if (tokens.numel() == 0) return tokens;
  const Image<const void*> image = image_of(x);
  with_type(shape.element, [&](auto* type) {
    using Word = typename WordOf<sizeof(*type)>::type;  // a copy: only the size of an element matters
    const Image<const Word*> source = {static_cast<const Word*>(image.data), image.batch_stride, image.channel_stride,
                                       image.row_stride, image.column_stride};
    soft_split<Word>(shape, source, static_cast<Word*>(tokens.mutable_data_ptr()));
  });
  return tokens;
}

Tensor soft_composition_cpu(const Tensor& tokens, Sizes size, Sizes kernel, Sizes stride, Sizes padding,
                            bool channels_last) {
  const SplitShape shape = composition_shape("soft_composition", tokens, size, kernel, stride, padding);
  Tensor image = empty_image(shape, tokens, channels_last);
  if (image.numel() == 0) return image;
  with_type(shape.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    soft_composition<T>(shape, tokens_of<T>(tokens), static_cast<T*>(image.mutable_data_ptr()), channels_last);
  });
  return image;
}

Tensor fused_fold_unfold_cpu(const Tensor& tokens, Sizes size, Sizes kernel, Sizes stride, Sizes padding) {
  const SplitShape shape = composition_shape("fused_fold_unfold", tokens, size, kernel, stride, padding);
  Tensor out = empty_tokens(shape, tokens);
  if (out.numel() == 0) return out;
  with_type(shape.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    fused_fold_unfold<T>(shape, tokens_of<T>(tokens), static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace
}  // namespace t2t_fast

STABLE_TORCH_LIBRARY_IMPL(t2t_fast_native, CPU, library) {
  library.impl("soft_split", TORCH_BOX(&t2t_fast::soft_split_cpu));
  library.impl("soft_composition", TORCH_BOX(&t2t_fast::soft_composition_cpu));
  library.impl("fused_fold_unfold", TORCH_BOX(&t2t_fast::fused_fold_unfold_cpu));
}
