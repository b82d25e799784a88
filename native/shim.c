/* Process 1 of a worker's container: starts the worker on pipes that the host hands over, tells the host how that
 * went, and is the container's init. Static and mounted read-only, so that an image needs no shell. Usage:
 * shim SOCKET PROGRAM [ARGS...]. One connection to SOCKET. The host sends one byte with three descriptors
 * (SCM_RIGHTS): the worker's standard input, output and error. They are pipes, not the socket: the worker finds what
 * it would find as a plain process, and may open /dev/stdin or /dev/stderr again. Then the shim tells (integers:
 * int32) 'W', sent by the worker's own process, whose pid the host reads from the message's credentials; 'S' it runs;
 * 'E' errno, it cannot; 'X' wait status, it ended.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
enum { EXIT_SHIM = 125, EXIT_NOT_STARTED = 127 };
static char *default_path[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", NULL};

/* Should we have been started without standard streams, what we open must not come in their places. */
static int fill_standard_streams(void) {
	int fd = 0;
	while (fd >= 0 && fd < 3) fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	return fd < 0 ? -1 : close(fd);
}

static int connect_to(const char *path) {
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	if (strlen(path) >= sizeof address.sun_path) return errno = ENAMETOOLONG, -1;
	strcpy(address.sun_path, path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	return fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) ? -1 : fd;
}

/* Receive the worker's three streams; 0 if they came. */
static int receive_streams(int status_fd, int streams[3]) {
	char byte, control[CMSG_SPACE(3 * sizeof(int))] __attribute__((aligned(8)));
	struct iovec data = {&byte, 1};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	ssize_t got = TEMP_FAILURE_RETRY(recvmsg(status_fd, &message, MSG_CMSG_CLOEXEC));
	struct cmsghdr *first = got == 1 ? CMSG_FIRSTHDR(&message) : NULL;
	if (!first || first->cmsg_type != SCM_RIGHTS || first->cmsg_len != CMSG_LEN(3 * sizeof(int)))
		return errno = got < 0 ? errno : ECONNABORTED, -1;
	return memcpy(streams, CMSG_DATA(first), 3 * sizeof(int)), 0;
}

static void tell(int status_fd, char what, int32_t value) {
	char message[1 + sizeof value] = {what};
	memcpy(message + 1, &value, sizeof value);
	/* The host may be gone, or not listen: that is nothing to die of, or to wait for. */
	(void)!send(status_fd, message, what == 'S' || what == 'W' ? 1 : sizeof message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* In the child: become the worker. Returns only if that fails, with errno set. */
static void become_worker(char **argv, int status_fd, const int streams[3]) {
	setsid();
	for (int i = 0; i < 3; i++)
		if (dup2(streams[i], i) < 0) return;
	tell(status_fd, 'W', 0);
	/* Ours are so anyway; these are what an engine may have left open. 4: CLOSE_RANGE_CLOEXEC, of Linux 5.11. */
	if (syscall(SYS_close_range, 3, ~0U, 4))
		for (int fd = 3; fd < 1024; fd++) fcntl(fd, F_SETFD, FD_CLOEXEC);
	sigprocmask(SIG_SETMASK, &(sigset_t){0}, NULL);
	char **worker_environment = environ;
	if (!getenv("PATH")) environ = default_path; /* to find the program; the worker does not see it */
	execvpe(argv[2], argv + 2, worker_environment);
}

/* Reap whoever ended. The worker's end is ours, which in a container kills all that is left. */
static void reap(pid_t worker, int status_fd) {
	int status;
	for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
		if (pid == worker) {
			tell(status_fd, 'X', status);
			exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
		}
}

int main(int argc, char **argv) {
	if (argc < 3) return fprintf(stderr, "usage: shim SOCKET PROGRAM [ARGS...]\n"), EXIT_SHIM;
	prctl(PR_SET_DUMPABLE, 0); /* the worker, of the same user, may not trace us; its own exec undoes this for it */
	if (fill_standard_streams()) return fprintf(stderr, "shim: cannot open /dev/null: %m\n"), EXIT_SHIM;
	int status_fd = connect_to(argv[1]);
	if (status_fd < 0) return fprintf(stderr, "shim: cannot connect to %s: %m\n", argv[1]), EXIT_SHIM;
	int streams[3], ends[2];
	if (receive_streams(status_fd, streams)) return fprintf(stderr, "shim: no streams came: %m\n"), EXIT_SHIM;
	for (int number = 1; number < NSIG; number++) signal(number, SIG_DFL);
	sigset_t awaited = {0};
	for (const int *one = (int[]){SIGCHLD, SIGTERM, SIGINT, SIGHUP, 0}; *one; one++) sigaddset(&awaited, *one);
	sigprocmask(SIG_SETMASK, &awaited, NULL); /* kept until sigwaitinfo, even for a process 1 without handlers */
	if (pipe2(ends, O_CLOEXEC)) return fprintf(stderr, "shim: cannot make a pipe: %m\n"), EXIT_SHIM;
	pid_t worker = fork();
	int32_t error = worker < 0 ? errno : 0;
	if (worker == 0) {
		become_worker(argv, status_fd, streams);
		error = errno;
		(void)!write(ends[1], &error, sizeof error);
		_exit(EXIT_NOT_STARTED);
	}
	close(ends[1]);
	for (int i = 0; i < 3; i++) close(streams[i]); /* or the host would not see the worker's end of file */
	if (worker > 0) (void)!TEMP_FAILURE_RETRY(read(ends[0], &error, sizeof error)); /* its end: exec closed it */
	if (error) {
		tell(status_fd, 'E', error);
		fprintf(stderr, "shim: cannot run %s: %s\n", argv[2], strerror(error));
		return EXIT_NOT_STARTED;
	}
	tell(status_fd, 'S', 0);
	for (;;) {
		int number = sigwaitinfo(&awaited, NULL);
		if (number == SIGCHLD) reap(worker, status_fd);
		else if (number > 0) kill(worker, number);
	}
}
