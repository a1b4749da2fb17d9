/* What this machine has for the products. */
#define _GNU_SOURCE
#include "product.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* arch_prctl's ARCH_REQ_XCOMP_PERM for the tiles' state, of the whole process. */
enum { REQUEST_STATE = 0x1023, TILE_DATA = 18 };

enum { HAS_XGETBV = 1 << 27, AVX512_STATE = 0xe6, HAS_VNNI = 1 << 11 };
static const unsigned HAS_AVX512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
static const unsigned HAS_TILES = 1u << 24 | 1u << 25;                        /* and their int8 */

static int find_units(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & HAS_XGETBV)) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & AVX512_STATE) != AVX512_STATE) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if ((b & HAS_AVX512) != HAS_AVX512 || !(c & HAS_VNNI)) return 0;
    if ((d & HAS_TILES) != HAS_TILES) return 1;
    return syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA) == 0 ? 2 : 1;
}

int qdit_units(void) {
#ifdef QDIT_EMULATED_TILES
    return find_units() > 0 ? 2 : 0;
#endif
    static _Atomic int units = -1; /* found twice at worst, with the same result */
    if (units < 0) units = find_units();
    return units;
}
