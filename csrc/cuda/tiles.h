// The work of one tile (plan.h), as phases that the threads of a block do together, with a barrier after each. Compiled
// for the GPU by the kernels, and for the CPU by a test that runs every thread of every phase and watches each access.
//
// Offsets inside a tile are 32-bit; what reaches into tensors is added to their pointers in 64 bits, row by row.
// A Team is the block: `phase(body)` runs body(thread) for each of its `threads`, then meets at a barrier.
#pragma once

#include "image_rows.h"
#include "token_rows.h"

namespace t2t_fast::cuda {

// Reads each image row of the tile once, writes each token of the tile once.
template <typename T, typename Team>
T2T_FAST_HOST_DEVICE void split_tile(const Plan& plan, const Image<const T*>& image, T* tokens, int64_t index,
                                     char* shared, Team& team) {
  constexpr int size = Pack<T>::size;
  const Tile tile = tile_of(plan, Work::split, index);
  T* ring = reinterpret_cast<T*>(shared);
  uint16_t* table = reinterpret_cast<uint16_t*>(shared + plan.table_at);
  T* run = token_at(plan, tile, tokens, tile.row_begin, tile.column_begin);
  int32_t slot = 0;
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row, run += row_pitch(plan)) {
    const int64_t top = row * plan.rows.stride - plan.rows.padding;
    // The rows that the window shares with the one above are in the ring already.
    const int32_t kept =
        row > tile.row_begin && plan.stride_rows < plan.kernel_rows ? plan.kernel_rows - plan.stride_rows : 0;
    const int32_t head = plan.run ? elements_past_vector(run) : 0;
    team.phase([&](int32_t thread) {
      const int32_t to = wrap(plan, slot + kept);
      if (plan.image.vectors) {
        load_rows<size>(plan, image, tile, top + kept, plan.kernel_rows - kept, to, ring, thread, team.threads);
      } else {
        load_rows<1>(plan, image, tile, top + kept, plan.kernel_rows - kept, to, ring, thread, team.threads);
      }
      fill_table(plan, slot, head, table, thread, team.threads);
    });
    team.phase([&](int32_t thread) {
      if (plan.vectors) {
        store_tokens<size>(plan, ring, table, run, head, tile.columns, thread, team.threads);
      } else {
        store_tokens<1>(plan, ring, table, run, head, tile.columns, thread, team.threads);
      }
    });
    slot = plan.stride_rows < plan.kernel_rows ? wrap(plan, slot + plan.stride_rows) : 0;
  }
}

// Reads each token that covers the tile once, writes each pixel of the tile once.
template <typename T, typename Team>
T2T_FAST_HOST_DEVICE void compose_tile(const Plan& plan, const T* tokens, const Image<T*>& image, int64_t index,
                                       char* shared, Team& team) {
  constexpr int size = Pack<T>::size;
  const Tile tile = tile_of(plan, Work::compose, index);
  Sum<T>* ring = reinterpret_cast<Sum<T>*>(shared);
  T* staged = reinterpret_cast<T*>(shared + plan.tile_at);
  uint32_t* cover = reinterpret_cast<uint32_t*>(shared + plan.cover_at);
  const int64_t first_row = first_token(plan.rows, tile.row_begin);
  const int64_t last_row = last_token(plan.rows, tile.row_end - 1);
  const int64_t first_column = first_token(plan.columns, tile.column_begin);
  const int64_t last_column = last_token(plan.columns, tile.column_begin + tile.columns - 1);
  const int32_t count = last_column < first_column ? 0 : static_cast<int32_t>(last_column - first_column + 1);
  const auto store = [&](int64_t y, int64_t end, int64_t covered, int32_t slot, int32_t thread) {
    if (plan.image.vectors) {
      store_rows<size>(plan, image, tile, y, end, covered, slot, ring, thread, team.threads);
    } else {
      store_rows<1>(plan, image, tile, y, end, covered, slot, ring, thread, team.threads);
    }
  };
  int64_t done = tile.row_begin;     // pixel rows above are written
  int64_t covered = tile.row_begin;  // the ring holds rows done..covered-1, the first of them in done_slot
  int32_t slot = 0, done_slot = 0;
  const T* run = token_at(plan, tile, tokens, first_row, first_column);
  for (int64_t row = first_row; row <= last_row; ++row, run += row_pitch(plan)) {
    const int64_t top = row * plan.rows.stride - plan.rows.padding;
    const int64_t ready = top < done ? done : (top < tile.row_end ? top : tile.row_end);
    const int32_t head = plan.run ? elements_past_vector(run) : 0;
    team.phase([&](int32_t thread) {
      load_tokens(plan, run, head, count, staged, thread, team.threads);
      if (row == first_row) fill_cover(plan, tile.column_begin, first_column, cover, thread, team.threads);
      store(done, ready, covered, done_slot, thread);
    });
    team.phase([&](int32_t thread) {
      add_tokens<false>(plan, staged + head, cover, tile.columns, row, row == first_row, false, slot, ring, thread,
                        team.threads);
    });
    done = ready;
    covered = top + plan.kernel_rows;
    // A tile that begins inside a window also begins inside it in the ring.
    done_slot = wrap(plan, slot + static_cast<int32_t>(done - top));
    slot = plan.stride_rows < plan.kernel_rows ? wrap(plan, slot + plan.stride_rows) : 0;
  }
  team.phase([&](int32_t thread) { store(done, tile.row_end, covered, done_slot, thread); });
}

// Reads the tokens whose windows meet those of the tile once, writes each token of the tile once.
template <typename T, typename Team>
T2T_FAST_HOST_DEVICE void project_tile(const Plan& plan, const T* tokens, T* out, int64_t index, char* shared,
                                       Team& team) {
  constexpr int size = Pack<T>::size;
  const Tile tile = tile_of(plan, Work::project, index);
  Sum<T>* ring = reinterpret_cast<Sum<T>*>(shared);
  T* staged = reinterpret_cast<T*>(shared + plan.tile_at);
  uint32_t* cover = reinterpret_cast<uint32_t*>(shared + plan.cover_at);
  uint16_t* table = reinterpret_cast<uint16_t*>(shared + plan.table_at);
  const int64_t above = tile.row_begin - plan.reach_rows, below = tile.row_end - 1 + plan.reach_rows;
  const int64_t first_row = above > 0 ? above : 0;
  const int64_t last_row = below < plan.rows.tokens ? below : plan.rows.tokens - 1;
  const int64_t before = tile.column_begin - plan.reach_columns;
  const int64_t after = tile.column_begin + tile.columns - 1 + plan.reach_columns;
  const int64_t first_column = before > 0 ? before : 0;
  const int64_t last_column = after < plan.columns.tokens ? after : plan.columns.tokens - 1;
  const int32_t count = static_cast<int32_t>(last_column - first_column + 1);
  const int64_t left = tile.column_begin * plan.columns.stride - plan.columns.padding;
  const int32_t ring_columns = (tile.columns - 1) * plan.token_step + plan.kernel_columns;
  const int32_t step = plan.stride_rows < plan.ring_rows ? plan.stride_rows : 0;

  int32_t slot = 0, begin_slot = 0, ready_slot = 0;
  const T* from = token_at(plan, tile, tokens, first_row, first_column);
  T* run = token_at(plan, tile, out, tile.row_begin, tile.column_begin);
  int32_t head = 0;
  bool ready = false;  // a token row whose pixels are all complete and whose table is filled waits to be written
  for (int64_t row = first_row;; ++row, from += row_pitch(plan)) {
    const int32_t from_head = plan.run ? elements_past_vector(from) : 0;
    team.phase([&](int32_t thread) {
      if (row <= last_row) load_tokens(plan, from, from_head, count, staged, thread, team.threads);
      if (row == first_row) fill_cover(plan, left, first_column, cover, thread, team.threads);
      if (!ready) return;
      if (plan.vectors) {
        store_tokens<size>(plan, ring, table, run, head, tile.columns, thread, team.threads);
      } else {
        store_tokens<1>(plan, ring, table, run, head, tile.columns, thread, team.threads);
      }
    });
    const int64_t next = row - plan.reach_rows;  // the token row that this one completes
    if (next == tile.row_end) break;
    if (row == tile.row_begin) begin_slot = slot;
    if (ready) run += row_pitch(plan);
    ready = next >= tile.row_begin;
    if (ready) {
      head = plan.run ? elements_past_vector(run) : 0;
      ready_slot = next == tile.row_begin ? begin_slot : wrap(plan, ready_slot + step);
    }
    team.phase([&](int32_t thread) {
      if (row <= last_row) {
        add_tokens<true>(plan, staged + from_head, cover, ring_columns, row, row == first_row, row == last_row, slot,
                         ring, thread, team.threads);
      }
      if (ready) fill_table(plan, ready_slot, head, table, thread, team.threads);
    });
    slot = wrap(plan, slot + step);
  }
}

}  // namespace t2t_fast::cuda
