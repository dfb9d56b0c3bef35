// The first positions of each row's accepted draft, copied to the row's slot, keys and values of all layers.
//
// A block of threads copies units of the keys or of the values of a row of a layer; several share them where there are
// few rows. A thread has some units on their way at once. Bound by memory where much is kept, else by latency.
#include "cuda/device.cuh"
#include "freedave/keep.h"

namespace freedave::cuda {
namespace {

constexpr int kKeepThreads = 256;
constexpr int kInFlight = 4;
constexpr int64_t kEnoughBlocks = 2048;  // more than any GPU holds at once

template <typename Unit>
__device__ __forceinline__ Unit load_unit(const char* from) {
  if constexpr (sizeof(Unit) == 16) {
    return load_16_bytes(from);
  } else {
    return *reinterpret_cast<const Unit*>(from);
  }
}

template <typename Unit>
__global__ void __launch_bounds__(kKeepThreads) keep_rows(const __grid_constant__ KeepParams p) {
  let_next_kernel_launch();
  wait_for_previous_kernel();
  const uint32_t batch = static_cast<uint32_t>(p.batch), layer = blockIdx.x / batch, row = blockIdx.x % batch;
  const KeptFeatures& f = p.features[blockIdx.z];
  const KeptWindow kept = kept_window(p, row);
  if (kept.begin >= kept.end) return;

  // Groups and units within a position are counted in 32 bits: a division of 64 bits takes as long as a load.
  const uint32_t units_per_group = static_cast<uint32_t>(p.group_bytes / sizeof(Unit));
  const uint32_t units_per_position = static_cast<uint32_t>(p.groups) * units_per_group;
  const uint32_t units = static_cast<uint32_t>(kept.end - kept.begin) * units_per_position;
  const uint32_t together = gridDim.y * kKeepThreads;  // neighbouring threads copy neighbouring units
  for (uint32_t first = blockIdx.y * kKeepThreads + threadIdx.x; first < units; first += kInFlight * together) {
    Unit copied[kInFlight];
    char* to[kInFlight];
    for (int n = 0; n < kInFlight; ++n) {
      const uint32_t unit = first + n * together;
      to[n] = nullptr;
      if (unit >= units) continue;
      const int64_t position = kept.begin + unit / units_per_position;
      const uint32_t within = unit % units_per_position, group = within / units_per_group;
      const uint32_t offset = within % units_per_group * static_cast<uint32_t>(sizeof(Unit));
      to[n] = f.stored_at(layer, kept.slot, kept.start + position, group) + offset;
      copied[n] = load_unit<Unit>(f.window_at(layer, row, kept.draft, position, group) + offset);
    }
    for (int n = 0; n < kInFlight; ++n) {
      if (to[n] != nullptr) *reinterpret_cast<Unit*>(to[n]) = copied[n];
    }
  }
}

bool in_16_bytes(const KeepParams& p) {
  uint64_t all = static_cast<uint64_t>(p.group_bytes);
  for (const KeptFeatures& f : p.features) {
    all |= reinterpret_cast<uintptr_t>(f.window) | reinterpret_cast<uintptr_t>(f.stored);
    for (const int64_t stride : f.window_stride) all |= static_cast<uint64_t>(stride);
    for (const int64_t stride : f.stored_stride) all |= static_cast<uint64_t>(stride);
  }
  return all % 16 == 0;
}

template <typename Unit>
Error launch_units(const KeepParams& p, int64_t rows, int64_t units, Stream stream) {
  const int64_t useful = (units + kKeepThreads - 1) / kKeepThreads, wanted = kEnoughBlocks / (2 * rows) + 1;
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(useful < wanted ? useful : wanted), 2);
  return launch_kernel(keep_rows<Unit>, grid, kKeepThreads, stream, p);
}

}  // namespace

Error launch(const KeepParams& given, Stream stream) {
  const KeepParams p = with_groups_joined(given);
  const int64_t rows = p.layers * p.batch, bytes = p.length * p.groups * p.group_bytes;
  if (rows == 0 || bytes == 0 || p.drafts == 0 || p.capacity == 0 || p.num_slots == 0) return cudaSuccess;
  if (rows > INT32_MAX || bytes > INT32_MAX) return cudaErrorInvalidValue;
  return in_16_bytes(p) ? launch_units<uint4>(p, rows, bytes / 16, stream)
                        : launch_units<uint16_t>(p, rows, bytes / 2, stream);
}

}  // namespace freedave::cuda
