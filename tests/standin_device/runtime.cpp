// The runtime's functions that the project's code calls (cuda_on_host.h), from the stand-in runtime: the one
// that torch has loaded, so that both see the same devices, streams and captures.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "cuda_on_host.h"
#include "standin.h"

namespace {

void* symbol(const char* name) {
  static void* const library = dlopen("libcudart.so.13", RTLD_NOW | RTLD_NOLOAD);
  void* const found = library != nullptr ? dlsym(library, name) : nullptr;
  if (found == nullptr) {
    std::fprintf(stderr, "standin_device: %s is not there: run tests/standin_device/run.sh\n",
                 name);
    std::abort();
  }
  return found;
}

}  // namespace

// What is called by this name there. (Declared without extern "C", so that the two may be in one process.)
#define FUSEREG_CALL(name, ...)                                                  \
  ([&] {                                                                         \
    static const auto call = reinterpret_cast<decltype(&::name)>(symbol(#name)); \
    return call(__VA_ARGS__);                                                    \
  }())
#define FUSEREG_FORWARD(name, ...)          \
  {                                         \
    return FUSEREG_CALL(name, __VA_ARGS__); \
  }

const char* cudaGetErrorName(cudaError_t error) FUSEREG_FORWARD(cudaGetErrorName, error) const
    char* cudaGetErrorString(cudaError_t error)
        FUSEREG_FORWARD(cudaGetErrorString, error) cudaError_t cudaGetLastError()
            FUSEREG_FORWARD(cudaGetLastError) cudaError_t cudaPeekAtLastError()
                FUSEREG_FORWARD(cudaPeekAtLastError) cudaError_t cudaDriverGetVersion(int* version)
                    FUSEREG_FORWARD(cudaDriverGetVersion, version) cudaError_t
    cudaRuntimeGetVersion(int* version) FUSEREG_FORWARD(cudaRuntimeGetVersion, version) cudaError_t
    cudaGetDeviceCount(int* count) FUSEREG_FORWARD(cudaGetDeviceCount, count) cudaError_t
    cudaGetDevice(int* device) FUSEREG_FORWARD(cudaGetDevice, device) cudaError_t
    cudaSetDevice(int device) FUSEREG_FORWARD(cudaSetDevice, device) cudaError_t
    cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device)
        FUSEREG_FORWARD(cudaDeviceGetAttribute, value, attribute, device) cudaError_t
    cudaMalloc(void** p, std::size_t bytes) FUSEREG_FORWARD(cudaMalloc, p, bytes) cudaError_t
    cudaFree(void* p) FUSEREG_FORWARD(cudaFree, p) cudaError_t
    cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                    cudaStream_t stream)
        FUSEREG_FORWARD(cudaMemcpyAsync, to, from, bytes, kind, stream) cudaError_t
    cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t stream)
        FUSEREG_FORWARD(cudaMemsetAsync, p, value, bytes, stream) cudaError_t
    cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status)
        FUSEREG_FORWARD(cudaStreamIsCapturing, stream, status)

            cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "stand-in");
  properties->totalGlobalMem = std::size_t{8} << 30;
  for (const auto& [value, attribute] :
       {std::pair{&properties->major, cudaDevAttrComputeCapabilityMajor},
        std::pair{&properties->minor, cudaDevAttrComputeCapabilityMinor},
        std::pair{&properties->multiProcessorCount, cudaDevAttrMultiProcessorCount}}) {
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device)) return error;
  }
  return cudaSuccess;
}

namespace fusereg::cuda_on_host {

cudaError_t launch(const Launch& l) {
  std::vector<const void*> parameters;
  std::vector<std::size_t> sizes;
  for (const Parameter& p : l.parameters) {
    parameters.push_back(p.data);
    sizes.push_back(p.size);
  }
  if (const int error =
          FUSEREG_CALL(standin_check_launch, l.stream, l.op.c_str(), parameters.data(),
                       sizes.data(), static_cast<int>(sizes.size()))) {
    return static_cast<cudaError_t>(error);
  }
  if (const cudaError_t error = refusal(l)) return error;
  const auto run_again = [](void* context) -> int {
    try {
      return run(*static_cast<const Launch*>(context));
    } catch (const std::exception& fault) {
      FUSEREG_CALL(standin_explain, fault.what());
      return cudaErrorLaunchFailure;
    }
  };
  const auto drop = [](void* context) { delete static_cast<Launch*>(context); };
  auto kept = std::make_unique<Launch>(l);
  kept->parameters.clear();
  const int answer = FUSEREG_CALL(standin_enqueue, l.stream, run_again, drop, kept.get());
  if (answer == kStandinRunNow) return run(l);
  if (answer != kStandinRecorded) return static_cast<cudaError_t>(answer);
  (void)kept.release();
  return cudaSuccess;
}

}  // namespace fusereg::cuda_on_host
