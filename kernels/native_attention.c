/* Attention of ragged query tokens over a paged cache in host memory; signature and meaning as `paged_attention` in
 * attention_reference.py.
 *
 * Three ways through the same keys. A sequence with few query rows (query tokens x heads of a group) is limited by
 * memory: all heads are taken in one sweep over the token rows, which is how they lie, and the other side (values,
 * next keys) is prefetched meanwhile; from 3 to 16 rows on bfloat16 that takes matrix tiles, where the processor has
 * them, as vectors would limit it by arithmetic. One with many rows is limited by arithmetic: a tile of rows lies across the
 * vector lanes, so keys and values are read as scalars, nothing is transposed and the softmax needs no reduction
 * across lanes. Contexts of few query tokens are cut at fixed keys, whatever the number of threads and whatever
 * else is in the batch: a sequence's result depends on its own keys alone. */
#include "native_attention.h"

static int in_tiles(const attention_t *a, const span_t *s) {
    return flexbatch_in_tiles(a, s->queries * s->heads_per_group);
}

static int is_few(const attention_t *a, const span_t *s) {
    return s->queries * s->heads_per_group < LANES || in_tiles(a, s);
}

/* Leave out keys after the item's last query token and before the window of its shallowest one. No key at all is
 * possible in a partial result. In a tree slots say nothing about order: all its keys stay. */
static void narrow(const attention_t *a, const span_t *s, item_t *item) {
    const int32_t seen = a->tree_masks ? s->context : s->prefix + (item->row_end - 1) / s->heads_per_group + 1;
    int64_t start = a->window ? (int64_t)window_start(a, position_range(a, s, item).low) : 0;
    if (a->tree_masks && start > s->prefix) start = s->prefix;
    if (item->key_end > seen) item->key_end = seen;
    if (item->key_begin < start) item->key_begin = (int32_t)start;
    if (item->key_end < item->key_begin) item->key_end = item->key_begin;
}

/* Keys of one item of a cut context: a millisecond's tenth of work for a thread (a megabyte at 16 bits). With whole
 * contexts of 512 keys three sequences kept three of 16 threads busy, and 17 items took as long as 32 (0.7 ms each
 * on an H200's host, OPT-13B). An item of many rows has one head, and the more keys for that: partial results of a
 * tree of 32 nodes and 2,048 keys took 16.6 MiB where 2.1 do. */
static int32_t split_keys(const attention_t *a, const span_t *s) {
    const int64_t heads = is_few(a, s) ? a->cache.num_kv_heads : 1,
        keys = round_up(SPLIT_ELEMENTS / (2 * heads * a->cache.head_dim), KEYS);
    return (int32_t)(keys < 2 * KEYS ? 2 * KEYS : keys > SPLIT_KEYS ? SPLIT_KEYS : keys);
}

static int is_cut(const attention_t *a, const span_t *s) {
    return s->queries > 0 && s->queries <= SPLIT_QUERIES && s->context > split_keys(a, s);
}

static int64_t num_parts(const attention_t *a, const span_t *s) {
    return (s->context + split_keys(a, s) - 1) / split_keys(a, s);
}

/* Floats of one part's partial results: values, maximum and sum of every row. */
static int64_t part_floats(const attention_t *a, const span_t *s) {
    return s->queries * a->num_heads * (a->cache.head_dim + 2);
}

/* Items of one sequence into `items` (null: only counted). */
static int64_t share_out(const attention_t *a, int32_t sequence, item_t *items) {
    const span_t s = span_of(a, sequence);
    const int32_t rows = s.queries * s.heads_per_group, kv_heads = (int32_t)a->cache.num_kv_heads;
    const int32_t heads = is_few(a, &s) ? kv_heads : 1;
    const int cut = is_cut(a, &s);
    const int32_t step = cut ? split_keys(a, &s) : s.context;
    int64_t count = 0, partial = 0;
    if (s.queries <= 0) return 0;
    for (int32_t first = 0; first < s.context; first += step, partial += part_floats(a, &s)) {
        const int32_t last = first + step < s.context ? first + step : s.context;
        for (int32_t head = 0; head < kv_heads; head += heads)
            for (int32_t row = 0; row < rows; row += TILE, count++) {
                if (!items) continue;
                const int32_t row_end = row + TILE < rows ? row + TILE : rows;
                item_t item = {sequence, head, head + heads, row, row_end, first, last, cut ? partial : -1};
                narrow(a, &s, &item);
                items[count] = item;
            }
    }
    return count;
}

/* Result of one row of a sequence from the partial results of its key ranges, `stride` floats apart. */
static void merge(const float *partial, int64_t parts, int64_t stride, int64_t size, float *out) {
    float maximum = -INFINITY, sum = 0.0f;
    for (int64_t p = 0; p < parts; p++)
        maximum = partial[p * stride + size] > maximum ? partial[p * stride + size] : maximum;
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
    const int64_t size = a->cache.head_dim, rows = s.queries * a->num_heads, parts = num_parts(a, &s);
    float merged[size];
    for (int64_t r = 0; r < rows; r++) {
        merge(partial + r * (size + 2), parts, rows * (size + 2), size, merged);
        write_row(a, s.begin * a->num_heads + r, merged, 1, 1.0f);
    }
}

/* The caller's memory, in parts. Items are taken in order, so that of the sequences with partial results all but one
 * have an item in some thread's hands: one slot more than there are threads is enough, however many sequences there
 * are. */
typedef struct {
    float *scratch, *slots; /* [threads][scratch_floats], [num_slots][slot_floats] */
    item_t *items;
    int32_t *left, *slot_of, *free_slots; /* by sequence: its unfinished items, its slot or -1; slots of nobody */
    int64_t count, scratch_floats, num_slots, slot_floats, num_free, num_bytes;
} workspace_t;

static int64_t scratch_floats(const attention_t *a) {
    const int64_t width = round_up(a->cache.head_dim, LANES > 4 ? LANES : 4), rows = LANES * a->cache.num_kv_heads;
    const int64_t few = rows * (2 * width + KEYS + 2) + LANES + 4 * width;
    const int64_t many = TILE * (2 * width + KEYS + 4) + 2 * KEYS * width;
    const int64_t tiles = flexbatch_tile_row_floats(a), vectors = few > many ? few : many;
    return round_up(tiles > vectors ? tiles : vectors, 16);
}

static void *carve(char *memory, int64_t *cursor, int64_t num_bytes) {
    void *part = memory + *cursor;
    *cursor += round_up(num_bytes, 64);
    return part;
}

static workspace_t plan_workspace(const attention_t *a, char *memory) {
    workspace_t w = {.scratch_floats = scratch_floats(a)};
    for (int32_t q = 0; q < a->num_sequences; q++) {
        const span_t s = span_of(a, q);
        const int64_t floats = is_cut(a, &s) ? round_up(num_parts(a, &s) * part_floats(a, &s), 16) : 0;
        w.count += share_out(a, q, NULL);
        w.slot_floats = floats > w.slot_floats ? floats : w.slot_floats;
        w.num_slots += floats > 0 && w.num_slots <= a->threads;
    }
    w.scratch = carve(memory, &w.num_bytes, w.scratch_floats * a->threads * (int64_t)sizeof *w.scratch);
    w.slots = carve(memory, &w.num_bytes, w.num_slots * w.slot_floats * (int64_t)sizeof *w.slots);
    w.items = carve(memory, &w.num_bytes, w.count * (int64_t)sizeof *w.items);
    w.left = carve(memory, &w.num_bytes, a->num_sequences * (int64_t)sizeof *w.left);
    w.slot_of = carve(memory, &w.num_bytes, a->num_sequences * (int64_t)sizeof *w.slot_of);
    w.free_slots = carve(memory, &w.num_bytes, w.num_slots * (int64_t)sizeof *w.free_slots);
    return w;
}

/* Where a sequence's partial results are: its first item takes a slot. */
static float *slot_of(workspace_t *w, int32_t sequence) {
    int32_t slot = __atomic_load_n(w->slot_of + sequence, __ATOMIC_ACQUIRE);
    if (slot < 0) {
#pragma omp critical(flexbatch_slots)
        {
            slot = w->slot_of[sequence];
            if (slot < 0)
                __atomic_store_n(w->slot_of + sequence, slot = w->free_slots[--w->num_free], __ATOMIC_RELEASE);
        }
    }
    return w->slots + slot * w->slot_floats;
}

/* One item; who finishes the last of a cut sequence merges its partial results and gives the slot back, so that the
 * threads meet once, at the end: on a busy machine each meeting costs a time slice. */
static void work_on(const attention_t *a, workspace_t *w, const item_t *item, float *scratch) {
    const span_t s = span_of(a, item->sequence);
    float *partials = item->partial < 0 ? NULL : slot_of(w, item->sequence);
    (in_tiles(a, &s) ? flexbatch_tile_rows : is_few(a, &s) ? flexbatch_few_rows : flexbatch_many_rows)(
        a, item, scratch, partials);
    if (partials && __atomic_sub_fetch(w->left + item->sequence, 1, __ATOMIC_ACQ_REL) == 0) {
        merge_sequence(a, item->sequence, partials);
#pragma omp critical(flexbatch_slots)
        w->free_slots[w->num_free++] = w->slot_of[item->sequence];
    }
}

/* Bytes that `flexbatch_paged_attention` needs for this call. */
int64_t flexbatch_attention_bytes(const attention_t *a) { return plan_workspace(a, NULL).num_bytes; }

/* `memory`: as many bytes as `flexbatch_attention_bytes` says, at a multiple of 64. */
void flexbatch_paged_attention(const attention_t *a, char *memory) {
    workspace_t w = plan_workspace(a, memory);
    int64_t filled = 0, next = 0;
    for (int32_t q = 0; q < a->num_sequences; filled += w.left[q++]) {
        w.left[q] = (int32_t)share_out(a, q, w.items + filled);
        w.slot_of[q] = -1;
    }
    for (; w.num_free < w.num_slots; w.num_free++) w.free_slots[w.num_free] = (int32_t)w.num_free;
    const int threads = (int)(w.count < a->threads ? (w.count > 0 ? w.count : 1) : a->threads);
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        float *own = w.scratch + w.scratch_floats * omp_get_thread_num();
#else
        float *own = w.scratch;
#endif
        /* Not a shared loop: its iterations may be handed out in any order. */
        for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < w.count;)
            work_on(a, &w, w.items + i, own);
    }
}
