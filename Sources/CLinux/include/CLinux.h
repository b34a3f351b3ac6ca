// What Swift cannot import: inline functions of liburing, ioctl numbers, CPU instructions.
#ifndef CLINUX_H
#define CLINUX_H

#include <stddef.h>
#include <stdint.h>

/// CRC-32C (Castagnoli, reflected) of `length` bytes, with the usual final inversion:
/// clinux_crc32c("123456789", 9) is 0xE3069283.
uint32_t clinux_crc32c(const void *bytes, size_t length);

#endif
