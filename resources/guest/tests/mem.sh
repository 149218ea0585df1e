#!/bin/busybox sh
# Waits until the memory device has given the guest 128 MiB more; says how much there was and is, and fills some of it.

before=$(dmesg | sed -n 's/.*Memory: \([0-9]*\)K.*/\1/p')
[ -n "$before" ] || exit 1
for _ in $(seq 120); do
    after=$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo)
    [ $((after - before)) -lt 131072 ] || break
    sleep 1
done
dmesg | grep virtio_mem
echo "CH-MEM: $before $after"
[ $((after - before)) -ge 131072 ] || exit 1
# Linux takes what is highest first.
head -c 32000000 /dev/zero >/tmp/zeros || exit 1
rm /tmp/zeros
