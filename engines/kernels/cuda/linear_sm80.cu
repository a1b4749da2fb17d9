// y = (x scale_x) (w scale_w)ᵀ on the integer matrix units of Ampere and Ada (and of every later chip):
// warp instructions on tiles copied ahead asynchronously. Layouts and results are those of linear_sm90.cu.
#include "linear.cuh"

constexpr int kStages = QDIT_STAGES;
constexpr int kScaleBytes =
    (kTokenScales + kWeightZero + kInputZero) * kTokenScaleBytes +
    (kChannelScales + kWeightZero + kInputZero) * kChannelScaleBytes + kMultipliers * kMultiplierBytes;
constexpr int kStageBytes = kWeightBytes + kInputBytes + (kScaleBytes + 127) / 128 * 128;
static_assert(kStages * kStageBytes <= QDIT_SHARED_BYTES && kWarpgroups * kStagingBytes <= QDIT_SHARED_BYTES);
constexpr int kThreads = 128 * kWarpgroups;

__device__ __forceinline__ void copy16(uint32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int Pending>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// `bytes`, a multiple of 16, by the whole block.
__device__ __forceinline__ void copy_block(uint32 to, const void* from, int bytes) {
    for (int at = threadIdx.x * 16; at < bytes; at += kThreads * 16)
        copy16(to + at, static_cast<const uint8*>(from) + at);
}

__device__ __forceinline__ const void* row_of(const float* from, long long row, int stride, int first) {
    return from + row * stride + first;
}

__device__ __forceinline__ void load_panel(
    const Operands& p, uint32 base, int panel, int token0, int channel0, int tokens, int channels) {
    constexpr int kRowBytes = kFourBits ? 64 : 128;
    copy_block(base, p.w + (static_cast<long long>(panel) * p.weight_rows + channel0) * kRowBytes, channels * kRowBytes);
    copy_block(base + kWeightBytes, p.x + (static_cast<long long>(panel) * p.rows + token0) * kPanel, tokens * kPanel);
    const uint32 scales = base + kWeightBytes + kInputBytes;
#pragma unroll
    for (int part = 0; part < kSegments; ++part) {
        const int segment = kSegments > 1 ? panel * kSegments + part : panel / kSegmentPanels;
        const int token_row = segment / p.token_group, channel_row = segment / p.channel_group;
        const uint32 token_at = part * kTokens * 4, channel_at = part * kChannels * 4;
        uint32 to = scales;
        if constexpr (kTokenScales) {
            copy_block(to + token_at, row_of(p.token_scale, token_row, p.rows, token0), tokens * 4);
            to += kTokenScaleBytes;
        }
        if constexpr (kChannelScales) {
            copy_block(to + channel_at, row_of(p.channel_scale, channel_row, p.weight_rows, channel0), channels * 4);
            to += kChannelScaleBytes;
        }
        if constexpr (kWeightZero) {
            copy_block(to + token_at, row_of(p.token_sum, segment, p.rows, token0), tokens * 4);
            to += kTokenScaleBytes;
            copy_block(to + channel_at, row_of(p.channel_zero, channel_row, p.weight_rows, channel0), channels * 4);
            to += kChannelScaleBytes;
        }
        if constexpr (kInputZero) {
            copy_block(to + token_at, row_of(p.token_zero, token_row, p.rows, token0), tokens * 4);
            to += kTokenScaleBytes;
            copy_block(to + channel_at, row_of(p.channel_sum, segment, p.weight_rows, channel0), channels * 4);
            to += kChannelScaleBytes;
        }
        if constexpr (kMultipliers)
            copy_block(to + part * kChannels, p.multiplier + static_cast<long long>(channel_row) * p.weight_rows + channel0, channels);
    }
}

__device__ __forceinline__ Scales scales_at(const uint8* bytes, int part) {
    Scales scales{};
    const float* at = reinterpret_cast<const float*>(bytes);
    if constexpr (kTokenScales) scales.token_scale = at + part * kTokens, at += kTokenScaleBytes / 4;
    if constexpr (kChannelScales) scales.channel_scale = at + part * kChannels, at += kChannelScaleBytes / 4;
    if constexpr (kWeightZero) {
        scales.token_sum = at + part * kTokens, at += kTokenScaleBytes / 4;
        scales.channel_zero = at + part * kChannels, at += kChannelScaleBytes / 4;
    }
    if constexpr (kInputZero) {
        scales.token_zero = at + part * kTokens, at += kTokenScaleBytes / 4;
        scales.channel_sum = at + part * kChannels, at += kChannelScaleBytes / 4;
    }
    return scales;
}

__device__ __forceinline__ void promote_segment(
    float (&acc)[kAccumulators], const int (&d)[kAccumulators], const Scales& scales, int row, int lane) {
    OwnScales own;
    load_channels(own, scales, row);
    load_tokens(own, scales, lane);
    promote(acc, d, own, scales, lane);
}

__device__ __forceinline__ void multiply_step(
    int (&d)[kAccumulators], const uint32 (&a)[4], uint32 inputs, int step, int lane) {
    const int matrix = lane >> 3, row = lane & 7;
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 2) {
        uint32 b[4];
        const int token = min(j + (matrix >> 1), kTokens / 8 - 1) * 8 + row;
        load_matrix_x4(b, inputs + token * kPanel + (((2 * step + (matrix & 1)) ^ row) << 4));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (j + half >= kTokens / 8) break;
            int* own = d + 4 * (j + half);
            asm volatile(
                "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                : "+r"(own[0]), "+r"(own[1]), "+r"(own[2]), "+r"(own[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * half]), "r"(b[2 * half + 1]));
        }
    }
}

// The transposed tile into rows of tokens.
__device__ __forceinline__ void stage(uint8* staging, const float (&acc)[kAccumulators], int warp, int lane) {
    const int channel = warp * 16 + (lane >> 2), token = (lane & 3) * 2;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
        const uint32 low = pack_halves(acc[4 * j], acc[4 * j + 1]);
        const uint32 high = pack_halves(acc[4 * j + 2], acc[4 * j + 3]);
        uint16* at = reinterpret_cast<uint16*>(staging + (8 * j + token) * kStagingRow) + channel;
        at[0] = static_cast<uint16>(low), at[8] = static_cast<uint16>(high);
        at = reinterpret_cast<uint16*>(staging + (8 * j + token + 1) * kStagingRow) + channel;
        at[0] = static_cast<uint16>(low >> 16), at[8] = static_cast<uint16>(high >> 16);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) qdit_linear(
    const uint8* x, const float* token_scale, const float* token_sum, const float* token_zero,
    const uint8* w, const float* channel_scale, const float* channel_zero, const float* channel_sum,
    const uint8* multiplier, const uint16* bias, const uint16* residual, const uint16* gate, int tokens,
    int channels, int panels, int rows, int weight_rows, int token_group, int channel_group,
    int gate_stride, int image_tokens, uint16* out) {
    extern __shared__ __align__(1024) uint8 shared[];
    launch_dependents();
    wait_for_last_kernel();
    const uint32 base = shared_address(shared);
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    const int warp = thread / 32, lane = thread % 32;
    const int row = warpgroup * 64 + warp * 16 + lane / 4;
    const int channel_tiles = (channels + kChannels - 1) / kChannels;
    const int token0 = blockIdx.x / channel_tiles * kTokens;
    const int channel0 = blockIdx.x % channel_tiles * kChannels;
    const int own_tokens = min(kTokens, rows - token0), own_channels = min(kChannels, weight_rows - channel0);
    const Operands p{x, token_scale, token_sum, token_zero, w, channel_scale, channel_zero, channel_sum,
                     multiplier, rows, weight_rows, token_group, channel_group};

#pragma unroll
    for (int panel = 0; panel < kStages - 1; ++panel) {
        if (panel < panels) load_panel(p, base + panel * kStageBytes, panel, token0, channel0, own_tokens, own_channels);
        copy_commit();
    }
    float acc[kAccumulators];
    int d[kAccumulators];
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) acc[i] = 0.0f, d[i] = 0;
    int summed = 0;
    for (int panel = 0; panel < panels; ++panel) {
        copy_wait<kStages - 2>();
        __syncthreads();
        const int ahead = panel + kStages - 1;
        if (ahead < panels)
            load_panel(p, base + ahead % kStages * kStageBytes, ahead, token0, channel0, own_tokens, own_channels);
        copy_commit();
        const int at = panel % kStages * kStageBytes;
        const uint8* scales = shared + at + kWeightBytes + kInputBytes;
        const uint8* multipliers =
            scales + kScaleBytes - kMultipliers * kMultiplierBytes;
        uint4 packed[2] = {};
        if constexpr (kFourBits) {
            const uint4* own = reinterpret_cast<const uint4*>(shared + at + warpgroup * 4096);
            packed[0] = own[thread], packed[1] = own[128 + thread];
        }
        const uint32 words[8] = {packed[0].x, packed[0].y, packed[0].z, packed[0].w,
                                 packed[1].x, packed[1].y, packed[1].z, packed[1].w};
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            uint32 a[4];
            if constexpr (kFourBits) {
                uint32 low = 0, high = 0;
                if constexpr (kMultipliers) {
                    const uint8* own = multipliers + step * kSegments / 4 * kChannels;
                    low = own[row], high = own[row + 8];
                }
                unpack_nibbles(a, words[2 * step], words[2 * step + 1], low, high);
            } else {
                const int matrix = lane >> 3, line = lane & 7;
                const int channel = warpgroup * 64 + warp * 16 + (matrix & 1) * 8 + line;
                load_matrix_x4(a, base + at + channel * kPanel + (((2 * step + (matrix >> 1)) ^ line) << 4));
            }
            multiply_step(d, a, base + at + kWeightBytes, step, lane);
            if constexpr (kPromotes && kSegments > 1) {
                if ((step + 1) * kSegments % 4 == 0) {
                    promote_segment(acc, d, scales_at(scales, step * kSegments / 4), row, lane);
#pragma unroll
                    for (int i = 0; i < kAccumulators; ++i) d[i] = 0;
                }
            }
        }
        if constexpr (kPromotes && kSegments == 1) {
            if (++summed == kSegmentPanels) {
                summed = 0;
                promote_segment(acc, d, scales_at(scales, 0), row, lane);
#pragma unroll
                for (int i = 0; i < kAccumulators; ++i) d[i] = 0;
            }
        }
    }
    copy_wait<0>();
    __syncthreads();  // the stages become the staging rows
    if constexpr (!kPromotes) convert_all(acc, d);
    const Output output{bias, token_scale, channel_scale, residual, gate, gate_stride, image_tokens,
                        tokens, channels, out};
    uint8* staging = shared + warpgroup * kStagingBytes;
    finish(acc, output, token0, channel0 + warpgroup * 64, warp, lane);
    stage(staging, acc, warp, lane);
    barrier_sync(1 + warpgroup, 128);
    store_tile(staging, output, token0, channel0 + warpgroup * 64, thread);
}
