/* What the ways of attention (native_few_rows.c, native_many_rows.c, native_tile_rows.c) share: the call, positions, masks, results. */
#ifndef FLEXBATCH_NATIVE_ATTENTION_H
#define FLEXBATCH_NATIVE_ATTENTION_H

#include <math.h>

#include "native_rows.h"

#define KEYS 32          /* keys taken together */
#define TILE 64          /* query rows of one tile */
/* Elements of keys and values of its heads in one item when a context is cut, within KEYS * 2 and SPLIT_KEYS keys. */
#define SPLIT_ELEMENTS (1 << 19)
#define SPLIT_KEYS 512
#define SPLIT_QUERIES 32 /* sequences with more query tokens have enough tiles to share out */

typedef struct {
    cache_t cache;
    const char *query; /* of the cache's dtype, as the result */
    char *out;
    const int32_t *page_table, *query_starts, *context_lens, *tree_masks, *positions;
    const float *alibi_slopes, *sinks;
    int64_t num_sequences, max_pages, num_heads, page_tokens, mask_words, window, threads;
    float scale, soft_cap, alibi_scale;
} attention_t;

/* Rows [row_begin, row_end) of heads [head_begin, head_end) against keys [key_begin, key_end);
 * row = query * group + g. */
typedef struct {
    int32_t sequence, head_begin, head_end, row_begin, row_end, key_begin, key_end;
    /* Where in the partial results of its sequence, in floats; -1: the item has all keys and writes the result. */
    int64_t partial;
} item_t;

typedef struct { /* what the inner loops need of the item's sequence */
    int32_t begin, queries, context, prefix, heads_per_group;
    int64_t width; /* head_dim rounded up to whole vectors; the padding is zero */
} span_t;

static inline span_t span_of(const attention_t *a, int32_t sequence) {
    span_t s = {.begin = a->query_starts[sequence], .context = a->context_lens[sequence]};
    s.queries = a->query_starts[sequence + 1] - s.begin;
    s.prefix = s.context - s.queries;
    s.heads_per_group = (int32_t)(a->num_heads / a->cache.num_kv_heads);
    s.width = round_up(a->cache.head_dim, LANES);
    return s;
}

static inline const char *row_of(const attention_t *a, int32_t sequence, int32_t key) {
    int64_t page = a->page_table[sequence * a->max_pages + key / a->page_tokens];
    return a->cache.rows + (page * a->page_tokens + key % a->page_tokens) * a->cache.row_bytes;
}

/* Token rows of KEYS keys from `key` on; past the item's end the last one again. */
static inline void find_rows(const attention_t *a, const item_t *item, int32_t key, const char **rows) {
    for (int32_t t = 0; t < KEYS && item->key_begin < item->key_end; t++)
        rows[t] = row_of(a, item->sequence, key + t < item->key_end ? key + t : item->key_end - 1);
}

/* Position of query token q, or of a key: slots count, but depths do inside a tree. */
static inline float query_position(const attention_t *a, const span_t *s, int32_t q) {
    return (float)(a->tree_masks ? a->positions[s->begin + q] : s->prefix + q);
}
static inline float key_position(const attention_t *a, const span_t *s, int32_t key) {
    return (float)(a->tree_masks && key >= s->prefix ? a->positions[s->begin + key - s->prefix] : key);
}
static inline int is_ancestor(const attention_t *a, const span_t *s, int32_t q, int32_t key) {
    const int32_t bit = key - s->prefix;
    return ((uint32_t)a->tree_masks[(s->begin + q) * a->mask_words + bit / 32] >> (bit % 32)) & 1;
}

/* Least and largest position of an item's query tokens. In a tree they are in no order: the last node may be
 * shallower than others. */
typedef struct {
    float low, high;
} position_range_t;

static inline position_range_t position_range(const attention_t *a, const span_t *s, const item_t *item) {
    const int32_t first = item->row_begin / s->heads_per_group, last = (item->row_end - 1) / s->heads_per_group;
    position_range_t p = {query_position(a, s, first), query_position(a, s, last)};
    for (int32_t q = first; a->tree_masks && q <= last; q++) {
        const float position = query_position(a, s, q);
        p.low = position < p.low ? position : p.low;
        p.high = position > p.high ? position : p.high;
    }
    return p;
}

/* Position of the first key in the window of a query; a negative window stands for chunks of that many keys. */
static inline float window_start(const attention_t *a, float position) {
    if (a->window >= 0) return position - (float)a->window + 1.0f;
    return (float)((int64_t)position / -a->window * -a->window);
}

/* Whether keys [key, end) need more than `scaled` from rows of query tokens from `first` on, at `range`: an ALiBi
 * term or a mask. */
static inline int needs_bias(const attention_t *a, const span_t *s, int32_t first, position_range_t range,
    int32_t key, int32_t end) {
    if (a->alibi_slopes || end > (a->tree_masks ? s->prefix : s->prefix + first + 1)) return 1;
    return a->window && (float)key < window_start(a, range.high);
}

static inline void read_query(const attention_t *a, int64_t token, int64_t head, float *to) {
    const int64_t size = a->cache.head_dim, width = element_bytes(a->cache.dtype);
    const char *from = a->query + (token * a->num_heads + head) * size * width;
    if (a->cache.dtype == FLOAT32) memcpy(to, from, size * width);
    else expand_16(from, to, size, a->cache.dtype);
}

/* One row of the result; `row`: token times heads plus head, the elements of `x` are `stride` floats apart. */
static inline void write_row(const attention_t *a, int64_t row, const float *x, int64_t stride, float factor) {
    const int64_t size = a->cache.head_dim;
    char *to = a->out + row * size * element_bytes(a->cache.dtype);
    for (int64_t d = 0; d < size && a->cache.dtype == FLOAT32; d++) ((float *)to)[d] = x[d * stride] * factor;
    for (int64_t d = 0; d < size && a->cache.dtype == BFLOAT16; d++)
        ((uint16_t *)to)[d] = to_bfloat16(x[d * stride] * factor);
    for (int64_t d = 0; d < size && a->cache.dtype == FLOAT16; d++)
        ((uint16_t *)to)[d] = to_float16(x[d * stride] * factor);
}

static inline vec rounded_to_bfloat16(vec x) {
    const uvec bits = (uvec)x;
    return (vec)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
}

/* Scores of queries at `position` for keys at `key_positions`, after ALiBi, window and, without a tree, causality. */
static inline vec biased_scores(const attention_t *a, vec score, vec position, vec key_positions, vec slope) {
    const vec distance = position - key_positions;
    if (a->alibi_slopes && a->alibi_scale != 0.0f)
        score += a->alibi_scale
            * (rounded_to_bfloat16(rounded_to_bfloat16(slope) * rounded_to_bfloat16(key_positions)) - slope * position);
    else if (a->alibi_slopes) score -= slope * distance;
    if (a->window > 0) score = choose(distance < splat((float)a->window), score, splat(-INFINITY));
    if (a->window < 0) {
        vec start = position;
        for (int i = 0; i < LANES; i++) start[i] = window_start(a, position[i]);
        score = choose(key_positions >= start, score, splat(-INFINITY));
    }
    return a->tree_masks ? score : choose(distance >= splat(0.0f), score, splat(-INFINITY));
}

static inline vec scaled(const attention_t *a, vec score) {
    score *= a->scale;
    return a->soft_cap != 0.0f ? a->soft_cap * tanh_vec(score / a->soft_cap) : score;
}

/* Always inline: GCC 12 takes a function of nothing but prefetches for one without effect and drops its calls. */
static inline __attribute__((always_inline))
void prefetch_side(const attention_t *a, const char *row, int64_t head, int side) {
    const cache_t *c = &a->cache;
    const int64_t bytes = c->bits == 16 ? c->head_dim * element_bytes(c->dtype) : codes_of_head(c);
    const char *from = row + (side * c->num_kv_heads + head) * bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

/* Where the online softmax of a row begins: a sink counts as a key that was added before all others, of an item with all
 * keys or the first ones. */
static inline float first_maximum(const attention_t *a, const item_t *item, int64_t head) {
    return a->sinks && item->partial <= 0 ? a->sinks[head] : -INFINITY;
}
static inline float first_sum(const attention_t *a, const item_t *item) {
    return a->sinks && item->partial <= 0 ? 1.0f : 0.0f;
}

/* Write one finished row, `acc` having its elements `stride` floats apart: normalized, or as a partial result with
 * its maximum and sum. */
static inline void finish(const attention_t *a, const span_t *s, const item_t *item, int64_t head, int32_t row,
    const float *acc, int64_t stride, float maximum, float sum, float *partials) {
    const int64_t size = a->cache.head_dim;
    const int64_t index = (int64_t)(row / s->heads_per_group) * a->num_heads + head * s->heads_per_group
        + row % s->heads_per_group;
    if (item->partial < 0) {
        write_row(a, s->begin * a->num_heads + index, acc, stride, 1.0f / sum);
    } else {
        float *out = partials + item->partial + index * (size + 2);
        for (int64_t d = 0; d < size; d++) out[d] = acc[d * stride];
        out[size] = maximum;
        out[size + 1] = sum;
    }
}

void flexbatch_few_rows(const attention_t *a, const item_t *item, float *scratch, float *partials);
void flexbatch_many_rows(const attention_t *a, const item_t *item, float *scratch, float *partials);

/* native_tile_rows.c: whether it takes `rows` query rows of a group, and the floats that it needs. */
int flexbatch_in_tiles(const attention_t *a, int32_t rows);
int64_t flexbatch_tile_row_floats(const attention_t *a);
void flexbatch_tile_rows(const attention_t *a, const item_t *item, float *scratch, float *partials);

#endif
