/* One panel's channels for some blocks of rows, into y: the two products. */
#ifndef QDIT_PANEL_ROWS_H
#define QDIT_PANEL_ROWS_H

#include "panel.h"

/* What a job works on. rows: the call's; first, channels: the panel's. */
typedef struct {
    const QditLinear *linear;
    const Rows *in;
    const Panel *panel;
    float *y;
    int64_t rows, first, channels;
    int past; /* write y past the caches */
} Task;

/* 2^tile_shift k are a tile's: all 64 that it has room for, or 32 where groups need it. */
INLINE int tile_shift(const QditLinear *linear) { return linear->group % 64 ? 5 : 6; }

/* Blocks block … end - 1. */
void multiply_vnni(const Task *task, int64_t block, int64_t end);
void multiply_amx(const Task *task, int64_t block, int64_t end);

#endif
