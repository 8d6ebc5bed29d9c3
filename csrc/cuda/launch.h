// Launches of the soft split, the soft composition and fold-normalise-unfold on the current device.
#pragma once

#include <cuda_runtime_api.h>

#include "../soft_split.h"

namespace t2t_fast::cuda {

// Nothing is allocated and nothing waits, so each may be captured into a graph. Tokens are contiguous, images have any
// strides. Nothing is launched where the output is empty. Returns the launch's error.
cudaError_t launch_soft_split(const SplitShape& shape, const Image<const void*>& image, void* tokens,
                              cudaStream_t stream);
cudaError_t launch_soft_composition(const SplitShape& shape, const void* tokens, const Image<void*>& image,
                                    cudaStream_t stream);
cudaError_t launch_fold_unfold(const SplitShape& shape, const void* tokens, void* out, cudaStream_t stream);

}  // namespace t2t_fast::cuda
