// The tile registers of AMX: eight registers of 16 rows of 64 bytes.
#pragma once

#include "vec.h"

#if MOESAIC_AMX

namespace moesaic::MOESAIC_ISA {

// Make the compiler finish all stores to memory. It does not know that a tile load reads memory, and GCC 12 assumes
// a tile configuration that is too short.
MOESAIC_INLINE void compiler_barrier(const void* address) { __asm__ volatile("" : : "r"(address) : "memory"); }

// Configures the tile registers of this thread for its lifetime; after it, the system need not save them.
// Registers 4 and 5 hold `depth` bytes of 16 tokens, 6 and 7 those of 16 rows; 0 to 3 hold their sums.
class TileRegisters {
  public:
    MOESAIC_INLINE explicit TileRegisters(int depth = 64) {
        struct alignas(64) {
            uint8_t palette = 1, row = 0, unused[14] = {};
            uint16_t bytes[16] = {};  // of a row of each tile
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 8; ++i) {
            shape.bytes[i] = uint16_t(i == 4 || i == 5 ? depth : 64);
            shape.rows[i] = uint8_t(i == 6 || i == 7 ? depth / 4 : 16);
        }
        compiler_barrier(&shape);
        _tile_loadconfig(&shape);
    }
    MOESAIC_INLINE ~TileRegisters() { _tile_release(); }
    TileRegisters(const TileRegisters&) = delete;
};

// Transpose sixteen vectors of sixteen numbers in place.
MOESAIC_INLINE void transpose(F (&x)[16]) {
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
    // Quarter b of u[4 a + c] holds rows 4 a .. 4 a + 3 of column 4 b + c.
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
