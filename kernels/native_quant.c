/* Weights in codes -> numbers, bit for bit those of `dequantize` in reference.py; and the codes of least squared error
 * that `fit` there finds. Compiled without fused multiply-adds, which round once where two roundings are meant. */
#include <math.h>

#include "native_rows.h"

/* Elements of a row that are expanded at a time: they stay in the nearest cache until they are rounded to 16 bits. */
enum { CHUNK = 2048 };

/* codes: rows of c->head_dim weights, dense; parameters and out in c->dtype, dense. Expands rows [first, end). */
static void expand_rows(const cache_t *c, const uint8_t *codes, const char *parameters, char *out, int64_t first,
    int64_t end) {
    const int64_t columns = c->head_dim, width = element_bytes(c->dtype), code_bytes = codes_of_head(c),
        groups = (columns + c->group - 1) / c->group, some = CHUNK < c->group ? 1 : CHUNK / c->group;
    float buffer[CHUNK];
    for (int64_t row = first; row < end; row++) {
        const uint8_t *from = codes + row * code_bytes;
        const char *pairs = parameters + row * groups * 2 * width;
        char *to = out + row * columns * width;
        if (c->dtype == FLOAT32) {
            expand_codes(from, pairs, (float *)to, c);
            continue;
        }
        for (int64_t g = 0; g < groups; g += some) {
            cache_t part = *c;
            const int64_t begin = g * c->group, left = columns - begin, step = some * c->group;
            part.head_dim = left < step ? left : step;
            uint16_t *halves = (uint16_t *)(to + begin * 2);
            expand_codes(from + begin * c->bits / 8, pairs + g * 2 * width, buffer, &part);
            if (c->dtype == BFLOAT16) for (int64_t i = 0; i < part.head_dim; i++) halves[i] = to_bfloat16(buffer[i]);
            else for (int64_t i = 0; i < part.head_dim; i++) halves[i] = to_float16(buffer[i]);
        }
    }
}

void flexbatch_expand_weights(const cache_t *c, const uint8_t *codes, const char *parameters, char *out, int64_t rows,
    int64_t threads) {
#pragma omp parallel for num_threads((int)threads) schedule(static) if (rows * c->head_dim > 1 << 16)
    for (int64_t first = 0; first < rows; first += 8)
        expand_rows(c, codes, parameters, out, first, first + 8 < rows ? first + 8 : rows);
}

static float rounded(float x, int64_t dtype) {
    if (dtype == FLOAT32) return x;
    const uint16_t half = dtype == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
    return scalar((const char *)&half, dtype);
}

static void find_codes(const float *y, float *code, int64_t n, float scale, float minimum, float levels) {
    if (!(scale > 0 && scale < INFINITY)) {
        memset(code, 0, n * sizeof *code);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        const float x = rintf((y[i] - minimum) / scale);
        code[i] = x < 0 ? 0 : x > levels ? levels : x;
    }
}

/* y: a whole group. shrinks: of the range, at either end. Writes the codes and what they mean. */
static void fit_group(const float *y, float *code, int64_t n, float levels, const float *shrinks, int64_t num_shrinks,
    int64_t steps, int64_t dtype, float found[2]) {
    float low = y[0], high = y[0], sum = 0, least = INFINITY;
    int numbers = 1;
    for (int64_t i = 0; i < n; i++) {
        low = y[i] < low ? y[i] : low;
        high = y[i] > high ? y[i] : high;
        numbers &= y[i] == y[i];
    }
#pragma omp simd reduction(+:sum)
    for (int64_t i = 0; i < n; i++) sum += y[i];
    const float middle = (low + high) / 2, half = (high - low) / 2, mean_y = sum / n;
    const float first = rounded(numbers ? low + 0.0f : NAN, dtype), range = (high + 0.0f - first) / levels;
    found[0] = rounded(range < 0 ? 0.0f : range, dtype);
    found[1] = first;
    const float plain[2] = {found[0], found[1]};
    for (int64_t candidate = 0; candidate <= num_shrinks * num_shrinks && numbers; candidate++) {
        float scale = plain[0], minimum = plain[1];
        if (candidate > 0) {
            const float below = shrinks[(candidate - 1) / num_shrinks], above = shrinks[(candidate - 1) % num_shrinks];
            scale = (below + above) * half / levels;
            minimum = middle - below * half;
        }
        for (int64_t step = 0; step <= steps; step++) {
            scale = rounded(scale, dtype);
            minimum = rounded(minimum, dtype);
            find_codes(y, code, n, scale, minimum, levels);
            float error = 0, total = 0, with_y = 0, square = 0;
#pragma omp simd reduction(+:error, total)
            for (int64_t i = 0; i < n; i++) {
                const float gap = code[i] * scale + minimum - y[i];
                error += gap * gap;
                total += code[i];
            }
            if (error < least) {
                least = error;
                found[0] = scale;
                found[1] = minimum;
            }
            const float mean = total / n;
#pragma omp simd reduction(+:with_y, square)
            for (int64_t i = 0; i < n; i++) {
                const float centered = code[i] - mean;
                with_y += centered * y[i];
                square += centered * centered;
            }
            scale = with_y / (square < 1 ? 1 : square);
            minimum = mean_y - mean * scale;
        }
    }
    find_codes(y, code, n, found[0], found[1], levels);
}

static void put(char *to, float x, int64_t dtype) {
    const uint16_t half = dtype == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
    if (dtype == FLOAT32) memcpy(to, &x, 4);
    else memcpy(to, &half, 2);
}

/* x: [rows, c->head_dim] dense in c->dtype. A last group that is not full is filled up with its last element. */
void flexbatch_fit_weights(const cache_t *c, const char *x, uint8_t *codes, char *parameters, int64_t rows,
    const float *shrinks, int64_t num_shrinks, int64_t steps, int64_t threads) {
    const int64_t columns = c->head_dim, width = element_bytes(c->dtype), code_bytes = codes_of_head(c),
        groups = (columns + c->group - 1) / c->group;
    const float levels = (float)((1 << c->bits) - 1);
#pragma omp parallel for num_threads((int)threads) schedule(static) if (rows * columns > 1 << 12)
    for (int64_t row = 0; row < rows; row++) {
        float y[c->group], code[c->group], found[2];
        uint8_t *to = codes + row * code_bytes;
        memset(to, 0, code_bytes);
        for (int64_t g = 0; g < groups; g++) {
            const int64_t begin = g * c->group, left = columns - begin, n = left < c->group ? left : c->group;
            const char *from = x + (row * columns + begin) * width;
            if (c->dtype == FLOAT32) memcpy(y, from, n * 4);
            else expand_16(from, y, n, c->dtype);
            for (int64_t i = n; i < c->group; i++) y[i] = y[n - 1];
            fit_group(y, code, c->group, levels, shrinks, num_shrinks, steps, c->dtype, found);
            for (int64_t side = 0; side < 2; side++)
                put(parameters + ((row * groups + g) * 2 + side) * width, found[side], c->dtype);
            for (int64_t i = 0; i < n; i++)
                if (c->bits == 8) to[begin + i] = (uint8_t)code[i];
                else to[(begin + i) / 2] |= (uint8_t)((uint8_t)code[i] << (begin + i) % 2 * 4);
        }
    }
}
