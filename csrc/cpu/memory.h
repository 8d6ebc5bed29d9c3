// Scratch memory and huge pages. The first touch of a fresh page costs more than the arithmetic on it: 2 GB/s in pages
// of 4 KB on a virtual machine, 11 GB/s in huge pages, 28 GB/s once the page is mapped.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace t2t_fast {

constexpr std::size_t HUGE_PAGE = std::size_t{2} << 20;

// Asks the system for huge pages under [data, data + bytes). Nothing else changes, so a refusal is ignored.
inline void expect_full_use(void* data, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// The process's pool of uninitialised blocks. It keeps up to LIMIT bytes of those that were given back, so that the
// next call finds pages that are already mapped.
class Scratch {
 public:
  struct Block {
    void* data;
    std::size_t bytes;
  };

  static Block take(std::size_t bytes) {
    Scratch& scratch = process();
    {
      const std::lock_guard<std::mutex> guard(scratch.mutex_);
      auto best = scratch.kept_.end();
      for (auto block = scratch.kept_.begin(); block != scratch.kept_.end(); ++block) {
        const bool fits = block->bytes >= bytes && block->bytes / 2 <= bytes;
        if (fits && (best == scratch.kept_.end() || block->bytes < best->bytes)) best = block;
      }
      if (best != scratch.kept_.end()) {
        const Block found = *best;
        scratch.kept_.erase(best);
        scratch.held_ -= found.bytes;
        scratch.count(found.bytes);
        return found;
      }
    }
    const std::size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 64;
    const std::size_t step = EXACT ? 1 : alignment;
    const std::size_t size = (std::max<std::size_t>(bytes, 1) + step - 1) / step * step;
    void* data = nullptr;
    if (posix_memalign(&data, alignment, size) != 0) throw std::bad_alloc();
    expect_full_use(data, size);
    const std::lock_guard<std::mutex> guard(scratch.mutex_);
    scratch.count(size);
    return {data, size};
  }

  static void give_back(Block block) noexcept {
    Scratch& scratch = process();
    {
      const std::lock_guard<std::mutex> guard(scratch.mutex_);
      scratch.in_use_ -= block.bytes;
      if (scratch.held_ + block.bytes <= LIMIT && scratch.kept_.size() < scratch.kept_.capacity()) {
        scratch.kept_.push_back(block);
        scratch.held_ += block.bytes;
        return;
      }
    }
    std::free(block.data);
  }

  // Most bytes in use at a time since the last call with `restart`.
  static std::size_t most_in_use(bool restart) {
    Scratch& scratch = process();
    const std::lock_guard<std::mutex> guard(scratch.mutex_);
    const std::size_t most = scratch.most_;
    if (restart) scratch.most_ = scratch.in_use_;
    return most;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool EXACT = true;  // a block ends where it was asked to end, so that the sanitizer sees overruns
#else
  static constexpr bool EXACT = false;
#endif
  static constexpr std::size_t LIMIT = EXACT ? 0 : std::size_t{64} << 20;

  Scratch() { kept_.reserve(1024); }  // giving back must not allocate

  static Scratch& process() {
    static Scratch* const scratch = new Scratch;  // never destroyed: threads may outlive static objects
    return *scratch;
  }

  void count(std::size_t bytes) {
    in_use_ += bytes;
    most_ = std::max(most_, in_use_);
  }

  std::mutex mutex_;
  std::vector<Block> kept_;
  std::size_t held_ = 0, in_use_ = 0, most_ = 0;
};

// Uninitialised scratch memory for `count` values of T, aligned to 64 bytes. SPARE more values behind them may be read
// and written; their contents are undefined.
template <typename T, int64_t SPARE = 0>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { reserve(count); }
  Buffer(Buffer&& other) noexcept : block_(std::exchange(other.block_, {})), count_(std::exchange(other.count_, -1)) {}
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() { release(); }

  // At least `count` values; what the buffer held is lost where it must grow.
  T* reserve(int64_t count) {
    if (count > count_) {
      release();
      block_ = Scratch::take(static_cast<std::size_t>(count + SPARE) * sizeof(T));
      count_ = count;
    }
    return *this;
  }

  operator T*() const { return static_cast<T*>(block_.data); }

 private:
  void release() {
    if (block_.data != nullptr) Scratch::give_back(block_);
    block_ = {};
    count_ = -1;
  }

  Scratch::Block block_{};
  int64_t count_ = -1;
};

}  // namespace t2t_fast
