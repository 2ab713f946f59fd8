// Writes weights of the format `grouped` from codes and scales in rows, as files have them.
//
// moesaic/formats/grouped.py describes the memory, and its `adopt` does the same in Python. This code only moves bytes,
// so it is compiled once for all instruction sets.

#include "packing.h"

#include <algorithm>
#include <cstring>

#include "pool.h"

namespace moesaic {

namespace {

constexpr int ROWS = 32, SUPER = 256, PAD = 64;

// A plane holds some of the bits of each code: a code of five bits is in a plane of four and a plane of one.
struct Plane {
    int low, width;  // lowest bit and number of bits; a width of 0 means that there is no second plane
};

struct Planes {
    int run;  // columns that are stored before the next run begins
    Plane planes[2];
};

Planes planes_of(int bits) {
    switch (bits) {
        case 2: return {64, {{0, 2}, {0, 0}}};
        case 3: return {32, {{0, 2}, {2, 1}}};
        case 4: return {64, {{0, 4}, {0, 0}}};
        case 5: return {32, {{0, 4}, {4, 1}}};
        case 6: return {32, {{0, 4}, {4, 2}}};
        default: return {64, {{0, 8}, {0, 0}}};
    }
}

// Numbers of one kind, such as scales: [rows][per_row] of `size` bytes each.
struct Numbers {
    const uint8_t* data;
    int64_t per_row;
    int size;

    // Write numbers first .. first + count - 1 of rows row .. row + 31 as [count][32]; missing numbers become 0.
    uint8_t* write(uint8_t* out, int64_t row, int64_t rows, int64_t first, int64_t count) const {
        for (int64_t i = first; i < first + count; ++i) {
            for (int64_t r = row; r < row + ROWS; ++r, out += size) {
                if (r < rows && i < per_row) {
                    memcpy(out, data + (r * per_row + i) * size, size);
                } else {
                    memset(out, 0, size);
                }
            }
        }
        return out;
    }
};

// Write one plane of the first `run` columns of codes [32][SUPER]. The codes of four columns of a row are handled
// together, as the bytes of a word.
uint8_t* write_plane(uint8_t* out, const uint8_t* codes, int run, Plane plane) {
    const int fields = 8 / plane.width;
    const uint32_t mask = ((1u << plane.width) - 1) * 0x01010101u;
    for (int column = 0; column < run; column += 4 * fields) {
        for (int r = 0; r < ROWS; ++r, out += 4) {
            uint32_t word = 0;
            for (int field = 0; field < fields; ++field) {
                uint32_t four;
                memcpy(&four, codes + r * SUPER + column + 4 * field, 4);
                word |= ((four >> plane.low) & mask) << (plane.width * field);
            }
            memcpy(out, &word, 4);
        }
    }
    return out;
}

// Write the codes of 32 rows, the first of which is `row`.
uint8_t* write_codes(uint8_t* out, const StoreCodesArgs& a, int64_t row, int64_t begin, int width) {
    uint8_t codes[ROWS * SUPER];
    const int64_t columns = std::min<int64_t>(width, a.columns - begin);
    memset(codes, 0, sizeof codes);
    for (int64_t r = row; r < std::min(row + ROWS, a.rows); ++r) {
        memcpy(codes + (r - row) * SUPER, a.codes + r * a.columns + begin, columns);
    }
    return write_planes(out, codes, width, a.grouping->bits);
}

}  // namespace

uint8_t* write_planes(uint8_t* out, const uint8_t* codes, int width, int bits) {
    const Planes planes = planes_of(bits);
    for (int column = 0; column < width; column += planes.run) {
        for (const Plane& plane : planes.planes) {
            if (plane.width) out = write_plane(out, codes + column, planes.run, plane);
        }
    }
    return out;
}

void store_codes(const StoreCodesArgs& a) {
    const Grouping& g = *a.grouping;
    const bool super = g.scale == Grouping::SUPER_INT8 || g.scale == Grouping::SUPER_INT4;
    const int scale_bytes = super ? 1 : g.scale == Grouping::FLOAT32 ? 4 : 2;
    const int offset_bytes = super || g.offset == Grouping::ZERO ? 1 : scale_bytes;
    const int64_t groups = (a.columns + g.group - 1) / g.group, supers = (a.columns + SUPER - 1) / SUPER;
    const Numbers scales{a.scale, groups, scale_bytes}, offsets{a.offset, groups, offset_bytes};
    const Numbers super_scales{a.super_scale, supers, 2}, super_offsets{a.super_offset, supers, 2};
    const int64_t padding = std::max(PAD, g.group), padded = (a.columns + padding - 1) / padding * padding;
    const int64_t blocks = (a.rows + ROWS - 1) / ROWS;
    parallel_for(blocks, [&](int64_t block, int) {
        uint8_t* out = a.weight + block * a.block_bytes;
        const int64_t row = block * ROWS;
        for (int64_t begin = 0; begin < padded; begin += SUPER) {
            const int width = int(std::min<int64_t>(SUPER, padded - begin));
            const int64_t first = begin / g.group, count = width / g.group;
            if (super) out = super_scales.write(out, row, a.rows, begin / SUPER, 1);
            if (super && g.offset == Grouping::VALUE) out = super_offsets.write(out, row, a.rows, begin / SUPER, 1);
            uint8_t* const scales_at = out;
            out = scales.write(out, row, a.rows, first, count);
            if (g.scale == Grouping::SUPER_INT4) {
                uint8_t low[SUPER / 16 * ROWS];
                offsets.write(low, row, a.rows, first, count);
                for (int64_t i = 0; i < count * ROWS; ++i) scales_at[i] = uint8_t(scales_at[i] | low[i] << 4);
            } else if (g.offset != Grouping::NONE) {
                out = offsets.write(out, row, a.rows, first, count);
            }
            out = write_codes(out, a, row, begin, width);
        }
    });
}

}  // namespace moesaic
