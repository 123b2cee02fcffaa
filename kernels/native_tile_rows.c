/* Query rows of a group in matrix tiles: up to 16 of them against keys and values in bfloat16, or rounded to it, all heads
 * in one sweep over the token rows. With 8 query heads for each of keys, vectors of float32 multiply for longer than
 * memory takes to bring the keys: 27 to 42 GB/s of an H100's host that brings 58. Products of bfloat16 are exact and
 * added in float32; weights are cut in two parts of 16 bits, so that results are those of float32 to its last digits. Of
 * 8 and 4 bits numbers are rounded as for a GPU's products. */
#include "native_attention.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

#include "native_coded.h"
#include "native_tiles.h"

#define ROWS 16       /* of a tile; query rows lie across the lanes of scores */
#define PAIR_BYTES 64 /* a row of a tile: 32 bfloat16 */
#define FEWEST 3      /* rows: with one or two vectors keep up with memory */

int flexbatch_in_tiles(const attention_t *a, int32_t rows) {
    const cache_t *c = &a->cache;
    return rows >= FEWEST && rows <= ROWS && c->dtype == BFLOAT16 && (c->bits == 16 || c->group % 32 == 0)
        && c->head_dim % 32 == 0 && !a->tree_masks && flexbatch_has_tiles();
}

/* Of every head queries, results, weights, maxima, sums and slopes; keys, values and scores of one head. */
typedef struct {
    char *queries, *weights; /* tiles: [heads][head_dim / 32] pairs of elements by rows; [heads][2] rows by keys */
    float *acc;              /* [heads][ROWS][head_dim] */
    float *maxima, *sums, *slopes, *scores; /* [heads][ROWS], [KEYS][ROWS] */
    char *keys, *values;     /* [KEYS][head_dim]; pairs of keys: [KEYS / 2][head_dim][2] */
} parts_t;

static int64_t part(int64_t *cursor, int64_t floats) {
    const int64_t at = *cursor;
    *cursor += floats;
    return at;
}

static parts_t parts_of(const attention_t *a, float *memory, int64_t *floats) {
    const int64_t size = a->cache.head_dim, heads = a->cache.num_kv_heads;
    parts_t p;
    p.queries = (char *)(memory + part(floats, heads * size * ROWS / 2));
    p.weights = (char *)(memory + part(floats, heads * KEYS * ROWS));
    p.acc = memory + part(floats, heads * size * ROWS);
    p.maxima = memory + part(floats, heads * ROWS);
    p.sums = memory + part(floats, heads * ROWS);
    p.slopes = memory + part(floats, heads * ROWS);
    p.scores = memory + part(floats, KEYS * ROWS);
    p.keys = (char *)(memory + part(floats, KEYS * size / 2));
    p.values = (char *)(memory + part(floats, KEYS * size / 2));
    return p;
}

int64_t flexbatch_tile_row_floats(const attention_t *a) {
    int64_t floats = 0;
    if (flexbatch_in_tiles(a, ROWS)) parts_of(a, NULL, &floats);
    return floats;
}

/* The key (side 0) or value (side 1) of one head of a token row: where it lies, or rounded to bfloat16 in `buffer`. */
static inline const char *read_vector(const cache_t *c, const char *row, int64_t head, int side, char *buffer) {
    const int64_t vector = side * c->num_kv_heads + head;
    if (c->bits == 16) return row + vector * c->head_dim * 2;
    const char *parameters = row + 2 * c->num_kv_heads * codes_of_head(c) + vector * parameters_of_head(c);
    const uint8_t *codes = (const uint8_t *)row + vector * codes_of_head(c);
    for (int64_t d = 0; d < c->head_dim; d += c->group, parameters += 4) {
        const int64_t n = c->head_dim - d < c->group ? c->head_dim - d : c->group;
        expand_group(codes + d * c->bits / 8, c->bits, parameters, n, buffer + 2 * d);
    }
    return buffer;
}

/* Queries of one head: of every 32 elements a tile of pairs by rows. Rows without a query stay zero. */
static void read_queries(const attention_t *a, const span_t *s, const item_t *item, int64_t head, const parts_t *p) {
    const int64_t size = a->cache.head_dim;
    for (int32_t row = item->row_begin; row < item->row_end; row++) {
        const int64_t i = row - item->row_begin, own = head * s->heads_per_group + row % s->heads_per_group;
        const char *from = a->query + ((s->begin + row / s->heads_per_group) * a->num_heads + own) * size * 2;
        char *to = p->queries + head * size * ROWS * 2 + 4 * i;
        for (int64_t pair = 0; pair < size / 2; pair++) memcpy(to + pair * PAIR_BYTES, from + 4 * pair, 4);
        p->maxima[head * ROWS + i] = first_maximum(a, item, own);
        p->sums[head * ROWS + i] = first_sum(a, item);
        p->slopes[head * ROWS + i] = a->alibi_slopes ? a->alibi_slopes[own] : 0.0f;
    }
    for (int64_t i = item->row_end - item->row_begin; i < ROWS; i++) p->maxima[head * ROWS + i] = -INFINITY;
}

/* Scores of KEYS keys of one head; its values come nearer. */
static void multiply_keys(const attention_t *a, int64_t head, const char *const *row, const parts_t *p) {
    const int64_t size = a->cache.head_dim, stride = 2 * size;
    const char *queries = p->queries + head * size * ROWS * 2;
    for (int t = 0; t < KEYS; t++) {
        prefetch_side(a, row[t], head, 1);
        const char *key = read_vector(&a->cache, row[t], head, 0, p->keys + t * stride);
        if (key != p->keys + t * stride) memcpy(p->keys + t * stride, key, stride);
    }
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t chunk = 0; chunk < size / 32; chunk++) {
        _tile_loadd(4, queries + chunk * ROWS * PAIR_BYTES, PAIR_BYTES);
        _tile_loadd(2, p->keys + chunk * PAIR_BYTES, stride);
        _tile_loadd(3, p->keys + ROWS * stride + chunk * PAIR_BYTES, stride);
        _tile_dpbf16ps(0, 2, 4);
        _tile_dpbf16ps(1, 3, 4);
    }
    _tile_stored(0, p->scores, PAIR_BYTES);
    _tile_stored(1, p->scores + ROWS * ROWS, PAIR_BYTES);
}

/* Scale, soft cap, ALiBi and masks of the scores of one head. */
static void mask(const attention_t *a, const span_t *s, const item_t *item, position_range_t range, int32_t key,
    int32_t end, const float *slopes, float *scores) {
    const int biased = needs_bias(a, s, item->row_begin / s->heads_per_group, range, key, end);
    float positions[ROWS] = {0};
    for (int32_t row = item->row_begin; biased && row < item->row_end; row++)
        positions[row - item->row_begin] = query_position(a, s, row / s->heads_per_group);
    for (int t = 0; t < KEYS; t++) {
        vec score = scaled(a, load(scores + t * ROWS));
        if (key + t >= end) score = splat(-INFINITY);
        else if (biased)
            score = biased_scores(a, score, load(positions), splat(key_position(a, s, key + t)), load(slopes));
        store(scores + t * ROWS, score);
    }
}

/* Online softmax over KEYS keys of all rows of one head: scores become weights; its results shrink where a maximum
 * grows. */
static void soften(const attention_t *a, int64_t head, const parts_t *p) {
    float *maxima = p->maxima + head * ROWS, *sums = p->sums + head * ROWS,
        *acc = p->acc + head * ROWS * a->cache.head_dim;
    const vec old = load(maxima);
    vec top = old, total = {0};
    for (int t = 0; t < KEYS; t++) top = larger(load(p->scores + t * ROWS), top);
    const vec base = choose(top == splat(-INFINITY), splat(0.0f), top), shrink = exp_negative(old - base);
    for (int t = 0; t < KEYS; t++) {
        const vec weight = exp_negative(load(p->scores + t * ROWS) - base);
        store(p->scores + t * ROWS, weight);
        total += weight;
    }
    store(sums, load(sums) * shrink + total);
    store(maxima, top);
    for (int i = 0; i < ROWS; i++)
        for (int64_t d = 0; shrink[i] != 1.0f && d < a->cache.head_dim; d += LANES) {
            float *at = acc + i * a->cache.head_dim + d;
            store(at, load(at) * shrink[i]);
        }
}

static inline __m512 widened(__m256i halves) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}

/* Weights of one head as two tiles of rows by keys: rounded to bfloat16, and what that left out. */
static void cut_weights(int64_t head, int32_t rows, const parts_t *p) {
    __m512i first[ROWS], second[ROWS];
    char *to = p->weights + head * 2 * ROWS * PAIR_BYTES;
    for (int t = 0; t < ROWS; t++) {
        first[t] = _mm512_load_si512(p->scores + t * ROWS);
        second[t] = _mm512_load_si512(p->scores + (ROWS + t) * ROWS);
    }
    transpose(first);
    transpose(second);
    for (int32_t i = 0; i < rows; i++) {
        const __m512 low = (__m512)first[i], high = (__m512)second[i];
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        const __m512 low_rest = _mm512_sub_ps(low, widened(_mm512_castsi512_si256(rounded))),
            high_rest = _mm512_sub_ps(high, widened(_mm512_extracti64x4_epi64(rounded, 1)));
        _mm512_store_si512(to + i * PAIR_BYTES, rounded);
        _mm512_store_si512(to + (ROWS + i) * PAIR_BYTES, (__m512i)_mm512_cvtne2ps_pbh(high_rest, low_rest));
    }
}

/* Adds the values of KEYS keys of one head by their weights; the keys of `ahead` come nearer. */
static void add_values(const attention_t *a, int64_t head, const char *const *row, const char *const *ahead,
    const parts_t *p) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
        5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const int64_t size = a->cache.head_dim, stride = 4 * size;
    const char *weights = p->weights + head * 2 * ROWS * PAIR_BYTES;
    float *acc = p->acc + head * ROWS * size;
    for (int t = 0; t < KEYS; t += 2) {
        const char *even = read_vector(&a->cache, row[t], head, 1, p->keys),
            *odd = read_vector(&a->cache, row[t + 1], head, 1, p->keys + 2 * size);
        char *to = p->values + t / 2 * stride;
        prefetch_side(a, ahead[t], head, 0);
        prefetch_side(a, ahead[t + 1], head, 0);
        for (int64_t d = 0; d < size; d += 32) {
            const __m512i x = _mm512_loadu_si512(even + 2 * d), y = _mm512_loadu_si512(odd + 2 * d);
            _mm512_store_si512(to + 4 * d, _mm512_permutex2var_epi16(x, low, y));
            _mm512_store_si512(to + 4 * d + 64, _mm512_permutex2var_epi16(x, high, y));
        }
    }
    _tile_loadd(4, weights, PAIR_BYTES);
    _tile_loadd(5, weights + ROWS * PAIR_BYTES, PAIR_BYTES);
    for (int64_t d = 0; d < size; d += 2 * ROWS) {
        _tile_loadd(0, acc + d, stride);
        _tile_loadd(1, acc + d + ROWS, stride);
        _tile_loadd(2, p->values + 4 * d, stride);
        _tile_loadd(3, p->values + 4 * d + 64, stride);
        _tile_dpbf16ps(0, 4, 2);
        _tile_dpbf16ps(1, 4, 3);
        _tile_dpbf16ps(0, 5, 2);
        _tile_dpbf16ps(1, 5, 3);
        _tile_stored(0, acc + d, stride);
        _tile_stored(1, acc + d + ROWS, stride);
    }
}

void flexbatch_tile_rows(const attention_t *a, const item_t *item, float *scratch, float *partials) {
    const span_t s = span_of(a, item->sequence);
    const int32_t rows = item->row_end - item->row_begin;
    const int64_t heads = a->cache.num_kv_heads, size = a->cache.head_dim;
    const position_range_t range = position_range(a, &s, item);
    int64_t floats = 0;
    const parts_t p = parts_of(a, scratch, &floats);
    const char *now[KEYS], *next[KEYS];
    tiles_t before;
    memset(scratch, 0, floats * sizeof(float));
    for (int64_t head = 0; head < heads; head++) read_queries(a, &s, item, head, &p);
    find_rows(a, item, item->key_begin, next);
    for (int64_t t = 0; t < KEYS && item->key_begin < item->key_end; t++)
        for (int64_t head = 0; head < heads; head++) prefetch_side(a, next[t], head, 0);
    take_tiles(&before);
    for (int32_t key = item->key_begin; key < item->key_end; key += KEYS) {
        const int32_t end = key + KEYS < item->key_end ? key + KEYS : item->key_end;
        memcpy(now, next, sizeof now);
        find_rows(a, item, end, next);
        for (int64_t head = 0; head < heads; head++) {
            multiply_keys(a, head, now, &p);
            mask(a, &s, item, range, key, end, p.slopes + head * ROWS, p.scores);
            soften(a, head, &p);
            cut_weights(head, rows, &p);
        }
        for (int64_t head = 0; head < heads; head++) add_values(a, head, now, next, &p);
    }
    leave_tiles(&before);
    for (int64_t head = 0; head < heads; head++)
        for (int32_t i = 0; i < rows; i++)
            finish(a, &s, item, head, item->row_begin + i, p.acc + (head * ROWS + i) * size, 1,
                p.maxima[head * ROWS + i], p.sums[head * ROWS + i], partials);
}

#else

int flexbatch_in_tiles(const attention_t *a, int32_t rows) { return (void)a, (void)rows, 0; }
int64_t flexbatch_tile_row_floats(const attention_t *a) { return (void)a, 0; }
void flexbatch_tile_rows(const attention_t *a, const item_t *item, float *scratch, float *partials) {
    (void)a, (void)item, (void)scratch, (void)partials;
}

#endif
