// The module t2t_fast._C: how the native code was built, and what this CPU offers.
// It includes no torch header, so one build loads whatever torch is installed. setup.py sets the T2T_FAST_* macros.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu_features.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "Clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__) + "." +
         std::to_string(__clang_patchlevel__);
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#else
  return "unknown";
#endif
}

// 201703L is "C++17".
std::string cxx_standard() { return "C++" + std::to_string(__cplusplus / 100 % 100); }

py::object or_none(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

py::object words(const std::string& text) { return py::str(text).attr("split")(); }

py::dict build_info() {
  py::dict info;
  info["mode"] = T2T_FAST_MODE;
  info["compiler"] = compiler();
  info["cxx_standard"] = cxx_standard();
  info["flags"] = T2T_FAST_FLAGS;
  info["operators"] = words(T2T_FAST_OPERATORS);
  info["torch"] = or_none(T2T_FAST_TORCH);
  info["cuda"] = or_none(T2T_FAST_CUDA);
  info["architectures"] = words(T2T_FAST_ARCHITECTURES);
  info["commit"] = or_none(T2T_FAST_COMMIT);
  info["date"] = T2T_FAST_DATE;
  return info;
}

py::dict cpu_features() {
  py::dict features;
  for (const auto& feature : t2t_fast::cpu_features()) features[feature.name.c_str()] = feature.present;
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "How t2t_fast's native code was built, and what this CPU offers.";
  module.def("build_info", &build_info,
             "Build mode, compiler, C++ standard, flags, what the operators are built for (cpu, cuda), the versions of "
             "PyTorch and CUDA they are built with or None, CUDA architectures, commit or None, date (UTC).");
  module.def("cpu_features", &cpu_features, "Instruction sets that can be used here: name -> bool.");
}
