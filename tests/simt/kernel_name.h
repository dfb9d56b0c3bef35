#pragma once

#include <string>

namespace simt {

// The name of the function at `address`, as it stands in the source. Kernels are mostly local to their file, so the
// dynamic linker does not know them: the symbol table of the library is read instead.
std::string kernel_name(const void* address);

}  // namespace simt
