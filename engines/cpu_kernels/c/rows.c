/* Dynamic quantization of rows, in groups of k. */
#include "rows.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static pthread_key_t room_key;
static pthread_once_t room_once = PTHREAD_ONCE_INIT;
static __thread char *room;
static __thread size_t room_bytes;

static size_t aligned(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

static void make_room_key(void) { pthread_key_create(&room_key, free); }

char *thread_room(size_t bytes) {
    if (room_bytes < bytes) {
        pthread_once(&room_once, make_room_key);
        free(room);
        room = aligned_alloc(64, aligned(bytes));
        room_bytes = room ? aligned(bytes) : 0;
        pthread_setspecific(room_key, room); /* freed as the thread ends */
    }
    return room;
}

static int64_t blocks_of(int64_t rows) { return (ceil_div(rows, LANES) + 1) & ~(int64_t)1; }

Rows rows_in(const QditLinear *linear, int64_t rows, void *scratch) {
    Rows in = {.blocks = blocks_of(rows), .groups = linear->k / linear->group};
    char *at = scratch;
    in.q = (int8_t *)at;
    at += in.blocks * linear->k * LANES;
    in.scale = (float *)at;
    at += in.blocks * in.groups * LANES * (int64_t)sizeof(float);
    in.sum = (int32_t *)at;
    return in;
}

size_t qdit_scratch_bytes(const QditLinear *linear, int64_t rows) {
    const int64_t groups = linear->k / linear->group;
    return (size_t)(blocks_of(rows) * LANES * (linear->k + groups * 8));
}

int64_t qdit_quantize_jobs(const QditLinear *linear, int64_t rows) {
    (void)linear;
    return blocks_of(rows);
}

/* 16 numbers to integers, x / scale rounded half to even. A product by the inverse rounds as the
 * division does, except where it comes near a half. */
VNNI INLINE __m128i integers(__m512 x, __m512 inverse, __m512 scale) {
    __m512 ratio = _mm512_mul_ps(x, inverse);
    const __m512 whole = _mm512_roundscale_ps(ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 off = _mm512_abs_ps(_mm512_sub_ps(ratio, whole));
    const __mmask16 near = _mm512_cmp_ps_mask(off, _mm512_set1_ps(0.4999f), _CMP_NLT_UQ);
    if (__builtin_expect(near != 0, 0)) ratio = _mm512_div_ps(x, scale);
    return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(ratio));
}

/* max |x|, and what is no number where one of them is: as bits it is the largest. */
VNNI INLINE float largest(const float *x, int64_t count) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += LANES)
        most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x + k))));
    const uint32_t bits = _mm512_reduce_max_epu32(most);
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

/* One row's groups: bytes one after the other, scales 16 apart. */
VNNI static void quantize_row(const QditLinear *linear, const float *x, int8_t *q, float *scale) {
    const int64_t size = linear->group;
    for (int64_t g = 0; g < linear->k / size; ++g, x += size, q += size) {
        float s = largest(x, size) / 127.0f;
        if (s < 0x1p-24f) s = 0x1p-24f;
        scale[g * LANES] = s;
        const __m512 divisor = _mm512_set1_ps(s), inverse = _mm512_set1_ps(1.0f / s);
        for (int64_t k = 0; k < size; k += 16)
            _mm_store_si128((__m128i *)(q + k), integers(_mm512_loadu_ps(x + k), inverse, divisor));
    }
}

/* A block's bytes [16][step] into words of four k for 16 rows, and their sums by group. */
VNNI static void interleave(const QditLinear *linear, const int8_t *bytes, int64_t step, int8_t *q,
                            int32_t *sum) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t from = 0; from < linear->k; from += linear->group, sum += LANES) {
        __m512i sums = _mm512_setzero_si512();
        for (int64_t k = from; k < from + linear->group; k += 32) {
            __m512i v[LANES];
            for (int i = 0; i < LANES; ++i)
                v[i] = _mm512_castsi256_si512(
                    _mm256_load_si256((const __m256i *)(bytes + i * step + k)));
            transpose(v);
            for (int i = 0; i < 8; ++i) {
                _mm512_store_si512(q + (k + 4 * i) * LANES, v[i]);
                sums = _mm512_dpbusd_epi32(sums, ones, v[i]);
            }
        }
        _mm512_store_si512(sum, sums);
    }
}

int qdit_quantize_job(const QditLinear *linear, const float *x, int64_t rows, void *scratch,
                      int64_t job) {
    const Rows to = rows_in(linear, rows, scratch);
    const int64_t step = linear->k + 64, first = job * LANES;
    float *scale = to.scale + job * to.groups * LANES;
    int8_t *bytes = (int8_t *)thread_room((size_t)(LANES * step));
    if (bytes == NULL) return 1;
    for (int64_t i = 0; i < LANES; ++i) {
        if (first + i < rows) {
            quantize_row(linear, x + (first + i) * linear->stride, bytes + i * step, scale + i);
        } else {
            memset(bytes + i * step, 0, (size_t)linear->k);
            for (int64_t g = 0; g < to.groups; ++g) scale[g * LANES + i] = 0.0f;
        }
    }
    interleave(linear, bytes, step, to.q + job * linear->k * LANES,
               to.sum + job * to.groups * LANES);
    if (linear->sign)
        for (int64_t i = 0; i < to.groups * LANES; ++i) scale[i] *= linear->sign[i / LANES];
    return 0;
}
