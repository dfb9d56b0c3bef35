// libcuda.so.1 for a machine without a GPU: every call of the driver that Triton makes to launch a kernel succeeds and
// does nothing. What is left of a launch is its cost on the host.
#include <stdint.h>

enum { kFail = 999, kMaxThreadsPerBlock = 0, kSharedMemory = 1 << 17 };

int cuInit(unsigned flags) {
  (void)flags;
  return 0;
}
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)attribute, (void)device;
  *value = kSharedMemory;
  return 0;
}
int cuGetErrorString(int error, const char** text) {
  (void)error;
  *text = "stub";
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  (void)device;
  *context = (void*)1;
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = (void*)1;
  return 0;
}
int cuCtxSetCurrent(void* context) {
  (void)context;
  return 0;
}
int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cuCtxGetLimit(uint64_t* value, int limit) {
  (void)limit;
  *value = 0;
  return 0;
}
int cuCtxSetLimit(int limit, uint64_t value) {
  (void)limit, (void)value;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  (void)image;
  *module = (void*)1;
  return 0;
}
int cuModuleUnload(void* module) {
  (void)module;
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module, (void)name;
  *function = (void*)1;
  return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  (void)function;
  *value = attribute == kMaxThreadsPerBlock ? 1024 : 0;
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  (void)function, (void)attribute, (void)value;
  return 0;
}
int cuFuncSetCacheConfig(void* function, int config) {
  (void)function, (void)config;
  return 0;
}
int cuStreamIsCapturing(void* stream, int* status) {
  (void)stream;
  *status = 0;
  return 0;
}
int cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  (void)attribute;
  *(uint64_t*)data = pointer;  // a device pointer is what came
  return 0;
}
int cuLaunchKernelEx(const void* config, void* function, void** arguments, void** extra) {
  (void)config, (void)function, (void)arguments, (void)extra;
  return 0;
}

// Triton looks these up, but never calls them here.
int cuOccupancyMaxActiveClusters(void) { return kFail; }
int cuTensorMapEncodeTiled(void) { return kFail; }
int cuTensorMapEncodeIm2col(void) { return kFail; }
int cuPointerGetAttributes(void) { return kFail; }
