// The CUDA kernels of the soft split on a CPU: tiles, phases and threads run sequentially, and each access to tensors
// and shared memory is checked. Built and called by test_geometry.py.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cuda/any_window.h"
#include "../../csrc/cuda/tiles.h"

namespace {

struct Range {
  const char *begin = nullptr, *end = nullptr;
  bool holds(const void* address) const { return address >= begin && address < end; }
};

// The last accesses to an element of shared memory: their phases and threads (-1: several threads).
struct Last {
  int64_t write_phase = -1, read_phase = -1;
  int32_t writer = -1, reader = -1;
};

struct Watch {
  Range input, input_zone, output, output_zone, shared, shared_zone;  // a zone includes the memory around the range
  std::vector<uint32_t> writes;
  std::vector<Last> last;
  int64_t phase = 0, tile_phase = 0;
  int32_t thread = 0;
  bool whole_phases = false;
  std::string fault;

  void fail(const char* text) {
    if (fault.empty()) fault = text;
  }

  void read(const void* address) {
    if (input_zone.holds(address) && !input.holds(address)) fail("read outside the input");
    if (output_zone.holds(address)) fail("read of the output");
    if (shared_zone.holds(address) && !shared.holds(address)) fail("read outside the shared memory");
    if (!shared.holds(address)) return;
    Last& at = last[static_cast<const char*>(address) - shared.begin];
    if (at.write_phase < tile_phase) fail("read of shared memory that the tile has not written");
    if (at.write_phase == phase && at.writer != thread) fail("race: read of what another thread writes");
    at.reader = at.read_phase == phase && at.reader != thread ? -1 : thread;
    at.read_phase = phase;
  }

  void write(const void* address, size_t bytes) {
    if (input_zone.holds(address)) fail("write to the input");
    if (output_zone.holds(address)) {
      if (!output.holds(address)) return fail("write outside the output");
      ++writes[(static_cast<const char*>(address) - output.begin) / bytes];
    }
    if (shared_zone.holds(address) && !shared.holds(address)) fail("write outside the shared memory");
    if (!shared.holds(address)) return;
    Last& at = last[static_cast<const char*>(address) - shared.begin];
    if (at.write_phase == phase && at.writer != thread) fail("race: two threads write one element");
    if (at.read_phase == phase && at.reader != thread) fail("race: write of what another thread reads");
    at.write_phase = phase;
    at.writer = thread;
  }
};

Watch watch;

}  // namespace

namespace t2t_fast::cuda {

// A number whose reads and writes are checked.
template <typename Number>
struct Watched {
  Number number;
  Watched() = default;
  explicit Watched(Number value) : number(value) {}
  Watched(const Watched& other) : number(other.number) { watch.read(&other); }
  Watched& operator=(const Watched& other) {
    watch.read(&other);
    watch.write(this, sizeof(Number));
    number = other.number;
    return *this;
  }
  Watched& operator+=(const Watched& other) { return *this = *this + other; }
  friend Watched operator+(const Watched& a, const Watched& b) {
    watch.read(&a);
    watch.read(&b);
    return Watched(a.number + b.number);
  }
  friend Watched operator/(const Watched& a, const Watched& b) { return Watched(a.number / b.number); }
};

struct Brain {  // bfloat16
  uint16_t bits;
};

}  // namespace t2t_fast::cuda

namespace t2t_fast {

template <>
struct SumOf<cuda::Watched<float>> {
  using type = cuda::Watched<float>;
};
template <>
struct SumOf<cuda::Watched<double>> {
  using type = cuda::Watched<double>;
};
template <>
struct SumOf<cuda::Watched<cuda::Brain>> {
  using type = cuda::Watched<float>;
};

}  // namespace t2t_fast

namespace t2t_fast::cuda {

template <typename Number>
Watched<Number> to_sum(const Watched<Number>& value) {
  return value;
}

inline Watched<float> to_sum(const Watched<Brain>& value) {
  watch.read(&value);
  return Watched<float>(to_sum(BFloat16{value.number.bits}));
}

inline void convert(const Watched<float>& from, Watched<Brain>& to) {
  watch.read(&from);
  BFloat16 rounded;
  convert(from.number, rounded);
  to = Watched<Brain>(Brain{rounded.bits});
}

// A block whose threads run one after the other, in ascending or descending order.
struct Threads {
  int32_t threads;
  bool descending;

  template <typename Body>
  void phase(const Body& body) {
    ++watch.phase;
    for (int32_t i = 0; i < threads; ++i) {
      watch.thread = descending ? threads - 1 - i : i;
      body(watch.thread);
    }
  }
};

}  // namespace t2t_fast::cuda

namespace {

using namespace t2t_fast;
using namespace t2t_fast::cuda;

struct Call {
  int32_t work, plain, threads, descending;
  Device device;
  int64_t batch, channels, rows[5], columns[5];  // pixels, tokens, kernel, stride, padding
  int64_t strides[4];                            // of the image: batch, channel, row, column
  const void *input, *input_begin, *input_end, *input_zone_begin, *input_zone_end;
  void* output;
  const void *output_begin, *output_end, *output_zone_begin, *output_zone_end;
};

template <typename T>
int run(const Call& call) {
  const auto axis = [](const int64_t* a) { return Axis<int64_t>{a[0], a[1], a[2], a[3], a[4]}; };
  const SplitShape shape{call.batch, call.channels, axis(call.rows), axis(call.columns), Element::float32};
  const Work work = static_cast<Work>(call.work);
  const T* input = static_cast<const T*>(call.input);
  T* output = static_cast<T*>(call.output);
  const Image<const T*> source{input, call.strides[0], call.strides[1], call.strides[2], call.strides[3]};
  const Image<T*> target{output, call.strides[0], call.strides[1], call.strides[2], call.strides[3]};
  const int64_t tokens = shape.batch * shape.channels * shape.rows.tokens * shape.rows.kernel * shape.columns.tokens *
                         shape.columns.kernel;
  const int64_t pixels = shape.batch * shape.channels * shape.rows.pixels * shape.columns.pixels;

  if (call.plain) {
    for (int64_t i = 0; i < (work == Work::compose ? pixels : tokens); ++i) {
      if (work == Work::split) split_element(shape, source, output, i);
      if (work == Work::compose) compose_element(shape, input, target, i);
      if (work == Work::project) project_element(shape, input, output, i);
    }
    return 0;
  }
  Plan plan;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const bool both = work == Work::split     ? aligned(output)
                    : work == Work::compose ? aligned(input)
                                            : aligned(input) && aligned(output);
  const bool found = work == Work::compose
                         ? make_plan(plan, work, shape, sizeof(T), both, target, call.device)
                         : make_plan(plan, work, shape, sizeof(T), both, source, call.device);
  if (!found) return 1;
  constexpr int kGuard = 64 * 1024;
  std::vector<Pack<char>> memory((plan.shared_bytes + 2 * kGuard) / 16 + 1);
  char* shared = reinterpret_cast<char*>(memory.data()) + kGuard;
  watch.shared = {shared, shared + plan.shared_bytes};
  watch.shared_zone = {shared - kGuard, shared + plan.shared_bytes + kGuard};
  watch.last.assign(plan.shared_bytes, Last{});
  Threads team{call.threads, call.descending != 0};
  for (int64_t tile = 0; tile < plan.tiles; ++tile) {
    std::memset(shared, 0xff, plan.shared_bytes);
    watch.tile_phase = watch.phase + 1;
    if (work == Work::split) split_tile(plan, source, output, tile, shared, team);
    if (work == Work::compose) compose_tile(plan, input, target, tile, shared, team);
    if (work == Work::project) project_tile(plan, input, output, tile, shared, team);
  }
  return 0;
}

void begin(const Call& call, int64_t element) {
  const auto range = [](const void* a, const void* b) {
    return Range{static_cast<const char*>(a), static_cast<const char*>(b)};
  };
  watch = Watch{};
  watch.input = range(call.input_begin, call.input_end);
  watch.input_zone = range(call.input_zone_begin, call.input_zone_end);
  watch.output = range(call.output_begin, call.output_end);
  watch.output_zone = range(call.output_zone_begin, call.output_zone_end);
  watch.writes.assign((watch.output.end - watch.output.begin) / element, 0);
}

}  // namespace

extern "C" {

// Returns 0 on success, 1 if the window does not fit into a tile. `type`: 0 float32, 1 float64, 2 bfloat16.
int t2t_run(const Call* call, int32_t type) {
  const int64_t bytes[] = {4, 8, 2};
  begin(*call, bytes[type]);
  if (type == 0) return run<Watched<float>>(*call);
  if (type == 1) return run<Watched<double>>(*call);
  return run<Watched<Brain>>(*call);
}

const char* t2t_fault() { return watch.fault.c_str(); }

const uint32_t* t2t_writes() { return watch.writes.data(); }

// Writes the plan of a call for elements of `bytes` to `out`; returns 0 if there is none.
int t2t_plan(const Call* call, int32_t bytes, int64_t* out) {
  const auto axis = [](const int64_t* a) { return Axis<int64_t>{a[0], a[1], a[2], a[3], a[4]}; };
  const SplitShape shape{call->batch, call->channels, axis(call->rows), axis(call->columns), Element::float32};
  const Image<const void*> image{nullptr, call->strides[0], call->strides[1], call->strides[2], call->strides[3]};
  Plan plan;
  if (!make_plan(plan, static_cast<Work>(call->work), shape, bytes, true, image, call->device)) return 0;
  const int64_t values[] = {plan.tiles, plan.segment, plan.strip, plan.group,       plan.shared_bytes,
                            plan.run,   plan.vectors, plan.image.vectors, plan.image.along_channels};
  std::memcpy(out, values, sizeof(values));
  return 1;
}

int64_t t2t_axis(const int64_t* a, int32_t wide, int32_t what, int64_t x, int64_t y) {
  const Axis<int64_t> big{a[0], a[1], a[2], a[3], a[4]};
  const Axis<int32_t> small{static_cast<int32_t>(a[0]), static_cast<int32_t>(a[1]), static_cast<int32_t>(a[2]),
                            static_cast<int32_t>(a[3]), static_cast<int32_t>(a[4])};
  const auto answer = [&](const auto& axis) -> int64_t {
    using Index = decltype(axis.pixels);
    const Index i = static_cast<Index>(x), j = static_cast<Index>(y);
    switch (what) {
      case 0: return token_count<Index>(axis.pixels, axis.kernel, axis.stride, axis.padding);
      case 1: return pixel_of(axis, i, j);
      case 2: return inside(axis, i);
      case 3: return first_token(axis, i);
      case 4: return last_token(axis, i);
      case 5: return tap_of(axis, i, j);
      default: return overlap(axis, i);
    }
  };
  return wide ? answer(big) : answer(small);
}

// The number of wrong quotients among first..first+count-1.
int64_t t2t_divide_faults(int64_t divisor, int64_t first, int64_t count) {
  const Divider by = divider(divisor);
  int64_t faults = 0;
  for (int64_t n = first; n < first + count; ++n) faults += divide(by, static_cast<int32_t>(n)) != n / divisor;
  return faults;
}
}
