/* The matrix unit's tiles: the processor's, or the same in plain C, so that a machine without them
 * can test what is made of them (QDIT_EMULATED_TILES). */
#ifndef QDIT_TILES_H
#define QDIT_TILES_H

#include <stdint.h>
#include <string.h>

#include "simd.h"

/* gcc's tile intrinsics do not say which memory they read and write. */
#define SETTLED __asm__ volatile("" ::: "memory")

typedef struct {
    uint8_t palette, start, zeros[14];
    uint16_t column_bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) TileShapes;

#ifndef QDIT_EMULATED_TILES

#define tile_shapes(shapes) _tile_loadconfig(shapes)
#define tile_release() _tile_release()
#define tile_zero(to) _tile_zero(to)
#define tile_load(to, from, step) _tile_loadd(to, from, step)
#define tile_store(from, to, step) _tile_stored(from, to, step)
/* sums += a · b; b is signed, and a where `is_signed`, a constant. */
#define tile_multiply(is_signed, sums, a, b) \
    do {                                     \
        if (is_signed) {                     \
            _tile_dpbssd(sums, a, b);        \
        } else {                             \
            _tile_dpbusd(sums, a, b);        \
        }                                    \
    } while (0)

#else

#undef AMX
#define AMX VNNI

static __thread TileShapes emulated_shapes;
static __thread uint8_t emulated_tiles[8][16][64];

static inline void tile_shapes(const TileShapes *shapes) {
    emulated_shapes = *shapes;
    memset(emulated_tiles, 0, sizeof emulated_tiles);
}

static inline void tile_release(void) { memset(&emulated_shapes, 0, sizeof emulated_shapes); }

static inline void tile_zero(int to) { memset(emulated_tiles[to], 0, sizeof emulated_tiles[to]); }

static inline void tile_load(int to, const void *from, int64_t step) {
    tile_zero(to);
    for (int row = 0; row < emulated_shapes.rows[to]; ++row)
        memcpy(emulated_tiles[to][row], (const char *)from + row * step,
               emulated_shapes.column_bytes[to]);
}

static inline void tile_store(int from, void *to, int64_t step) {
    for (int row = 0; row < emulated_shapes.rows[from]; ++row)
        memcpy((char *)to + row * step, emulated_tiles[from][row],
               emulated_shapes.column_bytes[from]);
}

static inline void tile_multiply(int is_signed, int sums, int a, int b) {
    for (int m = 0; m < emulated_shapes.rows[sums]; ++m)
        for (int n = 0; n < emulated_shapes.column_bytes[sums] / 4; ++n) {
            int32_t sum;
            memcpy(&sum, emulated_tiles[sums][m] + 4 * n, 4);
            for (int k = 0; k < emulated_shapes.column_bytes[a]; ++k) {
                const uint8_t left = emulated_tiles[a][m][k];
                const int8_t right = (int8_t)emulated_tiles[b][k / 4][4 * n + k % 4];
                sum += (is_signed ? (int8_t)left : left) * right;
            }
            memcpy(emulated_tiles[sums][m] + 4 * n, &sum, 4);
        }
}

#endif
#endif
