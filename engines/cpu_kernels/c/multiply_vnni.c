/* AVX512-VNNI: 8 channels × 48 rows of sums in registers, weights broadcast as words of four k.
 *
 * gcc's partial redundancy elimination copies the 24 sums around the loop and spills them: half
 * the speed. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-pre")
#endif
#include "panel_rows.h"

#include <string.h>

enum { COLUMNS = 8, BLOCKS = 3 };
/* Channels whose sums are finished before the next ones': with their group's weights and rows they
 * stay in the first cache. */
enum { FINISHED = 16 };

VNNI INLINE void multiply_group(const int blocks, const int same, const Group *at) {
    __m512i d[COLUMNS][BLOCKS];
#pragma GCC unroll 3
    for (int b = 0; b < blocks; ++b) {
        const __m512i sums = _mm512_load_si512(at->sum + b * at->scale_step);
        const __m512i start = same ? _mm512_mullo_epi32(sums, _mm512_set1_epi32(-at->zero[0]))
                                   : _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c) d[c][b] = start;
    }
    for (int64_t k = 0; k < at->group; k += 4) {
        __m512i v[BLOCKS];
#pragma GCC unroll 3
        for (int b = 0; b < blocks; ++b)
            v[b] = _mm512_load_si512(at->q + b * at->q_step + k * LANES);
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c) {
            int32_t four;
            memcpy(&four, at->w + c * at->step + k, 4);
            const __m512i w = _mm512_set1_epi32(four);
#pragma GCC unroll 3
            for (int b = 0; b < blocks; ++b) d[c][b] = _mm512_dpbusd_epi32(d[c][b], w, v[b]);
        }
    }
#pragma GCC unroll 3
    for (int b = 0; b < blocks; ++b) {
        const __m512i sums = _mm512_load_si512(at->sum + b * at->scale_step);
        const __m512 scale = _mm512_load_ps(at->scale + b * at->scale_step);
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c) {
            const __m512i off = _mm512_mullo_epi32(sums, _mm512_set1_epi32(at->zero[c]));
            const __m512i sum = same ? d[c][b] : _mm512_sub_epi32(d[c][b], off);
            promote(at->acc + c * ACC_STEP + b * LANES, sum, scale, at->channel[c], at->first);
        }
    }
}

/* Channels `from` … `to` of the panel, all groups. */
VNNI INLINE void multiply_channels(const int blocks, const Task *task, int64_t block, int64_t from,
                                   int64_t to) {
    for (int64_t g = 0; g < task->in->groups; ++g)
        for (int64_t c = from; c < to; c += COLUMNS) {
            float *acc = task->panel->acc + (c - from) * ACC_STEP;
            const Group at = group_at(task, c, block, g, acc);
            if (task->panel->same[g]) {
                multiply_group(blocks, 1, &at);
            } else {
                multiply_group(blocks, 0, &at);
            }
        }
}

VNNI void multiply_vnni(const Task *task, int64_t block, int64_t end) {
    for (; block < end; block += BLOCKS) {
        const int64_t blocks = least(end - block, BLOCKS);
        for (int64_t from = 0; from < task->channels; from += FINISHED) {
            const int64_t to = least(from + FINISHED, task->channels);
            switch (blocks) {
                case 1: multiply_channels(1, task, block, from, to); break;
                case 2: multiply_channels(2, task, block, from, to); break;
                default: multiply_channels(3, task, block, from, to);
            }
            write_rows(task, from, to, block, blocks);
        }
    }
}
