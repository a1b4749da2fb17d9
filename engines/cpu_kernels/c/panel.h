/* The weights of one job, 64 channels, made ready once for all its rows. */
#ifndef QDIT_PANEL_H
#define QDIT_PANEL_H

#include "rows.h"

enum { CHANNELS = 64 };

/*   w      a byte an integer; weight_at says where
 *   scale  [groups][64]   0 beyond the last channel
 *   zero   [groups][64]   what is to be taken off w, unless it has been: `is_signed`
 *   same   [groups]       whether the group's zero points are one number
 *   acc    [64][ACC_STEP] room for sums, by channel and row */
typedef struct {
    uint8_t *w;
    float *scale;
    int32_t *zero;
    uint8_t *same;
    float *acc;
    int64_t step; /* bytes from one channel to the next */
    int shift;    /* a channel has 2^shift k together: a tile's, or all of them */
    int is_signed;
} Panel;

INLINE uint8_t *weight_at(const Panel *panel, int64_t channel, int64_t k) {
    const int64_t chunk = k >> panel->shift;
    return panel->w + (chunk * CHANNELS + channel) * panel->step + (k - (chunk << panel->shift));
}

enum { ACC_STEP = 64, WHOLE_ROWS = 62 };

/* Channels first … first + channels - 1 in this thread's room; the rest of 64 with a scale of 0.
 * `tile_shift`: chunks of 2^tile_shift k for the matrix unit, with zero points taken off where all
 * integers then fit into int8; WHOLE_ROWS: none. w is NULL where there is no memory. */
Panel panel_of(const QditLinear *linear, int64_t first, int64_t channels, int tile_shift);

#endif
