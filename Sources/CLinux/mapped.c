// Files that are mapped into memory, and copying from and to them.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "CLinux.h"
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>

/// What the kernel maps together when a page is read first (fault_around_bytes).
enum { FAULT_AROUND_BYTES = 64 << 10 };

// Where a copy of this thread goes on when a page of the file cannot be had.
static _Thread_local sigjmp_buf *volatile recovery;
static struct sigaction previous;

static void page_is_missing(int number) {
    (void)number;
    if (recovery) siglongjmp(*recovery, 1);
    // Nobody's copy: the instruction is tried again and meets what was there before.
    sigaction(SIGBUS, &previous, NULL);
}

static void watch_for_missing_pages(void) {
    struct sigaction action = {0};
    action.sa_handler = page_is_missing;
    // It is left by a jump, so the signal must not stay blocked.
    action.sa_flags = SA_NODEFER | SA_ONSTACK;
    sigaction(SIGBUS, &action, &previous);
}

void *clinux_map_file(int fd, size_t length, bool writable) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_for_missing_pages);
    int access = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    void *memory = mmap(NULL, length, access, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (memory == MAP_FAILED) return NULL;
    // A core dump is about the program, and not for its users' data.
    madvise(memory, length, MADV_DONTDUMP);
    // Nor need it stay in memory where the process's own is locked: it was not mapped before, either.
    munlock(memory, length);
    return memory;
}

void clinux_unmap_file(void *memory, size_t length) { munmap(memory, length); }

bool clinux_copy_mapped(void *target, const void *source, size_t length) {
    sigjmp_buf here;
    if (sigsetjmp(here, 0)) {
        recovery = NULL;
        return false;
    }
    recovery = &here;
    atomic_signal_fence(memory_order_seq_cst);
    // Writing to a page that is not mapped yet maps that page; reading it maps its neighbours, too.
    for (size_t place = 0; place < length; place += FAULT_AROUND_BYTES)
        (void)((volatile const char *)target)[place];
    memcpy(target, source, length);
    atomic_signal_fence(memory_order_seq_cst);
    recovery = NULL;
    return true;
}
