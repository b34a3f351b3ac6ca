// What Swift cannot import: inline functions of liburing, ioctl numbers, CPU instructions.
//
// The ring functions are wrappers, not the liburing functions themselves, because the types of
// liburing's parameters differ between its versions (off_t or __u64 in io_uring_prep_fallocate):
// C converts them silently, Swift does not. Only what liburing 2.3 (Debian 12) has is used.
#ifndef CLINUX_H
#define CLINUX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <liburing.h>

/// CRC-32C (Castagnoli, reflected) of `length` bytes, with the usual final inversion:
/// clinux_crc32c("123456789", 9) is 0xE3069283.
uint32_t clinux_crc32c(const void *bytes, size_t length);

// MARK: - fallocate modes and read/write flags (linux/falloc.h, linux/fs.h)

enum {
    CLINUX_KEEP_SIZE = 0x01,   // FALLOC_FL_KEEP_SIZE
    CLINUX_PUNCH_HOLE = 0x02,  // FALLOC_FL_PUNCH_HOLE
    CLINUX_ZERO_RANGE = 0x10,  // FALLOC_FL_ZERO_RANGE
};

enum {
    CLINUX_RWF_DSYNC = 0x02,
};

/// O_DIRECT, whose value differs between architectures and which Swift does not import.
int clinux_o_direct(void);

// MARK: - Devices; each returns 0 or -errno

/// What direct I/O on `fd` needs: the alignment of the memory and of offsets and lengths, in
/// bytes, both 0 where direct I/O is not possible. -EOPNOTSUPP: the kernel (before 6.1) or the
/// file system does not say.
int clinux_direct_alignment(int fd, uint32_t *memory, uint32_t *offset);
/// fallocate, again where a signal interrupted it.
int clinux_allocate(int fd, int mode, uint64_t offset, uint64_t length);
/// pwritev2 with RWF_ flags, again where a signal interrupted it: bytes or -errno.
ssize_t clinux_write_vectors(
    int fd, const struct iovec *vectors, int count, uint64_t offset, int flags);
/// BLKGETSIZE64: bytes.
int clinux_block_size(int fd, uint64_t *bytes);
/// BLKSSZGET: the logical sector, bytes.
int clinux_block_sector(int fd, uint32_t *bytes);
/// BLKDISCARD; what a later read gives is not defined.
int clinux_block_discard(int fd, uint64_t offset, uint64_t length);
/// BLKZEROOUT: reads as zeroes afterwards, space is kept; the kernel writes where it must.
int clinux_block_zero(int fd, uint64_t offset, uint64_t length);

/// accept4, the new descriptor closed on exec: the descriptor or -errno.
int clinux_accept(int fd);

// MARK: - Process; each returns 0 or -errno

/// PR_SET_IO_FLUSHER for the calling thread and the threads it starts afterwards.
int clinux_set_io_flusher(void);
/// mlockall of what is mapped and will be mapped, page by page as each is first touched.
int clinux_lock_memory(void);
/// Names the calling thread, for tools that list threads; at most 15 bytes count.
void clinux_name_thread(const char *name);
/// mremap, moving where it must: the new place, or NULL with errno.
void *clinux_remap(void *memory, size_t old_length, size_t new_length);

// MARK: - io_uring

enum {
    CLINUX_RING_MISSING_FEATURES = 1,
    CLINUX_RING_MISSING_OPERATIONS = 2,
};

/// Makes a ring with the best flags that the kernel takes. 0, -errno, or one of
/// CLINUX_RING_MISSING_* when the kernel's io_uring is too old (nothing is left open then).
int clinux_ring_open(struct io_uring *ring, unsigned entries);

/// Puts the completion at the head into `tag` and `result` and removes it; false if none is there.
static inline bool clinux_ring_take(struct io_uring *ring, uint64_t *tag, int32_t *result) {
    unsigned head = *ring->cq.khead;
    if (head == io_uring_smp_load_acquire(ring->cq.ktail)) return false;
    const struct io_uring_cqe *cqe = &ring->cq.cqes[head & *ring->cq.kring_mask];
    *tag = cqe->user_data;
    *result = cqe->res;
    io_uring_cq_advance(ring, 1);
    return true;
}

/// Completions that can be taken now.
static inline unsigned clinux_ring_ready(const struct io_uring *ring) {
    return io_uring_cq_ready(ring);
}

/// Whether entering the kernel could do anything: submissions are waiting, or the kernel has
/// completions that it posts only when it is entered.
static inline bool clinux_ring_wants_entry(const struct io_uring *ring) {
    return io_uring_sq_ready(ring) != 0
        || (IO_URING_READ_ONCE(*ring->sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW));
}

/// Submits and waits for a completion; entries submitted or -errno.
static inline int clinux_ring_submit_and_wait(struct io_uring *ring) {
    return io_uring_submit_and_wait(ring, 1);
}

/// Submits and lets the kernel post what has completed; entries submitted or -errno.
static inline int clinux_ring_submit_and_collect(struct io_uring *ring) {
    return io_uring_submit_and_get_events(ring);
}

static inline int clinux_ring_submit(struct io_uring *ring) { return io_uring_submit(ring); }

/// The next free submission entry, or NULL when all are waiting to be submitted.
static inline struct io_uring_sqe *clinux_ring_entry(struct io_uring *ring) {
    return io_uring_get_sqe(ring);
}

/// Which of the ring's entries `sqe` is: 0 ..< number of entries.
static inline size_t clinux_ring_index(const struct io_uring *ring, const struct io_uring_sqe *sqe) {
    return (size_t)(sqe - ring->sq.sqes);
}

static inline unsigned clinux_ring_entries(const struct io_uring *ring) {
    return *ring->sq.kring_entries;
}

static inline void clinux_prepare_read(
    struct io_uring_sqe *sqe, int fd, void *bytes, size_t length, uint64_t offset, uint64_t tag) {
    io_uring_prep_read(sqe, fd, bytes, (unsigned)length, offset);
    sqe->user_data = tag;
}

static inline void clinux_prepare_write(
    struct io_uring_sqe *sqe, int fd, const struct iovec *vectors, size_t count, uint64_t offset,
    bool durable, uint64_t tag) {
    // One vector: the plain form, which spares the kernel the copying of the array.
    if (count == 1)
        io_uring_prep_write(
            sqe, fd, vectors[0].iov_base, (unsigned)vectors[0].iov_len, offset);
    else
        io_uring_prep_writev(sqe, fd, vectors, (unsigned)count, offset);
    sqe->rw_flags = durable ? CLINUX_RWF_DSYNC : 0;
    sqe->user_data = tag;
}

static inline void clinux_prepare_flush(struct io_uring_sqe *sqe, int fd, uint64_t tag) {
    io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
    sqe->user_data = tag;
}

static inline void clinux_prepare_allocate(
    struct io_uring_sqe *sqe, int fd, int mode, uint64_t offset, uint64_t length, uint64_t tag) {
    io_uring_prep_fallocate(sqe, fd, mode, (off_t)offset, (off_t)length);
    sqe->user_data = tag;
}

static inline void clinux_prepare_accept(struct io_uring_sqe *sqe, int fd, uint64_t tag) {
    io_uring_prep_accept(sqe, fd, NULL, NULL, SOCK_CLOEXEC);
    sqe->user_data = tag;
}

static inline void clinux_prepare_receive(
    struct io_uring_sqe *sqe, int fd, void *bytes, size_t length, uint64_t tag) {
    io_uring_prep_recv(sqe, fd, bytes, length, 0);
    sqe->user_data = tag;
}

static inline void clinux_prepare_send(
    struct io_uring_sqe *sqe, int fd, const struct msghdr *message, uint64_t tag) {
    io_uring_prep_sendmsg(sqe, fd, message, MSG_NOSIGNAL);
    sqe->user_data = tag;
}

static inline void clinux_prepare_poll(struct io_uring_sqe *sqe, int fd, uint64_t tag) {
    io_uring_prep_poll_add(sqe, fd, POLLIN);
    sqe->user_data = tag;
}

/// `time` must stay valid until the entry is submitted.
static inline void clinux_prepare_timeout(
    struct io_uring_sqe *sqe, struct __kernel_timespec *time, uint64_t nanoseconds, uint64_t tag) {
    time->tv_sec = (long long)(nanoseconds / 1000000000u);
    time->tv_nsec = (long long)(nanoseconds % 1000000000u);
    io_uring_prep_timeout(sqe, time, 0, 0);
    sqe->user_data = tag;
}

#endif
