/* Products of tokens with a matrix in codes, without an expanded copy of it in memory: what the forms of it share. */
#ifndef FLEXBATCH_NATIVE_CODED_H
#define FLEXBATCH_NATIVE_CODED_H

#include "native_rows.h"

typedef struct {
    const char *x;             /* [tokens, columns]; rows x_stride elements apart */
    const uint8_t *codes;      /* [rows, columns * bits / 8] */
    const char *parameters;    /* [rows, groups, 2], scale and minimum, in dtype */
    const char *bias;          /* [rows] in dtype, or none */
    char *out;                 /* [tokens, rows], dense */
    int64_t x_stride, tokens, rows, columns, bits, group, dtype, threads;
} coded_t;

/* Codes of a block of elements. Of 4 bits, a block's even elements come before its odd ones: so bytes are unpacked by
 * one shift. Groups are whole blocks. */
enum { BLOCK_OF_CODES = 32 };

static inline int64_t groups_of(const coded_t *c) { return c->columns / c->group; }
static inline int64_t row_codes(const coded_t *c) { return c->columns * c->bits / 8; }

static inline void put_number(char *to, int64_t index, float x, int64_t dtype) {
    const uint16_t half = dtype == BFLOAT16 ? to_bfloat16(x) : dtype == FLOAT16 ? to_float16(x) : 0;
    if (dtype == FLOAT32) memcpy(to + 4 * index, &x, 4);
    else memcpy(to + 2 * index, &half, 2);
}

static inline void read_numbers(const char *from, float *to, int64_t n, int64_t dtype) {
    if (dtype == FLOAT32) memcpy(to, from, 4 * n);
    else expand_16(from, to, n, dtype);
}

static inline float bias_of(const coded_t *c, int64_t row) {
    return c->bias ? scalar(c->bias + row * element_bytes(c->dtype), c->dtype) : 0.0f;
}

/* native_coded_tiles.c, for processors with matrix tiles and more than a few tokens. */
int64_t flexbatch_has_tiles(void);
int64_t flexbatch_tile_floats(const coded_t *c);
void flexbatch_tile_products(const coded_t *c, float *memory);

#endif
