// A pre-norm transformer block, one image after the other (formulas: docs/math.md, section 8):
//   t = x + f1 proj(attention(LN1(x)))     out = t + f2 fc2(gelu(fc1(LN2(t))))
// q, k and v of an image lie in a worker's second-level cache; everything else is a tile of tokens. Part of
// kernels.inl.

// Tokens at a time: about half of T2T-ViT's 197, and a multiple of a product's rows.
constexpr int64_t BLOCK_TILE = STEPS > 1 ? 112 : 102;
constexpr int64_t KEYS = 256;    // keys at a time; all of T2T-ViT's at 224 px
constexpr int64_t HIDDEN = 512;  // hidden units at a time
static_assert(KEYS % PANEL == 0 && HIDDEN % PANEL == 0, "a part begins with a panel");

struct BlockWeights {
  const Block& block;
  int64_t width, wide, head_width, wide_head, row;
  IntVec last;
  PackedLinear qkv, proj, fc1, fc2;

  explicit BlockWeights(const Block& block_)
      : block(block_), width(block.width), wide(padded(width)), head_width(width / block.heads),
        wide_head(padded(head_width)), row(padded(3 * width)), last(last_lanes(width)),
        qkv(block.qkv, width, 3 * width), proj(block.proj, width, width), fc1(block.fc1, width, block.hidden),
        fc2(block.fc2, block.hidden, width) {}
};

// Rows of `width` floats to rows of the dtype in which they are saved.
inline void save_rows(const Saved& to, int64_t first, const float* from, int64_t from_row, int64_t width,
                      int64_t count) {
  if (to.data == nullptr) return;
  for (int64_t r = 0; r < count; ++r) {
    const float* row = from + r * from_row;
    if (to.half) {
      BFloat16* out = static_cast<BFloat16*>(to.data) + (first + r) * to.row;
      for (int64_t c = 0; c < width; ++c) narrow(row[c], out[c]);
    } else {
      std::memcpy(static_cast<float*>(to.data) + (first + r) * to.row, row, width * sizeof(float));
    }
  }
}

// A row of `width` floats into a row of whole registers.
inline void pad_row(float* to, const float* from, int64_t width) {
  std::memcpy(to, from, width * sizeof(float));
  std::memset(to + width, 0, (padded(width) - width) * sizeof(float));
}

// One head's keys and values of an image, packed.
struct Head {
  Cells keys, values;

  explicit Head(const BlockWeights& w)
      : keys(packed_size(w.head_width, w.block.length)), values(packed_size(w.block.length, w.head_width)) {}

  void pack(const BlockWeights& w, const float* qkv, int64_t head) const {
    const float* k = qkv + w.width + head * w.head_width;
    pack_right(keys, w.head_width, w.block.length, k, 1, w.row);
    pack_right(values, w.block.length, w.head_width, k + w.width, w.row, 1);
  }
};

struct AttentionScratch {
  Operand queries, weights;
  Floats scores, sums, top, total;  // (BLOCK_TILE, KEYS), (BLOCK_TILE, wide_head), (BLOCK_TILE), (BLOCK_TILE)

  explicit AttentionScratch(const BlockWeights& w)
      : queries(BLOCK_TILE, w.head_width), weights(BLOCK_TILE, KEYS), scores(BLOCK_TILE * KEYS),
        sums(BLOCK_TILE * w.wide_head), top(BLOCK_TILE), total(BLOCK_TILE) {}
};

// softmax(scale q k^T) v of a tile of one head's queries to `y`, rows of y_row floats; the logarithm of the softmax's
// sum to `lse` unless null. Keys come in parts; the sums so far shrink where a later part has a larger score.
inline void attend(const BlockWeights& w, const Head& head, const float* q, int64_t count, AttentionScratch& s,
                   float* y, int64_t y_row, float* lse) {
  const int64_t length = w.block.length, width = w.head_width;
  const float scale = w.block.scale;
  const Left queries = s.queries.along(q, w.row, count, width);
  for (int64_t first = 0; first < length; first += KEYS) {
    const int64_t keys = std::min(KEYS, length - first), row = padded(keys);
    gemm(count, keys, width, queries, panels_of(head.keys, width).from_column(first), s.scores, row);
    const IntVec last = last_lanes(keys);
    for (int64_t r = 0; r < count; ++r) {
      float* scores = s.scores + r * row;
      const float before = first == 0 ? -INFINITY : s.top[r];
      Vec most = splat(before);
      for (int64_t i = 0; i < row; i += LANES) {
        Vec score = load(scores + i) * scale;
        if (i + LANES == row) score = last ? score : splat(-INFINITY);
        store(scores + i, score);
        most = larger(score, most);
      }
      const float top = largest(most);
      Vec sum_of{};
      for (int64_t i = 0; i < row; i += LANES) {
        const Vec weight = exponential(load(scores + i) - top);
        store(scores + i, weight);
        sum_of += weight;
      }
      const float total = sum(sum_of);
      s.top[r] = top;
      if (first == 0) {
        s.total[r] = total;
        continue;
      }
      const float fade = std::exp(before - top);
      s.total[r] = s.total[r] * fade + total;
      float* sums = s.sums + r * w.wide_head;
      for (int64_t c = 0; c < w.wide_head; c += LANES) store(sums + c, load(sums + c) * fade);
    }
    const Left weights = s.weights.along(s.scores, row, count, keys);
    gemm(count, width, keys, weights, panels_of(head.values, length).from_step(cells(first)), s.sums, w.wide_head,
         nullptr, first > 0);
  }
  for (int64_t r = 0; r < count; ++r) {
    const float scale_down = 1 / s.total[r];
    float* sums = s.sums + r * w.wide_head;
    for (int64_t c = 0; c < w.wide_head; c += LANES) store(sums + c, load(sums + c) * scale_down);
    std::memcpy(y + r * y_row, sums, width * sizeof(float));
    if (lse) lse[r] = s.top[r] + std::log(s.total[r]);
  }
}

struct BlockScratch {
  Operand tokens, hidden;
  Floats t, n, f, h;  // (BLOCK_TILE, wide) three times, (BLOCK_TILE, HIDDEN)

  explicit BlockScratch(const BlockWeights& w)
      : tokens(BLOCK_TILE, w.width), hidden(BLOCK_TILE, HIDDEN), t(BLOCK_TILE * w.wide), n(BLOCK_TILE * w.wide),
        f(BLOCK_TILE * w.wide), h(BLOCK_TILE * HIDDEN) {}
};

// From the attention's result y (count, wide) of a tile to the block's output.
inline void block_mlp(const BlockWeights& w, const Tokens& x, int64_t image, int64_t token, int64_t count,
                      const float* y, BlockScratch& s, const TokensOut& out, const BlockSaved& saved) {
  const Block& block = w.block;
  const int64_t wide = w.wide, first = image * block.length + token;
  const float f1 = block.factors ? block.factors[image] : 1,
              f2 = block.factors ? block.factors[block.batch + image] : 1;
  w.proj.product(s.tokens.along(y, wide, count, w.width), count, 0, w.width, s.f, wide);
  for (int64_t r = 0; r < count; ++r) {
    float* t = s.t + r * wide;
    float* n = s.n + r * wide;
    pad_row(t, x.at(image, token + r), w.width);
    for (int64_t c = 0; c < wide; c += LANES) {
      const Vec sum_of = load(t + c) + load(s.f + r * wide + c) * f1;
      store(t + c, sum_of);
      store(n + c, sum_of);
    }
    normalise(n, w.width, block.norm2_eps, w.last);
  }
  save_rows(saved.t, first, s.t, wide, w.width, count);
  const Left tokens = s.tokens.along(s.n, wide, count, w.width);
  for (int64_t unit = 0; unit < block.hidden; unit += HIDDEN) {
    const int64_t units = std::min(HIDDEN, block.hidden - unit), row = padded(units);
    w.fc1.product(tokens, count, unit, units, s.h, row);
    save_rows(saved.h.from(unit), first, s.h, row, units, count);
    for (int64_t i = 0; i < count * row; i += LANES) {
      const Vec h = load(s.h + i);
      store(s.h + i, h * normal(h).phi);
    }
    gemm(count, w.width, units, s.hidden.along(s.h, row, count, units),
         panels_of(w.fc2.panels, block.hidden).from_step(cells(unit)), s.f, wide, w.fc2.bias, unit > 0);
  }
  for (int64_t r = 0; r < count; ++r) {
    float* t = s.t + r * wide;
    for (int64_t c = 0; c < wide; c += LANES) store(t + c, load(t + c) + load(s.f + r * wide + c) * f2);
    std::memcpy(out.at(image, token + r), t, w.width * sizeof(float));
  }
}

template <typename Tile>
void for_block_tiles(int64_t begin, int64_t end, const Tile& tile) {
  for (int64_t first = begin; first < end; first += BLOCK_TILE) tile(first, std::min(BLOCK_TILE, end - first));
}

inline void transformer_block(const Workers& workers, const Block& block, TokensOut out, const BlockSaved& saved) {
  const BlockWeights w(block);
  const auto qkv = several<Floats>(images_at_a_time(workers, block.batch), block.length * w.row);
  const auto on_qkv = [&](const Span& span) {
    BlockScratch s(w);
    for_block_tiles(span.begin, span.end, [&](int64_t token, int64_t count) {
      for (int64_t r = 0; r < count; ++r) {
        pad_row(s.n + r * w.wide, block.x.at(span.image, token + r), w.width);
        normalise(s.n + r * w.wide, w.width, block.norm1_eps, w.last);
      }
      float* to = qkv[span.first_slot] + token * w.row;
      w.qkv.product(s.tokens.along(s.n, w.wide, count, w.width), count, 0, 3 * w.width, to, w.row);
      save_rows(saved.qkv, span.image * block.length + token, to, w.row, 3 * w.width, count);
    });
  };
  const auto on_tokens = [&](const Span& span) {
    const int64_t tokens = span.end - span.begin;
    const Floats y = zeros(tokens * w.wide);
    {
      const Head head(w);
      AttentionScratch scratch(w);
      for (int64_t h = 0; h < block.heads; ++h) {
        head.pack(w, qkv[span.first_slot], h);
        for_block_tiles(span.begin, span.end, [&](int64_t token, int64_t count) {
          float* lse = saved.lse ? saved.lse + (span.image * block.heads + h) * block.length + token : nullptr;
          attend(w, head, qkv[span.first_slot] + token * w.row + h * w.head_width, count, scratch,
                 y + (token - span.begin) * w.wide + h * w.head_width, w.wide, lse);
        });
      }
    }
    save_rows(saved.y, span.image * block.length + span.begin, y, w.wide, w.width, tokens);
    BlockScratch s(w);
    for_block_tiles(span.begin, span.end, [&](int64_t token, int64_t count) {
      block_mlp(w, block.x, span.image, token, count, y + (token - span.begin) * w.wide, s, out, saved);
    });
  };
  for_images(workers, block.batch, block.length, on_qkv, on_tokens);
}
