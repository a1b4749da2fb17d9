/* The product's jobs: a panel of channels with a part of the rows each. */
#include "panel_rows.h"

/* Rows of a job: their bytes stay in the second cache while one panel after the other passes, and
 * there are enough of them to be worth a panel's unpacking. */
enum { MOST_BYTES = 3 << 19, LEAST_ROWS = 192, MOST_ROWS = 768 };

/* Numbers of y from which on it is written past the caches: through them, its lines would be read
 * first, and the reader would not find them there. */
enum { LARGE = 4 << 20 };

static int64_t blocks_a_job(const QditLinear *linear, int64_t rows) {
    int64_t most = MOST_BYTES / linear->k;
    most = most < LEAST_ROWS ? LEAST_ROWS : most > MOST_ROWS ? MOST_ROWS : most;
    const int64_t blocks = ceil_div(ceil_div(rows, LANES), ceil_div(rows, most));
    return (blocks + 1) & ~(int64_t)1;
}

static int64_t panels(const QditLinear *linear) { return ceil_div(linear->n, CHANNELS); }

int64_t qdit_product_jobs(const QditLinear *linear, int64_t rows) {
    return panels(linear) * ceil_div(ceil_div(rows, LANES), blocks_a_job(linear, rows));
}

int qdit_product_job(const QditLinear *linear, int64_t rows, const void *scratch, float *y,
                     int64_t job) {
    const Rows in = rows_in(linear, rows, (void *)scratch);
    const int64_t each = blocks_a_job(linear, rows), first = job % panels(linear) * CHANNELS;
    const int64_t channels = least(linear->n - first, CHANNELS);
    const int64_t block = job / panels(linear) * each;
    const int by_tiles = qdit_units() == 2;
    const int64_t blocks = by_tiles ? in.blocks : ceil_div(rows, LANES);
    const int shift = by_tiles ? tile_shift(linear) : WHOLE_ROWS;
    const Panel panel = panel_of(linear, first, channels, shift);
    if (panel.w == NULL) return 1;
    const int past = rows * linear->n >= LARGE;
    const Task task = {linear, &in, &panel, y, rows, first, channels, past};
    (by_tiles ? multiply_amx : multiply_vnni)(&task, block, least(block + each, blocks));
    if (past) _mm_sfence(); /* other threads read y once the jobs are done */
    return 0;
}
