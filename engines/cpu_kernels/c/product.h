/* The contract between the operator that ONNX Runtime calls (custom_op.c) and the products behind
 * it: product.c, which is fast on one kind of machine, and plain.c, which runs on every one.
 *
 * A linear of grouped weights and activations that are quantized as they come:
 *
 *   s_x = max(max |x| / 127, 2^-24)       for each row of x and each group of k
 *   q_x = round half to even (x / s_x)    in -127 ... 127
 *   y   = sum over groups of s_x s_w (sum over the group of q_x (w - z)) + bias
 *
 * s_x and q_x are those of calibrate/quantizers.py to the bit: both are float32
 * divisions, or round as they do. The inner sum is exact in int32; the outer one is float32 in an order of one's own,
 * which must not depend on how jobs are spread over threads.
 *
 * A row with what is no finite number gets no finite y.
 *
 * A call with R rows is qdit_quantize_job for every job in 0 ... qdit_quantize_jobs - 1, then
 * qdit_product_job for every job in 0 ... qdit_product_jobs - 1, each in any order and on any
 * thread. Every quantize job has ended before the first product job starts. Calls with different
 * scratch may overlap in time; what a thread keeps between them is memory alone. */
#ifndef QDIT_PRODUCT_H
#define QDIT_PRODUCT_H

#include <stddef.h>
#include <stdint.h>

/* k > 0 and n > 0; group is a multiple of 32 and divides k; bits is 4 or 8. custom_op.c refuses
 * anything else. The pointers are MatMulNBits' own constants, aligned as their types need and no
 * further, and are only read. */
typedef struct {
    int64_t k, n;              /* inputs and outputs of the linear */
    int64_t group;             /* neighbouring k that share scales, of rows and of weights */
    int bits;                  /* 4 or 8: how weights are stored */
    const uint8_t *weight;     /* [n][k/group][group*bits/8], the first of two in the low nibble */
    const float *scale;        /* [n][k/group] */
    const uint8_t *zero_point; /* [n][ceil(k/group*bits/8)], packed as weights; NULL: 2^(bits-1) */
    const float *bias;         /* [n] or NULL */
    const float *sign;         /* [k/group] of +1 and -1, what s_x is multiplied by; or NULL */
    int64_t stride;            /* floats from one row of x to the next, at least k */
} QditLinear;

/* What these products run on here. 0: nothing, so they must not be called; 1: AVX512-VNNI; 2: AMX
 * for int8 beside it. Asks the operating system's permission to use AMX, for the whole process. */
int qdit_units(void);

/* Bytes that one call with `rows` rows needs; the caller aligns them to 64. */
size_t qdit_scratch_bytes(const QditLinear *linear, int64_t rows);

int64_t qdit_quantize_jobs(const QditLinear *linear, int64_t rows);

/* One part of x, rows of k `stride` apart, into scratch. 0, or 1 where there was no memory. */
int qdit_quantize_job(const QditLinear *linear, const float *x, int64_t rows, void *scratch,
                      int64_t job);

int64_t qdit_product_jobs(const QditLinear *linear, int64_t rows);

/* One part of y [rows][n] from scratch; jobs write apart from one another. 0, or 1 as above. */
int qdit_product_job(const QditLinear *linear, int64_t rows, const void *scratch, float *y,
                     int64_t job);

#endif
