// Sockets, epoll and eventfd: what Swift's Glibc does not have of them.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "CLinux.h"
#include <errno.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

_Static_assert(
    EPOLLIN == POLLIN && EPOLLOUT == POLLOUT && EPOLLERR == POLLERR && EPOLLHUP == POLLHUP,
    "events are passed on as they come");

static int or_error(int result) { return result < 0 ? -errno : result; }

int clinux_accept(int fd) { return or_error(accept4(fd, NULL, NULL, SOCK_CLOEXEC)); }

int clinux_epoll_create(void) { return or_error(epoll_create1(EPOLL_CLOEXEC)); }

int clinux_epoll_arm(int epoll, int fd, uint32_t events) {
    struct epoll_event event = {.events = events | EPOLLONESHOT, .data.fd = fd};
    int result = epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event);
    if (result != 0 && errno == ENOENT) result = epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
    return or_error(result);
}

int clinux_epoll_wait(int epoll, struct clinux_event *events, int milliseconds) {
    struct epoll_event ready[CLINUX_EVENTS_AT_MOST];
    int count = epoll_wait(epoll, ready, CLINUX_EVENTS_AT_MOST, milliseconds);
    for (int i = 0; i < count; i++)
        events[i] = (struct clinux_event){.fd = ready[i].data.fd, .events = ready[i].events};
    return or_error(count);
}

int clinux_event_create(void) { return or_error(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)); }

void clinux_event_signal(int fd) {
    // Fails only where the counter is full, and then the descriptor is readable anyway.
    eventfd_write(fd, 1);
}

void clinux_event_clear(int fd) {
    eventfd_t value;
    eventfd_read(fd, &value);
}
