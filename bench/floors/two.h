/* What the floors of two processes share: one TCP connection over loopback, one end in a forked child, as two hosts
 * would have it. */
#ifndef TWO_H
#define TWO_H

#include "floor.h"
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/wait.h>

struct two {
    int fd;
    pid_t child; /* 0 in the child */
};

static inline struct two two_start(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    struct two two;
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 1) < 0 ||
        getsockname(listener, (struct sockaddr *)&address, &length) < 0)
        die("listen");
    if ((two.child = fork()) < 0)
        die("fork");
    if (two.child == 0) {
        two.fd = socket(AF_INET, SOCK_STREAM, 0);
        if (two.fd < 0 || connect(two.fd, (struct sockaddr *)&address, sizeof address) < 0)
            die("connect");
    } else if ((two.fd = accept(listener, NULL, NULL)) < 0)
        die("accept");
    close(listener);
    setsockopt(two.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return two;
}

static inline void two_end(const struct two *two)
{
    int status;
    close(two->fd);
    if (two->child == 0)
        exit(0);
    if (waitpid(two->child, &status, 0) < 0 || status != 0) {
        fprintf(stderr, "the child failed (%d)\n", status);
        exit(1);
    }
}

static inline void send_whole(int fd, const void *buffer, size_t length)
{
    for (size_t done = 0; done < length;) {
        ssize_t n = send(fd, (const uint8_t *)buffer + done, length - done, MSG_NOSIGNAL);
        if (n < 0 && errno != EINTR)
            die("send");
        done += n > 0 ? (size_t)n : 0;
    }
}

static inline void receive_whole(int fd, void *buffer, size_t length)
{
    for (size_t done = 0; done < length;) {
        ssize_t n = recv(fd, (uint8_t *)buffer + done, length - done, 0);
        if (n == 0)
            errno = ECONNRESET;
        if (n <= 0 && errno != EINTR)
            die("recv");
        done += n > 0 ? (size_t)n : 0;
    }
}

#endif
