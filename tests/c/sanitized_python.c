/* sanitized_python.c - a Python that brings the runtimes of ASan and UBSan itself.
 *
 * Rules:
 * - Linked with -fsanitize, compiled without: the options are asked for before the runtimes are ready.
 * - Nothing is in the environment (no LD_PRELOAD): strace, ssh, sshd, rsync and cc started by a test stay as they are, and a
 *   far end behind sshd, which drops the environment, is sanitized all the same.
 * - Reports go to files REPORTS.PID: a daemon's stderr may be anybody's. Whoever runs the tests must look for them.
 * - A fatal signal is reported even where the core resets its handlers (2: cannot be replaced); SIGBUS is guard.c's own.
 */
#include <Python.h>

const char *__asan_default_options(void);
const char *__ubsan_default_options(void);

__attribute__((visibility("default"))) const char *__asan_default_options(void)
{
    return "detect_leaks=0:handle_segv=2:handle_sigfpe=2:handle_sigill=2:verify_asan_link_order=0:log_path=" REPORTS;
}

__attribute__((visibility("default"))) const char *__ubsan_default_options(void)
{
    return "halt_on_error=1:print_stacktrace=1:log_path=" REPORTS;
}

int main(int argc, char **argv)
{
    setenv("PYTHONMALLOC", "malloc", 0); /* so that ASan sees each object */
    return Py_BytesMain(argc, argv);
}
