// The CPU kernels of the layers as operators: tensors in and out, in float32 (Python brings other dtypes there).
#include <tuple>

#include "../../tensors.h"
#include "kernels.h"

namespace t2t_fast::cpu {

namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t TOKENS_PER_WORKER = 64;  // fewer are not worth waking a thread and its scratch memory

Workers workers_for(int64_t tokens) {
  const int64_t threads = torch::stable::get_num_threads();
  return {std::max<int64_t>(1, std::min(threads, tokens / TOKENS_PER_WORKER)),
          [](int64_t tasks, void (*task)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
              for (int64_t index = begin; index < end; ++index) task(context, index);
            });
          }};
}

// The data of a float32 tensor on the CPU whose rows are contiguous; null for none.
const float* data_of(const char* function, const Tensor& tensor) {
  check(tensor.scalar_type() == torch::headeronly::ScalarType::Float, function, "every tensor must be float32");
  check(tensor.is_cpu(), function, "every tensor must be on the CPU");
  return static_cast<const float*>(tensor.const_data_ptr());
}

// Parameters: contiguous, and alive as long as this object.
class Parameters {
 public:
  explicit Parameters(const char* function) : function_(function) {}

  const float* get(const OptionalTensor& tensor, const Sizes& size) {
    if (!tensor) return nullptr;
    check(tensor->dim() == static_cast<int64_t>(size.size()), function_, "a parameter has the wrong rank");
    for (size_t i = 0; i < size.size(); ++i)
      check(tensor->size(i) == size[i], function_, "a parameter has the wrong shape");
    check_count(function_, size);
    held_.push_back(torch::stable::contiguous(*tensor));
    return data_of(function_, held_.back());
  }

 private:
  const char* function_;
  std::vector<Tensor> held_;
};

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// An empty tensor stands for a gradient that nobody wants.
Tensor gradient(bool wanted, const Sizes& size, const Tensor& like) { return empty(wanted ? size : Sizes{0}, like); }

float* wanted(const Tensor& gradient) { return gradient.numel() == 0 ? nullptr : floats(gradient); }

Tensor with_rows(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 || tensor.size(tensor.dim() - 1) == 1 ? tensor
                                                                                    : torch::stable::contiguous(tensor);
}

// Sequences (batch, length, width) with contiguous rows, alive as long as this object.
struct Input {
  Tensor tensor;
  Tokens tokens;

  // `like`: whose batch and width these must have; `length`: how many tokens.
  Input(const char* function, const Tensor& given, const Tensor& like, int64_t length) : tensor(with_rows(given)) {
    check(tensor.dim() == 3 && like.dim() == 3, function, "tokens must be 3-D");
    check(tensor.size(0) == like.size(0) && tensor.size(1) == length && tensor.size(2) == like.size(2), function,
          "tokens must agree in batch, length and width");
    check_count(function, {tensor.size(0), tensor.size(1), tensor.size(2)});
    tokens = {data_of(function, tensor), tensor.stride(0), tensor.stride(1)};
  }
};

TokensOut out_of(const Tensor& tensor) { return {floats(tensor), tensor.stride(0), tensor.stride(1)}; }

Split split_of(const char* function, const Tensor& x, const Sizes& kernel, const Sizes& stride, const Sizes& padding) {
  check(x.dim() == 4, function, "x must be 4-D");
  const SplitShape shape =
      split_shape(function, x.size(0), x.size(1), {x.size(2), x.size(3)}, kernel, stride, padding, Element::float32);
  return {{data_of(function, x), stride_of(x, 0), stride_of(x, 1), stride_of(x, 2), stride_of(x, 3)},
          shape.batch,
          shape.channels,
          shape.rows,
          shape.columns};
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

NormLinear linear_of(const char* function, Parameters& held, const Split& split, const Tensor& weight,
                     const OptionalTensor& bias, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                     std::optional<double> norm_eps) {
  check(weight.dim() == 2, function, "the weight must be 2-D");
  const int64_t inputs = split.width(), outputs = weight.size(0);
  check_count(function, {split.batch, split.tokens(), outputs});
  return {inputs,
          outputs,
          held.get(weight, {outputs, inputs}),
          held.get(bias, {outputs}),
          norm_eps.has_value(),
          held.get(norm_weight, {inputs}),
          held.get(norm_bias, {inputs}),
          static_cast<float>(norm_eps.value_or(0))};
}

struct LinearGradients {
  Tensor weight, bias, norm_weight, norm_bias;

  LinearGradients(const NormLinear& linear, bool weights, const Tensor& like)
      : weight(gradient(weights, {linear.outputs, linear.inputs}, like)),
        bias(gradient(linear.bias, {linear.outputs}, like)),
        norm_weight(gradient(weights && linear.norm_weight, {linear.inputs}, like)),
        norm_bias(gradient(linear.norm_bias, {linear.inputs}, like)) {}

  NormLinearGradient pointers() const { return {wanted(weight), wanted(bias), wanted(norm_weight), wanted(norm_bias)}; }
};

Performer performer_of(const char* function, Parameters& held, const Tensor& w, int64_t width, double eps) {
  check(w.dim() == 2 && w.size(0) >= 1, function, "w must be 2-D, with at least one feature");
  return {width, w.size(0), held.get(w, {w.size(0), width}), eps};
}

// The arguments that token_mlp and performer_layer share, in the order of their schemas.
struct TailArguments {
  const Tensor& proj_weight;
  const OptionalTensor &proj_bias, &norm_weight, &norm_bias;
  double norm_eps;
  const Tensor& fc1_weight;
  const OptionalTensor& fc1_bias;
  const Tensor& fc2_weight;
  const OptionalTensor& fc2_bias;
  double proj_drop, mlp_drop;
  const OptionalTensor& seed;

  Tail read(Parameters& held, const char* function, int64_t width) const {
    check(proj_drop >= 0 && proj_drop < 1 && mlp_drop >= 0 && mlp_drop < 1, function,
          "dropout probabilities must be at least 0 and below 1");
    check(fc1_weight.dim() == 2, function, "fc1_weight must be 2-D");
    uint64_t key = 0;
    if (proj_drop > 0 || mlp_drop > 0) {
      check(seed && seed->numel() == 1 && seed->scalar_type() == torch::headeronly::ScalarType::Long && seed->is_cpu(),
            function, "dropout needs an int64 seed on the CPU");
      key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
    }
    const int64_t hidden = fc1_weight.size(0);
    return {width,
            hidden,
            held.get(proj_weight, {width, width}),
            held.get(proj_bias, {width}),
            held.get(norm_weight, {width}),
            held.get(norm_bias, {width}),
            held.get(fc1_weight, {hidden, width}),
            held.get(fc1_bias, {hidden}),
            held.get(fc2_weight, {width, hidden}),
            held.get(fc2_bias, {width}),
            static_cast<float>(norm_eps),
            proj_drop,
            mlp_drop,
            key};
  }
};

struct TailGradients {
  Tensor proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias;

  TailGradients(const Tail& tail, const Tensor& like)
      : proj_weight(gradient(true, {tail.width, tail.width}, like)),
        proj_bias(gradient(tail.proj_bias, {tail.width}, like)),
        norm_weight(gradient(tail.norm_weight, {tail.width}, like)),
        norm_bias(gradient(tail.norm_bias, {tail.width}, like)),
        fc1_weight(gradient(true, {tail.hidden, tail.width}, like)),
        fc1_bias(gradient(tail.fc1_bias, {tail.hidden}, like)),
        fc2_weight(gradient(true, {tail.width, tail.hidden}, like)),
        fc2_bias(gradient(tail.fc2_bias, {tail.width}, like)) {}

  TailGradient pointers() const {
    return {wanted(proj_weight), wanted(proj_bias), wanted(norm_weight), wanted(norm_bias),
            wanted(fc1_weight),  wanted(fc1_bias),  wanted(fc2_weight),  wanted(fc2_bias)};
  }
};

Tensor linear_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                      std::optional<double> norm_eps, Sizes kernel, Sizes stride, Sizes padding) {
  const char* function = "soft_split_linear";
  Parameters held(function);
  const Split split = split_of(function, x, kernel, stride, padding);
  const NormLinear linear = linear_of(function, held, split, weight, bias, norm_weight, norm_bias, norm_eps);
  Tensor out = empty({split.batch, split.tokens(), linear.outputs}, x);
  kernels().soft_split_linear(workers_for(split.batch * split.tokens()), split, linear, floats(out));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, std::optional<double> norm_eps, Sizes kernel,
    Sizes stride, Sizes padding, bool need_image, bool need_weight) {
  const char* function = "soft_split_linear_backward";
  Parameters held(function);
  const Split split = split_of(function, x, kernel, stride, padding);
  const NormLinear linear = linear_of(function, held, split, weight, bias, norm_weight, norm_bias, norm_eps);
  const float* grad_data = held.get(grad, {split.batch, split.tokens(), linear.outputs});
  const LinearGradients out(linear, need_weight, x);
  Image<float*> image;
  Tensor d_image = image_gradient(need_image, split, x, image);
  kernels().soft_split_linear_backward(workers_for(split.batch * split.tokens()), split, linear, grad_data, image,
                                       out.pointers());
  return {d_image, out.weight, out.bias, out.norm_weight, out.norm_bias};
}

std::tuple<Tensor, Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& w,
                                                     double eps) {
  const char* function = "performer_attention";
  Parameters held(function);
  check(q.dim() == 3 && k.dim() == 3, function, "tokens must be 3-D");
  const Input queries(function, q, q, q.size(1)), keys(function, k, q, k.size(1)), values(function, v, q, k.size(1));
  const int64_t batch = q.size(0), width = q.size(2);
  const Performer performer = performer_of(function, held, w, width, eps);
  check(k.size(1) >= 1, function, "there must be at least one key");
  Tensor out = empty({batch, q.size(1), width}, q);
  Tensor lz = empty({batch, performer.features}, q), state = empty({batch, performer.features, width}, q);
  kernels().performer_attention(workers_for(batch * (q.size(1) + k.size(1))), performer, batch, q.size(1), k.size(1),
                                queries.tokens, keys.tokens, values.tokens, out_of(out), {floats(lz), floats(state)});
  return {out, lz, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                              const Tensor& v, const Tensor& w, double eps,
                                                              const Tensor& lz, const Tensor& state, bool need_w) {
  const char* function = "performer_attention_backward";
  Parameters held(function);
  check(q.dim() == 3 && k.dim() == 3, function, "tokens must be 3-D");
  const Input queries(function, q, q, q.size(1)), keys(function, k, q, k.size(1)), values(function, v, q, k.size(1));
  const Input gradients(function, grad, q, q.size(1));
  const int64_t batch = q.size(0), width = q.size(2);
  const Performer performer = performer_of(function, held, w, width, eps);
  const KeyState saved = {const_cast<float*>(held.get(lz, {batch, performer.features})),
                          const_cast<float*>(held.get(state, {batch, performer.features, width}))};
  Tensor d_q = empty({batch, q.size(1), width}, q), d_k = empty({batch, k.size(1), width}, q);
  Tensor d_v = empty({batch, k.size(1), width}, q), d_w = gradient(need_w, {performer.features, width}, q);
  kernels().performer_attention_backward(workers_for(batch * (q.size(1) + k.size(1))), performer, batch, q.size(1),
                                         k.size(1), queries.tokens, keys.tokens, values.tokens, gradients.tokens, saved,
                                         out_of(d_q), out_of(d_k), out_of(d_v), wanted(d_w));
  return {d_q, d_k, d_v, d_w};
}

Tensor mlp_forward(const Tensor& y, const Tensor& v, const Tensor& proj_weight, const OptionalTensor& proj_bias,
                   const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps,
                   const Tensor& fc1_weight, const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                   const OptionalTensor& fc2_bias, double proj_drop, double mlp_drop, const OptionalTensor& seed) {
  const char* function = "token_mlp";
  Parameters held(function);
  check(y.dim() == 3, function, "tokens must be 3-D");
  const Input attended(function, y, y, y.size(1)), values(function, v, y, y.size(1));
  const int64_t batch = y.size(0), length = y.size(1), width = y.size(2);
  const Tail tail = TailArguments{proj_weight, proj_bias,  norm_weight, norm_bias, norm_eps, fc1_weight,
                                  fc1_bias,    fc2_weight, fc2_bias,    proj_drop, mlp_drop, seed}
                        .read(held, function, width);
  Tensor out = empty({batch, length, width}, y);
  kernels().token_mlp(workers_for(batch * length), tail, batch, length, attended.tokens, values.tokens, out_of(out));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(
    const Tensor& grad, const Tensor& y, const Tensor& v, const Tensor& proj_weight, const OptionalTensor& proj_bias,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps, const Tensor& fc1_weight,
    const OptionalTensor& fc1_bias, const Tensor& fc2_weight, const OptionalTensor& fc2_bias, double proj_drop,
    double mlp_drop, const OptionalTensor& seed) {
  const char* function = "token_mlp_backward";
  Parameters held(function);
  check(y.dim() == 3, function, "tokens must be 3-D");
  const Input attended(function, y, y, y.size(1)), values(function, v, y, y.size(1));
  const Input gradients(function, grad, y, y.size(1));
  const int64_t batch = y.size(0), length = y.size(1), width = y.size(2);
  const Tail tail = TailArguments{proj_weight, proj_bias,  norm_weight, norm_bias, norm_eps, fc1_weight,
                                  fc1_bias,    fc2_weight, fc2_bias,    proj_drop, mlp_drop, seed}
                        .read(held, function, width);
  Tensor d_y = empty({batch, length, width}, y), d_v = empty({batch, length, width}, y);
  const TailGradients out(tail, y);
  kernels().token_mlp_backward(workers_for(batch * length), tail, batch, length, attended.tokens, values.tokens,
                               gradients.tokens, out_of(d_y), out_of(d_v), out.pointers());
  return {d_y,
          d_v,
          out.proj_weight,
          out.proj_bias,
          out.norm_weight,
          out.norm_bias,
          out.fc1_weight,
          out.fc1_bias,
          out.fc2_weight,
          out.fc2_bias};
}

std::tuple<Tensor, Tensor, Tensor> layer_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                 const OptionalTensor& norm1_weight, const OptionalTensor& norm1_bias,
                                                 std::optional<double> norm1_eps, Sizes kernel, Sizes stride,
                                                 Sizes padding, const Tensor& w, double eps, const Tensor& proj_weight,
                                                 const OptionalTensor& proj_bias, const OptionalTensor& norm_weight,
                                                 const OptionalTensor& norm_bias, double norm_eps,
                                                 const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                                                 const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
                                                 double proj_drop, double mlp_drop, const OptionalTensor& seed) {
  const char* function = "performer_layer";
  Parameters held(function);
  const Split split = split_of(function, x, kernel, stride, padding);
  const NormLinear linear = linear_of(function, held, split, weight, bias, norm1_weight, norm1_bias, norm1_eps);
  const int64_t width = w.size(1), batch = split.batch, length = split.tokens();
  const Performer performer = performer_of(function, held, w, width, eps);
  check(linear.outputs == 3 * width, function, "the Linear must give k, q and v of w's width");
  const Tail tail = TailArguments{proj_weight, proj_bias,  norm_weight, norm_bias, norm_eps, fc1_weight,
                                  fc1_bias,    fc2_weight, fc2_bias,    proj_drop, mlp_drop, seed}
                        .read(held, function, width);
  Tensor out = empty({batch, length, width}, x);
  Tensor lz = empty({batch, performer.features}, x), state = empty({batch, performer.features, width}, x);
  kernels().performer_layer(workers_for(batch * length), split, linear, performer, tail, out_of(out),
                            {floats(lz), floats(state)});
  return {out, lz, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor>
layer_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
               const OptionalTensor& norm1_weight, const OptionalTensor& norm1_bias, std::optional<double> norm1_eps,
               Sizes kernel, Sizes stride, Sizes padding, const Tensor& w, double eps, const Tensor& proj_weight,
               const OptionalTensor& proj_bias, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
               double norm_eps, const Tensor& fc1_weight, const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
               const OptionalTensor& fc2_bias, double proj_drop, double mlp_drop, const OptionalTensor& seed,
               const Tensor& lz, const Tensor& state, bool need_image, bool need_weight, bool need_w) {
  const char* function = "performer_layer_backward";
  Parameters held(function);
  const Split split = split_of(function, x, kernel, stride, padding);
  const NormLinear linear = linear_of(function, held, split, weight, bias, norm1_weight, norm1_bias, norm1_eps);
  const int64_t width = w.size(1), batch = split.batch, length = split.tokens();
  const Performer performer = performer_of(function, held, w, width, eps);
  check(linear.outputs == 3 * width, function, "the Linear must give k, q and v of w's width");
  const Tail tail = TailArguments{proj_weight, proj_bias,  norm_weight, norm_bias, norm_eps, fc1_weight,
                                  fc1_bias,    fc2_weight, fc2_bias,    proj_drop, mlp_drop, seed}
                        .read(held, function, width);
  const KeyState saved = {const_cast<float*>(held.get(lz, {batch, performer.features})),
                          const_cast<float*>(held.get(state, {batch, performer.features, width}))};
  check(grad.dim() == 3 && grad.size(0) == batch && grad.size(2) == width, function,
        "the gradient must have the output's shape");
  const Input gradients(function, grad, grad, length);
  const LinearGradients d_linear(linear, need_weight, x);
  const TailGradients d_tail(tail, x);
  Tensor d_w = gradient(need_w, {performer.features, width}, x);
  Image<float*> image;
  Tensor d_image = image_gradient(need_image, split, x, image);
  kernels().performer_layer_backward(workers_for(batch * length), split, linear, performer, tail, gradients.tokens,
                                     saved, image, d_linear.pointers(), wanted(d_w), d_tail.pointers());
  return {d_image,
          d_linear.weight,
          d_linear.bias,
          d_linear.norm_weight,
          d_linear.norm_bias,
          d_w,
          d_tail.proj_weight,
          d_tail.proj_bias,
          d_tail.norm_weight,
          d_tail.norm_bias,
          d_tail.fc1_weight,
          d_tail.fc1_bias,
          d_tail.fc2_weight,
          d_tail.fc2_bias};
}

int64_t scratch_bytes(bool restart) { return static_cast<int64_t>(Scratch::most_in_use(restart)); }

std::string instruction_set(const std::string& use) {
  if (!use.empty() && !use_instruction_set(use)) {
    std::string names;
    for (const std::string& name : instruction_sets()) names += (names.empty() ? "" : ", ") + name;
    throw std::runtime_error("t2t_fast_native::cpu_instruction_set: this CPU runs " + names + ", got " + use);
  }
  return kernels().name;
}

}  // namespace

}  // namespace t2t_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(t2t_fast_native, CPU, library) {
  using namespace t2t_fast::cpu;
  library.impl("soft_split_linear", TORCH_BOX(&linear_forward));
  library.impl("soft_split_linear_backward", TORCH_BOX(&linear_backward));
  library.impl("performer_attention", TORCH_BOX(&attention_forward));
  library.impl("performer_attention_backward", TORCH_BOX(&attention_backward));
  library.impl("token_mlp", TORCH_BOX(&mlp_forward));
  library.impl("token_mlp_backward", TORCH_BOX(&mlp_backward));
  library.impl("performer_layer", TORCH_BOX(&layer_forward));
  library.impl("performer_layer_backward", TORCH_BOX(&layer_backward));
}

STABLE_TORCH_LIBRARY_IMPL(t2t_fast_native, CompositeExplicitAutograd, library) {
  library.impl("cpu_instruction_set", TORCH_BOX(&t2t_fast::cpu::instruction_set));
  library.impl("scratch_bytes", TORCH_BOX(&t2t_fast::cpu::scratch_bytes));
}
