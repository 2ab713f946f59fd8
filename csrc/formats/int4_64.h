// int4 with 64 columns per scale.
#pragma once

#include "int4.h"

namespace moesaic::MOESAIC_ISA {

struct Int4_64 : Int4 {
    static constexpr int GROUP = 64;
};

}  // namespace moesaic::MOESAIC_ISA
