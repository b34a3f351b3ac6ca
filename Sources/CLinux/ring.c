// Making an io_uring: which set-up flags this kernel takes, and whether it has what is needed.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "CLinux.h"
#include <errno.h>
#include <string.h>

// NODROP: completions are never lost when the completion ring is full. FAST_POLL: a receive waits
// without a kernel thread of its own. SUBMIT_STABLE: a timeout's time may go once submitted.
static const unsigned needed_features =
    IORING_FEAT_NODROP | IORING_FEAT_FAST_POLL | IORING_FEAT_SUBMIT_STABLE;

static const int needed_operations[] = {
    IORING_OP_READ,   IORING_OP_WRITE, IORING_OP_WRITEV,  IORING_OP_FSYNC,    IORING_OP_FALLOCATE,
    IORING_OP_ACCEPT, IORING_OP_RECV,  IORING_OP_SENDMSG, IORING_OP_POLL_ADD, IORING_OP_TIMEOUT,
};

static const unsigned common_flags = IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP;

// Best first; the comment names the kernel that brought the set.
static const unsigned flag_sets[] = {
    IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_COOP_TASKRUN
        | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SUBMIT_ALL,                          // 6.1
    IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SUBMIT_ALL,    // 5.19
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

int clinux_ring_open(struct io_uring *ring, unsigned entries) {
    int result = -EINVAL;
    struct io_uring_params parameters;
    for (size_t i = 0; i < sizeof flag_sets / sizeof flag_sets[0] && result == -EINVAL; i++) {
        memset(&parameters, 0, sizeof parameters);
        parameters.flags = common_flags | flag_sets[i];
        parameters.cq_entries = entries * COMPLETIONS_PER_ENTRY;
        result = io_uring_queue_init_params(entries, ring, &parameters);
    }
    if (result < 0) return result;
    if ((parameters.features & needed_features) != needed_features)
        result = CLINUX_RING_MISSING_FEATURES;
    else if (!has_operations(ring))
        result = CLINUX_RING_MISSING_OPERATIONS;
    else
        result = 0;
    if (result != 0) {
        io_uring_queue_exit(ring);
        return result;
    }
    // Spares a descriptor look-up at each entry into the kernel; only a gain, so a refusal is
    // no error.
    io_uring_register_ring_fd(ring);
    return 0;
}
