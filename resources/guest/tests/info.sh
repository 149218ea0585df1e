#!/bin/busybox sh
# Prints what the kernel found, each source between a BEGIN and an END line.

for file in /proc/cmdline /proc/cpuinfo /proc/meminfo /proc/iomem /proc/interrupts; do
    echo "CH-BEGIN $file"
    cat "$file"
    echo "CH-END $file"
done
echo 'CH-BEGIN dmesg'
dmesg
echo 'CH-END dmesg'
