/* Counts the bytes that PyTorch's CPU allocator holds, for benchmarks/plan_memory.py; loaded by LD_PRELOAD.
 *
 * PyTorch takes every tensor's storage on the CPU by posix_memalign and gives it back by free. All threads are
 * counted: a collective's buffers may be given back by a thread of gloo, which torch.profiler does not see.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

enum { SLOTS = 1 << 20 };
static struct { void *block; size_t size; } table[SLOTS];  /* open addressing; a removed block leaves GONE */
#define GONE ((void *)-1)
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t live, most;

static size_t slot_of(void *block) { return ((uintptr_t)block >> 6) * 0x9E3779B97F4A7C15u >> 44; }

int posix_memalign(void **block, size_t alignment, size_t size) {
    static int (*real)(void **, size_t, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "posix_memalign");
    int failed = real(block, alignment, size);
    if (failed) return failed;
    pthread_mutex_lock(&lock);
    size_t at = slot_of(*block);
    while (table[at].block && table[at].block != GONE) at = (at + 1) % SLOTS;
    table[at].block = *block;
    table[at].size = size;
    live += size;
    if (live > most) most = live;
    pthread_mutex_unlock(&lock);
    return 0;
}

void free(void *block) {
    static void (*real)(void *);
    if (!real) real = dlsym(RTLD_NEXT, "free");
    if (block && !((uintptr_t)block & 63)) {
        pthread_mutex_lock(&lock);
        for (size_t at = slot_of(block); table[at].block; at = (at + 1) % SLOTS)
            if (table[at].block == block) {
                live -= table[at].size;
                table[at].block = table[(at + 1) % SLOTS].block ? GONE : NULL;
                break;
            }
        pthread_mutex_unlock(&lock);
    }
    real(block);
}

/* The most bytes held at once since the last call of this function. */
size_t longspan_most_bytes(void) {
    pthread_mutex_lock(&lock);
    size_t found = most;
    most = live;
    pthread_mutex_unlock(&lock);
    return found;
}
