// The tile registers of AMX: eight tiles of 16 rows of 64 bytes.
#pragma once

#include "vec.h"

#if MOESAIC_AMX

namespace moesaic::MOESAIC_ISA {

// What lies there is in memory: the compiler does not know that a tile load reads it, and GCC 12
// believes that a tile configuration is shorter than it is.
MOESAIC_INLINE void settle(const void* there) { __asm__ volatile("" : : "r"(there) : "memory"); }

// While one of these lives, this thread's tiles are set up; afterwards the system need not save them.
class Tiles {
  public:
    MOESAIC_INLINE Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, row = 0, unused[14] = {};
            uint16_t bytes[16] = {};  // of a row of each tile
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 8; ++i) {
            shape.bytes[i] = 64;
            shape.rows[i] = 16;
        }
        settle(&shape);
        _tile_loadconfig(&shape);
    }
    MOESAIC_INLINE ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

// Sixteen vectors of sixteen numbers, rows turned to columns.
MOESAIC_INLINE void turn(F (&x)[16]) {
    I t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(bits(x[i]), bits(x[i + 1]));
        t[i + 1] = _mm512_unpackhi_epi32(bits(x[i]), bits(x[i + 1]));
    }
    I u[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // u[4 a + c] holds, in its quarter b, rows 4 a .. 4 a + 3 of column 4 b + c.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const I low = _mm512_shuffle_i32x4(u[c], u[4 + c], 0x88), high = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x88);
        const I odd = _mm512_shuffle_i32x4(u[c], u[4 + c], 0xdd), last = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xdd);
        x[c] = from_bits(_mm512_shuffle_i32x4(low, high, 0x88));
        x[8 + c] = from_bits(_mm512_shuffle_i32x4(low, high, 0xdd));
        x[4 + c] = from_bits(_mm512_shuffle_i32x4(odd, last, 0x88));
        x[12 + c] = from_bits(_mm512_shuffle_i32x4(odd, last, 0xdd));
    }
}

}  // namespace moesaic::MOESAIC_ISA

#endif
