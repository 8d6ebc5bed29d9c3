// Between an image and the ring of image rows in a tile's shared memory: steps of the tiled kernels (tiles.h).
#pragma once

#include "elements.h"
#include "plan.h"

namespace t2t_fast::cuda {

struct Tile {
  int64_t batch, channel;      // the first channel of the group
  int64_t row_begin, row_end;  // rows of the output
  int64_t column_begin;        // first column of the output
  int32_t columns;             // its columns: tokens, of a composition pixels
};

// Neighbours in the index share data: channel groups the sectors of a pixel, segments the rows between them.
T2T_FAST_HOST_DEVICE Tile tile_of(const Plan& plan, Work work, int64_t index) {
  const bool compose = work == Work::compose;
  const int64_t total_rows = compose ? plan.rows.pixels : plan.rows.tokens;
  const int64_t total_columns = compose ? plan.columns.pixels : plan.columns.tokens;
  Tile tile;
  tile.channel = index % plan.groups * plan.group;
  index /= plan.groups;
  tile.row_begin = index % plan.segments * plan.segment;
  index /= plan.segments;
  tile.column_begin = index % plan.strips * plan.strip;
  tile.batch = index / plan.strips;
  tile.row_end = tile.row_begin + plan.segment < total_rows ? tile.row_begin + plan.segment : total_rows;
  const int64_t rest = total_columns - tile.column_begin;
  tile.columns = rest < plan.strip ? static_cast<int32_t>(rest) : plan.strip;
  return tile;
}

// 0 <= slot < 2 * ring_rows.
T2T_FAST_HOST_DEVICE int32_t wrap(const Plan& plan, int32_t slot) {
  return slot < plan.ring_rows ? slot : slot - plan.ring_rows;
}

// Where item `i` of a ring row's accesses lies: `size` elements from (channel, column) on along one axis.
struct ImageItem {
  int32_t row, channel, column;
};

template <int size>
T2T_FAST_HOST_DEVICE ImageItem image_item(const Plan& plan, int32_t lead, int32_t i) {
  ImageItem item;
  item.row = divide(plan.by_image_row, i);
  i -= item.row * plan.image_row;
  const int32_t outer = divide(plan.by_image_inner, i);
  const int32_t inner = (i - outer * plan.image_inner) * size;
  item.channel = plan.image.along_channels ? inner : outer;
  item.column = plan.image.along_channels ? outer : inner - lead;
  return item;
}

// Image rows y..y+count-1 (0 outside the image) into the ring from `slot` on. Each thread reads several items
// before it stores the first: vectors of 16 bytes of a pixel's channels or of a row, or single elements.
template <int size, typename T>
T2T_FAST_HOST_DEVICE void load_rows(const Plan& plan, const Image<const T*>& image, const Tile& tile, int64_t y,
                                    int32_t count, int32_t slot, T* ring, int32_t thread, int32_t threads) {
  constexpr int kInFlight = size > 1 ? 2 : 4;
  const int64_t left = tile.column_begin * plan.columns.stride - plan.columns.padding;
  const int32_t lead = size > 1 && !plan.image.along_channels ? static_cast<int32_t>((left % size + size) % size) : 0;
  const T* base = image.data + tile.batch * image.batch_stride + tile.channel * image.channel_stride;
  const int64_t step = plan.image.along_channels ? image.channel_stride : image.column_stride;
  const int32_t ring_step = plan.image.along_channels ? plan.ring_pitch : 1;
  const int32_t items = count * plan.image_row;
  for (int32_t first = thread; first < items; first += kInFlight * threads) {
    T values[kInFlight][size];
#pragma unroll
    for (int n = 0; n < kInFlight; ++n) {
      const int32_t i = first + n * threads;
      if (i >= items) continue;
      const ImageItem item = image_item<size>(plan, lead, i);
      const int64_t row = y + item.row, column = left + item.column;
      const T* at = base + item.channel * image.channel_stride + row * image.row_stride + column * image.column_stride;
      const bool row_inside = inside(plan.rows, row);
      const int64_t last = plan.image.along_channels ? column : column + size - 1;
      if (size > 1 && row_inside && column >= 0 && last < plan.columns.pixels) {
        const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(at);
#pragma unroll
        for (int e = 0; e < size; ++e) values[n][e] = pack.values[e];
      } else {
#pragma unroll
        for (int e = 0; e < size; ++e) {
          const int64_t x = plan.image.along_channels ? column : column + e;
          values[n][e] = row_inside && inside(plan.columns, x) ? at[e * step] : T{};
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kInFlight; ++n) {
      const int32_t i = first + n * threads;
      if (i >= items) continue;
      const ImageItem item = image_item<size>(plan, lead, i);
      T* to = ring + wrap(plan, slot + item.row) * plan.ring_row + item.channel * plan.ring_pitch + item.column;
#pragma unroll
      for (int e = 0; e < size; ++e) {
        const int32_t column = plan.image.along_channels ? item.column : item.column + e;
        if (column >= 0 && column < plan.ring_columns) to[e * ring_step] = values[n][e];
      }
    }
  }
}

// Finished pixel rows y..end-1 to the image; the ring holds those below `covered` from `slot` on, the others are 0.
template <int size, typename T>
T2T_FAST_HOST_DEVICE void store_rows(const Plan& plan, const Image<T*>& image, const Tile& tile, int64_t y, int64_t end,
                                     int64_t covered, int32_t slot, const Sum<T>* ring, int32_t thread,
                                     int32_t threads) {
  T* base = image.data + tile.batch * image.batch_stride + tile.channel * image.channel_stride +
            tile.column_begin * image.column_stride;
  const int64_t step = plan.image.along_channels ? image.channel_stride : image.column_stride;
  const int32_t ring_step = plan.image.along_channels ? plan.ring_pitch : 1;
  for (; y < end; ++y, slot = wrap(plan, slot + 1)) {
    for (int32_t i = thread; i < plan.image_row; i += threads) {
      const ImageItem item = image_item<size>(plan, 0, i);
      if (item.column >= tile.columns) continue;
      const Sum<T>* from = ring + slot * plan.ring_row + item.channel * plan.ring_pitch + item.column;
      T* to = base + item.channel * image.channel_stride + y * image.row_stride + item.column * image.column_stride;
      const int32_t valid = plan.image.along_channels ? size : tile.columns - item.column;
      Pack<T> pack;
#pragma unroll
      for (int e = 0; e < size; ++e) {
        const Sum<T> value = y < covered && e < valid ? from[e * ring_step] : Sum<T>{};
        convert(value, pack.values[e]);
      }
      if (size > 1 && valid >= size) {
        store_pack(to, pack);
      } else {
#pragma unroll
        for (int e = 0; e < size; ++e) {
          if (e < valid) to[e * step] = pack.values[e];
        }
      }
    }
  }
}

}  // namespace t2t_fast::cuda
