// Writes weights from codes that a file holds; no number is rounded.
#pragma once

#include "kernels.h"

namespace moesaic {

// weight [blocks][block_bytes] = codes [rows][columns] with their scales and offsets [rows][groups] and, if the scale is
// super, factors [rows][supers] float16.
struct StoreCodesArgs {
    const Grouping* grouping;
    int64_t rows, columns, block_bytes;
    const uint8_t *codes, *scale, *offset, *super_scale, *super_offset;
    uint8_t* weight;
};

// The caller must hold an OpLock.
void store_codes(const StoreCodesArgs& a);

}  // namespace moesaic
