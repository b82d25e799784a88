/* The per-action client: NativeLink starts it for every action, as `nativelink_worker_entrypoint ARGV...`, in the
 * action's directory. It hands the action to the pool daemon and waits, or, where no warm worker serves it, becomes
 * the action. wrapper/client.py does the same in Python, tests/client/ holds both to it, wrapper/client_protocol.py
 * describes the frames. Every action of a build waits for us: no stdio, no locale, no allocation. The action may forge
 * every variable; not the policy file beside us, which alone names socket and work roots, and not our directory. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#define NAME "nativelink_worker_entrypoint"
#define SAY(...) say((const char *[]){__VA_ARGS__, NULL})
enum { EXIT_USAGE = 64, EXIT_LOST = 70, EXIT_TRY_AGAIN = 75, EXIT_POLICY = 78, EXIT_TIMEOUT = 124, EXIT_NOT_RUN = 126 };
enum { MAX_BODY = 8 << 20, MAX_STRINGS = 65536, MAX_NAME = 4096, MAX_PAYLOAD = 65536, MAX_POLICY = 65536 };
enum { HEADER = 8, FRAME_HEADER = 5, MAX_ROOTS = 16, MAX_TIMEOUT_MS = 604800000, CONFIRM_CANCEL_S = 10, SEND_S = 5 };

static struct {
	const char *path, *socket, *work_roots[MAX_ROOTS];
	int root_count, fallback_fails, lost_fails, host_times_out;
	long silence_ms;
} policy = {.path = "/proc/self/exe", .socket = "/run/nativelink_worker_wrapper/pool.sock", .silence_ms = 60000};

enum { KEY, TOOL, PROTOCOL, TIMEOUT, SIDE_CHANNEL, ACTION_DIR, VARIABLES };
static const char *variables[VARIABLES] = {"NL_WORKER_KEY", "NL_WORKER_TOOL", "NL_WORKER_PROTOCOL",
	"NL_TIMEOUT_MS", "NL_SIDE_CHANNEL", "NL_ACTION_DIR"}; /* their names, and then their values */
static char **action_argv;
static long timeout_ms; /* 0: none */
static int action_directory = -1, daemon_fd = -1;
static volatile sig_atomic_t cancelled_by;

/* ---- words and numbers ---- */
static void write_to_stderr(const char *data, size_t size) {
	while (size) {
		ssize_t written = write(2, data, size);
		if (written >= 0) data += written, size -= written;
		else if (errno == EAGAIN) poll(&(struct pollfd){.fd = 2, .events = POLLOUT}, 1, -1);
		else if (errno != EINTR) return; /* nobody listens: that is nothing to fail of */
	}
}

/* One line, in one write. */
static void say(const char *const *parts) {
	static char line[sizeof NAME + 3 * PATH_MAX + MAX_PAYLOAD] = NAME ": ";
	line[sizeof NAME + 1] = 0;
	for (; *parts; parts++) strncat(line, *parts, sizeof line - 2 - strlen(line));
	signal(SIGPIPE, SIG_IGN);
	write_to_stderr(line, stpcpy(line + strlen(line), "\n") - line);
}

/* A decimal number, with so many digits after a point at most, in units of the last of these; -1 for anything else. */
static long number_in(const char *text, long most, int decimals) {
	long number = 0, scale = 1;
	int after = -1; /* digits after the point */
	for (const char *at = text; *at; at++) {
		if (*at == '.' && after < 0 && decimals && at > text && at[1]) after = 0;
		else if (*at < '0' || *at > '9' || (after >= 0 && after++ == decimals) || number > most) return -1;
		else number = number * 10 + *at - '0';
	}
	for (after = after < 0 ? 0 : after; after < decimals; after++) scale *= 10;
	return *text && number <= most / scale ? number * scale : -1;
}

/* ---- the policy file ---- */
static _Noreturn void refuse_policy(const char *why, const char *what) {
	SAY(policy.path, ": ", why, what);
	_exit(EXIT_POLICY);
}

static char *trimmed(char *text) {
	text += strspn(text, " \t\r");
	char *end = text + strlen(text);
	while (end > text && strchr(" \t\r", end[-1])) end--;
	return *end = 0, text;
}
static int choose(const char *value, const char *no, const char *yes, int *chosen) {
	return *chosen = !strcmp(value, yes), *chosen || !strcmp(value, no);
}

/* Whether the value is one for this name. */
static int set_policy(const char *name, char *value) {
	size_t length = strlen(value);
	if (!strcmp(name, "socket"))
		return policy.socket = value, *value == '/' && length < sizeof((struct sockaddr_un *)0)->sun_path;
	if (!strcmp(name, "work_root")) {
		while (length && value[length - 1] == '/') value[--length] = 0;
		if (*value != '/' || length >= PATH_MAX || policy.root_count == MAX_ROOTS) return 0;
		return policy.work_roots[policy.root_count++] = value, 1;
	}
	if (!strcmp(name, "fallback")) return choose(value, "one-shot", "fail", &policy.fallback_fails);
	if (!strcmp(name, "lost")) return choose(value, "rerun", "fail", &policy.lost_fails);
	if (!strcmp(name, "timeouts")) return choose(value, "wrapper", "host", &policy.host_times_out);
	if (!strcmp(name, "silence_s")) return (policy.silence_ms = number_in(value, 86400000, 3)) > 0;
	refuse_policy("there is no such name: ", name);
}

static void read_policy(void) {
	static char path[PATH_MAX + sizeof NAME ".conf"], text[MAX_POLICY + 2];
	struct stat program, file;
	ssize_t size = readlink(policy.path, path, PATH_MAX), got;
	if (size <= 0 || size >= PATH_MAX || *path != '/' || stat(policy.path, &program))
		refuse_policy("cannot be read, so the policy file cannot be found: ", strerror(errno));
	path[size] = 0;
	strcpy(strrchr(path, '/') + 1, NAME ".conf");
	policy.path = path;
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	if (fd < 0 && errno == ENOENT) return;
	if (fd < 0 || fstat(fd, &file)) refuse_policy("cannot be opened: ", strerror(errno));
	if (!S_ISREG(file.st_mode)) refuse_policy("is not a regular file", "");
	if ((file.st_uid && file.st_uid != program.st_uid) || file.st_mode & 022)
		refuse_policy("must belong to root or to the program's owner, and be writable by nobody else", "");
	for (size = 0; (got = read(fd, text + size, MAX_POLICY + 1 - size)) > 0;) size += got;
	if (got < 0 || size > MAX_POLICY) refuse_policy("cannot be read: ", got < 0 ? strerror(errno) : "more than 64 KiB");
	close(fd);
	for (char *line = text, *end; line < text + size; line = end + 1) {
		if (!(end = memchr(line, '\n', text + size - line))) end = text + size;
		*end = 0;
		if (strlen(line) != (size_t)(end - line)) refuse_policy("has a NUL in the line ", line);
		char *name = trimmed(line), *equals = strchr(name, '=');
		if (!*name || *name == '#') continue;
		if (!equals) refuse_policy("is not \"name = value\": ", name);
		*equals = 0;
		if (!set_policy(trimmed(name), trimmed(equals + 1))) refuse_policy("has a wrong value for ", trimmed(name));
	}
}

/* ---- the action ---- */
/* Take our variables out of the environment; of one that is there twice the first counts. */
static void read_environment(void) {
	for (int i = 0; i < VARIABLES; i++) {
		const char *name = variables[i], *value = getenv(name);
		variables[i] = value ? value : "";
		unsetenv(name);
	}
	timeout_ms = number_in(variables[TIMEOUT], MAX_TIMEOUT_MS, 0);
	if (timeout_ms < 0) timeout_ms = 0;
}

/* Open the directory directly beneath a work root that the working directory lies in, if there is one. It is opened
 * from the working directory upwards, and then is what the path says, or something was moved. */
static void find_action_directory(void) {
	static char cwd[PATH_MAX], root[PATH_MAX], upwards[PATH_MAX] = ".";
	struct stat named, opened;
	size_t length = 0;
	if (!policy.root_count || !getcwd(cwd, sizeof cwd) || *cwd != '/') return;
	for (int i = 0; i < 2 * policy.root_count && !length; i++) { /* first as they are named, then what they are */
		const char *one = policy.work_roots[i % policy.root_count];
		if (i >= policy.root_count && !(one = realpath(one, root))) continue;
		if (!strncmp(cwd, one, strlen(one)) && cwd[strlen(one)] == '/') length = strlen(one);
	}
	if (!length) return;
	char *end = strchrnul(cwd + length + 1, '/'), *next = upwards;
	for (const char *rest = end; *rest; rest++)
		if (*rest == '/' && next < upwards + sizeof upwards - 4) next = stpcpy(next, "../");
	*end = 0;
	int fd = open(upwards, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &opened) || lstat(cwd, &named)) return;
	if (opened.st_dev == named.st_dev && opened.st_ino == named.st_ino) action_directory = fd;
}

/* Write the side-channel file. It lies in the action directory, whatever the variable says, or nowhere. */
static void tell_host(const char *text) {
	const char *slash = strrchr(variables[SIDE_CHANNEL], '/'), *name = slash ? slash + 1 : variables[SIDE_CHANNEL];
	char fresh[40] = ".";
	if (action_directory < 0 || strlen(name) != 32 || strspn(name, "0123456789abcdef") != 32)
		return SAY("NativeLink cannot be told: NL_SIDE_CHANNEL names no such file, or this is no action directory");
	strcpy(stpcpy(fresh + 1, name), ".new");
	unlinkat(action_directory, fresh, 0);
	int fd = openat(action_directory, fresh, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
	ssize_t size = strlen(text);
	if (fd >= 0 && write(fd, text, size) == size && !close(fd) &&
		!renameat(action_directory, fresh, action_directory, name)) return;
	SAY("NativeLink cannot be told by its side-channel file: ", strerror(errno));
	unlinkat(action_directory, fresh, 0);
}

/* ---- to run it ourselves ---- */
/* Become the action; the program is looked for as execvp does it. */
static _Noreturn void become_action(void) {
	static char candidate[PATH_MAX];
	const char *name = action_argv[0], *path = getenv("PATH");
	int denied = 0, is_searched = *name && !strchr(name, '/') && strlen(name) <= NAME_MAX;
	if (!is_searched) execve(name, action_argv, environ);
	for (const char *end, *at = path ? path : "/usr/bin:/bin"; is_searched; at = end + 1) {
		size_t length = (end = strchrnul(at, ':')) - at;
		errno = ENAMETOOLONG;
		if (length + strlen(name) + 2 <= sizeof candidate) {
			strcpy(length ? stpcpy(mempcpy(candidate, at, length), "/") : candidate, name);
			execve(candidate, action_argv, environ);
		}
		denied |= errno == EACCES;
		if (errno != ENOENT && errno != ENOTDIR && errno != ENAMETOOLONG && errno != EACCES) break;
		errno = denied ? EACCES : ENOENT;
		if (!*end) break;
	}
	int error = errno;
	SAY("cannot run ", name, ": ", strerror(error));
	_exit(EXIT_NOT_RUN + (error == ENOENT));
}

/* Run the action as a process group of its own until it ends or its time does. */
static _Noreturn void supervise(void) {
	sigset_t awaited = {0}, none = {0};
	for (const int *one = (int[]){SIGCHLD, SIGALRM, SIGTERM, SIGINT, 0}; *one; one++) sigaddset(&awaited, *one);
	sigprocmask(SIG_BLOCK, &awaited, NULL);
	pid_t us = getpid(), action = fork();
	if (action == 0) {
		setpgid(0, 0), prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != us) _exit(EXIT_NOT_RUN);
		sigprocmask(SIG_SETMASK, &none, NULL), become_action();
	}
	if (action < 0) SAY("cannot start a process: ", strerror(errno)), _exit(EXIT_NOT_RUN);
	setpgid(action, action); /* both of us do it, so that it is done before either goes on */
	setitimer(ITIMER_REAL, &(struct itimerval){.it_value = {timeout_ms / 1000, timeout_ms % 1000 * 1000}}, NULL);
	for (int status, number = 0; number != SIGALRM; number = sigwaitinfo(&awaited, NULL)) {
		if (number == SIGTERM || number == SIGINT) kill(-action, number);
		for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) /* any: we may be process 1 of a namespace */
			if (pid == action) _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
	}
	kill(-action, SIGKILL), kill(action, SIGKILL);
	(void)!TEMP_FAILURE_RETRY(waitpid(action, NULL, 0));
	tell_host("{\"failure\": \"timeout\"}");
	SAY("the action did not end within ", variables[TIMEOUT], " ms");
	_exit(EXIT_TIMEOUT);
}

static _Noreturn void run_directly(void) {
	for (int number = 1; number < NSIG; number++) signal(number, SIG_DFL);
	sigprocmask(SIG_SETMASK, &(sigset_t){0}, NULL);
	if (cancelled_by) _exit(128 + cancelled_by); /* from here on a signal ends us */
	if (timeout_ms && !policy.host_times_out) supervise();
	become_action();
}

/* ---- to let the daemon run it ---- */
static unsigned char request[HEADER + MAX_BODY];
static size_t request_size;

static void put_integer(uint64_t value, int bytes) {
	while (bytes--) request[request_size++] = value, value >>= 8;
}
static int put_string(const char *text) {
	size_t size = strlen(text) + 1;
	if (size > sizeof request - request_size) return 0;
	return memcpy(request + request_size, text, size), request_size += size, 1;
}
/* Variables without a name cannot be set by anybody's `NAME=value`: they stay here. */
static int has_name(const char *entry) { return *entry != '=' && strchr(entry, '='); }

/* Whether it is small enough. */
static int write_request(size_t argc) {
	size_t envc = 0, size;
	for (char **entry = environ; *entry; entry++) envc += has_name(*entry);
	if (argc > MAX_STRINGS || envc > MAX_STRINGS) return 0;
	request_size = HEADER;
	put_integer(timeout_ms, 8), put_integer(argc, 4), put_integer(envc, 4);
	for (int i = KEY; i <= PROTOCOL; i++)
		if (strlen(variables[i]) > MAX_NAME || !put_string(variables[i])) return 0;
	for (char **entry = action_argv; *entry; entry++)
		if (!put_string(*entry)) return 0;
	for (char **entry = environ; *entry; entry++)
		if (has_name(*entry) && !put_string(*entry)) return 0;
	size = request_size, request_size = 0;
	put_integer('N' | 'L' << 8 | 'A' << 16 | '1' << 24, 4), put_integer(size - HEADER, 4);
	return request_size = size, 1;
}

/* The first signal asks the daemon to cancel, and gives it a while to confirm; the second does not wait. */
static void on_signal(int number) {
	int error = errno;
	if (cancelled_by) _exit(128 + (number == SIGALRM ? cancelled_by : number));
	cancelled_by = number;
	signal(SIGALRM, on_signal), alarm(CONFIRM_CANCEL_S);
	shutdown(daemon_fd, SHUT_WR), errno = error;
}

/* Whether we are connected. */
static int connect_to_daemon(void) {
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct timeval send_time = {SEND_S, 0}, silence = {policy.silence_ms / 1000, policy.silence_ms % 1000 * 1000};
	strcpy(address.sun_path, policy.socket);
	if ((daemon_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) < 0) return 0;
	signal(SIGTERM, on_signal), signal(SIGINT, on_signal), signal(SIGPIPE, SIG_IGN);
	sigprocmask(SIG_SETMASK, &(sigset_t){0}, NULL);
	setsockopt(daemon_fd, SOL_SOCKET, SO_SNDTIMEO, &send_time, sizeof send_time); /* of connect, too */
	setsockopt(daemon_fd, SOL_SOCKET, SO_RCVTIMEO, &silence, sizeof silence);
	return !connect(daemon_fd, (struct sockaddr *)&address, sizeof address);
}

/* Send the request, and the working directory with its first byte; whether all was taken. */
static int send_request(int cwd) {
	char control[CMSG_SPACE(sizeof cwd)] __attribute__((aligned(8))) = {0};
	struct iovec data = {request, request_size};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *first = CMSG_FIRSTHDR(&message);
	*first = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof cwd)};
	memcpy(CMSG_DATA(first), &cwd, sizeof cwd);
	while (data.iov_len) {
		ssize_t sent = TEMP_FAILURE_RETRY(sendmsg(daemon_fd, &message, MSG_NOSIGNAL));
		if (sent <= 0) return 0;
		data.iov_base = (char *)data.iov_base + sent, data.iov_len -= sent, message.msg_controllen = 0;
	}
	return 1;
}

static struct {
	unsigned char data[FRAME_HEADER + MAX_PAYLOAD + 1];
	size_t begin, end;
	int is_taken;
} replies;

static uint32_t integer_at(const unsigned char *at) { return at[0] | at[1] << 8 | at[2] << 16 | (uint32_t)at[3] << 24; }
/* The size of the frame that comes next; 0 if it is not whole, -1 if it is none. */
static ssize_t frame_size(void) {
	static const struct { char letter, when; uint32_t least, most; } kinds[] = {
		{'W', '*', 0, 0}, {'T', '<', 0, 0}, {'O', '*', 0, 4096}, {'B', '<', 0, 4096}, /* <, >: before, after TAKEN */
		{'D', '>', 1, MAX_PAYLOAD}, {'E', '>', 4, 4}, {'F', '*', 2, 2 + 16384}, {0}};
	const unsigned char *frame = replies.data + replies.begin;
	size_t have = replies.end - replies.begin, kind = 0;
	while (kinds[kind].letter && kinds[kind].letter != *frame) kind++;
	if (have && (!kinds[kind].letter || kinds[kind].when == (replies.is_taken ? '<' : '>'))) return -1;
	if (have < FRAME_HEADER) return 0;
	uint32_t length = integer_at(frame + 1);
	if (length < kinds[kind].least || length > kinds[kind].most) return -1;
	if (*frame == 'F' && have > FRAME_HEADER && !memchr("tlcr", frame[FRAME_HEADER], 4)) return -1;
	return have < FRAME_HEADER + length ? 0 : (ssize_t)(FRAME_HEADER + length);
}

/* End without an end of the action: for 't'imeout, 'l'ost, 'c'ancelled, 'r'efused with this code. */
static _Noreturn void fail(char kind, int code, const char *message) {
	if (kind == 'l' && cancelled_by) kind = 'c';
	if (kind == 'l' && !policy.lost_fails) tell_host(NAME ": the infrastructure failed, run this action again\n");
	if (kind == 't' && !policy.host_times_out) tell_host("{\"failure\": \"timeout\"}"); /* the other is no JSON */
	SAY(message);
	if (kind == 'c') code = cancelled_by ? 128 + cancelled_by : EXIT_TRY_AGAIN;
	if (kind == 'l') code = policy.lost_fails ? EXIT_LOST : EXIT_TRY_AGAIN;
	_exit(kind == 't' ? EXIT_TIMEOUT : code ? code : 1);
}

/* Do what the daemon says. Returns if we are to run the action: NULL, or the reason if only as a fallback. */
static const char *obey_daemon(void) {
	for (ssize_t size, got;;) {
		for (; (size = frame_size()) > 0; replies.begin += size) {
			unsigned char *frame = replies.data + replies.begin, *payload = frame + FRAME_HEADER;
			if (*frame == 'T') replies.is_taken = 1;
			if (*frame == 'D') write_to_stderr((char *)payload, size - FRAME_HEADER);
			if (*frame == 'E') _exit(payload[0] ? payload[0] : integer_at(payload) != 0);
			if (*frame == 'O') return NULL;
			if (*frame != 'B' && *frame != 'F') continue;
			frame[size] = 0; /* there is room, and nothing is looked at after these */
			if (*frame == 'B') return (char *)payload;
			fail(payload[0], payload[1], (char *)payload + 2);
		}
		if (size < 0) break;
		memmove(replies.data, replies.data + replies.begin, replies.end -= replies.begin);
		replies.begin = 0;
		got = recv(daemon_fd, replies.data + replies.end, FRAME_HEADER + MAX_PAYLOAD - replies.end, 0);
		if (got > 0) replies.end += got;
		else if (got < 0 && errno == EAGAIN) shutdown(daemon_fd, SHUT_RD); /* TAKEN is here by now, or cannot come */
		else if (got == 0 || errno != EINTR) break;
	}
	shutdown(daemon_fd, SHUT_RD);
	if (replies.is_taken) fail('l', 0, "the pool daemon was lost while it had the action");
	return "it went away, or said nothing that can be understood";
}

int main(int argc, char **argv) {
	int cwd = 0;
	while (cwd >= 0 && cwd < 3) cwd = open("/dev/null", O_RDWR | O_CLOEXEC); /* nothing of ours is a standard stream */
	close(cwd);
	read_environment();
	action_argv = argv + 1;
	if (argc < 2) return SAY("usage: " NAME " PROGRAM [ARGS...]; NativeLink starts it so"), EXIT_USAGE;
	if (!strcmp(argv[argc - 1], "--persistent_worker") && !*variables[ACTION_DIR])
		return SAY("started by NativeLink as a persistent worker of its own, because the action has the property"
			" supports-workers=1: take that away, and give it persistentWorkerKey instead"), EXIT_USAGE;
	read_policy();
	int is_for_worker = *variables[KEY] || *variables[TOOL];
	if (is_for_worker || timeout_ms) find_action_directory();
	if (!is_for_worker || action_directory < 0 || !write_request(argc - 1)) run_directly();
	if ((cwd = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0) run_directly();
	const char *why = connect_to_daemon() ? NULL : strerror(errno);
	if (!why && !send_request(cwd)) shutdown(daemon_fd, SHUT_RD); /* no TAKEN any more; what has come is read */
	if (!why) why = obey_daemon();
	if (cancelled_by) _exit(128 + cancelled_by);
	close(daemon_fd), close(cwd);
	if (!why || !policy.fallback_fails) run_directly();
	return SAY("the pool daemon at ", policy.socket, " did not take the action: ", why), EXIT_TRY_AGAIN;
}
