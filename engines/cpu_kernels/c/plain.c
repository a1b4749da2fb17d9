/* The products of product.h in portable C: slow, the same numbers. Tests run the operator on it
 * on any machine; no engine does, since qdit_units says 0. */
#include "product.h"
#include "sizes.h"

#include <math.h>

#define ALIGNMENT 64
#define ROWS_A_JOB 8
#define OUTPUTS_A_JOB 16

static const float MIN_SCALE = 1.0f / 16777216.0f; /* 2^-24, of calibrate/integers.py */

/* Scratch is int8 integers [rows][k], then float scales [rows][k/group] at the next 64 bytes. */
static size_t integer_bytes(const QditLinear *linear, int64_t rows) {
    return (size_t)ceil_div(rows * linear->k, ALIGNMENT) * ALIGNMENT;
}

int qdit_units(void) { return 0; }

size_t qdit_scratch_bytes(const QditLinear *linear, int64_t rows) {
    size_t scales = (size_t)(rows * (linear->k / linear->group));
    return integer_bytes(linear, rows) + scales * sizeof(float);
}

int64_t qdit_quantize_jobs(const QditLinear *linear, int64_t rows) {
    (void)linear;
    return ceil_div(rows, ROWS_A_JOB);
}

int64_t qdit_product_jobs(const QditLinear *linear, int64_t rows) {
    (void)rows;
    return ceil_div(linear->n, OUTPUTS_A_JOB);
}

static float quantize_group(const float *x, int64_t size, int8_t *q) {
    float largest = 0.0f;
    for (int64_t i = 0; i < size; i++) {
        float size_of = fabsf(x[i]);
        if (size_of > largest || isnan(size_of)) largest = size_of; /* and stays no number */
    }
    float scale = largest / 127.0f;
    if (scale < MIN_SCALE) scale = MIN_SCALE;
    for (int64_t i = 0; i < size; i++) {
        float steps = nearbyintf(x[i] / scale);
        /* also what is no number becomes an integer: casting it is undefined */
        q[i] = (int8_t)(steps >= 127.0f ? 127.0f : steps > -127.0f ? steps : -127.0f);
    }
    return scale;
}

int qdit_quantize_job(const QditLinear *linear, const float *x, int64_t rows, void *scratch,
                      int64_t job) {
    int64_t k = linear->k, group = linear->group, groups = k / group;
    int8_t *q = scratch;
    float *scale = (float *)((char *)scratch + integer_bytes(linear, rows));
    int64_t stop = least(rows, (job + 1) * ROWS_A_JOB);
    for (int64_t row = job * ROWS_A_JOB; row < stop; row++) {
        for (int64_t g = 0; g < groups; g++) {
            float *own = scale + row * groups + g;
            const float *from = x + row * linear->stride + g * group;
            *own = quantize_group(from, group, q + row * k + g * group);
            if (linear->sign != NULL) *own *= linear->sign[g];
        }
    }
    return 0;
}

/* The integer at `index` of a packed run that starts at `from`. */
static int32_t unpacked(const uint8_t *from, int64_t index, int bits) {
    if (bits == 8) {
        return from[index];
    }
    return (from[index / 2] >> (index % 2 * 4)) & 15;
}

static int32_t zero_point(const QditLinear *linear, int64_t output, int64_t g) {
    if (linear->zero_point == NULL) {
        return 1 << (linear->bits - 1);
    }
    int64_t width = ceil_div(linear->k / linear->group * linear->bits, 8);
    return unpacked(linear->zero_point + output * width, g, linear->bits);
}

static float product(const QditLinear *linear, const int8_t *q, const float *scale,
                     int64_t output) {
    int64_t group = linear->group, groups = linear->k / group;
    int64_t bytes = group * linear->bits / 8;
    float total = 0.0f;
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *weight = linear->weight + (output * groups + g) * bytes;
        int32_t zero = zero_point(linear, output, g), sum = 0;
        for (int64_t i = 0; i < group; i++) {
            sum += q[g * group + i] * (unpacked(weight, i, linear->bits) - zero);
        }
        total += scale[g] * linear->scale[output * groups + g] * (float)sum;
    }
    return linear->bias == NULL ? total : total + linear->bias[output];
}

int qdit_product_job(const QditLinear *linear, int64_t rows, const void *scratch, float *y,
                     int64_t job) {
    int64_t k = linear->k, groups = k / linear->group;
    const int8_t *q = scratch;
    const float *scale = (const float *)((const char *)scratch + integer_bytes(linear, rows));
    int64_t stop = least(linear->n, (job + 1) * OUTPUTS_A_JOB);
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t output = job * OUTPUTS_A_JOB; output < stop; output++) {
            y[row * linear->n + output] =
                product(linear, q + row * k, scale + row * groups, output);
        }
    }
    return 0;
}
