// What the CPU kernels of the layers are asked to do: plain pointers to float32, no torch header, no instruction set.
// kernels_*.cpp compile the same sources for one instruction set each; kernels() is the table in use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../../soft_split.h"

namespace t2t_fast::cpu {

// The threads of a parallel region. Every task has its own index; run() returns when all have ended.
struct Workers {
  int64_t count;
  void (*run)(int64_t tasks, void (*task)(void* context, int64_t index), void* context);
};

// A batch of images (B, C, H, W) and the window that splits them.
struct Split : SplitShape {
  Image<const float*> image;
};

// LayerNorm (where `norm` is set) and a Linear. Missing parameters are null; weight is (outputs, inputs).
struct NormLinear {
  int64_t inputs, outputs;
  const float *weight, *bias;
  bool norm;
  const float *norm_weight, *norm_bias;
  float norm_eps;
};

// Where the gradients of a NormLinear go, each null unless it is wanted.
struct NormLinearGradient {
  float *weight, *bias, *norm_weight, *norm_bias;
};

// Random features w (features, width) and eps of the Performer.
struct Performer {
  int64_t width, features;
  const float* w;
  double eps;
};

// The sums over a sequence's keys: lz (features), S (features, width); see performer_attention.inl.
struct KeyState {
  float *lz, *state;
};

// token_mlp: projection, skip, LayerNorm, Linear, GELU, Linear, skip; dropout after the first and the
// last Linear. Missing parameters are null.
struct MlpParameters {
  int64_t width, hidden;
  const float *proj_weight, *proj_bias, *norm_weight, *norm_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
  float norm_eps;
  double proj_drop, mlp_drop;
  uint64_t seed;
};

// Where the gradients of a MlpParameters's parameters go, each null unless it is wanted.
struct MlpGradient {
  float *proj_weight, *proj_bias, *norm_weight, *norm_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
};

// Sequences (batch, length, width) by their strides; rows of width floats are contiguous.
template <typename Pointer>
struct Sequences {
  Pointer data;
  int64_t batch_stride, row;

  Pointer at(int64_t image, int64_t token) const { return data + image * batch_stride + token * row; }
};
using Tokens = Sequences<const float*>;
using TokensOut = Sequences<float*>;

// ---- the arguments of the operators, and where their gradients go

struct SplitLinear {
  Split split;
  NormLinear linear;
};

struct SplitLinearGradient {
  Image<float*> image;  // contiguous in the memory order of the image (channels-last or NCHW); null unless it is wanted
  NormLinearGradient linear;
};

// Queries and keys may differ in length. The key state (batch, features) and (batch, features, width) is written by the
// forward pass and read by the backward pass.
struct Attention {
  Performer performer;
  int64_t batch, queries, keys;
  Tokens q, k, v;
  KeyState state;
};

struct AttentionGradient {
  TokensOut q, k, v;
  float* w;  // null unless it is wanted
};

struct TokenMlp {
  MlpParameters mlp;
  int64_t batch, length;
  Tokens y, v;
};

struct TokenMlpGradient {
  TokensOut y, v;
  MlpGradient mlp;
};

struct PerformerLayer {
  SplitLinear kqv;
  Performer performer;
  MlpParameters mlp;
  KeyState state;
};

struct PerformerLayerGradient {
  SplitLinearGradient kqv;
  float* w;  // null unless it is wanted
  MlpGradient mlp;
};

struct Kernels {
  const char* name;
  void (*soft_split_linear)(const Workers&, const SplitLinear&, float* out);
  void (*soft_split_linear_backward)(const Workers&, const SplitLinear&, const float* grad, const SplitLinearGradient&);
  void (*performer_attention)(const Workers&, const Attention&, TokensOut out);
  void (*performer_attention_backward)(const Workers&, const Attention&, Tokens grad, const AttentionGradient&);
  void (*token_mlp)(const Workers&, const TokenMlp&, TokensOut out);
  void (*token_mlp_backward)(const Workers&, const TokenMlp&, Tokens grad, const TokenMlpGradient&);
  void (*performer_layer)(const Workers&, const PerformerLayer&, TokensOut out);
  void (*performer_layer_backward)(const Workers&, const PerformerLayer&, Tokens grad, const PerformerLayerGradient&);
};

// The kernels in use: of the widest instruction set, unless another one was asked for.
const Kernels& kernels();

// Names of the instruction sets that this CPU can run, the widest first.
std::vector<std::string> instruction_sets();

// Uses the kernels of another instruction set from now on; false where this CPU cannot run them.
bool use_instruction_set(const std::string& name);

}  // namespace t2t_fast::cpu
