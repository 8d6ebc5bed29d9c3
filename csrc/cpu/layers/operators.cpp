// The CPU kernels of the layers as operators: tensors in and out, in float32 (Python brings other dtypes there).
#include <array>
#include <tuple>

#include "call.h"

namespace t2t_fast::cpu {

namespace {

// ---- gradients

// The struct of pointers whose fields are these gradients, in the same order.
template <typename Pointers, size_t N>
Pointers pointers_of(const std::array<Tensor, N>& gradients) {
  return std::apply([](const auto&... each) { return Pointers{wanted(each)...}; }, gradients);
}

// The image's gradient in the memory order of the image: (B, H, W, C) where its channels are adjacent.
Tensor image_gradient(bool wanted, const Split& split, const Tensor& like, Image<float*>& image) {
  const int64_t height = split.rows.pixels, width = split.columns.pixels, channels = split.channels;
  const bool last = split.image.channel_stride == 1;
  const Sizes size = last ? Sizes{split.batch, height, width, channels} : Sizes{split.batch, channels, height, width};
  Tensor tensor = gradient(wanted, size, like);
  image = {nullptr, channels * height * width, last ? 1 : height * width, last ? width * channels : width,
           last ? channels : 1};
  if (wanted) image.data = floats(tensor);
  return tensor;
}

std::array<Tensor, 4> linear_gradients(const NormLinear& linear, bool weights, const Tensor& like) {
  return {gradient(weights, {linear.outputs, linear.inputs}, like), gradient(linear.bias, {linear.outputs}, like),
          gradient(weights && linear.norm_weight, {linear.inputs}, like),
          gradient(linear.norm_bias, {linear.inputs}, like)};
}

std::array<Tensor, 8> mlp_gradients(const MlpParameters& mlp, const Tensor& like) {
  const int64_t width = mlp.width, hidden = mlp.hidden;
  return {gradient(true, {width, width}, like),     gradient(mlp.proj_bias, {width}, like),
          gradient(mlp.norm_weight, {width}, like), gradient(mlp.norm_bias, {width}, like),
          gradient(true, {hidden, width}, like),    gradient(mlp.fc1_bias, {hidden}, like),
          gradient(true, {width, hidden}, like),    gradient(mlp.fc2_bias, {width}, like)};
}

// ---- arguments that several operators share, in the order of their schemas (../../operators.cpp)

#define SPLIT_LINEAR_PARAMETERS                                                                                    \
  const Tensor &x, const Tensor &weight, const OptionalTensor &bias, const OptionalTensor &norm1_weight,           \
      const OptionalTensor &norm1_bias, std::optional<double> norm1_eps, const Sizes &kernel, const Sizes &stride, \
      const Sizes &padding
#define SPLIT_LINEAR_ARGUMENTS x, weight, bias, norm1_weight, norm1_bias, norm1_eps, kernel, stride, padding

#define MLP_PARAMETERS                                                                                            \
  const Tensor &proj_weight, const OptionalTensor &proj_bias, const OptionalTensor &norm_weight,                  \
      const OptionalTensor &norm_bias, double norm_eps, const Tensor &fc1_weight, const OptionalTensor &fc1_bias, \
      const Tensor &fc2_weight, const OptionalTensor &fc2_bias, double proj_drop, double mlp_drop,                \
      const OptionalTensor &seed
#define MLP_ARGUMENTS                                                                                              \
  proj_weight, proj_bias, norm_weight, norm_bias, norm_eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, proj_drop, \
      mlp_drop, seed

SplitLinear split_linear_of(Call& call, SPLIT_LINEAR_PARAMETERS) {
  call.check(x.dim() == 4, "x must be 4-D");
  const Split split = {split_shape(call.function, x.size(0), x.size(1), {x.size(2), x.size(3)}, kernel, stride, padding,
                                   Element::float32),
                       {data_of(call.function, x), stride_of(x, 0), stride_of(x, 1), stride_of(x, 2), stride_of(x, 3)}};
  call.check(weight.dim() == 2, "the weight must be 2-D");
  const int64_t inputs = split.width(), outputs = weight.size(0);
  check_count(call.function, {split.batch, split.tokens(), outputs});
  NormLinear linear = {inputs, outputs};
  linear.weight = call.parameter(weight, {outputs, inputs});
  linear.bias = call.parameter(bias, {outputs});
  linear.norm = norm1_eps.has_value();
  linear.norm_weight = call.parameter(norm1_weight, {inputs});
  linear.norm_bias = call.parameter(norm1_bias, {inputs});
  linear.norm_eps = static_cast<float>(norm1_eps.value_or(0));
  return {split, linear};
}

Performer performer_of(Call& call, const Tensor& w, int64_t width, double eps) {
  call.check(w.dim() == 2 && w.size(0) >= 1, "w must be 2-D, with at least one feature");
  return {width, w.size(0), call.parameter(w, {w.size(0), width}), eps};
}

KeyState saved_state(Call& call, const Performer& performer, int64_t batch, const Tensor& lz, const Tensor& state) {
  return {const_cast<float*>(call.parameter(lz, {batch, performer.features})),
          const_cast<float*>(call.parameter(state, {batch, performer.features, performer.width}))};
}

MlpParameters mlp_of(Call& call, int64_t width, MLP_PARAMETERS) {
  call.check(proj_drop >= 0 && proj_drop < 1 && mlp_drop >= 0 && mlp_drop < 1,
             "dropout probabilities must be at least 0 and below 1");
  call.check(fc1_weight.dim() == 2, "fc1_weight must be 2-D");
  const int64_t hidden = fc1_weight.size(0);
  MlpParameters mlp = {width, hidden};
  if (proj_drop > 0 || mlp_drop > 0) {
    call.check(
        seed && seed->numel() == 1 && seed->scalar_type() == torch::headeronly::ScalarType::Long && seed->is_cpu(),
        "dropout needs an int64 seed on the CPU");
    mlp.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  }
  mlp.proj_weight = call.parameter(proj_weight, {width, width});
  mlp.proj_bias = call.parameter(proj_bias, {width});
  mlp.norm_weight = call.parameter(norm_weight, {width});
  mlp.norm_bias = call.parameter(norm_bias, {width});
  mlp.fc1_weight = call.parameter(fc1_weight, {hidden, width});
  mlp.fc1_bias = call.parameter(fc1_bias, {hidden});
  mlp.fc2_weight = call.parameter(fc2_weight, {width, hidden});
  mlp.fc2_bias = call.parameter(fc2_bias, {width});
  mlp.norm_eps = static_cast<float>(norm_eps);
  mlp.proj_drop = proj_drop;
  mlp.mlp_drop = mlp_drop;
  return mlp;
}

Attention attention_of(Call& call, const Tensor& q, const Tensor& k, const Tensor& v) {
  call.check(q.dim() == 3 && k.dim() == 3, "tokens must be 3-D");
  const int64_t queries = q.size(1), keys = k.size(1);
  Attention attention = {{}, q.size(0), queries, keys};
  attention.q = call.tokens(q, q, queries);
  attention.k = call.tokens(k, q, keys);
  attention.v = call.tokens(v, q, keys);
  return attention;
}

TokenMlp token_mlp_of(Call& call, const Tensor& y, const Tensor& v) {
  call.check(y.dim() == 3, "tokens must be 3-D");
  const int64_t length = y.size(1);
  return {{}, y.size(0), length, call.tokens(y, y, length), call.tokens(v, y, length)};
}

PerformerLayer layer_of(Call& call, SPLIT_LINEAR_PARAMETERS, const Tensor& w, double eps, MLP_PARAMETERS) {
  PerformerLayer layer = {split_linear_of(call, SPLIT_LINEAR_ARGUMENTS)};
  const int64_t width = w.size(1);
  layer.performer = performer_of(call, w, width, eps);
  call.check(layer.kqv.linear.outputs == 3 * width, "the Linear must give k, q and v of w's width");
  layer.mlp = mlp_of(call, width, MLP_ARGUMENTS);
  return layer;
}

// ---- the operators

Tensor soft_split_linear(SPLIT_LINEAR_PARAMETERS, bool bf16) {
  Call call("soft_split_linear");
  const SplitLinear arguments = split_linear_of(call, SPLIT_LINEAR_ARGUMENTS);
  const int64_t batch = arguments.split.batch, length = arguments.split.tokens();
  Tensor out = empty({batch, length, arguments.linear.outputs}, x);
  kernels(bf16).soft_split_linear(workers_for(batch * length), arguments, floats(out));
  return out;
}

auto soft_split_linear_backward(const Tensor& grad, SPLIT_LINEAR_PARAMETERS, bool need_image, bool need_weight,
                                bool bf16) {
  Call call("soft_split_linear_backward");
  const SplitLinear arguments = split_linear_of(call, SPLIT_LINEAR_ARGUMENTS);
  const int64_t batch = arguments.split.batch, length = arguments.split.tokens();
  const float* grad_data = call.parameter(grad, {batch, length, arguments.linear.outputs});
  const auto d_linear = linear_gradients(arguments.linear, need_weight, x);
  SplitLinearGradient out = {{}, pointers_of<NormLinearGradient>(d_linear)};
  const std::array d_image = {image_gradient(need_image, arguments.split, x, out.image)};
  kernels(bf16).soft_split_linear_backward(workers_for(batch * length), arguments, grad_data, out);
  return std::tuple_cat(d_image, d_linear);
}

std::tuple<Tensor, Tensor, Tensor> performer_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                       const Tensor& w, double eps, bool bf16) {
  Call call("performer_attention");
  Attention arguments = attention_of(call, q, k, v);
  const int64_t batch = arguments.batch, queries = arguments.queries, keys = arguments.keys, width = q.size(2);
  arguments.performer = performer_of(call, w, width, eps);
  call.check(keys >= 1, "there must be at least one key");
  const int64_t features = arguments.performer.features;
  Tensor out = empty({batch, queries, width}, q);
  Tensor lz = empty({batch, features}, q), state = empty({batch, features, width}, q);
  arguments.state = {floats(lz), floats(state)};
  kernels(bf16).performer_attention(workers_for(batch * (queries + keys)), arguments, out_of(out));
  return {out, lz, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> performer_attention_backward(const Tensor& grad, const Tensor& q,
                                                                        const Tensor& k, const Tensor& v,
                                                                        const Tensor& w, double eps, const Tensor& lz,
                                                                        const Tensor& state, bool need_w, bool bf16) {
  Call call("performer_attention_backward");
  Attention arguments = attention_of(call, q, k, v);
  const int64_t batch = arguments.batch, queries = arguments.queries, keys = arguments.keys, width = q.size(2);
  const Tokens gradients = call.tokens(grad, q, queries);
  arguments.performer = performer_of(call, w, width, eps);
  arguments.state = saved_state(call, arguments.performer, batch, lz, state);
  Tensor d_q = empty({batch, queries, width}, q), d_k = empty({batch, keys, width}, q);
  Tensor d_v = empty({batch, keys, width}, q), d_w = gradient(need_w, {arguments.performer.features, width}, q);
  kernels(bf16).performer_attention_backward(workers_for(batch * (queries + keys)), arguments, gradients,
                                             {out_of(d_q), out_of(d_k), out_of(d_v), wanted(d_w)});
  return {d_q, d_k, d_v, d_w};
}

Tensor token_mlp(const Tensor& y, const Tensor& v, MLP_PARAMETERS, bool bf16) {
  Call call("token_mlp");
  TokenMlp arguments = token_mlp_of(call, y, v);
  const int64_t batch = arguments.batch, length = arguments.length, width = y.size(2);
  arguments.mlp = mlp_of(call, width, MLP_ARGUMENTS);
  Tensor out = empty({batch, length, width}, y);
  kernels(bf16).token_mlp(workers_for(batch * length), arguments, out_of(out));
  return out;
}

auto token_mlp_backward(const Tensor& grad, const Tensor& y, const Tensor& v, MLP_PARAMETERS, bool bf16) {
  Call call("token_mlp_backward");
  TokenMlp arguments = token_mlp_of(call, y, v);
  const int64_t batch = arguments.batch, length = arguments.length, width = y.size(2);
  const Tokens gradients = call.tokens(grad, y, length);
  arguments.mlp = mlp_of(call, width, MLP_ARGUMENTS);
  const std::array d_tokens = {empty({batch, length, width}, y), empty({batch, length, width}, y)};
  const auto d_mlp = mlp_gradients(arguments.mlp, y);
  kernels(bf16).token_mlp_backward(workers_for(batch * length), arguments, gradients,
                                   {out_of(d_tokens[0]), out_of(d_tokens[1]), pointers_of<MlpGradient>(d_mlp)});
  return std::tuple_cat(d_tokens, d_mlp);
}

std::tuple<Tensor, Tensor, Tensor> performer_layer(SPLIT_LINEAR_PARAMETERS, const Tensor& w, double eps, MLP_PARAMETERS,
                                                   bool bf16) {
  Call call("performer_layer");
  PerformerLayer layer = layer_of(call, SPLIT_LINEAR_ARGUMENTS, w, eps, MLP_ARGUMENTS);
  const int64_t batch = layer.kqv.split.batch, length = layer.kqv.split.tokens();
  const int64_t features = layer.performer.features, width = layer.performer.width;
  Tensor out = empty({batch, length, width}, x);
  Tensor lz = empty({batch, features}, x), state = empty({batch, features, width}, x);
  layer.state = {floats(lz), floats(state)};
  kernels(bf16).performer_layer(workers_for(batch * length), layer, out_of(out));
  return {out, lz, state};
}

auto performer_layer_backward(const Tensor& grad, SPLIT_LINEAR_PARAMETERS, const Tensor& w, double eps, MLP_PARAMETERS,
                              const Tensor& lz, const Tensor& state, bool need_image, bool need_weight, bool need_w,
                              bool bf16) {
  Call call("performer_layer_backward");
  PerformerLayer layer = layer_of(call, SPLIT_LINEAR_ARGUMENTS, w, eps, MLP_ARGUMENTS);
  const int64_t batch = layer.kqv.split.batch, length = layer.kqv.split.tokens(), width = layer.performer.width;
  layer.state = saved_state(call, layer.performer, batch, lz, state);
  call.check(grad.dim() == 3 && grad.size(0) == batch && grad.size(2) == width,
             "the gradient must have the output's shape");
  const Tokens gradients = call.tokens(grad, grad, length);
  const auto d_linear = linear_gradients(layer.kqv.linear, need_weight, x);
  const auto d_mlp = mlp_gradients(layer.mlp, x);
  const std::array d_w = {gradient(need_w, {layer.performer.features, width}, x)};
  PerformerLayerGradient out = {
      {{}, pointers_of<NormLinearGradient>(d_linear)}, wanted(d_w[0]), pointers_of<MlpGradient>(d_mlp)};
  const std::array d_image = {image_gradient(need_image, layer.kqv.split, x, out.kqv.image)};
  kernels(bf16).performer_layer_backward(workers_for(batch * length), layer, gradients, out);
  return std::tuple_cat(d_image, d_linear, d_w, d_mlp);
}

int64_t scratch_bytes(bool restart) { return static_cast<int64_t>(Scratch::most_in_use(restart)); }

std::string instruction_set(const std::string& use, bool bf16) {
  if (!use.empty() && !use_instruction_set(use, bf16)) {
    std::string names;
    for (const std::string& name : instruction_sets(bf16)) names += (names.empty() ? "" : ", ") + name;
    throw std::runtime_error("t2t_fast_native::cpu_instruction_set: this CPU runs " + names + ", got " + use);
  }
  return kernels(bf16).name;
}

}  // namespace

}  // namespace t2t_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(t2t_fast_native, CPU, library) {
  using namespace t2t_fast::cpu;
  library.impl("soft_split_linear", TORCH_BOX(&soft_split_linear));
  library.impl("soft_split_linear_backward", TORCH_BOX(&soft_split_linear_backward));
  library.impl("performer_attention", TORCH_BOX(&performer_attention));
  library.impl("performer_attention_backward", TORCH_BOX(&performer_attention_backward));
  library.impl("token_mlp", TORCH_BOX(&token_mlp));
  library.impl("token_mlp_backward", TORCH_BOX(&token_mlp_backward));
  library.impl("performer_layer", TORCH_BOX(&performer_layer));
  library.impl("performer_layer_backward", TORCH_BOX(&performer_layer_backward));
}

STABLE_TORCH_LIBRARY_IMPL(t2t_fast_native, CompositeExplicitAutograd, library) {
  library.impl("cpu_instruction_set", TORCH_BOX(&t2t_fast::cpu::instruction_set));
  library.impl("scratch_bytes", TORCH_BOX(&t2t_fast::cpu::scratch_bytes));
}
