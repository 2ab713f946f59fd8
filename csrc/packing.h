// Writes codes as the kernels read them: those of files in the format `grouped`, and planes of any codes.
#pragma once

#include "kernels.h"

namespace moesaic {

// weight [blocks][block_bytes] gets the codes [rows][columns] with their scales and offsets [rows][groups]. If scales
// are integers (SUPER_INT8, SUPER_INT4), super_scale and super_offset [rows][supers] are the float16 factors of scales
// and offsets. Numbers that the format does not have are null.
struct StoreCodesArgs {
    const Grouping* grouping;
    int64_t rows, columns, block_bytes;
    const uint8_t *codes, *scale, *offset, *super_scale, *super_offset;
    uint8_t* weight;
};

// Write codes [32][256], of which `width` columns are used, as planes (moesaic/formats/_planes.py); return their end.
uint8_t* write_planes(uint8_t* out, const uint8_t* codes, int width, int bits);

// The caller must hold an OpLock.
void store_codes(const StoreCodesArgs& a);

}  // namespace moesaic
