// What Swift cannot import: liburing, epoll and eventfd, ioctl numbers, CPU instructions.
//
// This header includes nothing of the system but fixed-width integers, and has structures of the
// system only as void pointers. A declaration that came into Swift both from here and from Glibc
// would belong to one of the two modules by chance, and be missing in files that import the other.
#ifndef CLINUX_H
#define CLINUX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/// CRC-32C (Castagnoli, reflected) of `length` bytes, with the usual final inversion:
/// clinux_crc32c("123456789", 9) is 0xE3069283.
uint32_t clinux_crc32c(const void *bytes, size_t length);

// Unless said otherwise, each function below returns 0 or what it is asked for, and -errno.

// MARK: - Files

// fallocate modes (linux/falloc.h) and origins of a seek (linux/fs.h).
enum {
    CLINUX_KEEP_SIZE = 0x01,   // FALLOC_FL_KEEP_SIZE
    CLINUX_PUNCH_HOLE = 0x02,  // FALLOC_FL_PUNCH_HOLE
    CLINUX_ZERO_RANGE = 0x10,  // FALLOC_FL_ZERO_RANGE
    CLINUX_SEEK_DATA = 3,      // SEEK_DATA
};

/// Turns O_DIRECT on or off.
int clinux_set_direct(int fd, bool direct);
/// What direct I/O on `fd` needs: the alignment of the memory and of offsets and lengths, in
/// bytes, both 0 where direct I/O is not possible. -EOPNOTSUPP: the kernel (before 6.1) or the
/// file system does not say.
int clinux_direct_alignment(int fd, uint32_t *memory, uint32_t *offset);
/// Whether the file's contents are in memory only (tmpfs, ramfs): reading and writing are copies.
bool clinux_is_in_memory(int fd);
/// The numbers in a dev_t.
uint32_t clinux_major(uint64_t device);
uint32_t clinux_minor(uint64_t device);
/// fallocate, again where a signal interrupted it.
int clinux_allocate(int fd, int mode, uint64_t offset, uint64_t length);
/// pwritev of `count` struct iovec, again where a signal interrupted it: bytes.
ptrdiff_t clinux_write_vectors(int fd, const void *vectors, int count, uint64_t offset);

// MARK: - Files in memory

/// Maps a file, NULL if that cannot be done.
void *clinux_map_file(int fd, size_t length, bool writable);
void clinux_unmap_file(void *memory, size_t length);
/// Copies where one side is a mapped file: false if a page of it cannot be had, because the file
/// was truncated or there is no memory. Some may have been copied then.
bool clinux_copy_mapped(void *target, const void *source, size_t length);

// MARK: - Block devices

/// BLKGETSIZE64: bytes.
int clinux_block_size(int fd, uint64_t *bytes);
/// BLKSSZGET: the logical sector, bytes.
int clinux_block_sector(int fd, uint32_t *bytes);
/// BLKDISCARD; what a later read gives is not defined.
int clinux_block_discard(int fd, uint64_t offset, uint64_t length);
/// BLKZEROOUT: reads as zeroes afterwards, space is kept; the kernel writes where it must.
int clinux_block_zero(int fd, uint64_t offset, uint64_t length);

// MARK: - Sockets, epoll, eventfd

/// accept4, the new descriptor closed on exec.
int clinux_accept(int fd);

struct clinux_event {
    int32_t fd;
    uint32_t events;  // as poll(2) has them
};

enum { CLINUX_EVENTS_AT_MOST = 256 };

int clinux_epoll_create(void);
/// Has the next of `events` reported, once; for a descriptor that is new to epoll or not.
int clinux_epoll_arm(int epoll, int fd, uint32_t events);
/// Events, at most CLINUX_EVENTS_AT_MOST of them.
int clinux_epoll_wait(int epoll, struct clinux_event *events, int milliseconds);

/// A descriptor that is readable after `clinux_event_signal` until `clinux_event_clear`.
int clinux_event_create(void);
void clinux_event_signal(int fd);
void clinux_event_clear(int fd);

// MARK: - Process

/// PR_SET_IO_FLUSHER for the calling thread and the threads it starts afterwards.
int clinux_set_io_flusher(void);
/// mlockall of what is mapped and will be mapped, page by page as each is first touched.
int clinux_lock_memory(void);
/// Names the calling thread, for tools that list threads; at most 15 bytes count.
void clinux_name_thread(const char *name);
/// PR_SET_PDEATHSIG: `number` comes when the thread ends that started the process, also after exec.
int clinux_signal_at_end_of_parent(int number);
/// memfd_create: an empty file in memory, open across exec.
int clinux_memory_file(const char *name);
/// mremap, moving where it must: the new place, or NULL with errno.
void *clinux_remap(void *memory, size_t old_length, size_t new_length);

// MARK: - io_uring

/// A ring of one thread.
struct clinux_ring;

enum {
    CLINUX_RING_MISSING_FEATURES = 1,
    CLINUX_RING_MISSING_OPERATIONS = 2,
};

/// Makes a ring with the best flags that the kernel takes: 0, -errno, or one of
/// CLINUX_RING_MISSING_* when the kernel's io_uring is too old.
int clinux_ring_open(unsigned entries, struct clinux_ring **ring);
void clinux_ring_close(struct clinux_ring *ring);

// Each puts one operation into a submission entry; false, and nothing done, if none is free.
// `vectors` is an array of struct iovec, `message` a struct msghdr.

bool clinux_ring_read(
    struct clinux_ring *ring, int fd, void *bytes, size_t length, uint64_t offset, uint64_t tag);
bool clinux_ring_write(
    struct clinux_ring *ring, int fd, const void *vectors, size_t count, uint64_t offset,
    uint64_t tag);
bool clinux_ring_flush(struct clinux_ring *ring, int fd, uint64_t tag);
bool clinux_ring_allocate(
    struct clinux_ring *ring, int fd, int mode, uint64_t offset, uint64_t length, uint64_t tag);
bool clinux_ring_accept(struct clinux_ring *ring, int fd, uint64_t tag);
bool clinux_ring_receive(
    struct clinux_ring *ring, int fd, void *bytes, size_t length, uint64_t tag);
bool clinux_ring_send(struct clinux_ring *ring, int fd, const void *message, uint64_t tag);
bool clinux_ring_poll(struct clinux_ring *ring, int fd, uint64_t tag);
bool clinux_ring_timeout(struct clinux_ring *ring, uint64_t nanoseconds, uint64_t tag);
/// Ends the operation whose tag is `target`, if it still waits.
bool clinux_ring_cancel(struct clinux_ring *ring, uint64_t target, uint64_t tag);

/// Submits; entries submitted.
int clinux_ring_submit(struct clinux_ring *ring);
/// Submits and waits for a completion; entries submitted.
int clinux_ring_submit_and_wait(struct clinux_ring *ring);
/// Submits and lets the kernel post what has completed; entries submitted.
int clinux_ring_submit_and_collect(struct clinux_ring *ring);
/// Whether entering the kernel could do anything: submissions are waiting, or the kernel has
/// completions that it posts only when it is entered.
bool clinux_ring_wants_entry(const struct clinux_ring *ring);

/// Looks for completions for at most so long, without sleeping: true if there are any, or if
/// entering the kernel would post some.
bool clinux_ring_look_out(const struct clinux_ring *ring, uint64_t nanoseconds);

/// Completions that can be taken now.
unsigned clinux_ring_ready(const struct clinux_ring *ring);
/// Puts the oldest completion into `tag` and `result` and removes it; false if there is none.
bool clinux_ring_take(struct clinux_ring *ring, uint64_t *tag, int32_t *result);

#endif
