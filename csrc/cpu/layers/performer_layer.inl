// A whole Performer layer: soft split, LayerNorm, kqv, attention, mlp. Part of kernels.inl.
//
// kqv of one image at a time lies in a worker's scratch; it never reaches the memory of tensors. Backward computes it
// again, overwrites it with its own gradient, and hands that to linear_backward.

inline void performer_layer(const Workers& workers, const PerformerLayer& arguments, TokensOut out) {
  const FoldedLinear folded(workers, arguments.kqv, false);
  const Features f(arguments.performer);
  const MlpWeights w(arguments.mlp, false);
  const int64_t batch = folded.split.batch, length = folded.split.tokens(), row = folded.outputs, width = f.width;
  auto sums = several<KeySums>(workers.count, f);
  const auto kqv = several<Floats>(images_at_a_time(workers, batch), length * row);
  const auto on_keys = [&](const Span& span) {
    const PatchScratch patches(folded);
    const Floats scores(TILE * f.wide_count);
    const Products products = f.products();
    const RowReader k_rows(width), v_rows(width);
    KeySums& part = sums[span.slot];
    part.reset(f);
    float* own = kqv[span.first_slot];
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      folded.tokens(span.image, first, first + count, patches, own, row);
      const float* k = own + first * row;
      add_keys(f, k_rows.read(k, row, count), v_rows.read(k + 2 * width, row, count), count, products, scores, part);
    });
  };
  const auto on_queries = [&](const Span& span) {
    const KeyView view(f, sums, span);
    if (span.slot == span.first_slot) view.write(f, arguments.state, span.image);
    // token_mlp's projection of a sum over features is the sum of their projections: once an image, not once a token.
    const Floats rows(f.count * f.wide);
    const Cells projected(packed_size(f.count, width));
    Products(f.count, width).times({view.state, f.wide}, f.count, width, panels_of(w.proj, width), width, rows, f.wide);
    pack_right(projected, f.count, width, rows, f.wide, 1);
    QueryScratch scratch(f);
    MlpScratch mlp_scratch(w);
    const RowReader q_rows(width), v_rows(width);
    const Floats spare(TILE * f.wide);
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      const float* k = kqv[span.first_slot] + first * row;
      weigh_features(f, view, q_rows.read(k + width, row, count), count, scratch);
      read_state(f, projected, count, scratch, mlp_scratch.t, w.proj_bias);
      const MlpTile tile = {v_rows.read(k + 2 * width, row, count), (span.image * length + first) * width, count};
      into_rows(out.at(span.image, first), out.row, width, count, spare,
                [&](float* to, int64_t to_row) { mlp_forward(w, tile, mlp_scratch, to, to_row); });
    });
  };
  for_images(workers, batch, length, on_keys, on_queries);
}

inline void performer_layer_backward(const Workers& workers, const PerformerLayer& arguments, Tokens grad,
                                     const PerformerLayerGradient& out) {
  const FoldedLinear folded(workers, arguments.kqv, true);
  const Features f(arguments.performer);
  const MlpWeights w(arguments.mlp, true);
  const int64_t batch = folded.split.batch, length = folded.split.tokens(), row = folded.outputs, width = f.width;
  auto linear_sums = several<LinearSums>(workers.count, folded);
  auto sums = several<QuerySums>(workers.count, f, out.w != nullptr);
  auto mlp_sums = several<MlpSums>(workers.count, w);
  const auto kqv = several<Floats>(images_at_a_time(workers, batch), length * row);
  const auto skip = several<Floats>(images_at_a_time(workers, batch), length * f.wide);  // the skip's share of d_v
  const auto on_queries = [&](const Span& span) {
    const PatchScratch patches(folded);
    const KeyView view(f, arguments.state, span.image);
    QueryScratch scratch(f);
    MlpBackwardScratch mlp_scratch(w);
    QuerySums& part = sums[span.slot];
    part.reset(f);
    const RowReader q_rows(width), v_rows(width), grad_rows(width);
    const Floats d_y(TILE * f.wide), d_q(TILE * f.wide);
    float* own = kqv[span.first_slot];
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      folded.tokens(span.image, first, first + count, patches, own, row);
      float* k = own + first * row;
      const Rows q = q_rows.read(k + width, row, count);
      const Rows grad_tile = grad_rows.read(grad.at(span.image, first), grad.row, count);
      const MlpTile mlp = {v_rows.read(k + 2 * width, row, count), (span.image * length + first) * width, count};
      attend(f, view, q, count, scratch);
      mlp_backward(w, mlp, scratch.y, grad_tile, mlp_scratch, mlp_sums[span.slot], d_y,
                   skip[span.first_slot] + first * f.wide);
      attend_backward(f, view, q, count, d_y, scratch, part, d_q);
      copy_rows(k + width, row, d_q, f.wide, width, count);
    });
  };
  const auto on_keys = [&](const Span& span) {
    const KeyView view(f, arguments.state, span.image);
    const KeyGradient gradient(f, view, sums, span);
    QueryScratch scratch(f);
    const RowReader k_rows(width), v_rows(width);
    const Floats d_k(TILE * f.wide);
    for_tiles(span.begin, span.end, [&](int64_t first, int64_t count) {
      float* k = kqv[span.first_slot] + first * row;
      float* d_v = skip[span.first_slot] + first * f.wide;
      keys_backward(f, gradient, k_rows.read(k, row, count), v_rows.read(k + 2 * width, row, count), count, scratch,
                    sums[span.slot], d_k, d_v);
      copy_rows(k, row, d_k, f.wide, width, count);
      copy_rows(k + 2 * width, row, d_v, f.wide, width, count);
    });
  };
  const auto on_image = [&](const Span& span) {
    LinearScratch scratch(folded, out.kqv.image.data != nullptr);
    linear_backward(folded, span, kqv[span.first_slot], row, out.kqv, linear_sums[span.slot], scratch);
  };
  for_images(workers, batch, length, on_queries, on_keys, on_image);
  linear_gradients(workers, folded, linear_sums, out.kqv.linear);
  mlp_gradients(workers, w, mlp_sums, out.mlp);
  write_sums(workers, sums, &QuerySums::d_w, out.w, f.count, f.width);
}
