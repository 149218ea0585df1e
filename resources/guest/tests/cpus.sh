#!/bin/busybox sh
# Runs a process on every processor, one after the other; taskset fails where one is not online.

read -r online </sys/devices/system/cpu/online
echo "CH-CPUS: online $online"
for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
    number=${cpu##*/cpu}
    taskset -c "$number" true || exit 1
    echo "CH-CPUS: ran on $number"
done
