// The interface of the kernels: the arguments of each op, and one table of functions for each instruction set.
#pragma once

#include <cstdint>

namespace moesaic {

enum class Format : int {
#define MOESAIC_FORMAT(name, Type) name,
#include "formats/formats.def"
};

// How a weight of the format `grouped` is stored; moesaic/formats/grouped.py describes the memory.
struct Grouping {
    enum Scale : int { FLOAT16, BFLOAT16, FLOAT32, SUPER_INT8, SUPER_INT4 };
    enum Offset : int { NONE, VALUE, ZERO };

    int bits, group;
    Scale scale;
    Offset offset;
    // Without tables, the level follows from the code; else it is the sum of steps[i] * levels[i][code]. Two tables
    // hold floating-point levels with 14 bits; then the entries of each span less than 128.
    int tables;
    int8_t levels[2][16];
    float steps[2];
};

enum class Type : int { float32, bfloat16, float16, int8 };  // int8: only in a cache

// y [tokens, out] = x [tokens, columns] times weight [out, columns] transposed.
//
// The columns of a weight of the format `grouped` may be stored in another order. Number i of `order` is then the column
// that column i in memory is. It is null if the columns are stored in their own order.
struct LinearArgs {
    Format format;
    Type type, y_type;
    const Grouping* grouping;  // of the format `grouped`
    int64_t tokens, columns, out;
    const void* x;
    const uint8_t* weight;
    const int32_t* order;  // [columns], or null
    void* y;
};

// Several linear layers with the same x and order, whose formats round x in the same way.
struct LinearsArgs {
    const LinearArgs* layers;
    int64_t count;
};

// y [tokens, columns] = rows `ids` of the weight [rows, columns]; `order` is as in LinearArgs.
struct EmbeddingArgs {
    Format format;
    Type type;
    const Grouping* grouping;  // of the format `grouped`
    int64_t tokens, rows, columns;
    const int64_t* ids;
    const uint8_t* weight;
    const int32_t* order;
    void* y;
};

// y[t] = sum over j of scores[t, j] * down[e] (silu(gate[e] x[t]) * (up[e] x[t])), e = ids[t, j]. All three stacks have
// the same format, but each may have its own grouping.
struct ExpertsArgs {
    Format format;
    Type type;
    const Grouping *gate_grouping, *up_grouping, *down_grouping;  // of the format `grouped`
    int64_t tokens, size, inner, experts, choices;
    const void* x;  // [tokens, size]
    const uint8_t *gate, *up, *down;
    const int32_t *gate_order, *up_order, *down_order;  // [experts, columns] as in LinearArgs, each may be null
    const int64_t* ids;   // [tokens, choices]
    const float* scores;  // [tokens, choices]
    void* y;              // [tokens, size]
};

// y [tokens, heads, size] = attention of each query over the keys and values of its own sequence.
struct AttentionArgs {
    Type type, cache_type;
    int64_t tokens, heads, kv_heads, size, sequences;
    int64_t block, width;  // tokens of a cache block, and columns of `tables`
    int64_t window;        // number of positions that a token sees; 0: all
    const void *q, *k, *v;
    void *keys, *values;        // [blocks, block, kv_heads, size]; null: no cache
    float *key_scales, *value_scales;  // [blocks, block, kv_heads] of an int8 cache
    const int64_t* slots;       // [tokens], the cache slot of each key and value
    const int64_t* tables;      // [sequences, width]
    const int64_t* starts;      // [sequences + 1]
    const int64_t* positions;   // [tokens]
    void* y;
};

// y = x / sqrt(mean(x^2) + eps) * weight
struct NormArgs {
    Type type;
    int64_t tokens, size;
    float eps;
    const void* x;
    const float* weight;
    void* y;
};

// y = x with pairs (x[i], x[i + size / 2]) rotated by the angles whose cos and sin are [tokens, size / 2].
struct RopeArgs {
    Type type;
    int64_t tokens, heads, size;
    const void* x;
    const float *cos, *sin;
    void* y;
};

// cos and sin [tokens, size] of the angles positions[t] * frequencies[i].
struct RotaryArgs {
    int64_t tokens, size;
    const int64_t* positions;
    const float* frequencies;
    float *cos, *sin;
};

// y = a + b
struct AddArgs {
    Type type;
    int64_t count;
    const void *a, *b;
    void* y;
};

// y = silu(gate) * up
struct SwigluArgs {
    Type type;
    int64_t count;
    const void *gate, *up;
    void* y;
};

// ids [tokens, choices] = the experts with the largest logits, the largest first; scores = the softmax of these logits.
// The logits are x [tokens, size] times weight [experts, size] transposed.
struct RouteArgs {
    Type type;
    int64_t tokens, size, experts, choices;
    const void* x;
    const float* weight;
    int64_t* ids;
    float* scores;
};

// y[r] = whether all of x [rows, size] in row r are finite, as a byte 0 or 1.
struct FiniteArgs {
    Type type;
    int64_t rows, size;
    const void* x;
    uint8_t* y;
};

// ids[r] = the first of the largest values of row r of x [rows, size]; none is NaN.
struct ArgmaxArgs {
    int64_t rows, size;
    const float* x;
    int64_t* ids;
};

// y = logits after temperature and truncations, -inf for removed tokens.
struct TruncateArgs {
    int64_t rows, vocabulary;
    const float* logits;    // [rows, vocabulary]
    const float* settings;  // [rows, 5]: temperature, k, p, min-p, typical-p
    float* y;
};

// ids[r] = a token drawn from the softmax of row r by inverting its cumulative distribution at numbers[r].
struct DrawArgs {
    int64_t rows, vocabulary;
    const float* logits;
    const double* numbers;
    int64_t* ids;
};

// weight [blocks of 32 rows] = x [rows, columns] quantized to an integer format. For each row and superblock, steps are
// tried that are shares [tries] of the usual one, which is usual_step times the root mean square of the weights.
struct QuantizeArgs {
    Format format;
    Type type;
    float usual_step;
    int64_t rows, columns;
    const float* shares;
    int64_t tries;
    const void* x;
    uint8_t* weight;
};

// The ops that every instruction set has, with their arguments. Python reads their numbers from this order.
#define MOESAIC_OPS(OP)              \
    OP(linear, LinearArgs)           \
    OP(linears, LinearsArgs)         \
    OP(embedding, EmbeddingArgs)     \
    OP(experts, ExpertsArgs)         \
    OP(attention, AttentionArgs)     \
    OP(rms_norm, NormArgs)           \
    OP(rope, RopeArgs)               \
    OP(rotary, RotaryArgs)           \
    OP(add, AddArgs)                 \
    OP(swiglu, SwigluArgs)           \
    OP(route, RouteArgs)             \
    OP(finite, FiniteArgs)           \
    OP(argmax, ArgmaxArgs)           \
    OP(truncate, TruncateArgs)       \
    OP(draw, DrawArgs)               \
    OP(quantize, QuantizeArgs)

// A call of an op, which a graph replays: its number in MOESAIC_OPS, and its arguments.
struct Call {
    int64_t op;
    const void* arguments;
};

struct Kernels {
    const char* name;
#define MOESAIC_POINTER(op, Args) void (*op)(const Args&);
    MOESAIC_OPS(MOESAIC_POINTER)
#undef MOESAIC_POINTER
    // Measurements of the machine's limits; csrc/measure.h describes them.
    void (*read)(const uint8_t* memory, int64_t bytes, int streams, int ahead);
    int64_t (*multiply)(int64_t rounds);
    int64_t (*multiply_bf16)(int64_t rounds);
};

namespace amx { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace neon { extern const Kernels kernels; }
namespace avxvnni { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace portable { extern const Kernels kernels; }

}  // namespace moesaic
