// Attention of some queries over the keys and values of their own sequence, in float32.
//
// Keys and values are taken in tiles of 64 places: few rows (decoding) take them from where they lie,
// many (prefill) turn them into float32 once for all. Heads that share keys and values (GQA) are rows of
// the same tile. Softmax is kept up to date tile by tile (arXiv:2205.14135) and closed after every 512
// places; what came of these is merged in order. Tiles and closes lie at multiples of 64 and 512 whatever
// the task, and all sums are taken in the same order, so that a token gets the same bits in a prompt and
// alone, with one thread and with many.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace moesaic::MOESAIC_ISA {

constexpr int KEYS = 64;             // places of a tile
constexpr int64_t CLOSE = 512;       // places after which softmax is closed; whole tiles
constexpr int64_t DIRECT_ROWS = 8;   // up to here rows take keys and values from where they lie
constexpr float NEVER = -1e30f;      // a score that is not seen; finite, so that no difference is a NaN
constexpr float TINY = 0x1p-100f;    // what is not larger is rounded to zero: 127 / x stays finite

#if defined(__aarch64__)
typedef __fp16 Half;  // GCC knows _Float16 there from version 13 on only
#else
typedef _Float16 Half;
#endif

MOESAIC_INLINE float half_to_float(uint16_t x) {
    Half h;
    memcpy(&h, &x, 2);
    return float(h);
}

MOESAIC_INLINE uint16_t float_to_half(float f) {
    const Half h = Half(f);
    uint16_t x;
    memcpy(&x, &h, 2);
    return x;
}

// Copy `width` values to float32 and fill up with zeros to `room`.
MOESAIC_INLINE void read(const void* x, Type type, int64_t at, int64_t width, float* to, int64_t room) {
    switch (type) {
        case Type::float32: memcpy(to, (const float*)x + at, sizeof(float) * width); break;
        case Type::bfloat16:
            for (int64_t k = 0; k < width; ++k) to[k] = bf16_to_float(((const uint16_t*)x)[at + k]);
            break;
        default:
            for (int64_t k = 0; k < width; ++k) to[k] = half_to_float(((const uint16_t*)x)[at + k]);
    }
    for (int64_t k = width; k < room; ++k) to[k] = 0.0f;
}

MOESAIC_INLINE void write(void* y, Type type, int64_t at, int64_t width, const float* from) {
    switch (type) {
        case Type::float32: memcpy((float*)y + at, from, sizeof(float) * width); break;
        case Type::bfloat16:
            for (int64_t k = 0; k < width; ++k) ((uint16_t*)y)[at + k] = float_to_bf16(from[k]);
            break;
        default:
            for (int64_t k = 0; k < width; ++k) ((uint16_t*)y)[at + k] = float_to_half(from[k]);
    }
}

MOESAIC_INLINE float sum_of(F x) {
    F all[16];
    for (auto& each : all) each = zero();
    all[0] = x;
    float v[16];
    store_float(v, sums_of(all));
    return v[0];
}

MOESAIC_INLINE float exp_of(float x) {
    float v[16];
    store_float(v, exp(set(x)));
    return v[0];
}

// Round a head's key or value x: x = scale * to[.], to nearest, ties to even. `x` has zeros behind
// the last one up to a multiple of 16. Where something is not finite, the scale is NaN.
inline void round_head(const float* x, int64_t size, int8_t* to, float* scale) {
    I most = set(0);
    for (int64_t k = 0; k < size; k += 16) most = max(most, bit_and(load(x + k), set(0x7fffffff)));
    const int32_t top = largest(most);  // sizes compare like their bits, NaN and infinity above all others
    float reach;
    memcpy(&reach, &top, 4);
    if (top >= 0x7f800000) {
        memset(to, 0, size);
        *scale = __builtin_nanf("");
        return;
    }
    *scale = reach / 127.0f;
    const F factor = set(reach > TINY ? 127.0f / reach : 0.0f);
    for (int64_t k = 0; k < size; k += 16) {
        int32_t q[16];
        store(q, to_int(mul(load_float(x + k), factor)));
        for (int64_t i = 0; i < 16 && k + i < size; ++i) to[k + i] = int8_t(q[i]);
    }
}

// Copy `width` values of a cache, whose scale stays apart, to float32 and fill up with zeros to `room`.
MOESAIC_INLINE void read_cached(const void* x, Type type, int64_t at, int64_t width, float* to, int64_t room) {
    int64_t k = 0;
    if (type == Type::int8) {
        const int8_t* from = (const int8_t*)x + at;
        for (; k + 16 <= width; k += 16) store_float(to + k, to_float(load_signed_bytes(from + k)));
        for (; k < width; ++k) to[k] = float(from[k]);
        for (; k < room; ++k) to[k] = 0.0f;
    } else if (type == Type::bfloat16) {
        const uint16_t* from = (const uint16_t*)x + at;
        for (; k + 16 <= width; k += 16) store_float(to + k, load_bf16(from + k));
        for (; k < width; ++k) to[k] = bf16_to_float(from[k]);
        for (; k < room; ++k) to[k] = 0.0f;
    } else {
        read(x, type, at, width, to, room);
    }
}

// Keys and values of some key heads of one sequence: in the blocks of its table, or row by row in this step's own.
struct Context {
    const void *keys, *values;
    const float *key_scales, *value_scales;  // for int8
    Type type;
    const int64_t* table;  // null: place j is row `first` + j
    int64_t first, block, kv_heads, head, heads, size, room;  // heads: from `head` on

    // Row of each of the places begin .. end - 1 of the tile that begins at `tile`.
    void find(int64_t tile, int begin, int end, int64_t* rows) const {
        if (!table) {
            for (int j = begin; j < end; ++j) rows[j] = first + tile + j;
            return;
        }
        int64_t at = (tile + begin) / block, place = (tile + begin) % block;
        for (int j = begin; j < end; ++j) {
            rows[j] = table[at] * block + place;
            if (++place == block) {
                ++at;
                place = 0;
            }
        }
    }
};

// The places at + first .. at + count - 1, and which row of the cache each is in; the same of the tile that follows.
struct Tile {
    int64_t at;
    int first, count, coming;  // coming: places of the tile that follows, from its first on
    int64_t rows[KEYS], next[KEYS];
};

// Keys or values of one tile, already in float32.
struct Floats {
    const float* rows;
    int64_t room;
    bool scaled;
    float scale[KEYS];

    MOESAIC_INLINE F load(int j, int64_t k) const { return load_float(rows + j * room + k); }
    MOESAIC_INLINE void fetch(int, int64_t) const {}
};

// Keys or values of one tile where they lie, in rows of a multiple of 32 values.
template <Type TYPE>
struct InPlace {
    static constexpr int BYTES = TYPE == Type::int8 ? 1 : TYPE == Type::float32 ? 4 : 2;
    static constexpr bool scaled = TYPE == Type::int8;
    const char *row[KEYS], *next[KEYS];  // each row, and the row of the next tile that is asked for with it
    float scale[KEYS];

    // Take the rows of the i-th head, and ask for what is its turn of the next tile, all heads of which lie
    // side by side. Places that nobody sees get a row that somebody does.
    void set(const void* all, const float* scales, const Context& c, int64_t i, const Tile& tile) {
        const auto row_at = [&](int64_t at) { return (const char*)all + at * c.size * BYTES; };
        int64_t place = i * KEYS / c.heads, head = i * KEYS % c.heads;
        for (int j = 0; j < KEYS; ++j) {
            const int64_t at = tile.rows[j < tile.first || j >= tile.count ? tile.first : j] * c.kv_heads + c.head + i;
            row[j] = next[j] = row_at(at);
            if (scaled) scale[j] = scales[at];
            if (place < tile.coming) {
                const int64_t coming = tile.next[place] * c.kv_heads + c.head + head;
                next[j] = row_at(coming);
                if (scaled) prefetch(scales + coming);
            }
            if (++head == c.heads) {
                head = 0;
                ++place;
            }
        }
    }

    MOESAIC_INLINE F load(int j, int64_t k) const {
        const char* at = row[j] + k * BYTES;
        if (TYPE == Type::int8) return to_float(load_signed_bytes(at));
        return TYPE == Type::float32 ? load_float((const float*)at) : load_bf16((const uint16_t*)at);
    }
    MOESAIC_INLINE void fetch(int j, int64_t size) const {
        for (int64_t at = 0; at < size * BYTES; at += 64) __builtin_prefetch(next[j] + at, 0, 2);
    }
};

// What softmax carries along for some rows.
struct State {
    float* out;            // [rows][room], sums of e^(score - top) * value
    float *top, *total;    // [rows]: the largest score, and the sum of e^(score - top)

    static constexpr int64_t floats(int64_t rows, int64_t room) { return rows * (room + 2); }

    static State at(float* memory, int64_t rows, int64_t room) {
        return {memory, memory + rows * room, memory + rows * (room + 1)};
    }

    void clear(int64_t rows, int64_t room) const {
        memset(out, 0, sizeof(float) * rows * room);
        memset(total, 0, sizeof(float) * rows);
        for (int64_t r = 0; r < rows; ++r) top[r] = NEVER;
    }

    // Add the state of the same rows over the places that follow.
    void merge(const State& next, int64_t rows, int64_t room) const {
        for (int64_t r = 0; r < rows; ++r) {
            const float most = top[r] > next.top[r] ? top[r] : next.top[r];
            const float mine = exp_of(top[r] - most), others = exp_of(next.top[r] - most);
            top[r] = most;
            total[r] = total[r] * mine + next.total[r] * others;
            for (int64_t k = r * room; k < (r + 1) * room; k += 16) {
                store_float(out + k, fma(load_float(next.out + k), set(others), mul(load_float(out + k), set(mine))));
            }
        }
    }
};

// The rows (query, head) of one task, and what it works with.
struct Queries {
    int64_t rows, heads, room;  // of one key head: row r is head r % heads of query r / heads; room: a head, rounded up to 32
    const int64_t* positions;   // [queries], one after the other
    int64_t window;             // a query sees positions - window + 1 .. itself; 0: all from 0 on
    float* q;                   // [key heads][rows][room], scaled
    float* sums;                // [key heads][rows][16]: lanes of the sum of e^(score - top)
    float* scores;              // [rows][KEYS]
    float *keys, *values;       // [KEYS][room]

    static constexpr int64_t floats(int64_t key_heads, int64_t rows, int64_t room) {
        return key_heads * rows * (room + 16) + rows * KEYS + 2 * KEYS * room;
    }
};

// Turn row r's scores of one tile into weights. What came before is scaled to the new largest score.
inline void soften(const Queries& x, const State& state, int64_t r, const Tile& tile, const float* key_scales,
                   const float* value_scales) {
    float* s = x.scores + r * KEYS;
    const int wide = (tile.count + 15) / 16 * 16;
    const int64_t place = x.positions[r / x.heads] - tile.at, window = x.window ? place - x.window + 1 : 0;
    const int begin = int(window < 0 ? 0 : window < KEYS ? window : KEYS);
    const int end = int(place + 1 < tile.count ? place + 1 : tile.count);
    if (begin >= end) {
        memset(s, 0, sizeof(float) * wide);
        return;
    }
    if (key_scales) {
        for (int j = 0; j < wide; j += 16) store_float(s + j, mul(load_float(s + j), load_float(key_scales + j)));
    }
    for (int j = 0; j < begin; ++j) s[j] = NEVER;
    for (int j = end; j < wide; ++j) s[j] = NEVER;
    F most = load_float(s);
    for (int j = 16; j < wide; j += 16) most = max(most, load_float(s + j));
    const float before = state.top[r], found = largest_of(most), top = found > before ? found : before;
    F sum = load_float(x.sums + r * 16);
    if (top != before) {
        const F scale = exp(set(before - top));
        sum = mul(sum, scale);
        float* out = state.out + r * x.room;
        for (int64_t k = 0; k < x.room; k += 16) store_float(out + k, mul(load_float(out + k), scale));
        state.top[r] = top;
    }
    for (int j = 0; j < wide; j += 16) {
        const F p = exp(add(load_float(s + j), set(-top)));
        store_float(s + j, value_scales ? mul(p, load_float(value_scales + j)) : p);
        sum = add(sum, p);
    }
    store_float(x.sums + r * 16, sum);
}

// scores[r + i][j] = q[r + i] . keys[j] for i < N: in each lane every sixteenth product, then the sum across lanes.
template <int N, class Rows>
__attribute__((noinline)) void score(const Queries& x, int64_t r, const Rows& keys, int count) {
    constexpr int SUMS = TILE >= 12 ? 16 : 4;             // that fit the registers
    constexpr int ACROSS = 16 / N, AT_ONCE = SUMS / N;    // keys whose lanes are added up together, and multiplied
    const float* q = x.q + r * x.room;
    for (int j = 0; j < count; j += ACROSS) {
        F sums[16];
        if (r == 0) {
            for (int i = j; i < j + ACROSS; ++i) keys.fetch(i, x.room);
        }
        for (int b = 0; b < ACROSS; b += AT_ONCE) {
            F sum[N][AT_ONCE];
            for (auto& row : sum) {
                for (auto& each : row) each = zero();
            }
            for (int64_t k = 0; k < x.room; k += 16) {
                F key[AT_ONCE];
#pragma GCC unroll 16
                for (int i = 0; i < AT_ONCE; ++i) key[i] = keys.load(j + b + i, k);
#pragma GCC unroll 4
                for (int i = 0; i < N; ++i) {
                    const F one = load_float(q + i * x.room + k);
#pragma GCC unroll 16
                    for (int c = 0; c < AT_ONCE; ++c) sum[i][c] = fma(one, key[c], sum[i][c]);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < N; ++i) {
#pragma GCC unroll 16
                for (int c = 0; c < AT_ONCE; ++c) sums[i * ACROSS + b + c] = sum[i][c];
            }
        }
        float found[16];
        store_float(found, sums_of(sums));
        for (int i = 0; i < N; ++i) memcpy(x.scores + (r + i) * KEYS + j, found + i * ACROSS, sizeof(float) * ACROSS);
    }
}

// out[r + i] += sum over j of scores[r + i][j] * values[j] for i < N, in the order of j
template <int N, class Rows>
__attribute__((noinline)) void add_values(const Queries& x, const State& state, int64_t r, const Rows& values, int count) {
    int turn = 1, coming = 0;
    for (int64_t k = 0; k < x.room; k += 32) {
        F sum[N][2];
        float* out = state.out + r * x.room + k;
#pragma GCC unroll 12
        for (int i = 0; i < N; ++i) {
            sum[i][0] = load_float(out + i * x.room);
            sum[i][1] = load_float(out + i * x.room + 16);
        }
        const float* p = x.scores + r * KEYS;
        for (int j = 0; j < count; ++j) {
            const F a = values.load(j, k), b = values.load(j, k + 16);
            if (r == 0 && --turn == 0) {  // so that all are asked for, evenly, by the time the last column is done
                values.fetch(coming++, x.room);
                turn = int(x.room / 32);
            }
#pragma GCC unroll 12
            for (int i = 0; i < N; ++i) {
                const F one = set(p[i * KEYS + j]);
                sum[i][0] = fma(one, a, sum[i][0]);
                sum[i][1] = fma(one, b, sum[i][1]);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < N; ++i) {
            store_float(out + i * x.room, sum[i][0]);
            store_float(out + i * x.room + 16, sum[i][1]);
        }
    }
}

// Call body(n, r) for rows r .. r + n - 1 until all had their turn: MOST at a time, then 4, 2 and 1.
template <int MOST, class Body>
MOESAIC_INLINE void in_groups(int64_t rows, const Body& body, int64_t r = 0) {
    for (; r + MOST <= rows; r += MOST) body(Number<MOST>{}, r);
    if constexpr (MOST > 1) in_groups<(MOST > 4 ? 4 : MOST / 2)>(rows, body, r);
}

// Let the rows see one tile.
template <class Rows>
void see(const Queries& x, const State& state, const Rows& keys, const Rows& values, const Tile& tile) {
    const float *key_scales = keys.scaled ? keys.scale : nullptr, *value_scales = values.scaled ? values.scale : nullptr;
    in_groups<4>(x.rows, [&](auto n, int64_t r) { score<n.value>(x, r, keys, tile.count); });
    for (int64_t r = 0; r < x.rows; ++r) soften(x, state, r, tile, key_scales, value_scales);
    in_groups<TILE>(x.rows, [&](auto n, int64_t r) { add_values<n.value>(x, state, r, values, tile.count); });
}

// Call each(i, x, tile) for each tile of the places begin .. end - 1 and each key head i with its rows x.
// `until` is where what the rows see ends, so that the tile that follows is known.
template <class Each>
void for_tiles(const Queries& all, const Context& c, int64_t begin, int64_t end, int64_t until, const Each& each) {
    const auto within = [&](int64_t at) { return at >= until ? 0 : int(until - at < KEYS ? until - at : KEYS); };
    Tile tile;
    tile.first = int(begin % KEYS);
    tile.at = begin - tile.first;
    c.find(tile.at, tile.first, within(tile.at), tile.next);
    for (; tile.at < end; tile.at += KEYS, tile.first = 0) {
        tile.count = within(tile.at);
        tile.coming = within(tile.at + KEYS);
        memcpy(tile.rows, tile.next, sizeof tile.rows);
        c.find(tile.at + KEYS, 0, tile.coming, tile.next);
        for (int64_t i = 0; i < c.heads; ++i) {
            Queries x = all;
            x.q += i * x.rows * x.room;
            x.sums += i * x.rows * 16;
            each(i, x, tile);
        }
    }
}

// For each key head, the state of its rows over what they see of the places begin .. end - 1, between two
// multiples of CLOSE. Each place must be seen by one of the rows: what nobody sees may have been given back.
inline void attend(const Queries& all, const Context& c, int64_t begin, int64_t end, int64_t until, float* states) {
    const auto state_of = [&](int64_t i) {
        return State::at(states + i * State::floats(all.rows, all.room), all.rows, all.room);
    };
    for (int64_t i = 0; i < c.heads; ++i) state_of(i).clear(all.rows, all.room);
    memset(all.sums, 0, sizeof(float) * 16 * all.rows * c.heads);
    const auto in_place = [&](auto type) {
        InPlace<Type(type.value)> keys, values;
        for_tiles(all, c, begin, end, until, [&](int64_t i, const Queries& x, const Tile& tile) {
            keys.set(c.keys, c.key_scales, c, i, tile);
            values.set(c.values, c.value_scales, c, i, tile);
            see(x, state_of(i), keys, values, tile);
        });
    };
    const auto as_floats = [&] {
        const bool scaled = c.type == Type::int8;
        Floats keys = {all.keys, all.room, scaled, {}}, values = {all.values, all.room, scaled, {}};
        for_tiles(all, c, begin, end, until, [&](int64_t i, const Queries& x, const Tile& tile) {
            const int64_t filled = (tile.count + 15) / 16 * 16;
            memset(x.keys, 0, sizeof(float) * x.room * tile.first);
            memset(x.values, 0, sizeof(float) * x.room * tile.first);
            for (int j = tile.first; j < tile.count; ++j) {
                const int64_t at = tile.rows[j] * c.kv_heads + c.head + i;
                read_cached(c.keys, c.type, at * c.size, c.size, x.keys + j * x.room, x.room);
                read_cached(c.values, c.type, at * c.size, c.size, x.values + j * x.room, x.room);
                if (scaled) {
                    keys.scale[j] = c.key_scales[at];
                    values.scale[j] = c.value_scales[at];
                }
            }
            memset(x.keys + tile.count * x.room, 0, sizeof(float) * x.room * (filled - tile.count));
            see(x, state_of(i), keys, values, tile);
        });
    };
    if (all.rows > DIRECT_ROWS || all.room != c.size || c.type == Type::float16) {
        as_floats();
    } else if (c.type == Type::int8) {
        in_place(Number<int(Type::int8)>{});
    } else if (c.type == Type::bfloat16) {
        in_place(Number<int(Type::bfloat16)>{});
    } else {
        in_place(Number<int(Type::float32)>{});
    }
    for (int64_t i = 0; i < c.heads; ++i) {
        for (int64_t r = 0; r < all.rows; ++r) state_of(i).total[r] = sum_of(load_float(all.sums + (i * all.rows + r) * 16));
    }
}

}  // namespace moesaic::MOESAIC_ISA
