/* Attention of ragged query tokens over a paged cache in host memory; signature and meaning as `paged_attention` in reference.py.
 *
 * Two ways through the same keys. A sequence with few query rows (query tokens x heads of a group) is limited by memory: all heads are
 * taken in one sweep over the token rows, which is how they lie, and the other side (values, next keys) is prefetched meanwhile. One with
 * many rows is limited by arithmetic: a tile of rows lies across the vector lanes, so keys and values are read as scalars, nothing is
 * transposed and the softmax needs no reduction across lanes. Contexts of few query tokens are cut at fixed places, whatever
 * the number of threads and whatever else is in the batch: a sequence's result depends on its own keys alone. */
#include <stdlib.h>

#include "native_attention.h"

static int is_few(const span_t *s) { return s->queries * s->heads_per_group < LANES; }

/* Leave out keys after the item's last query token and before the window of its shallowest one. No key at all is possible in a partial result.
 * In a tree slots say nothing about order: all its keys stay. */
static void narrow(const attention_t *a, const span_t *s, item_t *item) {
    const int32_t seen = a->tree_masks ? s->context : s->prefix + (item->row_end - 1) / s->heads_per_group + 1;
    int64_t start = a->window ? (int64_t)places_of(a, s, item).low - a->window + 1 : 0;
    if (a->tree_masks && start > s->prefix) start = s->prefix;
    if (item->key_end > seen) item->key_end = seen;
    if (item->key_begin < start) item->key_begin = (int32_t)start;
    if (item->key_end < item->key_begin) item->key_end = item->key_begin;
}

/* Keys of one item of a cut context: a millisecond's tenth of work for a thread (a megabyte at 16 bits). With whole contexts of 512 keys three sequences
 * kept three of 16 threads busy, and 17 items took as long as 32 (0.7 ms each on an H200's host, OPT-13B). */
static int32_t split_keys(const attention_t *a) {
    const int64_t keys = round_up(SPLIT_ELEMENTS / (2 * a->cache.num_kv_heads * a->cache.head_dim), KEYS);
    return (int32_t)(keys < 2 * KEYS ? 2 * KEYS : keys > SPLIT_KEYS ? SPLIT_KEYS : keys);
}

static int is_cut(const attention_t *a, const span_t *s) { return s->queries <= SPLIT_QUERIES && s->context > split_keys(a); }

/* Items of one sequence into `items` (null: only counted); `partial` moves on by what its partial results take. */
static int64_t share_out(const attention_t *a, int32_t sequence, item_t *items, int64_t *partial) {
    const span_t s = span_of(a, sequence);
    const int32_t rows = s.queries * s.heads_per_group, kv_heads = (int32_t)a->cache.num_kv_heads, heads = is_few(&s) ? kv_heads : 1;
    const int32_t step = is_cut(a, &s) ? split_keys(a) : s.context;
    int64_t count = 0;
    if (s.queries <= 0) return 0;
    for (int32_t first = 0; first < s.context; first += step) {
        const int32_t last = first + step < s.context ? first + step : s.context;
        for (int32_t head = 0; head < kv_heads; head += heads)
            for (int32_t row = 0; row < rows; row += TILE, count++) {
                if (!items) continue;
                item_t item = {sequence, head, head + heads, row, row + TILE < rows ? row + TILE : rows, first, last, step < s.context ? *partial : -1};
                narrow(a, &s, &item);
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
    const int64_t size = a->cache.head_dim, rows = s.queries * a->num_heads, parts = (s.context + split_keys(a) - 1) / split_keys(a);
    float merged[size];
    for (int64_t r = 0; r < rows; r++) {
        merge(partial + r * (size + 2), parts, rows * (size + 2), size, merged);
        write_row(a, s.begin * a->num_heads + r, merged, 1, 1.0f);
    }
}

/* One item; who finishes the last of a cut sequence merges its partial results, so that the threads meet once, at the end: on a busy machine each
 * meeting costs a time slice. */
static void work_on(const attention_t *a, const item_t *item, float *scratch, float *partials, const int64_t *partial_of, int32_t *left) {
    const span_t s = span_of(a, item->sequence);
    (is_few(&s) ? flexbatch_few_rows : flexbatch_many_rows)(a, item, scratch, partials);
    if (item->partial >= 0 && __atomic_sub_fetch(left + item->sequence, 1, __ATOMIC_ACQ_REL) == 0)
        merge_sequence(a, item->sequence, partials + partial_of[item->sequence]);
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
    int32_t *left = malloc((a->num_sequences + 1) * sizeof *left);
    for (int32_t q = 0; q < a->num_sequences; q++) count += share_out(a, q, NULL, &floats);
    item_t *items = malloc((count + 1) * sizeof *items);
    float *partials = malloc((floats + 1) * sizeof *partials), *scratch = NULL;
    const int64_t each = scratch_floats(a);
    const int failed = !partial_of || !left || !items || !partials || posix_memalign((void **)&scratch, 64, each * a->threads * sizeof *scratch);
    if (!failed) {
        floats = 0;
        for (int32_t q = 0; q < a->num_sequences; q++) {
            partial_of[q] = floats;
            left[q] = (int32_t)share_out(a, q, items + filled, &floats);
            filled += left[q];
        }
        const int threads = (int)(count < a->threads ? (count > 0 ? count : 1) : a->threads);
#pragma omp parallel num_threads(threads)
        {
#ifdef _OPENMP
            extern int omp_get_thread_num(void);
            float *own = scratch + each * omp_get_thread_num();
#else
            float *own = scratch;
#endif
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t i = 0; i < count; i++) work_on(a, items + i, own, partials, partial_of, left);
        }
    }
    free(partial_of), free(left), free(items), free(partials), free(scratch);
    return failed;
}
