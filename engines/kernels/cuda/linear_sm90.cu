// y = (x scale_x) (w scale_w)ᵀ on Hopper's integer matrix units: warpgroup instructions on tiles that one
// warpgroup copies ahead in bulk, while the others multiply and promote in turn.
//
// Every operand lies in device memory as it will lie in shared memory, so that no tensor map is needed
// (a TensorRT plugin could not pass one): activations [K/128, rows, 128], 8-bit weights likewise,
// 4-bit weights [K/128, N/64, 4096 bytes] in the order of the register operand (layouts.py).
#define QDIT_HOPPER 1
#include "hopper_copies.cuh"
#include "hopper_sums.cuh"

extern "C" __global__ void __launch_bounds__(kThreads, 1) qdit_linear(
    const uint8* x, const float* token_scale, const float* token_sum, const float* token_zero, const uint8* w,
    const float* channel_scale, const float* channel_zero, const float* channel_sum, const uint8* multiplier,
    const uint16* bias, const uint16* residual, const uint16* gate, int tokens, int channels, int panels, int rows,
    int weight_rows, int token_group, int channel_group, int gate_stride, int image_tokens, uint16* out) {
    extern __shared__ __align__(1024) uint8 shared[];
    const uint32 base = shared_address(shared);
    const uint32 full = base + kBarriersAt, empty = full + kStages * 8;
    // the same for a whole warp, and the compiler is to know it
    const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0), thread = threadIdx.x % 128;
    const int channel_tiles = (channels + kChannels - 1) / kChannels;
    const int tiles = (tokens + kTokens - 1) / kTokens * channel_tiles;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            barrier_init(full + stage * 8, kCopyingWarps);
            barrier_init(empty + stage * 8, 4 * kColumns);
        }
        fence_barrier_init();
    }
    write_start(shared, threadIdx.x);
    __syncthreads();
    launch_dependents();

    if (warpgroup == kWarpgroups) {
        lower_registers<kProducerRegisters>();
        const Problem p{{x, token_scale, token_sum, token_zero, w, channel_scale, channel_zero, channel_sum,
                         multiplier, rows, weight_rows, token_group, channel_group},
                        panels, tiles, channel_tiles};
        produce_all(p, base, __shfl_sync(0xFFFFFFFFu, thread / 32, 0));
    } else {
        raise_registers<kConsumerRegisters>();
        wait_for_last_kernel();
        const int warp = thread / 32, lane = held(thread % 32);
        const int column = warpgroup / kSplits, part = warpgroup % kSplits;
        const Consumer own{shared, full, empty, descriptor_low(base + column * 8192),
                           descriptor_low(base + kWeightBytes), start_descriptor_low(base + kStartAt), warpgroup, column, part,
                           panels, thread, lane, held(column * 64 + warp * 16 + lane / 4)};
        uint8* staging = shared + kStagingAt + column * kStagingBytes;
        const Output output{bias, token_scale, channel_scale, residual, gate, gate_stride, image_tokens,
                            tokens, channels, out};
        if (kInTurn && warpgroup + 1 == kWarpgroups) pass_turn(warpgroup);  // the first turn is warpgroup 0's
        if (kSplits > 1 && part == 0) barrier_join(kTurnBarrier + 2 * column, 128 * kSplits);
        Place place;
        place.skip(part);
        TilePlace at(blockIdx.x, gridDim.x, channel_tiles);
        int d[kAccumulators];
        uint32 a[4][4];
        if constexpr (kOneAhead) begin_panel(d, a, own, place);
        int tile = blockIdx.x;
        do {
            const int token0 = at.token * kTokens;
            const int channel0 = at.channel * kChannels + column * 64;
#if QDIT_GATED
            for (int at = thread; at < kTokens; at += 128)
                if (token0 + at < tokens && channel0 < channels)
                    prefetch(residual + static_cast<long long>(token0 + at) * channels + channel0);
#endif
            float acc[kAccumulators];
            if constexpr (kPromotes) {
#pragma unroll
                for (int i = 0; i < kAccumulators; ++i) acc[i] = 0.0f;
            }
            bool whole = true;  // whether this warpgroup has the tile's sums in the end
            if constexpr (kPipelined) {
                accumulate_pipelined(acc, own, place);
            } else if constexpr (kOneAhead) {
                accumulate_one_ahead(acc, d, a, own, place, tile + gridDim.x < tiles);
                whole = gather(acc, own);
            } else if constexpr (kPromotes) {
                accumulate(acc, d, own, place);
            } else {
                accumulate_plain(d, own, place);
                whole = gather(d, own);
                if (whole) convert_all(acc, d);
            }
            if (whole) {
                finish(acc, output, token0, channel0, warp, lane);
                barrier_sync(1 + warpgroup, 128);  // the last tile has been read from the staging rows
                stage(staging, acc, warp, lane);
                barrier_sync(1 + warpgroup, 128);
                store_tile(staging, output, token0, channel0, thread);
            }
            tile += gridDim.x, at.next();
        } while (tile < tiles);
        if constexpr (kOneAhead) wgmma_wait<0>();
    }
}
