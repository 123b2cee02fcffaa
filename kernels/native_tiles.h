/* Matrix tiles (AMX): what their users share. Included where there are tiles. */
#ifndef FLEXBATCH_NATIVE_TILES_H
#define FLEXBATCH_NATIVE_TILES_H

#include <immintrin.h>

#include "native_rows.h"

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tiles_t;

/* All eight tiles have 16 rows of 64 bytes from here on; `before`: what was there, for `leave_tiles`. */
static inline void take_tiles(tiles_t *before) {
    tiles_t mine = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        mine.row_bytes[i] = 64;
        mine.rows[i] = 16;
    }
    _tile_storeconfig(before);
    _tile_loadconfig(&mine);
}

static inline void leave_tiles(const tiles_t *before) {
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

static inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
            r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int k = 0; k < 4; k++) {
            t[i + k] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0x88);
            t[i + k + 4] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0xdd);
        }
    for (int k = 0; k < 8; k++) {
        r[k] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0x88);
        r[k + 8] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0xdd);
    }
}

/* The 16 numbers that 4-bit codes of a group stand for. */
static inline __m256i numbers_of(const char *parameters) {
    const __m512 codes = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return (__m256i)_mm512_cvtneps_pbh(_mm512_fmadd_ps(codes, _mm512_set1_ps(scalar(parameters, BFLOAT16)),
        _mm512_set1_ps(scalar(parameters + 2, BFLOAT16))));
}

static inline __m512i looked_up(const uint8_t *codes, __m512i numbers) {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    const __m512i low = _mm512_and_si512(pairs, _mm512_set1_epi32(15)),
        high = _mm512_slli_epi32(_mm512_and_si512(pairs, _mm512_set1_epi32(240)), 12);
    return _mm512_permutexvar_epi16(_mm512_or_si512(low, high), numbers);
}

static inline __m512i of_bytes(const uint8_t *codes, const char *parameters) {
    const __m512 scale = _mm512_set1_ps(scalar(parameters, BFLOAT16)),
        minimum = _mm512_set1_ps(scalar(parameters + 2, BFLOAT16));
    __m512 halves[2];
    for (int i = 0; i < 2; i++) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(codes + i * 16));
        halves[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), scale, minimum);
    }
    return (__m512i)_mm512_cvtne2ps_pbh(halves[1], halves[0]);
}

/* `n` codes of a group, 32 or a multiple, rounded to bfloat16; its scale and minimum are bfloat16, too. */
static inline void expand_group(const uint8_t *codes, int64_t bits, const char *parameters, int64_t n, char *out) {
    const __m512i numbers = bits == 4 ? _mm512_castsi256_si512(numbers_of(parameters)) : _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 32, codes += 4 * bits, out += 64)
        _mm512_storeu_si512(out, bits == 4 ? looked_up(codes, numbers) : of_bytes(codes, parameters));
}

#endif
