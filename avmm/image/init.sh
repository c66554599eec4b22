#!/bin/busybox sh
# The first process of a guest that `avmm image build` has made.

bb=/bin/busybox
$bb mkdir -p /bin /sbin /usr/bin /usr/sbin /proc /sys /dev /run /tmp /root /mnt
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs devtmpfs /dev
$bb --install -s
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM="${TERM:-linux}"
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp

finish() {
    sync
    /bin/finish "$1"
    # A kernel that cannot switch the machine off would halt it for ever, but every kernel can
    # reset it.
    [ -d /sys/firmware/acpi ] && poweroff -f
    reboot -f
}

while read -r module; do
    insmod "/lib/modules/$module.ko" || echo "init: $module could not be loaded" >&2
done </lib/modules/order

hostname avmm
ip link set lo up
for link in /sys/class/net/*; do
    name=${link##*/}
    [ -e "$link/device" ] || continue
    ip link set "$name" up
    udhcpc -q -n -t 3 -i "$name" -s /etc/udhcpc || echo "init: no address for $name" >&2
done

# /dev/console leads to the last of the active consoles.
console=console
for name in $(cat /sys/class/tty/console/active); do console=$name; done
cd /root

# The signals that busybox's poweroff, halt and reboot send to the first process.
trap 'sync; poweroff -f' USR1 USR2
trap 'sync; reboot -f' TERM INT

# Ctrl-Alt-Del sends INT to the first process. The power button is a keyboard with one key.
echo 0 >/proc/sys/kernel/ctrl-alt-del
for keys in /dev/input/event*; do
    [ -e "$keys" ] && { dd if="$keys" bs=24 count=1 >/dev/null 2>&1 && kill -USR2 1; } &
done

command="/bin/sh -l"
[ -x /etc/script ] && command=/etc/script
# When the session's first process ends, the kernel hangs the console up and drops what it has not
# sent yet. So that process waits for it, after the shell.
setsid -c /bin/sh -c '"$@"; status=$?; /bin/finish sent; exit $status' sh $command \
    <"/dev/$console" >"/dev/$console" 2>&1 &
wait $!  # It runs in the background, because only then do the traps run at once.
finish $?
