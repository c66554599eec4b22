#!/bin/busybox sh
# Holds programs while their guest is copied.
#
#   hold run COMMAND...   runs a command that can be held
#   hold freeze           holds all such commands; returns when they stand still
#   hold thaw             lets them go on
#
# A clone or a restored guest has the random numbers of its original until Linux has reseeded its
# generator, a moment after it has begun to run. What is held reads none of them: in a copy it goes
# on by itself as soon as Linux has reseeded. In the original, say `hold thaw`. So does the host in
# a copy whose Linux has no driver for the generation id, after it has sent new numbers.

group=/sys/fs/cgroup/hold
watcher=/run/hold.pid
reseeded="crng reseeded due to virtual machine fork"

fail() {
    echo "hold: $1" >&2
    exit 2
}

prepare() {
    grep -q " /sys/fs/cgroup cgroup2 " /proc/mounts || mount -t cgroup2 cgroup2 /sys/fs/cgroup ||
        fail "this kernel has no control groups"
    mkdir -p "$group" || exit 2
    [ -e "$group/cgroup.freeze" ] || fail "this kernel's control groups cannot be frozen"
}

# The log keeps what was said before. `said` is how often it had been said when all was frozen.
thaw_when_reseeded() {
    said=$1
    while [ "$(grep -m $((said + 1)) "$reseeded" /dev/kmsg | wc -l)" -le "$said" ]; do
        sleep 1 # the log has overtaken its reader
    done
    echo 0 >"$group/cgroup.freeze"
    rm -f "$watcher"
}

case $1 in
run)
    shift
    [ $# -gt 0 ] || fail "expected a command to run"
    prepare
    echo $$ >"$group/cgroup.procs" || exit 2
    exec "$@"
    ;;
freeze)
    prepare
    [ -e "$watcher" ] && fail "they are held already"
    said=$(dmesg | grep -c "$reseeded")
    setsid "$0" watch "$said" </dev/null >/dev/null 2>&1 &
    echo $! >"$watcher"
    echo 1 >"$group/cgroup.freeze"
    until grep -q "^frozen 1" "$group/cgroup.events"; do usleep 1000; done
    ;;
watch)
    thaw_when_reseeded "$2"
    ;;
thaw)
    [ -e "$watcher" ] || fail "nothing is held"
    kill -- "-$(cat "$watcher")"
    rm -f "$watcher"
    echo 0 >"$group/cgroup.freeze"
    ;;
*)
    fail "expected run COMMAND, freeze or thaw"
    ;;
esac
