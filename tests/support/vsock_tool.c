/* For a guest: `vsock send PORT` sends its input to a port of the host's and prints what comes
 * back; `vsock echo PORT` gives back to whoever connects what it gets, until the end of that. */

#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void copy(int from, int to)
{
    static char data[65536];
    ssize_t count;
    while ((count = read(from, data, sizeof data)) > 0)
        for (ssize_t at = 0, done; at < count; at += done)
            if ((done = write(to, data + at, count - at)) < 0) {
                perror("write");
                exit(1);
            }
    if (count < 0) {
        perror("read");
        exit(1);
    }
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    int echo = !strcmp(argv[1], "echo");
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_port = atoi(argv[2]) };
    address.svm_cid = echo ? VMADDR_CID_ANY : VMADDR_CID_HOST;
    struct sockaddr *at = (struct sockaddr *)&address;
    if (!echo) {
        if (connect(fd, at, sizeof address)) {
            perror("connect");
            return 1;
        }
        copy(0, fd);
        shutdown(fd, SHUT_WR);
        copy(fd, 1);
        return 0;
    }
    if (bind(fd, at, sizeof address) || listen(fd, 8)) {
        perror("listen");
        return 1;
    }
    puts("listening");
    fflush(stdout);
    int peer = accept(fd, NULL, NULL);
    copy(peer, peer);
    return 0;
}
