#!/bin/busybox sh
# Waits until the balloon has taken 24 MiB, but for what the kernel gave back after its start; says how much there was and is.

before=$(dmesg | sed -n 's/.*Memory: \([0-9]*\)K.*/\1/p')
[ -n "$before" ] || exit 1
for _ in $(seq 120); do
    after=$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo)
    if [ $((before - after)) -ge 16384 ]; then
        # It takes no more.
        sleep 2
        after=$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo)
        echo "CH-BALLOON: $before $after"
        exit 0
    fi
    sleep 1
done
echo "CH-BALLOON: $before $after"
exit 1
