// bfloat16 values, row after row. csrc/plain.h has the matrix product.
#pragma once

#include "../vec.h"

namespace moesaic::MOESAIC_ISA {

struct BFloat16 {};

}  // namespace moesaic::MOESAIC_ISA
