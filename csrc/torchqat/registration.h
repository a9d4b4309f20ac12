#pragma once

#include "torchqat/macros.h"

// The library registers its operators when it is loaded. A program that only calls them by name, through the
// dispatcher, uses no symbol of it, and a linker that drops unused libraries (--as-needed, the default of
// many distributions) would drop this one: the variable is a use.
namespace torchqat::detail {

TORCHQAT_API bool operators_are_registered();

inline const bool uses_the_library = operators_are_registered();

}  // namespace torchqat::detail
