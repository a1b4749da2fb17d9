/* A call's quantized rows, as both products take them. */
#ifndef QDIT_ROWS_H
#define QDIT_ROWS_H

#include "product.h"
#include "simd.h"
#include "sizes.h"

/* Rows stand in blocks of 16, an even number of them: the matrix unit takes two at a time. Rows
 * beyond the last are zero.
 *   q      [blocks][k/4][16 rows][4 k]   the words that one instruction multiplies
 *   scale  [blocks][groups][16]          with the group's sign
 *   sum    [blocks][groups][16]          Σ q over the group, what a zero point is multiplied by */
typedef struct {
    int8_t *q;
    float *scale;
    int32_t *sum;
    int64_t blocks, groups;
} Rows;

Rows rows_in(const QditLinear *linear, int64_t rows, void *scratch);

/* At least `bytes` of this thread's own memory, 64-byte aligned and as the last user left it; NULL
 * where there is none. It grows to the largest that was asked for and ends with the thread. */
char *thread_room(size_t bytes);

#endif
