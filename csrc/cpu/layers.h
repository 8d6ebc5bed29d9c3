// The operators: tiles put together over tokens, images and workers. Included once per instruction set (see isa.h).

template <typename Part, typename... Arguments>
std::vector<std::unique_ptr<Part>> several(int64_t count, const Arguments&... arguments) {
  std::vector<std::unique_ptr<Part>> parts(count);
  for (auto& part : parts) part = std::make_unique<Part>(arguments...);
  return parts;
}

template <typename Part, typename... Arguments>
std::vector<std::unique_ptr<Part>> per_worker(const Workers& workers, const Arguments&... arguments) {
  return several<Part>(workers.count, arguments...);
}

// Adds the other workers' sums to the first one's, in their order. `field` names a buffer of a part.
template <typename Part>
void merge(const Workers& workers, std::vector<std::unique_ptr<Part>>& parts, Buffer Part::*field, int64_t floats) {
  const int64_t registers = floats / LANES;
  run(workers, workers.count, [&](int64_t slot) {
    const int64_t begin = registers * slot / workers.count * LANES;
    const int64_t end = registers * (slot + 1) / workers.count * LANES;
    for (size_t other = 1; other < parts.size(); ++other)
      accumulate((*parts[0]).*field + begin, (*parts[other]).*field + begin, end - begin);
  });
}

inline void write_rows(float* to, const float* from, int64_t count, int64_t width) {
  if (to != nullptr) copy_rows(to, width, from, padded(width), width, count);
}

// ---- soft split, LayerNorm, Linear

inline void soft_split_linear(const Workers& workers, const Split& split, const NormLinear& linear, float* out) {
  const FoldedLinear folded(workers, split, linear);
  const int64_t length = split.tokens();
  for_images(workers, split.batch, length, [&](const Span& span) {
    const Buffer tile(TILE * folded.wide_inputs), spare(TILE * padded(linear.outputs));
    folded.tokens(span.image, span.begin, span.end, tile, spare, out + span.image * length * linear.outputs,
                  linear.outputs);
  });
}

// The parameters' gradients from all workers' sums. With xhat the normalised rows and P = sum of G xhat^T:
// dW = P diag(gamma) + (sum G) beta^T, dgamma_j = sum_o W_oj P_oj, dbeta = W^T sum G, db = sum G.
inline void linear_gradients(const Workers& workers, const FoldedLinear& folded,
                             std::vector<std::unique_ptr<LinearSums>>& parts, const NormLinearGradient& out) {
  const NormLinear& linear = folded.linear;
  const int64_t inputs = folded.inputs, outputs = folded.outputs, wide = folded.wide_inputs;
  merge(workers, parts, &LinearSums::total, padded(outputs));
  const float* total = parts[0]->total;
  if (out.bias) std::memcpy(out.bias, total, outputs * sizeof(float));
  if (out.norm_bias) {
    zero_floats(out.norm_bias, inputs);
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t i = 0; i < inputs; ++i) out.norm_bias[i] += total[o] * linear.weight[o * inputs + i];
  }
  if (!out.weight && !out.norm_weight) return;
  merge(workers, parts, &LinearSums::products, outputs * wide);
  const float* products = parts[0]->products;
  std::vector<int64_t> column(inputs);
  for (int64_t i = 0; i < inputs; ++i) column[i] = ordered_column(folded.split, i);
  if (out.norm_weight) {
    zero_floats(out.norm_weight, inputs);
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = 0; i < inputs; ++i)
        out.norm_weight[column[i]] += products[o * wide + i] * linear.weight[o * inputs + column[i]];
    }
  }
  if (!out.weight) return;
  run(workers, workers.count, [&](int64_t slot) {
    for (int64_t o = outputs * slot / workers.count; o < outputs * (slot + 1) / workers.count; ++o) {
      float* row = out.weight + o * inputs;
      for (int64_t i = 0; i < inputs; ++i) {
        float value = products[o * wide + i];
        if (linear.norm_weight) value *= linear.norm_weight[column[i]];
        if (linear.norm_bias) value += total[o] * linear.norm_bias[column[i]];
        row[column[i]] = value;
      }
    }
  });
}

inline void soft_split_linear_backward(const Workers& workers, const Split& split, const NormLinear& linear,
                                       const float* grad, Image<float*> d_image, NormLinearGradient out) {
  const FoldedLinear folded(workers, split, linear);
  const int64_t length = split.tokens();
  const bool weights = out.weight || out.norm_weight;
  auto sums = per_worker<LinearSums>(workers, folded);
  for_images(workers, split.batch, length, [&](const Span& span) {
    LinearScratch scratch(folded, d_image.data != nullptr);
    linear_backward(folded, span, grad + span.image * length * linear.outputs, linear.outputs, weights, d_image,
                    *sums[span.slot], scratch);
  });
  linear_gradients(workers, folded, sums, out);
}

// ---- Performer attention

inline void performer_attention(const Workers& workers, const Performer& performer, int64_t batch, int64_t queries,
                                int64_t keys, Tokens q, Tokens k, Tokens v, TokensOut out, KeyState saved) {
  const Features f(performer);
  auto sums = per_worker<KeySums>(workers, f);
  const auto on_keys = [&](const Span& span) {
    const Buffer scores(TILE * f.wide_count), k_rows(TILE * f.wide), v_rows(TILE * f.wide);
    KeySums& part = *sums[span.slot];
    part.reset(f);
    const int64_t part_number = span.slot - span.first_slot;
    const int64_t begin = keys * part_number / span.slots, end = keys * (part_number + 1) / span.slots;
    for_tiles(begin, end, [&](int64_t first, int64_t count) {
      const Rows k_tile = padded_rows(k.at(span.image, first), k.row, f.width, count, k_rows);
      const Rows v_tile = padded_rows(v.at(span.image, first), v.row, f.width, count, v_rows);
      add_keys(f, k_tile, v_tile, count, scores, part);
    });
  };
  const auto on_queries = [&](const Span& span) {
    KeyView view(f);
    view.merge(f, sums, span.first_slot, span.slots);
    if (span.slot == span.first_slot) view.write(f, saved, span.image);
    QueryScratch scratch(f);
    const Buffer q_rows(TILE * f.wide);
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      attend(f, view, padded_rows(q.at(span.image, first), q.row, f.width, count, q_rows), count, scratch);
      copy_rows(out.at(span.image, first), out.row, scratch.y, f.wide, f.width, count);
    });
  };
  for_images(workers, batch, queries, on_keys, on_queries);
}

inline void performer_attention_backward(const Workers& workers, const Performer& performer, int64_t batch,
                                         int64_t queries, int64_t keys, Tokens q, Tokens k, Tokens v, Tokens grad,
                                         KeyState saved, TokensOut d_q, TokensOut d_k, TokensOut d_v, float* d_w) {
  const Features f(performer);
  const bool need_w = d_w != nullptr;
  auto sums = per_worker<QuerySums>(workers, f);
  const auto on_queries = [&](const Span& span) {
    KeyView view(f);
    view.read(f, saved, span.image);
    QueryScratch scratch(f);
    QuerySums& part = *sums[span.slot];
    part.reset(f);
    const Buffer q_rows(TILE * f.wide), d_y(TILE * f.wide), d_q_rows(TILE * f.wide);
    clear(d_y, TILE * f.wide);
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      const Rows q_tile = padded_rows(q.at(span.image, first), q.row, f.width, count, q_rows);
      attend(f, view, q_tile, count, scratch);
      copy_rows(d_y, f.wide, grad.at(span.image, first), grad.row, f.width, count);
      attend_backward(f, view, q_tile, count, d_y, need_w, scratch, part, d_q_rows);
      copy_rows(d_q.at(span.image, first), d_q.row, d_q_rows, f.wide, f.width, count);
    });
  };
  const auto on_keys = [&](const Span& span) {
    KeyView view(f);
    view.read(f, saved, span.image);
    KeyGradient gradient(f);
    gradient.merge(f, view, sums, span.first_slot, span.slots);
    QueryScratch scratch(f);
    const Buffer k_rows(TILE * f.wide), v_rows(TILE * f.wide), d_k_rows(TILE * f.wide), d_v_rows(TILE * f.wide);
    const int64_t part_number = span.slot - span.first_slot;
    const int64_t begin = keys * part_number / span.slots, end = keys * (part_number + 1) / span.slots;
    for_tiles(begin, end, [&](int64_t first, int64_t count) {
      const Rows k_tile = padded_rows(k.at(span.image, first), k.row, f.width, count, k_rows);
      const Rows v_tile = padded_rows(v.at(span.image, first), v.row, f.width, count, v_rows);
      clear(d_v_rows, TILE * f.wide);
      keys_backward(f, view, gradient, k_tile, v_tile, count, need_w, scratch, *sums[span.slot], d_k_rows, d_v_rows);
      copy_rows(d_k.at(span.image, first), d_k.row, d_k_rows, f.wide, f.width, count);
      copy_rows(d_v.at(span.image, first), d_v.row, d_v_rows, f.wide, f.width, count);
    });
  };
  for_images(workers, batch, queries, on_queries, on_keys);
  if (!need_w) return;
  merge(workers, sums, &QuerySums::d_w, f.count * f.wide);
  write_rows(d_w, sums[0]->d_w, f.count, f.width);
}

// ---- the tail

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

inline void tail_gradients(const Workers& workers, const TailWeights& w,
                           std::vector<std::unique_ptr<TailSums>>& parts, const TailGradient& out) {
  const auto give = [&](float* to, Buffer TailSums::*field, int64_t rows, int64_t columns) {
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

// ---- a whole Performer layer: soft split, LayerNorm, kqv, attention, tail
//
// kqv of one image at a time lies in a worker's scratch; it never reaches the memory of tensors. Backward computes it
// again, overwrites it with its own gradient, and hands that to linear_backward.

inline void performer_layer(const Workers& workers, const Split& split, const NormLinear& linear,
                            const Performer& performer, const Tail& tail, TokensOut out, KeyState saved) {
  const FoldedLinear folded(workers, split, linear);
  const Features f(performer);
  const TailWeights w(tail, false);
  const int64_t length = split.tokens(), row = linear.outputs, width = f.width;
  auto sums = per_worker<KeySums>(workers, f);
  auto kqv = several<Buffer>(images_at_a_time(workers, split.batch), length * row);
  const auto on_keys = [&](const Span& span) {
    const Buffer tile(TILE * folded.wide_inputs), spare(TILE * padded(row));
    const Buffer scores(TILE * f.wide_count), k_rows(TILE * f.wide), v_rows(TILE * f.wide);
    KeySums& part = *sums[span.slot];
    part.reset(f);
    float* own = *kqv[span.first_slot];
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      folded.tokens(span.image, first, first + count, tile, spare, own, row);
      const float* k = own + first * row;
      add_keys(f, padded_rows(k, row, width, count, k_rows),
               padded_rows(k + 2 * width, row, width, count, v_rows), count, scores, part);
    });
  };
  const auto on_queries = [&](const Span& span) {
    KeyView view(f);
    view.merge(f, sums, span.first_slot, span.slots);
    if (span.slot == span.first_slot) view.write(f, saved, span.image);
    // The tail's projection of a sum over features is the sum of their projections: once an image, not once a token.
    const Buffer projected(f.count * f.wide);
    gemm(f.count, width, width, {view.state, f.wide, 1}, panels_of(w.proj, width), projected, f.wide);
    QueryScratch scratch(f);
    TailScratch tail_scratch(w);
    const Buffer q_rows(TILE * f.wide), v_rows(TILE * f.wide), spare(TILE * f.wide);
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      const float* k = *kqv[span.first_slot] + first * row;
      weigh_features(f, view, padded_rows(k + width, row, width, count, q_rows), count, scratch);
      read_state(f, projected, count, scratch, tail_scratch.t, w.proj_bias);
      const Rows v = padded_rows(k + 2 * width, row, width, count, v_rows);
      const int64_t element = (span.image * length + first) * width;
      into_rows(out.at(span.image, first), out.row, width, count, spare, [&](float* to, int64_t to_row) {
        tail_forward(w, v, element, count, tail_scratch, to, to_row);
      });
    });
  };
  for_images(workers, split.batch, length, on_keys, on_queries);
}

inline void performer_layer_backward(const Workers& workers, const Split& split, const NormLinear& linear,
                                     const Performer& performer, const Tail& tail, Tokens grad, KeyState saved,
                                     Image<float*> d_image, NormLinearGradient d_linear, float* d_w,
                                     TailGradient d_tail) {
  const FoldedLinear folded(workers, split, linear);
  const Features f(performer);
  const TailWeights w(tail, true);
  const int64_t length = split.tokens(), row = linear.outputs, width = f.width;
  const bool need_w = d_w != nullptr, weights = d_linear.weight || d_linear.norm_weight;
  auto linear_sums = per_worker<LinearSums>(workers, folded);
  auto sums = per_worker<QuerySums>(workers, f);
  auto tail_sums = per_worker<TailSums>(workers, w);
  auto kqv = several<Buffer>(images_at_a_time(workers, split.batch), length * row);
  auto skip = several<Buffer>(images_at_a_time(workers, split.batch), length * f.wide);  // the skip's share of d_v
  const auto on_queries = [&](const Span& span) {
    const Buffer tile(TILE * folded.wide_inputs), spare(TILE * padded(row));
    KeyView view(f);
    view.read(f, saved, span.image);
    QueryScratch scratch(f);
    TailScratch tail_scratch(w);
    TailBackwardScratch backward(w);
    QuerySums& part = *sums[span.slot];
    part.reset(f);
    const Buffer q_rows(TILE * f.wide), v_rows(TILE * f.wide), grad_rows(TILE * f.wide), d_y(TILE * f.wide);
    const Buffer d_q(TILE * f.wide);
    float* own = *kqv[span.first_slot];
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      folded.tokens(span.image, first, first + count, tile, spare, own, row);
      float* k = own + first * row;
      const Rows q = padded_rows(k + width, row, width, count, q_rows);
      const Rows v = padded_rows(k + 2 * width, row, width, count, v_rows);
      const Rows g = padded_rows(grad.at(span.image, first), grad.row, width, count, grad_rows);
      attend(f, view, q, count, scratch);
      tail_backward(w, scratch.y, v, g, (span.image * length + first) * width, count, tail_scratch, backward,
                    *tail_sums[span.slot], d_y, *skip[span.first_slot] + first * f.wide);
      attend_backward(f, view, q, count, d_y, need_w, scratch, part, d_q);
      copy_rows(k + width, row, d_q, f.wide, width, count);
    });
  };
  const auto on_keys = [&](const Span& span) {
    KeyView view(f);
    view.read(f, saved, span.image);
    KeyGradient gradient(f);
    gradient.merge(f, view, sums, span.first_slot, span.slots);
    QueryScratch scratch(f);
    const Buffer k_rows(TILE * f.wide), v_rows(TILE * f.wide), d_k(TILE * f.wide);
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      float* k = *kqv[span.first_slot] + first * row;
      float* d_v = *skip[span.first_slot] + first * f.wide;
      keys_backward(f, view, gradient, padded_rows(k, row, width, count, k_rows),
                    padded_rows(k + 2 * width, row, width, count, v_rows), count, need_w, scratch, *sums[span.slot],
                    d_k, d_v);
      copy_rows(k, row, d_k, f.wide, width, count);
      copy_rows(k + 2 * width, row, d_v, f.wide, width, count);
    });
  };
  const auto on_image = [&](const Span& span) {
    LinearScratch scratch(folded, d_image.data != nullptr);
    linear_backward(folded, span, *kqv[span.first_slot], row, weights, d_image, *linear_sums[span.slot], scratch);
  };
  for_images(workers, split.batch, length, on_queries, on_keys, on_image);
  linear_gradients(workers, folded, linear_sums, d_linear);
  tail_gradients(workers, w, tail_sums, d_tail);
  if (!need_w) return;
  merge(workers, sums, &QuerySums::d_w, f.count * f.wide);
  write_rows(d_w, sums[0]->d_w, f.count, f.width);
}

extern const Kernels table;
const Kernels table = {
    T2T_FAST_ISA_NAME,           soft_split_linear,  soft_split_linear_backward, performer_attention,
    performer_attention_backward, token_mlp,          token_mlp_backward,         performer_layer,
    performer_layer_backward,
};
