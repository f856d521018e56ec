// The Python module adagrad_kernels._build: how this copy of the library was compiled.
//
// No torch header may come in here: pybind11 and the stable ABI clash in one translation
// unit before torch 2.13. setup.py passes what the compiler does not know as macros.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#else
  return std::string("gcc ") + __VERSION__;
#endif
}

py::tuple words(const char* text) {
  std::istringstream stream(text);
  py::list found;
  for (std::string word; stream >> word;) found.append(word);
  return py::tuple(found);
}

py::tuple instruction_sets() {
#if ADAGRAD_KERNELS_X86
  return py::make_tuple("baseline", "avx2", "avx512");
#else
  return py::make_tuple("baseline");
#endif
}

}  // namespace

PYBIND11_MODULE(_build, m) {
  m.doc() = "How this copy of adagrad_kernels was compiled.";
  m.attr("compiler") = compiler();
  m.attr("flags") = words(ADAGRAD_KERNELS_FLAGS);
  m.attr("torch_version") = ADAGRAD_KERNELS_TORCH_VERSION;
  m.attr("cxx_standard") = static_cast<long>(__cplusplus);
#ifdef _OPENMP
  m.attr("openmp") = static_cast<long>(_OPENMP);
#else
  m.attr("openmp") = 0L;
#endif
  m.attr("instruction_sets") = instruction_sets();
  m.attr("cuda") = ADAGRAD_KERNELS_CUDA;
  m.attr("cuda_archs") = words(ADAGRAD_KERNELS_CUDA_ARCHS);
}
