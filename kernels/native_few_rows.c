/* Few query rows, limited by memory: all heads in one sweep over the token rows, which is how they lie. */
#include "native_attention.h"

/* How far ahead of what is read. The other side of 32 token rows, which was prefetched before, is 460 KB of OPT-30B's:
 * it left the level 2 cache again, which two threads of a core share. One thread read 4.0 GB/s of such rows instead of
 * 3.2 beside busy neighbors, and 8.7 instead of 6.9 beside idle ones; rows of 8 heads went from 5.3 to 8.9. */
#define PREFETCH_BYTES (16 << 10)

/* scores[row][4 keys] of one head, `rows` (1 or 2) at a time so that a load of a key serves both. */
static inline __attribute__((always_inline))
void dot_rows(const float *query, int rows, int64_t width, const float *const key[4], float *scores) {
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

static inline __attribute__((always_inline))
void add_rows(float *acc, int rows, int64_t width, const float *const value[4], const float *weights) {
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

/* Online softmax of one row over KEYS scores (in place: weights); rescales the row's accumulator when the maximum
 * grows. */
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

static void soften_few(const attention_t *a, const span_t *s, const item_t *item, position_range_t range, int32_t key,
    int32_t end, float *scores, float *acc, float *maxima, float *sums) {
    const int32_t rows = item->row_end - item->row_begin, group = s->heads_per_group;
    int biased = needs_bias(a, s, item->row_begin / group, range, key, end);
    float positions[KEYS] = {0};
    for (int32_t t = 0; biased && t < end - key; t++) positions[t] = key_position(a, s, key + t);
    for (int64_t i = 0; i < rows * a->cache.num_kv_heads; i++) {
        const int32_t row = item->row_begin + (int32_t)(i % rows), q = row / group;
        const vec position = splat(query_position(a, s, q)),
            slope = splat(a->alibi_slopes ? a->alibi_slopes[i / rows * group + row % group] : 0.0f);
        float *row_scores = scores + i * KEYS;
        for (int t = 0; t < KEYS; t += LANES) {
            vec score = scaled(a, load(row_scores + t));
            store(row_scores + t, biased ? biased_scores(a, score, position, load(positions + t), slope) : score);
        }
        for (int32_t t = s->prefix > key ? s->prefix - key : 0; a->tree_masks && t < end - key; t++)
            if (!is_ancestor(a, s, q, key + t)) row_scores[t] = -INFINITY;
        for (int32_t t = end - key; t < KEYS; t++) row_scores[t] = -INFINITY;
        soften_row(row_scores, acc + i * s->width, s->width, maxima + i, sums + i);
    }
}

/* How many vectors, of four keys each, a sweep prefetches ahead: no more than one side of KEYS rows has. */
static inline int64_t prefetched_heads(const attention_t *a) {
    const cache_t *c = &a->cache;
    const int64_t bytes = c->bits == 16 ? c->head_dim * element_bytes(c->dtype) : codes_of_head(c);
    const int64_t far = (PREFETCH_BYTES + 4 * bytes - 1) / (4 * bytes), most = KEYS / 4 * c->num_kv_heads;
    return far < most ? far : most;
}

/* One sweep over one side of KEYS token rows. What lies PREFETCH_BYTES further on comes nearer meanwhile: in these rows,
 * and at their end in the other side of `ahead`. */
static void sweep(const attention_t *a, const span_t *s, int32_t rows, const char *const *row,
    const char *const *ahead, int side, const float *query, float *scores, float *acc, float *buffer) {
    const int64_t heads = a->cache.num_kv_heads, far = prefetched_heads(a);
    int64_t far_t = far / heads * 4, far_head = far % heads;
    for (int t = 0; t < KEYS; t += 4)
        for (int64_t head = 0; head < heads; head++) {
            const float *vectors[4];
            const int here = far_t < KEYS;
            const char *const *far_row = here ? row + far_t : ahead + far_t - KEYS;
            for (int i = 0; i < 4; i++) {
                prefetch_side(a, far_row[i], far_head, here ? side : !side);
                vectors[i] = expand(&a->cache, row[t + i], head, side, buffer + i * s->width);
            }
            if (++far_head == heads) far_head = 0, far_t += 4;
            if (side == 0)
                dot_four(query + head * rows * s->width, rows, s->width, vectors, scores + head * rows * KEYS + t);
            else add_four(acc + head * rows * s->width, rows, s->width, vectors, scores + head * rows * KEYS + t);
        }
}

void flexbatch_few_rows(const attention_t *a, const item_t *item, float *scratch, float *partials) {
    const span_t s = span_of(a, item->sequence);
    const int32_t rows = item->row_end - item->row_begin;
    const int64_t heads = a->cache.num_kv_heads, all = rows * heads, far = prefetched_heads(a);
    const position_range_t range = position_range(a, &s, item);
    float *query = scratch, *acc = query + all * s.width, *scores = acc + all * s.width, *maxima = scores + all * KEYS;
    float *sums = maxima + all, *buffer = scratch + round_up(sums + all - scratch, LANES);
    memset(scratch, 0, (buffer + 4 * s.width - scratch) * sizeof(float));
    for (int64_t i = 0; i < all; i++) {
        int64_t row = item->row_begin + i % rows, head = i / rows * s.heads_per_group + row % s.heads_per_group;
        read_query(a, s.begin + row / s.heads_per_group, head, query + i * s.width);
        maxima[i] = first_maximum(a, item, head);
        sums[i] = first_sum(a, item);
    }
    const char *now[KEYS], *next[KEYS];
    find_rows(a, item, item->key_begin, next);
    for (int64_t p = 0; p < far && item->key_begin < item->key_end; p++)
        for (int64_t i = 0; i < 4; i++)
            prefetch_side(a, next[p / heads * 4 + i], p % heads, 0);
    for (int32_t key = item->key_begin; key < item->key_end; key += KEYS) {
        const int32_t end = key + KEYS < item->key_end ? key + KEYS : item->key_end;
        memcpy(now, next, sizeof now);
        find_rows(a, item, end, next);
        sweep(a, &s, rows, now, now, 0, query, scores, acc, buffer);
        soften_few(a, &s, item, range, key, end, scores, acc, maxima, sums);
        sweep(a, &s, rows, now, next, 1, query, scores, acc, buffer);
    }
    for (int64_t i = 0; i < all; i++)
        finish(a, &s, item, i / rows, item->row_begin + (int32_t)(i % rows), acc + i * s.width, 1, maxima[i], sums[i],
            partials);
}
