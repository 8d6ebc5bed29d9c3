// Backward of a transformer block. Part of kernels.inl.
//
// Images are handled in groups. First every image of a group goes back to its input, tile by tile; what the weights'
// gradients are products of is kept, as cells of sums over tokens. Then the workers divide the rows of the weights'
// gradients and add the group's products. So no worker writes what another one writes, the sums exist once, and a
// result depends on the number of workers only where a group holds but one image for each.

constexpr int64_t GROUP_TOKENS = 1600;  // of a group, unless that is less than an image for each worker

// What a Linear's gradient is a product of, for the tokens of a group: cells (steps, padded width).
struct LinearTerms {
  int64_t outputs, inputs;
  Cells grads, rows;

  LinearTerms(int64_t steps, int64_t outputs_, int64_t inputs_)
      : outputs(outputs_), inputs(inputs_), grads(steps * padded(outputs)), rows(steps * padded(inputs)) {}
};

// All of a block's.
struct BlockTerms {
  int64_t images, steps;  // of a group, and of an image
  LinearTerms qkv, proj, fc1, fc2;

  BlockTerms(const BlockWeights& w, int64_t images_, int64_t steps_)
      : images(images_), steps(steps_), qkv(images * steps, 3 * w.width, w.width),
        proj(images * steps, w.width, w.width), fc1(images * steps, w.block.hidden, w.width),
        fc2(images * steps, w.width, w.block.hidden) {}
};

// The first step of a tile among those of its image: every tile begins with a new cell.
inline int64_t tile_step(int64_t token) { return token / BLOCK_TILE * cells(BLOCK_TILE); }

inline void load_rows(const Saved& from, int64_t first, int64_t width, int64_t count, float* to, int64_t to_row) {
  for (int64_t r = 0; r < count; ++r) {
    float* row = to + r * to_row;
    if (from.half) {
      const BFloat16* in = static_cast<const BFloat16*>(from.data) + (first + r) * from.row;
      for (int64_t c = 0; c < width; ++c) row[c] = widen(in[c]);
    } else {
      std::memcpy(row, static_cast<const float*>(from.data) + (first + r) * from.row, width * sizeof(float));
    }
    std::memset(row + width, 0, (padded(width) - width) * sizeof(float));
  }
}

// LayerNorm's backward of a tile: adds the gradient that reaches the rows to `grad`. `d_n` is overwritten.
inline void add_norm_backward(const BlockWeights& w, float* d_n, const float* xhat, const float* rstd, int64_t count,
                              float* grad) {
  for (int64_t r = 0; r < count; ++r) {
    float* d = d_n + r * w.wide;
    normalise_backward(d, xhat + r * w.wide, w.width, rstd[r]);
    for (int64_t c = 0; c < w.wide; c += LANES) {
      const Vec sum_of = load(grad + r * w.wide + c) + load(d + c);
      // normalise_backward leaves undefined values beyond the width
      store(grad + r * w.wide + c, c + LANES == w.wide ? (w.last ? sum_of : Vec{}) : sum_of);
    }
  }
}

struct BlockBackwardScratch {
  Operand tokens, hidden;
  Floats g, d, n, rstd, h, d_h;  // (BLOCK_TILE, wide) three times, (BLOCK_TILE), (BLOCK_TILE, HIDDEN) twice

  explicit BlockBackwardScratch(const BlockWeights& w)
      : tokens(BLOCK_TILE, 3 * w.width), hidden(BLOCK_TILE, HIDDEN), g(BLOCK_TILE * w.wide), d(BLOCK_TILE * w.wide),
        n(BLOCK_TILE * w.wide), rstd(BLOCK_TILE), h(BLOCK_TILE * HIDDEN), d_h(BLOCK_TILE * HIDDEN) {}
};

inline void scale_rows(const float* from, float factor, int64_t floats, float* to) {
  for (int64_t i = 0; i < floats; i += LANES) store(to + i, load(from + i) * factor);
}

inline void normalise_rows(const BlockWeights& w, float* rows, int64_t count, float eps, float* rstd) {
  for (int64_t r = 0; r < count; ++r) rstd[r] = normalise(rows + r * w.wide, w.width, eps, w.last);
}

// Where a tile's terms begin: of its image in the group, and of the tile in its image.
struct TileTerms {
  int64_t step;

  Cell* at(const Cells& cells, int64_t width) const { return cells + step * padded(width); }
};

// From the output's gradient of a tile to those of the sum behind the attention, d_t, and of the attention's result,
// d_y, rows of `wide` floats.
inline void mlp_backward(const BlockWeights& w, const BlockSaved& saved, Tokens grad, int64_t image, int64_t token,
                         int64_t count, const BlockTerms* terms, TileTerms tile, BlockBackwardScratch& s, float* d_t,
                         float* d_y) {
  const Block& block = w.block;
  const int64_t wide = w.wide, width = w.width, hidden = block.hidden, first = image * block.length + token;
  const float f1 = block.factors ? block.factors[image] : 1,
              f2 = block.factors ? block.factors[block.batch + image] : 1;
  for (int64_t r = 0; r < count; ++r) pad_row(d_t + r * wide, grad.at(image, token + r), width);
  scale_rows(d_t, f2, count * wide, s.g);
  load_rows(saved.t, first, width, count, s.n, wide);
  normalise_rows(w, s.n, count, block.norm2_eps, s.rstd);
  if (terms) {
    cells_over(s.g, wide, count, width, tile.at(terms->fc2.grads, width), padded(width));
    cells_over(s.n, wide, count, width, tile.at(terms->fc1.rows, width), padded(width));
  }
  const Left d_f = s.tokens.along(s.g, wide, count, width);
  for (int64_t unit = 0; unit < hidden; unit += HIDDEN) {
    const int64_t units = std::min(HIDDEN, hidden - unit), row = padded(units);
    load_rows(saved.h.from(unit), first, units, count, s.h, row);
    gemm(count, units, width, d_f, panels_of(w.fc2.panels, width).from_column(unit), s.d_h, row);
    for (int64_t i = 0; i < count * row; i += LANES) {
      const Vec h = load(s.h + i);
      const Normal at = normal(h);
      store(s.d_h + i, load(s.d_h + i) * (at.phi + h * at.bell * 0.3989422804014327f));
      store(s.h + i, h * at.phi);
    }
    if (terms) {
      cells_over(s.d_h, row, count, units, tile.at(terms->fc1.grads, hidden) + unit, padded(hidden));
      cells_over(s.h, row, count, units, tile.at(terms->fc2.rows, hidden) + unit, padded(hidden));
    }
    gemm(count, width, units, s.hidden.along(s.d_h, row, count, units),
         panels_of(w.fc1.panels, hidden).from_step(cells(unit)), s.d, wide, nullptr, unit > 0);
  }
  add_norm_backward(w, s.d, s.n, s.rstd, count, d_t);
  scale_rows(d_t, f1, count * wide, s.g);
  if (terms) {
    cells_over(s.g, wide, count, width, tile.at(terms->proj.grads, width), padded(width));
    load_rows(saved.y, first, width, count, s.n, wide);
    cells_over(s.n, wide, count, width, tile.at(terms->proj.rows, width), padded(width));
  }
  gemm(count, width, width, s.tokens.along(s.g, wide, count, width), panels_of(w.proj.panels, width), d_y, wide);
  // the attention's backward subtracts two sums of it, which must see the same numbers
  for (int64_t i = 0; i < count * wide; i += LANES) store(d_y + i, term_of(load(d_y + i)));
}

struct AttentionBackwardScratch {
  Operand queries, grads, weights, d_scores, over_queries, over_grads, over_weights, over_scores;
  Cells keys, key_rows, values;  // packed: for the scores, for d_q, and for the weights' gradient
  Floats d_q, d_k, d_v, shift, scores, d_weights;

  explicit AttentionBackwardScratch(const BlockWeights& w)
      : queries(BLOCK_TILE, w.head_width), grads(BLOCK_TILE, w.head_width), weights(BLOCK_TILE, KEYS),
        d_scores(BLOCK_TILE, KEYS), over_queries(BLOCK_TILE, w.head_width), over_grads(BLOCK_TILE, w.head_width),
        over_weights(BLOCK_TILE, KEYS), over_scores(BLOCK_TILE, KEYS), keys(packed_size(w.head_width, w.block.length)),
        key_rows(packed_size(w.block.length, w.head_width)), values(packed_size(w.head_width, w.block.length)),
        d_q(BLOCK_TILE * w.wide_head), d_k(w.block.length * w.wide_head), d_v(w.block.length * w.wide_head),
        shift(BLOCK_TILE), scores(BLOCK_TILE * KEYS), d_weights(BLOCK_TILE * KEYS) {}
};

// The gradients of one head's q, k and v, into the rows of d_qkv; y and d_y: rows of `wide` floats of the whole image.
inline void attention_backward(const BlockWeights& w, int64_t head, const float* qkv, const float* lse, const float* y,
                               const float* d_y, AttentionBackwardScratch& s, float* d_qkv) {
  const int64_t length = w.block.length, width = w.head_width, wide = w.wide_head, offset = head * width;
  const float scale = w.block.scale;
  const float* k = qkv + w.width + offset;
  pack_right(s.keys, width, length, k, 1, w.row);
  pack_right(s.key_rows, length, width, k, w.row, 1);
  pack_right(s.values, width, length, k + w.width, 1, w.row);
  clear(s.d_k, length * wide);
  clear(s.d_v, length * wide);
  for (int64_t token = 0; token < length; token += BLOCK_TILE) {
    const int64_t count = std::min(BLOCK_TILE, length - token);
    const float* q = qkv + token * w.row + offset;
    const float* grad = d_y + token * w.wide + offset;
    for (int64_t r = 0; r < count; ++r) s.shift[r] = dot(grad + r * w.wide, y + (token + r) * w.wide + offset, width);
    const Left queries = s.queries.along(q, w.row, count, width), grads = s.grads.along(grad, w.wide, count, width);
    const Right over_queries = s.over_queries.over(q, w.row, count, width);
    const Right over_grads = s.over_grads.over(grad, w.wide, count, width);
    for (int64_t first = 0; first < length; first += KEYS) {
      const int64_t keys = std::min(KEYS, length - first), row = padded(keys);
      gemm(count, keys, width, queries, panels_of(s.keys, width).from_column(first), s.scores, row);
      gemm(count, keys, width, grads, panels_of(s.values, width).from_column(first), s.d_weights, row);
      const IntVec last = last_lanes(keys);
      for (int64_t r = 0; r < count; ++r) {
        const float sum_of = lse[token + r], shift = s.shift[r];
        for (int64_t i = 0; i < row; i += LANES) {
          Vec weight = exponential(load(s.scores + r * row + i) * scale - sum_of);
          Vec d = weight * (load(s.d_weights + r * row + i) - shift) * scale;
          if (i + LANES == row) weight = last ? weight : Vec{}, d = last ? d : Vec{};
          store(s.scores + r * row + i, weight);
          store(s.d_weights + r * row + i, d);
        }
      }
      add_gemm(keys, width, count, s.over_weights.over_left(s.scores, row, count, keys), over_grads,
               s.d_v + first * wide, wide);
      add_gemm(keys, width, count, s.over_scores.over_left(s.d_weights, row, count, keys), over_queries,
               s.d_k + first * wide, wide);
      gemm(count, width, keys, s.d_scores.along(s.d_weights, row, count, keys),
           panels_of(s.key_rows, length).from_step(cells(first)), s.d_q, wide, nullptr, first > 0);
    }
    copy_rows(d_qkv + token * w.row + offset, w.row, s.d_q, wide, width, count);
  }
  copy_rows(d_qkv + w.width + offset, w.row, s.d_k, wide, width, length);
  copy_rows(d_qkv + 2 * w.width + offset, w.row, s.d_v, wide, width, length);
}

// From the gradient of q, k and v of a tile to the input's.
inline void qkv_backward(const BlockWeights& w, int64_t image, int64_t token, int64_t count, const float* d_qkv,
                         float* d_t, const BlockTerms* terms, TileTerms tile, BlockBackwardScratch& s, float* out) {
  const int64_t wide = w.wide, width = w.width;
  for (int64_t r = 0; r < count; ++r) pad_row(s.n + r * wide, w.block.x.at(image, token + r), width);
  normalise_rows(w, s.n, count, w.block.norm1_eps, s.rstd);
  if (terms) {
    cells_over(d_qkv, w.row, count, 3 * width, tile.at(terms->qkv.grads, 3 * width), padded(3 * width));
    cells_over(s.n, wide, count, width, tile.at(terms->qkv.rows, width), padded(width));
  }
  gemm(count, width, 3 * width, s.tokens.along(d_qkv, w.row, count, 3 * width), panels_of(w.qkv.panels, 3 * width), s.d,
       wide);
  add_norm_backward(w, s.d, s.n, s.rstd, count, d_t);
  copy_rows(out + (image * w.block.length + token) * width, width, d_t, wide, width, count);
}

// Adds rows [begin, end) of the products of a group's terms to a weight's gradient, and their sums to the bias's.
inline void add_linear_gradient(const LinearTerms& terms, int64_t steps, int64_t begin, int64_t end, float* weight,
                                float* bias) {
  const int64_t wide = padded(terms.outputs), wide_inputs = padded(terms.inputs);
  add_gemm(end - begin, terms.inputs, steps * TERMS, {terms.grads + begin, 1, wide}, rows_of(terms.rows, wide_inputs),
           weight + begin * wide_inputs, wide_inputs);
  for (int64_t c = begin; c < end; c += LANES) {
    Vec total{};
    for (int64_t step = 0; step < steps; ++step) total += term_sum(load(terms.grads + step * wide + c));
    store(bias + c, load(bias + c) + total);
  }
}

inline void transformer_block_backward(const Workers& workers, const Block& block, const BlockSaved& saved, Tokens grad,
                                       const BlockGradient& out) {
  const BlockWeights w(block);
  const int64_t length = block.length, wide = w.wide;
  const bool weights = out.qkv.weight || out.proj.weight || out.fc1.weight || out.fc2.weight;
  const int64_t steps = tile_step(length - 1) + cells((length - 1) % BLOCK_TILE + 1);
  const int64_t images = std::max(workers.count, std::max<int64_t>(1, GROUP_TOKENS / std::max<int64_t>(1, length)));
  const int64_t group = std::min(block.batch, images);
  std::unique_ptr<BlockTerms> kept;
  if (weights) kept = std::make_unique<BlockTerms>(w, group, steps);
  const BlockTerms* terms = kept.get();

  struct LinearSums {
    const LinearTerms BlockTerms::* terms;
    BlockGradient::Linear out;
    int64_t outputs, inputs;
    Floats weight, bias;
  };
  std::vector<LinearSums> sums;
  const auto add_linear = [&](const LinearTerms BlockTerms::* of, BlockGradient::Linear to, int64_t outputs,
                              int64_t inputs) {
    sums.push_back({of, to, outputs, inputs, zeros(outputs * padded(inputs)), zeros(padded(outputs))});
  };
  if (out.qkv.weight) add_linear(&BlockTerms::qkv, out.qkv, 3 * w.width, w.width);
  if (out.proj.weight) add_linear(&BlockTerms::proj, out.proj, w.width, w.width);
  if (out.fc1.weight) add_linear(&BlockTerms::fc1, out.fc1, block.hidden, w.width);
  if (out.fc2.weight) add_linear(&BlockTerms::fc2, out.fc2, w.width, block.hidden);

  const int64_t at_a_time = images_at_a_time(workers, group);
  const auto d_t = several<Floats>(at_a_time, length * wide), d_y = several<Floats>(at_a_time, length * wide);
  const auto y = several<Floats>(at_a_time, length * wide);
  const auto qkv = several<Floats>(at_a_time, length * w.row), d_qkv = several<Floats>(at_a_time, length * w.row);
  for (int64_t begin = 0; begin < block.batch; begin += group) {
    const int64_t number = std::min(group, block.batch - begin);
    const auto tile_of = [&](int64_t image, int64_t token) { return TileTerms{image * steps + tile_step(token)}; };
    // a divided image is divided at tiles, so that every tile has cells of its own
    const auto tiles = [&](const Span& span, const auto& each) {
      const int64_t all = (length + BLOCK_TILE - 1) / BLOCK_TILE;
      for (int64_t tile = span.share_begin(all); tile < span.share_end(all); ++tile)
        each(tile * BLOCK_TILE, std::min(BLOCK_TILE, length - tile * BLOCK_TILE));
    };
    const auto on_mlp = [&](const Span& span) {
      BlockBackwardScratch s(w);
      const int64_t slot = span.first_slot, image = begin + span.image;
      tiles(span, [&](int64_t token, int64_t count) {
        mlp_backward(w, saved, grad, image, token, count, terms, tile_of(span.image, token), s,
                     d_t[slot] + token * wide, d_y[slot] + token * wide);
        load_rows(saved.qkv, image * length + token, 3 * w.width, count, qkv[slot] + token * w.row, w.row);
        load_rows(saved.y, image * length + token, w.width, count, y[slot] + token * wide, wide);
      });
    };
    const auto on_heads = [&](const Span& span) {
      AttentionBackwardScratch s(w);
      const int64_t slot = span.first_slot, image = begin + span.image;
      for (int64_t head = span.share_begin(block.heads); head < span.share_end(block.heads); ++head)
        attention_backward(w, head, qkv[slot], saved.lse + (image * block.heads + head) * length, y[slot], d_y[slot], s,
                           d_qkv[slot]);
    };
    const auto on_qkv = [&](const Span& span) {
      BlockBackwardScratch s(w);
      const int64_t slot = span.first_slot, image = begin + span.image;
      tiles(span, [&](int64_t token, int64_t count) {
        qkv_backward(w, image, token, count, d_qkv[slot] + token * w.row, d_t[slot] + token * wide, terms,
                     tile_of(span.image, token), s, out.x);
      });
    };
    for_images(workers, number, length, on_mlp, on_heads, on_qkv);
    if (!weights) continue;
    run(workers, workers.count, [&](int64_t slot) {
      for (const LinearSums& each : sums) {
        const int64_t registers = padded(each.outputs) / LANES;
        const int64_t first = registers * slot / workers.count * LANES;
        const int64_t last = std::min(registers * (slot + 1) / workers.count * LANES, each.outputs);
        if (first < last) add_linear_gradient(terms->*each.terms, number * steps, first, last, each.weight, each.bias);
      }
    });
  }
  for (const LinearSums& each : sums) {
    copy_rows(each.out.weight, each.inputs, each.weight, padded(each.inputs), each.inputs, each.outputs);
    std::memcpy(each.out.bias, each.bias, each.outputs * sizeof(float));
  }
}
