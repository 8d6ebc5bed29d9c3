// A Linear, with LayerNorm's affine part folded into it, as products read it: y = weight xhat + bias.
// It depends on parameters only, so inference keeps it between calls. Part of kernels.inl.

struct PackedLinear {
  int64_t inputs, outputs;
  const Cell* panels;
  const float* bias;  // padded(outputs)

  PackedLinear(const void* packed, int64_t inputs_, int64_t outputs_)
      : inputs(inputs_), outputs(outputs_), panels(static_cast<const Cell*>(packed)),
        bias(reinterpret_cast<const float*>(panels + packed_size(inputs, outputs))) {}

  // Columns [column, column + count) of the product of `rows` rows, from a column on that begins a panel.
  void product(Left rows, int64_t number, int64_t column, int64_t count, float* out, int64_t out_row) const {
    gemm(number, count, inputs, rows, panels_of(panels, inputs).from_column(column), out, out_row, bias + column);
  }
};

// Floats that pack_linear writes: for the product itself, or (`back`) for the gradient of its input.
inline int64_t packed_linear_size(int64_t inputs, int64_t outputs, bool back) {
  return back ? packed_size(outputs, inputs) : packed_size(inputs, outputs) + padded(outputs);
}

// A row of the weight times LayerNorm's.
inline void scaled_row(const NormLinear& linear, int64_t output, float* to) {
  const float* from = linear.weight + output * linear.inputs;
  for (int64_t i = 0; i < linear.inputs; ++i) to[i] = linear.norm_weight ? from[i] * linear.norm_weight[i] : from[i];
}

inline void pack_linear(const Workers& workers, const NormLinear& linear, bool back, float* packed) {
  const int64_t inputs = linear.inputs, outputs = linear.outputs;
  Cell* panels = reinterpret_cast<Cell*>(packed);
  const int64_t number = ((back ? inputs : outputs) + PANEL - 1) / PANEL;
  if (back) {
    const Floats rows(linear.norm_weight ? outputs * inputs : 0);
    if (linear.norm_weight)
      for (int64_t o = 0; o < outputs; ++o) scaled_row(linear, o, rows + o * inputs);
    const float* weight = linear.norm_weight ? rows : linear.weight;
    run(workers, workers.count, [&](int64_t slot) {
      pack_right(panels, outputs, inputs, weight, inputs, 1, number * slot / workers.count,
                 number * (slot + 1) / workers.count);
    });
    return;
  }
  float* bias = packed + packed_size(inputs, outputs);
  pad_vector(bias, linear.bias, outputs);
  run(workers, workers.count, [&](int64_t slot) {
    const Floats rows(PANEL * inputs);
    for (int64_t panel = number * slot / workers.count; panel < number * (slot + 1) / workers.count; ++panel) {
      const int64_t first = panel * PANEL, count = std::min(PANEL, outputs - first);
      for (int64_t o = 0; o < count; ++o) {
        if (linear.norm_bias) bias[first + o] += dot(linear.weight + (first + o) * inputs, linear.norm_bias, inputs);
        scaled_row(linear, first + o, rows + o * inputs);
      }
      pack_right(panels + panel * cells(inputs) * PANEL, inputs, count, rows, 1, inputs);
    }
  });
}
