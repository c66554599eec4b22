/*
 * count: a running number, on the console or on several channels at once. It shows that nothing is
 * lost and nothing comes twice, whatever is done to the guest meanwhile.
 */
#include "count.h"

#include "command.h"
#include "console.h"
#include "hvc.h"
#include "serial.h"
#include "text.h"

#define FOR_EVER        UINT64_MAX

uint32_t count_line(char line[COUNT_LINE], uint64_t number)
{
        char text[NUMBER_SIZE];
        uint32_t size = 0;

        for (const char *digit = number_text(text, number, 10); *digit; digit++)
                line[size++] = *digit;
        line[size++] = '\n';
        return size;
}

static void put_line(uint64_t number, void (*put)(char c))
{
        char line[COUNT_LINE];
        const uint32_t size = count_line(line, number);

        for (uint32_t i = 0; i < size; i++) {
                if (line[i] == '\n')
                        put('\r');
                put(line[i]);
        }
}

static enum progress step_console(uint64_t *given, uint64_t last)
{
        if (*given == last)
                return DONE;
        print("%lu\n", ++*given);
        return GOES_ON;
}

static enum progress step_serial(uint64_t *given, uint64_t last)
{
        if (*given == last)
                return DONE;
        put_line(++*given, serial_put);
        return GOES_ON;
}

static bool open_hvc(void)
{
        if (hvc_init())
                return true;
        print("count: there is no virtio console\n");
        return false;
}

static enum progress step_hvc(uint64_t *given, uint64_t last)
{
        if (*given == last)
                return DONE;
        put_line(++*given, hvc_put);
        hvc_flush();
        return GOES_ON;
}

static const struct channel count_on_console = { .name = "", .step = step_console };
static const struct channel count_on_serial = { .name = "serial", .step = step_serial };
static const struct channel count_on_hvc = {
        .name = "hvc", .open = open_hvc, .step = step_hvc, .close = hvc_drain,
};

static const struct channel *const named[] = {
        &count_on_serial, &count_on_hvc, &count_on_vsock, &count_on_disk,
};

#define MOST    (int)(sizeof(named) / sizeof(*named))

struct count {
        uint64_t last;
        int channels;
        const struct channel *channel[MOST];
        uint64_t given[MOST];
        bool is_done[MOST];
};

/* False if there is no such channel, or if it was added before. */
static bool add_channel(struct count *count, const char *name)
{
        for (int i = 0; i < count->channels; i++)
                if (same(name, count->channel[i]->name))
                        return false;
        for (int i = 0; i < MOST; i++) {
                if (same(name, named[i]->name)) {
                        count->channel[count->channels++] = named[i];
                        return true;
                }
        }
        return false;
}

static bool parse(struct count *count, char *words)
{
        const char *word = next_word(&words);

        if (word && parse_number(word, &count->last))
                word = next_word(&words);
        for (; word; word = next_word(&words))
                if (!add_channel(count, word)) {
                        print("%s? It counts to serial, hvc, vsock and disk, once each.\n", word);
                        return false;
                }
        if (!count->channels)
                count->channel[count->channels++] = &count_on_console;
        return true;
}

/* The channels take turns, until the slowest one has all numbers. */
static void keep_counting(struct count *count)
{
        const bool on_any_key = count->last == FOR_EVER;
        int left = count->channels;

        while (left && !should_stop(on_any_key)) {
                for (int i = 0; i < count->channels; i++) {
                        if (count->is_done[i])
                                continue;
                        switch (count->channel[i]->step(&count->given[i], count->last)) {
                        case GOES_ON:
                                break;
                        case DONE:
                                count->is_done[i] = true;
                                left--;
                                break;
                        case FAILED:
                                return;
                        }
                }
        }
        swallow_key(on_any_key);
}

bool count_command(char *arguments, int width)
{
        struct count count = { .last = FOR_EVER };
        int opened = 0;

        (void)width;
        if (!parse(&count, arguments))
                return false;
        while (opened < count.channels &&
               (!count.channel[opened]->open || count.channel[opened]->open()))
                opened++;
        if (opened == count.channels)
                keep_counting(&count);
        while (opened--)
                if (count.channel[opened]->close)
                        count.channel[opened]->close();
        return true;
}
