// The soft composition and fold-normalise-unfold: sums over the tokens that cover a pixel, in gather form and in one
// fixed order, so that results repeat bit by bit. Half types are summed in float32.
#include "kernels.cuh"

namespace t2t_fast::cuda {
namespace {

// Grid: one block per tile (plan.h), walking on where there are more tiles than blocks. A block stages one row of the
// token grid after the other (16-byte copies, neighbouring threads neighbouring vectors), adds it to the pixel rows of
// its window in shared memory (a pixel is one thread's), and writes the rows that are complete.
// Reads each token once per segment and strip that needs it, writes each pixel once.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    compose_tiles(const __grid_constant__ Plan plan, const T* tokens, const Image<T*> image) {
  extern __shared__ __align__(16) char shared[];
  Block block;
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    compose_tile(plan, tokens, image, tile, shared, block);
  }
}

// Grid: one thread per pixel and channel, walking on. Reads the tokens that cover the pixel, writes the pixel.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    compose_elements(const __grid_constant__ SplitShape shape, const T* tokens, const Image<T*> image, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    compose_element(shape, tokens, image, i);
  }
}

// U diag(1/n) U^T in one kernel. Grid and staging as above; a token row leaves as soon as the rows of its window are
// complete and divided by their overlap count, so the image exists in shared memory only. Bytes: tokens read once and
// written once, 2 T, against 2 T + 2 I for two kernels with an image of I bytes between them (FuseFormer's k7 s3 p3:
// I = T/5.4 in float32, T/2.7 beside half tokens: 2.4 T and 2.7 T). Segments and strips read (k-1)/s tokens more on
// each side, mostly from the L2 cache.
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    project_tiles(const __grid_constant__ Plan plan, const T* tokens, T* out) {
  extern __shared__ __align__(16) char shared[];
  Block block;
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    project_tile(plan, tokens, out, tile, shared, block);
  }
}

// Grid: one thread per element of the tokens, walking on. Reads the tokens that cover its pixel, writes their mean.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    project_elements(const __grid_constant__ SplitShape shape, const T* tokens, T* out, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    project_element(shape, tokens, out, i);
  }
}

template <typename T>
cudaError_t compose(const SplitShape& shape, const void* tokens, const Image<void*>& image, int64_t count,
                    const Device& device, cudaStream_t stream) {
  Plan plan;
  const T* in = static_cast<const T*>(tokens);
  if (make_plan(plan, Work::compose, shape, sizeof(T), aligned(tokens), image, device)) {
    return launch_tiles(compose_tiles<T>, plan, stream, in, typed<T>(image));
  }
  return launch_elements(compose_elements<T>, count, stream, shape, in, typed<T>(image));
}

template <typename T>
cudaError_t project(const SplitShape& shape, const void* tokens, void* out, int64_t count, const Device& device,
                    cudaStream_t stream) {
  Plan plan;
  const T* in = static_cast<const T*>(tokens);
  T* to = static_cast<T*>(out);
  const bool both_aligned = aligned(tokens) && aligned(out);
  if (make_plan(plan, Work::project, shape, sizeof(T), both_aligned, Image<void*>{}, device)) {
    return launch_tiles(project_tiles<T>, plan, stream, in, to);
  }
  return launch_elements(project_elements<T>, count, stream, shape, in, to);
}

}  // namespace

cudaError_t launch_soft_composition(const SplitShape& shape, const void* tokens, const Image<void*>& image,
                                    cudaStream_t stream) {
  const int64_t count = shape.batch * shape.channels * shape.rows.pixels * shape.columns.pixels;
  if (count == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  switch (shape.element) {
    case Element::float16: return compose<Float16>(shape, tokens, image, count, device, stream);
    case Element::bfloat16: return compose<BFloat16>(shape, tokens, image, count, device, stream);
    case Element::float32: return compose<float>(shape, tokens, image, count, device, stream);
    case Element::float64: return compose<double>(shape, tokens, image, count, device, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_fold_unfold(const SplitShape& shape, const void* tokens, void* out, cudaStream_t stream) {
  const int64_t count = shape.batch * shape.channels * shape.rows.tokens * shape.rows.kernel * shape.columns.tokens *
                        shape.columns.kernel;
  if (count == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  switch (shape.element) {
    case Element::float16: return project<Float16>(shape, tokens, out, count, device, stream);
    case Element::bfloat16: return project<BFloat16>(shape, tokens, out, count, device, stream);
    case Element::float32: return project<float>(shape, tokens, out, count, device, stream);
    case Element::float64: return project<double>(shape, tokens, out, count, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace t2t_fast::cuda
