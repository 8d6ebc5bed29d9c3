// The transformer block as an operator: tensors in and out, in float32.
#include <tuple>

#include "call.h"

namespace t2t_fast::cpu {

namespace {

constexpr int64_t BLOCK_TOKENS_PER_WORKER = 16;  // a token of a block is a hundred times the work of the other layers

Tensor pack_linear(const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& norm_weight,
                   const OptionalTensor& norm_bias, bool bf16, bool back) {
  Call call("pack_linear");
  call.check(weight.dim() == 2, "the weight must be 2-D");
  NormLinear linear = {weight.size(1), weight.size(0)};
  linear.weight = call.parameter(weight, {linear.outputs, linear.inputs});
  linear.bias = call.parameter(bias, {linear.outputs});
  linear.norm_weight = call.parameter(norm_weight, {linear.inputs});
  linear.norm_bias = call.parameter(norm_bias, {linear.inputs});
  const Kernels& used = kernels(bf16);
  Tensor packed = empty({used.packed_linear_size(linear.inputs, linear.outputs, back)}, weight);
  used.pack_linear(workers_for(linear.outputs), linear, back, floats(packed));
  return packed;
}

int64_t packed_linear_size(int64_t inputs, int64_t outputs, bool bf16, bool back) {
  check_count("packed_linear_size", {inputs, outputs});
  return kernels(bf16).packed_linear_size(inputs, outputs, back);
}

// ---- arguments that forward and backward share, in the order of their schemas (../../operators.cpp)

#define BLOCK_PARAMETERS                                                                                       \
  const Tensor &x, const Tensor &qkv, const Tensor &proj, const Tensor &fc1, const Tensor &fc2, int64_t heads, \
      int64_t hidden, double scale, double norm1_eps, double norm2_eps, const OptionalTensor &factors, bool bf16
#define BLOCK_ARGUMENTS x, qkv, proj, fc1, fc2, heads, hidden, scale, norm1_eps, norm2_eps, factors, bf16

Block block_of(Call& call, BLOCK_PARAMETERS, bool back) {
  call.check(x.dim() == 3, "tokens must be 3-D");
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2);
  call.check(heads >= 1 && width >= heads && width % heads == 0, "the width must be a multiple of the heads");
  call.check(hidden >= 1, "there must be hidden units");
  for (const Sizes& sizes :
       {Sizes{batch, length, 3, width}, {batch, length, hidden}, {3, width, width}, {width, hidden}})
    check_count(call.function, sizes);
  const auto packed = [&](const Tensor& tensor, int64_t inputs, int64_t outputs) {
    return call.parameter(tensor, {kernels(bf16).packed_linear_size(inputs, outputs, back)});
  };
  Block block = {batch, length, width, heads, hidden};
  block.scale = static_cast<float>(scale);
  block.norm1_eps = static_cast<float>(norm1_eps);
  block.norm2_eps = static_cast<float>(norm2_eps);
  block.x = call.tokens(x, x, length);
  block.qkv = packed(qkv, width, 3 * width);
  block.proj = packed(proj, width, width);
  block.fc1 = packed(fc1, width, hidden);
  block.fc2 = packed(fc2, hidden, width);
  block.factors = call.parameter(factors, {2, batch});
  return block;
}

Workers workers_of(const Block& block) { return workers_for(block.batch * block.length, BLOCK_TOKENS_PER_WORKER); }

constexpr auto FLOAT = torch::headeronly::ScalarType::Float, BFLOAT16 = torch::headeronly::ScalarType::BFloat16;

// ---- the operators

auto transformer_block(BLOCK_PARAMETERS, bool save) {
  Call call("transformer_block");
  const Block block = block_of(call, BLOCK_ARGUMENTS, false);
  const int64_t batch = block.batch, length = block.length, width = block.width;
  // memory for rows of `columns` values of every token, that the backward pass reads; none unless `save`
  const auto rows = [&](int64_t columns, bool half, Saved& saved) {
    Tensor tensor = empty(save ? Sizes{batch, length, columns} : Sizes{0}, x, false, half ? BFLOAT16 : FLOAT);
    saved = {save ? tensor.mutable_data_ptr() : nullptr, columns, half};
    return tensor;
  };
  BlockSaved saved = {};
  Tensor out = empty({batch, length, width}, x), lse = empty(save ? Sizes{batch, heads, length} : Sizes{0}, x);
  Tensor saved_qkv = rows(3 * width, bf16, saved.qkv), y = rows(width, bf16, saved.y);
  Tensor t = rows(width, false, saved.t), h = rows(hidden, bf16, saved.h);
  saved.lse = save ? floats(lse) : nullptr;
  kernels(bf16).transformer_block(workers_of(block), block, out_of(out), saved);
  return std::make_tuple(out, saved_qkv, y, lse, t, h);
}

auto transformer_block_backward(const Tensor& grad, BLOCK_PARAMETERS, const Tensor& saved_qkv, const Tensor& y,
                                const Tensor& lse, const Tensor& t, const Tensor& h, const Sizes& needed) {
  Call call("transformer_block_backward");
  const Block block = block_of(call, BLOCK_ARGUMENTS, true);
  const int64_t batch = block.batch, length = block.length, width = block.width;
  const auto rows = [&](const Tensor& tensor, int64_t columns, bool half) {
    call.check(tensor.dim() == 3 && tensor.size(0) == batch && tensor.size(1) == length && tensor.size(2) == columns,
               "a saved tensor has the wrong shape");
    call.check(tensor.is_cpu() && tensor.scalar_type() == (half ? BFLOAT16 : FLOAT),
               "a saved tensor has the wrong dtype");
    call.check(tensor.numel() == 0 || (tensor.stride(2) == 1 && tensor.stride(1) == columns &&
                                       (batch == 1 || tensor.stride(0) == length * columns)),
               "a saved tensor must be contiguous");
    return Saved{const_cast<void*>(tensor.const_data_ptr()), columns, half};
  };
  BlockSaved saved = {rows(saved_qkv, 3 * width, bf16), rows(y, width, bf16)};
  saved.lse = const_cast<float*>(call.parameter(lse, {batch, heads, length}));
  saved.t = rows(t, width, false);
  saved.h = rows(h, hidden, bf16);
  const Tokens gradients = call.tokens(grad, x, length);
  call.check(needed.size() == 4, "needed must have one number for each Linear");
  Tensor d_x = empty({batch, length, width}, x);
  const auto linear = [&](int64_t number, int64_t outputs, int64_t inputs) {
    const bool wants = needed[number] != 0;
    return std::make_tuple(gradient(wants, {outputs, inputs}, x), gradient(wants, {outputs}, x));
  };
  const auto pointers = [](const auto& pair) {
    return BlockGradient::Linear{wanted(std::get<0>(pair)), wanted(std::get<1>(pair))};
  };
  const auto d_qkv = linear(0, 3 * width, width), d_proj = linear(1, width, width);
  const auto d_fc1 = linear(2, hidden, width), d_fc2 = linear(3, width, hidden);
  kernels(bf16).transformer_block_backward(
      workers_of(block), block, saved, gradients,
      {floats(d_x), pointers(d_qkv), pointers(d_proj), pointers(d_fc1), pointers(d_fc2)});
  return std::tuple_cat(std::make_tuple(d_x), d_qkv, d_proj, d_fc1, d_fc2);
}

}  // namespace

}  // namespace t2t_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(t2t_fast_native, CPU, library) {
  using namespace t2t_fast::cpu;
  library.impl("pack_linear", TORCH_BOX(&pack_linear));
  library.impl("transformer_block", TORCH_BOX(&transformer_block));
  library.impl("transformer_block_backward", TORCH_BOX(&transformer_block_backward));
}

STABLE_TORCH_LIBRARY_IMPL(t2t_fast_native, CompositeExplicitAutograd, library) {
  library.impl("packed_linear_size", TORCH_BOX(&t2t_fast::cpu::packed_linear_size));
}
