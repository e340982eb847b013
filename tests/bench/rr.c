/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A TCP request/response meter, small enough that the network is what it measures.
 *
 *   rr serve PORT              answers on every address of the namespace until it is killed
 *   rr rr  ADDRESS PORT SECONDS   one connection, a byte there and a byte back, over and over
 *   rr crr ADDRESS PORT SECONDS   connect, a byte there and a byte back, closed; over and over
 *
 * The client prints "transactions seconds p50_us p99_us". The server closes first in crr, so
 * TIME_WAIT is the server's and the client does not run out of ports.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_SAMPLES (1 << 20)

static void die(const char *what)
{
	fprintf(stderr, "rr: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void quick(int fd)
{
	int one = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
}

/* A request of 'r' is answered; one of 'c' is answered and the connection closed. */
static int serve(int port)
{
	struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	int listener = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
	int poller = epoll_create1(0);
	struct epoll_event event = { .events = EPOLLIN, .data.fd = listener }, events[64];

	if (listener < 0)
		die("socket");
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(listener, (struct sockaddr *)&any, sizeof(any)) || listen(listener, 1024))
		die("listen");
	epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
	puts("ready");
	fflush(stdout);
	for (;;) {
		int n = epoll_wait(poller, events, 64, -1);

		for (int i = 0; i < n; i++) {
			int fd = events[i].data.fd;
			char byte;
			ssize_t got;

			if (fd == listener) {
				fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
				if (fd < 0)
					continue;
				quick(fd);
				event.data.fd = fd;
				epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
			}
			got = recv(fd, &byte, 1, 0);
			if (got < 0 && errno == EAGAIN)
				continue;
			if (got != 1 || send(fd, &byte, 1, MSG_NOSIGNAL) != 1 || byte == 'c')
				close(fd);
		}
	}
}

static int dial(const char *address, int port)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port) };
	struct timeval patience = { .tv_sec = 3 };
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	if (inet_pton(AF_INET, address, &to.sin_addr) != 1)
		die("address");
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
		die("connect");
	quick(fd);
	return fd;
}

static void ask(int fd, char byte)
{
	if (send(fd, &byte, 1, MSG_NOSIGNAL) != 1)
		die("send");
	if (recv(fd, &byte, 1, 0) != 1)
		die("recv");
}

static int ascending(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;

	return (x > y) - (x < y);
}

static int measure(int each, const char *address, int port, double seconds)
{
	float *samples = malloc(MAX_SAMPLES * sizeof(*samples));
	double start = now(), end = start + seconds, at = start, last;
	int fd = each ? -1 : dial(address, port);
	size_t count = 0, kept;
	char byte;

	do {
		last = at;
		if (each) {
			fd = dial(address, port);
			ask(fd, 'c');
			if (recv(fd, &byte, 1, 0) != 0)
				die("close");
			close(fd);
		} else {
			ask(fd, 'r');
		}
		at = now();
		samples[count++ % MAX_SAMPLES] = (float)((at - last) * 1e6);
	} while (at < end);
	kept = count < MAX_SAMPLES ? count : MAX_SAMPLES;
	qsort(samples, kept, sizeof(*samples), ascending);
	printf("%zu %.6f %.2f %.2f\n", count, at - start, samples[kept / 2], samples[kept * 99 / 100]);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "serve"))
		return serve(atoi(argv[2]));
	if (argc == 5 && !strcmp(argv[1], "rr"))
		return measure(0, argv[2], atoi(argv[3]), atof(argv[4]));
	if (argc == 5 && !strcmp(argv[1], "crr"))
		return measure(1, argv[2], atoi(argv[3]), atof(argv[4]));
	fprintf(stderr, "usage: rr serve PORT | rr|crr ADDRESS PORT SECONDS\n");
	return 2;
}
