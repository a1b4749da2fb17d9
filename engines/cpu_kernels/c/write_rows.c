#include "panel_rows.h"

VNNI INLINE void write_lane(float *to, __m512 values, __mmask16 mask, int past) {
    if (past && mask == 0xffff && ((uintptr_t)to & 63) == 0) {
        _mm512_stream_ps(to, values);
    } else {
        _mm512_mask_storeu_ps(to, mask, values);
    }
}

VNNI void write_rows(const Task *task, int64_t from, int64_t to, int64_t block, int64_t blocks) {
    const QditLinear *linear = task->linear;
    const int64_t row = block * LANES, count = least(task->rows - row, blocks * LANES);
    for (int64_t c = from; c < to; c += LANES) {
        const float *acc = task->panel->acc + (c - from) * ACC_STEP;
        const __mmask16 mask = (__mmask16)((1u << least(to - c, LANES)) - 1);
        const __m512 bias =
            linear->bias ? _mm512_maskz_loadu_ps(mask, linear->bias + task->first + c)
                         : _mm512_setzero_ps();
        for (int64_t m = 0; m < count; m += LANES) {
            __m512i v[LANES];
            for (int i = 0; i < LANES; ++i) v[i] = _mm512_load_si512(acc + i * ACC_STEP + m);
            transpose(v);
            const int64_t last = least(count - m, LANES);
            float *y = task->y + (row + m) * linear->n + task->first + c;
            for (int i = 0; i < LANES; ++i)
                if (i < last)
                    write_lane(y + i * linear->n, _mm512_add_ps(_mm512_castsi512_ps(v[i]), bias),
                               mask, task->past);
        }
    }
}
