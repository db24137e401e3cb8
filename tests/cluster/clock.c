/* A wall clock that is off by CLOCK_OFFSET seconds, for the processes that preload this (LD_PRELOAD). The monotonic clock goes right, as on
 * a machine whose date is wrong. Deadlines by the wall clock are put right again before the kernel sees them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static time_t offset(void) {
    const char *text = getenv("CLOCK_OFFSET");
    return text ? (time_t)atoll(text) : 0;
}

static int is_wall(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = REAL(clock_gettime)(clock, now);
    if (!failed && is_wall(clock)) now->tv_sec += offset();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = REAL(gettimeofday)(now, zone);
    if (!failed) now->tv_sec += offset();
    return failed;
}

time_t time(time_t *where) {
    time_t now = REAL(time)(NULL) + offset();
    if (where) *where = now;
    return now;
}

/* A deadline by this wall clock as one by the right one; one by the monotonic clock is far from both, and stays. */
static struct timespec righted(const struct timespec *deadline) {
    struct timespec right = *deadline;
    if (llabs((long long)(right.tv_sec - time(NULL))) < llabs((long long)offset()) / 2) right.tv_sec -= offset();
    return right;
}

int pthread_cond_timedwait(pthread_cond_t *restrict c, pthread_mutex_t *restrict m, const struct timespec *restrict deadline) {
    struct timespec right = righted(deadline);
    return REAL(pthread_cond_timedwait)(c, m, &right);
}

int pthread_cond_clockwait(pthread_cond_t *restrict c, pthread_mutex_t *restrict m, clockid_t clock, const struct timespec *restrict deadline) {
    struct timespec right = is_wall(clock) ? righted(deadline) : *deadline;
    return REAL(pthread_cond_clockwait)(c, m, clock, &right);
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict m, const struct timespec *restrict deadline) {
    struct timespec right = righted(deadline);
    return REAL(pthread_mutex_timedlock)(m, &right);
}

int sem_timedwait(sem_t *restrict s, const struct timespec *restrict deadline) {
    struct timespec right = righted(deadline);
    return REAL(sem_timedwait)(s, &right);
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *wanted, struct timespec *left) {
    struct timespec right = is_wall(clock) && (flags & TIMER_ABSTIME) ? righted(wanted) : *wanted;
    return REAL(clock_nanosleep)(clock, flags, &right, left);
}
