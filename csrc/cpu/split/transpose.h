// A matrix of plain 2-, 4- or 8-byte words transposed in square blocks that stay in registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../half.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define T2T_FAST_SHUFFLE 1
#endif
#endif

namespace t2t_fast {

#if defined(T2T_FAST_SHUFFLE)

using Words2 = uint16_t __attribute__((vector_size(16)));
using Words4 = uint32_t __attribute__((vector_size(16)));
using Words8 = uint64_t __attribute__((vector_size(16)));

inline Words2 interleave_low(Words2 a, Words2 b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline Words2 interleave_high(Words2 a, Words2 b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
inline Words4 interleave_low(Words4 a, Words4 b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Words4 interleave_high(Words4 a, Words4 b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
inline Words8 interleave_low(Words8 a, Words8 b) { return __builtin_shufflevector(a, b, 0, 2); }
inline Words8 interleave_high(Words8 a, Words8 b) { return __builtin_shufflevector(a, b, 1, 3); }

template <typename Word>
struct VectorOf;
template <>
struct VectorOf<uint16_t> {
  using type = Words2;
};
template <>
struct VectorOf<uint32_t> {
  using type = Words4;
};
template <>
struct VectorOf<uint64_t> {
  using type = Words8;
};

// Interleaving row r with row r + N/2, log2(N) times over, transposes an N x N block.
template <typename Word>
inline void transpose_block(const Word* from, int64_t from_stride, Word* to, int64_t to_stride) {
  using Vector = typename VectorOf<Word>::type;
  constexpr int N = 16 / sizeof(Word);
  Vector rows[N], mixed[N];
  for (int r = 0; r < N; ++r) std::memcpy(&rows[r], from + r * from_stride, 16);
  for (int step = 1; step < N; step *= 2) {
    for (int r = 0; r < N / 2; ++r) {
      mixed[2 * r] = interleave_low(rows[r], rows[r + N / 2]);
      mixed[2 * r + 1] = interleave_high(rows[r], rows[r + N / 2]);
    }
    for (int r = 0; r < N; ++r) rows[r] = mixed[r];
  }
  for (int r = 0; r < N; ++r) std::memcpy(to + r * to_stride, &rows[r], 16);
}

#else

template <typename Word>
inline void transpose_block(const Word* from, int64_t from_stride, Word* to, int64_t to_stride) {
  constexpr int N = 16 / sizeof(Word);
  for (int r = 0; r < N; ++r) {
    for (int c = 0; c < N; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

#endif

// to[c][r] = from[r][c]; rows of both are contiguous, `*_stride` words apart.
template <typename Word>
inline void transpose(const Word* from, int64_t from_stride, Word* to, int64_t to_stride, int64_t rows,
                      int64_t columns) {
  constexpr int N = 16 / sizeof(Word);
  const int64_t whole_rows = rows - rows % N, whole_columns = columns - columns % N;
  for (int64_t r = 0; r < whole_rows; r += N) {
    for (int64_t c = 0; c < whole_columns; c += N) {
      transpose_block(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    }
    for (int64_t c = whole_columns; c < columns; ++c) {
      for (int64_t i = r; i < r + N; ++i) to[c * to_stride + i] = from[i * from_stride + c];
    }
  }
  for (int64_t r = whole_rows; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

}  // namespace t2t_fast
