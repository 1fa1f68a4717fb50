/* helper.c - see helper.h. */
#define _GNU_SOURCE
#include "helper.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

static int by_value(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

static void close_between(int first, int last)
{
    if (first > last || syscall(SYS_close_range, (unsigned)first, (unsigned)last, 0u) == 0)
        return;
    long limit = sysconf(_SC_OPEN_MAX);
    for (int fd = first; fd <= last && fd < (limit > 0 && limit < 65536 ? limit : 65536); fd++)
        close(fd);
}

/* Another session's socket that stays open in this child would keep its peer waiting for the end of the stream. */
static void close_all_but(int *keep, size_t count)
{
    qsort(keep, count, sizeof *keep, by_value);
    int next = 0;
    for (size_t i = 0; i < count; i++) {
        if (keep[i] < next)
            continue;
        close_between(next, keep[i] - 1);
        next = keep[i] + 1;
    }
    close_between(next, 0x7fffffff);
}

static void reset_signals(void)
{
    for (int number = 1; number <= SIGRTMAX; number++)
        signal(number, SIG_DFL); /* fails for the few that cannot be changed */
    /* A stop that is sent to the whole group or service reaches the parent too, which asks us to end in good order; if it
     * dies instead, the kernel kills us. The other two become EPIPE and EFBIG. */
    static const int ignored[] = {SIGINT, SIGQUIT, SIGTERM, SIGHUP, SIGPIPE, SIGXFSZ};
    for (size_t i = 0; i < sizeof ignored / sizeof *ignored; i++)
        signal(ignored[i], SIG_IGN);
    sigset_t none;
    sigemptyset(&none);
    pthread_sigmask(SIG_SETMASK, &none, NULL);
}

static void child(mp_copy *copy, mp_arrangement arrangement, int parent)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
    reset_signals();
    int keep[] = {2, copy->source_fd, copy->target_fd, copy->chan ? copy->chan->fd_in : -1, copy->chan ? copy->chan->fd_out : -1, copy->range_fd, copy->cancel_fd};
    close_all_but(keep, sizeof keep / sizeof *keep);
    if (arrangement == MP_LOCAL)
        mp_copy_local(copy);
    else if (arrangement == MP_SOURCE)
        mp_copy_source(copy);
    else
        mp_copy_target(copy);
    _exit(0);
}

int mp_helper_start(mp_helper *helper, const mp_copy *configuration, mp_arrangement arrangement)
{
    *helper = (mp_helper){.pid = -1, .pid_fd = -1, .range_fd = -1, .cancel_fd = -1};
    int pipes[2] = {-1, -1}, error = 0;
    helper->shared = mmap(NULL, sizeof *helper->shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (helper->shared == MAP_FAILED) {
        helper->shared = NULL;
        return errno;
    }
    helper->cancel_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (helper->cancel_fd < 0 || (configuration->ranges && pipe2(pipes, O_CLOEXEC) < 0))
        error = errno;
    if (!error && pipes[0] >= 0)
        fcntl(pipes[0], F_SETFL, O_NONBLOCK);
    if (!error) {
        mp_copy copy = *configuration;
        copy.shared = helper->shared;
        copy.cancel_fd = helper->cancel_fd;
        copy.range_fd = pipes[1];
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before); /* no handler of the parent's may run in the child */
        int parent = (int)getpid();
        helper->pid = (int)fork();
        if (helper->pid == 0)
            child(&copy, arrangement, parent);
        error = helper->pid < 0 ? errno : 0;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (!error) {
        helper->pid_fd = (int)syscall(SYS_pidfd_open, helper->pid, 0u);
        if (helper->pid_fd < 0)
            error = errno;
    }
    if (pipes[1] >= 0)
        close(pipes[1]);
    helper->range_fd = pipes[0];
    if (error) {
        mp_fault ignored;
        mp_helper_close(helper, &ignored);
    }
    return error;
}

unsigned mp_helper_poll(mp_helper *helper, int timeout_ms)
{
    struct pollfd entries[2] = {{.fd = helper->pid_fd, .events = POLLIN}, {.fd = helper->range_fd, .events = POLLIN}};
    if (poll(entries, 2, timeout_ms) <= 0)
        return 0;
    /* The pipe has ended but the process has not quite: the pipe would stay ready and say nothing. */
    if (!entries[0].revents && entries[1].revents && !(entries[1].revents & POLLIN))
        poll(entries, 1, timeout_ms);
    return (entries[0].revents ? 1u : 0u) | (entries[1].revents & POLLIN ? 2u : 0u);
}

void mp_helper_cancel(mp_helper *helper)
{
    if (!helper->shared)
        return;
    atomic_store(&helper->shared->cancel, 1);
    uint64_t one = 1;
    (void)!write(helper->cancel_fd, &one, sizeof one);
}

void mp_helper_close(mp_helper *helper, mp_fault *fault)
{
    int status = 0;
    if (helper->pid > 0) {
        if (helper->pid_fd < 0 || !(mp_helper_poll(helper, 0) & 1u))
            kill(helper->pid, SIGKILL);
        while (waitpid(helper->pid, &status, 0) < 0 && errno == EINTR)
            ;
    }
    if (helper->shared) {
        if (atomic_load(&helper->shared->ended))
            *fault = helper->shared->fault;
        else
            *fault = (mp_fault){.status = MP_KILLED, .error = WIFSIGNALED(status) ? WTERMSIG(status) : 0};
        munmap(helper->shared, sizeof *helper->shared);
    }
    int fds[] = {helper->pid_fd, helper->range_fd, helper->cancel_fd};
    for (size_t i = 0; i < sizeof fds / sizeof *fds; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    *helper = (mp_helper){.pid = -1, .pid_fd = -1, .range_fd = -1, .cancel_fd = -1};
}
