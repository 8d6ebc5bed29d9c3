// Soft split, LayerNorm and Linear, one tile of tokens at a time. Part of kernels.inl.
//
// The unfolded tile lies in the cache and is normalised there before the product, so no correction for a large common
// offset is needed afterwards, and backward has the normalised rows for the weight's gradient.

// LayerNorm's affine part folded into the Linear: y = weight xhat + bias, columns in the order of the packed rows.
struct PatchScratch;

struct FoldedLinear {
  const Split& split;
  const NormLinear& linear;
  int64_t inputs, wide_inputs, outputs;
  Floats rows;   // (outputs, wide_inputs)
  Cells panels;  // packed transposed: the right operand of the forward product
  Cells back;    // packed: the right operand of the input's gradient; only for the backward pass
  Floats bias;   // padded(outputs)
  IntVec last;

  FoldedLinear(const Workers& workers, const SplitLinear& arguments, bool backward)
      : split(arguments.split), linear(arguments.linear), inputs(linear.inputs), wide_inputs(padded(inputs)),
        outputs(linear.outputs), rows(outputs * wide_inputs), panels(packed_size(inputs, outputs)),
        back(backward ? packed_size(outputs, inputs) : 0), bias(padded(outputs)), last(last_lanes(inputs)) {
    pad_vector(bias, linear.bias, outputs);
    run(workers, workers.count, [&](int64_t slot) {
      for (int64_t o = outputs * slot / workers.count; o < outputs * (slot + 1) / workers.count; ++o) fold_row(o);
    });
    const int64_t count = (outputs + PANEL - 1) / PANEL;
    run(workers, workers.count, [&](int64_t slot) {
      pack_right(panels, inputs, outputs, rows, 1, wide_inputs, count * slot / workers.count,
                 count * (slot + 1) / workers.count);
    });
    if (!backward) return;
    const int64_t count_back = (inputs + PANEL - 1) / PANEL;
    run(workers, workers.count, [&](int64_t slot) {
      pack_right(back, outputs, inputs, rows, wide_inputs, 1, count_back * slot / workers.count,
                 count_back * (slot + 1) / workers.count);
    });
  }

  void fold_row(int64_t o) {
    const float* from = linear.weight + o * inputs;
    float* to = rows + o * wide_inputs;
    if (linear.norm_bias) bias[o] += dot(from, linear.norm_bias, inputs);
    const int64_t taps = tap_major(split) ? split.taps() : 1, channels = inputs / taps;
    if (linear.norm_weight) {
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t c = 0, column = tap; c < channels; ++c, column += taps)
          to[tap * channels + c] = from[column] * linear.norm_weight[column];
    } else {
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t c = 0, column = tap; c < channels; ++c, column += taps) to[tap * channels + c] = from[column];
    }
    for (int64_t i = inputs; i < wide_inputs; ++i) to[i] = 0;
  }

  // Unfolds and normalises tokens of an image into `patches` (count, wide_inputs); `rstd` per token unless null.
  void patches(int64_t image, int64_t first, int64_t count, float* to, float* rstd) const {
    // A few rows at a time, so that they are in the first-level cache when they are normalised.
    constexpr int64_t few = 8;
    for (int64_t begin = 0; begin < count; begin += few) {
      const int64_t end = std::min(begin + few, count);
      for (int64_t r = begin; r < end; ++r) pack_patch(split, image, first + r, to + r * wide_inputs);
      if (!linear.norm) continue;
      for (int64_t r = begin; r < end; ++r) {
        const float found = normalise(to + r * wide_inputs, inputs, linear.norm_eps, last);
        if (rstd) rstd[r] = found;
      }
    }
  }

  // Tokens [begin, end) of an image to out + token * out_row.
  void tokens(int64_t image, int64_t begin, int64_t end, const PatchScratch& s, float* out, int64_t out_row) const;
};

// Scratch for a tile of patches and what a Linear makes of it.
struct PatchScratch {
  Floats tile, spare;
  Products products;

  explicit PatchScratch(const FoldedLinear& folded)
      : tile(TILE * folded.wide_inputs), spare(TILE * padded(folded.outputs)), products(TILE, folded.inputs) {}
};

inline void FoldedLinear::tokens(int64_t image, int64_t begin, int64_t end, const PatchScratch& s, float* out,
                                 int64_t out_row) const {
  for_tiles(begin, end, [&](int64_t first, int64_t count) {
    patches(image, first, count, s.tile, nullptr);
    const bool whole = outputs % LANES == 0;
    float* to = whole ? out + first * out_row : s.spare;
    const int64_t row = whole ? out_row : padded(outputs);
    s.products.times({s.tile, wide_inputs}, count, inputs, panels_of(panels, inputs), outputs, to, row, bias);
    if (!whole) copy_rows(out + first * out_row, out_row, to, row, outputs, count);
  });
}

// One worker's sums of gradients over its tokens, columns in the order of the packed rows.
struct LinearSums {
  Floats products;  // (outputs, wide_inputs): sum over tokens of G xhat^T
  Floats total;     // padded(outputs): sum of G

  explicit LinearSums(const FoldedLinear& folded)
      : products(zeros(folded.outputs * folded.wide_inputs)), total(zeros(padded(folded.outputs))) {}
};

// A worker's scratch for linear_backward.
struct LinearScratch {
  Floats tile, d_tile, rstd;
  RowReader grad;
  Products products;

  explicit LinearScratch(const FoldedLinear& folded, bool image_gradient)
      : tile(TILE * folded.wide_inputs), d_tile(image_gradient ? TILE * folded.wide_inputs : 0), rstd(TILE),
        grad(folded.outputs), products(TILE, std::max(folded.inputs, folded.outputs)) {}
};

// Backward of one image's part: adds its own tokens to `sums`, and writes its own rows of the image's gradient, for
// which it also visits the tokens of its neighbours that reach into them.
inline void linear_backward(const FoldedLinear& folded, const Span& span, const float* grad, int64_t grad_row,
                            const SplitLinearGradient& out, LinearSums& sums, LinearScratch& scratch) {
  const Split& split = folded.split;
  const Image<float*>& d_image = out.image;
  const bool weights = out.linear.weight || out.linear.norm_weight;
  const int64_t wide = folded.wide_inputs, across = split.columns.tokens;
  const auto visit = [&](int64_t begin, int64_t end, bool own, int64_t row_begin, int64_t row_end) {
    for_tiles(begin, end, [&](int64_t first, int64_t count) {
      const Rows g = scratch.grad.read(grad + first * grad_row, grad_row, count);
      folded.patches(span.image, first, count, scratch.tile, scratch.rstd);
      if (own) {
        add_row_sum(sums.total, g, count, folded.outputs);
        if (weights) {
          scratch.products.add_over(g, folded.outputs, {scratch.tile, wide}, folded.inputs, count, sums.products, wide);
        }
      }
      if (row_begin >= row_end) return;
      scratch.products.times(g, count, folded.outputs, panels_of(folded.back, folded.outputs), folded.inputs,
                             scratch.d_tile, wide);
      float* image = d_image.data + span.image * d_image.batch_stride;
      for (int64_t r = 0; r < count; ++r) {
        float* row = scratch.d_tile + r * wide;
        if (folded.linear.norm) normalise_backward(row, scratch.tile + r * wide, folded.inputs, scratch.rstd[r]);
        fold_patch(split, row, first + r, image, d_image, row_begin, row_end);
      }
    });
  };
  if (d_image.data == nullptr) return visit(span.begin, span.end, true, 0, 0);
  const int64_t row_begin = span.share_begin(split.rows.pixels), row_end = span.share_end(split.rows.pixels);
  if (row_begin >= row_end) return visit(span.begin, span.end, true, 0, 0);
  clear_rows(split, d_image, span.image, row_begin, row_end);
  const int64_t begin = first_token<int64_t>(split.rows, row_begin) * across;
  const int64_t end = (last_token<int64_t>(split.rows, row_end - 1) + 1) * across;
  visit(begin, std::min(end, span.begin), false, row_begin, row_end);
  visit(span.begin, span.end, true, row_begin, row_end);
  visit(std::max(begin, span.end), end, false, row_begin, row_end);
}

// ---- the operator

inline void soft_split_linear(const Workers& workers, const SplitLinear& arguments, float* out) {
  const FoldedLinear folded(workers, arguments, false);
  const int64_t length = folded.split.tokens(), outputs = folded.outputs;
  for_images(workers, folded.split.batch, length, [&](const Span& span) {
    folded.tokens(span.image, span.begin, span.end, PatchScratch(folded), out + span.image * length * outputs, outputs);
  });
}

// The parameters' gradients from all workers' sums. With xhat the normalised rows and P = sum of G xhat^T:
// dW = P diag(gamma) + (sum G) beta^T, dgamma_j = sum_o W_oj P_oj, dbeta = W^T sum G, db = sum G.
inline void linear_gradients(const Workers& workers, const FoldedLinear& folded, const std::vector<LinearSums>& parts,
                             const NormLinearGradient& out) {
  const NormLinear& linear = folded.linear;
  const int64_t inputs = folded.inputs, outputs = folded.outputs, wide = folded.wide_inputs;
  merge(workers, parts, &LinearSums::total, padded(outputs));
  const float* total = parts[0].total;
  if (out.bias) std::memcpy(out.bias, total, outputs * sizeof(float));
  if (out.norm_bias) {
    zero_floats(out.norm_bias, inputs);
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t i = 0; i < inputs; ++i) out.norm_bias[i] += total[o] * linear.weight[o * inputs + i];
  }
  if (!out.weight && !out.norm_weight) return;
  merge(workers, parts, &LinearSums::products, outputs * wide);
  const float* products = parts[0].products;
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

inline void soft_split_linear_backward(const Workers& workers, const SplitLinear& arguments, const float* grad,
                                       const SplitLinearGradient& out) {
  const FoldedLinear folded(workers, arguments, true);
  const int64_t length = folded.split.tokens(), outputs = folded.outputs;
  auto sums = several<LinearSums>(workers.count, folded);
  for_images(workers, folded.split.batch, length, [&](const Span& span) {
    LinearScratch scratch(folded, out.image.data != nullptr);
    linear_backward(folded, span, grad + span.image * length * outputs, outputs, out, sums[span.slot], scratch);
  });
  linear_gradients(workers, folded, sums, out.linear);
}
