// Which instruction sets this CPU offers and the operating system saves, found at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace t2t_fast {

struct CpuFeature {
  std::string name;  // as /proc/cpuinfo spells it on x86
  bool present;
};

#if defined(__x86_64__) || defined(__i386__)

namespace detail {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// Zeros where the CPU does not know the leaf.
inline Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

// XCR0: the register states that the operating system saves at a context switch. Valid only where OSXSAVE is set.
inline std::uint64_t saved_states() {
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

inline bool bit(unsigned word, int position) { return (word >> position) & 1u; }

}  // namespace detail

inline std::vector<CpuFeature> cpu_features() {
  using detail::bit;
  const detail::Registers leaf1 = detail::cpuid(1, 0);
  const detail::Registers leaf7 = detail::cpuid(7, 0);
  const detail::Registers leaf7_1 = leaf7.eax >= 1 ? detail::cpuid(7, 1) : detail::Registers{};

  // An instruction set whose registers are not saved faults or loses data, whatever cpuid says.
  const std::uint64_t saved = bit(leaf1.ecx, 27) ? detail::saved_states() : 0;
  const bool ymm = (saved & 0x6) == 0x6;
  const bool zmm = (saved & 0xe6) == 0xe6;
  const bool tiles = (saved & 0x60000) == 0x60000;

  return {
      {"sse4_2", bit(leaf1.ecx, 20)},
      {"avx", ymm && bit(leaf1.ecx, 28)},
      {"avx2", ymm && bit(leaf7.ebx, 5)},
      {"fma", ymm && bit(leaf1.ecx, 12)},
      {"f16c", ymm && bit(leaf1.ecx, 29)},
      {"avx512f", zmm && bit(leaf7.ebx, 16)},
      {"avx512bw", zmm && bit(leaf7.ebx, 30)},
      {"avx512vl", zmm && bit(leaf7.ebx, 31)},
      {"avx512_bf16", zmm && bit(leaf7_1.eax, 5)},
      {"avx512_fp16", zmm && bit(leaf7.edx, 23)},
      {"amx_tile", tiles && bit(leaf7.edx, 24)},
      {"amx_int8", tiles && bit(leaf7.edx, 25)},
      {"amx_bf16", tiles && bit(leaf7.edx, 22)},
  };
}

// Asks the kernel to let this process use the tiles of AMX, which need larger signal frames; false where it refuses.
inline bool tiles_permitted() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}

#elif defined(__aarch64__)

inline std::vector<CpuFeature> cpu_features() {
  std::vector<CpuFeature> features = {{"neon", true}};  // part of the base architecture
#if defined(__linux__)
  const unsigned long first = getauxval(AT_HWCAP);
  const unsigned long second = getauxval(AT_HWCAP2);
  features.push_back({"fp16", (first & HWCAP_ASIMDHP) != 0});
  features.push_back({"dotprod", (first & HWCAP_ASIMDDP) != 0});
  features.push_back({"sve", (first & HWCAP_SVE) != 0});
  features.push_back({"sve2", (second & HWCAP2_SVE2) != 0});
  features.push_back({"bf16", (second & HWCAP2_BF16) != 0});
  features.push_back({"i8mm", (second & HWCAP2_I8MM) != 0});
#endif
  return features;
}

#else

inline std::vector<CpuFeature> cpu_features() { return {}; }

#endif

}  // namespace t2t_fast
