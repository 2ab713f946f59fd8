// What a processor's instruction set has to offer: one table of functions for each, the same results.
#pragma once

#include <cstdint>

namespace moesaic {

enum class Format : int { int8, int4, int4_64, int3, int2, bfloat16 };
enum class Type : int { float32, bfloat16, float16, int8 };  // int8: of a cache only

// y [tokens, out] = x [tokens, columns] times weight [out, columns] transposed.
struct LinearArgs {
    Format format;
    Type type;
    int64_t tokens, columns, out;
    const void* x;
    const uint8_t* weight;
    void* y;
};

// y[t] = sum over j of scores[t, j] * down[e] (silu(gate[e] x[t]) * (up[e] x[t])), e = ids[t, j].
struct ExpertsArgs {
    Format format;
    Type type;
    int64_t tokens, size, inner, experts, choices;
    const void* x;  // [tokens, size]
    const uint8_t *gate, *up, *down;
    const int64_t* ids;   // [tokens, choices]
    const float* scores;  // [tokens, choices]
    void* y;              // [tokens, size]
};

// y [tokens, heads, size] = attention of queries over the keys and values of their own sequences.
struct AttentionArgs {
    Type type, cache_type;
    int64_t tokens, heads, kv_heads, size, sequences;
    int64_t block, width;  // tokens of a cache block, and columns of `tables`
    int64_t window;        // how many positions a token sees; 0: all
    const void *q, *k, *v;
    void *keys, *values;        // [blocks, block, kv_heads, size]; null: no cache
    float *key_scales, *value_scales;  // [blocks, block, kv_heads] of an int8 cache
    const int64_t* slots;       // [tokens], where keys and values go
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

// Pairs (x[i], x[i + size / 2]) turned by the angles whose cos and sin are [tokens, size / 2].
struct RopeArgs {
    Type type;
    int64_t tokens, heads, size;
    const void* x;
    const float *cos, *sin;
    void* y;
};

// y = what temperature and truncations leave of logits, -inf where nothing.
struct TruncateArgs {
    int64_t rows, vocabulary;
    const float* logits;    // [rows, vocabulary]
    const float* settings;  // [rows, 5]: temperature, k, p, min-p, typical-p
    float* y;
};

// ids[r] = the token that numbers[r] falls on if row r's tokens share [0, 1) out as softmax has it.
struct DrawArgs {
    int64_t rows, vocabulary;
    const float* logits;
    const double* numbers;
    int64_t* ids;
};

struct Kernels {
    const char* name;
    void (*linear)(const LinearArgs&);
    void (*experts)(const ExpertsArgs&);
    void (*attention)(const AttentionArgs&);
    void (*rms_norm)(const NormArgs&);
    void (*rope)(const RopeArgs&);
    void (*truncate)(const TruncateArgs&);
    void (*draw)(const DrawArgs&);
    // What this machine can do at most, for comparison; see measure.h.
    void (*read)(const uint8_t* memory, int64_t bytes, int streams, int ahead);
    int64_t (*multiply)(int64_t rounds);
    int64_t (*multiply_bf16)(int64_t rounds);
};

namespace amx { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace portable { extern const Kernels kernels; }

}  // namespace moesaic
