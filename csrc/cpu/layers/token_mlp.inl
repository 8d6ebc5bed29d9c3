// The tail of a token layer, one tile of tokens at a time (formulas: docs/math.md, section 3):
//   t = v + drop(y Wp^T + bp)     n = LN(t)     h = n W1^T + b1     out = t + drop(gelu(h) W2^T + b2)
// Backward recomputes everything from y and v. Part of kernels.inl.

// The parameters as the products want them. `backward` also packs the weights untransposed.
struct TailWeights {
  const Tail& tail;
  int64_t width, wide, hidden, wide_hidden;
  IntVec last;
  Dropout dropout;
  Buffer proj, fc1, fc2;                 // packed transposed: forward
  Buffer proj_back, fc1_back, fc2_back;  // packed: gradients of the inputs
  Buffer proj_bias, norm_weight, norm_bias, fc1_bias, fc2_bias;

  TailWeights(const Tail& tail_, bool backward)
      : tail(tail_), width(tail.width), wide(padded(width)), hidden(tail.hidden), wide_hidden(padded(hidden)),
        last(last_lanes(width)), dropout(tail.proj_drop, tail.mlp_drop, tail.seed), proj(packed_size(width, width)),
        fc1(packed_size(width, hidden)), fc2(packed_size(hidden, width)),
        proj_back(backward ? packed_size(width, width) : 0), fc1_back(backward ? packed_size(hidden, width) : 0),
        fc2_back(backward ? packed_size(width, hidden) : 0), proj_bias(wide), norm_weight(wide), norm_bias(wide),
        fc1_bias(wide_hidden), fc2_bias(wide) {
    pack_right(proj, width, width, tail.proj_weight, 1, width);
    pack_right(fc1, width, hidden, tail.fc1_weight, 1, width);
    pack_right(fc2, hidden, width, tail.fc2_weight, 1, hidden);
    if (backward) {
      pack_right(proj_back, width, width, tail.proj_weight, width, 1);
      pack_right(fc1_back, hidden, width, tail.fc1_weight, width, 1);
      pack_right(fc2_back, width, hidden, tail.fc2_weight, hidden, 1);
    }
    pad_vector(proj_bias, tail.proj_bias, width);
    pad_vector(norm_weight, tail.norm_weight, width, 1);
    pad_vector(norm_bias, tail.norm_bias, width);
    pad_vector(fc1_bias, tail.fc1_bias, hidden);
    pad_vector(fc2_bias, tail.fc2_bias, width);
  }
};

struct TailScratch {
  Buffer t, n, h, rstd, lanes;

  explicit TailScratch(const TailWeights& w)
      : t(TILE * w.wide), n(TILE * w.wide), h(TILE * w.wide_hidden), rstd(TILE),
        lanes((Dropout::room(TILE * w.width) + 1) / 2) {}

  uint16_t* lane_buffer() const { return reinterpret_cast<uint16_t*>(static_cast<float*>(lanes)); }
};

// y Wp^T + bp of a tile of y (tokens, wide) into s.t, which is what the rest starts from.
inline void tail_project(const TailWeights& w, const float* y, int64_t tokens, TailScratch& s) {
  gemm(tokens, w.width, w.width, {y, w.wide, 1}, panels_of(w.proj, w.width), s.t, w.wide, w.proj_bias);
}

// t (in the place of y Wp^T + bp), its normalised rows xhat (into s.n), 1 / standard deviation (into s.rstd). Returns
// the dropout's lanes.
inline const uint16_t* tail_skip(const TailWeights& w, Rows v, int64_t first_element, int64_t tokens, TailScratch& s) {
  const uint16_t* lanes = nullptr;
  if (w.dropout.active()) lanes = w.dropout.draw(first_element, tokens * w.width, s.lane_buffer());
  for (int64_t r = 0; r < tokens; ++r) {
    float* t = s.t + r * w.wide;
    float* n = s.n + r * w.wide;
    for (int64_t c = 0; c < w.wide; c += LANES) {
      Vec x = load(t + c);
      if (lanes) x = w.dropout.proj(x, lanes + r * w.width + c);
      x += load(v.at(r) + c);
      store(t + c, x);
      store(n + c, x);
    }
    s.rstd[r] = normalise(n, w.width, w.tail.norm_eps, w.last);
  }
  return lanes;
}

// n = xhat gamma + beta.
inline void tail_affine(const TailWeights& w, const float* xhat, float* n, int64_t tokens) {
  for (int64_t r = 0; r < tokens; ++r)
    for (int64_t c = 0; c < w.wide; c += LANES)
      store(n + r * w.wide + c, load(xhat + r * w.wide + c) * load(w.norm_weight + c) + load(w.norm_bias + c));
}

// From y Wp^T + bp in s.t. out: rows of whole registers, `out_row` apart; first_element counts the dropout's elements.
inline void tail_forward(const TailWeights& w, Rows v, int64_t first_element, int64_t tokens, TailScratch& s,
                         float* out, int64_t out_row) {
  const uint16_t* lanes = tail_skip(w, v, first_element, tokens, s);
  tail_affine(w, s.n, s.n, tokens);
  gemm(tokens, w.hidden, w.width, {s.n, w.wide, 1}, panels_of(w.fc1, w.width), s.h, w.wide_hidden, w.fc1_bias);
  for (int64_t i = 0; i < tokens * w.wide_hidden; i += LANES) {
    const Vec h = load(s.h + i);
    store(s.h + i, h * normal(h).phi);
  }
  gemm(tokens, w.width, w.hidden, {s.h, w.wide_hidden, 1}, panels_of(w.fc2, w.hidden), s.n, w.wide, w.fc2_bias);
  for (int64_t r = 0; r < tokens; ++r) {
    for (int64_t c = 0; c < w.wide; c += LANES) {
      Vec f = load(s.n + r * w.wide + c);
      if (lanes) f = w.dropout.mlp(f, lanes + r * w.width + c);
      store(out + r * out_row + c, f + load(s.t + r * w.wide + c));
    }
  }
}

// One worker's sums of the parameters' gradients, rows padded.
struct TailSums {
  Buffer proj_weight, fc1_weight, fc2_weight, proj_bias, norm_weight, norm_bias, fc1_bias, fc2_bias;

  explicit TailSums(const TailWeights& w)
      : proj_weight(w.width * w.wide), fc1_weight(w.hidden * w.wide), fc2_weight(w.width * w.wide_hidden),
        proj_bias(w.wide), norm_weight(w.wide), norm_bias(w.wide), fc1_bias(w.wide_hidden), fc2_bias(w.wide) {
    clear(proj_weight, w.width * w.wide);
    clear(fc1_weight, w.hidden * w.wide);
    clear(fc2_weight, w.width * w.wide_hidden);
    for (float* each : {(float*)proj_bias, (float*)norm_weight, (float*)norm_bias, (float*)fc2_bias})
      clear(each, w.wide);
    clear(fc1_bias, w.wide_hidden);
  }
};

struct TailBackwardScratch {
  Buffer n, d_h, d_n, d_f;

  explicit TailBackwardScratch(const TailWeights& w)
      : n(TILE * w.wide), d_h(TILE * w.wide_hidden), d_n(TILE * w.wide), d_f(TILE * w.wide) {}
};

// Backward of tail_forward() for a tile: d_y (tokens, wide) and the skip's share of d_v (tokens, wide).
inline void tail_backward(const TailWeights& w, const float* y, Rows v, Rows grad, int64_t first_element,
                          int64_t tokens, TailScratch& s, TailBackwardScratch& b, TailSums& sums, float* d_y,
                          float* d_v) {
  tail_project(w, y, tokens, s);
  const uint16_t* lanes = tail_skip(w, v, first_element, tokens, s);
  const float* xhat = s.n;
  tail_affine(w, xhat, b.n, tokens);
  gemm(tokens, w.hidden, w.width, {b.n, w.wide, 1}, panels_of(w.fc1, w.width), s.h, w.wide_hidden, w.fc1_bias);
  Rows d_f = grad;
  if (lanes) {
    for (int64_t r = 0; r < tokens; ++r)
      for (int64_t c = 0; c < w.wide; c += LANES)
        store(b.d_f + r * w.wide + c, w.dropout.mlp(load(grad.at(r) + c), lanes + r * w.width + c));
    d_f = {b.d_f, w.wide};
  }
  gemm(tokens, w.hidden, w.width, d_f.left(), panels_of(w.fc2_back, w.width), b.d_h, w.wide_hidden);
  for (int64_t i = 0; i < tokens * w.wide_hidden; i += LANES) {
    const Vec h = load(s.h + i);
    const Normal at = normal(h);
    store(b.d_h + i, load(b.d_h + i) * (at.phi + h * at.bell * 0.3989422804014327f));
    store(s.h + i, h * at.phi);
  }
  gemm(w.width, w.hidden, tokens, {d_f.data, 1, d_f.row}, rows_of(s.h, w.wide_hidden), sums.fc2_weight, w.wide_hidden,
       nullptr, true);
  add_row_sum(sums.fc2_bias, d_f, tokens, w.width);
  gemm(w.hidden, w.width, tokens, {b.d_h, 1, w.wide_hidden}, rows_of(b.n, w.wide), sums.fc1_weight, w.wide, nullptr,
       true);
  add_row_sum(sums.fc1_bias, {b.d_h, w.wide_hidden}, tokens, w.hidden);
  gemm(tokens, w.width, w.hidden, {b.d_h, w.wide_hidden, 1}, panels_of(w.fc1_back, w.hidden), b.d_n, w.wide);
  add_row_sum(sums.norm_bias, {b.d_n, w.wide}, tokens, w.width);
  for (int64_t c = 0; c < w.wide; c += LANES) {
    Vec total{};
    for (int64_t r = 0; r < tokens; ++r) total += load(b.d_n + r * w.wide + c) * load(xhat + r * w.wide + c);
    store(sums.norm_weight + c, load(sums.norm_weight + c) + total);
  }
  for (int64_t r = 0; r < tokens; ++r) {
    const float* x = xhat + r * w.wide;
    float* d_n = b.d_n + r * w.wide;
    for (int64_t c = 0; c < w.wide; c += LANES) store(d_n + c, load(d_n + c) * load(w.norm_weight + c));
    normalise_backward(d_n, x, w.width, s.rstd[r]);
    for (int64_t c = 0; c < w.wide; c += LANES) {
      // beyond the width normalise_backward leaves what does not count
      Vec d_t = load(d_n + c);
      if (c + LANES == w.wide) d_t = w.last ? d_t : Vec{};
      d_t += load(grad.at(r) + c);
      store(d_v + r * w.wide + c, d_t);
      store(d_n + c, lanes ? w.dropout.proj(d_t, lanes + r * w.width + c) : d_t);
    }
  }
  gemm(w.width, w.width, tokens, {b.d_n, 1, w.wide}, rows_of(y, w.wide), sums.proj_weight, w.wide, nullptr, true);
  add_row_sum(sums.proj_bias, {b.d_n, w.wide}, tokens, w.width);
  gemm(tokens, w.width, w.width, {b.d_n, w.wide, 1}, panels_of(w.proj_back, w.width), d_y, w.wide);
}

// ---- the operator

// Stores a tile of whole registers to rows of `width` floats: directly where they are whole registers themselves.
template <typename Compute>
void into_rows(float* to, int64_t to_row, int64_t width, int64_t count, float* spare, const Compute& compute) {
  if (width % LANES == 0) return compute(to, to_row);
  compute(spare, padded(width));
  copy_rows(to, to_row, spare, padded(width), width, count);
}

inline void token_mlp(const Workers& workers, const Tail& tail, int64_t batch, int64_t length, Tokens y, Tokens v,
                      TokensOut out) {
  const TailWeights w(tail, false);
  for_images(workers, batch, length, [&](const Span& span) {
    TailScratch scratch(w);
    const Buffer y_rows(TILE * w.wide), v_rows(TILE * w.wide), spare(TILE * w.wide);
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      copy_rows_padded(y_rows, y.at(span.image, first), y.row, w.width, count);
      const Rows v_tile = padded_rows(v.at(span.image, first), v.row, w.width, count, v_rows);
      const int64_t element = (span.image * length + first) * w.width;
      into_rows(out.at(span.image, first), out.row, w.width, count, spare, [&](float* to, int64_t row) {
        tail_project(w, y_rows, count, scratch);
        tail_forward(w, v_tile, element, count, scratch, to, row);
      });
    });
  });
}

inline void tail_gradients(const Workers& workers, const TailWeights& w, std::vector<std::unique_ptr<TailSums>>& parts,
                           const TailGradient& out) {
  const auto give = [&](float* to, Buffer TailSums::* field, int64_t rows, int64_t columns) {
    if (to == nullptr) return;
    merge(workers, parts, field, rows * padded(columns));
    write_rows(to, (*parts[0]).*field, rows, columns);
  };
  give(out.proj_weight, &TailSums::proj_weight, w.width, w.width);
  give(out.proj_bias, &TailSums::proj_bias, 1, w.width);
  give(out.norm_weight, &TailSums::norm_weight, 1, w.width);
  give(out.norm_bias, &TailSums::norm_bias, 1, w.width);
  give(out.fc1_weight, &TailSums::fc1_weight, w.hidden, w.width);
  give(out.fc1_bias, &TailSums::fc1_bias, 1, w.hidden);
  give(out.fc2_weight, &TailSums::fc2_weight, w.width, w.hidden);
  give(out.fc2_bias, &TailSums::fc2_bias, 1, w.width);
}

inline void token_mlp_backward(const Workers& workers, const Tail& tail, int64_t batch, int64_t length, Tokens y,
                               Tokens v, Tokens grad, TokensOut d_y, TokensOut d_v, TailGradient out) {
  const TailWeights w(tail, true);
  auto sums = per_worker<TailSums>(workers, w);
  for_images(workers, batch, length, [&](const Span& span) {
    TailScratch scratch(w);
    TailBackwardScratch backward(w);
    const Buffer y_rows(TILE * w.wide), v_rows(TILE * w.wide), grad_rows(TILE * w.wide);
    const Buffer d_y_rows(TILE * w.wide), d_v_rows(TILE * w.wide);
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      copy_rows_padded(y_rows, y.at(span.image, first), y.row, w.width, count);
      const Rows v_tile = padded_rows(v.at(span.image, first), v.row, w.width, count, v_rows);
      const Rows g_tile = padded_rows(grad.at(span.image, first), grad.row, w.width, count, grad_rows);
      tail_backward(w, y_rows, v_tile, g_tile, (span.image * length + first) * w.width, count, scratch, backward,
                    *sums[span.slot], d_y_rows, d_v_rows);
      copy_rows(d_y.at(span.image, first), d_y.row, d_y_rows, w.wide, w.width, count);
      copy_rows(d_v.at(span.image, first), d_v.row, d_v_rows, w.wide, w.width, count);
    });
  });
  tail_gradients(workers, w, sums, out);
}
