// token_mlp, one tile of tokens at a time (formulas: docs/math.md, section 3):
//   t = v + drop(y Wp^T + bp)     n = LN(t)     h = n W1^T + b1     out = t + drop(gelu(h) W2^T + b2)
// Backward recomputes everything from y and v. Part of kernels.inl.

// The parameters as the products want them. `backward` also packs the weights untransposed.
struct MlpWeights {
  const MlpParameters& mlp;
  int64_t width, wide, hidden, wide_hidden;
  IntVec last;
  Dropout dropout;
  Cells proj, fc1, fc2;                 // packed transposed: forward
  Cells proj_back, fc1_back, fc2_back;  // packed: gradients of the inputs
  Floats proj_bias, norm_weight, norm_bias, fc1_bias, fc2_bias;

  MlpWeights(const MlpParameters& mlp_parameters, bool backward)
      : mlp(mlp_parameters), width(mlp.width), wide(padded(width)), hidden(mlp.hidden), wide_hidden(padded(hidden)),
        last(last_lanes(width)), dropout(mlp.proj_drop, mlp.mlp_drop, mlp.seed), proj(packed_size(width, width)),
        fc1(packed_size(width, hidden)), fc2(packed_size(hidden, width)),
        proj_back(backward ? packed_size(width, width) : 0), fc1_back(backward ? packed_size(hidden, width) : 0),
        fc2_back(backward ? packed_size(width, hidden) : 0), proj_bias(wide), norm_weight(wide), norm_bias(wide),
        fc1_bias(wide_hidden), fc2_bias(wide) {
    pack_right(proj, width, width, mlp.proj_weight, 1, width);
    pack_right(fc1, width, hidden, mlp.fc1_weight, 1, width);
    pack_right(fc2, hidden, width, mlp.fc2_weight, 1, hidden);
    if (backward) {
      pack_right(proj_back, width, width, mlp.proj_weight, width, 1);
      pack_right(fc1_back, hidden, width, mlp.fc1_weight, width, 1);
      pack_right(fc2_back, width, hidden, mlp.fc2_weight, hidden, 1);
    }
    pad_vector(proj_bias, mlp.proj_bias, width);
    pad_vector(norm_weight, mlp.norm_weight, width, 1);
    pad_vector(norm_bias, mlp.norm_bias, width);
    pad_vector(fc1_bias, mlp.fc1_bias, hidden);
    pad_vector(fc2_bias, mlp.fc2_bias, width);
  }
};

struct MlpScratch {
  Products products;
  Floats t, n, h, rstd, lanes;

  explicit MlpScratch(const MlpWeights& w)
      : products(TILE, std::max(w.width, w.hidden)), t(TILE * w.wide), n(TILE * w.wide), h(TILE * w.wide_hidden),
        rstd(TILE), lanes((Dropout::room(TILE * w.width) + 1) / 2) {}

  uint16_t* lane_buffer() const { return reinterpret_cast<uint16_t*>(static_cast<float*>(lanes)); }
};

// y Wp^T + bp of a tile of y (tokens, wide) into s.t, the input of mlp_skip().
inline void mlp_project(const MlpWeights& w, const float* y, int64_t tokens, MlpScratch& s) {
  s.products.times({y, w.wide}, tokens, w.width, panels_of(w.proj, w.width), w.width, s.t, w.wide, w.proj_bias);
}

// A tile of tokens: rows of v, and the number of its first element among those of the dropout.
struct MlpTile {
  Rows v;
  int64_t first_element, tokens;
};

// t (in the place of y Wp^T + bp), its normalised rows xhat (into s.n), 1 / standard deviation (into s.rstd). Returns
// the dropout's lanes.
inline const uint16_t* mlp_skip(const MlpWeights& w, const MlpTile& tile, MlpScratch& s) {
  const uint16_t* lanes = nullptr;
  if (w.dropout.active()) lanes = w.dropout.draw(tile.first_element, tile.tokens * w.width, s.lane_buffer());
  for (int64_t r = 0; r < tile.tokens; ++r) {
    float* t = s.t + r * w.wide;
    float* n = s.n + r * w.wide;
    for (int64_t c = 0; c < w.wide; c += LANES) {
      Vec x = load(t + c);
      if (lanes) x = w.dropout.proj(x, lanes + r * w.width + c);
      x += load(tile.v.at(r) + c);
      store(t + c, x);
      store(n + c, x);
    }
    s.rstd[r] = normalise(n, w.width, w.mlp.norm_eps, w.last);
  }
  return lanes;
}

// n = xhat gamma + beta.
inline void mlp_affine(const MlpWeights& w, const float* xhat, float* n, int64_t tokens) {
  for (int64_t r = 0; r < tokens; ++r)
    for (int64_t c = 0; c < w.wide; c += LANES)
      store(n + r * w.wide + c, load(xhat + r * w.wide + c) * load(w.norm_weight + c) + load(w.norm_bias + c));
}

// From y Wp^T + bp in s.t to `out`: rows of whole registers, `out_row` apart.
inline void mlp_forward(const MlpWeights& w, const MlpTile& tile, MlpScratch& s, float* out, int64_t out_row) {
  const int64_t tokens = tile.tokens;
  const uint16_t* lanes = mlp_skip(w, tile, s);
  mlp_affine(w, s.n, s.n, tokens);
  s.products.times({s.n, w.wide}, tokens, w.width, panels_of(w.fc1, w.width), w.hidden, s.h, w.wide_hidden, w.fc1_bias);
  for (int64_t i = 0; i < tokens * w.wide_hidden; i += LANES) {
    const Vec h = load(s.h + i);
    store(s.h + i, h * normal(h).phi);
  }
  s.products.times({s.h, w.wide_hidden}, tokens, w.hidden, panels_of(w.fc2, w.hidden), w.width, s.n, w.wide,
                   w.fc2_bias);
  for (int64_t r = 0; r < tokens; ++r) {
    for (int64_t c = 0; c < w.wide; c += LANES) {
      Vec f = load(s.n + r * w.wide + c);
      if (lanes) f = w.dropout.mlp(f, lanes + r * w.width + c);
      store(out + r * out_row + c, f + load(s.t + r * w.wide + c));
    }
  }
}

// One worker's sums of the parameters' gradients, rows padded.
struct MlpSums {
  Floats proj_weight, fc1_weight, fc2_weight, proj_bias, norm_weight, norm_bias, fc1_bias, fc2_bias;

  explicit MlpSums(const MlpWeights& w)
      : proj_weight(zeros(w.width * w.wide)), fc1_weight(zeros(w.hidden * w.wide)),
        fc2_weight(zeros(w.width * w.wide_hidden)), proj_bias(zeros(w.wide)), norm_weight(zeros(w.wide)),
        norm_bias(zeros(w.wide)), fc1_bias(zeros(w.wide_hidden)), fc2_bias(zeros(w.wide)) {}
};

struct MlpBackwardScratch : MlpScratch {
  Floats affine, d_h, d_n, d_f;

  explicit MlpBackwardScratch(const MlpWeights& w)
      : MlpScratch(w), affine(TILE * w.wide), d_h(TILE * w.wide_hidden), d_n(TILE * w.wide), d_f(TILE * w.wide) {}
};

// Backward of mlp_forward() for a tile: d_y (tokens, wide) and the skip's share of d_v (tokens, wide).
inline void mlp_backward(const MlpWeights& w, const MlpTile& tile, const float* y, Rows grad, MlpBackwardScratch& s,
                         MlpSums& sums, float* d_y, float* d_v) {
  const int64_t tokens = tile.tokens;
  mlp_project(w, y, tokens, s);
  const uint16_t* lanes = mlp_skip(w, tile, s);
  const float* xhat = s.n;
  mlp_affine(w, xhat, s.affine, tokens);
  s.products.times({s.affine, w.wide}, tokens, w.width, panels_of(w.fc1, w.width), w.hidden, s.h, w.wide_hidden,
                   w.fc1_bias);
  Rows d_f = grad;
  if (lanes) {
    for (int64_t r = 0; r < tokens; ++r)
      for (int64_t c = 0; c < w.wide; c += LANES)
        store(s.d_f + r * w.wide + c, w.dropout.mlp(load(grad.at(r) + c), lanes + r * w.width + c));
    d_f = {s.d_f, w.wide};
  }
  s.products.times(d_f, tokens, w.width, panels_of(w.fc2_back, w.width), w.hidden, s.d_h, w.wide_hidden);
  for (int64_t i = 0; i < tokens * w.wide_hidden; i += LANES) {
    const Vec h = load(s.h + i);
    const Normal at = normal(h);
    store(s.d_h + i, load(s.d_h + i) * (at.phi + h * at.bell * 0.3989422804014327f));
    store(s.h + i, h * at.phi);
  }
  s.products.add_over(d_f, w.width, {s.h, w.wide_hidden}, w.hidden, tokens, sums.fc2_weight, w.wide_hidden);
  add_row_sum(sums.fc2_bias, d_f, tokens, w.width);
  s.products.add_over({s.d_h, w.wide_hidden}, w.hidden, {s.affine, w.wide}, w.width, tokens, sums.fc1_weight, w.wide);
  add_row_sum(sums.fc1_bias, {s.d_h, w.wide_hidden}, tokens, w.hidden);
  s.products.times({s.d_h, w.wide_hidden}, tokens, w.hidden, panels_of(w.fc1_back, w.hidden), w.width, s.d_n, w.wide);
  add_row_sum(sums.norm_bias, {s.d_n, w.wide}, tokens, w.width);
  for (int64_t c = 0; c < w.wide; c += LANES) {
    Vec total{};
    for (int64_t r = 0; r < tokens; ++r) total += load(s.d_n + r * w.wide + c) * load(xhat + r * w.wide + c);
    store(sums.norm_weight + c, load(sums.norm_weight + c) + total);
  }
  for (int64_t r = 0; r < tokens; ++r) {
    const float* x = xhat + r * w.wide;
    float* d_n = s.d_n + r * w.wide;
    for (int64_t c = 0; c < w.wide; c += LANES) store(d_n + c, load(d_n + c) * load(w.norm_weight + c));
    normalise_backward(d_n, x, w.width, s.rstd[r]);
    for (int64_t c = 0; c < w.wide; c += LANES) {
      // normalise_backward leaves undefined values beyond the width.
      Vec d_t = load(d_n + c);
      if (c + LANES == w.wide) d_t = w.last ? d_t : Vec{};
      d_t += load(grad.at(r) + c);
      store(d_v + r * w.wide + c, d_t);
      store(d_n + c, lanes ? w.dropout.proj(d_t, lanes + r * w.width + c) : d_t);
    }
  }
  s.products.add_over({s.d_n, w.wide}, w.width, {y, w.wide}, w.width, tokens, sums.proj_weight, w.wide);
  add_row_sum(sums.proj_bias, {s.d_n, w.wide}, tokens, w.width);
  s.products.times({s.d_n, w.wide}, tokens, w.width, panels_of(w.proj_back, w.width), w.width, d_y, w.wide);
}

// ---- the operator

// Stores a tile of whole registers to rows of `width` floats: directly where they are whole registers themselves.
template <typename Compute>
void into_rows(float* to, int64_t to_row, int64_t width, int64_t count, float* spare, const Compute& compute) {
  if (width % LANES == 0) return compute(to, to_row);
  compute(spare, padded(width));
  copy_rows(to, to_row, spare, padded(width), width, count);
}

inline void token_mlp(const Workers& workers, const TokenMlp& arguments, TokensOut out) {
  const Tokens &y = arguments.y, &v = arguments.v;
  const int64_t length = arguments.length;
  const MlpWeights w(arguments.mlp, false);
  for_images(workers, arguments.batch, length, [&](const Span& span) {
    MlpScratch scratch(w);
    const RowReader y_rows(w.width), v_rows(w.width);
    const Floats spare(TILE * w.wide);
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      const Rows y_tile = y_rows.copy(y.at(span.image, first), y.row, count);
      const Rows v_tile = v_rows.read(v.at(span.image, first), v.row, count);
      const MlpTile tile = {v_tile, (span.image * length + first) * w.width, count};
      into_rows(out.at(span.image, first), out.row, w.width, count, spare, [&](float* to, int64_t row) {
        mlp_project(w, y_tile.data, count, scratch);
        mlp_forward(w, tile, scratch, to, row);
      });
    });
  });
}

inline void mlp_gradients(const Workers& workers, const MlpWeights& w, const std::vector<MlpSums>& sums,
                          const MlpGradient& out) {
  write_sums(workers, sums, &MlpSums::proj_weight, out.proj_weight, w.width, w.width);
  write_sums(workers, sums, &MlpSums::proj_bias, out.proj_bias, 1, w.width);
  write_sums(workers, sums, &MlpSums::norm_weight, out.norm_weight, 1, w.width);
  write_sums(workers, sums, &MlpSums::norm_bias, out.norm_bias, 1, w.width);
  write_sums(workers, sums, &MlpSums::fc1_weight, out.fc1_weight, w.hidden, w.width);
  write_sums(workers, sums, &MlpSums::fc1_bias, out.fc1_bias, 1, w.hidden);
  write_sums(workers, sums, &MlpSums::fc2_weight, out.fc2_weight, w.width, w.hidden);
  write_sums(workers, sums, &MlpSums::fc2_bias, out.fc2_bias, 1, w.width);
}

inline void token_mlp_backward(const Workers& workers, const TokenMlp& arguments, Tokens grad,
                               const TokenMlpGradient& out) {
  const Tokens &y = arguments.y, &v = arguments.v;
  const int64_t length = arguments.length;
  const MlpWeights w(arguments.mlp, true);
  auto sums = several<MlpSums>(workers.count, w);
  for_images(workers, arguments.batch, length, [&](const Span& span) {
    MlpBackwardScratch scratch(w);
    const RowReader y_rows(w.width), v_rows(w.width), grad_rows(w.width);
    const Floats d_y(TILE * w.wide), d_v(TILE * w.wide);
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      const Rows y_tile = y_rows.copy(y.at(span.image, first), y.row, count);
      const Rows v_tile = v_rows.read(v.at(span.image, first), v.row, count);
      const Rows grad_tile = grad_rows.read(grad.at(span.image, first), grad.row, count);
      const MlpTile tile = {v_tile, (span.image * length + first) * w.width, count};
      mlp_backward(w, tile, y_tile.data, grad_tile, scratch, sums[span.slot], d_y, d_v);
      copy_rows(out.y.at(span.image, first), out.y.row, d_y, w.wide, w.width, count);
      copy_rows(out.v.at(span.image, first), out.v.row, d_v, w.wide, w.width, count);
    });
  });
  mlp_gradients(workers, w, sums, out.mlp);
}
