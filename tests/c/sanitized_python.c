/* sanitized_python.c - a Python that brings the runtimes of ASan and UBSan itself; tests/sanitized.py builds it.
 *
 * Rules:
 * - Linked with -fsanitize, compiled without: the options are asked for before the runtimes are ready.
 * - Nothing is in the environment (no LD_PRELOAD): strace, ssh, sshd, rsync and cc started by a test stay as they are, and a
 *   far end behind sshd, which drops the environment, is sanitized all the same.
 * - Reports go to files PATH.PID, PATH being REPORTS or what the environment's MIRRORPAIR_REPORTS says: a daemon's stderr may
 *   be anybody's. Whoever runs the tests must look for them.
 * - The first report of either kind ends the process, with an exit code that no command of ours has.
 * - The quarantine is small: the larger a process, the dearer its forks, and every copy forks.
 * - A fatal signal is reported even where the core resets its handlers (2: cannot be replaced); SIGBUS is guard.c's own.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <Python.h>

const char *__asan_default_options(void);
const char *__ubsan_default_options(void);
void __asan_init(void);
void __ubsan_handle_add_overflow(void *data, void *a, void *b);

__attribute__((visibility("default"))) const char *__asan_default_options(void)
{
    return "exitcode=86:log_path=" REPORTS ":detect_leaks=0:quarantine_size_mb=16:verify_asan_link_order=0:"
           "handle_segv=2:handle_sigfpe=2:handle_sigill=2";
}

__attribute__((visibility("default"))) const char *__ubsan_default_options(void)
{
    return "exitcode=86:halt_on_error=1:print_stacktrace=1";
}

/* Nobody is inside ASan's allocator while a process forks: its locks, unlike glibc's, stay with a thread that the child does not
 * have, and a copy forks while other threads work. Its functions are met here first, since this is the program. */
static pthread_rwlock_t inside = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;

#define WRAP(type, name, parameters, arguments)                                  \
    type __interceptor_##name parameters;                                        \
    __attribute__((visibility("default"))) type name parameters                  \
    {                                                                            \
        pthread_rwlock_rdlock(&inside);                                          \
        type result = __interceptor_##name arguments;                            \
        pthread_rwlock_unlock(&inside);                                          \
        return result;                                                           \
    }

WRAP(void *, malloc, (size_t size), (size))
WRAP(void *, calloc, (size_t count, size_t size), (count, size))
WRAP(void *, realloc, (void *at, size_t size), (at, size))
WRAP(void *, reallocarray, (void *at, size_t count, size_t size), (at, count, size))
WRAP(void *, memalign, (size_t alignment, size_t size), (alignment, size))
WRAP(void *, aligned_alloc, (size_t alignment, size_t size), (alignment, size))
WRAP(int, posix_memalign, (void **at, size_t alignment, size_t size), (at, alignment, size))

void __interceptor_free(void *at);
__attribute__((visibility("default"))) void free(void *at)
{
    pthread_rwlock_rdlock(&inside);
    __interceptor_free(at);
    pthread_rwlock_unlock(&inside);
}

static void before_fork(void)
{
    pthread_rwlock_wrlock(&inside);
}

static void after_fork(void)
{
    pthread_rwlock_unlock(&inside);
}

static void in_child(void)
{
    inside = (pthread_rwlock_t)PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;
}

/* Each runtime has a file of its own for its reports, and a function of the same name to set it; UBSan's log_path does not. */
static int set_path(void *address, const char *path)
{
    void (*set)(const char *);
    void *library;
    Dl_info info;

    if (!dladdr(address, &info))
        return -1;
    library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (!library)
        return -1;
    *(void **)&set = dlsym(library, "__sanitizer_set_report_path");
    if (!set)
        return -1;
    set(path);
    return 0;
}

int main(int argc, char **argv)
{
    const char *path = getenv("MIRRORPAIR_REPORTS");

    if (!path)
        path = REPORTS;
    if (set_path((void *)&__asan_init, path) || set_path((void *)&__ubsan_handle_add_overflow, path)) {
        fprintf(stderr, "%s: the sanitizers' runtimes cannot be told where to report\n", argv[0]);
        return 86;
    }
    if (pthread_atfork(before_fork, after_fork, in_child))
        return 86;
    setenv("PYTHONMALLOC", "malloc", 0); /* so that ASan sees each object */
    return Py_BytesMain(argc, argv);
}
