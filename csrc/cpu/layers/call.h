// What the operators of the layers share: checks of their tensors, and the threads.
#pragma once

#include "../../tensors.h"
#include "kernels.h"

namespace t2t_fast::cpu {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t TOKENS_PER_WORKER = 64;  // fewer are not worth waking a thread and its scratch memory

inline Workers workers_for(int64_t tokens, int64_t per_worker = TOKENS_PER_WORKER) {
  const int64_t threads = torch::stable::get_num_threads();
  return {std::max<int64_t>(1, std::min(threads, tokens / per_worker)),
          [](int64_t tasks, void (*task)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
              for (int64_t index = begin; index < end; ++index) task(context, index);
            });
          }};
}

// The data of a float32 tensor on the CPU.
inline const float* data_of(const char* function, const Tensor& tensor) {
  check(tensor.scalar_type() == torch::headeronly::ScalarType::Float, function, "every tensor must be float32");
  check(tensor.is_cpu(), function, "every tensor must be on the CPU");
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

inline Tensor with_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// The operator that is called, and the tensors whose memory its kernels read, alive as long as this object.
class Call {
 public:
  explicit Call(const char* function) : function(function) {}

  void check(bool holds, const char* text) const { t2t_fast::check(holds, function, text); }

  // A contiguous tensor of this size; null for none.
  const float* parameter(const OptionalTensor& tensor, const Sizes& size) {
    if (!tensor) return nullptr;
    check(tensor->dim() == static_cast<int64_t>(size.size()), "a parameter has the wrong rank");
    for (size_t i = 0; i < size.size(); ++i) check(tensor->size(i) == size[i], "a parameter has the wrong shape");
    check_count(function, size);
    held_.push_back(torch::stable::contiguous(*tensor));
    return data_of(function, held_.back());
  }

  // Sequences (batch, length, width) with contiguous rows; batch and width must be those of `like`.
  Tokens tokens(const Tensor& given, const Tensor& like, int64_t length) {
    const Tensor tensor = with_rows(given);
    check(tensor.dim() == 3 && like.dim() == 3, "tokens must be 3-D");
    check(tensor.size(0) == like.size(0) && tensor.size(1) == length && tensor.size(2) == like.size(2),
          "tokens must agree in batch, length and width");
    check_count(function, {tensor.size(0), tensor.size(1), tensor.size(2)});
    held_.push_back(tensor);
    return {data_of(function, tensor), tensor.stride(0), tensor.stride(1)};
  }

  const char* const function;

 private:
  std::vector<Tensor> held_;
};

inline TokensOut out_of(const Tensor& tensor) { return {floats(tensor), tensor.stride(0), tensor.stride(1)}; }

// A gradient; an empty tensor stands for one that is not wanted.
inline Tensor gradient(bool wanted, const Sizes& size, const Tensor& like) {
  return empty(wanted ? size : Sizes{0}, like);
}

inline float* wanted(const Tensor& gradient) { return gradient.numel() == 0 ? nullptr : floats(gradient); }

}  // namespace t2t_fast::cpu
