// Superblocks of the grouped format, expanded so that they can be multiplied: scales and offsets to float32, codes to
// bytes. moesaic/formats/grouped.py describes the memory. Only this file knows how scales are stored.
#pragma once

#include "tiles.h"

namespace moesaic::MOESAIC_ISA {

// How the superblocks of a weight lie in memory.
struct GroupedLayout {
    const Grouping& g;

    bool is_super() const { return g.scale == Grouping::SUPER_INT8 || g.scale == Grouping::SUPER_INT4; }
    int64_t padded_columns(int64_t columns) const {
        const int64_t unit = g.group > PAD ? g.group : PAD;
        return (columns + unit - 1) / unit * unit;
    }
    int super_bytes() const { return is_super() ? (g.offset == Grouping::VALUE ? 4 : 2) * ROWS : 0; }
    int scale_bytes() const { return is_super() ? 1 : g.scale == Grouping::FLOAT32 ? 4 : 2; }
    int offset_bytes() const {
        if (g.offset == Grouping::NONE || g.scale == Grouping::SUPER_INT4) return 0;
        return g.offset == Grouping::ZERO ? 1 : scale_bytes();
    }
    int codes_at(int width) const { return super_bytes() + width / g.group * ROWS * (scale_bytes() + offset_bytes()); }
    int bytes(int width) const { return codes_at(width) + ROWS * width * g.bits / 8; }
    int64_t block_bytes(int64_t columns) const {
        const int64_t whole = padded_columns(columns) / SUPER, rest = padded_columns(columns) % SUPER;
        return whole * bytes(SUPER) + (rest ? bytes(int(rest)) : 0);
    }
};

constexpr int GROUPS = SUPER / 16;  // the most groups of a superblock

// A superblock that is ready to be multiplied: factor * scale * (byte - bias) - offset_factor * offset. With two tables,
// it is the sum of two such products, which have their own bytes, biases and factors.
struct Panel {
    int width, shift;  // a group has 2^shift columns
    int bias[2];
    bool has_offsets;
    alignas(64) float factors[2][ROWS];
    alignas(64) float offset_factors[ROWS];
    alignas(64) uint8_t codes[SUPER * ROWS];  // [width / 4][2 halves][16 rows][4]
    alignas(64) float scales[GROUPS * ROWS];  // [groups][32 rows]
    alignas(64) float offsets[GROUPS * ROWS];

    MOESAIC_INLINE const float* scales_at(int column) const { return scales + (column >> shift) * ROWS; }
};

// Load 16 numbers as the scales are stored, or as the offsets are, which are unsigned if they are integers.
template <Grouping::Scale KIND>
MOESAIC_INLINE F load_scales(const uint8_t* p) {
    if constexpr (KIND == Grouping::FLOAT16) return load_f16((const uint16_t*)p);
    if constexpr (KIND == Grouping::BFLOAT16) return load_bf16((const uint16_t*)p);
    if constexpr (KIND == Grouping::FLOAT32) return load_float((const float*)p);
    if constexpr (KIND == Grouping::SUPER_INT8) return to_float(load_signed_bytes(p));
    return to_float(bit_and(load_bytes(p), set(15)));
}
template <Grouping::Scale KIND>
MOESAIC_INLINE F load_offsets(const uint8_t* p) {
    if constexpr (KIND == Grouping::SUPER_INT8) return to_float(load_bytes(p));
    if constexpr (KIND == Grouping::SUPER_INT4) return to_float(shift_right<4>(load_bytes(p)));
    return load_scales<KIND>(p);
}

// Expand the scales and offsets of the superblock at p, without their factors.
template <Grouping::Scale KIND>
__attribute__((noinline)) void expand_scales(const Grouping& g, const uint8_t* p, Panel& panel) {
    const GroupedLayout layout{g};
    const int size = 16 * layout.scale_bytes(), count = 2 * (panel.width >> panel.shift);
    const uint8_t* scales = p + layout.super_bytes();
    const uint8_t* offsets = KIND == Grouping::SUPER_INT4 ? scales : scales + count * size;
    for (int i = 0; i < count; ++i) store_float(panel.scales + 16 * i, load_scales<KIND>(scales + i * size));
    if (g.offset == Grouping::VALUE) {
        for (int i = 0; i < count; ++i) store_float(panel.offsets + 16 * i, load_offsets<KIND>(offsets + i * size));
    } else if (g.offset == Grouping::ZERO) {
        for (int i = 0; i < count; ++i) {
            const F zero_point = to_float(load_bytes(offsets + 16 * i));
            store_float(panel.offsets + 16 * i, mul(zero_point, load_float(panel.scales + 16 * i)));
        }
    }
}

inline void expand_scales(const Grouping& g, const uint8_t* p, Panel& panel) {
    for (int line = 0; line < GroupedLayout{g}.codes_at(panel.width); line += 64) prefetch(p + PREFETCH_BYTES + line);
    switch (g.scale) {
        case Grouping::FLOAT16: return expand_scales<Grouping::FLOAT16>(g, p, panel);
        case Grouping::BFLOAT16: return expand_scales<Grouping::BFLOAT16>(g, p, panel);
        case Grouping::FLOAT32: return expand_scales<Grouping::FLOAT32>(g, p, panel);
        case Grouping::SUPER_INT8: return expand_scales<Grouping::SUPER_INT8>(g, p, panel);
        case Grouping::SUPER_INT4: return expand_scales<Grouping::SUPER_INT4>(g, p, panel);
    }
}

// Set the factors of the scales and offsets.
inline void set_factors(const Grouping& g, const uint8_t* p, Panel& panel) {
    const bool supers = GroupedLayout{g}.is_super();
    for (int i = 0; i < ROWS; i += 16) {
        const F factor = supers ? load_f16((const uint16_t*)p + i) : set(1.0f);
        store_float(panel.factors[0] + i, factor);
        for (int table = 0; table < g.tables; ++table) {
            store_float(panel.factors[table] + i, mul(factor, set(g.steps[table])));
        }
        if (g.offset == Grouping::ZERO) store_float(panel.offset_factors + i, factor);
        if (g.offset == Grouping::VALUE) {
            store_float(panel.offset_factors + i, supers ? load_f16((const uint16_t*)p + ROWS + i) : set(1.0f));
        }
    }
}

// How codes become the bytes that are multiplied.
struct Unchanged {
    MOESAIC_INLINE I operator()(I x) const { return x; }
};
struct Shifted {
    I by;
    MOESAIC_INLINE I operator()(I x) const { return subtract_bytes(x, by); }
};
struct Looked {
    I table;
    MOESAIC_INLINE I operator()(I x) const { return lookup(table, x); }
};

// The bias of a byte is what must be subtracted from it to get the level of the code.
inline int code_bias(const Grouping& g) { return g.offset == Grouping::NONE ? 1 << (g.bits - 1) : 0; }

inline int least_level(const Grouping& g, int table) {
    int least = 0;
    for (int level : g.levels[table]) least = level < least ? level : least;
    return least;
}

// Whether bytes with a bias may be 128 or more. Then AVX2 multiplies signed bytes without a bias, which is slower.
inline bool is_wide(const Grouping& g, int table) {
    if (!g.tables) return g.bits == 8;
    int most = 0;
    for (int level : g.levels[table]) most = level > most ? level : most;
    return most - least_level(g, table) > 127;
}

// The bias of the bytes that vector instructions multiply: they need unsigned ones.
inline int vector_bias(const Grouping& g, int table) {
    const bool is_signed = BIAS == 0 && is_wide(g, table);
    if (g.tables) return is_signed ? 0 : -least_level(g, table);
    return code_bias(g) - (is_signed ? 128 : 0);
}

inline Looked lookup_of(const Grouping& g, int table, int bias) {
    uint8_t entries[64];
    for (int i = 0; i < 64; ++i) entries[i] = uint8_t(g.levels[table][i % 16] + bias);
    return {load(entries)};
}

// Call body with the type that reads the codes, and with the conversion to bytes with this bias. `Always` says that
// codes of any number of bits may need a conversion, which costs a little.
template <bool Always, class Body>
MOESAIC_INLINE void with_codes(const Grouping& g, int table, int bias, const Body& body) {
    if (g.tables) return body(Int4{}, lookup_of(g, table, bias));
    const Shifted shifted = {set(int32_t(0x01010101u * uint8_t(code_bias(g) - bias)))};
    const auto with_bits = [&](auto convert) {
        switch (g.bits) {
            case 2: return body(Int2{}, convert);
            case 3: return body(Int3{}, convert);
            case 4: return body(Int4{}, convert);
            case 5: return body(Bits5{}, convert);
            case 6: return body(Bits6{}, convert);
            default: return body(Int8{}, shifted);
        }
    };
    if constexpr (Always) {
        with_bits(shifted);
    } else {
        with_bits(Unchanged{});
    }
}

// Unpack codes to bytes.
template <class Codes, class Convert>
__attribute__((noinline)) void unpack_codes(const uint8_t* codes, int width, uint8_t* to, const Convert& convert) {
    constexpr int BYTES = ROWS * Codes::RUN * Codes::BITS / 8;
    for (int k = 0; k < width; k += Codes::RUN, codes += BYTES, to += ROWS * Codes::RUN) {
        for (int line = 0; line < BYTES; line += 64) prefetch(codes + PREFETCH_BYTES + line);
        Codes::run(codes, [&](int j, I a, I b) __attribute__((always_inline)) {
            store(to + 128 * j, convert(a));
            store(to + 128 * j + 64, convert(b));
        });
    }
}

}  // namespace moesaic::MOESAIC_ISA
