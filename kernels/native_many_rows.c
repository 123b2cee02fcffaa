/* Many query rows, limited by arithmetic: a tile of rows across the vector lanes against keys and values read as
 * scalars. */
#include "native_attention.h"

/* out[j][lane] (+)= sum over i of left[j * left_j + i * left_i] * right[i][lane]: four j by `vectors` (1 or 2)
 * vectors of lanes. */
static inline __attribute__((always_inline))
void small_product(const float *left, int64_t left_j, int64_t left_i, int64_t count_i, const float *right, float *out,
    int vectors, int accumulate) {
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

static void tile_product(const float *left, int64_t left_j, int64_t left_i, int64_t count_j, int64_t count_i,
    const float *right, float *out, int64_t lanes, int accumulate) {
    int64_t lane = 0;
    for (; lane + 2 * LANES <= lanes; lane += 2 * LANES)
        for (int64_t j = 0; j < count_j; j += 4)
            small_product(left + j * left_j, left_j, left_i, count_i, right + lane, out + j * TILE + lane, 2,
            accumulate);
    for (; lane < lanes; lane += LANES)
        for (int64_t j = 0; j < count_j; j += 4)
            small_product(left + j * left_j, left_j, left_i, count_i, right + lane, out + j * TILE + lane, 1,
            accumulate);
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
static void mask_tile(const attention_t *a, const span_t *s, const item_t *item, int32_t key, int32_t end,
    int64_t lanes, const float *positions, position_range_t range, const float *slopes, float *scores) {
    const int biased = needs_bias(a, s, item->row_begin / s->heads_per_group, range, key, end);
    for (int t = 0; t < KEYS; t++) {
        float *row = scores + t * TILE;
        const float position = key + t < end ? key_position(a, s, key + t) : 0.0f;
        for (int64_t lane = 0; lane < lanes; lane += LANES) {
            vec score = scaled(a, load(row + lane));
            if (key + t >= end) score = splat(-INFINITY);
            else if (biased)
                score = biased_scores(a, score, load(positions + lane), splat(position), load(slopes + lane));
            store(row + lane, score);
        }
        const int in_tree = a->tree_masks && key + t >= s->prefix && key + t < end;
        for (int32_t r = item->row_begin; in_tree && r < item->row_end; r++)
            if (!is_ancestor(a, s, r / s->heads_per_group, key + t)) row[r - item->row_begin] = -INFINITY;
    }
}

static void load_tile(const attention_t *a, const span_t *s, const item_t *item, int64_t lanes, float *query,
    float *positions, float *slopes, float *maxima, float *sums) {
    float source[a->cache.head_dim];
    for (int64_t lane = 0; lane < lanes; lane++) {
        const int32_t row = item->row_begin + (lane < item->row_end - item->row_begin ? (int32_t)lane : 0),
            q = row / s->heads_per_group;
        const int64_t head = item->head_begin * s->heads_per_group + row % s->heads_per_group;
        read_query(a, s->begin + q, head, source);
        for (int64_t d = 0; d < a->cache.head_dim; d++) query[d * TILE + lane] = source[d];
        positions[lane] = query_position(a, s, q);
        slopes[lane] = a->alibi_slopes ? a->alibi_slopes[head] : 0.0f;
        maxima[lane] = first_maximum(a, item, head);
        sums[lane] = first_sum(a, item);
    }
}

void flexbatch_many_rows(const attention_t *a, const item_t *item, float *scratch, float *partials) {
    const span_t s = span_of(a, item->sequence);
    const int64_t rows = item->row_end - item->row_begin, lanes = round_up(rows, LANES), width = round_up(s.width, 4);
    float *query = scratch, *acc = query + width * TILE, *scores = acc + width * TILE, *maxima = scores + KEYS * TILE,
        *sums = maxima + TILE;
    float *positions = sums + TILE, *slopes = positions + TILE, *keys = slopes + TILE, *values = keys + KEYS * width;
    memset(scratch, 0, (values + KEYS * width - scratch) * sizeof(float));
    load_tile(a, &s, item, lanes, query, positions, slopes, maxima, sums);
    const position_range_t range = position_range(a, &s, item);
    for (int32_t key = item->key_begin; key < item->key_end; key += KEYS) {
        const int32_t end = key + KEYS < item->key_end ? key + KEYS : item->key_end;
        for (int32_t t = 0; t < KEYS; t++) {
            const char *row = row_of(a, item->sequence, key + t < end ? key + t : end - 1);
            for (int side = 0; side < 2; side++) {
                if (key + t + KEYS < item->key_end)
                    prefetch_side(a, row_of(a, item->sequence, key + t + KEYS), item->head_begin, side);
                float *to = (side ? values : keys) + t * width;
                const float *from = expand(&a->cache, row, item->head_begin, side, to);
                if (from != to) memcpy(to, from, a->cache.head_dim * sizeof(float));
            }
        }
        tile_product(keys, width, 1, KEYS, width, query, scores, lanes, 0);
        mask_tile(a, &s, item, key, end, lanes, positions, range, slopes, scores);
        soften_tile(scores, acc, width, lanes, maxima, sums);
        tile_product(values, 1, width, width, KEYS, scores, acc, lanes, 1);
    }
    for (int64_t r = 0; r < rows; r++)
        finish(a, &s, item, item->head_begin, item->row_begin + (int32_t)r, acc + r, TILE, maxima[r], sums[r],
            partials);
}
