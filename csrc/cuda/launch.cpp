#include "launch.h"

#include <dlfcn.h>

namespace adagrad_kernels {

// The one function that only a torch with CUDA has. It is looked up in that torch's library, not
// linked: so this library also loads where torch is built for the CPU alone. (A weak reference
// would stay null even beside CUDA: torch loads its libraries with local scope.)
using GetStream = AOTITorchError (*)(int32_t device, void** stream);

static GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return nullptr;
  return reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

// For tests: whether streams can be found in the torch that is loaded.
extern "C" __attribute__((visibility("default"))) int adagrad_kernels_has_cuda_streams() {
  return find_get_stream() != nullptr;
}

cudaStream_t current_stream(int32_t device) {
  static const GetStream get_stream = find_get_stream();
  STD_TORCH_CHECK(get_stream, "adagrad_kernels: this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "adagrad_kernels: no current stream on device ", device);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace adagrad_kernels
