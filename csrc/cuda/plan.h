// How the work of a call is cut into tiles, one thread block each. Plain integers, decided on the CPU before a launch.
//
// A tile makes some rows of the output for a strip of columns and a group of channels. It walks down these rows and
// keeps the image rows that it needs in shared memory, in a ring: [ring row][channel][column].
//   split    image rows enter the ring once each, tokens are gathered from it
//   compose  tokens are added to the ring row by row of the token grid, finished image rows leave it
//   project  tokens are added, finished rows are divided by their overlap count, tokens are gathered
// Tokens are `group * taps` adjacent columns each. They move in 16-byte vectors in one of two ways: as one run over the
// tokens of a strip where a tile holds all channels (`run`; any alignment, head and tail element by element), or token
// by token where every segment is aligned. Where neither is possible they move element by element.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../soft_split.h"

namespace t2t_fast::cuda {

enum class Work { split, compose, project };

// How a tile reads or writes the image: 16-byte vectors along channels or columns, or single elements whose
// neighbouring threads take the axis with the smaller stride.
struct ImageAccess {
  bool along_channels, vectors;
};

struct Plan {
  Axis<int64_t> rows, columns;
  int64_t batch, token_width;  // token_width: channels * taps
  int64_t groups, strips, segments, tiles;
  int64_t segment;                     // rows of the output per tile: token rows, of a composition pixel rows
  int32_t strip;                       // columns of the output per tile: tokens, of a composition pixels
  int32_t group, taps, group_columns;  // channels per tile; columns of a token in a tile
  int32_t kernel_rows, kernel_columns;
  int32_t stride_rows, stride_columns;  // no larger than needed inside a tile
  int32_t token_step;                   // ring columns between neighbouring tokens of a strip
  int32_t reach_rows, reach_columns;    // how many tokens further down or right may still cover a token's pixels
  int32_t ring_rows, ring_columns, ring_pitch, ring_row;
  int32_t tile_pitch;    // elements between tokens of the staged tile
  int32_t period, bias;  // tokens after which vectors repeat; tokens before the first one in the table
  bool run, vectors;
  int32_t tile_at, table_at, cover_at, shared_bytes;
  Divider by_group_columns, by_taps, by_kernel_columns, by_stride_rows, by_ring_columns, by_token_vectors,
      by_period_vectors;
  ImageAccess image;
  int32_t image_inner, image_row;  // vectors (or elements) of a ring row: along the inner axis, and of both axes
  Divider by_image_inner, by_image_row;
};

// The properties of the device that a plan depends on.
struct Device {
  int multiprocessors, shared_per_multiprocessor;
};

constexpr int kThreads = 256;
constexpr int32_t kSharedMost = 96 * 1024;  // what every architecture from 8.0 on grants to a block that asks for it

namespace detail {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int64_t gcd(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// Shared memory of a tile of `group` channels and `strip` columns; false where it is above `limit`.
inline bool lay_out(Plan& plan, Work work, int bytes, int64_t group, int64_t strip, int64_t limit) {
  const Axis<int64_t>&rows = plan.rows, &columns = plan.columns;
  const int64_t sum_bytes = work == Work::split ? bytes : std::max(bytes, 4);
  const int64_t size = 16 / bytes;  // elements of a vector
  const int64_t taps = rows.kernel * columns.kernel;
  // Every product below is of factors already bounded, so that nothing overflows.
  if (taps > limit || group > limit || group * taps > limit) return false;
  const int64_t width = group * taps;
  const int64_t reach_rows = (rows.kernel - 1) / rows.stride, reach_columns = (columns.kernel - 1) / columns.stride;
  const int64_t ring_rows = rows.kernel + (work == Work::project ? reach_rows * rows.stride : 0);
  const int64_t ring_columns =
      work == Work::compose ? strip : (strip > 1 ? (strip - 1) * columns.stride : 0) + columns.kernel;
  // An odd pitch spreads channels over the memory banks, for the gather and for accesses along channels.
  const int64_t ring_pitch = ring_columns | 1;
  if (ring_columns > limit) return false;
  const int64_t ring = ring_rows * group * ring_pitch;
  if (ring * sum_bytes > limit) return false;

  int64_t at = round_up(ring * sum_bytes, 16);
  plan.tile_at = plan.table_at = plan.cover_at = static_cast<int32_t>(at);
  int64_t tile = 0;
  const int64_t units = width / size;
  const int64_t tile_pitch = plan.vectors && !plan.run ? (units | 1) * size : width;
  if (work != Work::split) {
    const int64_t most =
        work == Work::project ? strip + 2 * reach_columns : (strip + columns.kernel - 2) / columns.stride + 1;
    tile = std::min(columns.tokens, most) * tile_pitch + (plan.run ? 2 * size : 0);
    at = round_up(at + tile * bytes, 16);
    plan.cover_at = static_cast<int32_t>(at);
    at = round_up(at + ring_columns * 4, 16);
  }
  const int64_t token_step = strip > 1 ? columns.stride : 0;
  int64_t period = 1, bias = 0, reached = ring;
  if (work != Work::compose) {
    if (plan.vectors) period = size / gcd(size, width);
    if (plan.run) bias = ceil_div(size, width);
    reached += (period + bias) * token_step;
    plan.table_at = static_cast<int32_t>(at);
    at = round_up(at + period * width * 2, 16);
  }
  // Offsets into ring and tile are kept in 16 bits.
  if (at > limit || tile > 65535 || reached > 65535) return false;

  const int64_t farthest = std::max(rows.pixels + 2 * rows.padding, columns.pixels + 2 * columns.padding);
  plan.group = static_cast<int32_t>(group);
  plan.strip = static_cast<int32_t>(strip);
  plan.taps = static_cast<int32_t>(taps);
  plan.group_columns = static_cast<int32_t>(width);
  plan.kernel_rows = static_cast<int32_t>(rows.kernel);
  plan.kernel_columns = static_cast<int32_t>(columns.kernel);
  plan.stride_rows = static_cast<int32_t>(std::min({rows.stride, farthest, int64_t{1} << 30}));
  plan.stride_columns = static_cast<int32_t>(std::min({columns.stride, farthest, int64_t{1} << 30}));
  plan.token_step = static_cast<int32_t>(token_step);
  plan.reach_rows = static_cast<int32_t>(reach_rows);
  plan.reach_columns = static_cast<int32_t>(reach_columns);
  plan.ring_rows = static_cast<int32_t>(ring_rows);
  plan.ring_columns = static_cast<int32_t>(ring_columns);
  plan.ring_pitch = static_cast<int32_t>(ring_pitch);
  plan.ring_row = static_cast<int32_t>(group * ring_pitch);
  plan.tile_pitch = static_cast<int32_t>(tile_pitch);
  plan.period = static_cast<int32_t>(period);
  plan.bias = static_cast<int32_t>(bias);
  plan.shared_bytes = static_cast<int32_t>(at);
  return true;
}

// Token rows of the shortest tile. A tile of few rows reads many rows that its neighbours also read.
inline int64_t least_rows(const Plan& plan, Work work) {
  return work == Work::split ? 1 : work == Work::compose ? 2 : std::max(2, plan.reach_rows);
}

// The widest strip of `group` channels that fits, evened out over the image; 0 where none does.
inline int64_t widest_strip(Plan& plan, Work work, int bytes, int64_t group, int64_t limit) {
  const int64_t total = work == Work::compose ? plan.columns.pixels : plan.columns.tokens;
  const int64_t size = 16 / bytes;
  int64_t fits = 0, over = total + 1;
  while (over - fits > 1) {
    const int64_t middle = fits + (over - fits) / 2;
    (lay_out(plan, work, bytes, group, middle, limit) ? fits : over) = middle;
  }
  if (fits == 0) return 0;
  int64_t strip = ceil_div(total, ceil_div(total, fits));
  // Strips of a composition begin at a vector where that costs no more memory.
  if (work == Work::compose && strip < total && round_up(strip, size) <= fits) strip = round_up(strip, size);
  lay_out(plan, work, bytes, group, strip, limit);
  return strip;
}

// Chooses channels and columns of a tile: wide strips first, in so little memory that blocks share a multiprocessor.
// More tiles of fewer channels where there are too few to give each multiprocessor one.
inline bool choose_tile(Plan& plan, Work work, int bytes, int64_t channels, bool aligned, const Device& device) {
  const int64_t size = 16 / bytes, taps = plan.rows.kernel * plan.columns.kernel;
  // Shared memory that lets a multiprocessor hold as many blocks as its registers do; 1 kB a block is the system's.
  const int64_t blocks = work == Work::project ? 3 : 4;
  const int64_t shared = std::min<int64_t>(kSharedMost, device.shared_per_multiprocessor / blocks - 1024);
  const int64_t step = work == Work::compose ? plan.columns.stride : 1;
  const int64_t total = work == Work::compose ? plan.columns.pixels : plan.columns.tokens;
  const struct {
    int64_t limit, tokens;
    bool single;
  } attempts[] = {{shared, 32, false},
                  {shared, 16, false},
                  {kSharedMost, 16, false},
                  {kSharedMost, 4, false},
                  {kSharedMost, 1, true}};
  for (const auto& attempt : attempts) {
    const int64_t wanted = std::min(total, attempt.tokens > 1 ? attempt.tokens * step : 1);
    Plan best = plan;
    bool found = false;
    for (int64_t parts = 1; parts <= channels; ++parts) {
      if (channels % parts) continue;
      const int64_t group = channels / parts;
      plan.run = parts == 1;
      plan.vectors = plan.run || (aligned && plan.token_width % size == 0 && group * taps % size == 0);
      if (!plan.vectors && (found || !attempt.single)) continue;
      const int64_t strip = widest_strip(plan, work, bytes, group, attempt.limit);
      if (strip < wanted) continue;
      best = plan;
      found = true;
      // In floating point, because a composition's strips times its token rows may be more than 2^63.
      const double rows = double(plan.batch) * parts * ceil_div(total, strip) * plan.rows.tokens;
      if (rows >= double(device.multiprocessors) * least_rows(plan, work)) break;
    }
    plan = best;
    if (found) return true;
  }
  return false;
}

template <typename Pointer>
void choose_image_access(Plan& plan, Work work, int bytes, const Image<Pointer>& image) {
  const int64_t size = 16 / bytes;
  const auto whole = [&](int64_t stride) { return stride % size == 0; };
  const bool base =
      reinterpret_cast<uintptr_t>(image.data) % 16 == 0 && whole(image.batch_stride) && whole(image.row_stride);
  const bool channels = base && image.channel_stride == 1 && whole(image.column_stride) && whole(plan.group);
  const bool columns = base && image.column_stride == 1 && whole(image.channel_stride) &&
                       (work == Work::split || plan.strips == 1 || whole(plan.strip));
  plan.image.vectors = channels || columns;
  plan.image.along_channels = channels || (!columns && image.channel_stride < image.column_stride);
  const int64_t vector = plan.image.vectors ? size : 1;
  // Along columns a strip of a split may begin inside a vector.
  const int64_t inner = plan.image.along_channels ? plan.group / vector
                                                  : ceil_div(plan.ring_columns + (vector > 1 ? vector - 1 : 0), vector);
  plan.image_inner = static_cast<int32_t>(inner);
  plan.image_row = static_cast<int32_t>(inner * (plan.image.along_channels ? plan.ring_columns : plan.group));
  plan.by_image_inner = divider(plan.image_inner);
  plan.by_image_row = divider(plan.image_row);
}

}  // namespace detail

// False where a window is too large for shared memory (more than some thousand taps): the plain kernels serve those.
// `bytes`: of an element. `tokens_aligned`: the tokens begin at a multiple of 16 bytes. A project has no image.
template <typename Pointer>
bool make_plan(Plan& plan, Work work, const SplitShape& shape, int bytes, bool tokens_aligned,
               const Image<Pointer>& image, const Device& device) {
  using detail::ceil_div;
  plan = Plan{};
  plan.rows = shape.rows;
  plan.columns = shape.columns;
  plan.batch = shape.batch;
  if (shape.rows.kernel > kSharedMost || shape.columns.kernel > kSharedMost || shape.channels > INT32_MAX) return false;
  plan.token_width = shape.channels * shape.rows.kernel * shape.columns.kernel;
  if (!detail::choose_tile(plan, work, bytes, shape.channels, tokens_aligned, device)) return false;

  const bool compose = work == Work::compose;
  plan.groups = shape.channels / plan.group;
  plan.strips = ceil_div(compose ? shape.columns.pixels : shape.columns.tokens, plan.strip);
  // Enough tiles to keep every multiprocessor busy, but long ones: each also reads rows of its neighbours.
  const int64_t total = compose ? shape.rows.pixels : shape.rows.tokens;
  const int64_t unit = compose ? std::min(shape.rows.stride, total) : 1;
  const int64_t wanted = int64_t{device.multiprocessors} * (work == Work::split ? 8 : 3);
  const int64_t columns = std::max<int64_t>(1, plan.batch * plan.groups * plan.strips);
  const int64_t segments = std::max<int64_t>(1, (wanted + columns / 2) / columns);
  const int64_t rows = detail::round_up(ceil_div(total, segments), unit);
  plan.segment = std::min(total, std::max(unit * detail::least_rows(plan, work), rows));
  plan.segments = ceil_div(total, plan.segment);
  plan.tiles = plan.batch * plan.strips * plan.segments * plan.groups;

  plan.by_group_columns = divider(plan.group_columns);
  plan.by_taps = divider(plan.taps);
  plan.by_kernel_columns = divider(plan.kernel_columns);
  plan.by_stride_rows = divider(plan.stride_rows);
  plan.by_ring_columns = divider(plan.ring_columns);
  const int size = plan.vectors ? 16 / bytes : 1;
  plan.by_token_vectors = divider(std::max(1, plan.group_columns / size));
  plan.by_period_vectors = divider(std::max(1, plan.period * plan.group_columns / size));
  if (work != Work::project) detail::choose_image_access(plan, work, bytes, image);
  return true;
}

}  // namespace t2t_fast::cuda
