// The native operators on CUDA: tensors in and out, the device and its current stream; launches wait for nothing.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../tensors.h"
#include "launch.h"

// The only symbol of PyTorch's CUDA libraries that is used. Weak, so that this file also loads where PyTorch has none.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace t2t_fast {
namespace {

cudaStream_t current_stream(const Tensor& tensor, const char* function) {
  check(aoti_torch_get_current_cuda_stream != nullptr, function, "this PyTorch is built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error, const char* function) {
  check(error == cudaSuccess, function, cudaGetErrorString(error));
}

Tensor soft_split_cuda(const Tensor& x, Sizes kernel, Sizes stride, Sizes padding) {
  const char* function = "soft_split";
  check(x.dim() == 4, function, "x must be 4-D");
  const SplitShape shape = split_shape(function, x.size(0), x.size(1), {x.size(2), x.size(3)}, kernel, stride, padding,
                                       element_of(x, function));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor tokens = empty_tokens(shape, x);
  check_launch(cuda::launch_soft_split(shape, image_of(x), tokens.mutable_data_ptr(), current_stream(x, function)),
               function);
  return tokens;
}

Tensor soft_composition_cuda(const Tensor& tokens, Sizes size, Sizes kernel, Sizes stride, Sizes padding,
                             bool channels_last) {
  const char* function = "soft_composition";
  const SplitShape shape = composition_shape(function, tokens, size, kernel, stride, padding);
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const Tensor dense = torch::stable::contiguous(tokens);
  Tensor image = empty_image(shape, tokens, channels_last);
  const Image<void*> target = {image.mutable_data_ptr(), image.stride(0), image.stride(1), image.stride(2),
                               image.stride(3)};
  check_launch(cuda::launch_soft_composition(shape, dense.const_data_ptr(), target, current_stream(tokens, function)),
               function);
  return image;
}

Tensor fused_fold_unfold_cuda(const Tensor& tokens, Sizes size, Sizes kernel, Sizes stride, Sizes padding) {
  const char* function = "fused_fold_unfold";
  const SplitShape shape = composition_shape(function, tokens, size, kernel, stride, padding);
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const Tensor dense = torch::stable::contiguous(tokens);
  Tensor out = empty_tokens(shape, tokens);
  check_launch(
      cuda::launch_fold_unfold(shape, dense.const_data_ptr(), out.mutable_data_ptr(), current_stream(tokens, function)),
      function);
  return out;
}

}  // namespace
}  // namespace t2t_fast

STABLE_TORCH_LIBRARY_IMPL(t2t_fast_native, CUDA, library) {
  library.impl("soft_split", TORCH_BOX(&t2t_fast::soft_split_cuda));
  library.impl("soft_composition", TORCH_BOX(&t2t_fast::soft_composition_cuda));
  library.impl("fused_fold_unfold", TORCH_BOX(&t2t_fast::fused_fold_unfold_cuda));
}
