/* Keys and values of new tokens into token rows, quantized when the cache is; bit for bit what `append_rows` in
 * reference.py writes. */
#include <math.h>

#include "native_rows.h"

/* `x` rounded to the cache's dtype, written at `to`; returns what a reader will find. */
static float put(char *to, float x, int64_t dtype) {
    if (dtype == FLOAT32) {
        memcpy(to, &x, 4);
        return x;
    }
    const uint16_t half = dtype == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
    memcpy(to, &half, 2);
    return scalar(to, dtype);
}

static void quantize_head(const cache_t *c, const float *x, uint8_t *codes, char *parameters) {
    const int64_t width = element_bytes(c->dtype);
    const float levels = (float)((1 << c->bits) - 1);
    if (c->bits == 4) memset(codes, 0, codes_of_head(c));
    for (int64_t begin = 0, g = 0; begin < c->head_dim; begin += c->group, g++) {
        const int64_t end = begin + c->group < c->head_dim ? begin + c->group : c->head_dim;
        float low = x[begin], high = x[begin];
        int numbers = 1;
        for (int64_t i = begin; i < end; i++) {
            low = x[i] < low ? x[i] : low;
            high = x[i] > high ? x[i] : high;
            numbers &= x[i] == x[i];
        }
        /* A comparison passes over a NaN; + 0 makes one zero of two, whichever came first. */
        const float minimum = put(parameters + (2 * g + 1) * width, numbers ? low + 0.0f : NAN, c->dtype);
        const float range = (high + 0.0f - minimum) / levels,
            step = put(parameters + 2 * g * width, range < 0 ? 0.0f : range, c->dtype);
        for (int64_t i = begin; i < end; i++) {
            float code = step > 0 && step < INFINITY ? rintf((x[i] - minimum) / step) : 0.0f;
            const uint8_t byte = (uint8_t)(code < 0 ? 0.0f : code > levels ? levels : code);
            if (c->bits == 8) codes[i] = byte;
            else codes[i / 2] |= (uint8_t)(byte << (i % 2 * 4));
        }
    }
}

static void append_row(const cache_t *c, char *row, const char *const source[2]) {
    const int64_t bytes = c->head_dim * element_bytes(c->dtype), codes = codes_of_head(c),
        parameters = parameters_of_head(c);
    float x[c->head_dim];
    for (int64_t side = 0; side < 2; side++) {
        if (c->bits == 16) memcpy(row + side * c->num_kv_heads * bytes, source[side], c->num_kv_heads * bytes);
        for (int64_t head = 0; c->bits != 16 && head < c->num_kv_heads; head++) {
            const int64_t vector = side * c->num_kv_heads + head;
            if (c->dtype == FLOAT32) memcpy(x, source[side] + head * bytes, bytes);
            else expand_16(source[side] + head * bytes, x, c->head_dim, c->dtype);
            quantize_head(c, x, (uint8_t *)row + vector * codes,
                row + 2 * c->num_kv_heads * codes + vector * parameters);
        }
    }
}

/* key and value: tokens `key_stride` and `value_stride` elements apart, heads dense. slots: [num_tokens]. */
void flexbatch_append_rows(const cache_t *c, const int64_t *slots, const char *key, const char *value,
    int64_t key_stride, int64_t value_stride, int64_t num_tokens, int64_t threads) {
    const int64_t width = element_bytes(c->dtype);
    /* Waking sleeping threads takes 50 to 100 us on 16 cores, as long as one needs to copy half a megabyte or to
     * quantize 16,384 elements. */
    const int64_t serial = c->bits == 16 ? 1 << 18 : 1 << 14;
#pragma omp parallel for num_threads((int)threads) schedule(static) \
    if (num_tokens * c->num_kv_heads * c->head_dim > serial)
    for (int64_t i = 0; i < num_tokens; i++)
        append_row(c, c->rows + slots[i] * c->row_bytes,
            (const char *const[2]){key + i * key_stride * width, value + i * value_stride * width});
}
