// The ops over whole tensors: how each op is divided into tasks. Compiled once for each instruction set.

#include "kernels.h"

#include "attention.h"
#include "gemm.h"
#include "grouped.h"
#include "measure.h"
#include "plain.h"
#include "pointwise.h"
#include "pool.h"
#include "rows.h"
#include "sampling.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t TILES_PER_PASS = 288 / TILE;  // tiles that share one pass over the weights
constexpr int64_t BLOCKS_PER_TASK = 4;          // blocks of a task, which share one pass over the tokens

int64_t size_of(Type type) { return type == Type::int8 ? 1 : type == Type::float32 ? 4 : 2; }

// to[i] = from[order[i]] for i < count. A damaged order selects the first number, never memory outside of the row.
template <class Number>
void gather(const Number* from, int64_t columns, const int32_t* order, int count, Number* to) {
    for (int i = 0; i < count; ++i) to[i] = from[uint32_t(order[i]) < columns ? order[i] : 0];
}

// Round row `row` of x into token i of the tile. `order` is that of the columns of the weight, or null.
template <class Tokens>
void round_row(const void* x, Type type, int64_t row, int64_t columns, const int32_t* order, const Tokens& tile, int i) {
    alignas(64) float part[SUPER];
    alignas(64) uint8_t gathered[SUPER * sizeof(float)];
    for (int64_t s = 0; s < supers(columns); ++s) {
        const int width = width_of(columns, s);
        if (!order) {
            read(x, type, row * columns + s * SUPER, width, part, padded(width));
        } else {
            if (size_of(type) == 4) {
                gather((const float*)x + row * columns, columns, order + s * SUPER, width, (float*)gathered);
            } else {
                gather((const uint16_t*)x + row * columns, columns, order + s * SUPER, width, (uint16_t*)gathered);
            }
            read(gathered, type, 0, width, part, padded(width));
        }
        tile.round(i, s, width, part);
    }
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t tile_count(int64_t tokens) { return (tokens + TILE - 1) / TILE; }

// The number of tokens in the tile that begins with token `first` of `tokens`. With tile registers, all tiles but the
// last are full. Otherwise tiles are as equal as possible, because there is a kernel for each size.
int tile_size(int64_t tokens, int64_t first) {
    const int64_t left = tokens - first;
#if MOESAIC_AMX
    return int(least(left, TILE));
#else
    return int((left + tile_count(left) - 1) / tile_count(left));
#endif
}

// Lay out tiles for `tokens` tokens in `memory`, which is advanced, and return their number.
// Set firsts[i] to the first token of tile i, and firsts[the number of tiles] to `tokens`.
template <class Tokens>
int64_t lay_out_tiles(int64_t tokens, int64_t columns, Tokens* tiles, int64_t* firsts, uint8_t*& memory) {
    int64_t count = 0;
    for (int64_t first = 0; first < tokens; ++count) {
        const int n = tile_size(tokens, first);
        tiles[count] = Tokens::at(memory, columns, n);
        firsts[count] = first;
        memory += Tokens::bytes(columns, n);
        first += n;
    }
    firsts[count] = tokens;
    return count;
}

// The number of blocks in a task: BLOCKS_PER_TASK, or fewer if there would be too few tasks to balance the threads.
int64_t blocks_per_task(int64_t blocks) {
    const int64_t balanced = blocks / (16 * threads());
    return balanced < 1 ? 1 : least(balanced, BLOCKS_PER_TASK);
}

// An upper bound of the bytes that lay_out_tiles() uses, including what a tile register reads beyond the last token.
template <class Tokens>
int64_t bytes_of_tiles(int64_t tiles, int64_t columns) {
    return tiles * Tokens::bytes(columns, TILE) + 16 * SUPER;
}

// Call body with a value of the type that stands for a format.
template <class Body>
void with_format(Format format, Body&& body) {
    switch (format) {
#define MOESAIC_FORMAT(name, Type) case Format::name: return body(Type{});
#include "formats/formats.def"
    }
}

// The activations of some tokens, rounded in tiles. Tile i begins with token firsts[i].
template <class Tokens>
struct RoundedTokens {
    Tokens* tiles;
    int64_t* firsts;
    int64_t count, passes;
};

template <class Tokens>
RoundedTokens<Tokens> round_tokens(const LinearArgs& a) {
    const int64_t max_tiles = tile_count(a.tokens);
    RoundedTokens<Tokens> x;
    x.tiles = (Tokens*)scratch(0, sizeof(Tokens) * max_tiles);
    x.firsts = (int64_t*)scratch(1, sizeof(int64_t) * (max_tiles + 1));
    uint8_t* memory = scratch(2, bytes_of_tiles<Tokens>(max_tiles, a.columns));
    x.count = lay_out_tiles(a.tokens, a.columns, x.tiles, x.firsts, memory);
    x.passes = (x.count + TILES_PER_PASS - 1) / TILES_PER_PASS;
    parallel_for_or_inline(x.count, a.tokens * a.columns * COST_PER_VALUE, [&](int64_t i, int) {
        for (int j = 0; j < x.tiles[i].n; ++j) {
            round_row(a.x, a.type, x.firsts[i] + j, a.columns, a.order, x.tiles[i], j);
        }
    });
    return x;
}

// How a linear layer is divided into tasks: `share` blocks of rows for each pass over the tokens.
struct LinearTasks {
    int64_t blocks, share, shares, count;

    LinearTasks(const LinearArgs& a, int64_t passes) {
        blocks = (a.out + ROWS - 1) / ROWS;
        share = blocks_per_task(blocks);
        shares = (blocks + share - 1) / share;
        count = shares * passes;
    }
};

// Compute one task of a linear layer.
template <class P>
void multiply_task(const LinearArgs& a, const RoundedTokens<typename P::Tokens>& x, const LinearTasks& tasks, int64_t task, int worker) {
    const Matrix m = {a.weight, a.out, a.columns, a.grouping};
    const int64_t pass = task / tasks.shares, begin = x.count * pass / x.passes, end = x.count * (pass + 1) / x.passes;
    const int64_t first = task % tasks.shares * tasks.share, blocks = least(tasks.share, tasks.blocks - first);
    const int64_t tokens = x.firsts[end] - x.firsts[begin];
    const int64_t extra = P::workspace_bytes(a.columns, int(blocks * (end - begin)));
    float* sums = (float*)scratch(16 + worker, sizeof(float) * blocks * tokens * ROWS + extra);
    uint8_t* workspace = (uint8_t*)(sums + blocks * tokens * ROWS);
    P::gemm(m, first, int(blocks), x.tiles + begin, int(end - begin), workspace, sums);
    for (int64_t block = first; block < first + blocks; ++block) {
        const int width = int(least(a.out - block * ROWS, ROWS));
        for (int64_t t = x.firsts[begin]; t < x.firsts[end]; ++t, sums += ROWS) {
            write(a.y, a.y_type, t * a.out + block * ROWS, width, sums);
        }
    }
}

constexpr int64_t MAX_LAYERS = 8;  // linear layers of one call

// The layers' formats all have these rounded tokens. Tasks are numbered over all layers.
template <class Tokens>
void linears(const LinearsArgs& a) {
    const RoundedTokens<Tokens> x = round_tokens<Tokens>(a.layers[0]);
    int64_t total = 0, work = 0, starts[MAX_LAYERS + 1] = {0};
    for (int64_t i = 0; i < a.count; ++i) {
        const LinearArgs& layer = a.layers[i];
        starts[i + 1] = total += LinearTasks(layer, x.passes).count;
        work += layer.tokens * layer.columns * layer.out;
    }
    parallel_for_or_inline(total, work, [&](int64_t task, int worker) {
        int64_t i = 0;
        while (task >= starts[i + 1]) ++i;
        const LinearArgs& layer = a.layers[i];
        with_format(layer.format, [&](auto f) {
            using P = Products<decltype(f)>;
            if constexpr (__is_same(typename P::Tokens, Tokens)) {
                multiply_task<P>(layer, x, LinearTasks(layer, x.passes), task - starts[i], worker);
            }
        });
    });
}

void linears(const LinearsArgs& a) {
    with_format(a.layers[0].format, [&](auto f) { linears<typename Products<decltype(f)>::Tokens>(a); });
}

// h[0 .. 31] = silu(gate) * up
MOESAIC_INLINE void gated_row(const float* gate, const float* up, float* h) {
    for (int i = 0; i < ROWS; i += 16) store_float(h + i, gated(load_float(gate + i), load_float(up + i)));
}

// The tiles begin .. end - 1, which belong to one expert and share one pass over its weights.
struct ExpertTokens {
    int64_t expert, begin, end;
};

// The activations of a step in tiles, sorted by expert. A choice is a pair of a token and one of its experts:
// number t * choices + j is the j-th expert of token t.
template <class Tokens>
struct ExpertBatch {
    int64_t* order;        // [all choices]: their numbers, sorted by expert
    int64_t* firsts;       // [tiles + 1]: index in `order` of the first choice of each tile
    Tokens *gate, *up, *hidden;  // [tiles]: the inputs of gate, up and down; those of gate and up are often the same
    int64_t tiles_count;
    ExpertTokens* passes;  // [pass_count], in the order of experts
    int64_t pass_count;
};

// Sort the choices by expert: those of expert e become order[starts[e] .. starts[e + 1] - 1]. This is a stable counting
// sort, so the contributions to a token are added in the order of experts.
void sort_by_expert(const ExpertsArgs& a, int64_t* order, int64_t* starts) {
    const int64_t chosen = a.tokens * a.choices;
    memset(starts, 0, sizeof(int64_t) * (a.experts + 1));
    for (int64_t i = 0; i < chosen; ++i) ++starts[a.ids[i] + 1];
    for (int64_t e = 0; e < a.experts; ++e) starts[e + 1] += starts[e];
    for (int64_t i = 0; i < chosen; ++i) order[starts[a.ids[i]]++] = i;
    for (int64_t e = a.experts; e > 0; --e) starts[e] = starts[e - 1];
    starts[0] = 0;
}

// The order of the columns of one expert in a stack, or null.
const int32_t* order_of(const int32_t* orders, int64_t expert, int64_t columns) {
    return orders ? orders + expert * columns : nullptr;
}

// Whether gate and up of the experts that have choices store their columns in the same order.
bool have_same_inputs(const ExpertsArgs& a, const int64_t* starts) {
    if (!a.gate_order || !a.up_order) return a.gate_order == a.up_order;
    for (int64_t e = 0; e < a.experts; ++e) {
        const int64_t at = e * a.size;
        if (starts[e] < starts[e + 1] && memcmp(a.gate_order + at, a.up_order + at, sizeof(int32_t) * a.size)) return false;
    }
    return true;
}

// Round the activations of all choices into tiles, in the order of the columns that the experts have.
template <class Tokens>
void round_choices(const ExpertsArgs& a, const ExpertBatch<Tokens>& batch, const int32_t* orders, const Tokens* tiles) {
    parallel_for_or_inline(batch.tiles_count, a.tokens * a.choices * a.size * COST_PER_VALUE, [&](int64_t i, int) {
        const int64_t* choices = batch.order + batch.firsts[i];
        const int32_t* order = order_of(orders, a.ids[choices[0]], a.size);
        for (int j = 0; j < tiles[i].n; ++j) {
            round_row(a.x, a.type, choices[j] / a.choices, a.size, order, tiles[i], j);
        }
    });
}

// Sort the choices by expert, lay out their tiles, and round the activations into them.
template <class Tokens>
ExpertBatch<Tokens> gather_by_expert(const ExpertsArgs& a) {
    ExpertBatch<Tokens> batch;
    const int64_t chosen = a.tokens * a.choices;
    batch.order = (int64_t*)scratch(0, sizeof(int64_t) * (chosen + a.experts + 1));
    int64_t* starts = batch.order + chosen;
    sort_by_expert(a, batch.order, starts);
    int64_t max_tiles = 0;
    for (int64_t e = 0; e < a.experts; ++e) max_tiles += tile_count(starts[e + 1] - starts[e]);

    const bool same = have_same_inputs(a, starts);
    batch.gate = (Tokens*)scratch(2, 3 * sizeof(Tokens) * max_tiles);
    batch.up = same ? batch.gate : batch.gate + max_tiles;
    batch.hidden = batch.gate + 2 * max_tiles;
    batch.firsts = (int64_t*)scratch(3, sizeof(int64_t) * (max_tiles + 1));
    batch.passes = (ExpertTokens*)scratch(6, sizeof(ExpertTokens) * (max_tiles + 1));
    uint8_t* gate_memory = scratch(4, bytes_of_tiles<Tokens>(max_tiles, a.size));
    uint8_t* up_memory = same ? nullptr : scratch(7, bytes_of_tiles<Tokens>(max_tiles, a.size));
    uint8_t* hidden_memory = scratch(5, bytes_of_tiles<Tokens>(max_tiles, a.inner));
    int64_t count = 0, passes = 0;
    for (int64_t e = 0; e < a.experts; ++e) {
        const int64_t n = starts[e + 1] - starts[e], begin = count;
        if (!n) continue;
        lay_out_tiles(n, a.inner, batch.hidden + begin, batch.firsts + begin, hidden_memory);
        if (!same) lay_out_tiles(n, a.size, batch.up + begin, batch.firsts + begin, up_memory);
        const int64_t tiles = lay_out_tiles(n, a.size, batch.gate + begin, batch.firsts + begin, gate_memory);
        for (; count < begin + tiles; ++count) batch.firsts[count] += starts[e];
        const int64_t expert_passes = (tiles + TILES_PER_PASS - 1) / TILES_PER_PASS;
        for (int64_t i = 0; i < expert_passes; ++i) {
            batch.passes[passes++] = {e, begin + tiles * i / expert_passes, begin + tiles * (i + 1) / expert_passes};
        }
    }
    batch.firsts[count] = chosen;
    batch.tiles_count = count;
    batch.pass_count = passes;
    round_choices(a, batch, a.gate_order, batch.gate);
    if (!same) round_choices(a, batch, a.up_order, batch.up);
    return batch;
}

// The matrix [out, columns] of one expert in a stack.
template <class P>
Matrix matrix_of(const uint8_t* stack, int64_t expert, int64_t out, int64_t columns, const Grouping* grouping) {
    return {stack + expert * P::bytes({stack, out, columns, grouping}), out, columns, grouping};
}

// hidden = silu(gate x) * (up x), rounded. A task computes 256 rows, which share one scale of the hidden activations. If
// down stores its columns in another order, they are rounded after all of them are known.
template <class P>
void gate_and_up(const ExpertsArgs& a, const ExpertBatch<typename P::Tokens>& batch) {
    const int64_t inner_supers = supers(a.inner), work = a.tokens * a.choices * a.size * a.inner;
    float* unordered = a.down_order ? (float*)scratch(8, sizeof(float) * a.tokens * a.choices * a.inner) : nullptr;
    parallel_for_or_inline(batch.pass_count * inner_supers, 2 * work, [&](int64_t task, int worker) {
        const ExpertTokens& pass = batch.passes[task / inner_supers];
        const int64_t s = task % inner_supers;
        const Matrix gates = matrix_of<P>(a.gate, pass.expert, a.inner, a.size, a.gate_grouping);
        const Matrix ups = matrix_of<P>(a.up, pass.expert, a.inner, a.size, a.up_grouping);
        const int64_t tokens = batch.firsts[pass.end] - batch.firsts[pass.begin];
        const int tiles = int(pass.end - pass.begin);
        const int64_t extra = P::workspace_bytes(a.size, int(BLOCKS_PER_TASK * tiles));
        float* gate = (float*)scratch(16 + worker, sizeof(float) * tokens * (2 * BLOCKS_PER_TASK * ROWS + SUPER) + extra);
        float *up = gate + tokens * BLOCKS_PER_TASK * ROWS, *h = up + tokens * BLOCKS_PER_TASK * ROWS;
        uint8_t* workspace = (uint8_t*)(h + tokens * SUPER);
        const int rows = width_of(a.inner, s), blocks = (rows + ROWS - 1) / ROWS;
        memset(h, 0, sizeof(float) * tokens * SUPER);
        for (int begin = 0; begin < blocks; begin += BLOCKS_PER_TASK) {
            const int count = int(least(BLOCKS_PER_TASK, blocks - begin));
            const int64_t first = s * (SUPER / ROWS) + begin;
            P::gemm(gates, first, count, batch.gate + pass.begin, tiles, workspace, gate);
            P::gemm(ups, first, count, batch.up + pass.begin, tiles, workspace, up);
            const float *g = gate, *u = up;
            for (int b = begin; b < begin + count; ++b) {
                for (int64_t t = 0; t < tokens; ++t, g += ROWS, u += ROWS) gated_row(g, u, h + t * SUPER + b * ROWS);
            }
        }
        const float* from = h;
        for (int64_t i = pass.begin; i < pass.end; ++i) {
            for (int j = 0; j < batch.hidden[i].n; ++j, from += SUPER) {
                if (unordered) {
                    memcpy(unordered + (batch.firsts[i] + j) * a.inner + s * SUPER, from, sizeof(float) * rows);
                } else {
                    batch.hidden[i].round(j, s, rows, from);
                }
            }
        }
    });
    if (!unordered) return;
    parallel_for_or_inline(batch.tiles_count, a.tokens * a.choices * a.inner * COST_PER_VALUE, [&](int64_t i, int) {
        const int32_t* order = order_of(a.down_order, a.ids[batch.order[batch.firsts[i]]], a.inner);
        for (int j = 0; j < batch.hidden[i].n; ++j) {
            round_row(unordered, Type::float32, batch.firsts[i] + j, a.inner, order, batch.hidden[i], j);
        }
    });
}

// y = sum over the experts of score * (down hidden). A task computes some blocks of 32 columns of y for all tokens, and
// adds the experts in their order.
template <class P>
void down_and_sum(const ExpertsArgs& a, const ExpertBatch<typename P::Tokens>& batch) {
    const int64_t out_blocks = (a.size + ROWS - 1) / ROWS, work = a.tokens * a.choices * a.size * a.inner;
    const int64_t share = blocks_per_task(out_blocks);
    const int64_t max_tiles = least(batch.tiles_count, TILES_PER_PASS);  // in a pass
    parallel_for_or_inline((out_blocks + share - 1) / share, work, [&](int64_t task, int worker) {
        const int64_t first = task * share, blocks = least(share, out_blocks - first);
        const int64_t extra = P::workspace_bytes(a.inner, int(share * max_tiles));
        float* answers = (float*)scratch(16 + worker, sizeof(float) * (a.tokens + max_tiles * TILE) * blocks * ROWS + extra);
        float* sums = answers + a.tokens * blocks * ROWS;
        uint8_t* workspace = (uint8_t*)(sums + max_tiles * TILE * blocks * ROWS);
        memset(answers, 0, sizeof(float) * a.tokens * blocks * ROWS);
        for (int64_t p = 0; p < batch.pass_count; ++p) {
            const ExpertTokens& pass = batch.passes[p];
            const Matrix downs = matrix_of<P>(a.down, pass.expert, a.size, a.inner, a.down_grouping);
            P::gemm(downs, first, int(blocks), batch.hidden + pass.begin, int(pass.end - pass.begin), workspace, sums);
            const float* sum = sums;
            for (int64_t b = 0; b < blocks; ++b) {
                for (int64_t i = batch.firsts[pass.begin]; i < batch.firsts[pass.end]; ++i, sum += ROWS) {
                    float* answer = answers + (b * a.tokens + batch.order[i] / a.choices) * ROWS;
                    const F score = set(a.scores[batch.order[i]]);
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

template <class Format>
void experts(const ExpertsArgs& a) {
    using P = Products<Format>;
    const ExpertBatch<typename P::Tokens> batch = gather_by_expert<typename P::Tokens>(a);
    gate_and_up<P>(a, batch);
    down_and_sum<P>(a, batch);
}

constexpr int64_t MAX_TASK_ROWS = 96;   // rows of a task, unless the heads of a single query are more
constexpr int64_t MAX_SPLIT_ROWS = 16;  // with at most this many rows, a long context may be split into several tasks

// Store the keys and values of this step in the cache.
void store_in_cache(const AttentionArgs& a) {
    const int64_t row = a.kv_heads * a.size, bytes = size_of(a.type), padded_size = padded_floats(a.size);
    parallel_for_or_inline((a.tokens + 63) / 64, a.tokens * row * COST_PER_VALUE, [&](int64_t task, int worker) {
        float* part = (float*)scratch(16 + worker, sizeof(float) * padded_size);
        for (int64_t t = task * 64; t < (task + 1) * 64 && t < a.tokens; ++t) {
            for (int is_value = 0; is_value < 2; ++is_value) {
                const void* x = is_value ? a.v : a.k;
                void* y = is_value ? a.values : a.keys;
                if (a.type == a.cache_type) {
                    memcpy((char*)y + a.slots[t] * row * bytes, (const char*)x + t * row * bytes, row * bytes);
                    continue;
                }
                for (int64_t g = 0; g < a.kv_heads; ++g) {
                    const int64_t to = a.slots[t] * a.kv_heads + g;
                    read(x, a.type, t * row + g * a.size, a.size, part, padded_size);
                    if (a.cache_type == Type::int8) {
                        round_head(part, a.size, (int8_t*)y + to * a.size, (is_value ? a.value_scales : a.key_scales) + to);
                    } else {
                        write(y, a.cache_type, to * a.size, a.size, part);
                    }
                }
            }
        }
    });
}

// Attention of the tokens begin .. end - 1 of one sequence, with the key heads head .. head + heads - 1, over the
// positions from .. until - 1.
struct AttentionTask {
    int64_t sequence, begin, end, head, heads, from, until;
    int64_t states;  // offset of its softmax states, which a later phase combines; -1: the task writes the output itself
};

// The end of the softmax chunk that contains a position.
int64_t chunk_end(int64_t position) { return (position / SOFTMAX_CHUNK + 1) * SOFTMAX_CHUNK; }

int64_t chunk_count(const AttentionTask& task) { return (task.until - 1) / SOFTMAX_CHUNK - task.from / SOFTMAX_CHUNK + 1; }

// How an attention op is divided into tasks.
struct AttentionPlan {
    const AttentionArgs& a;
    int64_t shared;       // query heads that share a key head
    int64_t padded_size;  // head size, rounded up to 32
    AttentionTask *tasks, *splits;  // splits: parts whose chunks became tasks of their own; their states are combined
    int64_t task_count, split_count;
    int64_t state_floats;  // of the states of all splits
    int64_t work;          // query tokens times the positions they see

    int64_t rows(const AttentionTask& task) const { return (task.end - task.begin) * shared; }
    int64_t head_floats(const AttentionTask& task) const { return SoftmaxState::floats(rows(task), padded_size); }
    int64_t floats(const AttentionTask& task) const { return task.heads * head_floats(task); }

    // The offset in q or y of a row, counted over the task's [heads][tokens][shared].
    int64_t row_offset(const AttentionTask& task, int64_t row) const {
        const int64_t g = task.head + row / rows(task), r = row % rows(task);
        return ((task.begin + r / shared) * a.heads + g * shared + r % shared) * a.size;
    }

    SoftmaxState state(const AttentionTask& task, float* states, int64_t head) const {
        return SoftmaxState::at(states + head * head_floats(task), rows(task), padded_size);
    }
    void clear(const AttentionTask& task, float* states) const {
        for (int64_t i = 0; i < task.heads; ++i) state(task, states, i).clear(rows(task), padded_size);
    }
    void combine(const AttentionTask& task, float* states, float* next) const {
        for (int64_t i = 0; i < task.heads; ++i) {
            state(task, states, i).combine(state(task, next, i), rows(task), padded_size);
        }
    }
    // Divide the sums by the softmax totals and write y.
    void finish(const AttentionTask& task, float* states) const {
        for (int64_t row = 0; row < task.heads * rows(task); ++row) {
            const int64_t r = row % rows(task);
            const SoftmaxState s = state(task, states, row / rows(task));
            float* out = s.out + r * padded_size;
            for (int64_t k = 0; k < padded_size; k += 16) store_float(out + k, div(load_float(out + k), set(s.total[r])));
            write(a.y, a.type, row_offset(task, row), a.size, out);
        }
    }
};

// Call body(part, few) for each group of tokens of a sequence, with all key heads. `few` says that the group is the
// last of its sequence and has few rows, as in decoding.
template <class Body>
void for_each_part(const AttentionArgs& a, int64_t shared, const Body& body) {
    const int64_t tokens_per_task = shared >= MAX_TASK_ROWS ? 1 : MAX_TASK_ROWS / shared;
    for (int64_t s = 0; s < a.sequences; ++s) {
        for (int64_t t = a.starts[s]; t < a.starts[s + 1]; t += tokens_per_task) {
            const int64_t end = t + tokens_per_task < a.starts[s + 1] ? t + tokens_per_task : a.starts[s + 1];
            const bool few = end == a.starts[s + 1] && (end - t == 1 || (end - t) * shared <= MAX_SPLIT_ROWS);
            const int64_t first_seen = a.window && a.positions[t] >= a.window ? a.positions[t] - a.window + 1 : 0;
            body(AttentionTask{s, t, end, 0, a.kv_heads, first_seen, a.positions[end - 1] + 1, -1}, few);
        }
    }
}

// Divide the work into tasks. In a prompt, a task has some tokens and one key head. In decoding, a task has all key
// heads, which are adjacent in memory. If that gives too few tasks for the threads, a decoding part is split by chunks
// of its context (split-K) and by heads.
AttentionPlan plan_attention(const AttentionArgs& a) {
    AttentionPlan plan = {a, a.heads / a.kv_heads, (a.size + 31) / 32 * 32, nullptr, nullptr, 0, 0, 0, 0};
    int64_t max_tasks = 0, few_parts = 0, chunks = 0;
    for_each_part(a, plan.shared, [&](const AttentionTask& part, bool few) {
        max_tasks += few ? chunk_count(part) : 1;
        few_parts += few;
        chunks += few ? chunk_count(part) : 0;
        plan.work += (part.end - part.begin) * (part.until - part.from);
    });
    const int64_t wanted = 2 * threads();
    const bool split = few_parts < wanted;
    int64_t heads = a.kv_heads;  // of a task of a decoding part
    while (heads > 1 && (split ? chunks : few_parts) * (a.kv_heads / heads) < wanted) heads = (heads + 1) / 2;

    plan.tasks = (AttentionTask*)scratch(0, 2 * sizeof(AttentionTask) * max_tasks * a.kv_heads);
    plan.splits = plan.tasks + max_tasks * a.kv_heads;
    for_each_part(a, plan.shared, [&](AttentionTask part, bool few) {
        for (; part.head < a.kv_heads; part.head += part.heads) {
            part.heads = few && a.kv_heads - part.head > heads ? heads : few ? a.kv_heads - part.head : 1;
            if (!few || !split || chunk_count(part) == 1) {
                plan.tasks[plan.task_count++] = part;
                continue;
            }
            plan.splits[plan.split_count] = part;
            plan.splits[plan.split_count++].states = plan.state_floats;
            for (int64_t from = part.from; from < part.until; from = chunk_end(from)) {
                AttentionTask& task = plan.tasks[plan.task_count++] = part;
                task.from = from;
                task.until = chunk_end(from) < part.until ? chunk_end(from) : part.until;
                task.states = plan.state_floats;
                plan.state_floats += plan.floats(part);
            }
        }
    });
    return plan;
}

// Compute one task: write y, or the softmax states of a chunk into `states` if the task belongs to a split.
void run_attention_task(const AttentionPlan& plan, const AttentionTask& task, int worker, float* states) {
    const AttentionArgs& a = plan.a;
    const int64_t rows = plan.rows(task), padded_size = plan.padded_size;
    const int64_t working = QueryRows::floats(task.heads, rows, padded_size);
    float* memory = (float*)scratch(16 + worker, sizeof(float) * (working + 2 * plan.floats(task)));
    QueryRows x = {rows, plan.shared, padded_size, a.positions + task.begin, a.window, memory, nullptr, nullptr, nullptr, nullptr};
    x.sums = x.q + task.heads * rows * padded_size;
    x.scores = x.sums + task.heads * rows * 16;
    x.keys = x.scores + rows * TILE_KEYS;
    x.values = x.keys + TILE_KEYS * padded_size;
    const float scaling = 1.0f / __builtin_sqrtf(float(a.size));
    for (int64_t row = 0; row < task.heads * rows; ++row) {
        float* q = x.q + row * padded_size;
        read(a.q, a.type, plan.row_offset(task, row), a.size, q, padded_size);
        for (int64_t k = 0; k < padded_size; k += 16) store_float(q + k, mul(load_float(q + k), set(scaling)));
    }
    const KeyValues context = {
        a.keys ? a.keys : a.k, a.keys ? a.values : a.v, a.key_scales, a.value_scales, a.keys ? a.cache_type : a.type,
        a.keys ? a.tables + task.sequence * a.width : nullptr, a.starts[task.sequence], a.block,
        a.kv_heads, task.head, task.heads, a.size, padded_size,
    };
    if (task.states >= 0) {
        attend_chunk(x, context, task.from, task.until, task.until, states + task.states);
        return;
    }
    float *total = memory + working, *chunk = total + plan.floats(task);
    plan.clear(task, total);
    for (int64_t from = task.from; from < task.until; from = chunk_end(from)) {
        attend_chunk(x, context, from, chunk_end(from) < task.until ? chunk_end(from) : task.until, task.until, chunk);
        plan.combine(task, total, chunk);
    }
    plan.finish(task, total);
}

// Combine the chunks of a split part in order, and write y.
void combine_chunks(const AttentionPlan& plan, const AttentionTask& part, int worker, float* states) {
    float* total = (float*)scratch(16 + worker, sizeof(float) * plan.floats(part));
    plan.clear(part, total);
    for (int64_t i = 0; i < chunk_count(part); ++i) plan.combine(part, total, states + part.states + i * plan.floats(part));
    plan.finish(part, total);
}

void attention(const AttentionArgs& a) {
    if (a.keys) store_in_cache(a);
    const AttentionPlan plan = plan_attention(a);
    float* states = (float*)scratch(1, sizeof(float) * plan.state_floats);
    parallel_for_or_inline(plan.task_count, 2 * plan.work * a.heads * a.size, [&](int64_t i, int worker) {
        run_attention_task(plan, plan.tasks[plan.task_count - 1 - i], worker, states);  // the longest contexts first
    });
    parallel_for_or_inline(plan.split_count, plan.state_floats * COST_PER_VALUE, [&](int64_t i, int worker) {
        combine_chunks(plan, plan.splits[i], worker, states);
    });
}

void truncate(const TruncateArgs& a) {
    parallel_for_or_inline(a.rows, a.rows * a.vocabulary * COST_PER_VALUE, [&](int64_t t, int worker) {
        const int64_t padded_size = padded_floats(a.vocabulary);
        float* x = (float*)scratch(16 + worker, sizeof(float) * padded_size * 4);
        for (int64_t i = a.vocabulary; i < padded_size; ++i) x[i] = 0;
        const Row row{a.vocabulary, x, x + padded_size, x + 2 * padded_size, (int32_t*)(x + 3 * padded_size)};
        truncate_row(a.logits + t * a.vocabulary, a.settings + t * 5, a.y + t * a.vocabulary, row);
    });
}

void draw(const DrawArgs& a) {
    parallel_for_or_inline(a.rows, a.rows * a.vocabulary * COST_PER_VALUE, [&](int64_t t, int worker) {
        const int64_t padded_size = padded_floats(a.vocabulary);
        float* x = (float*)scratch(16 + worker, sizeof(float) * padded_size * 2);
        for (int64_t i = a.vocabulary; i < padded_size; ++i) x[i] = 0;
        a.ids[t] = draw_from(a.logits + t * a.vocabulary, a.numbers[t], x, x + padded_size, a.vocabulary);
    });
}

}  // namespace

void quantize(const QuantizeArgs& a);  // csrc/quantize.cpp

#define MOESAIC_STRING(x) #x
#define MOESAIC_NAME(x) MOESAIC_STRING(x)

const Kernels kernels = {
    .name = MOESAIC_NAME(MOESAIC_ISA),
    .linear = [](const LinearArgs& a) { linears({&a, 1}); },
    .linears = linears,
    .embedding = [](const EmbeddingArgs& a) { with_format(a.format, [&](auto f) { embedding<decltype(f)>(a); }); },
    .experts = [](const ExpertsArgs& a) { with_format(a.format, [&](auto f) { experts<decltype(f)>(a); }); },
    .attention = attention,
    .rms_norm = rms_norm,
    .rope = rope,
    .rotary = rotary,
    .add = add,
    .swiglu = swiglu,
    .route = route,
    .finite = finite,
    .argmax = argmax,
    .truncate = truncate,
    .draw = draw,
    .quantize = quantize,
    .read = read_memory,
    .multiply = multiply,
    .multiply_bf16 = multiply_bf16,
};

}  // namespace moesaic::MOESAIC_ISA
