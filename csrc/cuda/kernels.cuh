// What the kernels share: the block as a team, the grid, and the launch.
#pragma once

#include <cuda_runtime_api.h>

#include "any_window.h"
#include "launch.h"
#include "tiles.h"

namespace t2t_fast::cuda {

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

// What a plan has to know of the current device.
inline cudaError_t current_device(Device* device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&device->shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
}

// Blocks that walk over `items`; enough to fill any device many times.
inline unsigned grid_of(int64_t items) { return static_cast<unsigned>(std::min<int64_t>(items, 1 << 16)); }

// A tiled kernel with its shared memory, which is beyond what a kernel may use without asking.
template <typename Kernel, typename... Arguments>
cudaError_t launch_tiles(Kernel kernel, const Plan& plan, cudaStream_t stream, const Arguments&... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedMost);
  if (error != cudaSuccess) return error;
  error =
      cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  kernel<<<grid_of(plan.tiles), kThreads, plan.shared_bytes, stream>>>(plan, arguments...);
  return cudaGetLastError();
}

// One thread per element of the output.
template <typename Kernel, typename... Arguments>
cudaError_t launch_elements(Kernel kernel, int64_t count, cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<grid_of((count + kThreads - 1) / kThreads), kThreads, 0, stream>>>(arguments..., count);
  return cudaGetLastError();
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T>
Image<T*> typed(const Image<void*>& image) {
  return {static_cast<T*>(image.data), image.batch_stride, image.channel_stride, image.row_stride, image.column_stride};
}

template <typename T>
Image<const T*> typed(const Image<const void*>& image) {
  return {static_cast<const T*>(image.data), image.batch_stride, image.channel_stride, image.row_stride,
          image.column_stride};
}

}  // namespace t2t_fast::cuda
