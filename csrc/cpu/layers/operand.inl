// Rows of floats as operands of products: the rows themselves in the float32 kernels, a copy in the bf16 kernels.
// Part of kernels.inl.

constexpr int64_t READ_ROWS = 2 * STEPS;  // rows that may be read or written behind a tile

// Cells of sums over rows: of `count` rows of whole registers, cells(count) rows of to_row cells.
inline void cells_over(const float* data, int64_t row, int64_t count, int64_t width, Cell* to, int64_t to_row) {
  for (int64_t r = 0; r < count; r += TERMS) {
    const float* from = data + r * row;
    for (int64_t c = 0; c < padded(width); c += LANES)
      store(to + r / TERMS * to_row + c, r + TERMS <= count ? successive(from + c, row) : only(load(from + c)));
  }
  for (int64_t step = (count + TERMS - 1) / TERMS; step < cells(count); ++step)
    std::memset(to + step * to_row, 0, padded(width) * sizeof(Cell));
}

// out += a b.
inline void add_gemm(int64_t rows, int64_t columns, int64_t terms, Left a, Right b, float* out, int64_t out_row) {
  gemm(rows, columns, terms, a, b, out, out_row, nullptr, true);
}

// Makes operands of tiles, one at a time. Rows are whole registers (what lies behind their width does not matter) and
// `row` floats apart.
class Operand {
 public:
  // For tiles of up to `rows` rows of up to `width` floats.
  Operand(int64_t rows, int64_t width)
      : copy_(TERMS == 1 ? Cells() : Cells((rows + READ_ROWS) * std::max(padded(width), cells(width)))) {}

  // Cell (r, step): row r, and a sum along it.
  Left along(const float* data, int64_t row, int64_t count, int64_t width) const {
#if defined(T2T_FAST_PAIRS)
    const int64_t wide = cells_in_rows(width);
    const Vec none{};
    for (int64_t r = 0; r < count; ++r) {
      const float* from = data + r * row;
      Cell* to = copy_ + r * wide;
      for (int64_t c = 0; c < width; c += 2 * LANES) {
        const Vec low = within(from + c, width - c);
        store(to + c / 2, narrowed(low, c + LANES < width ? within(from + c + LANES, width - c - LANES) : none));
      }
    }
    return {copy_, wide, 1};
#else
    (void)count, (void)width;
    return {data, row, 1};
#endif
  }

  // Cell (step, column): a sum over the rows. `over_left` is the transposed: cell (column, step).
  Right over(const float* data, int64_t row, int64_t count, int64_t width) const {
    return rows_of(over_cells(data, row, count, width), over_row(row, width));
  }
  Left over_left(const float* data, int64_t row, int64_t count, int64_t width) const {
    return {over_cells(data, row, count, width), 1, over_row(row, width)};
  }

 private:
#if defined(T2T_FAST_PAIRS)
  static int64_t cells_in_rows(int64_t width) { return padded(cells(width)); }
  static int64_t over_row(int64_t, int64_t width) { return padded(width); }

  // A register at the start of `count` floats, zeros behind them.
  static Vec within(const float* from, int64_t count) {
    if (count >= LANES) return load(from);
    IntVec inside;
    for (int64_t i = 0; i < LANES; ++i) inside[i] = i < count ? -1 : 0;
    return inside ? load(from) : Vec{};
  }

  const Cell* over_cells(const float* data, int64_t row, int64_t count, int64_t width) const {
    cells_over(data, row, count, width, copy_, padded(width));
    return copy_;
  }
#else
  static int64_t over_row(int64_t row, int64_t) { return row; }
  static const Cell* over_cells(const float* data, int64_t, int64_t, int64_t) { return data; }
#endif

  Cells copy_;
};

// A worker's products of tiles.
class Products {
 public:
  // Of tiles of up to `rows` rows of up to `width` floats.
  Products(int64_t rows, int64_t width) : left_(rows, width), right_(rows, width) {}

  // out (count, columns) = rows (count, terms) times the right operand, plus a bias, or added to `out`.
  void times(Rows rows, int64_t count, int64_t terms, Right right, int64_t columns, float* out, int64_t out_row,
             const float* bias = nullptr, bool add = false) const {
    gemm(count, columns, terms, left_.along(rows.data, rows.row, count, terms), right, out, out_row, bias, add);
  }

  // sums (outputs, inputs) += the transposed of `left` (count, outputs) times `right` (count, inputs).
  void add_over(Rows left, int64_t outputs, Rows right, int64_t inputs, int64_t count, float* sums,
                int64_t sums_row) const {
    add_gemm(outputs, inputs, count, left_.over_left(left.data, left.row, count, outputs),
             right_.over(right.data, right.row, count, inputs), sums, sums_row);
  }

 private:
  Operand left_, right_;
};
