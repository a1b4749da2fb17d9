// y = (x scale_x) (w scale_w)ᵀ on Hopper's integer matrix units: warpgroup instructions on tiles that one
// warp copies ahead in bulk, while the other warpgroups multiply and promote in turn.
//
// Every operand lies in device memory as it will lie in shared memory, so that no tensor map is needed
// (a TensorRT plugin could not pass one): activations [K/128, rows, 128], 8-bit weights likewise,
// 4-bit weights [K/128, N/64, 4096 bytes] in the order of the register operand (layouts.py).
#include "linear.cuh"
#if QDIT_OUT_GROUP
#include "quantized_output.cuh"
#endif
#include "wgmma.cuh"  // generated for QDIT_TILE_TOKENS: wgmma_shared, wgmma_registers

constexpr int kStages = QDIT_STAGES;
constexpr int kCluster = QDIT_CLUSTER;  // blocks that share each activation tile
// Two panels in flight for each warpgroup: it promotes one while the next one is multiplied. Takes
// twice the integer accumulators.
constexpr bool kPipelined = QDIT_PIPELINED;
constexpr int kWeightBytes = kFourBits ? kChannels * 64 : kChannels * 128;
constexpr int kInputBytes = kTokens * kPanel;
constexpr int kTokenScaleBytes = kSegments * kTokens * 4;
constexpr int kChannelScaleBytes = kSegments * kChannels * 4;
constexpr int kMultiplierBytes = kSegments * kChannels;
constexpr int kScaleBytes =
    (kTokenScales + kWeightZero + kInputZero) * kTokenScaleBytes +
    (kChannelScales + kWeightZero + kInputZero) * kChannelScaleBytes + kMultipliers * kMultiplierBytes;
constexpr int kScalesAt = kStages * (kWeightBytes + kInputBytes);
constexpr int kStagingAt = kScalesAt + (kStages * kScaleBytes + 127) / 128 * 128;
constexpr int kBarriersAt = kStagingAt + kWarpgroups * kStagingBytes;
constexpr int kThreads = 128 * (kWarpgroups + 1);
constexpr int kConsumerRegisters = kWarpgroups == 2 ? 232 : kWarpgroups == 3 ? 160 : 240;
constexpr int kProducerRegisters = kWarpgroups == 2 ? 40 : kWarpgroups == 3 ? 32 : 24;

struct Place {
    int stage = 0;
    uint32 phase = 0;
    __device__ __forceinline__ void next() {
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
};

struct Problem {
    const uint8* x;
    const float* token_scale;
    const float* token_sum;
    const float* token_zero;
    const uint8* w;
    const float* channel_scale;
    const float* channel_zero;
    const float* channel_sum;
    const uint8* multiplier;
    int panels;          // K / 128
    int rows;            // tokens rounded up to a multiple of 8
    int weight_rows;     // channels rounded up to a multiple of 64
    int token_group;     // segments that share a token scale
    int channel_group;   // segments that share a channel scale or multiplier
    int segment_panels;  // panels summed before a promotion
    int tiles;           // of the whole cluster
    int channel_tiles;   // of the whole cluster, along N
};

__device__ __forceinline__ void copy_rows(
    uint32 to, const float* from, long long row, int stride, int first, int count, uint32 barrier) {
    bulk_copy(to, from + row * stride + first, count * 4, barrier);
}

__device__ __forceinline__ void produce(const Problem& p, uint32 base, uint32 rank) {
    const uint32 full = base + kBarriersAt, empty = full + kStages * 8;
    Place place;
    for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += gridDim.x / kCluster) {
        const int token0 = tile / p.channel_tiles * kTokens;
        const int channel0 = (tile % p.channel_tiles * kCluster + static_cast<int>(rank)) * kChannels;
        const int tokens = min(kTokens, p.rows - token0);
        const int channels = max(0, min(kChannels, p.weight_rows - channel0));
        constexpr int kShare = kTokens / kCluster;
        const int first = rank * kShare, share = max(0, min(kShare, tokens - first));
        const uint32 bytes =
            tokens * kPanel + channels * (kFourBits ? 64 : 128) +
            (kTokenScales + kWeightZero + kInputZero) * kSegments * tokens * 4 +
            (kChannelScales + kWeightZero + kInputZero) * kSegments * channels * 4 +
            kMultipliers * kSegments * channels;
        for (int panel = 0; panel < p.panels; ++panel, place.next()) {
            const uint32 ready = full + place.stage * 8;
            barrier_wait(empty + place.stage * 8, place.phase ^ 1);
            barrier_expect(ready, bytes);
            const uint32 weights = base + place.stage * (kWeightBytes + kInputBytes);
            if (channels > 0)
                bulk_copy(weights, p.w + (static_cast<long long>(panel) * p.weight_rows + channel0) * (kFourBits ? 64 : 128),
                          channels * (kFourBits ? 64 : 128), ready);
            const uint8* from = p.x + (static_cast<long long>(panel) * p.rows + token0 + first) * kPanel;
            const uint32 inputs = weights + kWeightBytes + first * kPanel;
            if constexpr (kCluster == 1) {
                bulk_copy(inputs, from, share * kPanel, ready);
            } else if (share > 0) {
                bulk_copy_multicast(inputs, from, share * kPanel, ready, (1u << kCluster) - 1);
            }
            uint32 scales = base + kScalesAt + place.stage * kScaleBytes;
#pragma unroll
            for (int part = 0; part < kSegments; ++part) {
                const int segment = kSegments > 1 ? panel * kSegments + part : panel / p.segment_panels;
                const int token_row = segment / p.token_group, channel_row = segment / p.channel_group;
                uint32 to = scales;
                if constexpr (kTokenScales) {
                    copy_rows(to + part * kTokens * 4, p.token_scale, token_row, p.rows, token0, tokens, ready);
                    to += kTokenScaleBytes;
                }
                if constexpr (kChannelScales) {
                    if (channels > 0)
                        copy_rows(to + part * kChannels * 4, p.channel_scale, channel_row, p.weight_rows, channel0, channels, ready);
                    to += kChannelScaleBytes;
                }
                if constexpr (kWeightZero) {
                    copy_rows(to + part * kTokens * 4, p.token_sum, segment, p.rows, token0, tokens, ready);
                    to += kTokenScaleBytes;
                    if (channels > 0)
                        copy_rows(to + part * kChannels * 4, p.channel_zero, channel_row, p.weight_rows, channel0, channels, ready);
                    to += kChannelScaleBytes;
                }
                if constexpr (kInputZero) {
                    copy_rows(to + part * kTokens * 4, p.token_zero, token_row, p.rows, token0, tokens, ready);
                    to += kTokenScaleBytes;
                    if (channels > 0)
                        copy_rows(to + part * kChannels * 4, p.channel_sum, segment, p.weight_rows, channel0, channels, ready);
                    to += kChannelScaleBytes;
                }
                if constexpr (kMultipliers) {
                    if (channels > 0)
                        bulk_copy(to + part * kChannels,
                                  p.multiplier + static_cast<long long>(channel_row) * p.weight_rows + channel0, channels, ready);
                }
            }
        }
    }
}

// The scales of one segment of the stage at `bytes`.
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

__device__ __forceinline__ const uint8* multipliers_at(const uint8* bytes, int part) {
    return bytes + (kTokenScales + kWeightZero + kInputZero) * kTokenScaleBytes +
           (kChannelScales + kWeightZero + kInputZero) * kChannelScaleBytes + part * kChannels;
}

// Matrix instructions `from` … `to` of one panel into d; the first one starts anew unless `accumulate`.
template <int From, int To>
__device__ __forceinline__ void multiply(
    int (&d)[kAccumulators], uint32 weights, uint32 inputs, const uint32 (&a)[4][4], bool accumulate) {
    wgmma_fence();
#pragma unroll
    for (int step = From; step < To; ++step) {
        const uint64 input = panel_descriptor(inputs + step * kStep);
        const int keep = step > From || accumulate;
        if constexpr (kFourBits) {
            wgmma_registers(d, a[step], input, keep);
        } else {
            wgmma_shared(d, panel_descriptor(weights + step * kStep), input, keep);
        }
    }
    wgmma_commit();
}

// All four steps' register operands: 32 bytes a thread of the warpgroup's 4096.
__device__ __forceinline__ void unpack_panel(
    uint32 (&a)[4][4], const uint8* weights, const uint8* multipliers, int thread, int channel) {
    const uint4 first = reinterpret_cast<const uint4*>(weights)[thread];
    const uint4 second = reinterpret_cast<const uint4*>(weights)[128 + thread];
    const uint32 words[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        uint32 low = 0, high = 0;
        if constexpr (kMultipliers) {
            const uint8* own = multipliers + step * kSegments / 4 * kChannels;
            low = own[channel], high = own[channel + 8];
        }
        unpack_nibbles(a[step], words[2 * step], words[2 * step + 1], low, high);
    }
}

// This warp has read all it needs of a stage.
__device__ __forceinline__ void release(uint32 empty, int lane) {
    __syncwarp();
    if constexpr (kCluster == 1) {
        if (lane == 0) barrier_arrive(empty);
    } else {
        if (lane < kCluster) barrier_arrive_cluster(empty, lane);
    }
}

template <bool Apart>
__device__ __forceinline__ auto& pick_accumulators(int (&one)[kAccumulators], int (&other)[Apart ? kAccumulators : 1]) {
    if constexpr (Apart) {
        return other;
    } else {
        return one;
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
#if QDIT_CLUSTER > 1
    __cluster_dims__(QDIT_CLUSTER, 1, 1)
#endif
    qdit_linear(
        const uint8* x, const float* token_scale, const float* token_sum, const float* token_zero,
        const uint8* w, const float* channel_scale, const float* channel_zero, const float* channel_sum,
        const uint8* multiplier, const uint16* bias, const uint16* residual, const uint16* gate,
        int tokens, int channels, int panels, int rows, int weight_rows, int token_group,
        int channel_group, int segment_panels, int gate_stride, int image_tokens, uint8* out,
        float* out_scale) {
    extern __shared__ __align__(1024) uint8 shared[];
    const uint32 base = shared_address(shared);
    const uint32 full = base + kBarriersAt, empty = full + kStages * 8;
    const uint32 rank = kCluster > 1 ? cluster_rank() : 0;
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    constexpr int kClusterChannels = kChannels * kCluster;
    const int channel_tiles = (channels + kClusterChannels - 1) / kClusterChannels;
    const int tiles = (tokens + kTokens - 1) / kTokens * channel_tiles;
    const Problem p{x, token_scale, token_sum, token_zero, w, channel_scale, channel_zero, channel_sum,
                    multiplier, panels, rows, weight_rows, token_group, channel_group, segment_panels,
                    tiles, channel_tiles};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            barrier_init(full + stage * 8, 1);
            barrier_init(empty + stage * 8, 4 * kWarpgroups * kCluster);
        }
        fence_barrier_init();
    }
    __syncthreads();
    if constexpr (kCluster > 1) cluster_sync();

    if (warpgroup == kWarpgroups) {
        lower_registers<kProducerRegisters>();
        if (thread == 0) produce(p, base, rank);
    } else {
        raise_registers<kConsumerRegisters>();
        const int warp = thread / 32, lane = thread % 32;
        const int row = warpgroup * 64 + warp * 16 + lane / 4;  // this thread's lower channel in the tile
        uint8* staging = shared + kStagingAt + warpgroup * kStagingBytes;
        const Output output{bias, token_scale, channel_scale, residual, gate, gate_stride, image_tokens,
                            tokens, channels, reinterpret_cast<uint16*>(out)};
        Place place, ahead;  // the oldest panel in use, and the next one to multiply
        for (int tile = blockIdx.x / kCluster; tile < tiles; tile += gridDim.x / kCluster) {
            const int token0 = tile / channel_tiles * kTokens;
            const int channel0 = (tile % channel_tiles * kCluster + static_cast<int>(rank)) * kChannels;
            float acc[kAccumulators];
            int d[kAccumulators];
            if constexpr (kPromotes) {
#pragma unroll
                for (int i = 0; i < kAccumulators; ++i) acc[i] = 0.0f;
            }
            if constexpr (kPipelined) {
                int other_d[kPromotes ? kAccumulators : 1];
                uint32 a[4][4], other_a[4][4];
                int(&second)[kAccumulators] = pick_accumulators<kPromotes>(d, other_d);
                const auto issue = [&](int(&to)[kAccumulators], uint32(&operand)[4][4], bool accumulate) {
                    const int at = ahead.stage * (kWeightBytes + kInputBytes);
                    barrier_wait(full + ahead.stage * 8, ahead.phase);
                    if constexpr (kFourBits)
                        unpack_panel(operand, shared + at + warpgroup * 4096,
                                     multipliers_at(shared + kScalesAt + ahead.stage * kScaleBytes, 0), thread, row);
                    multiply<0, 4>(to, base + at + warpgroup * (kFourBits ? 4096 : 8192), base + at + kWeightBytes, operand, accumulate);
                    ahead.next();
                };
                const auto retire = [&](const int(&from)[kAccumulators]) {
                    if constexpr (kPromotes)
                        promote(acc, from, scales_at(shared + kScalesAt + place.stage * kScaleBytes, 0), row, lane);
                    release(empty + place.stage * 8, lane);
                    place.next();
                };
                issue(d, a, false);
                int panel = 1;
                for (; panel + 1 < panels; panel += 2) {
                    issue(second, other_a, !kPromotes);
                    wgmma_wait<1>();
                    retire(d);
                    issue(d, a, !kPromotes);
                    wgmma_wait<1>();
                    retire(second);
                }
                if (panel < panels) {
                    issue(second, other_a, !kPromotes);
                    wgmma_wait<1>();
                    retire(d);
                    wgmma_wait<0>();
                    retire(second);
                } else {
                    wgmma_wait<0>();
                    retire(d);
                }
            }
            int summed = 0;  // panels in d since the last promotion
            for (int panel = 0; !kPipelined && panel < panels; ++panel, place.next()) {
                const int at = place.stage * (kWeightBytes + kInputBytes);
                const uint32 weights = base + at + warpgroup * (kFourBits ? 4096 : 8192);
                const uint32 inputs = base + at + kWeightBytes;
                const uint8* scales = shared + kScalesAt + place.stage * kScaleBytes;
                barrier_wait(full + place.stage * 8, place.phase);
                uint32 a[4][4];
                if constexpr (kFourBits)
                    unpack_panel(a, shared + at + warpgroup * 4096, multipliers_at(scales, 0), thread, row);
                if constexpr (!kPromotes) {
                    multiply<0, 4>(d, weights, inputs, a, panel > 0);
                    wgmma_wait<0>();
                } else if constexpr (kSegments == 1) {
                    multiply<0, 4>(d, weights, inputs, a, summed > 0);
                    wgmma_wait<0>();
                    if (++summed == segment_panels) {
                        summed = 0;
                        promote(acc, d, scales_at(scales, 0), row, lane);
                    }
                } else if constexpr (kSegments == 2) {
                    multiply<0, 2>(d, weights, inputs, a, false);
                    wgmma_wait<0>();
                    promote(acc, d, scales_at(scales, 0), row, lane);
                    multiply<2, 4>(d, weights, inputs, a, false);
                    wgmma_wait<0>();
                    promote(acc, d, scales_at(scales, 1), row, lane);
                } else {
                    multiply<0, 1>(d, weights, inputs, a, false);
                    wgmma_wait<0>();
                    promote(acc, d, scales_at(scales, 0), row, lane);
                    multiply<1, 2>(d, weights, inputs, a, false);
                    wgmma_wait<0>();
                    promote(acc, d, scales_at(scales, 1), row, lane);
                    multiply<2, 3>(d, weights, inputs, a, false);
                    wgmma_wait<0>();
                    promote(acc, d, scales_at(scales, 2), row, lane);
                    multiply<3, 4>(d, weights, inputs, a, false);
                    wgmma_wait<0>();
                    promote(acc, d, scales_at(scales, 3), row, lane);
                }
                release(empty + place.stage * 8, lane);
            }
            if constexpr (!kPromotes) {
#pragma unroll
                for (int i = 0; i < kAccumulators; ++i) acc[i] = __int2float_rn(d[i]);
            }
            finish(acc, output, token0, channel0 + warpgroup * 64, warp, lane);
#if QDIT_OUT_GROUP
            constexpr int kExtrasAt = kBarriersAt + 2 * kStages * 8 + 64;
            float* maxima = reinterpret_cast<float*>(shared + kExtrasAt);
            float2* own = reinterpret_cast<float2*>(shared + kExtrasAt + kMaximaBytes) + warpgroup * kGroupsHere * kTokens;
            quantize_tile(acc, staging, maxima, own, output, {out, out_scale, rows}, token0,
                          channel0 + warpgroup * 64, warpgroup, thread);
#else
            stage_pairs(staging, acc, warp, lane);
            barrier_sync(1 + warpgroup, 128);
            store_tile(staging, output, token0, channel0 + warpgroup * 64, thread);
#endif
            barrier_sync(1 + warpgroup, 128);  // the next tile reuses the staging rows
        }
    }
    if constexpr (kCluster > 1) cluster_sync();  // no block may leave while another can still write to it
}
