// What the CPU kernels of the layers are asked to do: plain pointers to float32, no torch header, no instruction set.
// kernels_*.cpp compile the same sources for one instruction set each; kernels() is the table in use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../../soft_split.h"

namespace t2t_fast::cpu {

// Who runs the tasks of a parallel region. Every task has its own index; run() returns when all have ended.
struct Workers {
  int64_t count;
  void (*run)(int64_t tasks, void (*task)(void* context, int64_t index), void* context);
};

// A batch of images (B, C, H, W) and the window that splits them. tokens() of width() values each per image.
struct Split {
  Image<const float*> image;
  int64_t batch, channels;
  Axis<int64_t> rows, columns;

  int64_t tokens() const { return rows.tokens * columns.tokens; }
  int64_t taps() const { return rows.kernel * columns.kernel; }
  int64_t width() const { return channels * taps(); }
};

// LayerNorm (where norm is set) and a Linear. Missing parameters are null; weight is (outputs, inputs).
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

// What the tokens of a sequence leave behind: lz (features), S (features, width); see performer.h.
struct KeyState {
  float *lz, *state;
};

// The tail of a token layer: projection, skip, LayerNorm, Linear, GELU, Linear, skip; dropout after the first and the
// last Linear. Missing parameters are null.
struct Tail {
  int64_t width, hidden;
  const float *proj_weight, *proj_bias, *norm_weight, *norm_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
  float norm_eps;
  double proj_drop, mlp_drop;
  uint64_t seed;
};

// Where the gradients of a Tail's parameters go, each null unless it is wanted.
struct TailGradient {
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

struct Kernels {
  const char* name;
  void (*soft_split_linear)(const Workers&, const Split&, const NormLinear&, float* out);
  // d_image: contiguous in the memory order of the image (channels-last or NCHW), or null.
  void (*soft_split_linear_backward)(const Workers&, const Split&, const NormLinear&, const float* grad,
                                     Image<float*> d_image, NormLinearGradient);
  // Keys and queries may differ in length. State: (batch, features) and (batch, features, width).
  void (*performer_attention)(const Workers&, const Performer&, int64_t batch, int64_t queries, int64_t keys, Tokens q,
                              Tokens k, Tokens v, TokensOut out, KeyState);
  void (*performer_attention_backward)(const Workers&, const Performer&, int64_t batch, int64_t queries, int64_t keys,
                                       Tokens q, Tokens k, Tokens v, Tokens grad, KeyState, TokensOut d_q,
                                       TokensOut d_k, TokensOut d_v, float* d_w);
  void (*token_mlp)(const Workers&, const Tail&, int64_t batch, int64_t length, Tokens y, Tokens v, TokensOut out);
  void (*token_mlp_backward)(const Workers&, const Tail&, int64_t batch, int64_t length, Tokens y, Tokens v,
                             Tokens grad, TokensOut d_y, TokensOut d_v, TailGradient);
  void (*performer_layer)(const Workers&, const Split&, const NormLinear&, const Performer&, const Tail&, TokensOut out,
                          KeyState);
  void (*performer_layer_backward)(const Workers&, const Split&, const NormLinear&, const Performer&, const Tail&,
                                   Tokens grad, KeyState, Image<float*> d_image, NormLinearGradient, float* d_w,
                                   TailGradient);
};

// The kernels in use: of the widest instruction set, unless another one was asked for.
const Kernels& kernels();

// Names of the instruction sets that this CPU can run, the widest first.
std::vector<std::string> instruction_sets();

// Uses the kernels of another instruction set from now on; false where this CPU cannot run them.
bool use_instruction_set(const std::string& name);

}  // namespace t2t_fast::cpu
