/* AMX: 32 channels × 32 rows in four tiles; weights are the first operand, as they are stored by
 * channel, rows the second one, in words of four k. */
#include "panel_rows.h"
#include "tiles.h"

enum { WIDE = 32, TILE = 16 * 16, ROW_BLOCKS = ACC_STEP / LANES };

/* Tiles 0 … 3 sums, 4 and 5 weights of k_step k, 6 and 7 rows. */
AMX static void shape_tiles(int k_step) {
    TileShapes shapes;
    memset(&shapes, 0, sizeof shapes);
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) {
        shapes.column_bytes[i] = i == 4 || i == 5 ? (uint16_t)k_step : 64;
        shapes.rows[i] = i >= 6 ? (uint8_t)(k_step / 4) : 16;
    }
    SETTLED;
    tile_shapes(&shapes);
}

/* -zero · Σ q for 32 channels and 32 rows: what unsigned weights' sums start from. */
AMX static void start_sums(const Group *at, int32_t (*sums)[TILE]) {
    for (int c = 0; c < WIDE; ++c)
        for (int b = 0; b < 2; ++b) {
            const __m512i sum = _mm512_load_si512(at->sum + b * at->scale_step);
            _mm512_store_si512(sums[c / 16 * 2 + b] + c % 16 * 16,
                               _mm512_mullo_epi32(sum, _mm512_set1_epi32(-at->zero[c])));
        }
    SETTLED;
    tile_load(0, sums[0], 64);
    tile_load(1, sums[1], 64);
    tile_load(2, sums[2], 64);
    tile_load(3, sums[3], 64);
}

AMX static void clear_sums(void) {
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
}

AMX INLINE void multiply_group(const Group *at, int k_step, const int is_signed) {
    for (int64_t k = 0; k < at->group; k += k_step) {
        tile_load(4, at->w + k * CHANNELS, k_step);
        tile_load(6, at->q + k * LANES, 64);
        tile_multiply(is_signed, 0, 4, 6);
        tile_load(7, at->q + at->q_step + k * LANES, 64);
        tile_multiply(is_signed, 1, 4, 7);
        tile_load(5, at->w + k * CHANNELS + 16 * k_step, k_step);
        tile_multiply(is_signed, 2, 5, 6);
        tile_multiply(is_signed, 3, 5, 7);
    }
}

AMX static void store_sums(int32_t (*sums)[TILE]) {
    tile_store(0, sums[0], 64);
    tile_store(1, sums[1], 64);
    tile_store(2, sums[2], 64);
    tile_store(3, sums[3], 64);
    SETTLED;
}

VNNI static void promote_square(const Group *at, int32_t (*sums)[TILE]) {
    const __m512 scales[2] = {_mm512_load_ps(at->scale),
                              _mm512_load_ps(at->scale + at->scale_step)};
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
        for (int c = 0; c < 16; ++c)
#pragma GCC unroll 2
            for (int b = 0; b < 2; ++b)
                promote(at->acc + (half * 16 + c) * ACC_STEP + b * LANES,
                        _mm512_load_si512(sums[half * 2 + b] + c * 16), scales[b],
                        at->channel[half * 16 + c], at->first);
}

/* All groups of `blocks` blocks of rows, the panel's channels. Sums of one square are promoted
 * while the matrix unit works on the next one: at once, their loads would wait for its stores. */
AMX static void multiply_blocks(const Task *task, int64_t block, int64_t blocks, int k_step) {
    const Panel *panel = task->panel;
    int32_t sums[2][4][TILE] __attribute__((aligned(64)));
    Group last;
    int turn = 0, any = 0;
    for (int64_t g = 0; g < task->in->groups; ++g)
        for (int64_t c = 0; c < task->channels; c += WIDE)
            for (int64_t b = 0; b < blocks; b += 2) {
                float *acc = panel->acc + c * ACC_STEP + b * LANES;
                const Group at = group_at(task, c, block + b, g, acc);
                if (panel->is_signed) {
                    clear_sums();
                    multiply_group(&at, k_step, 1);
                } else {
                    start_sums(&at, sums[turn]);
                    multiply_group(&at, k_step, 0);
                }
                store_sums(sums[turn]);
                if (any) promote_square(&last, sums[1 - turn]);
                last = at, any = 1, turn = 1 - turn;
            }
    if (any) promote_square(&last, sums[1 - turn]);
}

AMX void multiply_amx(const Task *task, int64_t block, int64_t end) {
    const int k_step = 1 << tile_shift(task->linear);
    shape_tiles(k_step);
    for (; block < end; block += ROW_BLOCKS) {
        const int64_t blocks = least(end - block, ROW_BLOCKS);
        multiply_blocks(task, block, blocks, k_step);
        write_rows(task, 0, task->channels, block, blocks);
    }
    tile_release();
}
