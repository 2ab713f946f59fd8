// Single rows of a weight as plain numbers, which is what an embedding needs.
#pragma once

#include "attention.h"
#include "grouped.h"
#include "kernels.h"
#include "plain.h"
#include "pool.h"
#include "tiles.h"

namespace moesaic::MOESAIC_ISA {

// Reads a row of a weight in an integer format: to [padded columns].
template <class Format>
struct RowOf {
    static void read(const Matrix& m, int64_t row, float* to) {
        const uint8_t* p = m.data + row / ROWS * block_bytes<Format>(m.columns);
        for (int64_t left = padded(m.columns); left > 0; left -= SUPER, to += SUPER) {
            const int width = int(left < SUPER ? left : SUPER);
            superblock(p, width, int(row % ROWS), to);
            p += super_bytes<Format>(width);
        }
    }

  private:
    static void superblock(const uint8_t* p, int width, int row, float* to) {
        const Super<Format> super(p, width);
        const float step = bf16_to_float(((const uint16_t*)super.steps)[row]);
        const int lane = row % 16, half = row / 16;
        const uint8_t* codes = super.codes;
        for (int k = 0; k < width; k += Format::RUN, codes += ROWS * Format::RUN * Format::BITS / 8) {
            Format::run(codes, [&](int j, I a, I b) {
                uint8_t bytes[64];
                store(bytes, half ? b : a);
                for (int c = 0; c < 4; ++c) {
                    const int column = k + 4 * j + c;
                    to[column] = step * float(value(super, lane, half, column, bytes[4 * lane + c]));
                }
            });
        }
        restore(to, width / 16);
    }

    // The integer multiple of the step that a code stands for.
    static int value(const Super<Format>& super, int lane, int half, int column, uint8_t code) {
        if constexpr (Format::GROUP == 0) {
            return code - 128;
        } else {
            const uint32_t scales = uint32_t(word(super.scales + 64 * half + 4 * lane));
            const int scale = SMALLEST_SCALE + int(scales >> 2 * (column / Format::GROUP) & SCALE_MASK);
            return scale * (Format::level(code) - Format::BIAS);
        }
    }
};

template <>
struct RowOf<Grouped> {
    static void read(const Matrix& m, int64_t row, float* to) {
        const Grouping& g = *m.grouping;
        const GroupedLayout layout{g};
        const int64_t columns = layout.padded_columns(m.columns);
        const uint8_t* p = m.data + row / ROWS * layout.block_bytes(m.columns);
        Panel panel;
        panel.shift = __builtin_ctz(g.group);
        panel.has_offsets = g.offset != Grouping::NONE;
        for (int64_t left = columns; left > 0; left -= SUPER, to += SUPER) {
            panel.width = int(left < SUPER ? left : SUPER);
            superblock(g, p, panel, int(row % ROWS), to);
            p += layout.bytes(panel.width);
        }
    }

  private:
    static void superblock(const Grouping& g, const uint8_t* p, Panel& panel, int row, float* to) {
        expand_scales(g, p, panel);
        set_factors(g, p, panel);
        for (int k = 0; k < panel.width; ++k) {
            to[k] = panel.has_offsets ? -panel.offset_factors[row] * panel.offsets[(k >> panel.shift) * ROWS + row] : 0.0f;
        }
        for (int table = 0; table < (g.tables ? g.tables : 1); ++table) {
            // With a bias of 0, the bytes are the levels. Those of 8 bits with an offset are unsigned.
            const bool is_signed = g.bits < 8 || g.offset == Grouping::NONE;
            with_codes<true>(g, table, 0, [&](auto kind, auto convert) {
                unpack_codes<decltype(kind)>(p + GroupedLayout{g}.codes_at(panel.width), panel.width, panel.codes, convert);
            });
            for (int k = 0; k < panel.width; ++k) {
                const uint8_t byte = panel.codes[k / 4 * 128 + row * 4 + k % 4];
                const float scale = panel.factors[table][row] * panel.scales_at(k)[row];
                to[k] += scale * float(is_signed ? int(int8_t(byte)) : int(byte));
            }
        }
    }
};

template <>
struct RowOf<BFloat16> {
    static void read(const Matrix& m, int64_t row, float* to) {
        const uint16_t* from = (const uint16_t*)m.data + row * m.columns;
        for (int64_t k = 0; k < m.columns; ++k) to[k] = bf16_to_float(from[k]);
    }
};

template <class Format>
void embedding(const EmbeddingArgs& a) {
    const Matrix m = {a.weight, a.rows, a.columns, a.grouping};
    parallel_for_or_inline(a.tokens, a.tokens * a.columns * COST_PER_VALUE * ROWS, [&](int64_t t, int worker) {
        const int64_t padded_size = supers(a.columns) * SUPER;
        float* row = (float*)scratch(16 + worker, sizeof(float) * 2 * padded_size);
        float* ordered = row + padded_size;
        RowOf<Format>::read(m, a.ids[t], row);
        if (a.order) {
            for (int64_t k = 0; k < a.columns; ++k) ordered[uint32_t(a.order[k]) < a.columns ? a.order[k] : 0] = row[k];
        }
        write(a.y, a.type, t * a.columns, a.columns, a.order ? ordered : row);
    });
}

}  // namespace moesaic::MOESAIC_ISA
