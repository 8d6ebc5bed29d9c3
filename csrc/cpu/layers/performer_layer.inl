// A whole Performer layer: soft split, LayerNorm, kqv, attention, tail.
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
      add_keys(f, padded_rows(k, row, width, count, k_rows), padded_rows(k + 2 * width, row, width, count, v_rows),
               count, scores, part);
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
      into_rows(out.at(span.image, first), out.row, width, count, spare,
                [&](float* to, int64_t to_row) { tail_forward(w, v, element, count, tail_scratch, to, to_row); });
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
