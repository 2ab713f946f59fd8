// The ops over whole tensors: how the work is cut into tasks. Compiled once for each instruction set.

#include "kernels.h"

#include "attention.h"
#include "measure.h"
#include "plain.h"
#include "pool.h"
#include "tiles.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t AT_ONCE = 288 / TILE;  // tiles that share an unpacked superblock
constexpr int64_t SOME = 4;              // blocks that share a look at the tokens
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
template <class Tokens>
void round_row(const void* x, Type type, int64_t row, int64_t columns, const Tokens& tile, int i) {
    alignas(64) float part[SUPER];
    for (int64_t s = 0; s < supers(columns); ++s) {
        const int width = width_of(columns, s);
        read(x, type, row * columns + s * SUPER, width, part, padded(width));
        tile.round(i, s, width, part);
    }
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t tile_count(int64_t tokens) { return (tokens + TILE - 1) / TILE; }

// How `tokens` tokens make tiles: the one that begins with token `first` has this many. With tile
// registers full ones and a rest, else as equal ones as possible, since each size has a kernel.
int tile_size(int64_t tokens, int64_t first) {
    const int64_t left = tokens - first;
#if MOESAIC_AMX
    return int(least(left, TILE));
#else
    return int((left + tile_count(left) - 1) / tile_count(left));
#endif
}

// Lay out tiles for `tokens` tokens, in memory from `place` on; firsts[i]: the first token of each, and the end.
template <class Tokens>
int64_t lay(int64_t tokens, int64_t columns, Tokens* tiles, int64_t* firsts, uint8_t*& place) {
    int64_t count = 0;
    for (int64_t first = 0; first < tokens; ++count) {
        const int n = tile_size(tokens, first);
        tiles[count] = Tokens::at(place, columns, n);
        firsts[count] = first;
        place += Tokens::bytes(columns, n);
        first += n;
    }
    firsts[count] = tokens;
    return count;
}

// At least what lay() takes; what a tile register reads behind the last token is in it.
template <class Tokens>
int64_t bytes_of_tiles(int64_t tiles, int64_t columns) {
    return tiles * Tokens::bytes(columns, TILE) + 16 * SUPER;
}

template <class Format>
void linear(const LinearArgs& a) {
    using P = Products<Format>;
    using Tokens = typename P::Tokens;
    const Matrix m = {a.weight, a.out, a.columns};
    const int64_t most = tile_count(a.tokens);
    Tokens* tiles = (Tokens*)scratch(0, sizeof(Tokens) * most);
    int64_t* firsts = (int64_t*)scratch(1, sizeof(int64_t) * (most + 1));
    uint8_t* place = scratch(2, bytes_of_tiles<Tokens>(most, a.columns));
    const int64_t count = lay(a.tokens, a.columns, tiles, firsts, place);
    run_or_do(count, a.tokens * a.columns * TOUCHED, [&](int64_t i, int) {
        for (int j = 0; j < tiles[i].n; ++j) round_row(a.x, a.type, firsts[i] + j, a.columns, tiles[i], j);
    });
    const int64_t spans = (count + AT_ONCE - 1) / AT_ONCE;
    int64_t share = m.blocks() / (16 * threads());
    share = share < 1 ? 1 : least(share, SOME);
    const int64_t shares = (m.blocks() + share - 1) / share;
    run_or_do(shares * spans, a.tokens * a.columns * a.out, [&](int64_t task, int worker) {
        const int64_t span = task / shares, begin = count * span / spans, end = count * (span + 1) / spans;
        const int64_t first = task % shares * share, blocks = least(share, m.blocks() - first);
        const int64_t tokens = firsts[end] - firsts[begin], room = P::room(a.columns, int(blocks * (end - begin)));
        float* sums = (float*)scratch(16 + worker, sizeof(float) * blocks * tokens * ROWS + room);
        uint8_t* beside = (uint8_t*)(sums + blocks * tokens * ROWS);
        P::times(m, first, int(blocks), tiles + begin, int(end - begin), beside, sums);
        for (int64_t block = first; block < first + blocks; ++block) {
            const int width = int(least(a.out - block * ROWS, ROWS));
            for (int64_t t = firsts[begin]; t < firsts[end]; ++t, sums += ROWS) {
                write(a.y, a.type, t * a.out + block * ROWS, width, sums);
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
    using P = Products<Format>;
    using Tokens = typename P::Tokens;
    const int64_t chosen = a.tokens * a.choices;
    // Counting sort of the choices by expert, stable, so that sums are in the order of experts.
    int64_t* order = (int64_t*)scratch(0, sizeof(int64_t) * (chosen + a.experts + 1));
    int64_t* starts = order + chosen;
    memset(starts, 0, sizeof(int64_t) * (a.experts + 1));
    for (int64_t i = 0; i < chosen; ++i) ++starts[a.ids[i] + 1];
    for (int64_t e = 0; e < a.experts; ++e) starts[e + 1] += starts[e];
    for (int64_t i = 0; i < chosen; ++i) order[starts[a.ids[i]]++] = i;
    int64_t most = 0;  // tiles of all experts
    for (int64_t e = a.experts; e > 0; --e) {
        starts[e] = starts[e - 1];
        if (e < a.experts) most += tile_count(starts[e + 1] - starts[e]);
    }
    starts[0] = 0;
    most += tile_count(starts[1]);

    Crew* crews = (Crew*)scratch(1, sizeof(Crew) * a.experts);
    Tokens* tiles = (Tokens*)scratch(2, 2 * sizeof(Tokens) * most);
    Tokens* hidden = tiles + most;
    int64_t* firsts = (int64_t*)scratch(3, sizeof(int64_t) * (most + 1));  // each tile's first choice
    uint8_t* place = scratch(4, bytes_of_tiles<Tokens>(most, a.size));
    uint8_t* hidden_place = scratch(5, bytes_of_tiles<Tokens>(most, a.inner));
    int64_t active = 0, count = 0;
    for (int64_t e = 0; e < a.experts; ++e) {
        const int64_t n = starts[e + 1] - starts[e];
        if (!n) continue;
        Crew& crew = crews[active++] = {e, count, 0};
        lay(n, a.inner, hidden + count, firsts + count, hidden_place);
        crew.count = lay(n, a.size, tiles + count, firsts + count, place);
        for (int64_t i = 0; i < crew.count; ++i, ++count) firsts[count] += starts[e];
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
    const auto of_expert = [](const uint8_t* stack, int64_t expert, int64_t out, int64_t columns) {
        return Matrix{stack + expert * P::bytes({stack, out, columns}), out, columns};
    };
    const int64_t inner_supers = supers(a.inner);
    const int64_t work = chosen * a.size * a.inner;
    run_or_do(pieces * inner_supers, 2 * work, [&](int64_t task, int worker) {
        const Part& part = parts[task / inner_supers];
        const int64_t s = task % inner_supers, expert = crews[part.crew].expert;
        const Matrix gates = of_expert(a.gate, expert, a.inner, a.size), ups = of_expert(a.up, expert, a.inner, a.size);
        const int64_t tokens = firsts[part.end] - firsts[part.begin];
        const int here = int(part.end - part.begin);
        const int64_t room = P::room(a.size, int(SOME * here));
        float* gate = (float*)scratch(16 + worker, sizeof(float) * tokens * (2 * SOME * ROWS + SUPER) + room);
        float *up = gate + tokens * SOME * ROWS, *h = up + tokens * SOME * ROWS;
        uint8_t* beside = (uint8_t*)(h + tokens * SUPER);
        const int rows = width_of(a.inner, s), blocks = (rows + ROWS - 1) / ROWS;
        memset(h, 0, sizeof(float) * tokens * SUPER);
        for (int begin = 0; begin < blocks; begin += SOME) {
            const int some = int(least(SOME, blocks - begin));
            const int64_t first = s * (SUPER / ROWS) + begin;
            P::times(gates, first, some, tiles + part.begin, here, beside, gate);
            P::times(ups, first, some, tiles + part.begin, here, beside, up);
            const float *g = gate, *u = up;
            for (int b = begin; b < begin + some; ++b) {
                for (int64_t t = 0; t < tokens; ++t, g += ROWS, u += ROWS) gated(g, u, h + t * SUPER + b * ROWS);
            }
        }
        const float* from = h;
        for (int64_t i = part.begin; i < part.end; ++i) {
            for (int j = 0; j < hidden[i].n; ++j, from += SUPER) hidden[i].round(j, s, rows, from);
        }
    });

    // Each task owns some blocks of 32 columns of the answer and adds up all experts, in their order.
    const int64_t out_blocks = (a.size + ROWS - 1) / ROWS;
    int64_t share = out_blocks / (16 * threads());
    share = share < 1 ? 1 : least(share, SOME);
    const int64_t span = least(count, AT_ONCE);  // tiles of a part, at most
    run_or_do((out_blocks + share - 1) / share, work, [&](int64_t task, int worker) {
        const int64_t first = task * share, blocks = least(share, out_blocks - first);
        const int64_t room = P::room(a.inner, int(share * span));
        float* answers = (float*)scratch(16 + worker, sizeof(float) * (a.tokens + span * TILE) * blocks * ROWS + room);
        float* sums = answers + a.tokens * blocks * ROWS;
        uint8_t* beside = (uint8_t*)(sums + span * TILE * blocks * ROWS);
        memset(answers, 0, sizeof(float) * a.tokens * blocks * ROWS);
        for (int64_t p = 0; p < pieces; ++p) {
            const Part& part = parts[p];
            const Matrix downs = of_expert(a.down, crews[part.crew].expert, a.size, a.inner);
            P::times(downs, first, int(blocks), hidden + part.begin, int(part.end - part.begin), beside, sums);
            const float* sum = sums;
            for (int64_t b = 0; b < blocks; ++b) {
                for (int64_t i = firsts[part.begin]; i < firsts[part.end]; ++i, sum += ROWS) {
                    float* answer = answers + (b * a.tokens + order[i] / a.choices) * ROWS;
                    const F score = set(a.scores[order[i]]);
                    for (int r = 0; r < ROWS; r += 16) {
                        store_float(answer + r, fma(load_float(sum + r), score, load_float(answer + r)));
                    }
                }
            }
        }
        for (int64_t b = 0; b < blocks; ++b) {
            const int width = int(least(a.size - (first + b) * ROWS, ROWS));
            for (int64_t t = 0; t < a.tokens; ++t) {
                write(a.y, a.type, t * a.size + (first + b) * ROWS, width, answers + (b * a.tokens + t) * ROWS);
            }
        }
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
        case Format::bfloat16: return body(Plain{});
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
    multiply_bf16,
};

}  // namespace moesaic::MOESAIC_ISA
