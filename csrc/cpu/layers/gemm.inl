// Matrix products of tiles that lie in the caches, in the cells of cells.inl. Part of kernels.inl.

// Before a loop over a register block: unrolled early enough for its accumulators to be registers from the first to the
// last. Else GCC keeps a copy of each on the stack, before and after the sum.
#if defined(__clang__)
#define T2T_FAST_UNROLL _Pragma("unroll")
#else
#define T2T_FAST_UNROLL _Pragma("GCC unroll 6")
#endif

constexpr int64_t PANEL = T2T_FAST_PANEL * LANES;  // columns that one register block covers
constexpr int64_t BLOCK_ROWS = 6;                  // rows that it covers: PANEL / LANES * 6 accumulators
constexpr int64_t BLOCK_STEPS = 192;               // cells of the sum per pass: a panel of the right operand fits L1

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
          row[i] = TERMS == 1 ? cell_of(at[0], 0) : cell_of(at[0], step * TERMS + 1 < terms ? at[term_stride] : 0);
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

// One register block of ROWS x (VECS registers): the sum over `steps`, plus what `start` says, into `out`.
// The sum starts at zero also where it is added to `out`: many short sums lose less than one long one.
// `ahead`: cells that a later block reads; a register's worth is fetched in every step.
template <int64_t ROWS, int64_t VECS>
void block(Left a, const Cell* b, int64_t b_row, float* out, int64_t out_row, int64_t steps, const float* bias,
           bool add, const Cell* ahead) {
  Vec total[ROWS][VECS];
  T2T_FAST_UNROLL for (int64_t r = 0; r < ROWS; ++r) T2T_FAST_UNROLL for (int64_t v = 0; v < VECS; ++v) total[r][v] =
      Vec{};
  for (int64_t step = 0; step < steps; ++step) {
    CellVec right[VECS];
    T2T_FAST_UNROLL for (int64_t v = 0; v < VECS; ++v) right[v] = load(b + v * LANES);
    T2T_FAST_UNROLL for (int64_t r = 0; r < ROWS; ++r) {
      const Cell left = a.data[r * a.row];
      T2T_FAST_UNROLL for (int64_t v = 0; v < VECS; ++v) total[r][v] = multiply_add(left, right[v], total[r][v]);
    }
    __builtin_prefetch(ahead + step * LANES, 0, 2);
    a.data += a.step;
    b += b_row;
  }
  T2T_FAST_UNROLL for (int64_t v = 0; v < VECS; ++v) {
    const Vec start = bias ? load(bias + v * LANES) : Vec{};
    T2T_FAST_UNROLL for (int64_t r = 0; r < ROWS; ++r) {
      float* to = out + r * out_row + v * LANES;
      store(to, total[r][v] + (add ? load(to) : start));
    }
  }
}

template <int64_t VECS>
void block_rows(int64_t rows, Left a, const Cell* b, int64_t b_row, float* out, int64_t out_row, int64_t steps,
                const float* bias, bool add, const Cell* next) {
  static_assert(BLOCK_ROWS == 6, "one case per number of rows");
  // the first blocks fetch the next panel, the others what is in the cache already
  const Cell *ahead = next ? next : b, *const end = next ? next + steps * PANEL : b;
  for (; rows >= 6; rows -= 6) {
    block<6, VECS>(a, b, b_row, out, out_row, steps, bias, add, ahead);
    a.data += 6 * a.row;
    out += 6 * out_row;
    ahead = ahead + steps * LANES < end ? ahead + steps * LANES : b;
  }
  switch (rows) {
    case 5: return block<5, VECS>(a, b, b_row, out, out_row, steps, bias, add, ahead);
    case 4: return block<4, VECS>(a, b, b_row, out, out_row, steps, bias, add, ahead);
    case 3: return block<3, VECS>(a, b, b_row, out, out_row, steps, bias, add, ahead);
    case 2: return block<2, VECS>(a, b, b_row, out, out_row, steps, bias, add, ahead);
    case 1: return block<1, VECS>(a, b, b_row, out, out_row, steps, bias, add, ahead);
  }
}

// out (rows x columns) = a b over `terms` terms, plus a bias per column, or added to what `out` holds. Writes padded(columns) columns.
inline void gemm(int64_t rows, int64_t columns, int64_t terms, Left a, Right b, float* out, int64_t out_row,
                 const float* bias = nullptr, bool add = false) {
  const int64_t width = padded(columns), steps = cells(terms);
  const int64_t passes = std::max<int64_t>(1, (steps + BLOCK_STEPS - 1) / BLOCK_STEPS);
  for (int64_t pass = 0; pass < passes; ++pass) {  // once also for a sum of no terms
    const int64_t step = steps * pass / passes, count = steps * (pass + 1) / passes - step;
    const Left left = {a.data + step * a.step, a.row, a.step};
    for (int64_t column = 0; column < width; column += PANEL) {
      const Cell* right = b.data + column / PANEL * b.panel + step * b.row;
      const float* start = bias ? bias + column : nullptr;
      float* to = out + column;
      // panels lie one after the other, each with all steps
      const Cell* next = b.row != PANEL ? nullptr : column + PANEL < width ? right + b.panel : pass + 1 < passes ? b.data + (step + count) * PANEL : nullptr;
      switch (std::min(width - column, PANEL) / LANES) {
#if T2T_FAST_PANEL >= 4
        case 4: block_rows<4>(rows, left, right, b.row, to, out_row, count, start, add, next); break;
        case 3: block_rows<3>(rows, left, right, b.row, to, out_row, count, start, add, next); break;
#endif
        case 2: block_rows<2>(rows, left, right, b.row, to, out_row, count, start, add, next); break;
        case 1: block_rows<1>(rows, left, right, b.row, to, out_row, count, start, add, next); break;
      }
    }
    add = true;
  }
}

// out += a b.
inline void add_gemm(int64_t rows, int64_t columns, int64_t terms, Left a, Right b, float* out, int64_t out_row) {
  gemm(rows, columns, terms, a, b, out, out_row, nullptr, true);
}
