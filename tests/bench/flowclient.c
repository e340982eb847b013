/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A client of a gRPC stream that honours windows and counts messages without
 * decoding them: what it costs is little, so what is measured is the server.
 *
 *   flowclient SOCKET PATH REQUEST-HEX COUNT [WINDOW]
 *
 * Ends when COUNT messages have come, or the stream has ended; prints messages,
 * bytes of payload and seconds. Frames are those of RFC 9113; headers are HPACK
 * literals (RFC 7541).
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static int fd;
static uint8_t buffer[1 << 20];
static size_t have, at;

static void fail(const char *what)
{
	fprintf(stderr, "flowclient: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void put_all(const void *data, size_t size)
{
	const uint8_t *next = data;

	while (size) {
		ssize_t n = send(fd, next, size, MSG_NOSIGNAL);

		if (n <= 0)
			fail("send");
		next += n;
		size -= n;
	}
}

/* At least `need` bytes from `at` on; 0 at the end of the stream. */
static int fill(size_t need)
{
	if (have - at >= need)
		return 1;
	memmove(buffer, buffer + at, have - at);
	have -= at;
	at = 0;
	while (have < need) {
		ssize_t n = recv(fd, buffer + have, sizeof(buffer) - have, 0);

		if (n <= 0)
			return 0;
		have += n;
	}
	return 1;
}

static size_t frame(uint8_t *out, uint32_t length, uint8_t type, uint8_t flags, uint32_t stream)
{
	uint8_t head[9] = { length >> 16, length >> 8, length, type, flags,
			    stream >> 24, stream >> 16, stream >> 8, stream };

	memcpy(out, head, 9);
	return 9;
}

static size_t be32(uint8_t *out, uint32_t value)
{
	uint8_t bytes[4] = { value >> 24, value >> 16, value >> 8, value };

	memcpy(out, bytes, 4);
	return 4;
}

static size_t text(uint8_t *out, const char *value)
{
	size_t length = strlen(value);

	out[0] = length; /* below 127, without Huffman coding */
	memcpy(out + 1, value, length);
	return length + 1;
}

static void window(uint32_t stream, uint32_t increment)
{
	uint8_t out[13];

	frame(out, 4, 8, 0, stream);
	be32(out + 9, increment);
	put_all(out, sizeof(out));
}

static void begin(const char *path, const char *hex, uint32_t wide)
{
	static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
	uint8_t out[4096], *p = out, *block;
	size_t size = strlen(hex) / 2, length;

	memcpy(p, preface, 24);
	p += 24;
	p += frame(p, 12, 4, 0, 0); /* SETTINGS: no push, how wide a stream's window is */
	memcpy(p, "\0\2\0\0\0\0\0\4", 8);
	p += 8;
	p += be32(p, wide);
	p += frame(p, 4, 8, 0, 0);
	p += be32(p, wide - 65535);

	block = p + 9;
	length = 0;
	block[length++] = 0x83; /* :method POST */
	block[length++] = 0x86; /* :scheme http */
	block[length++] = 0x04;
	length += text(block + length, path);
	block[length++] = 0x01;
	length += text(block + length, "localhost");
	block[length++] = 0x0f;
	block[length++] = 0x10; /* content-type */
	length += text(block + length, "application/grpc");
	block[length++] = 0x00;
	length += text(block + length, "te");
	length += text(block + length, "trailers");
	frame(p, length, 1, 4, 1);
	p += 9 + length;

	p += frame(p, size + 5, 0, 1, 1);
	*p++ = 0;
	p += be32(p, size);
	for (size_t i = 0; i < size; i++)
		sscanf(hex + 2 * i, "%2hhx", p++);
	put_all(out, p - out);
}

int main(int argc, char **argv)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	uint64_t wanted, messages = 0, bytes = 0, unread = 0;
	uint32_t wide, left = 0; /* of the message that is being read */
	uint8_t head[5];
	unsigned int head_size = 0;
	struct timespec first = { 0 }, last;
	int size = 4 << 20;

	if (argc < 5) {
		fprintf(stderr, "usage: flowclient SOCKET PATH REQUEST-HEX COUNT [WINDOW]\n");
		return 2;
	}
	wanted = strtoull(argv[4], NULL, 10);
	wide = argc > 5 ? strtoul(argv[5], NULL, 10) : 8 << 20;
	strncpy(address.sun_path, argv[1], sizeof(address.sun_path) - 1);
	fd = socket(AF_UNIX, SOCK_STREAM, 0);
	setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
	if (connect(fd, (struct sockaddr *)&address, sizeof(address)))
		fail("connect");
	begin(argv[2], argv[3], wide);
	printf("asked\n");
	fflush(stdout);

	while (messages < wanted && fill(9)) {
		uint8_t *h = buffer + at, type = h[3], flags = h[4];
		uint32_t length = h[0] << 16 | h[1] << 8 | h[2];

		at += 9;
		if (!fill(length))
			break;
		if (type == 0) {
			uint32_t done = 0;

			if (!first.tv_sec)
				clock_gettime(CLOCK_MONOTONIC, &first);
			while (done < length) {
				if (!left && head_size < 5) {
					head[head_size++] = buffer[at + done++];
					if (head_size == 5) {
						left = (uint32_t)head[1] << 24 | head[2] << 16 |
						       head[3] << 8 | head[4];
						if (!left)
							messages++, head_size = 0;
					}
					continue;
				}
				uint32_t n = length - done < left ? length - done : left;

				done += n;
				left -= n;
				if (!left)
					messages++, head_size = 0;
			}
			bytes += length;
			unread += length;
			if (unread > wide / 2) {
				window(0, unread);
				window(1, unread);
				unread = 0;
			}
		} else if (type == 4 && !(flags & 1)) {
			uint8_t ack[9];

			frame(ack, 0, 4, 1, 0);
			put_all(ack, 9);
		} else if (type == 6 && !(flags & 1)) {
			uint8_t pong[17];

			frame(pong, 8, 6, 1, 0);
			memcpy(pong + 9, buffer + at, 8);
			put_all(pong, 17);
		} else if (type == 3 || type == 7) {
			fprintf(stderr, "flowclient: the server ended the %s\n",
				type == 3 ? "stream" : "connection");
			return 1;
		}
		at += length;
		if (type == 1 && flags & 1)
			break;
	}
	clock_gettime(CLOCK_MONOTONIC, &last);
	printf("%llu %llu %.6f\n", (unsigned long long)messages, (unsigned long long)bytes,
	       last.tv_sec - first.tv_sec + (last.tv_nsec - first.tv_nsec) / 1e9);
	return messages < wanted;
}
