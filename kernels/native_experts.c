/* The gated MLPs of experts over routed rows, where the weights lie (layout: experts_reference.py). Every weight is read
 * once for up to 64 rows of its expert: expanded to float32 a piece at a time, which stays in the first-level cache. */
#include "native_experts.h"

/* PIECE: inputs of a weight row that are expanded together. TOGETHER: weight rows that share a load of an input. MOST:
 * routed rows that share an expanded piece. BLOCK: outputs of an item of work. */
enum { PIECE = 512, TOGETHER = 4, MOST = 64, BLOCK = 16 };
#if LANES == 16
enum { AT_ONCE = 4 }; /* routed rows whose sums are in registers with those of TOGETHER weight rows */
#else
enum { AT_ONCE = 2 };
#endif

typedef struct {
    float *inputs, *inner;     /* of every row, padded with zeros to whole vectors */
    int64_t input_floats, inner_floats;
} buffers_t;

static buffers_t buffers(const experts_t *e, float *memory) {
    buffers_t b = {.input_floats = round_up(e->gate_up.inputs, LANES), .inner_floats = round_up(e->down.inputs, LANES)};
    b.inputs = memory;
    b.inner = memory + e->rows * b.input_floats;
    return b;
}

#if defined(__SSSE3__)
#include <tmmintrin.h>
static inline void look_up(uint8_t *codes, int64_t n) {
    const __m128i table = _mm_loadu_si128((const __m128i *)DOUBLES);
    for (int64_t i = 0; i < n; i += 16)
        _mm_storeu_si128((__m128i *)(codes + i), _mm_shuffle_epi8(table, _mm_loadu_si128((__m128i *)(codes + i))));
}
#else
static inline void look_up(uint8_t *codes, int64_t n) {
    for (int64_t i = 0; i < n; i++) codes[i] = (uint8_t)DOUBLES[codes[i]];
}
#endif

static inline void expand_floats(const int8_t *restrict codes, float *restrict out, float scale) {
    for (int i = 0; i < 32; i++) out[i] = codes[i] * scale;
}

/* Codes [begin, end) of a group, which may not be whole; loops of known length are vectors without a rest. */
static inline void expand_group(const uint8_t *codes, float *out, int64_t n, float scale, float minimum) {
    if (n == 64) expand_8(codes, out, 64, scale, minimum);
    else if (n == 32) expand_8(codes, out, 32, scale, minimum);
    else expand_8(codes, out, n, scale, minimum);
}

/* Not rounded to the compute dtype, as a GPU's copy of them is: in bfloat16 that costs as much as all the rest. */
static void expand_coded(const matrix_t *m, const uint8_t *codes, const char *parameters, int64_t begin, int64_t end,
    int64_t dtype, float *out) {
    const int64_t n = end - begin, width = element_bytes(dtype);
    uint16_t pairs[PIECE / 2];
    uint8_t *unpacked = (uint8_t *)pairs;
    codes += begin * m->bits / 8;
    if (m->bits == 4) {
        for (int64_t k = 0; k < (n + 1) / 2; k++) pairs[k] = (codes[k] | codes[k] << 4) & 0x0f0f;
        codes = unpacked;
    }
    if (m->floats) {
        look_up(unpacked, n);
        for (int64_t i = 0; i < n; i += 32)
            expand_floats((const int8_t *)unpacked + i, out + i, half_of_power((uint8_t)parameters[(begin + i) / 32]));
        return;
    }
    for (int64_t i = begin, next; i < end; i = next) {
        const int64_t g = i / m->group;
        next = (g + 1) * m->group < end ? (g + 1) * m->group : end;
        expand_group(codes + i - begin, out + i - begin, next - i, scalar(parameters + 2 * g * width, dtype),
            scalar(parameters + (2 * g + 1) * width, dtype));
    }
}

/* Inputs [begin, end) of a weight row to `out`, and zeros up to a whole vector. What follows in memory comes nearer. */
static void expand_weights(const matrix_t *m, const char *values, const char *parameters, int64_t row, int64_t begin,
    int64_t end, int64_t dtype, float *out) {
    const int64_t n = end - begin, width = element_bytes(dtype), groups = (m->inputs + m->group - 1) / m->group;
    const int64_t row_bytes = m->bits == 16 ? m->inputs * width : (m->inputs * m->bits + 7) / 8;
    const int64_t piece_bytes = m->bits == 16 ? n * width : n * m->bits / 8;
    const char *source = values + row * row_bytes;
    for (int64_t i = 0; i < piece_bytes; i += 64)
        __builtin_prefetch(source + (m->bits == 16 ? end * width : end * m->bits / 8) + i);
    for (int64_t i = n / LANES * LANES; i < round_up(n, LANES); i++) out[i] = 0;
    if (m->bits != 16)
        expand_coded(m, (const uint8_t *)source, parameters + row * groups * (m->floats ? 1 : 2 * width), begin, end,
            dtype, out);
    else if (dtype == FLOAT32) memcpy(out, source + 4 * begin, 4 * n);
    else expand_16(source + 2 * begin, out, n, dtype);
}

/* Adds to the sums of `count` routed rows the products with a piece of TOGETHER weight rows. */
static inline __attribute__((always_inline))
void multiply(const float *weights, const float *const *x, int count, int64_t begin, int64_t width, vec *sums) {
    vec sum[AT_ONCE][TOGETHER];
    for (int t = 0; t < count; t++)
        for (int r = 0; r < TOGETHER; r++) sum[t][r] = sums[t * TOGETHER + r];
    for (int64_t d = 0; d < width; d += LANES) {
        vec w[TOGETHER];
        for (int r = 0; r < TOGETHER; r++) w[r] = load(weights + r * PIECE + d);
        for (int t = 0; t < count; t++) {
            const vec input = load(x[t] + begin + d);
            for (int r = 0; r < TOGETHER; r++) sum[t][r] += input * w[r];
        }
    }
    for (int t = 0; t < count; t++)
        for (int r = 0; r < TOGETHER; r++) sums[t * TOGETHER + r] = sum[t][r];
}

/* results[t][r]: the sums over all inputs of `count` routed rows, at most MOST, with TOGETHER weight rows. */
static void products(const matrix_t *m, const char *values, const char *parameters, const int64_t *rows,
    const float *const *x, int64_t count, int64_t dtype, float (*results)[TOGETHER]) {
    float weights[TOGETHER * PIECE] __attribute__((aligned(64)));
    vec sums[MOST * TOGETHER];
    memset(sums, 0, count * TOGETHER * sizeof(vec));
    for (int64_t begin = 0; begin < m->inputs; begin += PIECE) {
        const int64_t end = begin + PIECE < m->inputs ? begin + PIECE : m->inputs, width = round_up(end - begin, LANES);
        for (int r = 0; r < TOGETHER; r++)
            expand_weights(m, values, parameters, rows[r], begin, end, dtype, weights + r * PIECE);
        int64_t t = 0;
        for (; t + AT_ONCE <= count; t += AT_ONCE) multiply(weights, x + t, AT_ONCE, begin, width, sums + t * TOGETHER);
        for (; t < count; t++) multiply(weights, x + t, 1, begin, width, sums + t * TOGETHER);
    }
    for (int64_t t = 0; t < count; t++)
        for (int r = 0; r < TOGETHER; r++) results[t][r] = horizontal_sum(sums[t * TOGETHER + r]);
}

/* What a tensor of the compute dtype would hold. */
static inline float rounded(float x, int64_t dtype) {
    const uint16_t half = dtype == BFLOAT16 ? to_bfloat16(x) : dtype == FLOAT16 ? to_float16(x) : 0;
    return dtype == FLOAT32 ? x : scalar((const char *)&half, dtype);
}

/* Outputs [begin, begin + BLOCK) of gate and up of a group, and what the activation makes of them. */
static void first_item(const experts_t *e, const buffers_t *b, int64_t group, int64_t begin) {
    const int64_t expert = e->experts[group], width = e->down.inputs, *address = e->addresses + 4 * expert;
    const int64_t end = begin + BLOCK < width ? begin + BLOCK : width, padded = end == width ? b->inner_floats : end;
    const float *bias = e->gate_up_bias ? e->gate_up_bias + 2 * width * expert : NULL;
    for (int64_t row = e->starts[group]; row < e->starts[group + 1]; row += MOST) {
        const int64_t left = e->starts[group + 1] - row, count = left < MOST ? left : MOST;
        const float *x[MOST];
        float gates[MOST][BLOCK] = {{0}}, ups[MOST][BLOCK] = {{0}}, results[MOST][TOGETHER];
        for (int64_t t = 0; t < count; t++) x[t] = b->inputs + (row + t) * b->input_floats;
        for (int64_t j = begin; j < end; j += 2) {
            const int64_t second = j + 1 < end ? j + 1 : j, rows[TOGETHER] = {j, second, width + j, width + second};
            products(&e->gate_up, (const char *)address[0], (const char *)address[1], rows, x, count, e->dtype, results);
            for (int64_t t = 0; t < count; t++)
                for (int64_t i = 0; i < 2 && j + i < end; i++) {
                    gates[t][j + i - begin] = rounded(results[t][i] + (bias ? bias[j + i] : 0), e->dtype);
                    ups[t][j + i - begin] = rounded(results[t][2 + i] + (bias ? bias[width + j + i] : 0), e->dtype);
                }
        }
        for (int64_t t = 0; t < count; t++)
            for (int64_t j = begin; j < padded; j += LANES) {
                float values[LANES];
                store(values, activated(e, load(gates[t] + j - begin), load(ups[t] + j - begin)));
                float *inner = b->inner + (row + t) * b->inner_floats + j;
                for (int64_t i = 0; i < LANES; i++) inner[i] = j + i < end ? rounded(values[i], e->dtype) : 0.0f;
            }
    }
}

static void put(char *to, float x, int64_t dtype) {
    const uint16_t half = dtype == BFLOAT16 ? to_bfloat16(x) : dtype == FLOAT16 ? to_float16(x) : 0;
    if (dtype == FLOAT32) memcpy(to, &x, 4);
    else memcpy(to, &half, 2);
}

/* Outputs [begin, begin + BLOCK) of down of a group. */
static void second_item(const experts_t *e, const buffers_t *b, int64_t group, int64_t begin) {
    const int64_t expert = e->experts[group], hidden = e->down.outputs, *address = e->addresses + 4 * expert;
    const int64_t end = begin + BLOCK < hidden ? begin + BLOCK : hidden, bytes = element_bytes(e->dtype);
    const float *bias = e->down_bias ? e->down_bias + hidden * expert : NULL;
    for (int64_t row = e->starts[group]; row < e->starts[group + 1]; row += MOST) {
        const int64_t left = e->starts[group + 1] - row, count = left < MOST ? left : MOST;
        const float *x[MOST];
        float results[MOST][TOGETHER];
        for (int64_t t = 0; t < count; t++) x[t] = b->inner + (row + t) * b->inner_floats;
        for (int64_t j = begin; j < end; j += TOGETHER) {
            int64_t rows[TOGETHER];
            for (int64_t i = 0; i < TOGETHER; i++) rows[i] = j + i < end ? j + i : end - 1;
            products(&e->down, (const char *)address[2], (const char *)address[3], rows, x, count, e->dtype, results);
            for (int64_t t = 0; t < count; t++)
                for (int64_t i = 0; i < TOGETHER && j + i < end; i++)
                    put(e->out + (e->positions[row + t] * hidden + j + i) * bytes,
                        results[t][i] + (bias ? bias[j + i] : 0), e->dtype);
        }
    }
}

static void read_input(const experts_t *e, const buffers_t *b, int64_t row) {
    const int64_t hidden = e->gate_up.inputs;
    const char *source = e->x + e->tokens[row] * hidden * element_bytes(e->dtype);
    float *out = b->inputs + row * b->input_floats;
    for (int64_t i = b->input_floats - LANES; i < b->input_floats; i++) out[i] = 0;
    if (e->dtype == FLOAT32) memcpy(out, source, 4 * hidden);
    else expand_16(source, out, hidden, e->dtype);
    if (e->scales)
        for (int64_t i = 0; i < hidden; i++) out[i] = rounded(out[i] * rounded(e->scales[row], e->dtype), e->dtype);
}

/* Bytes that `flexbatch_expert_rows` needs for this call. */
int64_t flexbatch_experts_bytes(const experts_t *e) {
    if (flexbatch_experts_in_tiles(e)) return flexbatch_expert_tile_bytes(e);
    const buffers_t b = buffers(e, NULL);
    return e->rows * (b.input_floats + b.inner_floats) * (int64_t)sizeof(float);
}

/* `memory`: as many bytes as `flexbatch_experts_bytes` says, at a multiple of 64. Items are taken in their order, so
 * that what the threads read lies together. */
void flexbatch_expert_rows(const experts_t *e, float *memory) {
    if (flexbatch_experts_in_tiles(e)) {
        flexbatch_expert_tiles(e, (char *)memory);
        return;
    }
    const buffers_t b = buffers(e, memory);
    const int64_t first = (e->down.inputs + BLOCK - 1) / BLOCK, second = (e->down.outputs + BLOCK - 1) / BLOCK;
    const int64_t most = e->groups * (first > second ? first : second);
    const int threads = (int)(most < e->threads ? (most > 0 ? most : 1) : e->threads);
    int64_t next[3] = {0};
#pragma omp parallel num_threads(threads)
    {
        for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < e->rows;) read_input(e, &b, i);
#pragma omp barrier
        for (int64_t i; (i = __atomic_fetch_add(next + 1, 1, __ATOMIC_RELAXED)) < e->groups * first;)
            first_item(e, &b, i / first, i % first * BLOCK);
#pragma omp barrier
        for (int64_t i; (i = __atomic_fetch_add(next + 2, 1, __ATOMIC_RELAXED)) < e->groups * second;)
            second_item(e, &b, i / second, i % second * BLOCK);
    }
}
