#include "panel.h"

static int zero_of(const QditLinear *linear, int64_t groups, int64_t channel, int64_t group) {
    if (!linear->zero_point) return 1 << (linear->bits - 1);
    if (linear->bits == 8) return linear->zero_point[channel * groups + group];
    return linear->zero_point[channel * ((groups + 1) / 2) + group / 2] >> (group % 2 * 4) & 15;
}

/* `width` integers of a channel from k on, 64 or 32. */
VNNI INLINE __m512i integers_at(const QditLinear *linear, const uint8_t *from, int64_t k,
                                int64_t width) {
    const __mmask64 all = ~(__mmask64)0 >> (64 - width);
    if (linear->bits == 8) return _mm512_maskz_loadu_epi8(all, from + k);
    const __mmask32 half = (__mmask32)(all >> width / 2);
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(half, from + k / 2));
    const __m512i both = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
    return _mm512_and_si512(both, _mm512_set1_epi8(15));
}

/* A channel's integers, less their zero points with `less_zero`; false where one did not fit. */
VNNI static int read_weights(const QditLinear *linear, const Panel *to, const uint8_t *from,
                             int64_t place, int less_zero) {
    const int64_t size = linear->group, width = size % 64 ? 32 : 64;
    const __mmask64 all = ~(__mmask64)0 >> (64 - width);
    __mmask64 wrong = 0;
    for (int64_t k = 0, g = 0; k < linear->k; ++g) {
        const int zero = less_zero ? to->zero[g * CHANNELS + place] : 0;
        const __m512i by = _mm512_set1_epi8((char)zero);
        for (const int64_t end = k + size; k < end; k += width) {
            const __m512i u = integers_at(linear, from, k, width);
            const __m512i less = _mm512_sub_epi8(u, by);
            /* it fits where the difference is negative just where u is below */
            wrong |= _mm512_movepi8_mask(less) ^ _mm512_cmplt_epu8_mask(u, by);
            _mm512_mask_storeu_epi8(weight_at(to, place, k), all, less);
        }
    }
    return !less_zero || (wrong & all) == 0;
}

/* Scales and zero points; channels beyond the last have a scale of 0 and the first one's zero. */
static void read_scales(const QditLinear *linear, Panel *to, int64_t first, int64_t channels) {
    const int64_t groups = linear->k / linear->group;
    for (int64_t g = 0; g < groups; ++g) {
        float *scale = to->scale + g * CHANNELS;
        int32_t *zero = to->zero + g * CHANNELS;
        to->same[g] = 1;
        for (int64_t c = 0; c < CHANNELS; ++c) {
            const int64_t channel = first + (c < channels ? c : 0);
            scale[c] = c < channels ? linear->scale[channel * groups + g] : 0.0f;
            zero[c] = zero_of(linear, groups, channel, g);
            to->same[g] &= zero[c] == zero[0];
        }
    }
}

static int read_all_weights(const QditLinear *linear, const Panel *to, int64_t first,
                            int64_t channels, int less_zero) {
    int fit = 1;
    for (int64_t c = 0; c < CHANNELS; ++c) {
        const int64_t channel = first + (c < channels ? c : 0);
        const uint8_t *from = linear->weight + channel * linear->k * linear->bits / 8;
        fit &= read_weights(linear, to, from, c, less_zero);
    }
    return fit;
}

Panel panel_of(const QditLinear *linear, int64_t first, int64_t channels, int tile_shift) {
    const int64_t groups = linear->k / linear->group;
    const int tiled = tile_shift != WHOLE_ROWS;
    Panel made = {.step = tiled ? 1 << tile_shift : linear->k + 64, .shift = tile_shift};
    const size_t bytes = (size_t)(CHANNELS * (linear->k + 64));
    const size_t small = (size_t)(groups * CHANNELS * 4), sums = CHANNELS * ACC_STEP * 4;
    char *at = thread_room(bytes + 2 * small + sums + (size_t)groups);
    if (!at) return made;
    made.w = (uint8_t *)at;
    made.scale = (float *)(at += bytes);
    made.zero = (int32_t *)(at += small);
    made.acc = (float *)(at += small);
    made.same = (uint8_t *)(at + sums);
    read_scales(linear, &made, first, channels);
    made.is_signed = tiled && read_all_weights(linear, &made, first, channels, 1);
    if (!made.is_signed) read_all_weights(linear, &made, first, channels, 0);
    return made;
}
