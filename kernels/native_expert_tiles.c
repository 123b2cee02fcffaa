/* Experts in matrix tiles: 16 weight rows by 32 inputs, as they lie, times 16 routed rows. Weights in codes are rounded
 * to bfloat16 a piece at a time, which is what a GPU multiplies, too. Vectors of float32 made 0.7 TFLOP/s of 16 cores of
 * an H100's host: with 16 rows an expert they took 2 to 4 times as long as memory takes to bring its weights. */
#include "native_experts.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

#include "native_coded.h"
#include "native_tiles.h"

/* PIECE: inputs that stay in the first cache for all routed rows. MOST: routed rows whose sums are there with them. */
enum { SIDE = 16, STEP = 32, PIECE = 512, MOST = 128, SUMS = SIDE * SIDE };

typedef struct {
    char *inputs, *inner; /* of SIDE routed rows after another, or what is left of a group: pairs of elements by rows */
} packed_t;

static int fits(const matrix_t *m) { return m->inputs % STEP == 0 && (m->bits == 16 || m->group % STEP == 0); }

int flexbatch_experts_in_tiles(const experts_t *e) {
    return e->dtype == BFLOAT16 && fits(&e->gate_up) && fits(&e->down) && flexbatch_has_tiles();
}

/* A tile reads 64 bytes of every pair, also of fewer than SIDE rows: what follows them makes sums that nobody takes. */
static packed_t packed(const experts_t *e, char *memory, int64_t *num_bytes) {
    const int64_t inputs = round_up(2 * e->rows * e->gate_up.inputs, 64), inner = 2 * e->rows * e->down.inputs;
    const packed_t p = {memory, memory + inputs};
    *num_bytes = inputs + inner + 64;
    return p;
}

int64_t flexbatch_expert_tile_bytes(const experts_t *e) {
    int64_t num_bytes;
    packed(e, NULL, &num_bytes);
    return num_bytes;
}

static inline __m512 doubles_of_codes(void) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)DOUBLES)));
}

/* Those of MXFP4 at its smallest and largest scales. */
static inline __m512i scaled_doubles(uint8_t power) {
    const __m512 numbers = _mm512_mul_ps(doubles_of_codes(), _mm512_set1_ps(half_of_power(power)));
    return _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(numbers));
}

/* Inputs [begin, end) of a weight row. What follows in the row comes nearer. */
static void expand_row(const matrix_t *m, const char *values, const char *parameters, int64_t row, int64_t begin,
    int64_t end, char *out) {
    const int64_t bytes = m->inputs * m->bits / 8, groups = (m->inputs + m->group - 1) / m->group;
    const uint8_t *codes = (const uint8_t *)values + row * bytes + begin * m->bits / 8;
    const char *own = parameters + row * groups * (m->floats ? 1 : 4);
    for (int64_t i = 0; i < (end - begin) * m->bits / 8; i += 64)
        __builtin_prefetch(codes + (end - begin) * m->bits / 8 + i, 0, 2);
    if (m->bits == 16) {
        memcpy(out, codes, 2 * (end - begin));
        return;
    }
    if (m->floats) {
        const __m512i doubles = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(doubles_of_codes()));
        for (int64_t i = begin; i < end; i += STEP, codes += STEP / 2, out += 64) {
            const uint8_t power = (uint8_t)own[i / STEP];
            __m512i x = looked_up(codes, power < 2 || power > 250 ? scaled_doubles(power) : doubles);
            if (power >= 2 && power <= 250) /* then it is added to the exponents, but for those of zeros */
                x = _mm512_mask_add_epi16(x, _mm512_test_epi16_mask(x, _mm512_set1_epi16(0x7fff)), x,
                    _mm512_set1_epi16((int16_t)((power - 128) * 128)));
            _mm512_store_si512(out, x);
        }
        return;
    }
    for (int64_t i = begin; i < end;) {
        const int64_t g = i / m->group, stop = (g + 1) * m->group < end ? (g + 1) * m->group : end;
        expand_group(codes, m->bits, own + 4 * g, stop - i, out);
        codes += (stop - i) * m->bits / 8, out += 2 * (stop - i), i = stop;
    }
}

/* Adds a piece of two blocks of weight rows, `stride` bytes apart, times one or two tiles of routed rows. `ahead`: where
 * the same rows' next piece is to come from, or NULL. */
static inline __attribute__((always_inline))
void multiply(const char *const *block, int64_t stride, int64_t steps, const char *const *x, const int64_t *widths,
    int tiles, int first, const char *const *ahead, float *const *sums) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums[0], 64);
        _tile_loadd(1, sums[1], 64);
        if (tiles > 1) _tile_loadd(2, sums[0] + SUMS, 64);
        if (tiles > 1) _tile_loadd(3, sums[1] + SUMS, 64);
    }
    for (int64_t k = 0; k < steps; k++) {
        for (int i = 0; ahead && i < 2 * SIDE; i++)
            __builtin_prefetch(ahead[i / SIDE] + i % SIDE * stride + k * 64, 0, 2);
        _tile_loadd(4, block[0] + k * 64, stride);
        _tile_loadd(5, block[1] + k * 64, stride);
        _tile_loadd(6, x[0] + k * SIDE * widths[0], widths[0]);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (tiles > 1) {
            _tile_loadd(7, x[1] + k * SIDE * widths[1], widths[1]);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (tiles > 1) _tile_stored(2, sums[0] + SUMS, 64);
    if (tiles > 1) _tile_stored(3, sums[1] + SUMS, 64);
}

/* sums[block][tile]: weight rows [rows[block], + SIDE) by the tiles of `count` routed rows at `x`, at most MOST. */
static void products(const matrix_t *m, const char *values, const char *parameters, const int64_t *rows, const char *x,
    int64_t count, float (*sums)[MOST * SIDE]) {
    char expanded[2 * SIDE * PIECE * 2] __attribute__((aligned(64)));
    for (int64_t begin = 0; begin < m->inputs; begin += PIECE) {
        const int64_t end = begin + PIECE < m->inputs ? begin + PIECE : m->inputs, steps = (end - begin) / STEP;
        const int as_it_lies = m->bits == 16 && count <= 2 * SIDE;
        const int64_t stride = as_it_lies ? 2 * m->inputs : 2 * PIECE;
        const char *block[2], *ahead[2];
        for (int b = 0; b < 2; b++) {
            block[b] = as_it_lies ? values + rows[b] * stride + 2 * begin : expanded + b * SIDE * stride;
            ahead[b] = block[b] + 2 * PIECE;
            for (int64_t i = 0; !as_it_lies && i < SIDE; i++)
                expand_row(m, values, parameters, rows[b] + i, begin, end, expanded + (b * SIDE + i) * stride);
        }
        for (int64_t t = 0; t < count; t += 2 * SIDE) {
            const int64_t left = count - t, second = left - SIDE;
            const int64_t widths[2] = {4 * (left < SIDE ? left : SIDE), 4 * (second < SIDE ? second : SIDE)};
            const char *tiles[2] = {x + 2 * t * m->inputs + begin / 2 * widths[0],
                x + 2 * (t + SIDE) * m->inputs + begin / 2 * widths[1]};
            float *to[2] = {sums[0] + t * SIDE, sums[1] + t * SIDE};
            const char *const *coming = as_it_lies ? ahead : NULL;
            if (second > 0) multiply(block, stride, steps, tiles, widths, 2, begin == 0, coming, to);
            else multiply(block, stride, steps, tiles, widths, 1, begin == 0, coming, to);
        }
    }
}

static inline __m512 widened(__m256i halves) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16); }
static inline vec rounded_16(vec x) { return (vec)widened((__m256i)_mm512_cvtneps_pbh((__m512)x)); }

/* Outputs [begin, begin + SIDE) of gate and up of a group, and what the activation makes of them. */
static void first_item(const experts_t *e, const packed_t *p, int64_t group, int64_t begin) {
    const int64_t expert = e->experts[group], width = e->down.inputs, *address = e->addresses + 4 * expert;
    const float *bias = e->gate_up_bias ? e->gate_up_bias + 2 * width * expert + begin : NULL;
    const int64_t rows[2] = {begin, width + begin};
    float sums[2][MOST * SIDE] __attribute__((aligned(64)));
    for (int64_t row = e->starts[group], end = e->starts[group + 1]; row < end; row += MOST) {
        const int64_t count = end - row < MOST ? end - row : MOST;
        products(&e->gate_up, (const char *)address[0], (const char *)address[1], rows,
            p->inputs + 2 * row * e->gate_up.inputs, count, sums);
        for (int64_t t = 0; t < count; t += SIDE) {
            const int64_t own = count - t < SIDE ? count - t : SIDE;
            char *to = p->inner + 2 * (row + t) * width + begin / 2 * 4 * own;
            for (int64_t j = 0; j < SIDE; j += 2, to += 4 * own) {
                __m512i halves[2];
                for (int i = 0; i < 2; i++) {
                    vec gate = load(sums[0] + (t + j + i) * SIDE), up = load(sums[1] + (t + j + i) * SIDE);
                    if (bias) gate += bias[j + i], up += bias[width + j + i];
                    const vec inner = activated(e, rounded_16(gate), rounded_16(up));
                    halves[i] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)inner));
                }
                _mm512_mask_storeu_epi32(to, (__mmask16)((1u << own) - 1),
                    _mm512_or_si512(halves[0], _mm512_slli_epi32(halves[1], 16)));
            }
        }
    }
}

/* Outputs [begin, begin + 2 * SIDE) of down of a group. */
static void second_item(const experts_t *e, const packed_t *p, int64_t group, int64_t begin) {
    const int64_t expert = e->experts[group], hidden = e->down.outputs, *address = e->addresses + 4 * expert;
    const int64_t rows[2] = {begin, begin + SIDE};
    float sums[2][MOST * SIDE] __attribute__((aligned(64)));
    for (int64_t row = e->starts[group], end = e->starts[group + 1]; row < end; row += MOST) {
        const int64_t count = end - row < MOST ? end - row : MOST;
        products(&e->down, (const char *)address[2], (const char *)address[3], rows,
            p->inner + 2 * row * e->down.inputs, count, sums);
        for (int64_t t = 0; t < count; t += SIDE)
            for (int b = 0; b < 2; b++) {
                __m512i r[SIDE];
                vec bias = {0};
                if (e->down_bias) bias = load(e->down_bias + hidden * expert + rows[b]);
                for (int i = 0; i < SIDE; i++) r[i] = _mm512_load_si512(sums[b] + (t + i) * SIDE);
                transpose(r);
                for (int64_t i = 0; i < SIDE && t + i < count; i++)
                    _mm256_storeu_si256((__m256i *)(e->out + (e->positions[row + t + i] * hidden + rows[b]) * 2),
                        (__m256i)_mm512_cvtneps_pbh((__m512)((vec)r[i] + bias)));
            }
    }
}

/* A routed row among those of its tile. */
static void pack_input(const experts_t *e, const packed_t *p, int64_t group, int64_t row) {
    const int64_t hidden = e->gate_up.inputs, first = e->starts[group] + (row - e->starts[group]) / SIDE * SIDE,
        own = e->starts[group + 1] - first < SIDE ? e->starts[group + 1] - first : SIDE;
    const char *source = e->x + e->tokens[row] * hidden * 2;
    char *to = p->inputs + 2 * first * hidden + 4 * (row - first);
    const vec factor = splat(e->scales ? scalar((const char *)&(uint16_t){to_bfloat16(e->scales[row])}, BFLOAT16) : 1);
    for (int64_t i = 0; i < hidden; i += 2 * SIDE) {
        uint32_t pairs[SIDE];
        __m512i x = _mm512_loadu_si512(source + 2 * i);
        if (e->scales) {
            const vec low = (vec)widened(_mm512_castsi512_si256(x)) * factor,
                high = (vec)widened(_mm512_extracti64x4_epi64(x, 1)) * factor;
            x = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        }
        _mm512_storeu_si512(pairs, x);
        for (int64_t k = 0; k < SIDE; k++) memcpy(to + (i / 2 + k) * 4 * own, pairs + k, 4);
    }
}

void flexbatch_expert_tiles(const experts_t *e, char *memory) {
    int64_t num_bytes, next[3] = {0};
    const packed_t p = packed(e, memory, &num_bytes);
    const int64_t first = e->down.inputs / SIDE, second = e->down.outputs / (2 * SIDE);
    const int64_t most = e->groups * (first > second ? first : second);
#pragma omp parallel num_threads((int)(most < e->threads ? most : e->threads))
    {
        tiles_t before;
        take_tiles(&before);
        for (int64_t g; (g = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < e->groups;)
            for (int64_t row = e->starts[g]; row < e->starts[g + 1]; row++) pack_input(e, &p, g, row);
#pragma omp barrier
        for (int64_t i; (i = __atomic_fetch_add(next + 1, 1, __ATOMIC_RELAXED)) < e->groups * first;)
            first_item(e, &p, i / first, i % first * SIDE);
#pragma omp barrier
        for (int64_t i; (i = __atomic_fetch_add(next + 2, 1, __ATOMIC_RELAXED)) < e->groups * second;)
            second_item(e, &p, i / second, i % second * 2 * SIDE);
        leave_tiles(&before);
    }
}

#else

int flexbatch_experts_in_tiles(const experts_t *e) { return (void)e, 0; }
int64_t flexbatch_expert_tile_bytes(const experts_t *e) { return (void)e, 0; }
void flexbatch_expert_tiles(const experts_t *e, char *memory) { (void)e, (void)memory; }

#endif
