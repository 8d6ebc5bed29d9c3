// gemm() by the tiles of AMX: two by two tiles of the result at a time. Part of kernels.inl.

constexpr int64_t TILE_ROWS = 16;
static_assert(LANES == 16 && PANEL == 2 * LANES && STEPS == 16, "a panel has two tiles, whose rows are whole steps");

// A transposed left operand in rows of steps.
inline Cells rows_of_steps(Left a, int64_t rows, int64_t steps) {
  Cells copy((rows + 2 * TILE_ROWS) * steps);
  for (int64_t r = 0; r < rows; r += LANES) {
    for (int64_t step = 0; step < steps; step += LANES) {
      CellVec square[LANES];
      for (int64_t i = 0; i < LANES; ++i) square[i] = load(a.data + r + (step + i) * a.step);
      transpose(square);
      for (int64_t i = 0; i < std::min(LANES, rows - r); ++i) store(copy + (r + i) * steps + step, square[i]);
    }
  }
  return copy;
}

// out (rows x columns) = a b over `terms` terms, plus a bias per column, or added to what `out` holds. Writes
// padded(columns) columns. Rows of `a` are read up to the next 32: they must be readable, and do not matter.
inline void gemm(int64_t rows, int64_t columns, int64_t terms, Left a, Right b, float* out, int64_t out_row,
                 const float* bias = nullptr, bool add = false) {
  const int64_t width = padded(columns), steps = cells(terms);
  const Cells copy = a.step == 1 ? Cells() : rows_of_steps(a, rows, steps);
  if (a.step != 1) a = {copy, steps, 1};
  const TilesInUse tiles;
  const int64_t a_row = a.row * 4, b_row = b.row * 4, to_row = out_row * 4, same = 0;
  for (int64_t column = 0; column < width; column += PANEL) {
    const bool two = width - column > LANES;
    for (int64_t r = 0; r < rows; r += 2 * TILE_ROWS) {
      float* const to = out + r * out_row + column;
      const bool whole = rows - r >= 2 * TILE_ROWS;
      if (add && whole) {
        T2T_FAST_TILE_LOAD(0, to, to_row);
        T2T_FAST_TILE_LOAD(1, to + TILE_ROWS * out_row, to_row);
        if (two) {
          T2T_FAST_TILE_LOAD(2, to + LANES, to_row);
          T2T_FAST_TILE_LOAD(3, to + TILE_ROWS * out_row + LANES, to_row);
        }
      } else if (bias && !add) {
        T2T_FAST_TILE_LOAD(0, bias + column, same);
        T2T_FAST_TILE_LOAD(1, bias + column, same);
        if (two) {
          T2T_FAST_TILE_LOAD(2, bias + column + LANES, same);
          T2T_FAST_TILE_LOAD(3, bias + column + LANES, same);
        }
      } else {
        T2T_FAST_TILE_ZERO(0);
        T2T_FAST_TILE_ZERO(1);
        T2T_FAST_TILE_ZERO(2);
        T2T_FAST_TILE_ZERO(3);
      }
      const Cell* left = a.data + r * a.row;
      const Cell* right = b.data + column / PANEL * b.panel;
      for (int64_t step = 0; step < steps; step += STEPS) {
        T2T_FAST_TILE_LOAD(6, right, b_row);
        T2T_FAST_TILE_LOAD(4, left, a_row);
        T2T_FAST_TILE_LOAD(5, left + TILE_ROWS * a.row, a_row);
        T2T_FAST_TILE_MULTIPLY_ADD(0, 4, 6);
        T2T_FAST_TILE_MULTIPLY_ADD(1, 5, 6);
        if (two) {
          T2T_FAST_TILE_LOAD(7, right + LANES, b_row);
          T2T_FAST_TILE_MULTIPLY_ADD(2, 4, 7);
          T2T_FAST_TILE_MULTIPLY_ADD(3, 5, 7);
        }
        left += STEPS;
        right += STEPS * b.row;
      }
      if (whole) {
        T2T_FAST_TILE_STORE(0, to, to_row);
        T2T_FAST_TILE_STORE(1, to + TILE_ROWS * out_row, to_row);
        if (two) {
          T2T_FAST_TILE_STORE(2, to + LANES, to_row);
          T2T_FAST_TILE_STORE(3, to + TILE_ROWS * out_row + LANES, to_row);
        }
        continue;
      }
      alignas(64) float last[2 * TILE_ROWS][PANEL];
      const int64_t last_row = sizeof(last[0]);
      T2T_FAST_TILE_STORE(0, last[0], last_row);
      T2T_FAST_TILE_STORE(1, last[TILE_ROWS], last_row);
      T2T_FAST_TILE_STORE(2, last[0] + LANES, last_row);
      T2T_FAST_TILE_STORE(3, last[TILE_ROWS] + LANES, last_row);
      for (int64_t i = 0; i < rows - r; ++i) {
        for (int64_t c = 0; c < std::min(PANEL, width - column); c += LANES) {
          const Vec found = load(last[i] + c);
          store(to + i * out_row + c, add ? found + load(to + i * out_row + c) : found);
        }
      }
    }
  }
}
