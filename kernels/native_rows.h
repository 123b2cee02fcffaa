/* Vectors of the widest kind the machine has, and token rows of the KV cache (layout: reference.py) expanded to
 * float32. */
#ifndef FLEXBATCH_NATIVE_ROWS_H
#define FLEXBATCH_NATIVE_ROWS_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef uint16_t hvec __attribute__((vector_size(LANES * 2)));
typedef uint8_t bvec __attribute__((vector_size(LANES)));

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

typedef struct {
    char *rows;                /* first token row of the layer */
    int64_t row_bytes;         /* distance of two token rows */
    int64_t num_kv_heads, head_dim;
    int64_t bits, group;       /* 16 stands for the compute dtype, also when that is float32 */
    int64_t dtype;             /* of rows (16 bits), or of the parameters (8 and 4 bits) */
} cache_t;

static inline vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
static inline vec splat(float x) { return x - (vec){0}; }
static inline vec choose(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }
static inline vec larger(vec a, vec b) { return choose(a > b, a, b); }
static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t element_bytes(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

static inline vec from_bfloat16(hvec h) { return (vec)(__builtin_convertvector(h, uvec) << 16); }

/* Shift exponent and mantissa into place, then scale by the difference of the biases (2^112): exact for subnormals
 * too. */
static inline vec from_float16(hvec h) {
    uvec bits = __builtin_convertvector(h, uvec);
    vec magnitude = (vec)((bits & 0x7fff) << 13) * splat(5.192296858534828e33f);
    uvec special = (uvec)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
    return (vec)((uvec)magnitude | special | ((bits & 0x8000) << 16));
}

static inline float scalar(const char *p, int64_t dtype) {
    uint32_t bits;
    uint16_t half;
    float x;
    if (dtype == FLOAT32) memcpy(&bits, p, 4);
    else {
        memcpy(&half, p, 2);
        bits = (uint32_t)half << 16;
        if (dtype == FLOAT16) return from_float16((hvec){0} + half)[0];
    }
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Round half to even: a carry out of the mantissa moves into the exponent, as it should. */
static inline uint16_t to_float16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x47800000) return sign | 0x7c00; /* 65536 and more */
    if (bits < 0x38800000) {                       /* subnormal: adding 0.5 leaves units of 2^-24 in the mantissa */
        float shifted;
        memcpy(&shifted, &bits, 4);
        shifted += 0.5f;
        memcpy(&bits, &shifted, 4);
        return sign | (uint16_t)(bits - 0x3f000000);
    }
    bits -= 112u << 23;
    return sign | (uint16_t)((bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

typedef float four __attribute__((vector_size(16)));
static inline float horizontal_sum(vec v) {
    four parts[LANES / 4], sum;
    memcpy(parts, &v, sizeof v);
    sum = parts[0];
    for (int i = 1; i < LANES / 4; i++) sum += parts[i];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

static inline void expand_16(const char *source, float *out, int64_t n, int64_t dtype) {
    int64_t i = 0;
    hvec h;
    if (dtype == BFLOAT16)
        for (; i + LANES <= n; i += LANES) { memcpy(&h, source + 2 * i, sizeof h); store(out + i, from_bfloat16(h)); }
    else
        for (; i + LANES <= n; i += LANES) { memcpy(&h, source + 2 * i, sizeof h); store(out + i, from_float16(h)); }
    for (; i < n; i++) out[i] = scalar(source + 2 * i, dtype);
}

/* A plain loop: compilers widen bytes better in their own vectors than in these. */
static inline void expand_8(const uint8_t *restrict codes, float *restrict out, int64_t n, float scale, float minimum) {
    for (int64_t i = 0; i < n; i++) out[i] = codes[i] * scale + minimum;
}

/* Codes of elements [begin, end) of a head. A byte widened to 16 bits, its high half moved up, is two bytes of one
 * code each. */
static inline void expand_4(const uint8_t *restrict codes, float *restrict out, int64_t begin, int64_t end,
    float scale, float minimum) {
    uint16_t pairs[64];
    if (begin < end && begin & 1) out[begin] = (codes[begin / 2] >> 4) * scale + minimum, begin++;
    for (; begin < end; begin += 128) {
        const int64_t n = end - begin < 128 ? end - begin : 128;
        for (int64_t k = 0; k < (n + 1) / 2; k++)
            pairs[k] = (codes[begin / 2 + k] | codes[begin / 2 + k] << 4) & 0x0f0f;
        expand_8((const uint8_t *)pairs, out + begin, n, scale, minimum);
    }
}

static inline void expand_codes(const uint8_t *codes, const char *parameters, float *out, const cache_t *c) {
    const int64_t width = element_bytes(c->dtype);
    for (int64_t begin = 0, g = 0; begin < c->head_dim; begin += c->group, g++) {
        const int64_t end = begin + c->group < c->head_dim ? begin + c->group : c->head_dim;
        const float scale = scalar(parameters + 2 * g * width, c->dtype),
            minimum = scalar(parameters + (2 * g + 1) * width, c->dtype);
        if (c->bits == 8) expand_8(codes + begin, out + begin, end - begin, scale, minimum);
        else expand_4(codes, out, begin, end, scale, minimum);
    }
}

static inline int64_t codes_of_head(const cache_t *c) { return (c->head_dim * c->bits + 7) / 8; }
static inline int64_t parameters_of_head(const cache_t *c) {
    return (c->head_dim + c->group - 1) / c->group * 2 * element_bytes(c->dtype);
}

/* The key (side 0) or value (side 1) of one head of a token row: a pointer to its floats, in the row itself or in
 * `buffer`. */
static inline const float *expand(const cache_t *c, const char *row, int64_t head, int side, float *buffer) {
    const int64_t vector = side * c->num_kv_heads + head;
    if (c->bits == 16) {
        const char *source = row + vector * c->head_dim * element_bytes(c->dtype);
        if (c->dtype != FLOAT32) expand_16(source, buffer, c->head_dim, c->dtype);
        else if (c->head_dim % LANES == 0) return (const float *)source;
        else memcpy(buffer, source, c->head_dim * 4);
    } else {
        const char *parameters = row + 2 * c->num_kv_heads * codes_of_head(c) + vector * parameters_of_head(c);
        expand_codes((const uint8_t *)row + vector * codes_of_head(c), parameters, buffer, c);
    }
    return buffer;
}

/* e^x for x <= 0 within 2 units in the last place; 0 below -87, also for -inf; NaN stays NaN. */
static inline vec exp_negative(vec x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vec n = (x * 1.44269504f + magic) - magic;
    vec r = x - n * 0.693145752f - n * 1.42860677e-6f; /* ln 2 in two pieces, the first with few bits */
    vec p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    ivec underflow = x < splat(-87.0f);
    ivec exponent = __builtin_convertvector(choose(underflow, splat(0.0f), n), ivec);
    return choose(underflow, splat(0.0f), p * (vec)((exponent + 127) << 23));
}

/* tanh within 3e-7 relative: Lambert's continued fraction near 0, the exponential elsewhere. */
static inline vec tanh_vec(vec x) {
    vec z = x * x;
    vec near = x * (10395.0f + z * (1260.0f + z * 21.0f)) / (10395.0f + z * (4725.0f + z * (210.0f + z)));
    vec magnitude = (vec)((ivec)x & 0x7fffffff), e = exp_negative(-2.0f * magnitude);
    vec far = (vec)((ivec)((1.0f - e) / (1.0f + e)) | ((ivec)x & (int32_t)0x80000000));
    return choose(magnitude < splat(0.6f), near, far);
}

#endif
