// Performer attention in log space, one tile of tokens at a time. Part of kernels.inl.
//
// With a_i(x) = w_i x - |x|^2 / 2 (formulas: docs/math.md, section 2):
//   keys     lz_i = logsumexp_t a_i(k_t)              S_i = sum_t softmax_t(a_i(k_t)) v_t
//   queries  p~_i = exp(w_i q_t + lz_i - top)         y_t = p~ S / (sum_i p~_i + m eps exp(|q_t|^2 / 2 - top))
// The last term of the denominator is eps in log space; the gate g is sum p~ over the denominator.
// NaN and infinity in a token stay in its sequence. A key whose |k|^2 overflows has
// a_i = -infinity and features of 0. A feature for which all keys overflow has lz_i = NOTHING and S_i = 0, so it adds
// nothing.

constexpr float NOTHING = -1e30f;  // shuts the gate as -infinity would, but a finite score added to it is finite

struct Features {
  const Performer& performer;
  int64_t width, wide, count, wide_count;
  Cells rows;      // w packed: the right operand of gradients
  Cells columns;   // w transposed, packed: the right operand of scores
  float log_gate;  // ln(m eps)

  explicit Features(const Performer& performer_)
      : performer(performer_), width(performer.width), wide(padded(width)), count(performer.features),
        wide_count(padded(count)), rows(packed_size(count, width)), columns(packed_size(width, count)),
        log_gate(static_cast<float>(std::log(performer.features * performer.eps))) {
    pack_right(rows, count, width, performer.w, width, 1);
    pack_right(columns, width, count, performer.w, 1, width);
  }

  // w x of every token and feature, (tokens, wide_count).
  void scores(Rows x, int64_t tokens, const Products& products, float* out) const {
    products.times(x, tokens, width, panels_of(columns, width), count, out, wide_count);
  }

  // Products of tiles of tokens and of their scores.
  Products products() const { return {TILE, std::max(width, count)}; }
};

inline float half_square_norm(const float* x, int64_t wide) {
  Vec total{};
  for (int64_t i = 0; i < wide; i += LANES) total += load(x + i) * load(x + i);
  return sum(total) * 0.5f;
}

// Sums over the keys so far: per feature the largest score, the sum of exp(score - top) and of that times v.
struct KeySums {
  int64_t wide, wide_count;
  Floats top, total, state;  // (wide_count), (wide_count), (count, wide)

  explicit KeySums(const Features& f)
      : wide(f.wide), wide_count(f.wide_count), top(f.wide_count), total(f.wide_count), state(f.count * f.wide) {}

  void reset(const Features& f) {
    for (int64_t i = 0; i < wide_count; ++i) top[i] = NOTHING;
    clear(total, wide_count);
    clear(state, f.count * wide);
  }
};

// Adds a tile of keys and values. `scores` is scratch of (tokens, wide_count).
inline void add_keys(const Features& f, Rows k, Rows v, int64_t tokens, const Products& products, float* scores,
                     KeySums& sums) {
  f.scores(k, tokens, products, scores);
  for (int64_t t = 0; t < tokens; ++t) {
    const float shift = half_square_norm(k.at(t), f.wide);
    float* row = scores + t * f.wide_count;
    for (int64_t i = 0; i < f.wide_count; i += LANES) store(row + i, load(row + i) - shift);
  }
  for (int64_t i = 0; i < f.wide_count; i += LANES) {
    const Vec before = load(sums.top + i);
    Vec top = before;
    for (int64_t t = 0; t < tokens; ++t) top = larger(load(scores + t * f.wide_count + i), top);
    Vec total{};
    for (int64_t t = 0; t < tokens; ++t) {
      float* at = scores + t * f.wide_count + i;
      const Vec weight = exponential(load(at) - top);
      store(at, weight);
      total += weight;
    }
    const Vec fade = exponential(before - top);
    store(sums.total + i, load(sums.total + i) * fade + total);
    store(sums.top + i, top);
    for (int64_t lane = 0; lane < LANES && i + lane < f.count; ++lane) {
      if (fade[lane] == 1) continue;
      float* row = sums.state + (i + lane) * f.wide;
      for (int64_t c = 0; c < f.wide; c += LANES) store(row + c, load(row + c) * fade[lane]);
    }
  }
  products.add_over({scores, f.wide_count}, f.count, v, f.width, tokens, sums.state, f.wide);
}

// The keys of a whole sequence as the queries see them.
struct KeyView {
  Floats lz;         // (wide_count), -infinity in the padding
  Floats state;      // S (count, wide)
  Cells packed;      // S packed: the right operand of the result
  Cells transposed;  // S transposed, packed: the right operand of gradients

  // From the sums of all parts of a sequence, merged in their order.
  KeyView(const Features& f, const std::vector<KeySums>& parts, const Span& span) : KeyView(f) {
    const int64_t first = span.first_slot, number = span.slots;
    for (int64_t i = 0; i < f.count; ++i) {
      float top = parts[first].top[i];
      for (int64_t p = 1; p < number; ++p) {
        const float other = parts[first + p].top[i];
        top = top < other || other != other ? other : top;
      }
      float total = 0;
      float* row = state + i * f.wide;
      clear(row, f.wide);
      for (int64_t p = 0; p < number; ++p) {
        const KeySums& part = parts[first + p];
        if (part.total[i] == 0) continue;  // a part without tokens, or none that counts
        const float weight = std::exp(part.top[i] - top);
        total += weight * part.total[i];
        const float* from = part.state + i * f.wide;
        for (int64_t c = 0; c < f.wide; c += LANES) store(row + c, load(row + c) + load(from + c) * weight);
      }
      if (total == 0) total = 1;  // no key counts: top is NOTHING and the row 0
      lz[i] = top + std::log(total);
      for (int64_t c = 0; c < f.wide; c += LANES) store(row + c, load(row + c) / total);
    }
    pack_right(packed, f.count, f.width, state, f.wide, 1);
  }

  // As a forward pass has saved them.
  KeyView(const Features& f, const KeyState& saved, int64_t image) : KeyView(f) {
    std::memcpy(lz, saved.lz + image * f.count, f.count * sizeof(float));
    for (int64_t i = 0; i < f.count; ++i)
      pad_vector(state + i * f.wide, saved.state + (image * f.count + i) * f.width, f.width);
    pack_right(packed, f.count, f.width, state, f.wide, 1);
    pack_right(transposed, f.width, f.count, state, 1, f.wide);
  }

  void write(const Features& f, const KeyState& saved, int64_t image) const {
    std::memcpy(saved.lz + image * f.count, lz, f.count * sizeof(float));
    copy_rows(saved.state + image * f.count * f.width, f.width, state, f.wide, f.width, f.count);
  }

 private:
  explicit KeyView(const Features& f)
      : lz(f.wide_count), state(f.count * f.wide), packed(packed_size(f.count, f.width)),
        transposed(packed_size(f.width, f.count)) {
    for (int64_t i = 0; i < f.wide_count; ++i) lz[i] = -INFINITY;
  }
};

// Scratch for a tile of queries.
struct QueryScratch {
  Products products;
  Floats p, along, weight_sum, gate, y;  // (TILE, wide_count), the same, (TILE), (TILE), (TILE, wide)

  explicit QueryScratch(const Features& f)
      : products(f.products()), p(TILE * f.wide_count), along(TILE * f.wide_count), weight_sum(TILE), gate(TILE),
        y(TILE * f.wide) {}
};

// The softmax over features of a tile's queries to s.p, and their gate to s.gate.
inline void weigh_features(const Features& f, const KeyView& keys, Rows q, int64_t tokens, QueryScratch& s) {
  f.scores(q, tokens, s.products, s.p);
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = s.p + t * f.wide_count;
    Vec most = load(row) + load(keys.lz);
    for (int64_t i = 0; i < f.wide_count; i += LANES) {
      const Vec score = load(row + i) + load(keys.lz + i);
      store(row + i, score);
      most = larger(score, most);
    }
    const float top = largest(most);
    Vec total{};
    for (int64_t i = 0; i < f.wide_count; i += LANES) {
      const Vec weight = exponential(load(row + i) - top);
      store(row + i, weight);
      total += weight;
    }
    const float weight_sum = sum(total);
    const float scale = 1 / weight_sum;
    for (int64_t i = 0; i < f.wide_count; i += LANES) store(row + i, load(row + i) * scale);
    s.weight_sum[t] = weight_sum;
    s.gate[t] = half_square_norm(q.at(t), f.wide) - top + f.log_gate;
  }
  // The tail lanes of the last register are undefined and never read.
  for (int64_t t = 0; t < tokens; t += LANES) {
    const Vec weights = load(s.weight_sum + t);
    const Vec closed = f.performer.eps > 0 ? exponential(load(s.gate + t)) : Vec{};
    store(s.gate + t, weights / (weights + closed));
  }
}

// What a tile of queries reads from a state (count, width), packed, after weigh_features(): gate p state, plus the bias
// (wide) if there is one, into out (tokens, wide).
inline void read_state(const Features& f, const Cell* state, int64_t tokens, const QueryScratch& s, float* out,
                       const float* bias = nullptr) {
  s.products.times({s.p, f.wide_count}, tokens, f.count, panels_of(state, f.count), f.width, out, f.wide);
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = out + t * f.wide;
    for (int64_t c = 0; c < f.wide; c += LANES) {
      const Vec y = load(row + c) * s.gate[t];
      store(row + c, bias ? y + load(bias + c) : y);
    }
  }
}

// The attention's output of a tile to s.y; leaves the softmax over features in s.p and the gate in s.gate.
inline void attend(const Features& f, const KeyView& keys, Rows q, int64_t tokens, QueryScratch& s) {
  weigh_features(f, keys, q, tokens, s);
  read_state(f, keys.packed, tokens, s, s.y);
}

// A part of the queries' sums for the keys' backward, and w's gradient.
struct QuerySums {
  bool need_w;
  Floats d_state, d_lz, d_w;  // (count, wide), (wide_count), (count, wide)

  QuerySums(const Features& f, bool need_w_)
      : need_w(need_w_), d_state(f.count * f.wide), d_lz(f.wide_count), d_w(zeros(f.count * f.wide)) {}

  void reset(const Features& f) {
    clear(d_state, f.count * f.wide);
    clear(d_lz, f.wide_count);
  }
};

// Backward of attend() for a tile: d_y (tokens, wide) is replaced by d_y times the gate; d_q (tokens, wide).
inline void attend_backward(const Features& f, const KeyView& keys, Rows q, int64_t tokens, float* d_y, QueryScratch& s,
                            QuerySums& sums, float* d_q) {
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = d_y + t * f.wide;
    for (int64_t c = 0; c < f.wide; c += LANES) store(row + c, load(row + c) * s.gate[t]);
  }
  s.products.times({d_y, f.wide}, tokens, f.width, panels_of(keys.transposed, f.width), f.count, s.along, f.wide_count);
  s.products.add_over({s.p, f.wide_count}, f.count, {d_y, f.wide}, f.width, tokens, sums.d_state, f.wide);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* p = s.p + t * f.wide_count;
    float* row = s.along + t * f.wide_count;
    Vec product{};
    for (int64_t i = 0; i < f.wide_count; i += LANES) product += load(p + i) * load(row + i);
    const float delta = sum(product);
    const float d_lse = delta * (1 - s.gate[t]);
    for (int64_t i = 0; i < f.wide_count; i += LANES) store(row + i, load(p + i) * (load(row + i) - delta + d_lse));
    s.gate[t] = d_lse;  // replaces the gate, which is no longer needed
  }
  add_row_sum(sums.d_lz, {s.along, f.wide_count}, tokens, f.count);
  if (sums.need_w) s.products.add_over({s.along, f.wide_count}, f.count, q, f.width, tokens, sums.d_w, f.wide);
  s.products.times({s.along, f.wide_count}, tokens, f.count, panels_of(f.rows, f.count), f.width, d_q, f.wide);
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = d_q + t * f.wide;
    for (int64_t c = 0; c < f.wide; c += LANES) store(row + c, load(row + c) - load(q.at(t) + c) * s.gate[t]);
  }
}

// What the keys' backward needs of all queries: dS, as it is and packed transposed, and dS_i . S_i - dlz_i per feature.
struct KeyGradient {
  const KeyView& keys;
  Floats rows, shift;
  Cells packed, transposed;

  // From the sums of all parts of the queries, merged in their order.
  KeyGradient(const Features& f, const KeyView& keys_, const std::vector<QuerySums>& parts, const Span& span)
      : keys(keys_), rows(zeros(f.count * f.wide)), shift(zeros(f.wide_count)), packed(packed_size(f.count, f.width)),
        transposed(packed_size(f.width, f.count)) {
    const int64_t first = span.first_slot, number = span.slots;
    for (int64_t p = 0; p < number; ++p) accumulate(rows, parts[first + p].d_state, f.count * f.wide);
    pack_right(packed, f.count, f.width, rows, f.wide, 1);
    pack_right(transposed, f.width, f.count, rows, 1, f.wide);
    for (int64_t i = 0; i < f.count; ++i) {
      Vec product{};
      for (int64_t c = 0; c < f.wide; c += LANES)
        product += load(rows + i * f.wide + c) * load(keys.state + i * f.wide + c);
      float d_lz = 0;
      for (int64_t p = 0; p < number; ++p) d_lz += parts[first + p].d_lz[i];
      shift[i] = sum(product) - d_lz;
    }
  }
};

// Backward of a tile of keys: d_k (tokens, wide), and the attention's share added to d_v (tokens, wide).
inline void keys_backward(const Features& f, const KeyGradient& gradient, Rows k, Rows v, int64_t tokens,
                          QueryScratch& s, QuerySums& sums, float* d_k, float* d_v) {
  f.scores(k, tokens, s.products, s.p);
  s.products.times(v, tokens, f.width, panels_of(gradient.transposed, f.width), f.count, s.along, f.wide_count);
  for (int64_t t = 0; t < tokens; ++t) {
    float* p = s.p + t * f.wide_count;
    float* row = s.along + t * f.wide_count;
    const float norm = half_square_norm(k.at(t), f.wide);
    Vec total{};
    for (int64_t i = 0; i < f.wide_count; i += LANES) {
      // In the padding lz is -infinity; +infinity in its place makes the weight 0.
      const Vec lz = load(gradient.keys.lz + i);
      const Vec weight = exponential(load(p + i) - norm - (lz == -INFINITY ? splat(INFINITY) : lz));
      const Vec d_a = weight * (load(row + i) - load(gradient.shift + i));
      store(p + i, weight);
      store(row + i, d_a);
      total += d_a;
    }
    s.gate[t] = sum(total);
  }
  s.products.times({s.p, f.wide_count}, tokens, f.count, panels_of(gradient.packed, f.count), f.width, d_v, f.wide,
                   nullptr, true);
  if (sums.need_w) s.products.add_over({s.along, f.wide_count}, f.count, k, f.width, tokens, sums.d_w, f.wide);
  s.products.times({s.along, f.wide_count}, tokens, f.count, panels_of(f.rows, f.count), f.width, d_k, f.wide);
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = d_k + t * f.wide;
    for (int64_t c = 0; c < f.wide; c += LANES) store(row + c, load(row + c) - load(k.at(t) + c) * s.gate[t]);
  }
}

// ---- the operator

inline void performer_attention(const Workers& workers, const Attention& arguments, TokensOut out) {
  const Features f(arguments.performer);
  const Tokens &q = arguments.q, &k = arguments.k, &v = arguments.v;
  const int64_t queries = arguments.queries, keys = arguments.keys;
  auto sums = several<KeySums>(workers.count, f);
  const auto on_keys = [&](const Span& span) {
    const Floats scores(TILE * f.wide_count);
    const Products products = f.products();
    const RowReader k_rows(f.width), v_rows(f.width);
    KeySums& part = sums[span.slot];
    part.reset(f);
    for_tiles(span.share_begin(keys), span.share_end(keys), [&](int64_t first, int64_t count) {
      const Rows k_tile = k_rows.read(k.at(span.image, first), k.row, count);
      const Rows v_tile = v_rows.read(v.at(span.image, first), v.row, count);
      add_keys(f, k_tile, v_tile, count, products, scores, part);
    });
  };
  const auto on_queries = [&](const Span& span) {
    const KeyView view(f, sums, span);
    if (span.slot == span.first_slot) view.write(f, arguments.state, span.image);
    QueryScratch scratch(f);
    const RowReader q_rows(f.width);
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      attend(f, view, q_rows.read(q.at(span.image, first), q.row, count), count, scratch);
      copy_rows(out.at(span.image, first), out.row, scratch.y, f.wide, f.width, count);
    });
  };
  for_images(workers, arguments.batch, queries, on_keys, on_queries);
}

inline void performer_attention_backward(const Workers& workers, const Attention& arguments, Tokens grad,
                                         const AttentionGradient& out) {
  const Features f(arguments.performer);
  const Tokens &q = arguments.q, &k = arguments.k, &v = arguments.v;
  const int64_t queries = arguments.queries, keys = arguments.keys;
  auto sums = several<QuerySums>(workers.count, f, out.w != nullptr);
  const auto on_queries = [&](const Span& span) {
    const KeyView view(f, arguments.state, span.image);
    QueryScratch scratch(f);
    QuerySums& part = sums[span.slot];
    part.reset(f);
    const RowReader q_rows(f.width);
    const Floats d_y = zeros(TILE * f.wide), d_q(TILE * f.wide);
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      const Rows q_tile = q_rows.read(q.at(span.image, first), q.row, count);
      attend(f, view, q_tile, count, scratch);
      copy_rows(d_y, f.wide, grad.at(span.image, first), grad.row, f.width, count);
      attend_backward(f, view, q_tile, count, d_y, scratch, part, d_q);
      copy_rows(out.q.at(span.image, first), out.q.row, d_q, f.wide, f.width, count);
    });
  };
  const auto on_keys = [&](const Span& span) {
    const KeyView view(f, arguments.state, span.image);
    const KeyGradient gradient(f, view, sums, span);
    QueryScratch scratch(f);
    const RowReader k_rows(f.width), v_rows(f.width);
    const Floats d_k(TILE * f.wide), d_v(TILE * f.wide);
    for_tiles(span.share_begin(keys), span.share_end(keys), [&](int64_t first, int64_t count) {
      const Rows k_tile = k_rows.read(k.at(span.image, first), k.row, count);
      const Rows v_tile = v_rows.read(v.at(span.image, first), v.row, count);
      clear(d_v, TILE * f.wide);
      keys_backward(f, gradient, k_tile, v_tile, count, scratch, sums[span.slot], d_k, d_v);
      copy_rows(out.k.at(span.image, first), out.k.row, d_k, f.wide, f.width, count);
      copy_rows(out.v.at(span.image, first), out.v.row, d_v, f.wide, f.width, count);
    });
  };
  for_images(workers, arguments.batch, queries, on_queries, on_keys);
  write_sums(workers, sums, &QuerySums::d_w, out.w, f.count, f.width);
}
