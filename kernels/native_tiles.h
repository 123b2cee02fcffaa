/* Matrix tiles (AMX): what their users share. Included where there are tiles. */
#ifndef FLEXBATCH_NATIVE_TILES_H
#define FLEXBATCH_NATIVE_TILES_H

#include <immintrin.h>
#include <stdint.h>

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

#endif
