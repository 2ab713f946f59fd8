// The ops over whole tensors: how the work is cut into tasks. Compiled once for each instruction set.

#include "kernels.h"

#include "attention.h"
#include "measure.h"
#include "pool.h"
#include "tiles.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t AT_ONCE = 24;          // tiles that share an unpacked superblock
constexpr int64_t TRIFLE = 1 << 19;      // multiplications that are not worth waking a thread for
constexpr int64_t TOUCHED = 32;          // multiplications that reading and writing a value costs as much as

// Run the tasks here if all of them together are a trifle.
template <class Body>
void run_or_do(int64_t count, int64_t multiplications, Body&& body) {
    if (multiplications <= TRIFLE) {
        for (int64_t i = 0; i < count; ++i) body(i, 0);
    } else {
        run(count, body);
    }
}

int width_of(int64_t columns, int64_t s) {
    const int64_t left = columns - s * SUPER;
    return int(left < SUPER ? left : SUPER);
}

// Round row `row` of x into place i of the tile.
void round_row(const void* x, Type type, int64_t row, int64_t columns, const TokenTile& tile, int i) {
    alignas(64) float part[SUPER];
    for (int64_t s = 0; s < supers(columns); ++s) {
        const int width = width_of(columns, s);
        read(x, type, row * columns + s * SUPER, width, part, padded(width));
        tile.round(i, s, width, part);
    }
}

// Tiles of as equal sizes as possible for `tokens` tokens, in memory from `place` on.
int64_t lay(int64_t tokens, int64_t columns, TokenTile* tiles, uint8_t*& place) {
    const int64_t count = (tokens + TILE - 1) / TILE;
    for (int64_t i = 0; i < count; ++i) {
        const int n = int(tokens * (i + 1) / count - tokens * i / count);
        tiles[i] = TokenTile::at(place, columns, n);
        place += TokenTile::bytes(columns, n);
    }
    return count;
}

int64_t bytes_of_tiles(int64_t tokens, int64_t columns) {
    return tokens * TokenTile::bytes(columns, 1);  // a larger tile is not larger than its tokens alone
}

template <class Format>
void linear(const LinearArgs& a) {
    const int64_t most = (a.tokens + TILE - 1) / TILE;
    TokenTile* tiles = (TokenTile*)scratch(0, sizeof(TokenTile) * most);
    uint8_t* place = scratch(1, bytes_of_tiles(a.tokens, a.columns));
    const int64_t count = lay(a.tokens, a.columns, tiles, place);
    run_or_do(count, a.tokens * a.columns * TOUCHED, [&](int64_t i, int) {
        for (int j = 0; j < tiles[i].n; ++j) {
            round_row(a.x, a.type, a.tokens * i / count + j, a.columns, tiles[i], j);
        }
    });
    const int64_t blocks = (a.out + ROWS - 1) / ROWS, bytes = block_bytes<Format>(a.columns);
    const int64_t spans = (count + AT_ONCE - 1) / AT_ONCE;
    int64_t share = blocks / (16 * threads());
    share = share < 1 ? 1 : share > 8 ? 8 : share;
    const int64_t shares = (blocks + share - 1) / share;
    run_or_do(shares * spans, a.tokens * a.columns * a.out, [&](int64_t task, int worker) {
        float* sums = (float*)scratch(16 + worker, sizeof(float) * AT_ONCE * TILE * ROWS);
        const int64_t span = task / shares, begin = count * span / spans, end = count * (span + 1) / spans;
        const int64_t until = (task % shares + 1) * share;
        for (int64_t block = task % shares * share; block < until && block < blocks; ++block) {
            block_times<Format>(a.weight + block * bytes, a.columns, tiles + begin, int(end - begin), sums);
            const float* sum = sums;
            const int width = int(a.out - block * ROWS < ROWS ? a.out - block * ROWS : ROWS);
            for (int64_t t = a.tokens * begin / count; t < a.tokens * end / count; ++t, sum += ROWS) {
                write(a.y, a.type, t * a.out + block * ROWS, width, sum);
            }
        }
    });
}

// h[0 .. 31] = silu(gate) * up
MOESAIC_INLINE void gated(const float* gate, const float* up, float* h) {
    for (int i = 0; i < ROWS; i += 16) {
        const F g = load_float(gate + i);
        store_float(h + i, div(mul(g, load_float(up + i)), add(set(1.0f), exp(mul(g, set(-1.0f))))));
    }
}

// The tokens of one expert.
struct Crew {
    int64_t expert;
    int64_t tiles, count;  // its tiles: the first, and how many
};

template <class Format>
void experts(const ExpertsArgs& a) {
    const int64_t chosen = a.tokens * a.choices;
    // Counting sort of the choices by expert, stable, so that sums are in the order of experts.
    int64_t* order = (int64_t*)scratch(0, sizeof(int64_t) * (chosen + a.experts + 1));
    int64_t* starts = order + chosen;
    memset(starts, 0, sizeof(int64_t) * (a.experts + 1));
    for (int64_t i = 0; i < chosen; ++i) ++starts[a.ids[i] + 1];
    for (int64_t e = 0; e < a.experts; ++e) starts[e + 1] += starts[e];
    for (int64_t i = 0; i < chosen; ++i) order[starts[a.ids[i]]++] = i;
    for (int64_t e = a.experts; e > 0; --e) starts[e] = starts[e - 1];
    starts[0] = 0;

    const int64_t most = chosen / TILE + a.experts + 1;
    Crew* crews = (Crew*)scratch(1, sizeof(Crew) * a.experts);
    TokenTile* tiles = (TokenTile*)scratch(2, 2 * sizeof(TokenTile) * most);
    TokenTile* hidden = tiles + most;
    int64_t* firsts = (int64_t*)scratch(3, sizeof(int64_t) * (most + 1));  // each tile's first choice
    uint8_t* place = scratch(4, bytes_of_tiles(chosen, a.size));
    uint8_t* hidden_place = scratch(5, bytes_of_tiles(chosen, a.inner));
    int64_t active = 0, count = 0;
    for (int64_t e = 0; e < a.experts; ++e) {
        const int64_t n = starts[e + 1] - starts[e];
        if (!n) continue;
        Crew& crew = crews[active++] = {e, count, 0};
        lay(n, a.inner, hidden + count, hidden_place);
        crew.count = lay(n, a.size, tiles + count, place);
        for (int64_t i = 0, at = starts[e]; i < crew.count; ++i, ++count) {
            firsts[count] = at;
            at += tiles[count].n;
        }
    }
    firsts[count] = chosen;
    run_or_do(count, chosen * a.size * TOUCHED, [&](int64_t i, int) {
        for (int j = 0; j < tiles[i].n; ++j) {
            round_row(a.x, a.type, order[firsts[i] + j] / a.choices, a.size, tiles[i], j);
        }
    });

    // Gate and up of 256 rows at a time: as many as the next activations have a common scale for.
    struct Part { int64_t crew, begin, end; };
    Part* parts = (Part*)scratch(6, sizeof(Part) * (count + 1));
    int64_t pieces = 0;
    for (int64_t c = 0; c < active; ++c) {
        const int64_t spans = (crews[c].count + AT_ONCE - 1) / AT_ONCE;
        for (int64_t i = 0; i < spans; ++i) {
            parts[pieces++] = {c, crews[c].tiles + crews[c].count * i / spans, crews[c].tiles + crews[c].count * (i + 1) / spans};
        }
    }
    const int64_t inner_supers = supers(a.inner), inner_blocks = (a.inner + ROWS - 1) / ROWS;
    const int64_t bytes = block_bytes<Format>(a.size);
    const int64_t work = chosen * a.size * a.inner;
    run_or_do(pieces * inner_supers, 2 * work, [&](int64_t task, int worker) {
        const Part& part = parts[task / inner_supers];
        const int64_t s = task % inner_supers;
        const int64_t tokens = firsts[part.end] - firsts[part.begin];
        float* gate = (float*)scratch(16 + worker, sizeof(float) * tokens * (2 * ROWS + SUPER));
        float *up = gate + tokens * ROWS, *h = up + tokens * ROWS;
        const int64_t expert = crews[part.crew].expert * inner_blocks, rows = width_of(a.inner, s);
        memset(h, 0, sizeof(float) * tokens * SUPER);
        for (int64_t b = 0; b * ROWS < rows; ++b) {
            const int64_t at = (expert + s * (SUPER / ROWS) + b) * bytes;
            block_times<Format>(a.gate + at, a.size, tiles + part.begin, int(part.end - part.begin), gate);
            block_times<Format>(a.up + at, a.size, tiles + part.begin, int(part.end - part.begin), up);
            for (int64_t t = 0; t < tokens; ++t) gated(gate + t * ROWS, up + t * ROWS, h + t * SUPER + b * ROWS);
        }
        const float* from = h;
        for (int64_t i = part.begin; i < part.end; ++i) {
            for (int j = 0; j < hidden[i].n; ++j, from += SUPER) hidden[i].round(j, s, int(rows), from);
        }
    });

    // Each task owns 32 columns of the answer and adds up all experts, in their order.
    const int64_t out_blocks = (a.size + ROWS - 1) / ROWS, down_bytes = block_bytes<Format>(a.inner);
    run_or_do(out_blocks, work, [&](int64_t block, int worker) {
        float* answers = (float*)scratch(16 + worker, sizeof(float) * (a.tokens + AT_ONCE * TILE) * ROWS);
        float* sums = answers + a.tokens * ROWS;
        memset(answers, 0, sizeof(float) * a.tokens * ROWS);
        for (int64_t p = 0; p < pieces; ++p) {
            const Part& part = parts[p];
            const uint8_t* weight = a.down + (crews[part.crew].expert * out_blocks + block) * down_bytes;
            block_times<Format>(weight, a.inner, hidden + part.begin, int(part.end - part.begin), sums);
            const float* sum = sums;
            for (int64_t i = firsts[part.begin]; i < firsts[part.end]; ++i, sum += ROWS) {
                float* answer = answers + order[i] / a.choices * ROWS;
                const F score = set(a.scores[order[i]]);
                for (int r = 0; r < ROWS; r += 16) {
                    store_float(answer + r, fma(load_float(sum + r), score, load_float(answer + r)));
                }
            }
        }
        const int width = int(a.size - block * ROWS < ROWS ? a.size - block * ROWS : ROWS);
        for (int64_t t = 0; t < a.tokens; ++t) write(a.y, a.type, t * a.size + block * ROWS, width, answers + t * ROWS);
    });
}

constexpr int64_t FEW_ROWS = 8;   // up to here keys are taken row by row
constexpr int64_t MANY_ROWS = 96;  // rows of a task, unless one query's heads are more

void store_keys(const AttentionArgs& a) {
    const int64_t row = a.kv_heads * a.size;
    const bool same = a.type == a.cache_type;
    const int64_t bytes = a.type == Type::float32 ? 4 : 2;
    run_or_do((a.tokens + 63) / 64, a.tokens * row * TOUCHED, [&](int64_t task, int) {
        for (int64_t t = task * 64; t < (task + 1) * 64 && t < a.tokens; ++t) {
            const int64_t to = a.slots[t] * row, from = t * row;
            for (int which = 0; which < 2; ++which) {
                const void* x = which ? a.v : a.k;
                void* y = which ? a.values : a.keys;
                if (same) {
                    memcpy((char*)y + to * bytes, (const char*)x + from * bytes, row * bytes);
                } else {
                    for (int64_t i = 0; i < row; ++i) write_one(y, a.cache_type, to + i, read_one(x, a.type, from + i));
                }
            }
        }
    });
}

void attention(const AttentionArgs& a) {
    if (a.keys) store_keys(a);
    // A task is some consecutive tokens of one sequence, with all query heads of one key head.
    const int64_t shared = a.heads / a.kv_heads, at_once = shared >= MANY_ROWS ? 1 : MANY_ROWS / shared;
    struct Part { int64_t sequence, begin, end; };
    Part* parts = (Part*)scratch(0, sizeof(Part) * (a.tokens / at_once + a.sequences + 1));
    int64_t count = 0, seen = 0;  // seen: keys that all tokens together look at
    for (int64_t s = 0; s < a.sequences; ++s) {
        if (a.starts[s + 1] > a.starts[s]) seen += (a.starts[s + 1] - a.starts[s]) * (a.positions[a.starts[s + 1] - 1] + 1);
        for (int64_t t = a.starts[s]; t < a.starts[s + 1]; t += at_once) {
            parts[count++] = {s, t, t + at_once < a.starts[s + 1] ? t + at_once : a.starts[s + 1]};
        }
    }
    const int64_t room = (a.size + 31) / 32 * 32;
    const float scaling = 1.0f / __builtin_sqrtf(float(a.size));
    run_or_do(count * a.kv_heads, 2 * seen * a.heads * a.size, [&](int64_t task, int worker) {
        const Part& part = parts[count - 1 - task / a.kv_heads];  // the longest contexts first
        const int64_t g = task % a.kv_heads, rows = (part.end - part.begin) * shared;
        Queries x = {rows, a.size, room, nullptr, nullptr, nullptr, nullptr, nullptr};
        x.q = (float*)scratch(16 + worker, sizeof(float) * (rows * (2 * room + KEYS + 2) + 2 * KEYS * room));
        x.out = x.q + rows * room;
        x.scores = x.out + rows * room;
        float* turned = x.scores + rows * KEYS;
        float* tile = turned + KEYS * room;
        x.top = tile + KEYS * room;
        x.total = x.top + rows;
        for (int64_t r = 0; r < rows; ++r) {
            float* q = x.q + r * room;
            read(a.q, a.type, ((part.begin + r / shared) * a.heads + g * shared + r % shared) * a.size, a.size, q, room);
            for (int64_t k = 0; k < a.size; ++k) q[k] *= scaling;
            x.top[r] = NEVER;
            x.total[r] = 0.0f;
        }
        memset(x.out, 0, sizeof(float) * rows * room);
        const int64_t stride = a.kv_heads * a.size;
        const int64_t* table = a.keys ? a.tables + part.sequence * a.width : nullptr;
        const Type type = a.keys ? a.cache_type : a.type;
        const int64_t first = a.starts[part.sequence];
        const Rows keys = {a.keys ? a.keys : a.k, type, table, first, a.block, stride, g * a.size};
        const Rows values = {a.keys ? a.values : a.v, type, table, first, a.block, stride, g * a.size};
        const int64_t* positions = a.positions + part.begin;
        if (rows <= FEW_ROWS) {
            for (int64_t t = 0; t < part.end - part.begin; ++t) {
                const int64_t begin = a.window && positions[t] >= a.window ? positions[t] - a.window + 1 : 0;
                for (int64_t r = 0; r < shared; r += 4) {
                    with_number<4>(int(shared - r < 4 ? shared - r : 4), [&](auto n) {
                        attend_few<n.value>(x, t * shared + r, keys, values, begin, positions[t] + 1);
                    });
                }
            }
        } else {
            attend_many(x, shared, positions, a.window, keys, values, turned, tile);
        }
        for (int64_t r = 0; r < rows; ++r) {
            float* out = x.out + r * room;
            for (int64_t k = 0; k < a.size; ++k) out[k] /= x.total[r];
            write(a.y, a.type, ((part.begin + r / shared) * a.heads + g * shared + r % shared) * a.size, a.size, out);
        }
    });
}

void rms_norm(const NormArgs& a) {
    run_or_do(a.tokens, a.tokens * a.size * TOUCHED, [&](int64_t t, int worker) {
        const int64_t room = (a.size + 15) / 16 * 16;
        float* x = (float*)scratch(16 + worker, sizeof(float) * room);
        read(a.x, a.type, t * a.size, a.size, x, room);
        F sum = zero();
        for (int64_t k = 0; k < room; k += 16) sum = fma(load_float(x + k), load_float(x + k), sum);
        const float scale = 1.0f / __builtin_sqrtf(sum_of(sum) / float(a.size) + a.eps);
        for (int64_t k = 0; k < a.size; ++k) x[k] = x[k] * scale * a.weight[k];
        write(a.y, a.type, t * a.size, a.size, x);
    });
}

void rope(const RopeArgs& a) {
    const int64_t half = a.size / 2;
    run_or_do(a.tokens, a.tokens * a.heads * a.size * TOUCHED, [&](int64_t t, int worker) {
        float* x = (float*)scratch(16 + worker, sizeof(float) * a.size * 2);
        float* y = x + a.size;
        const float *cos = a.cos + t * half, *sin = a.sin + t * half;
        for (int64_t h = 0; h < a.heads; ++h) {
            const int64_t at = (t * a.heads + h) * a.size;
            read(a.x, a.type, at, a.size, x, a.size);
            for (int64_t i = 0; i < half; ++i) {
                y[i] = x[i] * cos[i] - x[i + half] * sin[i];
                y[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
            }
            write(a.y, a.type, at, a.size, y);
        }
    });
}

// Call body with the type that stands for a format.
template <class Body>
void with_format(Format format, Body&& body) {
    switch (format) {
        case Format::int8: return body(Int8{});
        case Format::int4: return body(Int4{});
        case Format::int4_64: return body(Int4_64{});
        case Format::int3: return body(Int3{});
        case Format::int2: return body(Int2{});
    }
}

}  // namespace

#define MOESAIC_STRING(x) #x
#define MOESAIC_NAME(x) MOESAIC_STRING(x)

const Kernels kernels = {
    MOESAIC_NAME(MOESAIC_ISA),
    [](const LinearArgs& a) { with_format(a.format, [&](auto f) { linear<decltype(f)>(a); }); },
    [](const ExpertsArgs& a) { with_format(a.format, [&](auto f) { experts<decltype(f)>(a); }); },
    attention,
    rms_norm,
    rope,
    read_memory,
    multiply,
};

}  // namespace moesaic::MOESAIC_ISA
