// The runtime API and what tests control: checks a launch as CUDA does, runs it, remembers it.
#include <cinttypes>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <string>

#include "cuda_runtime_api.h"
#include "kernel_name.h"
#include "scheduler.h"
#include "simt/control.h"
#include "simt/emulator.h"

namespace simt {
namespace {

struct Record {
  cudaLaunchConfig_t config;
  const void* kernel;
  std::size_t static_shared_bytes;
  bool programmatic;
};

std::mutex mutex;  // guards what follows, and is held while a kernel runs
bool scheduled = false;
bool mixed = false;  // launches take turns: forward, reverse, random from a seed of their own
Schedule schedule;
std::uint64_t launches_since_scheduled = 0;
int multiprocessors = 1;
unsigned long long launches = 0;
std::deque<Record> records;  // the latest first

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_failure;

bool set_schedule(const char* text) {
  const std::string name = text;
  const bool is_random = name.starts_with("random:"), is_mixed = name.starts_with("mixed:");
  Schedule wanted;
  if (is_random || is_mixed) {
    const char* digits = text + name.find(':') + 1;
    char* end = nullptr;
    wanted = {Schedule::Order::kRandom, std::strtoull(digits, &end, 10)};
    if (*digits < '0' || *digits > '9' || *end != '\0') return false;
  } else if (name == "reverse") {
    wanted.order = Schedule::Order::kReverse;
  } else if (name != "forward") {
    return false;
  }
  scheduled = true;
  mixed = is_mixed;
  schedule = wanted;
  launches_since_scheduled = 0;
  return true;
}

Schedule schedule_of_launch() {
  const std::uint64_t launch = launches_since_scheduled++;
  if (!mixed) return schedule;
  if (launch % 3 == 0) return {Schedule::Order::kForward, 0};
  if (launch % 3 == 1) return {Schedule::Order::kReverse, 0};
  return {Schedule::Order::kRandom, schedule.seed + launch};
}

std::string name_of(const Schedule& schedule) {
  if (schedule.order == Schedule::Order::kRandom) return "random:" + std::to_string(schedule.seed);
  return schedule.order == Schedule::Order::kForward ? "forward" : "reverse";
}

cudaError_t refuse(cudaError_t error, const std::string& why) {
  last_error = error;
  last_failure = why;
  return error;
}

std::string text_of(dim3 size) {
  return std::to_string(size.x) + "," + std::to_string(size.y) + "," + std::to_string(size.z);
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const Kernel& kernel) {
  const std::lock_guard lock(mutex);
  const dim3 grid = config.gridDim, block = config.blockDim;
  const std::string shape = "grid " + text_of(grid) + ", block " + text_of(block);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0) {
    return refuse(cudaErrorInvalidConfiguration, "launch of nothing: " + shape);
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return refuse(cudaErrorInvalidConfiguration, "grid too large (2147483647, 65535, 65535): " + shape);
  }
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || std::uint64_t{block.x} * block.y * block.z > kMaxThreads) {
    return refuse(cudaErrorInvalidConfiguration, "block too large (1024 threads, 64 in z): " + shape);
  }
  if (config.dynamicSmemBytes > kMaxSharedBytes) {
    return refuse(cudaErrorInvalidValue, "a block has " + std::to_string(kMaxSharedBytes) +
                                             " bytes of shared memory, the launch asks for " +
                                             std::to_string(config.dynamicSmemBytes));
  }
  bool programmatic = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      programmatic = attribute.val.programmaticStreamSerializationAllowed != 0;
    } else if (attribute.id != cudaLaunchAttributeIgnore) {
      return refuse(cudaErrorNotSupported,
                    "the emulator does not know launch attribute " + std::to_string(attribute.id));
    }
  }
  if (!scheduled) {
    const char* wanted = std::getenv("SIMT_SCHEDULE");
    if (!set_schedule(wanted != nullptr ? wanted : "forward")) {
      return refuse(cudaErrorInvalidValue, std::string("SIMT_SCHEDULE is '") + wanted +
                                               "'; expected forward, reverse, random:SEED or mixed:SEED");
    }
  }

  const Schedule now = schedule_of_launch();
  const Outcome outcome = run(config, kernel, now, programmatic);
  ++launches;
  records.push_front({config, kernel.address, outcome.static_shared_bytes, programmatic});
  if (records.size() > 64) records.pop_back();
  if (!outcome.failure.empty()) {
    return refuse(cudaErrorLaunchFailure,
                  kernel_name(kernel.address) + ": " + outcome.failure + " [schedule " + name_of(now) + "]");
  }
  return cudaSuccess;
}

}  // namespace simt

int simt_schedule(const char* text) {
  const std::lock_guard lock(simt::mutex);
  return simt::set_schedule(text) ? 0 : 1;
}

void simt_multiprocessors(int count) {
  const std::lock_guard lock(simt::mutex);
  simt::multiprocessors = count;
}

unsigned long long simt_launches() {
  const std::lock_guard lock(simt::mutex);
  return simt::launches;
}

const char* simt_launch(unsigned back) {
  const std::lock_guard lock(simt::mutex);
  if (back >= simt::records.size()) return nullptr;
  const simt::Record& record = simt::records[back];
  thread_local std::string text;
  text = simt::kernel_name(record.kernel) + " grid=" + simt::text_of(record.config.gridDim) +
         " block=" + simt::text_of(record.config.blockDim) +
         " dynamic=" + std::to_string(record.config.dynamicSmemBytes) +
         " static=" + std::to_string(record.static_shared_bytes) + " programmatic=" + (record.programmatic ? "1" : "0");
  return text.c_str();
}

const char* simt_last_error() { return simt::last_failure.c_str(); }

void simt_synchronize() {
  const std::lock_guard lock(simt::mutex);
  simt::host_waits();
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return simt::refuse(cudaErrorInvalidDevice, "there is one device, number 0");
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: {
      const std::lock_guard lock(simt::mutex);
      *value = simt::multiprocessors;
      return cudaSuccess;
    }
  }
  return simt::refuse(cudaErrorInvalidValue,
                      "the emulator does not know device attribute " + std::to_string(attribute));
}

cudaError_t cudaPeekAtLastError() { return simt::last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = simt::last_error;
  simt::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return simt::last_failure.empty() ? "error of the emulated CUDA runtime" : simt::last_failure.c_str();
}
