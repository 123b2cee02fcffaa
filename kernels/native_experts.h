/* What the two ways of the CPU's experts (native_experts.c, native_expert_tiles.c) share: the call, activations, MXFP4. */
#ifndef FLEXBATCH_NATIVE_EXPERTS_H
#define FLEXBATCH_NATIVE_EXPERTS_H

#include <math.h>
#include <stdlib.h>

#include "native_rows.h"

enum { SILU = 0, RELU = 1, GELU = 2, GELU_TANH = 3, CLAMPED = 4 };

typedef struct {
    int64_t outputs, inputs;   /* of one expert's matrix, as it is stored */
    int64_t bits, group;       /* 16 stands for the compute dtype, also when that is float32 */
    int64_t floats;            /* whether codes are MXFP4's, with a byte for a scale */
} matrix_t;

typedef struct {
    const char *x;             /* [tokens, hidden] */
    char *out;                 /* [rows, hidden] */
    const int64_t *addresses;  /* of every expert: gate and up, their parameters, down, its parameters */
    const int32_t *experts, *starts; /* of every group of rows: its expert; where it begins, and the last one's end */
    const int32_t *tokens, *positions; /* of every row, group after group: its row of x and of out */
    const float *scales;       /* of every row, what its input is multiplied by; or none */
    const float *gate_up_bias, *down_bias; /* [experts, outputs], or none */
    matrix_t gate_up, down;
    int64_t groups, rows, dtype, activation, threads;
    float gain, limit;
} experts_t;

/* Sixteen codes of MXFP4 to the doubles of what they stand for. */
static const int8_t DOUBLES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* 2^(scale - 128); the two smallest are no normal numbers. */
static inline float half_of_power(uint8_t scale) {
    const uint32_t bits = scale > 1 ? (uint32_t)(scale - 1) << 23 : 1u << (21 + scale);
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline vec sigmoid(vec x) {
    const vec small = exp_negative((vec)((ivec)x | (int32_t)0x80000000)), whole = 1.0f / (1.0f + small);
    return choose(x < splat(0.0f), small * whole, whole);
}

static inline vec smaller(vec a, vec b) { return choose(a > b, b, a); }

static inline vec activated(const experts_t *e, vec gate, vec up) {
    switch (e->activation) {
    case SILU: return gate * sigmoid(gate) * up;
    case RELU: return choose(gate < splat(0.0f), splat(0.0f), gate) * up;
    case GELU_TANH:
        return 0.5f * gate * (1.0f + tanh_vec(0.7978845608f * (gate + 0.044715f * gate * gate * gate))) * up;
    case GELU:
        for (int i = 0; i < LANES; i++) gate[i] *= 0.5f * (1.0f + erff(gate[i] * 0.70710678f));
        return gate * up;
    default:
        gate = smaller(gate, splat(e->limit));
        up = smaller(up, splat(e->limit));
        up = choose(up < splat(-e->limit), splat(-e->limit), up); /* so that a NaN stays one */
        return (up + 1.0f) * (gate * sigmoid(gate * e->gain));
    }
}

/* native_expert_tiles.c, for bfloat16 on processors with matrix tiles: the same in products of bfloat16. */
int flexbatch_experts_in_tiles(const experts_t *e);
int64_t flexbatch_expert_tile_bytes(const experts_t *e);
void flexbatch_expert_tiles(const experts_t *e, char *memory);

#endif
