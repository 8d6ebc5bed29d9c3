// Rows of a padded image as planes in a scratch that stays in cache, one plane a channel, so that a token's columns
// c*kh*kw + dy*kw + dx are short runs of them, one for each (c, dy): image rows -> planes -> tokens -> sums in planes.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../../half.h"
#include "../../soft_split.h"
#include "../memory.h"
#include "transpose.h"

namespace t2t_fast {

constexpr int64_t kTokensAtOnce = 16;  // loaded together where they must be transposed or converted

// The distance of two planes: an odd number of cache lines, so that they do not fall upon each other in the cache.
inline int64_t plane_size(int64_t width, int64_t element_bytes) {
  const int64_t lines = (width * element_bytes + 63) / 64;
  return (lines | 1) * 64 / element_bytes;
}

// Columns first .. first+width of one image row, `channels` planes of them; 0 outside the image.
template <typename Word>
void load_row(const Word* row, int64_t channel_stride, int64_t column_stride, int64_t pixels, int64_t first,
              int64_t width, int64_t channels, Word* planes, int64_t plane) {
  const int64_t begin = std::min(width, std::max<int64_t>(0, -first));
  const int64_t end = std::max(begin, std::min(width, pixels - first));
  for (int64_t c = 0; c < channels; ++c) {
    std::fill(planes + c * plane, planes + c * plane + begin, Word(0));
    std::fill(planes + c * plane + end, planes + c * plane + width, Word(0));
  }
  if (begin == end) return;
  const Word* from = row + (first + begin) * column_stride;
  Word* to = planes + begin;
  const int64_t count = end - begin;
  if (column_stride == 1) {
    for (int64_t c = 0; c < channels; ++c) std::memcpy(to + c * plane, from + c * channel_stride, count * sizeof(Word));
  } else if (channel_stride == 1) {
    transpose(from, column_stride, to, plane, count, channels);
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t x = 0; x < count; ++x) to[c * plane + x] = from[c * channel_stride + x * column_stride];
    }
  }
}

// ---- planes -> tokens

// One row of tokens: `rows[dy]` are the planes of the image row under tap row dy, at the first token's first tap.
struct Emission {
  char* tokens;
  int64_t token_bytes, count;
  const char* const* rows;
  int64_t plane_bytes, step_bytes, channels, kernel_rows, run_bytes;
};

// Bytes of a run and tap rows, or 0 for any number. By value: the tokens are chars, which might alias a reference.
template <int64_t Bytes, int64_t Rows = 0>
void emit_runs(const Emission e) {
  const int64_t bytes = Bytes ? Bytes : e.run_bytes, kernel_rows = Rows ? Rows : e.kernel_rows;
  const char* rows[Rows ? Rows : 1];
  for (int64_t dy = 0; dy < Rows; ++dy) rows[dy] = e.rows[dy];
  for (int64_t j = 0; j < e.count; ++j) {
    char* to = e.tokens + j * e.token_bytes;
    for (int64_t c = 0; c < e.channels; ++c) {
      const int64_t offset = c * e.plane_bytes + j * e.step_bytes;
      for (int64_t dy = 0; dy < kernel_rows; ++dy) {
        std::memcpy(to, (Rows ? rows : e.rows)[dy] + offset, bytes);
        to += bytes;
      }
    }
  }
}

__attribute__((noinline)) static void emit(const Emission& e) {
  switch (e.run_bytes) {
    case 2: return emit_runs<2>(e);
    case 4: return emit_runs<4>(e);
    case 6: return e.kernel_rows == 3 ? emit_runs<6, 3>(e) : emit_runs<6>(e);
    case 8: return emit_runs<8>(e);
    case 10: return emit_runs<10>(e);
    case 12: return e.kernel_rows == 3 ? emit_runs<12, 3>(e) : emit_runs<12>(e);
    case 14: return e.kernel_rows == 7 ? emit_runs<14, 7>(e) : emit_runs<14>(e);
    case 16: return emit_runs<16>(e);
    case 20: return emit_runs<20>(e);
    case 24: return emit_runs<24>(e);
    case 28: return e.kernel_rows == 7 ? emit_runs<28, 7>(e) : emit_runs<28>(e);
    case 56: return emit_runs<56>(e);
    default: return emit_runs<0>(e);
  }
}

// ---- tokens -> sums in planes

template <typename T>
struct Tokens {
  const T* data;
  int64_t batch_stride, token_stride, column_stride;
};

constexpr int64_t kOvershoot = 3;

// to[0 .. Kernel) += from[0 .. Kernel). Reads and writes whole vectors: up to kOvershoot values behind both, of which
// those of `to` stay as they are.
template <typename Sum, int Kernel>
inline void add_run(const Sum* from, Sum* to) {
#if defined(T2T_FAST_SHUFFLE)
  using Word = typename WordOf<sizeof(Sum)>::type;
  typedef Sum Vector __attribute__((vector_size(16)));
  typedef Word Mask __attribute__((vector_size(16)));
  constexpr int N = 16 / sizeof(Sum);
  for (int x = 0; x < Kernel; x += N) {
    Vector a, b;
    std::memcpy(&a, from + x, 16);
    std::memcpy(&b, to + x, 16);
    if (Kernel - x < N) {
      Mask keep;
      for (int lane = 0; lane < N; ++lane) keep[lane] = lane < Kernel - x ? ~Word(0) : Word(0);
      a = reinterpret_cast<Vector>(reinterpret_cast<Mask>(a) & keep);
    }
    b += a;
    std::memcpy(to + x, &b, 16);
  }
#else
  for (int x = 0; x < Kernel; ++x) to[x] += from[x];
#endif
}

// Adds the runs of one token. Kernel is the number of tap columns, or 0 for any number, which reads nothing behind;
// Square says that all of as many tap rows are to be added.
template <typename Sum, int Kernel, bool Square>
void add_runs(const Sum* token, Sum* const* rows, int64_t offset, int64_t plane, int64_t channels, int64_t kernel_rows,
              int64_t kernel, int64_t begin, int64_t end) {
  if constexpr (Square) {
    kernel_rows = end = Kernel;
    begin = 0;
  }
  const int64_t taps = Kernel ? Kernel : kernel;
  for (int64_t c = 0; c < channels; ++c) {
    const Sum* from = token + (c * kernel_rows + begin) * taps;
    for (int64_t dy = begin; dy < end; ++dy, from += taps) {
      Sum* to = rows[dy] + c * plane + offset;
      if constexpr (Kernel != 0) {
        add_run<Sum, Kernel>(from, to);
      } else {
        for (int64_t dx = 0; dx < taps; ++dx) to[dx] += from[dx];
      }
    }
  }
}

// The sums of one block of channels and tile of columns, as many image rows at a time as the kernel has.
template <typename T>
class Composer {
 public:
  using Sum = t2t_fast::Sum<T>;

  Composer(const SplitShape& shape, const Tokens<T>& tokens) : shape_(shape), tokens_(tokens) {
    const int64_t columns = shape.channels * shape.rows.kernel * shape.columns.kernel;
    end_ = tokens.data + (shape.batch - 1) * tokens.batch_stride + (columns - 1) * tokens.column_stride + 1 +
           (shape.rows.tokens * shape.columns.tokens - 1) * tokens.token_stride;
  }

  // Padded columns first .. first+width of sample b and of channels begin .. end, from tokens first_token .. last_token
  // of each row.
  void start(int64_t b, int64_t channel_begin, int64_t channel_end, int64_t first_token, int64_t last_token,
             int64_t first, int64_t width) {
    const int64_t taps = shape_.rows.kernel * shape_.columns.kernel;
    source_ = tokens_.data + b * tokens_.batch_stride + channel_begin * taps * tokens_.column_stride;
    channels_ = channel_end - channel_begin;
    first_token_ = first_token;
    last_token_ = last_token;
    first_ = first;
    width_ = width;
    plane_ = plane_size(width + kOvershoot, sizeof(Sum));
    opened_ = 0;
    slots_ = ring_.reserve((shape_.rows.kernel + 1) * channels_ * plane_);
    blank_ = slots_ + shape_.rows.kernel * channels_ * plane_;
    std::fill(blank_, blank_ + channels_ * plane_, Sum(0));
    rows_.resize(shape_.rows.kernel);
  }

  // Adds tap rows begin .. end of token row i.
  void add(int64_t i, int64_t begin, int64_t end) {
    const Axis<int64_t>& rows = shape_.rows;
    for (int64_t y = std::max(opened_, i * rows.stride); y < i * rows.stride + rows.kernel; ++y) {
      std::fill(slot(y), slot(y) + channels_ * plane_, Sum(0));
    }
    opened_ = i * rows.stride + rows.kernel;
    for (int64_t dy = 0; dy < rows.kernel; ++dy) rows_[dy] = slot(i * rows.stride + dy);
    for (int64_t j = first_token_; j <= last_token_; j += kTokensAtOnce) {
      const int64_t count = std::min(kTokensAtOnce, last_token_ + 1 - j);
      int64_t stride;
      const Sum* tokens = load(source_ + (i * shape_.columns.tokens + j) * tokens_.token_stride, count, stride);
      for (int64_t t = 0; t < count; ++t) {
        add_token(tokens + t * stride, (j + t) * shape_.columns.stride - first_, begin, end);
      }
    }
  }

  // The sums of padded row y, complete once every token row that covers it is added, until the next one is.
  const Sum* row(int64_t y) { return y < opened_ ? slot(y) : blank_; }
  int64_t plane() const { return plane_; }

 private:
  Sum* slot(int64_t y) { return slots_ + y % shape_.rows.kernel * channels_ * plane_; }

  void add_token(const Sum* token, int64_t offset, int64_t begin, int64_t end) {
    switch (shape_.columns.kernel) {
      case 2: return add_columns<2>(token, offset, begin, end);
      case 3: return add_columns<3>(token, offset, begin, end);
      case 4: return add_columns<4>(token, offset, begin, end);
      case 5: return add_columns<5>(token, offset, begin, end);
      case 7: return add_columns<7>(token, offset, begin, end);
      default: return add_columns<0>(token, offset, begin, end);
    }
  }

  template <int Kernel>
  void add_columns(const Sum* token, int64_t offset, int64_t begin, int64_t end) {
    const int64_t kh = shape_.rows.kernel, kw = shape_.columns.kernel;
    if (begin == 0 && end == Kernel && kh == Kernel) {
      add_runs<Sum, Kernel, true>(token, rows_.data(), offset, plane_, channels_, kh, kw, begin, end);
    } else {
      add_runs<Sum, Kernel, false>(token, rows_.data(), offset, plane_, channels_, kh, kw, begin, end);
    }
  }

  // `count` tokens with contiguous columns in the type of the sums, `stride` apart: where they are, or a copy. Up to
  // kOvershoot values behind each may be read.
  const Sum* load(const T* from, int64_t count, int64_t& stride) {
    const int64_t columns = channels_ * shape_.rows.kernel * shape_.columns.kernel;
    int64_t from_stride = tokens_.token_stride;
    const bool at_the_end = end_ - from < (count - 1) * from_stride + columns + kOvershoot;
    if (tokens_.column_stride != 1 || (std::is_same<T, Sum>::value && at_the_end)) {
      T* gathered = gathered_.reserve(kTokensAtOnce * columns + kOvershoot);
      gather(from, count, columns, gathered);
      from = gathered;
      from_stride = columns;
    }
    if constexpr (std::is_same<T, Sum>::value) {
      stride = from_stride;
      return from;
    } else {
      Sum* widened = widened_.reserve(kTokensAtOnce * columns + kOvershoot);
      for (int64_t t = 0; t < count; ++t) {
        const T* token = from + t * from_stride;
        Sum* to = widened + t * columns;
        for (int64_t x = 0; x < columns; ++x) to[x] = widen(token[x]);
      }
      stride = columns;
      return widened;
    }
  }

  void gather(const T* from, int64_t count, int64_t columns, T* to) {
    if (tokens_.token_stride == 1) {
      using Word = typename WordOf<sizeof(T)>::type;
      transpose(reinterpret_cast<const Word*>(from), tokens_.column_stride, reinterpret_cast<Word*>(to), columns,
                columns, count);
      return;
    }
    for (int64_t t = 0; t < count; ++t) {
      const T* token = from + t * tokens_.token_stride;
      for (int64_t x = 0; x < columns; ++x) to[t * columns + x] = token[x * tokens_.column_stride];
    }
  }

  const SplitShape& shape_;
  const Tokens<T> tokens_;
  const T *source_, *end_;  // end_: behind the tensor's last value
  int64_t channels_, first_token_, last_token_, first_, width_, plane_, opened_;
  Buffer<Sum> ring_, widened_;
  Buffer<T> gathered_;
  Sum *slots_, *blank_;
  std::vector<Sum*> rows_;
};

}  // namespace t2t_fast
