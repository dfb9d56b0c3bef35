#pragma once
#include <cstdint>

// An enum whose values have names keeps them beside it: `const char* name(Enum)`, a switch without default. The
// compiler refuses a value without a name (-Werror=switch), and whoever lists or reads names finds them all.
namespace freedave {

// How many values have names: name() is null behind the last.
template <typename Enum>
constexpr int32_t count_of() {
  int32_t count = 0;
  while (name(static_cast<Enum>(count)) != nullptr) ++count;
  return count;
}

}  // namespace freedave
