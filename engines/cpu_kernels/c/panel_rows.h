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

/* One group of some channels and rows: operands, and where its promoted sums are added. */
typedef struct {
    const uint8_t *w;
    const int8_t *q;
    const int32_t *zero, *sum;
    const float *channel, *scale;
    float *acc;
    int64_t step, q_step, group, scale_step; /* from channel to channel, from block to block */
    int first;                               /* nothing has been added there yet */
} Group;

/* Group g of the channels from c on and the rows of the blocks from `block` on. */
INLINE Group group_at(const Task *task, int64_t c, int64_t block, int64_t g, float *acc) {
    const int64_t k = task->linear->k, size = task->linear->group, groups = task->in->groups;
    const Panel *panel = task->panel;
    const int64_t scales_at = (block * groups + g) * LANES;
    return (Group){.w = weight_at(panel, c, g * size),
                   .q = task->in->q + (block * k + g * size) * LANES,
                   .zero = panel->zero + g * CHANNELS + c,
                   .sum = task->in->sum + scales_at,
                   .channel = panel->scale + g * CHANNELS + c,
                   .scale = task->in->scale + scales_at,
                   .acc = acc,
                   .step = panel->step,
                   .q_step = k * LANES,
                   .group = size,
                   .scale_step = groups * LANES,
                   .first = g == 0};
}

/* The panel's sums, which begin with channel `from`, into y with the bias: channels from … to - 1
 * and `blocks` blocks of rows. */
void write_rows(const Task *task, int64_t from, int64_t to, int64_t block, int64_t blocks);

/* 2^tile_shift k are a tile's: all 64 that it has room for, or 32 where groups need it. */
INLINE int tile_shift(const QditLinear *linear) { return linear->group % 64 ? 5 : 6; }

/* Blocks block … end - 1. */
void multiply_vnni(const Task *task, int64_t block, int64_t end);
void multiply_amx(const Task *task, int64_t block, int64_t end);

#endif
