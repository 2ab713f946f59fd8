// Quantizes rotated weights with error feedback, as moesaic/formats/_feedback.py describes and does in Python.
#pragma once

#include <cstdint>

namespace moesaic {

// weight [rows / 32][block] gets rotated weights x [rows][columns]; rows and columns are padded to whole blocks.
struct FeedBackArgs {
    int bits;
    float usual_step;
    int64_t rows, columns;
    const float* levels;  // [2^bits], ascending and symmetric
    const float* shares;  // [tries] steps to try, as fractions of the usual one
    int64_t tries;
    const float* x;       // [rows][columns]
    const float* factor;  // [columns][columns], upper triangular
    uint8_t* weight;
};

// The caller must hold an OpLock.
void feed_back(const FeedBackArgs& a);

}  // namespace moesaic
