// The ops over whole tensors: how the work is cut into tasks. Compiled once for each instruction set.

#include "kernels.h"

#include "attention.h"
#include "measure.h"
#include "plain.h"
#include "pool.h"
#include "sampling.h"
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

// How many blocks a task takes: some, unless that leaves too few tasks to share out evenly.
int64_t share_of(int64_t blocks) {
    const int64_t fair = blocks / (16 * threads());
    return fair < 1 ? 1 : least(fair, SOME);
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
    const int64_t share = share_of(m.blocks());
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
    const int64_t share = share_of(out_blocks);
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

constexpr int64_t MANY_ROWS = 96;  // rows of a task, unless one query's heads are more
constexpr int64_t FEW_ROWS = 16;   // up to here a long context is cut into several tasks

int64_t size_of(Type type) { return type == Type::int8 ? 1 : type == Type::float32 ? 4 : 2; }

void store_keys(const AttentionArgs& a) {
    const int64_t row = a.kv_heads * a.size, bytes = size_of(a.type), room = (a.size + 15) / 16 * 16;
    run_or_do((a.tokens + 63) / 64, a.tokens * row * TOUCHED, [&](int64_t task, int worker) {
        float* part = (float*)scratch(16 + worker, sizeof(float) * room);
        for (int64_t t = task * 64; t < (task + 1) * 64 && t < a.tokens; ++t) {
            for (int which = 0; which < 2; ++which) {
                const void* x = which ? a.v : a.k;
                void* y = which ? a.values : a.keys;
                if (a.type == a.cache_type) {
                    memcpy((char*)y + a.slots[t] * row * bytes, (const char*)x + t * row * bytes, row * bytes);
                    continue;
                }
                for (int64_t g = 0; g < a.kv_heads; ++g) {
                    const int64_t to = a.slots[t] * a.kv_heads + g;
                    read(x, a.type, t * row + g * a.size, a.size, part, room);
                    if (a.cache_type == Type::int8) {
                        round_head(part, a.size, (int8_t*)y + to * a.size, (which ? a.value_scales : a.key_scales) + to);
                    } else {
                        write(y, a.cache_type, to * a.size, a.size, part);
                    }
                }
            }
        }
    });
}

// Some tokens of one sequence with `heads` key heads from `head` on, over the places from .. until - 1.
struct Part {
    int64_t sequence, begin, end, head, heads, from, until;
    int64_t states;  // where its states go, from which others make the answer; -1: it makes the answer itself
};

int64_t close_after(int64_t place) { return (place / CLOSE + 1) * CLOSE; }

void attention(const AttentionArgs& a) {
    if (a.keys) store_keys(a);
    const int64_t shared = a.heads / a.kv_heads, at_once = shared >= MANY_ROWS ? 1 : MANY_ROWS / shared;
    const int64_t room = (a.size + 31) / 32 * 32;
    const auto first_seen = [&](int64_t t) { return a.window && a.positions[t] >= a.window ? a.positions[t] - a.window + 1 : 0; };
    const auto pieces_of = [](const Part& p) { return (p.until - 1) / CLOSE - p.from / CLOSE + 1; };
    // A prompt is cut into parts of some tokens and one key head. The last part of a sequence, where it is of
    // few rows (decoding), takes all key heads, which lie side by side, unless there were too few tasks then:
    // then it is cut into the pieces after which softmax is closed, and by heads.
    const auto for_parts = [&](const auto& each) {  // call each(part, few) for the parts, with all key heads
        for (int64_t s = 0; s < a.sequences; ++s) {
            for (int64_t t = a.starts[s]; t < a.starts[s + 1]; t += at_once) {
                const int64_t end = t + at_once < a.starts[s + 1] ? t + at_once : a.starts[s + 1];
                const bool few = end == a.starts[s + 1] && (end - t == 1 || (end - t) * shared <= FEW_ROWS);
                each(Part{s, t, end, 0, a.kv_heads, first_seen(t), a.positions[end - 1] + 1, -1}, few);
            }
        }
    };
    int64_t most = 0, few_parts = 0, pieces = 0, seen = 0;  // seen: places that all rows together look at
    for_parts([&](const Part& part, bool few) {
        most += few ? pieces_of(part) : 1;
        few_parts += few;
        pieces += few ? pieces_of(part) : 0;
        seen += (part.end - part.begin) * (part.until - part.from);
    });
    const int64_t wanted = 2 * threads();
    const bool cut = few_parts < wanted;
    int64_t step = a.kv_heads;
    while (step > 1 && (cut ? pieces : few_parts) * (a.kv_heads / step) < wanted) step = (step + 1) / 2;

    Part* parts = (Part*)scratch(0, 2 * sizeof(Part) * most * a.kv_heads);
    Part* joints = parts + most * a.kv_heads;  // parts of which there are states of pieces
    int64_t count = 0, joint = 0, memory = 0;
    for_parts([&](Part part, bool few) {
        for (; part.head < a.kv_heads; part.head += part.heads) {
            part.heads = few && a.kv_heads - part.head > step ? step : few ? a.kv_heads - part.head : 1;
            if (!few || !cut || pieces_of(part) == 1) {
                parts[count++] = part;
                continue;
            }
            Part& piece = joints[joint++] = part;
            piece.states = memory;
            memory += pieces_of(part) * part.heads * State::floats((part.end - part.begin) * shared, room);
            for (int64_t place = part.from, at = piece.states; place < part.until; place = close_after(place)) {
                Part& next = parts[count++] = part;
                next.from = place;
                next.until = close_after(place) < part.until ? close_after(place) : part.until;
                next.states = at;
                at += part.heads * State::floats((part.end - part.begin) * shared, room);
            }
        }
    });
    float* states = (float*)scratch(1, sizeof(float) * memory);
    const auto rows_of = [&](const Part& part) { return (part.end - part.begin) * shared; };
    const auto floats_of = [&](const Part& part) { return part.heads * State::floats(rows_of(part), room); };
    const auto row_at = [&](const Part& part, int64_t row) {  // of x or y; row: of the part's [heads][tokens][shared]
        const int64_t g = part.head + row / rows_of(part), r = row % rows_of(part);
        return ((part.begin + r / shared) * a.heads + g * shared + r % shared) * a.size;
    };
    const auto merge = [&](const Part& part, float* all, float* piece) {
        for (int64_t i = 0; i < part.heads; ++i) {
            const int64_t at = i * State::floats(rows_of(part), room);
            State::at(all + at, rows_of(part), room).merge(State::at(piece + at, rows_of(part), room), rows_of(part), room);
        }
    };
    const auto clear = [&](const Part& part, float* all) {
        for (int64_t i = 0; i < part.heads; ++i) {
            State::at(all + i * State::floats(rows_of(part), room), rows_of(part), room).clear(rows_of(part), room);
        }
    };
    const auto finish = [&](const Part& part, float* all) {
        for (int64_t row = 0; row < part.heads * rows_of(part); ++row) {
            const int64_t rows = rows_of(part), r = row % rows;
            const State state = State::at(all + row / rows * State::floats(rows, room), rows, room);
            float* out = state.out + r * room;
            for (int64_t k = 0; k < room; k += 16) store_float(out + k, div(load_float(out + k), set(state.total[r])));
            write(a.y, a.type, row_at(part, row), a.size, out);
        }
    };
    const float scaling = 1.0f / __builtin_sqrtf(float(a.size));
    run_or_do(count, 2 * seen * a.heads * a.size, [&](int64_t task, int worker) {
        const Part& part = parts[count - 1 - task];  // the longest contexts first
        const int64_t rows = rows_of(part), working = Queries::floats(part.heads, rows, room);
        float* place = (float*)scratch(16 + worker, sizeof(float) * (working + 2 * floats_of(part)));
        Queries x = {rows, shared, room, a.positions + part.begin, a.window, place, nullptr, nullptr, nullptr, nullptr};
        x.sums = x.q + part.heads * rows * room;
        x.scores = x.sums + part.heads * rows * 16;
        x.keys = x.scores + rows * KEYS;
        x.values = x.keys + KEYS * room;
        for (int64_t row = 0; row < part.heads * rows; ++row) {
            float* q = x.q + row * room;
            read(a.q, a.type, row_at(part, row), a.size, q, room);
            for (int64_t k = 0; k < room; k += 16) store_float(q + k, mul(load_float(q + k), set(scaling)));
        }
        const Context context = {
            a.keys ? a.keys : a.k, a.keys ? a.values : a.v, a.key_scales, a.value_scales, a.keys ? a.cache_type : a.type,
            a.keys ? a.tables + part.sequence * a.width : nullptr, a.starts[part.sequence], a.block,
            a.kv_heads, part.head, part.heads, a.size, room,
        };
        if (part.states >= 0) {
            attend(x, context, part.from, part.until, part.until, states + part.states);
            return;
        }
        float *all = place + working, *piece = all + floats_of(part);
        clear(part, all);
        for (int64_t from = part.from; from < part.until; from = close_after(from)) {
            attend(x, context, from, close_after(from) < part.until ? close_after(from) : part.until, part.until, piece);
            merge(part, all, piece);
        }
        finish(part, all);
    });
    run_or_do(joint, memory * TOUCHED, [&](int64_t task, int worker) {
        const Part& part = joints[task];
        float* all = (float*)scratch(16 + worker, sizeof(float) * floats_of(part));
        clear(part, all);
        for (int64_t i = 0; i < pieces_of(part); ++i) merge(part, all, states + part.states + i * floats_of(part));
        finish(part, all);
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

int64_t padded_floats(int64_t count) { return (count + 15) / 16 * 16; }

void truncate(const TruncateArgs& a) {
    run_or_do(a.rows, a.rows * a.vocabulary * TOUCHED, [&](int64_t t, int worker) {
        const int64_t room = padded_floats(a.vocabulary);
        float* x = (float*)scratch(16 + worker, sizeof(float) * room * 4);
        for (int64_t i = a.vocabulary; i < room; ++i) x[i] = 0;
        const Row row{a.vocabulary, x, x + room, x + 2 * room, (int32_t*)(x + 3 * room)};
        truncate_row(a.logits + t * a.vocabulary, a.settings + t * 5, a.y + t * a.vocabulary, row);
    });
}

void draw(const DrawArgs& a) {
    run_or_do(a.rows, a.rows * a.vocabulary * TOUCHED, [&](int64_t t, int worker) {
        const int64_t room = padded_floats(a.vocabulary);
        float* x = (float*)scratch(16 + worker, sizeof(float) * room * 2);
        for (int64_t i = a.vocabulary; i < room; ++i) x[i] = 0;
        a.ids[t] = draw_from(a.logits + t * a.vocabulary, a.numbers[t], x, x + room, a.vocabulary);
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
    truncate,
    draw,
    read_memory,
    multiply,
    multiply_bf16,
};

}  // namespace moesaic::MOESAIC_ISA
