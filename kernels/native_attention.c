/* Attention of ragged query tokens over a paged cache in host memory; signature and meaning as `paged_attention` in reference.py.
 *
 * Two ways through the same keys. A sequence with few query rows (query tokens x heads of a group) is limited by memory: all heads are
 * taken in one sweep over the token rows, which is how they lie, and the other side (values, next keys) is prefetched meanwhile. One with
 * many rows is limited by arithmetic: a tile of rows lies across the vector lanes, so keys and values are read as scalars, nothing is
 * transposed and the softmax needs no reduction across lanes. Long contexts of few query tokens are cut at fixed places, whatever
 * the number of threads and whatever else is in the batch: a sequence's result depends on its own keys alone. */
#include <math.h>
#include <stdlib.h>

#include "native_rows.h"

#define KEYS 32          /* keys taken together */
#define TILE 64          /* query rows of one tile */
#define SPLIT_KEYS 512   /* keys of one item when a context is cut */
#define SPLIT_QUERIES 32 /* sequences with more query tokens have enough tiles to share out */

typedef struct {
    cache_t cache;
    const float *query;
    float *out;
    const int32_t *page_table, *query_starts, *context_lens, *tree_masks, *positions;
    const float *alibi_slopes;
    int64_t num_sequences, max_pages, num_heads, page_tokens, mask_words, window, threads;
    float scale, soft_cap;
} attention_t;

typedef struct { /* rows [row_begin, row_end) of heads [head_begin, head_end) against keys [key_begin, key_end); row = query * group + g */
    int32_t sequence, head_begin, head_end, row_begin, row_end, key_begin, key_end;
    int64_t partial; /* where in the partial results, in floats; -1: the item has all keys and writes the result */
} item_t;

typedef struct { /* what the inner loops need of the item's sequence */
    int32_t begin, queries, context, prefix, heads_per_group;
    int64_t width; /* head_dim rounded up to whole vectors; the padding is zero */
} span_t;

static span_t span_of(const attention_t *a, int32_t sequence) {
    span_t s = {.begin = a->query_starts[sequence], .context = a->context_lens[sequence]};
    s.queries = a->query_starts[sequence + 1] - s.begin;
    s.prefix = s.context - s.queries;
    s.heads_per_group = (int32_t)(a->num_heads / a->cache.num_kv_heads);
    s.width = round_up(a->cache.head_dim, LANES);
    return s;
}

static const char *row_of(const attention_t *a, int32_t sequence, int32_t key) {
    int64_t page = a->page_table[sequence * a->max_pages + key / a->page_tokens];
    return a->cache.rows + (page * a->page_tokens + key % a->page_tokens) * a->cache.row_bytes;
}

/* Position of query token q, or of a key: slots count, but depths do inside a tree. */
static float query_position(const attention_t *a, const span_t *s, int32_t q) {
    return (float)(a->tree_masks ? a->positions[s->begin + q] : s->prefix + q);
}
static float key_position(const attention_t *a, const span_t *s, int32_t key) {
    return (float)(a->tree_masks && key >= s->prefix ? a->positions[s->begin + key - s->prefix] : key);
}
static int is_ancestor(const attention_t *a, const span_t *s, int32_t q, int32_t key) {
    const int32_t bit = key - s->prefix;
    return ((uint32_t)a->tree_masks[(s->begin + q) * a->mask_words + bit / 32] >> (bit % 32)) & 1;
}

/* Whether keys [key, end) need more than `scaled` from rows of query tokens `first` to `last`: an ALiBi term or a mask. */
static int needs_bias(const attention_t *a, const span_t *s, int32_t first, int32_t last, int32_t key, int32_t end) {
    if (a->alibi_slopes || end > (a->tree_masks ? s->prefix : s->prefix + first + 1)) return 1;
    return a->window && query_position(a, s, last) - (float)key >= (float)a->window;
}

/* Scores at `distance` (query minus key position) after ALiBi, window and, without a tree, causality. */
static vec biased_scores(const attention_t *a, vec score, vec distance, vec slope) {
    if (a->alibi_slopes) score -= slope * distance;
    if (a->window) score = choose(distance < splat((float)a->window), score, splat(-INFINITY));
    return a->tree_masks ? score : choose(distance >= splat(0.0f), score, splat(-INFINITY));
}

static vec scaled(const attention_t *a, vec score) {
    score *= a->scale;
    return a->soft_cap != 0.0f ? a->soft_cap * tanh_vec(score / a->soft_cap) : score;
}

/* Write one finished row, `acc` having its elements `stride` floats apart: normalised, or as a partial result with its maximum and sum. */
static void finish(const attention_t *a, const span_t *s, const item_t *item, int64_t head, int32_t row, const float *acc, int64_t stride,
                   float maximum, float sum, float *partials) {
    const int64_t size = a->cache.head_dim;
    const int64_t index = (int64_t)(row / s->heads_per_group) * a->num_heads + head * s->heads_per_group + row % s->heads_per_group;
    if (item->partial < 0) {
        float *out = a->out + (s->begin * a->num_heads + index) * size, inverse = 1.0f / sum;
        for (int64_t d = 0; d < size; d++) out[d] = acc[d * stride] * inverse;
    } else {
        float *out = partials + item->partial + index * (size + 2);
        for (int64_t d = 0; d < size; d++) out[d] = acc[d * stride];
        out[size] = maximum;
        out[size + 1] = sum;
    }
}

/* ---- few rows: all heads in one sweep ---- */

/* Always inline: GCC 12 takes a function of nothing but prefetches for one without effect and drops its calls. */
static inline __attribute__((always_inline)) void prefetch_side(const attention_t *a, const char *row, int64_t head, int side) {
    const cache_t *c = &a->cache;
    const int64_t bytes = c->bits == 16 ? c->head_dim * element_bytes(c->dtype) : codes_of_head(c);
    const char *from = row + (side * c->num_kv_heads + head) * bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

/* scores[row][4 keys] of one head, `rows` (1 or 2) at a time so that a load of a key serves both. */
static inline __attribute__((always_inline)) void dot_rows(const float *query, int rows, int64_t width, const float *const key[4], float *scores) {
    vec sum[2][4] = {{{0}}};
    for (int64_t d = 0; d < width; d += LANES) {
        const vec q0 = load(query + d), q1 = rows > 1 ? load(query + width + d) : q0;
        for (int t = 0; t < 4; t++) {
            const vec k = load(key[t] + d);
            sum[0][t] += q0 * k;
            if (rows > 1) sum[1][t] += q1 * k;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < 4; t++) scores[r * KEYS + t] = horizontal_sum(sum[r][t]);
}

static inline __attribute__((always_inline)) void add_rows(float *acc, int rows, int64_t width, const float *const value[4], const float *weights) {
    vec w[2][4]; /* out of the loop by hand: the compiler must assume that storing to acc changes the weights */
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < 4; t++) w[r][t] = splat(weights[r * KEYS + t]);
    for (int64_t d = 0; d < width; d += LANES) {
        vec sum0 = load(acc + d), sum1 = rows > 1 ? load(acc + width + d) : sum0;
        for (int t = 0; t < 4; t++) {
            const vec v = load(value[t] + d);
            sum0 += w[0][t] * v;
            if (rows > 1) sum1 += w[1][t] * v;
        }
        store(acc + d, sum0);
        if (rows > 1) store(acc + width + d, sum1);
    }
}

static void dot_four(const float *query, int32_t rows, int64_t width, const float *const key[4], float *scores) {
    for (; rows > 1; rows -= 2, query += 2 * width, scores += 2 * KEYS) dot_rows(query, 2, width, key, scores);
    if (rows) dot_rows(query, 1, width, key, scores);
}

static void add_four(float *acc, int32_t rows, int64_t width, const float *const value[4], const float *weights) {
    for (; rows > 1; rows -= 2, acc += 2 * width, weights += 2 * KEYS) add_rows(acc, 2, width, value, weights);
    if (rows) add_rows(acc, 1, width, value, weights);
}

/* Online softmax of one row over KEYS scores (in place: weights); rescales the row's accumulator when the maximum grows. */
static void soften_row(float *scores, float *acc, int64_t width, float *maximum, float *sum) {
    vec top = load(scores);
    for (int t = LANES; t < KEYS; t += LANES) top = larger(top, load(scores + t));
    float new_maximum = *maximum;
    for (int i = 0; i < LANES; i++) new_maximum = top[i] > new_maximum ? top[i] : new_maximum;
    if (new_maximum > *maximum) {
        vec shrink = exp_negative(splat(*maximum - new_maximum));
        for (int64_t d = 0; d < width; d += LANES) store(acc + d, load(acc + d) * shrink);
        *sum *= shrink[0];
        *maximum = new_maximum;
    }
    const float base = new_maximum == -INFINITY ? 0.0f : new_maximum; /* all masked so far: -inf - -inf is no number */
    vec total = {0};
    for (int t = 0; t < KEYS; t += LANES) {
        vec weight = exp_negative(load(scores + t) - base);
        store(scores + t, weight);
        total += weight;
    }
    *sum += horizontal_sum(total);
}

static void soften_few(const attention_t *a, const span_t *s, const item_t *item, int32_t key, int32_t end, float *scores, float *acc,
                       float *maxima, float *sums) {
    const int32_t rows = item->row_end - item->row_begin, group = s->heads_per_group;
    int biased = needs_bias(a, s, item->row_begin / group, (item->row_end - 1) / group, key, end);
    float places[KEYS] = {0};
    for (int32_t t = 0; biased && t < end - key; t++) places[t] = key_position(a, s, key + t);
    for (int64_t i = 0; i < rows * a->cache.num_kv_heads; i++) {
        const int32_t row = item->row_begin + (int32_t)(i % rows), q = row / group;
        const vec place = splat(query_position(a, s, q)), slope = splat(a->alibi_slopes ? a->alibi_slopes[i / rows * group + row % group] : 0.0f);
        float *row_scores = scores + i * KEYS;
        for (int t = 0; t < KEYS; t += LANES) {
            vec score = scaled(a, load(row_scores + t));
            store(row_scores + t, biased ? biased_scores(a, score, place - load(places + t), slope) : score);
        }
        for (int32_t t = s->prefix > key ? s->prefix - key : 0; a->tree_masks && t < end - key; t++)
            if (!is_ancestor(a, s, q, key + t)) row_scores[t] = -INFINITY;
        for (int32_t t = end - key; t < KEYS; t++) row_scores[t] = -INFINITY;
        soften_row(row_scores, acc + i * s->width, s->width, maxima + i, sums + i);
    }
}

/* One sweep over one side of KEYS token rows; the other side of `ahead` comes nearer meanwhile. */
static void sweep(const attention_t *a, const span_t *s, int32_t rows, const char *const *row, const char *const *ahead, int side,
                  const float *query, float *scores, float *acc, float *buffer) {
    for (int t = 0; t < KEYS; t += 4)
        for (int64_t head = 0; head < a->cache.num_kv_heads; head++) {
            const float *vectors[4];
            for (int i = 0; i < 4; i++) {
                prefetch_side(a, ahead[t + i], head, !side);
                vectors[i] = expand(&a->cache, row[t + i], head, side, buffer + i * s->width);
            }
            if (side == 0) dot_four(query + head * rows * s->width, rows, s->width, vectors, scores + head * rows * KEYS + t);
            else add_four(acc + head * rows * s->width, rows, s->width, vectors, scores + head * rows * KEYS + t);
        }
}

/* Token rows of KEYS keys from `key` on; past the item's end the last one again. */
static void find_rows(const attention_t *a, const item_t *item, int32_t key, const char **rows) {
    for (int32_t t = 0; t < KEYS && item->key_begin < item->key_end; t++) rows[t] = row_of(a, item->sequence, key + t < item->key_end ? key + t : item->key_end - 1);
}

static void few_rows(const attention_t *a, const item_t *item, float *scratch, float *partials) {
    const span_t s = span_of(a, item->sequence);
    const int32_t rows = item->row_end - item->row_begin;
    const int64_t all = rows * a->cache.num_kv_heads, size = a->cache.head_dim;
    float *query = scratch, *acc = query + all * s.width, *scores = acc + all * s.width, *maxima = scores + all * KEYS;
    float *sums = maxima + all, *buffer = scratch + round_up(sums + all - scratch, LANES);
    memset(scratch, 0, (buffer + 4 * s.width - scratch) * sizeof(float));
    for (int64_t i = 0; i < all; i++) {
        int64_t row = item->row_begin + i % rows, head = i / rows * s.heads_per_group + row % s.heads_per_group;
        memcpy(query + i * s.width, a->query + ((s.begin + row / s.heads_per_group) * a->num_heads + head) * size, size * sizeof(float));
        maxima[i] = -INFINITY;
    }
    const char *now[KEYS], *next[KEYS];
    find_rows(a, item, item->key_begin, next);
    for (int64_t t = 0; t < KEYS && item->key_begin < item->key_end; t++)
        for (int64_t head = 0; head < a->cache.num_kv_heads; head++) prefetch_side(a, next[t], head, 0);
    for (int32_t key = item->key_begin; key < item->key_end; key += KEYS) {
        const int32_t end = key + KEYS < item->key_end ? key + KEYS : item->key_end;
        memcpy(now, next, sizeof now);
        find_rows(a, item, end, next);
        sweep(a, &s, rows, now, now, 0, query, scores, acc, buffer);
        soften_few(a, &s, item, key, end, scores, acc, maxima, sums);
        sweep(a, &s, rows, now, next, 1, query, scores, acc, buffer);
    }
    for (int64_t i = 0; i < all; i++)
        finish(a, &s, item, i / rows, item->row_begin + (int32_t)(i % rows), acc + i * s.width, 1, maxima[i], sums[i], partials);
}

/* ---- many rows: a tile of rows across the lanes ---- */

/* out[j][lane] (+)= sum over i of left[j * left_j + i * left_i] * right[i][lane]: four j by `vectors` (1 or 2) vectors of lanes. */
static inline __attribute__((always_inline)) void small_product(const float *left, int64_t left_j, int64_t left_i, int64_t count_i, const float *right,
                                                                float *out, int vectors, int accumulate) {
    vec sum[4][2];
    for (int k = 0; k < 4; k++)
        for (int v = 0; v < vectors; v++) sum[k][v] = accumulate ? load(out + k * TILE + v * LANES) : (vec){0};
    for (int64_t i = 0; i < count_i; i++, left += left_i, right += TILE)
        for (int v = 0; v < vectors; v++) {
            const vec r = load(right + v * LANES);
            for (int k = 0; k < 4; k++) sum[k][v] += left[k * left_j] * r;
        }
    for (int k = 0; k < 4; k++)
        for (int v = 0; v < vectors; v++) store(out + k * TILE + v * LANES, sum[k][v]);
}

static void tile_product(const float *left, int64_t left_j, int64_t left_i, int64_t count_j, int64_t count_i, const float *right, float *out,
                         int64_t lanes, int accumulate) {
    int64_t lane = 0;
    for (; lane + 2 * LANES <= lanes; lane += 2 * LANES)
        for (int64_t j = 0; j < count_j; j += 4) small_product(left + j * left_j, left_j, left_i, count_i, right + lane, out + j * TILE + lane, 2, accumulate);
    for (; lane < lanes; lane += LANES)
        for (int64_t j = 0; j < count_j; j += 4) small_product(left + j * left_j, left_j, left_i, count_i, right + lane, out + j * TILE + lane, 1, accumulate);
}

/* Online softmax of KEYS keys for all lanes; returns through `scores` the weights, and rescales `acc` [width][TILE]. */
static void soften_tile(float *scores, float *acc, int64_t width, int64_t lanes, float *maxima, float *sums) {
    for (int64_t lane = 0; lane < lanes; lane += LANES) {
        const vec old = load(maxima + lane);
        vec top = old, total = {0};
        for (int t = 0; t < KEYS; t++) top = larger(load(scores + t * TILE + lane), top);
        const vec base = choose(top == splat(-INFINITY), splat(0.0f), top), shrink = exp_negative(old - base);
        for (int t = 0; t < KEYS; t++) {
            vec weight = exp_negative(load(scores + t * TILE + lane) - base);
            store(scores + t * TILE + lane, weight);
            total += weight;
        }
        store(sums + lane, load(sums + lane) * shrink + total);
        store(maxima + lane, top);
        int changed = 0;
        for (int i = 0; i < LANES; i++) changed |= shrink[i] != 1.0f;
        if (changed)
            for (int64_t d = 0; d < width; d++) store(acc + d * TILE + lane, load(acc + d * TILE + lane) * shrink);
    }
}

/* Scale, soft cap, ALiBi and masks of a tile of scores [KEYS][TILE]. */
static void mask_tile(const attention_t *a, const span_t *s, const item_t *item, int32_t key, int32_t end, int64_t lanes, const float *places,
                      const float *slopes, float *scores) {
    const int biased = needs_bias(a, s, item->row_begin / s->heads_per_group, (item->row_end - 1) / s->heads_per_group, key, end);
    for (int t = 0; t < KEYS; t++) {
        float *row = scores + t * TILE;
        const float place = key + t < end ? key_position(a, s, key + t) : 0.0f;
        for (int64_t lane = 0; lane < lanes; lane += LANES) {
            vec score = scaled(a, load(row + lane));
            if (key + t >= end) score = splat(-INFINITY);
            else if (biased) score = biased_scores(a, score, load(places + lane) - place, load(slopes + lane));
            store(row + lane, score);
        }
        const int in_tree = a->tree_masks && key + t >= s->prefix && key + t < end;
        for (int32_t r = item->row_begin; in_tree && r < item->row_end; r++)
            if (!is_ancestor(a, s, r / s->heads_per_group, key + t)) row[r - item->row_begin] = -INFINITY;
    }
}

static void load_tile(const attention_t *a, const span_t *s, const item_t *item, int64_t lanes, float *query, float *places, float *slopes) {
    for (int64_t lane = 0; lane < lanes; lane++) {
        const int32_t row = item->row_begin + (lane < item->row_end - item->row_begin ? (int32_t)lane : 0), q = row / s->heads_per_group;
        const int64_t head = item->head_begin * s->heads_per_group + row % s->heads_per_group;
        const float *source = a->query + ((s->begin + q) * a->num_heads + head) * a->cache.head_dim;
        for (int64_t d = 0; d < a->cache.head_dim; d++) query[d * TILE + lane] = source[d];
        places[lane] = query_position(a, s, q);
        slopes[lane] = a->alibi_slopes ? a->alibi_slopes[head] : 0.0f;
    }
}

static void many_rows(const attention_t *a, const item_t *item, float *scratch, float *partials) {
    const span_t s = span_of(a, item->sequence);
    const int64_t rows = item->row_end - item->row_begin, lanes = round_up(rows, LANES), width = round_up(s.width, 4);
    float *query = scratch, *acc = query + width * TILE, *scores = acc + width * TILE, *maxima = scores + KEYS * TILE, *sums = maxima + TILE;
    float *places = sums + TILE, *slopes = places + TILE, *keys = slopes + TILE, *values = keys + KEYS * width;
    memset(scratch, 0, (values + KEYS * width - scratch) * sizeof(float));
    load_tile(a, &s, item, lanes, query, places, slopes);
    for (int64_t lane = 0; lane < lanes; lane++) maxima[lane] = -INFINITY;
    for (int32_t key = item->key_begin; key < item->key_end; key += KEYS) {
        const int32_t end = key + KEYS < item->key_end ? key + KEYS : item->key_end;
        for (int32_t t = 0; t < KEYS; t++) {
            const char *row = row_of(a, item->sequence, key + t < end ? key + t : end - 1);
            for (int side = 0; side < 2; side++) {
                if (key + t + KEYS < item->key_end) prefetch_side(a, row_of(a, item->sequence, key + t + KEYS), item->head_begin, side);
                float *to = (side ? values : keys) + t * width;
                const float *from = expand(&a->cache, row, item->head_begin, side, to);
                if (from != to) memcpy(to, from, a->cache.head_dim * sizeof(float));
            }
        }
        tile_product(keys, width, 1, KEYS, width, query, scores, lanes, 0);
        mask_tile(a, &s, item, key, end, lanes, places, slopes, scores);
        soften_tile(scores, acc, width, lanes, maxima, sums);
        tile_product(values, 1, width, width, KEYS, scores, acc, lanes, 1);
    }
    for (int64_t r = 0; r < rows; r++)
        finish(a, &s, item, item->head_begin, item->row_begin + (int32_t)r, acc + r, TILE, maxima[r], sums[r], partials);
}

/* ---- sharing out ---- */

static int is_few(const span_t *s) { return s->queries * s->heads_per_group < LANES; }

/* Leave out keys after the item's last query token and before the window of its first one. No key at all is possible in a partial result. */
static void narrow(const attention_t *a, const span_t *s, item_t *item) {
    const int32_t seen = s->prefix + (item->row_end - 1) / s->heads_per_group + 1;
    const int64_t start = a->window ? s->prefix + item->row_begin / s->heads_per_group - a->window + 1 : 0;
    if (item->key_end > seen) item->key_end = seen;
    if (item->key_begin < start) item->key_begin = (int32_t)start;
    if (item->key_end < item->key_begin) item->key_end = item->key_begin;
}

/* Items of one sequence into `items` (null: only counted); `partial` moves on by what its partial results take. */
static int64_t share_out(const attention_t *a, int32_t sequence, item_t *items, int64_t *partial) {
    const span_t s = span_of(a, sequence);
    const int32_t rows = s.queries * s.heads_per_group, kv_heads = (int32_t)a->cache.num_kv_heads, heads = is_few(&s) ? kv_heads : 1;
    const int32_t step = s.queries <= SPLIT_QUERIES && s.context > SPLIT_KEYS ? SPLIT_KEYS : s.context;
    int64_t count = 0;
    if (s.queries <= 0) return 0;
    for (int32_t first = 0; first < s.context; first += step) {
        const int32_t last = first + step < s.context ? first + step : s.context;
        for (int32_t head = 0; head < kv_heads; head += heads)
            for (int32_t row = 0; row < rows; row += TILE, count++) {
                if (!items) continue;
                item_t item = {sequence, head, head + heads, row, row + TILE < rows ? row + TILE : rows, first, last, step < s.context ? *partial : -1};
                if (!a->tree_masks) narrow(a, &s, &item);
                items[count] = item;
            }
        if (step < s.context) *partial += s.queries * a->num_heads * (a->cache.head_dim + 2);
    }
    return count;
}

/* Result of one row of a sequence from the partial results of its key ranges, `stride` floats apart. */
static void merge(const float *partial, int64_t parts, int64_t stride, int64_t size, float *out) {
    float maximum = -INFINITY, sum = 0.0f;
    for (int64_t p = 0; p < parts; p++) maximum = partial[p * stride + size] > maximum ? partial[p * stride + size] : maximum;
    memset(out, 0, size * sizeof(float));
    for (int64_t p = 0; p < parts; p++) {
        const float *part = partial + p * stride, weight = exp_negative(splat(part[size] - maximum))[0];
        sum += part[size + 1] * weight;
        for (int64_t d = 0; d < size; d++) out[d] += part[d] * weight;
    }
    for (int64_t d = 0; d < size; d++) out[d] /= sum;
}

static void merge_sequence(const attention_t *a, int32_t sequence, const float *partial) {
    const span_t s = span_of(a, sequence);
    const int64_t size = a->cache.head_dim, rows = s.queries * a->num_heads;
    for (int64_t r = 0; r < rows; r++)
        merge(partial + r * (size + 2), (s.context + SPLIT_KEYS - 1) / SPLIT_KEYS, rows * (size + 2), size, a->out + (s.begin * a->num_heads + r) * size);
}

static int64_t scratch_floats(const attention_t *a) {
    const int64_t width = round_up(a->cache.head_dim, LANES > 4 ? LANES : 4), rows = LANES * a->cache.num_kv_heads;
    const int64_t few = rows * (2 * width + KEYS + 2) + LANES + 4 * width;
    const int64_t many = TILE * (2 * width + KEYS + 4) + 2 * KEYS * width;
    return round_up(few > many ? few : many, 16);
}

/* Returns 0, or 1 when memory for the work list or the scratch is not to be had. */
int flexbatch_paged_attention(const attention_t *a) {
    int64_t count = 0, floats = 0, filled = 0;
    int64_t *partial_of = malloc((a->num_sequences + 1) * sizeof *partial_of);
    for (int32_t q = 0; q < a->num_sequences; q++) count += share_out(a, q, NULL, &floats);
    item_t *items = malloc((count + 1) * sizeof *items);
    float *partials = malloc((floats + 1) * sizeof *partials), *scratch = NULL;
    const int64_t each = scratch_floats(a);
    const int failed = !partial_of || !items || !partials || posix_memalign((void **)&scratch, 64, each * a->threads * sizeof *scratch);
    if (!failed) {
        floats = 0;
        for (int32_t q = 0; q < a->num_sequences; q++) {
            partial_of[q] = floats;
            filled += share_out(a, q, items + filled, &floats);
        }
        partial_of[a->num_sequences] = floats;
#pragma omp parallel num_threads((int)a->threads)
        {
#ifdef _OPENMP
            extern int omp_get_thread_num(void);
            float *own = scratch + each * omp_get_thread_num();
#else
            float *own = scratch;
#endif
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < count; i++) {
                const span_t s = span_of(a, items[i].sequence);
                (is_few(&s) ? few_rows : many_rows)(a, items + i, own, partials);
            }
#pragma omp for schedule(dynamic, 1)
            for (int32_t q = 0; q < (int32_t)a->num_sequences; q++)
                if (partial_of[q + 1] > partial_of[q]) merge_sequence(a, q, partials + partial_of[q]);
        }
    }
    free(partial_of), free(items), free(partials), free(scratch);
    return failed;
}
