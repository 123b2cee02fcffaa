/* Products of tokens with a matrix in codes. Every code is expanded in registers, for few tokens, or to a piece that
 * stays in the nearest cache, for many: memory is read for codes alone, 4 to 7 times less than for the numbers. */
#include "native_coded.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

/* FEW: tokens that are multiplied in registers. PIECE: elements of a row that are expanded together; PANEL: rows
 * whose pieces lie in the nearest cache; TOGETHER x AT_ONCE: rows by tokens whose sums are in registers. */
enum { FEW = 4, PIECE = 512, PANEL = 8, TOGETHER = 4 };
#if LANES == 16
enum { AT_ONCE = 4 };
#else
enum { AT_ONCE = 2 };
#endif

static inline ivec widened(const uint8_t *p) {
#if defined(__AVX512F__)
    return (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    bvec bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, ivec);
#endif
}

/* What makes numbers of a group's codes: with 16 lanes the numbers of all codes of 4 bits. */
typedef struct { vec scale, minimum; } meaning_t;

static inline __attribute__((always_inline)) meaning_t meaning_of(const float *pair, int bits) {
    const vec scale = splat(pair[0]), minimum = splat(pair[1]);
#if LANES == 16
    const vec levels = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (bits == 4) return (meaning_t){levels * scale + minimum, minimum};
#endif
    return (void)bits, (meaning_t){scale, minimum};
}

/* The next 2 * LANES elements: at 4 bits the even ones and the odd ones, else one half and the other. */
static inline __attribute__((always_inline))
void numbers(const uint8_t *codes, int bits, meaning_t m, vec *first, vec *second) {
    if (bits == 8) {
        *first = __builtin_convertvector(widened(codes), vec) * m.scale + m.minimum;
        *second = __builtin_convertvector(widened(codes + LANES), vec) * m.scale + m.minimum;
        return;
    }
    const ivec bytes = widened(codes);
#if LANES == 16
    *first = (vec)_mm512_permutexvar_ps((__m512i)bytes, (__m512)m.scale);
    *second = (vec)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)bytes, 4), (__m512)m.scale);
#else
    *first = __builtin_convertvector(bytes & 15, vec) * m.scale + m.minimum;
    *second = __builtin_convertvector((ivec)((uvec)bytes >> 4), vec) * m.scale + m.minimum;
#endif
}

/* x as float32 in the order in which `numbers` gives elements. */
static void arrange(const coded_t *c, int64_t token, float *to, float *buffer) {
    const char *from = c->x + token * c->x_stride * element_bytes(c->dtype);
    if (c->bits == 8) {
        read_numbers(from, to, c->columns, c->dtype);
        return;
    }
    read_numbers(from, buffer, c->columns, c->dtype);
    for (int64_t i = 0; i < c->columns; i += 2 * LANES)
        for (int k = 0; k < LANES; k++) {
            to[i + k] = buffer[i + 2 * k];
            to[i + LANES + k] = buffer[i + 2 * k + 1];
        }
}

/* `count_rows` rows times `tokens` tokens, both known to the compiler. pairs: parameters of the rows. */
static inline __attribute__((always_inline))
void few_tokens(const coded_t *c, int bits, int64_t row, int count_rows, int64_t token, int tokens, const float *x,
    const float *pairs) {
    const int64_t groups = groups_of(c), bytes = row_codes(c);
    const uint8_t *codes = c->codes + row * bytes;
    vec sum[TOGETHER][FEW] = {{{0}}}, other[TOGETHER] = {{0}};
    for (int64_t g = 0; g < groups; g++) {
        meaning_t m[TOGETHER];
        for (int r = 0; r < count_rows; r++) m[r] = meaning_of(pairs + (r * groups + g) * 2, bits);
        for (int64_t i = g * c->group; i < (g + 1) * c->group; i += 2 * LANES)
            for (int r = 0; r < count_rows; r++) {
                const uint8_t *from = codes + r * bytes + i * bits / 8;
                vec first, second;
                __builtin_prefetch(from + count_rows * bytes); /* of the rows that come next */
                numbers(from, bits, m[r], &first, &second);
                for (int t = 0; t < tokens; t++) {
                    sum[r][t] += first * load(x + t * c->columns + i);
                    if (tokens == 1) other[r] += second * load(x + i + LANES);
                    else sum[r][t] += second * load(x + t * c->columns + i + LANES);
                }
            }
    }
    for (int r = 0; r < count_rows; r++)
        for (int t = 0; t < tokens; t++)
            put_number(c->out, (token + t) * c->rows + row + r,
                horizontal_sum(tokens == 1 ? sum[r][t] + other[r] : sum[r][t]) + bias_of(c, row + r), c->dtype);
}

static inline __attribute__((always_inline))
void few_of_bits(const coded_t *c, int bits, int64_t row, int64_t end, const float *x, const float *pairs) {
    for (int64_t token = 0; token < c->tokens; token += FEW, x += FEW * c->columns)
        if (end - row < TOGETHER)
            for (int64_t r = row; r < end; r++)
                for (int64_t t = token; t < token + FEW && t < c->tokens; t++)
                    few_tokens(c, bits, r, 1, t, 1, x + (t - token) * c->columns, pairs + (r - row) * 2 * groups_of(c));
        else if (c->tokens - token == 1) few_tokens(c, bits, row, TOGETHER, token, 1, x, pairs);
        else if (c->tokens - token == 2) few_tokens(c, bits, row, TOGETHER, token, 2, x, pairs);
        else if (c->tokens - token == 3) few_tokens(c, bits, row, TOGETHER, token, 3, x, pairs);
        else few_tokens(c, bits, row, TOGETHER, token, FEW, x, pairs);
}

/* Adds to the sums of `count` tokens the products with a piece of TOGETHER rows. */
static inline __attribute__((always_inline))
void multiply(const float *weights, const float *x, int64_t columns, int count, int64_t width, vec *sums) {
    vec sum[AT_ONCE][TOGETHER];
    for (int t = 0; t < count; t++)
        for (int r = 0; r < TOGETHER; r++) sum[t][r] = sums[t * PANEL + r];
    for (int64_t d = 0; d < width; d += LANES) {
        vec w[TOGETHER];
        for (int r = 0; r < TOGETHER; r++) w[r] = load(weights + r * PIECE + d);
        for (int t = 0; t < count; t++) {
            const vec input = load(x + t * columns + d);
            for (int r = 0; r < TOGETHER; r++) sum[t][r] += input * w[r];
        }
    }
    for (int t = 0; t < count; t++)
        for (int r = 0; r < TOGETHER; r++) sums[t * PANEL + r] = sum[t][r];
}

static inline __attribute__((always_inline))
void expand_piece(const coded_t *c, int bits, int64_t row, int64_t begin, int64_t end, const float *pairs, float *to) {
    const uint8_t *codes = c->codes + row * row_codes(c) + begin * bits / 8;
    for (int64_t i = begin; i < end;) {
        const int64_t g = i / c->group, next = (g + 1) * c->group < end ? (g + 1) * c->group : end;
        const meaning_t m = meaning_of(pairs + 2 * g, bits);
        for (; i < next; i += 2 * LANES, to += 2 * LANES, codes += 2 * LANES * bits / 8) {
            vec first, second;
            numbers(codes, bits, m, &first, &second);
            store(to, first);
            store(to + LANES, second);
        }
    }
}

/* Rows [row, row + PANEL), as far as there are any, times all tokens. sums: [tokens][PANEL]. */
static void many_tokens(const coded_t *c, int64_t row, int64_t end, const float *x, const float *pairs, vec *sums) {
    float weights[PANEL * PIECE] __attribute__((aligned(64)));
    memset(weights, 0, sizeof weights);
    memset(sums, 0, c->tokens * PANEL * sizeof *sums);
    for (int64_t begin = 0; begin < c->columns; begin += PIECE) {
        const int64_t stop = begin + PIECE < c->columns ? begin + PIECE : c->columns;
        for (int64_t r = row; r < end; r++) {
            const float *mine = pairs + (r - row) * 2 * groups_of(c);
            if (c->bits == 4) expand_piece(c, 4, r, begin, stop, mine, weights + (r - row) * PIECE);
            else expand_piece(c, 8, r, begin, stop, mine, weights + (r - row) * PIECE);
        }
        int64_t t = 0;
        for (; t + AT_ONCE <= c->tokens; t += AT_ONCE)
            for (int r = 0; r < PANEL; r += TOGETHER)
                multiply(weights + r * PIECE, x + t * c->columns + begin, c->columns, AT_ONCE, stop - begin,
                    sums + t * PANEL + r);
        for (; t < c->tokens; t++)
            for (int r = 0; r < PANEL; r += TOGETHER)
                multiply(weights + r * PIECE, x + t * c->columns + begin, c->columns, 1, stop - begin,
                    sums + t * PANEL + r);
    }
    for (int64_t t = 0; t < c->tokens; t++)
        for (int64_t r = row; r < end; r++)
            put_number(c->out, t * c->rows + r, horizontal_sum(sums[t * PANEL + r - row]) + bias_of(c, r), c->dtype);
}

static int takes_tiles(const coded_t *c) { return c->tokens > FEW && flexbatch_has_tiles(); }

/* Floats that the threads share, and those that each has. */
static int64_t shared_floats(const coded_t *c) { return round_up((c->tokens + 1) * c->columns, 16); }
static int64_t own_floats(const coded_t *c) {
    return round_up(PANEL * 2 * groups_of(c), 16) + c->tokens * PANEL * LANES;
}

/* Bytes that `flexbatch_coded_linear` needs for this call. */
int64_t flexbatch_coded_bytes(const coded_t *c) {
    if (takes_tiles(c)) return 4 * flexbatch_tile_floats(c);
    return 4 * (shared_floats(c) + c->threads * own_floats(c));
}

/* `memory`: as many bytes as `flexbatch_coded_bytes` says, at a multiple of 64. */
void flexbatch_coded_linear(const coded_t *c, float *memory) {
    if (takes_tiles(c)) {
        flexbatch_tile_products(c, memory);
        return;
    }
    const int64_t panels = (c->rows + PANEL - 1) / PANEL, numbers_of_row = 2 * groups_of(c);
    const int64_t threads = panels < c->threads ? panels : c->threads;
    int64_t next = 0;
    for (int64_t t = 0; t < c->tokens; t++) arrange(c, t, memory + t * c->columns, memory + c->tokens * c->columns);
#pragma omp parallel num_threads((int)threads) if (c->rows * c->columns > 1 << 16)
    {
        const int64_t thread = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        float *pairs = memory + shared_floats(c) + thread * own_floats(c);
        vec *sums = (vec *)(pairs + round_up(PANEL * numbers_of_row, 16));
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; panel++) {
            const int64_t row = panel * PANEL, end = row + PANEL < c->rows ? row + PANEL : c->rows;
            const char *from = c->parameters + row * numbers_of_row * element_bytes(c->dtype);
            const float *read = pairs;
            if (c->dtype == FLOAT32) read = (const float *)from;
            else read_numbers(from, pairs, (end - row) * numbers_of_row, c->dtype);
            if (c->tokens > FEW) many_tokens(c, row, end, memory, read, sums);
            else
                for (int64_t r = row; r < end; r += TOGETHER) {
                    const int64_t last = r + TOGETHER < end ? r + TOGETHER : end;
                    const float *mine = read + (r - row) * numbers_of_row;
                    if (c->bits == 4) few_of_bits(c, 4, r, last, memory, mine);
                    else few_of_bits(c, 8, r, last, memory, mine);
                }
        }
    }
}
