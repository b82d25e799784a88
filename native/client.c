/* nativelink_worker_entrypoint: started by a host of actions for each action, in place of its program. Hands the action
 * to the pool daemon, prints what its worker said and exits as that did; or becomes the action itself. Static, one
 * bounded buffer, no standard I/O: it costs what /bin/true does. wrapper/client.py is the same in Python, held to the
 * same tests. Nothing that an action can set decides anything: the policy is a file beside this program that only its
 * owner can write, and the action's directory is the one that our working directory lies in. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers are sent as they lie in memory");

enum { EXIT_MISUSE = 64, EXIT_LOST = 70, EXIT_BUSY = 75, EXIT_POLICY = 78, EXIT_TIMEOUT = 124, EXIT_NOT_RUN = 126 };
enum { MAX_REQUEST = 8 << 20, MAX_FRAME = 65536, MAX_POLICY = 65536, MAX_ROOTS = 16, MAX_PATH = 4096, DIGITS = 32 };
enum { SEND_TIMEOUT_S = 5, CANCEL_TIMEOUT_MS = 10000, MAX_TIMEOUT_MS = 7 * 24 * 3600 * 1000, MAX_SILENCE_S = 86400 };
static struct {
	const char *socket, *work_roots[MAX_ROOTS];
	int roots, fail_when_busy, fail_when_lost, host_times, silence_s;
} policy = {.socket = "/run/nativelink_worker_wrapper/pool.sock", .silence_s = 60};
enum { KEY, TOOL, PROTOCOL, TIMEOUT, SIDE_CHANNEL, ACTION_DIR, OURS };
static const char *const our_names[OURS] = {
	"NL_WORKER_KEY", "NL_WORKER_TOOL", "NL_WORKER_PROTOCOL", "NL_TIMEOUT_MS", "NL_SIDE_CHANNEL", "NL_ACTION_DIR"};
static const char *ours[OURS] = {"", "", "", "", "", ""};
static char **argv, frame[MAX_FRAME + 1], policy_text[MAX_POLICY + 1];
static int64_t timeout_ms;
static int action_dir = -1; /* the directory in which the side-channel file is, of an action in a work root */
static volatile sig_atomic_t last_signal;
static sigset_t held; /* SIGTERM, SIGINT and SIGCHLD: let in only where we wait */

static void put(const char *data, size_t length) {
	while (length) {
		ssize_t written = write(2, data, length);
		if (written < 0 && errno == EAGAIN) poll(&(struct pollfd){2, POLLOUT, 0}, 1, -1);
		else if (written <= 0 && errno != EINTR) return; /* nobody reads it */
		if (written > 0) data += written, length -= (size_t)written;
	}
}

static void say(const char *first, const char *second) {
	const char *parts[] = {"nativelink_worker_entrypoint: ", first, second, "\n"};
	for (int i = 0; i < 4; i++) put(parts[i], strlen(parts[i]));
}

static _Noreturn void leave(int code, const char *first, const char *second) {
	say(first, second);
	_exit(code);
}

static int64_t now_ms(void) {
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static struct timespec timespec_of(int64_t ms) { return (struct timespec){ms / 1000, ms % 1000 * 1000000}; }

static _Noreturn void wrong_policy(const char *what, const char *detail) {
	say("nativelink_worker_entrypoint.conf beside this program: ", what);
	leave(EXIT_POLICY, detail, "");
}

static void set_policy(const char *name, char *value) {
	struct { const char *name, *usual, *other; int *is_other; } choices[] = {
		{"fallback", "one-shot", "fail", &policy.fail_when_busy}, {"lost", "rerun", "fail", &policy.fail_when_lost},
		{"timeouts", "wrapper", "host", &policy.host_times}};
	for (int i = 0; i < 3; i++)
		if (!strcmp(name, choices[i].name)) {
			*choices[i].is_other = !strcmp(value, choices[i].other);
			if (!*choices[i].is_other && strcmp(value, choices[i].usual)) wrong_policy("a wrong value of ", name);
			return;
		}
	size_t length = strlen(value);
	if (!strcmp(name, "socket") && *value == '/' && length < sizeof((struct sockaddr_un *)0)->sun_path) policy.socket = value;
	else if (!strcmp(name, "work_root") && *value == '/' && policy.roots < MAX_ROOTS) {
		while (length > 1 && value[length - 1] == '/') value[--length] = 0;
		policy.work_roots[policy.roots++] = value;
	} else if (!strcmp(name, "silence_s") && *value >= '1' && *value <= '9' && length < 6) {
		policy.silence_s = (int)strtol(value, &value, 10);
		if (*value || policy.silence_s > MAX_SILENCE_S) wrong_policy("a wrong value of ", name);
	} else wrong_policy("an unknown name, a wrong value, or too many lines: ", name);
}

static char *trimmed(char *text) {
	while (*text == ' ' || *text == '\t') text++;
	size_t length = strlen(text);
	while (length && strchr(" \t\r", text[length - 1])) text[--length] = 0;
	return text;
}

/* NAME = VALUE, comments from '#', in a file beside the program. Without the file no action gets a worker. */
static void read_policy(void) {
	static char path[MAX_PATH + 64], file_name[] = "nativelink_worker_entrypoint.conf";
	struct stat program, file;
	ssize_t size = readlink("/proc/self/exe", path, MAX_PATH - 1);
	if (size <= 0 || stat("/proc/self/exe", &program)) wrong_policy("/proc/self/exe is not to be read", "");
	memcpy(strrchr(path, '/') + 1, file_name, sizeof file_name);
	int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0 && errno == ENOENT) return;
	if (fd < 0 || fstat(fd, &file)) wrong_policy("it cannot be read", strerror(errno));
	if (!S_ISREG(file.st_mode) || file.st_mode & 022 || (file.st_uid && file.st_uid != program.st_uid))
		wrong_policy("it must be a regular file of root's or of the program's owner, and writable for nobody else", "");
	size = read(fd, policy_text, sizeof policy_text);
	if (size < 0 || size > MAX_POLICY || size != file.st_size || memchr(policy_text, 0, (size_t)size))
		wrong_policy("it is too large, or no text", "");
	close(fd);
	policy_text[size] = 0;
	for (char *rest = policy_text, *line, *value; (line = strsep(&rest, "\n"));) {
		line = trimmed(line), value = strchr(line, '=');
		if (!*line || *line == '#') continue;
		if (!value) wrong_policy("a line without '=': ", line);
		*value = 0;
		set_policy(trimmed(line), trimmed(value + 1));
	}
}

/* Take our own variables out of the environment: the action never sees them. */
static void take_ours(void) {
	char **to = environ;
	for (char **from = environ; *from; from++) {
		int which = 0;
		size_t length = 0;
		for (; which < OURS; which++)
			if (length = strlen(our_names[which]), !strncmp(*from, our_names[which], length) && (*from)[length] == '=') break;
		if (which == OURS) *to++ = *from;
		else ours[which] = *from + length + 1;
	}
	*to = NULL;
	char *end;
	long long value = strtoll(ours[TIMEOUT], &end, 10);
	if (*ours[TIMEOUT] >= '0' && *ours[TIMEOUT] <= '9' && !*end && value <= MAX_TIMEOUT_MS) timeout_ms = value;
}

/* Open the directory of the action: the one directly beneath a work root that our working directory lies in. */
static int find_action_dir(void) {
	static char cwd[MAX_PATH], up[3 * MAX_PATH];
	struct stat by_path, by_parents;
	if (!policy.roots || !getcwd(cwd, sizeof cwd)) return -1;
	for (int i = 0; i < policy.roots; i++) {
		size_t length = strlen(policy.work_roots[i]);
		if (strncmp(cwd, policy.work_roots[i], length) || cwd[length] != '/') continue;
		char *end = strchr(cwd + length + 1, '/'); /* of the operation's folder; the working directory is below that */
		if (!end) continue;
		for (char *slash = end; slash; slash = strchr(slash + 1, '/')) strcat(up, "../");
		*end = 0;
		int fd = open(up, O_PATH | O_DIRECTORY | O_CLOEXEC);
		if (fd < 0 || fstat(fd, &by_parents) || lstat(cwd, &by_path)) return -1;
		return by_path.st_ino == by_parents.st_ino && by_path.st_dev == by_parents.st_dev ? fd : -1;
	}
	return -1;
}

/* Write the side-channel file, whole or not at all. Only its name is taken from the environment, and only if it can be
 * nothing but a name of the host's making. */
static void tell_host(const char *text) {
	const char *slash = strrchr(ours[SIDE_CHANNEL], '/'), *name = slash ? slash + 1 : ours[SIDE_CHANNEL];
	if (strlen(name) != DIGITS || strspn(name, "0123456789abcdef") != DIGITS || action_dir < 0) {
		say("NL_SIDE_CHANNEL names no side-channel file of this action, so the host is told nothing", "");
		return;
	}
	char temporary[DIGITS + sizeof ".nlww-"] = ".nlww-";
	unlinkat(action_dir, strcat(temporary, name), 0);
	int fd = openat(action_dir, temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
	ssize_t length = (ssize_t)strlen(text);
	if (fd >= 0 && write(fd, text, (size_t)length) == length && !renameat(action_dir, temporary, action_dir, name)) return;
	say("the side-channel file cannot be written: ", strerror(errno));
	if (fd >= 0) unlinkat(action_dir, temporary, 0);
}

static _Noreturn void timed_out(void) {
	if (!policy.host_times) tell_host("{\"failure\": \"timeout\"}");
	_exit(EXIT_TIMEOUT);
}

static void note_signal(int number) { last_signal = number; }

static void handle_signals(void (*handler)(int), int how) {
	const int ends[] = {SIGTERM, SIGINT, SIGCHLD};
	for (int i = 0; i < 3; i++) {
		sigaddset(&held, ends[i]);
		signal(ends[i], ends[i] == SIGCHLD ? SIG_DFL : handler);
	}
	signal(SIGPIPE, handler == SIG_DFL ? SIG_DFL : SIG_IGN);
	sigprocmask(how, &held, NULL);
}

/* Returns in a child with a process group of its own, which dies with us; we end it when its time is over. */
static void supervise(void) {
	handle_signals(SIG_DFL, SIG_BLOCK);
	pid_t parent = getpid(), child = fork();
	if (child < 0) leave(EXIT_NOT_RUN, "the action cannot be started: ", strerror(errno));
	if (!child) {
		setpgid(0, 0);
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent) _exit(EXIT_NOT_RUN);
		return;
	}
	setpgid(child, child);
	for (int64_t deadline = now_ms() + timeout_ms, now; (now = now_ms()) < deadline;) {
		int status;
		if (waitpid(child, &status, WNOHANG) == child) _exit(WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
		struct timespec left = timespec_of(deadline - now);
		int number = sigtimedwait(&held, NULL, &left);
		if (number == SIGTERM || number == SIGINT) kill(-child, number);
	}
	kill(-child, SIGKILL);
	waitpid(child, NULL, 0);
	timed_out();
}

/* The action as it stands; as a child of ours where nobody else ends it in time. */
static _Noreturn void run_directly(void) {
	if (!policy.host_times && timeout_ms) supervise();
	handle_signals(SIG_DFL, SIG_UNBLOCK);
	execvpe(argv[0], argv, environ);
	int error = errno;
	say("the action cannot be run: ", argv[0]);
	leave(error == ENOENT ? EXIT_NOT_RUN + 1 : EXIT_NOT_RUN, strerror(error), "");
}

static _Noreturn void do_without(const char *why) {
	if (!policy.fail_when_busy) run_directly();
	leave(EXIT_BUSY, "no warm worker can take the action (fallback = fail): ", why);
}

static _Noreturn void lost(const char *why) {
	say("the action is lost: ", why);
	if (policy.fail_when_lost) _exit(EXIT_LOST);
	tell_host("lost: run it again");
	_exit(EXIT_BUSY);
}

static char *append(char *at, const char *end, const char *text) {
	size_t length = strlen(text) + 1;
	return at && length <= (size_t)(end - at) ? (char *)memcpy(at, text, length) + length : NULL;
}

/* The whole request; NULL if it is too large. */
static char *make_request(size_t *length) {
	char *data = mmap(NULL, 8 + MAX_REQUEST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (data == MAP_FAILED) return NULL;
	struct { char magic[4]; uint32_t length; int64_t timeout_ms; uint32_t argc, envc; } head = {
		{'N', 'L', 'A', '1'}, 0, timeout_ms, 0, 0};
	char *at = data + sizeof head, *end = data + 8 + MAX_REQUEST;
	for (int i = KEY; i <= PROTOCOL; i++) at = strlen(ours[i]) <= MAX_PATH ? append(at, end, ours[i]) : NULL;
	for (; at && argv[head.argc]; head.argc++) at = append(at, end, argv[head.argc]);
	for (char **variable = environ; *variable; variable++)
		if (strchr(*variable, '=')) at = append(at, end, *variable), head.envc++;
	if (!at || head.argc > 65536 || head.envc > 65536) return NULL;
	*length = (size_t)(at - data);
	head.length = (uint32_t)*length - 8;
	return memcpy(data, &head, sizeof head);
}

static int connect_to_daemon(void) {
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	strcpy(address.sun_path, policy.socket);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &(struct timeval){SEND_TIMEOUT_S, 0}, sizeof(struct timeval)) ||
		connect(fd, (struct sockaddr *)&address, sizeof address))
		do_without("the pool daemon cannot be reached");
	return fd;
}

static int send_request(int fd, char *data, size_t length, int cwd) {
	char control[CMSG_SPACE(sizeof cwd)] __attribute__((aligned(8))) = {0};
	struct iovec part = {data, length};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	*(struct cmsghdr *)(void *)control = (struct cmsghdr){CMSG_LEN(sizeof cwd), SOL_SOCKET, SCM_RIGHTS};
	memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), &cwd, sizeof cwd);
	while (part.iov_len) {
		ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
		if (sent <= 0) return -1;
		part = (struct iovec){(char *)part.iov_base + sent, part.iov_len - (size_t)sent};
		message.msg_controllen = 0;
	}
	return 0;
}

/* What has come of the daemon's answer; a frame that is not complete yet is in `head` and `frame`. */
struct answer {
	int fd, taken, signal;
	uint32_t have;
	int64_t give_up_at;
	char head[5];
};
enum step { MORE, FALL_BACK, GONE };

static _Noreturn void failed(const struct answer *answer, uint32_t length) {
	char kind = length >= 2 ? frame[0] : 'l';
	if (length > 2) say(frame + 2, "");
	if (kind == 't') timed_out();
	if (kind == 'c') _exit(answer->signal ? 128 + answer->signal : EXIT_BUSY);
	if (kind == 'r') _exit(frame[1] ? (unsigned char)frame[1] : EXIT_MISUSE);
	lost("the pool daemon could not finish it");
}

static enum step take_frame(struct answer *answer, uint32_t length) {
	int32_t code;
	switch (answer->head[0]) {
	case 'W': return length ? GONE : MORE;
	case 'T': return length || answer->taken ? GONE : (answer->taken = 1, MORE);
	case 'D': return length && answer->taken ? (put(frame, length), MORE) : GONE;
	case 'E':
		if (length != sizeof code || !answer->taken) return GONE;
		memcpy(&code, frame, sizeof code);
		_exit(code && !(code & 0xff) ? 1 : code & 0xff);
	case 'O': run_directly(); /* the tree is as it came */
	case 'B': return answer->taken ? GONE : FALL_BACK;
	case 'F': failed(answer, length);
	}
	return GONE;
}

/* Read what there is, up to the end of one frame. errno is EAGAIN if there is nothing. */
static enum step read_some(struct answer *answer) {
	uint32_t length = 0;
	if (answer->have >= 5) memcpy(&length, answer->head + 1, sizeof length);
	char *to = answer->have < 5 ? answer->head + answer->have : frame + (answer->have - 5);
	errno = 0;
	ssize_t got = recv(answer->fd, to, 5 + length - answer->have, MSG_DONTWAIT);
	if (got <= 0) return got < 0 && (errno == EINTR || errno == EAGAIN) ? MORE : GONE;
	answer->have += (uint32_t)got;
	if (answer->have < 5) return MORE;
	memcpy(&length, answer->head + 1, sizeof length);
	if (length > MAX_FRAME || answer->have < 5 + length) return length > MAX_FRAME ? GONE : MORE;
	answer->have = 0;
	frame[length] = 0;
	return take_frame(answer, length);
}

/* The daemon is silent, or what it says makes no sense. After SHUT_RD it can send nothing more: what it has sent before
 * is all there is, and tells whether the action is its or ours. */
static _Noreturn void give_up(struct answer *answer, const char *why) {
	shutdown(answer->fd, SHUT_RD);
	while (!answer->taken && read_some(answer) == MORE && errno != EAGAIN) continue;
	if (answer->taken) lost(why);
	if (answer->signal) _exit(128 + answer->signal);
	do_without(why);
}

/* The first signal asks the daemon to cancel, and to say when nothing is left; the second ends us at once. */
static void cancel(struct answer *answer) {
	if (answer->signal) _exit(128 + last_signal);
	answer->signal = last_signal;
	last_signal = 0;
	shutdown(answer->fd, SHUT_WR);
	answer->give_up_at = now_ms() + CANCEL_TIMEOUT_MS;
}

static _Noreturn void wait_for_outcome(struct answer *answer) {
	const sigset_t none = {0};
	for (int64_t silent_since = now_ms();;) {
		if (last_signal) cancel(answer);
		int64_t now = now_ms(), until = silent_since + policy.silence_s * 1000LL;
		if (answer->signal && answer->give_up_at < until) until = answer->give_up_at;
		if (now >= until && answer->signal) _exit(128 + answer->signal);
		if (now >= until) give_up(answer, "the pool daemon says nothing any more");
		struct timespec left = timespec_of(until - now);
		if (ppoll(&(struct pollfd){answer->fd, POLLIN, 0}, 1, &left, &none) <= 0) continue;
		enum step step = read_some(answer);
		if (step == GONE) give_up(answer, "the pool daemon is gone, or talks nonsense");
		if (step == FALL_BACK) answer->signal ? _exit(128 + answer->signal) : do_without(frame);
		if (errno != EAGAIN) silent_since = now_ms();
	}
}

int main(int argc, char **arguments) {
	argv = arguments + 1;
	if (argc < 2) leave(EXIT_MISUSE, "no action: a host of actions starts this with the action's command line", "");
	take_ours();
	if (!strcmp(argv[argc - 2], "--persistent_worker") && !*ours[ACTION_DIR])
		leave(EXIT_MISUSE, "--persistent_worker was given without an action: with supports-workers=1 the host starts its "
			"entrypoint as a persistent worker of its own. Give the actions a persistentWorkerKey instead", "");
	read_policy();
	action_dir = find_action_dir();
	if ((!*ours[KEY] && !*ours[TOOL]) || action_dir < 0) run_directly();
	size_t length;
	char *data = make_request(&length);
	int cwd = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (!data || cwd < 0) run_directly();
	/* Signals are let in while we wait for the daemon only: none comes between a look and the wait. */
	handle_signals(note_signal, SIG_BLOCK);
	struct answer answer = {.fd = connect_to_daemon()};
	if (send_request(answer.fd, data, length, cwd)) give_up(&answer, "the pool daemon does not take the request");
	munmap(data, 8 + MAX_REQUEST);
	close(cwd);
	wait_for_outcome(&answer);
}
