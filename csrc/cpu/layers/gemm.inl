// Matrix products of tiles that lie in the caches, by blocks of registers. Part of kernels.inl.

// Before a loop over a register block: unrolled early enough for its accumulators to be registers from the first to the
// last. Else GCC keeps a copy of each on the stack, before and after the sum.
#if defined(__clang__)
#define T2T_FAST_UNROLL _Pragma("unroll")
#else
#define T2T_FAST_UNROLL _Pragma("GCC unroll 6")
#endif

constexpr int64_t BLOCK_ROWS = 6;     // rows that it covers: PANEL / LANES * 6 accumulators
constexpr int64_t BLOCK_STEPS = 192;  // cells of the sum per pass: a panel of the right operand fits L1

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

// out (rows x columns) = a b over `terms` terms, plus a bias per column, or added to what `out` holds. Writes
// padded(columns) columns.
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
      const Cell* next = b.row != PANEL           ? nullptr
                         : column + PANEL < width ? right + b.panel
                         : pass + 1 < passes      ? b.data + (step + count) * PANEL
                                                  : nullptr;
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
