#!/bin/busybox sh
# Mounts the persistent memory, an ext4 file system, without the page cache, and writes a file whose sum the host compares.

read -r size </sys/block/pmem0/size
echo "CH-PMEM: $size sectors"
mkdir /tmp/pmem
mount -t ext4 -o dax /dev/pmem0 /tmp/pmem || exit 1
grep -q ' /tmp/pmem ext4 .*dax' /proc/mounts || exit 1
cp /bin/busybox /tmp/pmem/data || exit 1
sync
sum=$(sha256sum </tmp/pmem/data) || exit 1
umount /tmp/pmem || exit 1
echo "CH-PMEM: sum $sum"
