// The library t2t_fast._ops: schemas of the native operators. Python defines their fakes and gradients and checks their
// arguments (t2t_fast/functional/); cpu/ and cuda/ register the kernels.
// Written against LibTorch's stable ABI, so one build serves every torch from 2.11 on.
#include <torch/csrc/stable/library.h>

#define T2T_FAST_WINDOW "int[] kernel, int[] stride, int[] padding"
#define T2T_FAST_LINEAR "Tensor weight, Tensor? bias, Tensor? norm1_weight, Tensor? norm1_bias, float? norm1_eps, "
#define T2T_FAST_MLP                                                                                            \
  "Tensor proj_weight, Tensor? proj_bias, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, "             \
  "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, float proj_drop, float mlp_drop, " \
  "Tensor? seed"
#define T2T_FAST_LAYER "Tensor x, " T2T_FAST_LINEAR T2T_FAST_WINDOW ", Tensor w, float eps, " T2T_FAST_MLP
// The four Linears are packed (pack_linear); `factors` (2, B): of the attention and of the MLP of every sample.
#define T2T_FAST_BLOCK                                                                                               \
  "Tensor x, Tensor qkv, Tensor proj, Tensor fc1, Tensor fc2, int heads, int hidden, float scale, float norm1_eps, " \
  "float norm2_eps, Tensor? factors, bool bf16"

STABLE_TORCH_LIBRARY(t2t_fast_native, library) {
  library.def("soft_split(Tensor x, int[] kernel, int[] stride, int[] padding) -> Tensor");
  // The image is contiguous in channels-last memory if so asked, else in the order (B, C, H, W).
  library.def(
      "soft_composition(Tensor tokens, int[] size, int[] kernel, int[] stride, int[] padding, bool channels_last) "
      "-> Tensor");
  library.def("fused_fold_unfold(Tensor tokens, int[] size, int[] kernel, int[] stride, int[] padding) -> Tensor");
  // With `bf16`, matrix products are of bfloat16 where the CPU multiplies it; all else stays float32.
  // A backward gives its gradients in the order of the forward's tensors; an empty one was not wanted, or belongs to a
  // parameter that is missing. An image's gradient comes in the memory order of the image: (B, H, W, C) where channels
  // are adjacent.
  library.def("soft_split_linear(Tensor x, " T2T_FAST_LINEAR T2T_FAST_WINDOW ", bool bf16=False) -> Tensor");
  library.def("soft_split_linear_backward(Tensor grad, Tensor x, " T2T_FAST_LINEAR T2T_FAST_WINDOW
              ", bool need_image, bool need_weight, bool bf16=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Also the key state lz and S that backward needs.
  library.def(
      "performer_attention(Tensor q, Tensor k, Tensor v, Tensor w, float eps, bool bf16=False) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "performer_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor w, float eps, Tensor lz, "
      "Tensor state, bool need_w, bool bf16=False) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("token_mlp(Tensor y, Tensor v, " T2T_FAST_MLP ", bool bf16=False) -> Tensor");
  library.def("token_mlp_backward(Tensor grad, Tensor y, Tensor v, " T2T_FAST_MLP
              ", bool bf16=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("performer_layer(" T2T_FAST_LAYER ", bool bf16=False) -> (Tensor, Tensor, Tensor)");
  library.def("performer_layer_backward(Tensor grad, " T2T_FAST_LAYER
              ", Tensor lz, Tensor state, bool need_image, bool need_weight, bool need_w, bool bf16=False) -> (Tensor, "
              "Tensor, Tensor, "
              "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The instruction set whose CPU kernels run, with products of float32 or of bfloat16; `use` changes it for the whole
  // process (tests compare them).
  library.def("cpu_instruction_set(str use=\"\", bool bf16=False) -> str");
  // A Linear with LayerNorm's affine part folded into it, in the layout of the instruction set in use; `back`: for the
  // gradient of its input.
  library.def(
      "pack_linear(Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, bool bf16, bool back) "
      "-> Tensor");
  library.def("packed_linear_size(int inputs, int outputs, bool bf16, bool back) -> int");
  // Also what backward needs, empty unless `save`: qkv, the attention's result and log-sum-exp, the sum behind it,
  // fc1's output.
  library.def("transformer_block(" T2T_FAST_BLOCK ", bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The gradient of x, and of each Linear those of its weight, behind its LayerNorm without affine part, and of its
  // bias, empty unless `needed` has a 1 for it. The Linears are packed for the gradient of their inputs.
  library.def("transformer_block_backward(Tensor grad, " T2T_FAST_BLOCK
              ", Tensor saved_qkv, Tensor y, Tensor lse, Tensor t, Tensor h, int[] needed) -> (Tensor, Tensor, Tensor, "
              "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Most bytes of scratch memory that the CPU kernels had in use at a time since the last call with `restart`.
  library.def("scratch_bytes(bool restart=False) -> int");
}
