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

// A pre-norm transformer block, its weights packed by pack_linear (LayerNorm folded into qkv and fc1).
struct Block {
  int64_t batch, length, width, heads, hidden;
  float scale, norm1_eps, norm2_eps;
  Tokens x;
  const float *qkv, *proj, *fc1, *fc2;
  const float* factors;  // of the attention and of the MLP, (2, batch); null for 1
};

// Rows that the forward pass saves, in float32 or bfloat16; null for none.
struct Saved {
  void* data;
  int64_t row;
  bool half;

  // The rows from a column on.
  Saved from(int64_t column) const {
    return {static_cast<char*>(data) + (data ? column * (half ? 2 : 4) : 0), row, half};
  }
};

// What the backward pass of a Block reads: q, k and v; the attention's result and the logarithms of its softmax's sums
// (batch, heads, length); the sum behind the attention; fc1's output.
struct BlockSaved {
  Saved qkv, y;
  float* lse;
  Saved t, h;
};

// The backward pass of a Block whose weights are packed for it: the gradients of x, and for each Linear, behind its
// LayerNorm without affine part, the weight's gradient (outputs, inputs) and the sum of its output's (outputs); null
// unless wanted.
struct BlockGradient {
  float* x;
  struct Linear {
    float *weight, *bias;
  } qkv, proj, fc1, fc2;
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
  int64_t (*packed_linear_size)(int64_t inputs, int64_t outputs, bool back);
  void (*pack_linear)(const Workers&, const NormLinear&, bool back, float* packed);
  void (*transformer_block)(const Workers&, const Block&, TokensOut out, const BlockSaved&);
  void (*transformer_block_backward)(const Workers&, const Block&, const BlockSaved&, Tokens grad,
                                     const BlockGradient&);
};

// The kernels in use, with products of float32 or of bfloat16: of the widest instruction set, unless another one was
// asked for. Where the CPU multiplies no bfloat16, its products are of float32.
const Kernels& kernels(bool bf16 = false);

// Names of the instruction sets that this CPU can run, the fastest first.
std::vector<std::string> instruction_sets(bool bf16 = false);

// Uses the kernels of another instruction set from now on; false where this CPU cannot run them.
bool use_instruction_set(const std::string& name, bool bf16 = false);

}  // namespace t2t_fast::cpu
