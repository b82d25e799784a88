/* The cheapest persistent worker there can be, for overhead.py: what is measured around it is not its own time.
 *
 *   echo_worker [--persistent_worker]     answers each WorkRequest (length-delimited protobuf) with its request id
 *                                         and, as output, the number of bytes of the request without that id
 *   echo_worker --relay PROGRAM [ARG...]  starts PROGRAM and copies bytes to and from it: what one more process
 *                                         between caller and worker costs at the least
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BUFFER_BYTES (4u << 20)

static unsigned char buffer[BUFFER_BYTES];

static void die(const char *what) {
  fprintf(stderr, "echo_worker: %s%s%s\n", what, errno ? ": " : "", errno ? strerror(errno) : "");
  exit(1);
}

static void write_all(int fd, const unsigned char *data, size_t size) {
  while (size > 0) {
    ssize_t written = write(fd, data, size);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) die("write");
    data += written;
    size -= (size_t)written;
  }
}

/* Bytes read; 0 at the end of the stream. */
static size_t read_some(int fd, unsigned char *data, size_t size) {
  for (;;) {
    ssize_t come = read(fd, data, size);
    if (come >= 0) return (size_t)come;
    if (errno != EINTR) die("read");
  }
}

/* How many bytes the varint at `at` takes; 0 if it is not whole before `end`. */
static size_t read_varint(const unsigned char *at, const unsigned char *end, uint64_t *value) {
  *value = 0;
  for (size_t i = 0; i < 10 && at + i < end; i++) {
    *value |= (uint64_t)(at[i] & 0x7f) << (7 * i);
    if (at[i] < 0x80) return i + 1;
  }
  return 0;
}

static size_t write_varint(unsigned char *at, uint64_t value) {
  size_t count = 0;
  for (; value >= 0x80; value >>= 7) at[count++] = (unsigned char)(value | 0x80);
  at[count++] = (unsigned char)value;
  return count;
}

static void answer(const unsigned char *body, size_t size) {
  const unsigned char *at = body, *end = body + size;
  uint64_t request_id = 0;
  size_t counted = size;
  while (at < end) {
    uint64_t tag, value;
    const unsigned char *begin = at;
    size_t used = read_varint(at, end, &tag);
    if (!used) die("a field's tag is cut off");
    at += used;
    if ((tag & 7) != 0 && (tag & 7) != 2) die("a wire type that no WorkRequest has");
    used = read_varint(at, end, &value);
    if (!used) die("a field's number is cut off");
    at += used;
    if ((tag & 7) == 2) {
      if (value > (uint64_t)(end - at)) die("a field is cut off");
      at += value;
    } else if (tag == 3 << 3) {
      request_id = value;
      counted -= (size_t)(at - begin);
    }
  }
  unsigned char frame[64];
  size_t length = 1; /* the body is shorter than 128 bytes, so its length takes one byte */
  char text[24];
  int digits = snprintf(text, sizeof text, "%zu", counted);
  frame[length++] = 2 << 3 | 2;
  frame[length++] = (unsigned char)digits;
  memcpy(frame + length, text, (size_t)digits);
  length += (size_t)digits;
  if (request_id) {
    frame[length++] = 3 << 3;
    length += write_varint(frame + length, request_id);
  }
  frame[0] = (unsigned char)(length - 1);
  write_all(1, frame, length);
}

static int echo(void) {
  size_t begin = 0, end = 0;
  for (;;) {
    size_t come = read_some(0, buffer + end, BUFFER_BYTES - end);
    if (come == 0) return begin == end ? 0 : 1;
    end += come;
    for (;;) {
      uint64_t size;
      size_t header = read_varint(buffer + begin, buffer + end, &size);
      if (!header || size > end - begin - header) break;
      answer(buffer + begin + header, size);
      begin += header + size;
    }
    if (begin == end) {
      begin = end = 0;
    } else if (BUFFER_BYTES - end < BUFFER_BYTES / 2) {
      memmove(buffer, buffer + begin, end - begin);
      end -= begin;
      begin = 0;
      if (end == BUFFER_BYTES) die("a request that is too long");
    }
  }
}

static int relay(char **argv) {
  int down[2], up[2];
  if (pipe2(down, O_CLOEXEC) || pipe2(up, O_CLOEXEC)) die("pipe");
  pid_t child = fork();
  if (child < 0) die("fork");
  if (child == 0) {
    dup2(down[0], 0);
    dup2(up[1], 1);
    execvp(argv[0], argv);
    die(argv[0]);
  }
  close(down[0]);
  close(up[1]);
  struct pollfd fds[2] = {{.fd = 0, .events = POLLIN}, {.fd = up[0], .events = POLLIN}};
  for (;;) {
    if (poll(fds, 2, -1) < 0 && errno != EINTR) die("poll");
    if (fds[1].revents) {
      size_t come = read_some(up[0], buffer, BUFFER_BYTES);
      if (come == 0) return 0;
      write_all(1, buffer, come);
    }
    if (fds[0].revents) {
      size_t come = read_some(0, buffer, BUFFER_BYTES);
      if (come == 0) {
        close(down[1]);
        fds[0].fd = -1;
      } else {
        write_all(down[1], buffer, come);
      }
    }
  }
}

int main(int argc, char **argv) {
  if (argc > 2 && strcmp(argv[1], "--relay") == 0) return relay(argv + 2);
  return echo();
}
