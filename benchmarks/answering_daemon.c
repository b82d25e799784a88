/* Stands for the pool daemon where only the client is measured: takes one request after another on the unix socket
 * that it is named, and answers each at once with TAKEN and END 0. It is C, so that nearly all that is measured is
 * the client.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv) {
	static const char answer[] = "T\0\0\0\0E\4\0\0\0\0\0\0\0";
	static char request[1 << 20];
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	if (argc != 2 || strlen(argv[1]) >= sizeof address.sun_path) return fprintf(stderr, "usage: %s SOCKET\n", *argv), 64;
	strcpy(address.sun_path, argv[1]);
	int listener = socket(AF_UNIX, SOCK_STREAM, 0);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 64)) return perror(argv[1]), 71;
	for (int client; (client = accept(listener, NULL, NULL)) >= 0; close(client)) {
		char control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8)));
		struct iovec data = {request, sizeof request};
		struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
		ssize_t have = recvmsg(client, &message, 0);
		uint32_t length = 0;
		struct cmsghdr *rights = have > 0 ? CMSG_FIRSTHDR(&message) : NULL;
		if (rights && rights->cmsg_type == SCM_RIGHTS) close(*(int *)CMSG_DATA(rights));
		if (have >= 8) memcpy(&length, request + 4, sizeof length);
		for (ssize_t got; have > 0 && have < (ssize_t)length + 8; have += got)
			if ((got = recv(client, request + have, sizeof request - have, 0)) <= 0) have = got = 0;
		if (have > 0) (void)!send(client, answer, sizeof answer - 1, MSG_NOSIGNAL);
	}
	return perror("accept"), 71;
}
