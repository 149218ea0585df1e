#!/bin/busybox sh
# Mounts the first disk, an ext4 file system. Checks the file that the host left there against its
# sum, then writes one of its own with its sum beside it, for the host to check.

read -r size </sys/block/vda/size
read -r read_only </sys/block/vda/ro
echo "CH-DISK: $size sectors, read-only $read_only"
mkdir /tmp/disk
mount -t ext4 /dev/vda /tmp/disk || exit 1
cd /tmp/disk || exit 1
sha256sum -c from-host.sum || exit 1
cp /bin/busybox from-guest || exit 1
sha256sum from-guest >from-guest.sum || exit 1
cd / || exit 1
umount /tmp/disk || exit 1
echo 'CH-DISK: written and unmounted'
