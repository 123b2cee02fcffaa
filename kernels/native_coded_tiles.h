/* x as matrix tiles: cut into exact parts of 16 bits, pairs of elements by tokens. Included where there are tiles. */
#ifndef FLEXBATCH_NATIVE_CODED_TILES_H
#define FLEXBATCH_NATIVE_CODED_TILES_H

#include "native_coded.h"
#include "native_tiles.h"

/* TILE: tokens, or rows, of a tile, which has a block of codes of each. STRIP: tiles of rows that are summed up in
 * tiles together: as many as hide how long one product takes. UNIT: elements of a row that are expanded together, at
 * least: a line of memory at 4 bits. CHUNK, CHUNK_BYTES: tiles of tokens that share expanded codes, and whose parts
 * stay in the second cache. */
enum { TILE = 16, STRIP = 4, UNIT = 128, CHUNK = 8, CHUNK_BYTES = 3 << 19, TILE_BYTES = 1024, PARTS = 3 };
enum { ROWS = TILE * STRIP };

typedef struct {
    int64_t parts, tiles, blocks, groups; /* of x: parts of a number, tiles of tokens, blocks and groups of columns */
    int64_t group_blocks, unit_blocks;    /* blocks of a group, and of a unit, which has whole groups */
    int64_t chunk;                        /* tiles of tokens that are multiplied with a strip together */
    char *pieces;                         /* [tiles][blocks][parts] tiles: pairs of elements by tokens */
    float *sums;                          /* [groups][tiles * TILE] */
    char *own;                            /* of every thread */
    int64_t own_bytes;
} layout_t;

static layout_t layout_of(const coded_t *c, float *memory) {
    layout_t l = {.parts = c->dtype == FLOAT32 ? 3 : c->dtype == FLOAT16 ? 2 : 1,
        .tiles = (c->tokens + TILE - 1) / TILE, .blocks = c->columns / BLOCK_OF_CODES, .groups = groups_of(c),
        .group_blocks = c->group / BLOCK_OF_CODES};
    const int64_t fitting = CHUNK_BYTES / (l.blocks * l.parts * TILE_BYTES);
    l.unit_blocks = l.group_blocks * (c->group < UNIT ? UNIT / c->group : 1);
    l.chunk = fitting < 2 ? 2 : fitting > CHUNK ? CHUNK : fitting;
    l.pieces = (char *)memory;
    l.sums = (float *)(l.pieces + l.blocks * l.parts * l.tiles * TILE_BYTES);
    l.own = (char *)(l.sums + l.groups * l.tiles * TILE);
    l.own_bytes = (2 * l.unit_blocks + 1 + CHUNK) * STRIP * TILE_BYTES + 4 * ROWS * round_up(2 * l.groups, TILE);
    return l;
}

/* The upper halves of 32 floats, in their order. */
static inline __m512i upper_halves(__m512 low, __m512 high) {
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
        23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16((__m512i)low, odd, (__m512i)high);
}

static inline __m512 rest(__m512 x) {
    return _mm512_sub_ps(x, (__m512)_mm512_and_si512((__m512i)x, _mm512_set1_epi32(-65536)));
}

/* Of 16 numbers those of the mask. */
static inline __m512 sixteen(const char *from, int64_t dtype, __mmask16 mask) {
    if (dtype == FLOAT32) return _mm512_maskz_loadu_ps(mask, from);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, from);
    return dtype == FLOAT16 ? _mm512_cvtph_ps(half) : (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}

/* The parts of a tile of tokens of a block, and what the block adds to their sums. */
static inline void read_block(const coded_t *c, const layout_t *l, int64_t tile, int64_t block) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0),
        odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const int64_t width = element_bytes(c->dtype), begin = block * BLOCK_OF_CODES;
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    __m512i parts[PARTS][TILE];
    float *sums = l->sums + (begin / c->group * l->tiles + tile) * TILE;
    __m512 sum = begin % c->group ? _mm512_load_ps(sums) : _mm512_setzero_ps();
    for (int64_t t = 0; t < TILE; t++) {
        __m512 low = _mm512_setzero_ps(), high = low;
        if (tile * TILE + t < c->tokens) {
            const char *from = c->x + ((tile * TILE + t) * c->x_stride + begin) * width;
            low = sixteen(from, c->dtype, 0xffff);
            high = sixteen(from + TILE * width, c->dtype, 0xffff);
        }
        if (c->bits == 4) {
            const __m512 first = _mm512_permutex2var_ps(low, even, high);
            high = _mm512_permutex2var_ps(low, odd, high);
            low = first;
        }
        for (int64_t p = 0; p < l->parts; p++) {
            parts[p][t] = upper_halves(low, high);
            low = rest(low);
            high = rest(high);
        }
    }
    for (int64_t p = 0; p < l->parts; p++) {
        char *to = l->pieces + ((tile * l->blocks + block) * l->parts + p) * TILE_BYTES;
        transpose(parts[p]);
        for (int64_t k = 0; k < TILE; k++) {
            _mm512_store_si512(to + 64 * k, parts[p][k]);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)parts[p][k], ones);
        }
    }
    _mm512_store_ps(sums, sum);
}

#endif
