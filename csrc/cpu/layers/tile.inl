// Tiles of tokens, scratch memory and the division of work. Part of kernels.inl.

constexpr int64_t TILE = 72;  // tokens at a time: a multiple of the register block's rows

// Scratch memory of one call; a whole register may be read or written at any of its floats.
using Floats = Buffer<float, LANES>;

inline void clear(float* to, int64_t floats) { std::memset(to, 0, floats * sizeof(float)); }

inline Floats zeros(int64_t floats) {
  Floats made(floats);
  clear(made, floats);
  return made;
}

// A part of one image's tokens that one task works on. Tasks that share an image have consecutive slots.
struct Span {
  int64_t image, begin, end;
  int64_t slot;               // of this task
  int64_t first_slot, slots;  // of all the tasks on this image

  // This task's share [share_begin, share_end) of something else that the image has `total` of.
  int64_t share_begin(int64_t total) const { return total * (slot - first_slot) / slots; }
  int64_t share_end(int64_t total) const { return total * (slot - first_slot + 1) / slots; }
};

template <typename Task>
void run(const Workers& workers, int64_t tasks, const Task& task) {
  workers.run(
      tasks, [](void* context, int64_t index) { (*static_cast<const Task*>(context))(index); },
      const_cast<Task*>(&task));
}

// Runs the phases, in order, on every image. As many images as fill all workers evenly are whole tasks; each of the
// others is divided among all workers, which wait for each other between the phases. The division depends on sizes and
// on the number of workers alone, so results repeat bit for bit.
template <typename... Phase>
void for_images(const Workers& workers, int64_t batch, int64_t length, const Phase&... phase) {
  const int64_t whole = batch / workers.count * workers.count;
  if (whole > 0) {
    run(workers, workers.count, [&](int64_t slot) {
      for (int64_t image = slot; image < whole; image += workers.count) {
        const Span span = {image, 0, length, slot, slot, 1};
        (phase(span), ...);
      }
    });
  }
  for (int64_t image = whole; image < batch; ++image) {
    const auto divided = [&](const auto& one) {
      run(workers, workers.count, [&](int64_t slot) {
        const int64_t begin = length * slot / workers.count, end = length * (slot + 1) / workers.count;
        one(Span{image, begin, end, slot, 0, workers.count});
      });
    };
    (divided(phase), ...);
  }
}

// How many images for_images() works on at a time; their tasks' first slots are below this.
inline int64_t images_at_a_time(const Workers& workers, int64_t batch) {
  return batch >= workers.count ? workers.count : std::min<int64_t>(batch, 1);
}

// Calls tile(first, count) for the tiles of [begin, end).
template <typename Tile>
void for_tiles(int64_t begin, int64_t end, const Tile& tile) {
  for (int64_t first = begin; first < end; first += TILE) tile(first, std::min(TILE, end - first));
}

// Rows of whole registers: the rows themselves where their width is one, else a copy padded with zeros.
struct Rows {
  const float* data;
  int64_t row;

  const float* at(int64_t r) const { return data + r * row; }
};

// Makes Rows of a tile: one at a time.
class RowReader {
 public:
  explicit RowReader(int64_t width) : width_(width), copies_(TILE * padded(width)) {}

  // `count` rows of `width` floats, `row` floats apart.
  Rows read(const float* data, int64_t row, int64_t count) const {
    return width_ % LANES == 0 ? Rows{data, row} : copy(data, row, count);
  }

  // The same, always a dense copy.
  Rows copy(const float* data, int64_t row, int64_t count) const {
    const int64_t wide = padded(width_);
    for (int64_t r = 0; r < count; ++r) {
      std::memcpy(copies_ + r * wide, data + r * row, width_ * sizeof(float));
      std::memset(copies_ + r * wide + width_, 0, (wide - width_) * sizeof(float));
    }
    return {copies_, wide};
  }

 private:
  int64_t width_;
  Floats copies_;
};

inline void copy_rows(float* to, int64_t to_row, const float* from, int64_t from_row, int64_t width, int64_t count) {
  for (int64_t r = 0; r < count; ++r) std::memcpy(to + r * to_row, from + r * from_row, width * sizeof(float));
}

// A vector padded with zeros; all zeros (or `missing`) where there is none.
inline void pad_vector(float* to, const float* from, int64_t width, float missing = 0) {
  for (int64_t i = 0; i < padded(width); ++i) to[i] = i >= width ? 0 : from ? from[i] : missing;
}

// The product of two vectors of any length.
inline float dot(const float* a, const float* b, int64_t count) {
  Vec products{};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) products += load(a + i) * load(b + i);
  float total = sum(products);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

// to += from, over whole registers.
inline void accumulate(float* to, const float* from, int64_t floats) {
  for (int64_t i = 0; i < floats; i += LANES) store(to + i, load(to + i) + load(from + i));
}

// to (width) += the sum of rows.
inline void add_row_sum(float* to, Rows rows, int64_t count, int64_t width) {
  for (int64_t i = 0; i < padded(width); i += LANES) {
    Vec total{};
    for (int64_t r = 0; r < count; ++r) total += load(rows.at(r) + i);
    store(to + i, load(to + i) + total);
  }
}

// Which lanes of a row's last register belong to it; all of them where the width is a multiple.
inline IntVec last_lanes(int64_t width) {
  IntVec mask;
  for (int64_t i = 0; i < LANES; ++i) mask[i] = i < width - (padded(width) - LANES) ? -1 : 0;
  return mask;
}

// LayerNorm of a row without its affine part, in place; the padding stays zero. The mean is corrected by the mean of
// the deviations from it, so that a common offset of the row costs no digits. Returns 1 / standard deviation.
inline float normalise(float* row, int64_t width, float eps, IntVec last) {
  const int64_t wide = padded(width);
  Vec total{};
  for (int64_t i = 0; i < wide; i += LANES) total += load(row + i);
  const float mean = sum(total) / width;
  Vec squares{}, rest{};
  for (int64_t i = 0; i < wide; i += LANES) {
    Vec d = load(row + i) - mean;
    if (i + LANES == wide) d = last ? d : Vec{};
    rest += d;
    squares += d * d;
    store(row + i, d);
  }
  const float correction = sum(rest) / width;
  const float variance = std::max(sum(squares) / width - correction * correction, 0.0f);
  const float rstd = 1 / std::sqrt(variance + eps);
  for (int64_t i = 0; i < wide; i += LANES) {
    const Vec scaled = (load(row + i) - correction) * rstd;
    store(row + i, i + LANES == wide ? (last ? scaled : Vec{}) : scaled);
  }
  return rstd;
}

// LayerNorm's backward for a row, in place on g: rstd (g - mean g - xhat mean(g xhat)); the padding of g is zero.
inline void normalise_backward(float* g, const float* xhat, int64_t width, float rstd) {
  const int64_t wide = padded(width);
  Vec total{}, along{};
  for (int64_t i = 0; i < wide; i += LANES) {
    total += load(g + i);
    along += load(g + i) * load(xhat + i);
  }
  const float mean = sum(total) / width, slope = sum(along) / width;
  for (int64_t i = 0; i < wide; i += LANES) store(g + i, (load(g + i) - mean - load(xhat + i) * slope) * rstd);
}

template <typename Part, typename... Arguments>
std::vector<Part> several(int64_t count, const Arguments&... arguments) {
  std::vector<Part> parts;
  parts.reserve(count);
  for (int64_t i = 0; i < count; ++i) parts.emplace_back(arguments...);
  return parts;
}

// Adds the other parts' sums to the first one's, in their order. `field` names a buffer of a part.
template <typename Part>
void merge(const Workers& workers, const std::vector<Part>& parts, Floats Part::* field, int64_t floats) {
  const int64_t registers = floats / LANES;
  run(workers, workers.count, [&](int64_t slot) {
    const int64_t begin = registers * slot / workers.count * LANES;
    const int64_t end = registers * (slot + 1) / workers.count * LANES;
    for (size_t other = 1; other < parts.size(); ++other)
      accumulate(parts[0].*field + begin, parts[other].*field + begin, end - begin);
  });
}

// Adds the parts' sums together and writes them to rows of `columns` floats. `field`
// names a buffer of a part: `rows` rows of padded(columns) floats. Nothing is done where `to` is null.
template <typename Part>
void write_sums(const Workers& workers, const std::vector<Part>& parts, Floats Part::* field, float* to, int64_t rows,
                int64_t columns) {
  if (to == nullptr) return;
  merge(workers, parts, field, rows * padded(columns));
  copy_rows(to, columns, parts[0].*field, padded(columns), columns, rows);
}
