#pragma once

// Atomics on integers. Those on floats are left out on purpose: a sum in the order of arrival is not reproducible.
// Relaxed, as on a GPU: ThreadSanitizer sees no race in them, and takes no other memory to be ordered by them.
#include <concepts>
#include <cstdint>

#include "simt/emulator.h"

namespace simt {

template <typename T>
concept Atomic = std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, unsigned long long>;

// Replaces *address by change(*address) and returns what was there.
template <Atomic T, typename Change>
T replace(T* address, const Site& site, const Change& change) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T) != 0)
    fail(site, "misaligned atomic at %p", static_cast<void*>(address));
  T before = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &before, change(before), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}

}  // namespace simt

template <simt::Atomic T>
T atomicAdd(T* address, std::type_identity_t<T> value, const simt::Site& site = simt::Site::current()) {
  // In unsigned arithmetic: an int that overflows wraps on a GPU.
  return simt::replace(address, site, [=](T x) {
    return static_cast<T>(static_cast<unsigned long long>(x) + static_cast<unsigned long long>(value));
  });
}
template <simt::Atomic T>
T atomicMin(T* address, std::type_identity_t<T> value, const simt::Site& site = simt::Site::current()) {
  return simt::replace(address, site, [=](T x) { return x < value ? x : value; });
}
template <simt::Atomic T>
T atomicMax(T* address, std::type_identity_t<T> value, const simt::Site& site = simt::Site::current()) {
  return simt::replace(address, site, [=](T x) { return x > value ? x : value; });
}
template <simt::Atomic T>
T atomicOr(T* address, std::type_identity_t<T> value, const simt::Site& site = simt::Site::current()) {
  return simt::replace(address, site, [=](T x) { return x | value; });
}
template <simt::Atomic T>
T atomicAnd(T* address, std::type_identity_t<T> value, const simt::Site& site = simt::Site::current()) {
  return simt::replace(address, site, [=](T x) { return x & value; });
}
template <simt::Atomic T>
T atomicExch(T* address, std::type_identity_t<T> value, const simt::Site& site = simt::Site::current()) {
  return simt::replace(address, site, [=](T) { return value; });
}
template <simt::Atomic T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value,
            const simt::Site& site = simt::Site::current()) {
  return simt::replace(address, site, [=](T x) { return x == expected ? value : x; });
}
