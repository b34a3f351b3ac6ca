// Tells the thread sanitizer what Swift's Mutex does when it is contended.
//
// On Linux Synchronization.Mutex is a futex with priority inheritance. Its quick halves are inlined
// into the program and so are seen by the sanitizer. Its slow halves are in libswiftSynchronization,
// which is not built with the sanitizer, and there the kernel hands the lock over: nothing is seen,
// and whatever the mutex protects is reported as a race. So the program gets slow halves of its own,
// which call the real ones and say what happened. Nothing else is suppressed.

#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>

void __tsan_acquire(void *address);
void __tsan_release(void *address);

#define LOCK "$s15Synchronization12_MutexHandleV9_lockSlowyys6UInt32VF"
#define UNLOCK "$s15Synchronization12_MutexHandleV11_unlockSlowyyF"
#define SWIFT __attribute__((swiftcall))
#define SELF __attribute__((swift_context))

typedef SWIFT void (*lock_function)(uint32_t thread, SELF void *mutex);
typedef SWIFT void (*unlock_function)(SELF void *mutex);
static lock_function real_lock;
static unlock_function real_unlock;

__attribute__((constructor)) static void find(void) {
    real_lock = (lock_function)dlsym(RTLD_NEXT, LOCK);
    real_unlock = (unlock_function)dlsym(RTLD_NEXT, UNLOCK);
    if (!real_lock || !real_unlock) abort();
}

SWIFT void lock_slow(uint32_t thread, SELF void *mutex) __asm__(LOCK);
SWIFT void lock_slow(uint32_t thread, SELF void *mutex) {
    real_lock(thread, mutex);
    __tsan_acquire(mutex);
}

SWIFT void unlock_slow(SELF void *mutex) __asm__(UNLOCK);
SWIFT void unlock_slow(SELF void *mutex) {
    __tsan_release(mutex);
    real_unlock(mutex);
}
