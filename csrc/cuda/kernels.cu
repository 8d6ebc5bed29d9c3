// The CUDA kernels of the soft split, the soft composition and fold-normalise-unfold, and their launches.
//
// Tiled kernels: one block per tile (plan.h); blocks walk on where there are more tiles. Neighbouring threads move
// neighbouring 16-byte vectors. Sums are in gather form and in one fixed order, so results repeat bit for bit.
// Kernels of single elements: one thread per element of the output, for windows that no tile holds.
#include <cuda_runtime_api.h>

#include "any_window.h"
#include "launch.h"
#include "tiles.h"

namespace t2t_fast::cuda {
namespace {

// The threads of a block. Copies that a phase began with copy_async are complete when the next one starts.
struct Block {
  static constexpr int32_t threads = kThreads;

  template <typename Body>
  T2T_FAST_HOST_DEVICE void phase(const Body& body) {
#if defined(__CUDA_ARCH__)
    body(static_cast<int32_t>(threadIdx.x));
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
#endif
  }
};

template <typename Body>
__device__ __forceinline__ void for_tiles(const Plan& plan, const Body& body) {
  Block block;
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) body(tile, block);
}

template <typename Body>
__device__ __forceinline__ void for_elements(int64_t count, const Body& body) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) body(i);
}

// A block reads the image rows under its tokens once each into shared memory and writes these tokens. Moves each token
// element once and each pixel once per segment and strip that needs it: (1 + (k-s)/(rows*s)) times. T: a word of the
// element's size.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    split_tiles(const __grid_constant__ Plan plan, const Image<const T*> image, T* tokens) {
  extern __shared__ __align__(16) char shared[];
  for_tiles(plan, [&](int64_t tile, Block& block) { split_tile(plan, image, tokens, tile, shared, block); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    split_elements(const __grid_constant__ SplitShape shape, const Image<const T*> image, T* tokens, int64_t count) {
  for_elements(count, [&](int64_t i) { split_element(shape, image, tokens, i); });
}

// A block stages one row of the token grid after the other, adds it to the pixel rows of its window in shared memory (a
// pixel belongs to one thread), and writes the rows that are complete. Reads each token once per segment and strip that
// needs it, writes each pixel once.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    compose_tiles(const __grid_constant__ Plan plan, const T* tokens, const Image<T*> image) {
  extern __shared__ __align__(16) char shared[];
  for_tiles(plan, [&](int64_t tile, Block& block) { compose_tile(plan, tokens, image, tile, shared, block); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    compose_elements(const __grid_constant__ SplitShape shape, const T* tokens, const Image<T*> image, int64_t count) {
  for_elements(count, [&](int64_t i) { compose_element(shape, tokens, image, i); });
}

// U diag(1/n) U^T in one kernel. Staging as above; a token row leaves as soon as the rows of its window are complete
// and divided by their overlap count, so the image exists in shared memory only. Bytes: tokens read once and written
// once, 2 T, against 2 T + 2 I for two kernels with an image of I bytes between them (FuseFormer's k7 s3 p3: I = T/5.4
// in float32, T/2.7 beside half tokens: 2.4 T and 2.7 T). Segments and strips read (k-1)/s tokens more on each side,
// mostly from the L2 cache.
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    project_tiles(const __grid_constant__ Plan plan, const T* tokens, T* out) {
  extern __shared__ __align__(16) char shared[];
  for_tiles(plan, [&](int64_t tile, Block& block) { project_tile(plan, tokens, out, tile, shared, block); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    project_elements(const __grid_constant__ SplitShape shape, const T* tokens, T* out, int64_t count) {
  for_elements(count, [&](int64_t i) { project_element(shape, tokens, out, i); });
}

#define T2T_FAST_RETURN_IF_FAILED(call) \
  if (const cudaError_t error = call; error != cudaSuccess) return error

cudaError_t current_device(Device* device) {
  int index = 0;
  T2T_FAST_RETURN_IF_FAILED(cudaGetDevice(&index));
  T2T_FAST_RETURN_IF_FAILED(cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index));
  return cudaDeviceGetAttribute(&device->shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
}

// Blocks that walk over `items`; enough to fill any device many times.
unsigned grid_of(int64_t items) { return static_cast<unsigned>(std::min<int64_t>(items, 1 << 16)); }

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T, typename Pointer>
Image<T*> typed(const Image<Pointer>& image) {
  return {static_cast<T*>(image.data), image.batch_stride, image.channel_stride, image.row_stride, image.column_stride};
}

// Launches `tiles` where a tile holds the window, else `elements`, one thread for each of `count`.
template <Work work, typename T, typename Pointer, typename Tiles, typename Elements, typename... Operands>
cudaError_t launch(const SplitShape& shape, const Image<Pointer>& image, bool tokens_aligned, int64_t count,
                   cudaStream_t stream, Tiles tiles, Elements elements, Operands... operands) {
  if (count == 0) return cudaSuccess;
  Device device;
  T2T_FAST_RETURN_IF_FAILED(current_device(&device));
  Plan plan;
  if (make_plan(plan, work, shape, sizeof(T), tokens_aligned, image, device)) {
    // More shared memory than a kernel may use without asking for it.
    const void* function = reinterpret_cast<const void*>(tiles);
    T2T_FAST_RETURN_IF_FAILED(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedMost));
    T2T_FAST_RETURN_IF_FAILED(
        cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    tiles<<<grid_of(plan.tiles), kThreads, plan.shared_bytes, stream>>>(plan, operands...);
  } else {
    elements<<<grid_of((count + kThreads - 1) / kThreads), kThreads, 0, stream>>>(shape, operands..., count);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_soft_split(const SplitShape& shape, const Image<const void*>& image, void* tokens,
                              cudaStream_t stream) {
  return with_type(shape.element, [&](auto* type) {
    using T = typename WordOf<sizeof(*type)>::type;  // a copy: only the size of an element matters
    return launch<Work::split, T>(shape, image, aligned(tokens), shape.batch * shape.tokens() * shape.width(), stream,
                                  split_tiles<T>, split_elements<T>, typed<const T>(image), static_cast<T*>(tokens));
  });
}

cudaError_t launch_soft_composition(const SplitShape& shape, const void* tokens, const Image<void*>& image,
                                    cudaStream_t stream) {
  return with_type(shape.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t count = shape.batch * shape.channels * shape.rows.pixels * shape.columns.pixels;
    return launch<Work::compose, T>(shape, image, aligned(tokens), count, stream, compose_tiles<T>, compose_elements<T>,
                                    static_cast<const T*>(tokens), typed<T>(image));
  });
}

cudaError_t launch_fold_unfold(const SplitShape& shape, const void* tokens, void* out, cudaStream_t stream) {
  return with_type(shape.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch<Work::project, T>(shape, Image<void*>{}, aligned(tokens) && aligned(out),
                                    shape.batch * shape.tokens() * shape.width(), stream, project_tiles<T>,
                                    project_elements<T>, static_cast<const T*>(tokens), static_cast<T*>(out));
  });
}

}  // namespace t2t_fast::cuda
