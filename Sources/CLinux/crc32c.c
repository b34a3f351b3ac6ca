// CRC-32C by the CPU's instruction where it has one, else by table.
#include "CLinux.h"
#include <string.h>

static uint32_t table[256];

__attribute__((constructor)) static void make_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ ((crc & 1) ? 0x82F63B78u : 0);
        table[i] = crc;
    }
}

static uint32_t by_table(uint32_t crc, const uint8_t *p, size_t n) {
    while (n--) crc = (crc >> 8) ^ table[(crc ^ *p++) & 0xff];
    return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t by_instruction(
    uint32_t crc, const uint8_t *p, size_t n) {
    uint64_t wide = crc;
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    crc = (uint32_t)wide;
    while (n--) crc = __builtin_ia32_crc32qi(crc, *p++);
    return crc;
}
static int have_instruction(void) { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
static uint32_t by_instruction(uint32_t crc, const uint8_t *p, size_t n) {
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        crc = __crc32cd(crc, word);
    }
    while (n--) crc = __crc32cb(crc, *p++);
    return crc;
}
static int have_instruction(void) { return 1; }
#else
static uint32_t by_instruction(uint32_t crc, const uint8_t *p, size_t n) {
    return by_table(crc, p, n);
}
static int have_instruction(void) { return 0; }
#endif

uint32_t clinux_crc32c(const void *bytes, size_t length) {
    uint32_t crc = 0xFFFFFFFFu;
    crc = have_instruction() ? by_instruction(crc, bytes, length) : by_table(crc, bytes, length);
    return ~crc;
}
