// Operands of matrix products, in the cells of cells.inl, and their packing. Part of kernels.inl.

constexpr int64_t PANEL = T2T_FAST_PANEL * LANES;  // columns that one register block covers

// The left operand, cell (row, step) of the product's sum; transposed and strided operands alike.
struct Left {
  const Cell* data;
  int64_t row, step;
};

// The right operand, cell (step, column): rows of `row` cells, or panels (see pack_right). Whole registers are
// read, so its rows must be padded.
struct Right {
  const Cell* data;
  int64_t row, panel;

  // The operand from a step on, and from a column on that begins a panel.
  Right from_step(int64_t step) const { return {data + step * row, row, panel}; }
  Right from_column(int64_t column) const { return {data + column / PANEL * panel, row, panel}; }
};

inline Right rows_of(const Cell* data, int64_t row) { return {data, row, PANEL}; }
inline Right panels_of(const Cell* data, int64_t terms) { return {data, PANEL, cells(terms) * PANEL}; }

// Cells that pack_right writes.
inline int64_t packed_size(int64_t terms, int64_t columns) {
  return (columns + PANEL - 1) / PANEL * PANEL * cells(terms);
}

// Panels [first, last) of a right operand: panel after panel, PANEL consecutive columns of every step, zeros beyond
// the last column. Term (term, column) is source[term * term_stride + column * column_stride].
inline void pack_right(Cell* to, int64_t terms, int64_t columns, const float* source, int64_t term_stride,
                       int64_t column_stride, int64_t first, int64_t last) {
  const int64_t steps = cells(terms);
  for (int64_t panel = first; panel < last; ++panel) {
    for (int64_t within = 0; within < PANEL; within += LANES) {
      const int64_t column = panel * PANEL + within, width = std::clamp<int64_t>(columns - column, 0, LANES);
      const float* from = source + column * column_stride;
      Cell* rows = to + panel * steps * PANEL + within;
      int64_t step = 0;
      if (term_stride == 1 && width == LANES) {
        for (; (step + LANES) * TERMS <= terms; step += LANES) {
          CellVec square[LANES];
          for (int64_t i = 0; i < LANES; ++i) square[i] = consecutive(from + i * column_stride + step * TERMS);
          transpose(square);
          for (int64_t i = 0; i < LANES; ++i) store(rows + (step + i) * PANEL, square[i]);
        }
      } else if (column_stride == 1 && width == LANES) {
        for (; (step + 1) * TERMS <= terms; ++step)
          store(rows + step * PANEL, successive(from + step * TERMS * term_stride, term_stride));
      }
      for (; step < steps; ++step) {
        Cell* row = rows + step * PANEL;
        for (int64_t i = 0; i < width; ++i) {
          const float* at = from + step * TERMS * term_stride + i * column_stride;
          const int64_t left = terms - step * TERMS;  // none in a cell that only fills up the sum
          row[i] = cell_of(left > 0 ? at[0] : 0, left > 1 && TERMS > 1 ? at[term_stride] : 0);
        }
        for (int64_t i = width; i < LANES; ++i) row[i] = Cell{};
      }
    }
  }
}

inline void pack_right(Cell* to, int64_t terms, int64_t columns, const float* source, int64_t term_stride,
                       int64_t column_stride) {
  pack_right(to, terms, columns, source, term_stride, column_stride, 0, (columns + PANEL - 1) / PANEL);
}
