// Chooses the kernels of the widest instruction set that this CPU and its operating system offer.
#include "kernels.h"

#include <atomic>
#include <initializer_list>

#include "../../cpu_features.h"

namespace t2t_fast::cpu {

#if defined(__x86_64__) || defined(T2T_FAST_EMULATE_TILES)
namespace amx {
extern const Kernels table;
}
#endif
#if defined(__x86_64__)
namespace avx512_bf16 {
extern const Kernels table;
}
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

// The kernels that this CPU can run, the fastest first.
std::vector<const Kernels*> runnable(bool bf16) {
  std::vector<const Kernels*> found;
#if defined(T2T_FAST_EMULATE_TILES)
  if (bf16) found.push_back(&amx::table);
#endif
#if defined(__x86_64__)
  const bool pairs = bf16 && offers({"avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx2", "fma"});
#if !defined(T2T_FAST_EMULATE_TILES)
  if (pairs && offers({"amx_tile", "amx_bf16"}) && tiles_permitted()) found.push_back(&amx::table);
#endif
  if (pairs) found.push_back(&avx512_bf16::table);
  if (offers({"avx512f", "avx512bw", "avx512vl", "avx2", "fma"})) found.push_back(&avx512::table);
  if (offers({"avx2", "fma"})) found.push_back(&avx2::table);
#endif
  found.push_back(&baseline::table);
  return found;
}

std::atomic<const Kernels*>& chosen(bool bf16) {
  static std::atomic<const Kernels*> kernels[] = {runnable(false).front(), runnable(true).front()};
  return kernels[bf16];
}

}  // namespace

const Kernels& kernels(bool bf16) { return *chosen(bf16).load(); }

std::vector<std::string> instruction_sets(bool bf16) {
  std::vector<std::string> names;
  for (const Kernels* each : runnable(bf16)) names.push_back(each->name);
  return names;
}

bool use_instruction_set(const std::string& name, bool bf16) {
  for (const Kernels* each : runnable(bf16)) {
    if (name != each->name) continue;
    chosen(bf16).store(each);
    return true;
  }
  return false;
}

}  // namespace t2t_fast::cpu
