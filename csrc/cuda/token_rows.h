// Between tokens and the ring of image rows in a tile's shared memory: steps of the tiled kernels (tiles.h).
#pragma once

#include "image_rows.h"

namespace t2t_fast::cuda {

// Elements between the last multiple of 16 bytes and a pointer.
template <typename T>
T2T_FAST_HOST_DEVICE int32_t elements_past_vector(const T* pointer) {
  return static_cast<int32_t>(reinterpret_cast<uintptr_t>(pointer) / sizeof(T) % Pack<T>::size);
}

// Elements between the rows of the token grid.
T2T_FAST_HOST_DEVICE int64_t row_pitch(const Plan& plan) { return plan.columns.tokens * plan.token_width; }

// The group's columns of the token in row `row`, column `column` of the grid.
template <typename T>
T2T_FAST_HOST_DEVICE T* token_at(const Plan& plan, const Tile& tile, T* tokens, int64_t row, int64_t column) {
  return tokens + ((tile.batch * plan.rows.tokens + row) * plan.columns.tokens + column) * plan.token_width +
         tile.channel * plan.taps;
}

// Where in the ring each column of `period` tokens lies, for the token row whose window begins in `slot`; beginning
// `head` elements before the first token, so that entries and 16-byte vectors of the output meet.
T2T_FAST_HOST_DEVICE void fill_table(const Plan& plan, int32_t slot, int32_t head, uint16_t* table, int32_t thread,
                                     int32_t threads) {
  for (int32_t i = thread; i < plan.period * plan.group_columns; i += threads) {
    int32_t rest = i - head + plan.bias * plan.group_columns;
    const int32_t token = divide(plan.by_group_columns, rest);
    rest -= token * plan.group_columns;
    const int32_t channel = divide(plan.by_taps, rest);
    rest -= channel * plan.taps;
    const int32_t dy = divide(plan.by_kernel_columns, rest);
    const int32_t dx = rest - dy * plan.kernel_columns;
    table[i] = static_cast<uint16_t>(wrap(plan, slot + dy) * plan.ring_row + channel * plan.ring_pitch + dx +
                                     token * plan.token_step);
  }
}

template <int size>
struct alignas(2 * size) Entries {
  uint16_t at[size];
};

// Tokens from the ring, `size` columns a thread: neighbouring threads write neighbouring vectors.
template <int size, typename Stored, typename T>
T2T_FAST_HOST_DEVICE void store_tokens(const Plan& plan, const Stored* ring, const uint16_t* table, T* tokens,
                                       int32_t head, int32_t count, int32_t thread, int32_t threads) {
  T* base = tokens - head;
  const int32_t end = head + count * plan.group_columns;
  const int64_t pitch = plan.period * plan.token_width;
  for (int32_t i = thread; i * size < end; i += threads) {
    const int32_t group = divide(plan.by_period_vectors, i);
    const int32_t entry = (i - group * static_cast<int32_t>(plan.by_period_vectors.divisor)) * size;
    const Entries<size> entries = *reinterpret_cast<const Entries<size>*>(table + entry);
    const Stored* from = ring + (group * plan.period - plan.bias) * plan.token_step;
    T* to = base + group * pitch + entry;
    if (size == 1 || (i * size >= head && i * size + size <= end)) {
      Pack<T> pack;
#pragma unroll
      for (int e = 0; e < size; ++e) convert(from[entries.at[e]], pack.values[e]);
      if (size > 1) {
        store_pack(to, pack);
      } else {
        *to = pack.values[0];
      }
    } else {
#pragma unroll
      for (int e = 0; e < size; ++e) {
        if (i * size + e >= head && i * size + e < end) convert(from[entries.at[e]], to[e]);
      }
    }
  }
}

// `count` tokens of a row into the tile in shared memory; the first begins at tile + head.
template <typename T>
T2T_FAST_HOST_DEVICE void load_tokens(const Plan& plan, const T* tokens, int32_t head, int32_t count, T* tile,
                                      int32_t thread, int32_t threads) {
  constexpr int size = Pack<T>::size;
  if (plan.run) {
    const int32_t end = head + count * plan.group_columns;
    const T* base = tokens - head;
    for (int32_t f = thread * size; f < end; f += threads * size) {
      if (f >= head && f + size <= end) {
        copy_async(tile + f, base + f);
      } else {
        for (int e = 0; e < size; ++e) {
          if (f + e >= head && f + e < end) tile[f + e] = base[f + e];
        }
      }
    }
  } else if (plan.vectors) {
    const int32_t vectors = static_cast<int32_t>(plan.by_token_vectors.divisor);
    for (int32_t i = thread; i < count * vectors; i += threads) {
      const int32_t token = divide(plan.by_token_vectors, i);
      const int32_t column = (i - token * vectors) * size;
      copy_async(tile + token * plan.tile_pitch + column, tokens + token * plan.token_width + column);
    }
  } else {
    for (int32_t i = thread; i < count * plan.group_columns; i += threads) {
      const int32_t token = divide(plan.by_group_columns, i);
      const int32_t column = i - token * plan.group_columns;
      tile[token * plan.tile_pitch + column] = tokens[token * plan.token_width + column];
    }
  }
}

// Which tokens of the staged row cover each ring column: how many (upper 16 bits), and where in the tile the first one
// holds its tap (lower 16). `left`: the image column of ring column 0; `first`: the grid column of the tile's token 0.
T2T_FAST_HOST_DEVICE void fill_cover(const Plan& plan, int64_t left, int64_t first, uint32_t* cover, int32_t thread,
                                     int32_t threads) {
  for (int32_t column = thread; column < plan.ring_columns; column += threads) {
    const int64_t x = left + column;
    uint32_t entry = 0;
    if (inside(plan.columns, x)) {
      const int64_t begin = first_token(plan.columns, x);
      const int64_t count = last_token(plan.columns, x) - begin + 1;
      if (count > 0) {
        entry = static_cast<uint32_t>((begin - first) * plan.tile_pitch + tap_of(plan.columns, begin, x)) |
                static_cast<uint32_t>(count) << 16;
      }
    }
    cover[column] = entry;
  }
}

// Adds token row `row`, staged in `tile`, to the ring rows of its window. Every pixel is one thread's, and its tokens
// are added in ascending order: first those of a row from left to right, then these sums from top to bottom.
// mean: rows that no later token row covers are divided by their overlap count; 0 outside the image.
template <bool mean, typename T>
T2T_FAST_HOST_DEVICE void add_tokens(const Plan& plan, const T* tile, const uint32_t* cover, int32_t columns,
                                     int64_t row, bool first, bool last, int32_t slot, Sum<T>* ring, int32_t thread,
                                     int32_t threads) {
  const int32_t next = plan.tile_pitch - plan.stride_columns;
  const int32_t fresh_from = first ? 0 : plan.kernel_rows - plan.stride_rows;  // rows that no earlier token covered
  const int32_t rows_above = static_cast<int32_t>(row < plan.kernel_rows ? row : plan.kernel_rows);
  const int64_t top = row * plan.rows.stride - plan.rows.padding, bottom = plan.rows.pixels - top;
  const int32_t inside_from = top < 0 ? static_cast<int32_t>(-top < plan.kernel_rows ? -top : plan.kernel_rows) : 0;
  const int32_t inside_to = static_cast<int32_t>(bottom < plan.kernel_rows ? bottom : plan.kernel_rows);
  for (int32_t i = thread; i < plan.group * plan.ring_columns; i += threads) {
    const int32_t channel = divide(plan.by_ring_columns, i);
    const int32_t column = i - channel * plan.ring_columns;
    if (column >= columns) continue;
    const int32_t count = static_cast<int32_t>(cover[column] >> 16);
    const T* taps = tile + (cover[column] & 0xffffu) + channel * plan.taps;
    Sum<T>* cells = ring + channel * plan.ring_pitch + column;
    int32_t ring_row = slot;
    for (int32_t dy = 0; dy < plan.kernel_rows; ++dy) {
      Sum<T> sum{};
      const T* tap = taps;
      for (int32_t n = 0; n < count; ++n) {
        sum += to_sum(*tap);
        tap += next;
      }
      Sum<T>* cell = cells + ring_row * plan.ring_row;
      if (dy < fresh_from) sum = *cell + sum;
      if (mean && (last || dy < plan.stride_rows)) {
        const int32_t above = divide(plan.by_stride_rows, plan.kernel_rows - 1 - dy);
        const int32_t overlap = count * ((above < rows_above ? above : rows_above) + 1);
        sum = overlap > 0 && dy >= inside_from && dy < inside_to ? sum / static_cast<Sum<T>>(overlap) : Sum<T>{};
      }
      *cell = sum;
      taps += plan.kernel_columns;
      ring_row = wrap(plan, ring_row + 1);
    }
  }
}

}  // namespace t2t_fast::cuda
