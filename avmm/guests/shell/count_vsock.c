/*
 * count on a connection to the host. The program there sends a line with the last number that it
 * received, and gets the numbers after that. A lost connection is made again, and the numbers that
 * were under way on it are sent again. Only the host's answer says which numbers have arrived.
 *
 * Everything has arrived when the guest has ended its side of a connection and the host then
 * closes it. So the host must read that end before it closes the connection (otherwise it must
 * reset it), and go on listening until the guest has taken the close. A connection that is lost
 * before that is made again, even if the host has named the last number, because the host may
 * still wait for the guest's end.
 */
#include "console.h"
#include "count.h"
#include "cpu.h"
#include "text.h"
#include "vsock.h"

#define PORT    5000
#define RETRY   (1ull << 24)            /* TSC cycles between two attempts, some milliseconds */

static uint64_t asked_at;
static bool has_asked;                  /* ever */
static char line[COUNT_LINE];           /* the host's line, as far as it has arrived */
static uint32_t line_size;
static bool is_told, is_ended;          /* on this connection: got its line, ended our side */

static bool open_vsock(void)
{
        has_asked = is_told = is_ended = false;
        if (vsock_start())
                return true;
        print("count: there is no virtio socket device\n");
        return false;
}

/* It tries again and again, because the host may start to listen later. */
static void connect(void)
{
        if (has_asked && tsc() - asked_at < RETRY)
                return;
        has_asked = true;
        asked_at = tsc();
        line_size = 0;
        is_told = is_ended = false;
        vsock_connect(PORT);
}

/* False if the host sends something that is not a number. */
static bool listen(uint64_t *given)
{
        while (!is_told && vsock_receive(&line[line_size], 1)) {
                if (line[line_size] == '\n') {
                        line[line_size] = '\0';
                        if (!parse_number(line, given))
                                return false;
                        is_told = true;
                } else if (++line_size == sizeof(line)) {
                        return false;
                }
        }
        return true;
}

static enum progress tell(uint64_t *given, uint64_t last)
{
        char text[COUNT_LINE];

        if (*given >= last)
                is_ended = is_ended || vsock_send_end();
        else if (vsock_send(text, count_line(text, *given + 1)))
                ++*given;
        return GOES_ON;
}

static enum progress step_vsock(uint64_t *given, uint64_t last)
{
        switch (vsock_poll()) {
        case VSOCK_OPEN:
                if (is_told)
                        return tell(given, last);
                if (listen(given))
                        return GOES_ON;
                print("count: the host at vsock port %u sent no number\n", PORT);
                return FAILED;
        case VSOCK_ASKED:
                return GOES_ON;
        case VSOCK_ENDED:
                if (is_ended)
                        return DONE;
                break;
        case VSOCK_CLOSED:
                break;
        }
        connect();
        return GOES_ON;
}

const struct channel count_on_vsock = {
        .name = "vsock", .open = open_vsock, .step = step_vsock, .close = vsock_stop,
};
