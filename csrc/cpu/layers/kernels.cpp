// Chooses the kernels of the widest instruction set that this CPU and its operating system offer.
#include "kernels.h"

#include <atomic>
#include <initializer_list>

#include "../../cpu_features.h"

namespace t2t_fast::cpu {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#endif
namespace baseline {
extern const Kernels table;
}

namespace {

bool offers(std::initializer_list<const char*> needed) {
  for (const CpuFeature& feature : cpu_features()) {
    for (const char* name : needed)
      if (feature.name == name && !feature.present) return false;
  }
  return true;
}

// The kernels that this CPU can run, the widest first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  if (offers({"avx512f", "avx512bw", "avx512vl", "avx2", "fma"})) found.push_back(&avx512::table);
  if (offers({"avx2", "fma"})) found.push_back(&avx2::table);
#endif
  found.push_back(&baseline::table);
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{runnable().front()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* each : runnable()) names.push_back(each->name);
  return names;
}

bool use_instruction_set(const std::string& name) {
  for (const Kernels* each : runnable()) {
    if (name != each->name) continue;
    chosen().store(each);
    return true;
  }
  return false;
}

}  // namespace t2t_fast::cpu
