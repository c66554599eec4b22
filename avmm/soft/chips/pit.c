/* The 8254 timer: channel 0 interrupts (GSI 0), channel 2 is the speaker's, and its gate and
 * output are in port 0x61.
 *
 * A channel counts 1193182 times a second from the moment when its count was loaded, or triggered.
 * Nothing is counted down: what the counter shows, and when channel 0 interrupts, is computed from
 * the time that has passed. While its gate stops a channel, that time stands.
 *
 * Saved state has that time: `count_load_time` is minus the nanoseconds since the load. KVM stores
 * a time of its host's clock there and starts anew from a loaded state, so a guest that is saved
 * and loaded more often than its tick comes never gets one. A positive value is taken to be KVM's,
 * and starts anew here as well.
 *
 * `count` 0 means that a control word came and no count yet: the channel does nothing. Ticks that
 * the guest was too slow to take are lost; KVM's way to make up for them (KVM_REINJECT_CONTROL) is
 * state that nobody can read. */

#include "inside.h"

enum { HZ = 1193182, BINARY = 0x10000, DECIMAL = 10000 };
enum { LOW = 1, HIGH = 2, WORD_LOW = 3, WORD_HIGH = 4 };        /* read_state, write_state */
#define LONG_AGO (1LL << 60)

static int64_t elapsed(const struct channel *ch, int64_t now)
{
    int64_t ns = ch->runs ? now - ch->from : ch->held;
    return ns < 0 ? 0 : ns;
}

static uint64_t ticks(const struct channel *ch, int64_t now)
{
    return (unsigned __int128)elapsed(ch, now) * HZ / 1000000000;
}

/* When `count` ticks are over, rounded up: it is never seen too early. */
static int64_t ns_of(uint64_t count)
{
    return ((unsigned __int128)count * 1000000000 + HZ - 1) / HZ;
}

static void set_elapsed(struct channel *ch, int64_t now, int64_t ns)
{
    ch->from = now - ns;
    ch->held = ns;
}

static void set_running(struct channel *ch, int64_t now, int runs)
{
    int64_t ns = elapsed(ch, now);
    ch->runs = runs;
    set_elapsed(ch, now, ns);
}

static int is_periodic(const struct channel *ch)
{
    return ch->s.mode == 2 || ch->s.mode == 3;
}

/* Does a rising gate start the count, rather than let it go on? */
static int is_triggered(const struct channel *ch)
{
    return ch->s.mode == 1 || ch->s.mode == 5;
}

/* Channel 0's first edge after `now`. */
static int64_t next_edge(struct soft_chips *c, int64_t now)
{
    struct channel *ch = &c->pit.channels[0];
    if (!ch->s.count || !ch->runs)
        return NEVER;
    int64_t passed = elapsed(ch, now);
    if (!is_periodic(ch)) {
        int64_t whole = ns_of(ch->s.count);
        return ch->s.mode != 0 && ch->s.mode != 1 && ch->s.mode != 4 ? NEVER
               : passed < whole ? ch->from + whole : NEVER;
    }
    if (ns_of(ch->s.count) < LEAST_PERIOD)
        return ch->from + (passed / LEAST_PERIOD + 1) * LEAST_PERIOD;
    uint64_t round = ticks(ch, now) / ch->s.count;
    int64_t edge;
    do
        edge = ns_of(++round * ch->s.count);
    while (edge <= passed);
    return ch->from + edge;
}

void chips_pit_run(struct soft_chips *c, int64_t now)
{
    if (!c->pit.exists || now < c->pit.next)
        return;
    c->pit.next = next_edge(c, now);
    chips_gsi(c, 0, BY_PIT, 1);
    chips_gsi(c, 0, BY_PIT, 0);
    /* Some guests have a watchdog: the PIT as an NMI at LINT0 of each CPU. */
    for (int i = 0; i < c->count; i++) {
        struct lapic *l = &c->cpus[i].lapic;
        if (c->cpus[i].exists && (l->regs[R_LINT0 / 4] & 0x700) == NMI << 8)
            chips_lapic_local(c, l, R_LINT0);
    }
    c->dirty = 1;
}

/* ---- the counters ---- */

static uint32_t from_bcd(uint32_t v)
{
    return (v >> 12 & 15) * 1000 + (v >> 8 & 15) * 100 + (v >> 4 & 15) * 10 + (v & 15);
}

static uint32_t to_bcd(uint32_t v)
{
    return (v / 1000 % 10) << 12 | (v / 100 % 10) << 8 | (v / 10 % 10) << 4 | v % 10;
}

static uint16_t counter(const struct channel *ch, int64_t now)
{
    uint32_t whole = ch->s.bcd ? DECIMAL : BINARY, n = ch->s.count;
    uint64_t d = ticks(ch, now), left;
    if (!n)
        return 0;
    if (ch->s.mode == 3) {              /* twice through the count, two at a time */
        uint64_t half = (n + 1) / 2, at = d % n;
        left = (n & ~1u) - 2 * (at < half ? at : at - half);
    } else if (ch->s.mode == 2) {
        left = n - d % n;
    } else {
        left = (n + whole - d % whole) % whole;
    }
    return ch->s.bcd ? to_bcd(left % DECIMAL) : left;
}

static int output(const struct channel *ch, int64_t now)
{
    uint32_t n = ch->s.count;
    uint64_t d = ticks(ch, now);
    int low_until_end = ch->s.mode == 0 || ch->s.mode > 5;
    if (!n)
        return !low_until_end;
    switch (ch->s.mode) {
    case 1: return d >= n;
    case 2: return !ch->runs || d % n != n - 1;
    case 3: return !ch->runs || d % n < (n + 1) / 2;
    case 4: case 5: return d != n;
    default: return d >= n;
    }
}

static void load(struct soft_chips *c, int channel, uint32_t value, int64_t now)
{
    struct channel *ch = &c->pit.channels[channel];
    ch->s.count = ch->s.bcd ? from_bcd(value) : value;
    if (!ch->s.count)
        ch->s.count = ch->s.bcd ? DECIMAL : BINARY;
    /* Channels 1 and 2 wait for their gate to rise. Channel 0's cannot, and it starts as in KVM. */
    if (!is_triggered(ch) || channel == 0) {
        set_elapsed(ch, now, 0);
        set_running(ch, now, ch->s.gate || is_triggered(ch));
    }
    if (channel == 0)
        c->pit.next = next_edge(c, now);
}

static void latch(struct channel *ch, int64_t now)
{
    if (!ch->s.count_latched) {
        ch->s.latched_count = counter(ch, now);
        ch->s.count_latched = ch->s.rw_mode;
    }
}

static void latch_status(struct channel *ch, int64_t now)
{
    if (!ch->s.status_latched) {
        ch->s.status = output(ch, now) << 7 | !ch->s.count << 6 | (ch->s.rw_mode & 3) << 4
                       | (ch->s.mode & 7) << 1 | (ch->s.bcd & 1);
        ch->s.status_latched = 1;
    }
}

static void control(struct soft_chips *c, uint8_t value, int64_t now)
{
    int number = value >> 6, access = value >> 4 & 3;
    if (number == 3) {                  /* read back */
        for (int i = 0; i < 3; i++)
            if (value >> (i + 1) & 1) {
                if (!(value & 0x20))
                    latch(&c->pit.channels[i], now);
                if (!(value & 0x10))
                    latch_status(&c->pit.channels[i], now);
            }
        return;
    }
    struct channel *ch = &c->pit.channels[number];
    if (!access) {
        latch(ch, now);
        return;
    }
    ch->s.rw_mode = ch->s.read_state = ch->s.write_state = access;
    ch->s.mode = value >> 1 & 7;
    if (ch->s.mode > 5)
        ch->s.mode -= 4;
    ch->s.bcd = value & 1;
    ch->s.count = 0;
    ch->s.count_latched = ch->s.status_latched = 0;
    ch->runs = is_triggered(ch) || ch->s.gate;
    set_elapsed(ch, now, LONG_AGO);
    if (number == 0)
        c->pit.next = NEVER;
}

static void write_count(struct soft_chips *c, int channel, uint8_t value, int64_t now)
{
    struct channel *ch = &c->pit.channels[channel];
    switch (ch->s.write_state) {
    case HIGH: load(c, channel, value << 8, now); break;
    case WORD_LOW:
        ch->s.write_latch = value;
        ch->s.write_state = WORD_HIGH;
        break;
    case WORD_HIGH:
        load(c, channel, ch->s.write_latch | value << 8, now);
        ch->s.write_state = WORD_LOW;
        break;
    default: load(c, channel, value, now);
    }
}

static uint8_t read_count(struct channel *ch, int64_t now)
{
    if (ch->s.status_latched) {
        ch->s.status_latched = 0;
        return ch->s.status;
    }
    if (ch->s.count_latched) {
        int part = ch->s.count_latched;
        ch->s.count_latched = part == WORD_LOW ? HIGH : 0;
        return part == HIGH ? ch->s.latched_count >> 8 : ch->s.latched_count;
    }
    uint16_t count = counter(ch, now);
    int part = ch->s.read_state;
    if (part == WORD_LOW)
        ch->s.read_state = WORD_HIGH;
    else if (part == WORD_HIGH)
        ch->s.read_state = WORD_LOW;
    return part == HIGH || part == WORD_HIGH ? count >> 8 : count;
}

static void set_gate(struct channel *ch, int gate, int64_t now)
{
    int rises = gate && !ch->s.gate;
    ch->s.gate = gate;
    if (rises && (is_triggered(ch) || is_periodic(ch)))
        set_elapsed(ch, now, 0);
    if (!is_triggered(ch))
        set_running(ch, now, gate);
}

/* Port 0x61: bit 0 gate 2, bit 1 speaker, bit 4 toggles with DRAM's refresh (some 15 us), bit 5
 * output 2. */
static void speaker(struct soft_chips *c, int write, uint8_t *value, int64_t now)
{
    struct channel *ch = &c->pit.channels[2];
    if (write) {
        c->pit.flags &= ~KVM_PIT_FLAGS_SPEAKER_DATA_ON;
        if (*value & 2)
            c->pit.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON;
        set_gate(ch, *value & 1, now);
    } else {
        *value = !!(c->pit.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON) << 1 | !!ch->s.gate
                 | (now >> 14 & 1) << 4 | output(ch, now) << 5;
    }
}

void chips_pit_io(struct soft_chips *c, int write, uint16_t port, uint8_t *value)
{
    int64_t now = chips_now(c).ns;
    chips_pit_run(c, now);              /* an edge that is due comes before what changes it */
    if (port == 0x61)
        speaker(c, write, value, now);
    else if (port == 0x43 && write)
        control(c, *value, now);
    else if (port != 0x43 && write)
        write_count(c, port & 3, *value, now);
    else
        *value = port == 0x43 ? 0 : read_count(&c->pit.channels[port & 3], now);
    c->dirty |= write;
}

/* ---- state ---- */

void chips_pit_save(struct soft_chips *c, struct kvm_pit_state2 *state)
{
    int64_t now = chips_now(c).ns;
    memset(state, 0, sizeof *state);
    for (int i = 0; i < 3; i++) {
        struct channel *ch = &c->pit.channels[i];
        state->channels[i] = ch->s;
        state->channels[i].count_load_time = -elapsed(ch, now);
        if (i == 0 && c->pit.next <= now)       /* not run yet: it comes as soon as it is loaded */
            state->channels[i].count_load_time = -(c->pit.next - 1 - ch->from);
    }
    state->flags = c->pit.flags;
}

int chips_pit_load(struct soft_chips *c, const struct kvm_pit_state2 *state)
{
    int64_t now = chips_now(c).ns;
    for (int i = 0; i < 3; i++)
        if (state->channels[i].count > BINARY)
            return -EINVAL;
    for (int i = 0; i < 3; i++) {
        struct channel *ch = &c->pit.channels[i];
        int64_t loaded = state->channels[i].count_load_time;
        ch->s = state->channels[i];
        ch->s.gate = i == 2 ? !!ch->s.gate : 1;
        ch->runs = ch->s.gate || is_triggered(ch);
        set_elapsed(ch, now, loaded > 0 ? 0 : loaded < -2 * LONG_AGO ? 2 * LONG_AGO : -loaded);
    }
    c->pit.flags = state->flags & (KVM_PIT_FLAGS_HPET_LEGACY | KVM_PIT_FLAGS_SPEAKER_DATA_ON);
    c->pit.next = next_edge(c, now);
    return 0;
}

void chips_pit_init(struct soft_chips *c)
{
    memset(&c->pit, 0, sizeof c->pit);
    c->pit.exists = 1;
    c->pit.next = NEVER;
    for (int i = 0; i < 3; i++) {
        struct channel *ch = &c->pit.channels[i];
        ch->s.mode = 0xff;              /* as KVM: no control word has come */
        ch->s.gate = i != 2;
        ch->s.count = BINARY;
        ch->runs = ch->s.gate;
        set_elapsed(ch, chips_now(c).ns, 0);
    }
}
