// The soft split: a copy, so its kernels know elements by their size only.
#include "kernels.cuh"

namespace t2t_fast::cuda {
namespace {

// Grid: one block per tile (plan.h), walking on where there are more tiles than blocks. A block writes the tokens of
// some rows of the grid, for all or some channels; neighbouring threads write neighbouring 16-byte vectors of them. It
// reads the image rows under these tokens once each, into shared memory.
// Moves each token element once and each pixel once per segment and strip that needs it: (1 + (k-s)/(rows*s)) times.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    split_tiles(const __grid_constant__ Plan plan, const Image<const T*> image, T* tokens) {
  extern __shared__ __align__(16) char shared[];
  Block block;
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    split_tile(plan, image, tokens, tile, shared, block);
  }
}

// Grid: one thread per element of the tokens, walking on. Reads its pixel, writes it.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    split_elements(const __grid_constant__ SplitShape shape, const Image<const T*> image, T* tokens, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    split_element(shape, image, tokens, i);
  }
}

template <typename T>
cudaError_t launch(const SplitShape& shape, const Image<const void*>& image, void* tokens, int64_t count,
                   cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  Plan plan;
  T* out = static_cast<T*>(tokens);
  if (make_plan(plan, Work::split, shape, sizeof(T), aligned(tokens), image, device)) {
    return launch_tiles(split_tiles<T>, plan, stream, typed<T>(image), out);
  }
  return launch_elements(split_elements<T>, count, stream, shape, typed<T>(image), out);
}

}  // namespace

cudaError_t launch_soft_split(const SplitShape& shape, const Image<const void*>& image, void* tokens,
                              cudaStream_t stream) {
  const int64_t count = shape.batch * shape.channels * shape.rows.tokens * shape.rows.kernel * shape.columns.tokens *
                        shape.columns.kernel;
  if (count == 0) return cudaSuccess;
  switch (shape.element) {
    case Element::float16:
    case Element::bfloat16: return launch<uint16_t>(shape, image, tokens, count, stream);
    case Element::float32: return launch<uint32_t>(shape, image, tokens, count, stream);
    case Element::float64: return launch<uint64_t>(shape, image, tokens, count, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace t2t_fast::cuda
