/* Process 1 of a worker's container: starts the worker with its standard streams connected to the host, tells the
 * host how that went, and is the container's init. Static and mounted read-only, so that an image needs no shell.
 *   shim SOCKET STDERR_FIFO PROGRAM [ARGS...]
 * Two connections to SOCKET, in this order:
 *   status  (this process): 'S' the worker runs; 'E' errno, it cannot; 'X' wait status, it ended. Integers: int32.
 *   data    (the worker):   its standard input and output.
 * Standard error is a named pipe, not a socket: a tool may open /dev/stderr again.
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

enum { EXIT_SHIM = 125, EXIT_NOT_STARTED = 127, SEND_BUFFER_BYTES = 1 << 20, MOST_DESCRIPTORS = 1 << 16 };
static char *default_path[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", NULL};
struct failure { int32_t error; char step[60]; };

static int connect_to(const char *path, int flags, int send_buffer_bytes) {
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	if (strlen(path) >= sizeof address.sun_path) return errno = ENAMETOOLONG, -1;
	strcpy(address.sun_path, path);
	int fd = socket(AF_UNIX, SOCK_STREAM | flags, 0);
	if (fd < 0) return -1;
	if (send_buffer_bytes) /* fewer will do: it only costs more turns */
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &send_buffer_bytes, sizeof send_buffer_bytes);
	return connect(fd, (struct sockaddr *)&address, sizeof address) ? -1 : fd;
}

static void tell(int status_fd, char what, int32_t value) {
	char message[1 + sizeof value] = {what};
	memcpy(message + 1, &value, sizeof value);
	/* The host may be gone, or not listen: that is nothing to die of, or to wait for. */
	(void)!send(status_fd, message, what == 'S' ? 1 : sizeof message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* In the child: become the worker. Returns the step that failed, with errno set. */
static const char *become_worker(char **argv) {
	setsid();
	int data_fd = connect_to(argv[1], 0, SEND_BUFFER_BYTES);
	if (data_fd < 0) return "connect the worker to the socket";
	if (dup2(data_fd, 0) < 0 || dup2(data_fd, 1) < 0) return "set the worker's standard input and output";
	/* Non-blocking only while it is opened: without a reader that fails instead of waiting for ever. */
	int error_fd = open(argv[2], O_WRONLY | O_NONBLOCK | O_NOCTTY);
	if (error_fd < 0) return "open the pipe for standard error";
	if (fcntl(error_fd, F_SETFL, 0) || dup2(error_fd, 2) < 0) return "set the worker's standard error";
	if (syscall(SYS_close_range, 3, ~0U, 4 /* CLOSE_RANGE_CLOEXEC, which old headers lack */))
		for (int fd = 3; fd < MOST_DESCRIPTORS; fd++) fcntl(fd, F_SETFD, FD_CLOEXEC); /* before Linux 5.11 */
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	char **worker_environment = environ;
	if (!getenv("PATH")) environ = default_path; /* to find the program; the worker does not see it */
	execvpe(argv[3], argv + 3, worker_environment);
	return "run the worker's program";
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
	if (argc < 4) return fprintf(stderr, "usage: shim SOCKET STDERR_FIFO PROGRAM [ARGS...]\n"), EXIT_SHIM;
	int status_fd = connect_to(argv[1], SOCK_CLOEXEC, 0);
	if (status_fd < 0) return fprintf(stderr, "shim: cannot connect to %s: %m\n", argv[1]), EXIT_SHIM;
	prctl(PR_SET_DUMPABLE, 0); /* the worker, of the same user, may not trace us; its own exec undoes this for it */
	for (int number = 1; number < NSIG; number++) signal(number, SIG_DFL);
	const int numbers[] = {SIGCHLD, SIGTERM, SIGINT, SIGHUP};
	sigset_t awaited;
	sigemptyset(&awaited);
	for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) sigaddset(&awaited, numbers[i]);
	sigprocmask(SIG_SETMASK, &awaited, NULL); /* kept until sigwaitinfo, even for a process 1 without handlers */

	int ends[2], failure_fd; /* not 0 to 2, should we have been started without those */
	if (pipe2(ends, O_CLOEXEC) || (failure_fd = fcntl(ends[1], F_DUPFD_CLOEXEC, 3)) < 0)
		return fprintf(stderr, "shim: cannot make a pipe: %m\n"), EXIT_SHIM;
	close(ends[1]);
	struct failure failure = {0};
	pid_t worker = fork();
	if (worker == 0) {
		const char *step = become_worker(argv);
		failure.error = errno;
		snprintf(failure.step, sizeof failure.step, "%s", step);
		(void)!write(failure_fd, &failure, sizeof failure);
		_exit(EXIT_NOT_STARTED);
	}
	if (worker < 0) {
		failure = (struct failure){errno, "fork"};
	} else {
		close(failure_fd);
		(void)!TEMP_FAILURE_RETRY(read(ends[0], &failure, sizeof failure)); /* its end: exec closed it */
	}
	if (failure.error) {
		errno = failure.error;
		fprintf(stderr, "shim: cannot %s (%s): %m\n", failure.step, argv[3]);
		tell(status_fd, 'E', failure.error);
		return EXIT_NOT_STARTED;
	}
	tell(status_fd, 'S', 0);
	for (;;) {
		int number = sigwaitinfo(&awaited, NULL);
		if (number == SIGCHLD) reap(worker, status_fd);
		else if (number > 0) kill(worker, number);
	}
}
