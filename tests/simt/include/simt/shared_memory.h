#pragma once

#include <type_traits>

#include "simt/emulator.h"

// `Type& name` in the block's shared memory, one variable for each place in the source and instance of its template.
// The lambda is what makes it one per place; section attributes on statics are ignored in templates.
#define FREEDAVE_SHARED(Type, name)                                                                                   \
  static_assert(std::is_trivially_default_constructible_v<Type>, "shared memory is not initialised by constructors"); \
  Type& name = *static_cast<Type*>(::simt::shared_variable([]() -> ::simt::SharedVariable& {                          \
    static constinit ::simt::SharedVariable variable{sizeof(Type), alignof(Type), #name};                             \
    return variable;                                                                                                  \
  }()))

// `Type* name`: the shared memory that the launch asked for.
#define FREEDAVE_DYNAMIC_SHARED(Type, name) Type* name = static_cast<Type*>(::simt::dynamic_shared())
