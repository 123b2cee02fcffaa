/* Products of tokens with a matrix in codes on processors with matrix tiles (AMX), which multiply bfloat16 sixteen
 * times as fast as vectors multiply float32. Codes less their middle are exact in bfloat16; x is, in parts: float32 in
 * three, float16 in two. So products are those of float32, and a group's sum gets its scale and minimum afterwards:
 *     x . (scale * code + minimum) = scale * x . (code - middle) + (minimum + middle * scale) * sum of x
 * The parts of x are cut, not rounded: a finite number has finite parts. */
#include "native_coded.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

#include <sys/syscall.h>
#include <unistd.h>

#include "native_coded_tiles.h"

int64_t flexbatch_has_tiles(void) {
    static int known; /* 0: not asked yet; the same answer every time */
    const int seen = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (seen) return seen > 0;
    /* ARCH_REQ_XCOMP_PERM: the kernel lets a process use tile data (18) once it has asked. */
    const int allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    __atomic_store_n(&known, allowed ? 1 : -1, __ATOMIC_RELAXED);
    return allowed;
}

int64_t flexbatch_tile_floats(const coded_t *c) {
    const layout_t l = layout_of(c, NULL);
    return (l.own - (char *)NULL + c->threads * l.own_bytes) / 4;
}

/* A block of codes less their middle, in bfloat16. */
static inline __m512i whole_numbers(const uint8_t *codes, int64_t bits) {
    if (bits == 8) {
        const __m512i middle = _mm512_set1_epi32(128);
        const __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes)),
            high = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + 16)));
        return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(_mm512_sub_epi32(high, middle)),
            _mm512_cvtepi32_ps(_mm512_sub_epi32(low, middle)));
    }
    /* bfloat16 of -8 to 7, twice: the fifth bit of an index is the next code's. */
    const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16((int16_t)0xc100, (int16_t)0xc0e0, (int16_t)0xc0c0,
        (int16_t)0xc0a0, (int16_t)0xc080, (int16_t)0xc040, (int16_t)0xc000, (int16_t)0xbf80, 0, 0x3f80, 0x4000, 0x4040,
        0x4080, 0x40a0, 0x40c0, 0x40e0));
    const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)codes));
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(_mm512_cvtepu8_epi16(twice), shifts), table);
}

static int64_t stored_row(const coded_t *c, int64_t row) { return row < c->rows ? row : c->rows - 1; }

/* Scales and what goes with sums of x: [groups][2][ROWS]. Rows behind the last are like it. */
static void read_parameters(const coded_t *c, int64_t row, float *to) {
    const int64_t numbers = 2 * groups_of(c), width = element_bytes(c->dtype);
    const __m512 middle = _mm512_set1_ps(c->bits == 4 ? 8 : 128);
    for (int64_t first = 0; first < numbers; first += TILE) {
        const __mmask16 inside = numbers - first < TILE ? (__mmask16)((1u << (numbers - first)) - 1) : 0xffff;
        for (int64_t s = 0; s < ROWS; s += TILE) {
            __m512i r[TILE];
            for (int64_t i = 0; i < TILE; i++) {
                const int64_t source = stored_row(c, row + s + i);
                r[i] = (__m512i)sixteen(c->parameters + (source * numbers + first) * width, c->dtype, inside);
            }
            transpose(r);
            for (int64_t i = 0; i < TILE; i += 2) {
                _mm512_store_si512(to + (first + i) * ROWS + s, r[i]);
                const __m512 minimum = _mm512_fmadd_ps(middle, (__m512)r[i], (__m512)r[i + 1]);
                _mm512_store_ps(to + (first + i + 1) * ROWS + s, minimum);
            }
        }
    }
}

/* What is expanded while another unit is multiplied: the blocks [block, block + count) of rows [next, ROWS). */
typedef struct {
    int64_t row, block, count, next, step;
    char *to;
} ahead_t;

/* The next `step` rows. What follows in the row, and the same piece of the next strip, come nearer. */
static inline __attribute__((always_inline)) void expand_some(const coded_t *c, int bits, ahead_t *a) {
    const int64_t end = a->next + a->step < ROWS ? a->next + a->step : ROWS;
    for (; a->next < end; a->next++) {
        const uint8_t *codes = c->codes + stored_row(c, a->row + a->next) * row_codes(c)
            + a->block * BLOCK_OF_CODES * bits / 8;
        __builtin_prefetch(codes + UNIT, 0, 2);
        for (int64_t i = 0; i < a->count * BLOCK_OF_CODES * bits / 8; i += 64)
            __builtin_prefetch(codes + ROWS * row_codes(c) + i, 0, 2);
        for (int64_t b = 0; b < a->count; b++)
            _mm512_store_si512(a->to + (b * ROWS + a->next) * 64,
                whole_numbers(codes + b * BLOCK_OF_CODES * bits / 8, bits));
    }
}

/* A block of a tile of rows times all parts of the tokens. */
#define MULTIPLY(i)                                    \
    do {                                               \
        _tile_loadd(4, strip + (i) * TILE_BYTES, 64);  \
        _tile_dpbf16ps(i, 4, 5);                       \
        if (l->parts > 1) _tile_dpbf16ps(i, 4, 6);     \
        if (l->parts > 2) _tile_dpbf16ps(i, 4, 7);     \
    } while (0)

/* The sums of one group for STRIP tiles of rows and one of tokens, to `products`. */
static inline __attribute__((always_inline))
void multiply_group(const coded_t *c, int bits, const layout_t *l, const char *strip, const char *pieces,
    ahead_t *ahead, char *products) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t b = 0; b < l->group_blocks; b++, strip += STRIP * TILE_BYTES, pieces += l->parts * TILE_BYTES) {
        _tile_loadd(5, pieces, 64);
        if (l->parts > 1) _tile_loadd(6, pieces + TILE_BYTES, 64);
        if (l->parts > 2) _tile_loadd(7, pieces + 2 * TILE_BYTES, 64);
        MULTIPLY(0);
        MULTIPLY(1);
        if (ahead->next < ROWS) expand_some(c, bits, ahead);
        MULTIPLY(2);
        MULTIPLY(3);
    }
    _tile_stored(0, products, 64);
    _tile_stored(1, products + TILE_BYTES, 64);
    _tile_stored(2, products + 2 * TILE_BYTES, 64);
    _tile_stored(3, products + 3 * TILE_BYTES, 64);
}

/* total[r][token] (+)= scale[r] * products[r][token] + minimum[r] * sum[token] */
static inline void add_group(const float *products, const float *parameters, __m512 sum, float *total, int first) {
    for (int r = 0; r < ROWS; r++) {
        __m512 now = first ? _mm512_setzero_ps() : _mm512_load_ps(total + r * TILE);
        now = _mm512_fmadd_ps(_mm512_set1_ps(parameters[ROWS + r]), sum, now);
        now = _mm512_fmadd_ps(_mm512_set1_ps(parameters[r]), _mm512_load_ps(products + r * TILE), now);
        _mm512_store_ps(total + r * TILE, now);
    }
}

static void write_tile(const coded_t *c, const float *total, int64_t row, int64_t token) {
    const int64_t rows = c->rows - row < TILE ? c->rows - row : TILE;
    float bias[TILE] = {0};
    __m512i t[TILE];
    if (c->bias) for (int64_t r = 0; r < rows; r++) bias[r] = bias_of(c, row + r);
    for (int r = 0; r < TILE; r++) t[r] = _mm512_load_si512(total + r * TILE);
    transpose(t);
    for (int64_t i = 0; i < TILE && token + i < c->tokens; i++) {
        const __m512 whole = _mm512_add_ps((__m512)t[i], _mm512_loadu_ps(bias));
        char *to = c->out + ((token + i) * c->rows + row) * element_bytes(c->dtype);
        const __mmask16 inside = (__mmask16)((1u << rows) - 1);
        if (c->dtype == FLOAT32) _mm512_mask_storeu_ps(to, inside, whole);
        else if (c->dtype == BFLOAT16) _mm256_mask_storeu_epi16(to, inside, (__m256i)_mm512_cvtneps_pbh(whole));
        else _mm256_mask_storeu_epi16(to, inside, _mm512_cvtps_ph(whole, _MM_FROUND_TO_NEAREST_INT));
    }
}

/* Rows [row, row + ROWS) times the tiles of tokens [first, end). */
static inline __attribute__((always_inline))
void multiply_rows(const coded_t *c, int bits, const layout_t *l, int64_t row, int64_t first, int64_t end, char *own) {
    const int64_t unit_bytes = l->unit_blocks * STRIP * TILE_BYTES, tile_bytes = l->blocks * l->parts * TILE_BYTES;
    char *strips[2] = {own, own + unit_bytes}, *products = own + 2 * unit_bytes;
    char *totals = products + STRIP * TILE_BYTES;
    float *parameters = (float *)(totals + CHUNK * STRIP * TILE_BYTES);
    read_parameters(c, row, parameters);
    ahead_t ahead = {.row = row, .count = l->blocks < l->unit_blocks ? l->blocks : l->unit_blocks, .step = ROWS,
        .to = strips[0]};
    expand_some(c, bits, &ahead);
    const int64_t steps = l->unit_blocks * (end - first);
    for (int64_t block = 0, unit = 0; block < l->blocks; block += l->unit_blocks, unit ^= 1) {
        const int64_t stop = block + l->unit_blocks < l->blocks ? block + l->unit_blocks : l->blocks;
        ahead = (ahead_t){.row = row, .block = stop, .next = stop < l->blocks ? 0 : ROWS, .to = strips[unit ^ 1],
            .count = stop + l->unit_blocks < l->blocks ? l->unit_blocks : l->blocks - stop,
            .step = (ROWS + steps - 1) / steps};
        for (int64_t b = block; b < stop; b += l->group_blocks)
            for (int64_t tile = first; tile < end; tile++) {
                const int64_t g = b / l->group_blocks;
                multiply_group(c, bits, l, strips[unit] + (b - block) * STRIP * TILE_BYTES,
                    l->pieces + tile * tile_bytes + b * l->parts * TILE_BYTES, &ahead, products);
                add_group((const float *)products, parameters + 2 * g * ROWS,
                    _mm512_load_ps(l->sums + (g * l->tiles + tile) * TILE),
                    (float *)(totals + (tile - first) * STRIP * TILE_BYTES), g == 0);
            }
        ahead.step = ROWS;
        expand_some(c, bits, &ahead); /* what is left of a last unit, which is shorter */
    }
    for (int64_t tile = first; tile < end; tile++)
        for (int64_t s = 0; s < STRIP && row + s * TILE < c->rows; s++)
            write_tile(c, (const float *)(totals + ((tile - first) * STRIP + s) * TILE_BYTES), row + s * TILE,
                tile * TILE);
}

void flexbatch_tile_products(const coded_t *c, float *memory) {
    const layout_t l = layout_of(c, memory);
    const int64_t strips = (c->rows + ROWS - 1) / ROWS;
    int64_t next = 0;
#pragma omp parallel num_threads((int)c->threads) if (c->rows * c->columns > 1 << 16)
    {
        const int64_t thread = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        tiles_t before;
        take_tiles(&before);
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < l.tiles; tile++)
            for (int64_t block = 0; block < l.blocks; block++) read_block(c, &l, tile, block);
        for (int64_t first = 0; first < l.tiles; first += l.chunk) {
            const int64_t end = first + l.chunk < l.tiles ? first + l.chunk : l.tiles;
            char *own = l.own + thread * l.own_bytes;
#pragma omp for schedule(static) nowait
            for (int64_t strip = 0; strip < strips; strip++) {
                if (c->bits == 4) multiply_rows(c, 4, &l, strip * ROWS, first, end, own);
                else multiply_rows(c, 8, &l, strip * ROWS, first, end, own);
            }
        }
        leave_tiles(&before);
    }
}

#else

int64_t flexbatch_has_tiles(void) { return 0; }
int64_t flexbatch_tile_floats(const coded_t *c) { return (void)c, 0; }
void flexbatch_tile_products(const coded_t *c, float *memory) { (void)c, (void)memory; }

#endif
