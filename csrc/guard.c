/* guard.c - see guard.h. */
#define _GNU_SOURCE
#include "guard.h"

#include <setjmp.h>
#include <signal.h>

static _Thread_local sigjmp_buf *innermost;
static _Thread_local const void *volatile touched;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    (void)context;
    if (!innermost) {
        signal(number, SIG_DFL); /* not one of ours: the instruction runs again and the process dies as it would have */
        return;
    }
    touched = info->si_addr;
    siglongjmp(*innermost, 1);
}

void mp_guard_install(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigemptyset(&action.sa_mask);
    MP_ASSERT(sigaction(SIGBUS, &action, NULL) == 0);
}

bool mp_guard_call(void (*body)(void *), void *argument, const void **address)
{
    sigjmp_buf here, *outer = innermost;
    /* The mask is not saved (it would cost a system call): SA_NODEFER leaves SIGBUS unblocked in the handler. */
    if (sigsetjmp(here, 0) == 0) {
        innermost = &here;
        body(argument);
        innermost = outer;
        return true;
    }
    innermost = outer;
    *address = touched;
    return false;
}
