/* libFuzzer: whatever the daemon sends, in whatever pieces, the client in C reads no byte too many, does what a second,
 * simpler reading of the same bytes says, and never runs an action that was taken. Includes client.c; its calls to the
 * system that matter here are replaced. An input is one byte for the size of the pieces, and the stream.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/types.h>
static ssize_t fuzz_recv(int fd, void *buffer, size_t size, int flags);
static ssize_t fuzz_write(int fd, const void *data, size_t size);
static int fuzz_shutdown(int fd, int how);
static _Noreturn void fuzz_exit(int code);
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>
#define main client_main
#define recv fuzz_recv
#define write fuzz_write
#define shutdown fuzz_shutdown
#define _exit fuzz_exit
#include "../../native/client.c"

static const uint8_t *stream;
static size_t stream_size, at, piece, written;
static int silences, exit_code;
static jmp_buf ended;

static ssize_t fuzz_recv(int fd, void *buffer, size_t size, int flags) {
	(void)fd, (void)flags;
	if (size == 0) abort(); /* it would be taken for the end */
	if (silences > 0 && at % 3 == 0) return silences--, errno = silences % 2 ? EINTR : EAGAIN, -1;
	size_t left = stream_size - at, n = left < piece ? left : piece;
	if (n > size) n = size;
	memcpy(buffer, stream + at, n);
	return at += n, n;
}

static ssize_t fuzz_write(int fd, const void *data, size_t size) {
	static char sink[1 << 17];
	if (fd != 2 || size > sizeof sink) abort();
	memcpy(sink, data, size); /* so that the sanitizer looks at all of it */
	return written += size, size;
}

static int fuzz_shutdown(int fd, int how) { return (void)fd, (void)how, 0; }

static _Noreturn void fuzz_exit(int code) {
	exit_code = code;
	longjmp(ended, 1);
}

/* What comes of a stream: an exit code, or -1 if the action may be run. `output`: bytes of D frames. */
static int expected(const uint8_t *data, size_t size, size_t *output) {
	int is_taken = 0;
	while (size >= 5) {
		uint32_t length = data[1] | data[2] << 8 | data[3] << 16 | (uint32_t)data[4] << 24;
		const uint8_t *payload = data + 5;
		switch (data[0]) {
		case 'W': if (length) goto wrong; break;
		case 'T': if (length || is_taken) goto wrong; is_taken = 1; break;
		case 'O': if (length > 4096) goto wrong; break;
		case 'B': if (length > 4096 || is_taken) goto wrong; break;
		case 'D': if (length < 1 || length > 65536 || !is_taken) goto wrong; break;
		case 'E': if (length != 4 || !is_taken) goto wrong; break;
		case 'F': if (length < 2 || length > 16386) goto wrong; break;
		default: goto wrong;
		}
		if (size - 5 < length) goto wrong;
		switch (data[0]) {
		case 'D': *output += length; break;
		case 'O': case 'B': return -1;
		case 'E': return payload[0] ? payload[0] : payload[1] || payload[2] || payload[3];
		case 'F':
			if (payload[0] == 't') return 124;
			if (payload[0] == 'l' || payload[0] == 'c') return 75;
			if (payload[0] == 'r') return payload[1] ? payload[1] : 1;
			goto wrong;
		}
		data += 5 + length, size -= 5 + length;
	}
wrong:
	return is_taken ? 75 : -1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
	if (size < 1) return 0;
	stream = data + 1, stream_size = size - 1, at = 0, written = 0;
	piece = data[0] % 16 ? data[0] % 16 : 1 << 17;
	silences = data[0] / 16;
	memset(&replies, 0, sizeof replies);
	size_t output = 0;
	int code = expected(stream, stream_size, &output);
	exit_code = -1;
	if (!setjmp(ended)) {
		const char *why = obey_daemon();
		if (why && strlen(why) > 4096) abort();
	}
	if (exit_code != code || written < output) abort();
	return 0;
}
