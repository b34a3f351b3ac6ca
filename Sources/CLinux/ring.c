// io_uring by liburing. Only what liburing 2.3 (Debian 12) has is used.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "CLinux.h"
#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

struct clinux_ring {
    struct io_uring ring;
    // A timeout's time, by the index of its submission entry: in place until it is submitted.
    struct __kernel_timespec *times;
};

// MARK: - Making

// NODROP: completions are never lost when the completion ring is full. FAST_POLL: a receive waits
// without a kernel thread of its own. SUBMIT_STABLE: a timeout's time may go once submitted.
static const unsigned needed_features =
    IORING_FEAT_NODROP | IORING_FEAT_FAST_POLL | IORING_FEAT_SUBMIT_STABLE;

static const int needed_operations[] = {
    IORING_OP_READ,   IORING_OP_WRITE, IORING_OP_WRITEV,  IORING_OP_FSYNC,    IORING_OP_FALLOCATE,
    IORING_OP_ACCEPT, IORING_OP_RECV,  IORING_OP_SENDMSG, IORING_OP_POLL_ADD, IORING_OP_TIMEOUT,
    IORING_OP_ASYNC_CANCEL,
};

static const unsigned common_flags = IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP;

// Best first; the comment names the kernel that brought the set.
static const unsigned flag_sets[] = {
    IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_COOP_TASKRUN
        | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SUBMIT_ALL,                        // 6.1
    IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SUBMIT_ALL,  // 5.19
    0,
};

// Room for the completions of this many times the submission entries; more than that may be
// outstanding, but then the kernel keeps the rest in a list that it allocates.
enum { COMPLETIONS_PER_ENTRY = 4 };

static bool has_operations(struct io_uring *ring) {
    struct io_uring_probe *probe = io_uring_get_probe_ring(ring);
    if (!probe) return false;
    bool all = true;
    for (size_t i = 0; i < sizeof needed_operations / sizeof needed_operations[0]; i++)
        all = all && io_uring_opcode_supported(probe, needed_operations[i]);
    io_uring_free_probe(probe);
    return all;
}

static int open_ring(struct io_uring *ring, unsigned entries, unsigned *granted) {
    int result = -EINVAL;
    struct io_uring_params parameters;
    for (size_t i = 0; i < sizeof flag_sets / sizeof flag_sets[0] && result == -EINVAL; i++) {
        memset(&parameters, 0, sizeof parameters);
        parameters.flags = common_flags | flag_sets[i];
        parameters.cq_entries = entries * COMPLETIONS_PER_ENTRY;
        result = io_uring_queue_init_params(entries, ring, &parameters);
    }
    if (result < 0) return result;
    *granted = parameters.sq_entries;
    if ((parameters.features & needed_features) != needed_features)
        result = CLINUX_RING_MISSING_FEATURES;
    else if (!has_operations(ring))
        result = CLINUX_RING_MISSING_OPERATIONS;
    else
        result = 0;
    if (result != 0) io_uring_queue_exit(ring);
    return result;
}

int clinux_ring_open(unsigned entries, struct clinux_ring **made) {
    struct clinux_ring *ring = calloc(1, sizeof *ring);
    if (!ring) return -ENOMEM;
    unsigned granted = 0;
    int result = open_ring(&ring->ring, entries, &granted);
    if (result != 0) {
        free(ring);
        return result;
    }
    ring->times = calloc(granted, sizeof *ring->times);
    if (!ring->times) {
        clinux_ring_close(ring);
        return -ENOMEM;
    }
    // Spares a descriptor look-up at each entry into the kernel; only a gain, so a refusal is
    // no error.
    io_uring_register_ring_fd(&ring->ring);
    *made = ring;
    return 0;
}

void clinux_ring_close(struct clinux_ring *ring) {
    io_uring_queue_exit(&ring->ring);
    free(ring->times);
    free(ring);
}

// MARK: - Operations

bool clinux_ring_read(
    struct clinux_ring *ring, int fd, void *bytes, size_t length, uint64_t offset, uint64_t tag) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->ring);
    if (!sqe) return false;
    io_uring_prep_read(sqe, fd, bytes, (unsigned)length, offset);
    sqe->user_data = tag;
    return true;
}

bool clinux_ring_write(
    struct clinux_ring *ring, int fd, const void *vectors, size_t count, uint64_t offset,
    uint64_t tag) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->ring);
    if (!sqe) return false;
    const struct iovec *list = vectors;
    // One vector: the plain form, which spares the kernel the copying of the array.
    if (count == 1)
        io_uring_prep_write(sqe, fd, list->iov_base, (unsigned)list->iov_len, offset);
    else
        io_uring_prep_writev(sqe, fd, list, (unsigned)count, offset);
    sqe->user_data = tag;
    return true;
}

bool clinux_ring_flush(struct clinux_ring *ring, int fd, uint64_t tag) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->ring);
    if (!sqe) return false;
    io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
    sqe->user_data = tag;
    return true;
}

bool clinux_ring_allocate(
    struct clinux_ring *ring, int fd, int mode, uint64_t offset, uint64_t length, uint64_t tag) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->ring);
    if (!sqe) return false;
    io_uring_prep_fallocate(sqe, fd, mode, (off_t)offset, (off_t)length);
    sqe->user_data = tag;
    return true;
}

bool clinux_ring_accept(struct clinux_ring *ring, int fd, uint64_t tag) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->ring);
    if (!sqe) return false;
    io_uring_prep_accept(sqe, fd, NULL, NULL, SOCK_CLOEXEC);
    sqe->user_data = tag;
    return true;
}

bool clinux_ring_receive(
    struct clinux_ring *ring, int fd, void *bytes, size_t length, uint64_t tag) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->ring);
    if (!sqe) return false;
    io_uring_prep_recv(sqe, fd, bytes, length, 0);
    sqe->user_data = tag;
    return true;
}

bool clinux_ring_send(struct clinux_ring *ring, int fd, const void *message, uint64_t tag) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->ring);
    if (!sqe) return false;
    io_uring_prep_sendmsg(sqe, fd, message, MSG_NOSIGNAL);
    sqe->user_data = tag;
    return true;
}

bool clinux_ring_poll(struct clinux_ring *ring, int fd, uint64_t tag) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->ring);
    if (!sqe) return false;
    io_uring_prep_poll_add(sqe, fd, POLLIN);
    sqe->user_data = tag;
    return true;
}

bool clinux_ring_cancel(struct clinux_ring *ring, uint64_t target, uint64_t tag) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->ring);
    if (!sqe) return false;
    io_uring_prep_cancel64(sqe, target, 0);
    sqe->user_data = tag;
    return true;
}

bool clinux_ring_timeout(struct clinux_ring *ring, uint64_t nanoseconds, uint64_t tag) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->ring);
    if (!sqe) return false;
    struct __kernel_timespec *time = &ring->times[sqe - ring->ring.sq.sqes];
    time->tv_sec = (long long)(nanoseconds / 1000000000u);
    time->tv_nsec = (long long)(nanoseconds % 1000000000u);
    io_uring_prep_timeout(sqe, time, 0, 0);
    sqe->user_data = tag;
    return true;
}

// MARK: - Submitting and taking

int clinux_ring_submit(struct clinux_ring *ring) { return io_uring_submit(&ring->ring); }

int clinux_ring_submit_and_wait(struct clinux_ring *ring) {
    return io_uring_submit_and_wait(&ring->ring, 1);
}

int clinux_ring_submit_and_collect(struct clinux_ring *ring) {
    return io_uring_submit_and_get_events(&ring->ring);
}

// The kernel has completions that it posts only when it is entered.
static inline bool holds_completions(const struct clinux_ring *ring) {
    return IO_URING_READ_ONCE(*ring->ring.sq.kflags)
        & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW);
}

bool clinux_ring_wants_entry(const struct clinux_ring *ring) {
    return io_uring_sq_ready(&ring->ring) != 0 || holds_completions(ring);
}

static uint64_t monotonic_nanoseconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

// Leaves the execution units to the processor's other thread for a moment.
static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

bool clinux_ring_look_out(const struct clinux_ring *ring, uint64_t nanoseconds) {
    enum { LOOKS_PER_CLOCK = 16 };
    uint64_t deadline = monotonic_nanoseconds() + nanoseconds;
    do {
        for (int look = 0; look < LOOKS_PER_CLOCK; look++) {
            if (io_uring_cq_ready(&ring->ring) != 0 || holds_completions(ring)) return true;
            relax();
        }
    } while (monotonic_nanoseconds() < deadline);
    return false;
}

unsigned clinux_ring_ready(const struct clinux_ring *ring) {
    return io_uring_cq_ready(&ring->ring);
}

bool clinux_ring_take(struct clinux_ring *ring, uint64_t *tag, int32_t *result) {
    struct io_uring_cq *queue = &ring->ring.cq;
    unsigned head = *queue->khead;
    if (head == io_uring_smp_load_acquire(queue->ktail)) return false;
    const struct io_uring_cqe *cqe = &queue->cqes[head & queue->ring_mask];
    *tag = cqe->user_data;
    *result = cqe->res;
    io_uring_cq_advance(&ring->ring, 1);
    return true;
}
