#pragma once

// Barriers, and what the lanes of a warp do together. Every function takes its own place in the source last.
#include <concepts>
#include <cstring>

#include "simt/emulator.h"

inline constexpr int warpSize = 32;

inline void __syncthreads(const simt::Site& site = simt::Site::current()) {
  simt::meet_block("__syncthreads", site, false);
}
inline int __syncthreads_count(int predicate, const simt::Site& site = simt::Site::current()) {
  return simt::meet_block("__syncthreads_count", site, predicate != 0).nonzero;
}
inline int __syncthreads_or(int predicate, const simt::Site& site = simt::Site::current()) {
  return simt::meet_block("__syncthreads_or", site, predicate != 0).nonzero > 0;
}
inline int __syncthreads_and(int predicate, const simt::Site& site = simt::Site::current()) {
  const simt::Arrivals all = simt::meet_block("__syncthreads_and", site, predicate != 0);
  return all.nonzero == all.threads;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, const simt::Site& site = simt::Site::current()) {
  simt::meet_warp("__syncwarp", site, mask, 0, [](std::uint64_t a, std::uint64_t) { return a; }, 0);
}

namespace simt {

template <typename T>
concept Shuffled = std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, long> ||
                   std::same_as<T, unsigned long> || std::same_as<T, long long> ||
                   std::same_as<T, unsigned long long> || std::same_as<T, float> || std::same_as<T, double>;

template <Shuffled T>
T shuffle(const char* name, const Site& site, unsigned mask, T value, int source) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = meet_warp(name, site, mask, bits, nullptr, source);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The first and last lane of the caller's segment of `width` lanes.
struct Segment {
  int lane, first, last;
};
inline Segment segment_of_caller(const char* name, const Site& site, int width) {
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0) {
    fail(site, "%s: width %d is not a power of two up to 32", name, width);
  }
  const int lane = lane_of_caller(site);
  const int first = lane & ~(width - 1);
  return {lane, first, first + width - 1};
}

inline unsigned ballot(const char* name, const Site& site, unsigned mask, bool predicate) {
  const std::uint64_t mine = predicate ? std::uint64_t{1} << lane_of_caller(site) : 0;
  const Fold either = [](std::uint64_t a, std::uint64_t b) { return a | b; };
  return static_cast<unsigned>(meet_warp(name, site, mask, mine, either, 0));
}

template <typename T, typename Function>
T reduce(const char* name, const Site& site, unsigned mask, T value, Function) {
  const Fold fold = [](std::uint64_t a, std::uint64_t b) {
    return static_cast<std::uint64_t>(Function{}(static_cast<T>(a), static_cast<T>(b)));
  };
  return static_cast<T>(meet_warp(name, site, mask, static_cast<std::uint64_t>(value), fold, 0));
}

}  // namespace simt

// A source beyond the segment: own value, or for an index the lane of that number modulo the width.
template <simt::Shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              const simt::Site& site = simt::Site::current()) {
  const simt::Segment segment = simt::segment_of_caller("__shfl_sync", site, width);
  return simt::shuffle("__shfl_sync", site, mask, value, segment.first + (source & (width - 1)));
}
template <simt::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 const simt::Site& site = simt::Site::current()) {
  const simt::Segment segment = simt::segment_of_caller("__shfl_up_sync", site, width);
  const bool inside = delta <= static_cast<unsigned>(segment.lane - segment.first);
  const int source = inside ? segment.lane - static_cast<int>(delta) : segment.lane;
  return simt::shuffle("__shfl_up_sync", site, mask, value, source);
}
template <simt::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   const simt::Site& site = simt::Site::current()) {
  const simt::Segment segment = simt::segment_of_caller("__shfl_down_sync", site, width);
  const bool inside = delta <= static_cast<unsigned>(segment.last - segment.lane);
  const int source = inside ? segment.lane + static_cast<int>(delta) : segment.lane;
  return simt::shuffle("__shfl_down_sync", site, mask, value, source);
}
template <simt::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  const simt::Site& site = simt::Site::current()) {
  const simt::Segment segment = simt::segment_of_caller("__shfl_xor_sync", site, width);
  const int source = segment.lane ^ lane_mask;  // an earlier segment may be read, a later one not
  return simt::shuffle("__shfl_xor_sync", site, mask, value,
                       source >= 0 && source <= segment.last ? source : segment.lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, const simt::Site& site = simt::Site::current()) {
  return simt::ballot("__ballot_sync", site, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, const simt::Site& site = simt::Site::current()) {
  return simt::ballot("__any_sync", site, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, const simt::Site& site = simt::Site::current()) {
  return simt::ballot("__all_sync", site, mask, predicate != 0) == mask;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, const simt::Site& site = simt::Site::current()) {
  return simt::reduce("__reduce_add_sync", site, mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline int __reduce_add_sync(unsigned mask, int value, const simt::Site& site = simt::Site::current()) {
  return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value), site));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, const simt::Site& site = simt::Site::current()) {
  return simt::reduce("__reduce_min_sync", site, mask, value, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline int __reduce_min_sync(unsigned mask, int value, const simt::Site& site = simt::Site::current()) {
  return simt::reduce("__reduce_min_sync", site, mask, value, [](int a, int b) { return a < b ? a : b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, const simt::Site& site = simt::Site::current()) {
  return simt::reduce("__reduce_max_sync", site, mask, value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline int __reduce_max_sync(unsigned mask, int value, const simt::Site& site = simt::Site::current()) {
  return simt::reduce("__reduce_max_sync", site, mask, value, [](int a, int b) { return a > b ? a : b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, const simt::Site& site = simt::Site::current()) {
  return simt::reduce("__reduce_and_sync", site, mask, value, [](unsigned a, unsigned b) { return a & b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, const simt::Site& site = simt::Site::current()) {
  return simt::reduce("__reduce_or_sync", site, mask, value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, const simt::Site& site = simt::Site::current()) {
  return simt::reduce("__reduce_xor_sync", site, mask, value, [](unsigned a, unsigned b) { return a ^ b; });
}

// Between a kernel launched with programmatic serialization and what earlier kernels wrote.
inline void cudaGridDependencySynchronize(const simt::Site& site = simt::Site::current()) {
  simt::wait_for_previous_kernel(site);
}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
