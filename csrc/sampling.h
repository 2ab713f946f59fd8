// Temperature and truncation of a row of logits, and one draw from it.
//
// To keep the smallest keys up to some total weight, the keys are distributed into buckets by value. Only the bucket
// that contains the limit is sorted.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace moesaic::MOESAIC_ISA {

constexpr int BUCKETS = 1024;
constexpr float MAX_KEY = 32;  // keys from here on share the last bucket: e^-32 is a negligible probability
constexpr float REMOVED = -__builtin_inff();

// A row of `count` logits. For a removed entry, x is REMOVED and e is 0; for all others, x <= 0 and e = exp(x).
struct Row {
    int64_t count;
    float *x, *e;
    float* key;     // sort key; entries with the smallest keys are kept
    int32_t* list;  // indices of the entries of one bucket
};

MOESAIC_INLINE int bucket_of(float key) {
    const float at = key * (BUCKETS / MAX_KEY);
    return at < BUCKETS - 1 ? int(at) : BUCKETS - 1;
}

MOESAIC_INLINE bool comes_before(const float* key, int32_t a, int32_t b) {
    return key[a] < key[b] || (key[a] == key[b] && a < b);
}

// Sift list[at] down in a max-heap of `count` entries.
MOESAIC_INLINE void sift_down(int32_t* list, int64_t count, int64_t at, const float* key) {
    const int32_t moved = list[at];
    for (int64_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && comes_before(key, list[child], list[child + 1])) ++child;
        if (!comes_before(key, moved, list[child])) break;
        list[at] = list[child];
    }
    list[at] = moved;
}

// Sort by key; equal keys are sorted by index.
inline void heap_sort(int32_t* list, int64_t count, const float* key) {
    for (int64_t at = count / 2; at-- > 0;) sift_down(list, count, at, key);
    for (int64_t last = count; last-- > 1;) {
        const int32_t swapped = list[0];
        list[0] = list[last];
        list[last] = swapped;
        sift_down(list, last, 0, key);
    }
}

// Remove all entries except those with the smallest keys whose weights (null: 1 each) add up to `enough`. With
// `equals`, entries whose key equals the last kept one are kept too.
inline void keep_smallest(const Row& r, const float* weight, double enough, bool equals) {
    double mass[BUCKETS] = {};
    for (int64_t i = 0; i < r.count; ++i) {
        if (r.x[i] != REMOVED) mass[bucket_of(r.key[i])] += weight ? weight[i] : 1.0;
    }
    int limit = 0;
    double sum = 0;
    while (limit < BUCKETS && sum + mass[limit] < enough) sum += mass[limit++];
    if (limit == BUCKETS) return;
    int64_t count = 0, kept = 0;
    for (int64_t i = 0; i < r.count; ++i) {
        if (r.x[i] == REMOVED) continue;
        const int bucket = bucket_of(r.key[i]);
        if (bucket == limit) r.list[count++] = int32_t(i);
        if (bucket > limit) r.x[i] = REMOVED, r.e[i] = 0;
    }
    heap_sort(r.list, count, r.key);
    while (kept < count && sum < enough) {
        const int32_t i = r.list[kept++];
        sum += weight ? weight[i] : 1.0;
    }
    if (equals) {
        while (kept > 0 && kept < count && r.key[r.list[kept]] == r.key[r.list[kept - 1]]) ++kept;
    }
    for (; kept < count; ++kept) r.x[r.list[kept]] = REMOVED, r.e[r.list[kept]] = 0;
}

inline float largest_in(const float* x, int64_t count) {
    F most = set(REMOVED);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) most = max(most, load_float(x + i));
    float result = largest_of(most);
    for (; i < count; ++i) result = x[i] > result ? x[i] : result;
    return result;
}

// Set e = exp(x), or 0 where x is REMOVED, and return the sum. Both arrays must have room for 16 more entries.
inline double exp_all(float* x, float* e, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) store_float(e + i, exp(load_float(x + i)));
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (x[i] == REMOVED) e[i] = 0;
        sum += e[i];
    }
    return sum;
}

inline double sum_of(const float* e, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += e[i];
    return sum;
}

// Apply temperature, top-k, top-p, min-p and typical-p, in this order, as moesaic/ops/__init__.py defines them.
inline void truncate_row(const float* logits, const float* settings, float* y, Row r) {
    const float temperature = settings[0], k = settings[1], p = settings[2], min_p = settings[3], typical = settings[4];
    const float most = largest_in(logits, r.count);
    for (int64_t i = 0; i < r.count; ++i) r.x[i] = (logits[i] - most) / temperature;
    exp_all(r.x, r.e, r.count);
    for (int64_t i = 0; i < r.count; ++i) r.key[i] = -r.x[i];
    if (k > 0) keep_smallest(r, nullptr, k, true);
    if (p < 1) keep_smallest(r, r.e, p * sum_of(r.e, r.count), true);
    if (min_p > 0) {
        for (int64_t i = 0; i < r.count; ++i) {
            if (r.e[i] < min_p) r.x[i] = REMOVED, r.e[i] = 0;  // the likeliest token has e = 1
        }
    }
    if (typical < 1) {
        const double total = sum_of(r.e, r.count);
        double mean = 0;  // expected value of x
        for (int64_t i = 0; i < r.count; ++i) {
            if (r.e[i] > 0) mean += r.e[i] * double(r.x[i]);
        }
        mean /= total;
        for (int64_t i = 0; i < r.count; ++i) {
            const double difference = mean - r.x[i];  // surprise minus expected surprise; the normalizer cancels
            r.key[i] = float(difference < 0 ? -difference : difference);
        }
        keep_smallest(r, r.e, typical * total, false);
    }
    for (int64_t i = 0; i < r.count; ++i) y[i] = r.x[i];
}

// Return the first index at which the running sum of exp(logits) exceeds `number` times the total.
inline int64_t draw_from(const float* logits, double number, float* x, float* e, int64_t count) {
    const float most = largest_in(logits, count);
    for (int64_t i = 0; i < count; ++i) x[i] = logits[i] - most;
    const double goal = number * exp_all(x, e, count);
    double sum = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (e[i] == 0) continue;
        last = i;
        sum += e[i];
        if (sum > goal) break;
    }
    return last;
}

}  // namespace moesaic::MOESAIC_ISA
