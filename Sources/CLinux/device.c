// Files, block devices, and settings of the process.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "CLinux.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

// MARK: - Files

_Static_assert(
    CLINUX_KEEP_SIZE == FALLOC_FL_KEEP_SIZE && CLINUX_PUNCH_HOLE == FALLOC_FL_PUNCH_HOLE
        && CLINUX_ZERO_RANGE == FALLOC_FL_ZERO_RANGE
        && CLINUX_SEEK_DATA == SEEK_DATA,
    "constants that Swift sees");

int clinux_set_direct(int fd, bool direct) {
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0) return -errno;
    flags = direct ? flags | O_DIRECT : flags & ~O_DIRECT;
    return fcntl(fd, F_SETFL, flags) == 0 ? 0 : -errno;
}

// Own copy of statx's tail: Debian 12's glibc has the call without these fields, and the kernel's
// header that has them cannot be included beside glibc's.
enum { STATX_DIOALIGN_BIT = 0x2000, STATX_BYTES = 256 };
union statx_answer {
    uint8_t bytes[STATX_BYTES];
    struct {
        uint32_t mask;
        uint8_t other[148];
        uint32_t direct_memory_align;  // at 152
        uint32_t direct_offset_align;  // at 156
    } fields;
};
_Static_assert(
    offsetof(union statx_answer, fields.direct_memory_align) == 152, "layout of struct statx");

int clinux_direct_alignment(int fd, uint32_t *memory, uint32_t *offset) {
    union statx_answer answer = {{0}};
    if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, STATX_DIOALIGN_BIT, &answer) != 0) return -errno;
    if (!(answer.fields.mask & STATX_DIOALIGN_BIT)) return -EOPNOTSUPP;
    *memory = answer.fields.direct_memory_align;
    *offset = answer.fields.direct_offset_align;
    return 0;
}

uint32_t clinux_major(uint64_t device) { return major(device); }
uint32_t clinux_minor(uint64_t device) { return minor(device); }

bool clinux_is_in_memory(int fd) {
    struct statfs system;
    if (fstatfs(fd, &system) != 0) return false;
    return system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC;
}

int clinux_allocate(int fd, int mode, uint64_t offset, uint64_t length) {
    while (fallocate(fd, mode, (off_t)offset, (off_t)length) != 0)
        if (errno != EINTR) return -errno;
    return 0;
}

ptrdiff_t clinux_write_vectors(int fd, const void *vectors, int count, uint64_t offset) {
    ssize_t result;
    do result = pwritev(fd, vectors, count, (off_t)offset);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : result;
}

// MARK: - Block devices

int clinux_block_size(int fd, uint64_t *bytes) {
    return ioctl(fd, BLKGETSIZE64, bytes) == 0 ? 0 : -errno;
}

int clinux_block_sector(int fd, uint32_t *bytes) {
    int size = 0;
    if (ioctl(fd, BLKSSZGET, &size) != 0) return -errno;
    *bytes = (uint32_t)size;
    return 0;
}

int clinux_block_discard(int fd, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    return ioctl(fd, BLKDISCARD, range) == 0 ? 0 : -errno;
}

int clinux_block_zero(int fd, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    return ioctl(fd, BLKZEROOUT, range) == 0 ? 0 : -errno;
}

// MARK: - Process

int clinux_set_io_flusher(void) {
    return prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0 ? 0 : -errno;
}

int clinux_lock_memory(void) {
    return mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) == 0 ? 0 : -errno;
}

void *clinux_remap(void *memory, size_t old_length, size_t new_length) {
    void *moved = mremap(memory, old_length, new_length, MREMAP_MAYMOVE);
    return moved == MAP_FAILED ? NULL : moved;
}

int clinux_signal_at_end_of_parent(int number) {
    return prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) == 0 ? 0 : -errno;
}

int clinux_memory_file(const char *name) {
    int fd = memfd_create(name, 0);
    return fd < 0 ? -errno : fd;
}

void clinux_name_thread(const char *name) {
    prctl(PR_SET_NAME, name, 0, 0, 0);
}
