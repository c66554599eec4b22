#include "line.h"

#include "command.h"
#include "console.h"
#include "input.h"
#include "text.h"

#define CTRL(letter)    ((letter) - '@')
#define ESCAPE          0x1b
#define DELETE          0x7f
#define HISTORY         32

/* Keys that a terminal sends as an escape sequence, numbered above all characters. */
enum key { KEY_UP = 256, KEY_DOWN, KEY_LEFT, KEY_RIGHT, KEY_HOME, KEY_END, KEY_DELETE, KEY_NONE };

static const char *label;              /* the prompt */
static char *text;                      /* the caller's, always ended with a zero */
static int size, cursor;

static char history[HISTORY][LINE_SIZE];
static int entered;                     /* lines so far; the last HISTORY of them are kept */
static int shown;                       /* the line on display; `entered` is the new one */
static char unfinished[LINE_SIZE];      /* the new line, while an older one is on display */

static int read_escape_sequence(void)
{
        int c = get_char(), number = 0;

        if (c != '[' && c != 'O')
                return KEY_NONE;
        for (c = get_char(); (c >= '0' && c <= '9') || c == ';'; c = get_char())
                number = c == ';' ? 0 : (number * 10 + c - '0') % 1000;
        switch (c) {
        case 'A': return KEY_UP;
        case 'B': return KEY_DOWN;
        case 'C': return KEY_RIGHT;
        case 'D': return KEY_LEFT;
        case 'H': return KEY_HOME;
        case 'F': return KEY_END;
        case '~': return number == 1 || number == 7 ? KEY_HOME :
                         number == 4 || number == 8 ? KEY_END :
                         number == 3 ? KEY_DELETE : KEY_NONE;
        default: return KEY_NONE;
        }
}

static int read_key(void)
{
        const int c = get_char();

        switch (c) {
        case ESCAPE: return read_escape_sequence();
        case CTRL('A'): return KEY_HOME;
        case CTRL('B'): return KEY_LEFT;
        case CTRL('E'): return KEY_END;
        case CTRL('F'): return KEY_RIGHT;
        case CTRL('N'): return KEY_DOWN;
        case CTRL('P'): return KEY_UP;
        default: return c;
        }
}

static void bell(void)
{
        put_char('\a');
}

static void back(int columns)
{
        while (columns-- > 0)
                put_char('\b');
}

/* Redraws the line from the cursor to its end, after the text there has changed. */
static void redraw_rest(void)
{
        put_string(text + cursor);
        put_string("\x1b[K");
        back(size - cursor);
}

static void redraw_all(void)
{
        put_string("\r");
        put_string(label);
        put_string(text);
        put_string("\x1b[K");
        back(size - cursor);
}

static void move_to(int where)
{
        back(cursor - where);
        for (; cursor < where; cursor++)
                put_char(text[cursor]);
        cursor = where;
}

static void insert(char c)
{
        if (size == LINE_SIZE - 1) {
                bell();
                return;
        }
        memmove(text + cursor + 1, text + cursor, size - cursor + 1);
        text[cursor++] = c;
        size++;
        put_char(c);
        if (cursor < size)              /* an echo and nothing else, if possible */
                redraw_rest();
}

/* The text between the cursor and another place. */
static void erase_to(int where)
{
        const int from = where < cursor ? where : cursor, to = where < cursor ? cursor : where;

        if (from < 0 || to > size || from == to) {
                bell();
                return;
        }
        move_to(from);
        memmove(text + from, text + to, size - to + 1);
        size -= to - from;
        redraw_rest();
}

static int start_of_word(void)
{
        int i = cursor;

        while (i > 0 && text[i - 1] == ' ')
                i--;
        while (i > 0 && text[i - 1] != ' ')
                i--;
        return i;
}

static void show(int which)
{
        if (which < 0 || which > entered || which < entered - HISTORY) {
                bell();
                return;
        }
        if (shown == entered)
                copy_text(unfinished, text, LINE_SIZE);
        copy_text(text, which == entered ? unfinished : history[which % HISTORY], LINE_SIZE);
        shown = which;
        size = cursor = length(text);
        redraw_all();
}

static void remember(void)
{
        if (!size || (entered && same(text, history[(entered - 1) % HISTORY])))
                return;
        copy_text(history[entered++ % HISTORY], text, LINE_SIZE);
}

/* The number of characters at the beginning that two names have in common. */
static int agreement(const char *a, const char *b)
{
        int n = 0;

        while (a[n] && a[n] == b[n])
                n++;
        return n;
}

/* Can the text on the line be completed to this name? */
static bool is_candidate(const char *name)
{
        return agreement(name, text) == size;
}

static void list_candidates(void)
{
        put_string("\n");
        for (int i = 0; i < command_count; i++)
                if (is_candidate(commands[i].name))
                        print("%s  ", commands[i].name);
        put_string("\n");
        redraw_all();
}

/*
 * Adds the characters that all candidates have in common, or shows the candidates if there are
 * none.
 */
static void complete(void)
{
        const char *found = NULL;
        int candidates = 0, common = 0;

        for (int i = 0; i < command_count && cursor == size; i++) {
                const char *name = commands[i].name;

                if (!is_candidate(name))
                        continue;
                if (candidates++ == 0)
                        common = length(name);
                else if (agreement(name, found) < common)
                        common = agreement(name, found);
                found = name;
        }
        if (candidates == 0) {
                bell();
        } else if (candidates > 1 && common == size) {
                list_candidates();
        } else {
                while (cursor < common)
                        insert(found[cursor]);
                if (candidates == 1)
                        insert(' ');
        }
}

bool read_line(const char *prompt, char line[LINE_SIZE])
{
        label = prompt;
        text = line;
        text[0] = '\0';
        size = cursor = 0;
        shown = entered;
        put_string(prompt);

        for (;;) {
                const int key = read_key();

                switch (key) {
                case '\r':
                case '\n':
                        put_string("\n");
                        remember();
                        return true;
                case CTRL_C:
                        put_string("^C\n");
                        text[0] = '\0';
                        return true;
                case CTRL('D'):
                        if (size == 0) {
                                put_string("\n");
                                return false;
                        }
                        erase_to(cursor + 1);
                        break;
                case CTRL('H'):
                case DELETE:
                        erase_to(cursor - 1);
                        break;
                case KEY_DELETE:
                        erase_to(cursor + 1);
                        break;
                case CTRL('K'):
                        erase_to(size);
                        break;
                case CTRL('U'):
                        erase_to(0);
                        break;
                case CTRL('W'):
                        erase_to(start_of_word());
                        break;
                case CTRL('L'):
                        put_string("\x1b[H\x1b[2J");
                        redraw_all();
                        break;
                case KEY_LEFT:
                        if (cursor > 0)
                                move_to(cursor - 1);
                        break;
                case KEY_RIGHT:
                        if (cursor < size)
                                move_to(cursor + 1);
                        break;
                case KEY_HOME:
                        move_to(0);
                        break;
                case KEY_END:
                        move_to(size);
                        break;
                case KEY_UP:
                        show(shown - 1);
                        break;
                case KEY_DOWN:
                        show(shown + 1);
                        break;
                case '\t':
                        complete();
                        break;
                default:
                        if (key >= ' ' && key < DELETE)
                                insert(key);
                }
        }
}
