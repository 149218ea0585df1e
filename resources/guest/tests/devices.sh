#!/bin/busybox sh
# Looks at every device from user space. One line each: DEVICE name OK ..., or DEVICE name FAIL ...
# The host has arranged the other ends and looks at them afterwards (tests/integration/devices.rs).
# Functions are called by their names:
# shellcheck disable=SC2317

ok() { echo "DEVICE $*"; }

# check NAME WORDS...: runs check_NAME, whose last words say what it saw.
check() {
    words=$("check_$1" 2>&1)
    result=$?
    words=$(printf '%s' "$words" | tr '\n' ' ')
    if [ "$result" = 0 ]; then
        ok "$1 OK" "$words"
    else
        ok "$1 FAIL" "$words"
        failed=1
    fi
}

# The directory of the virtio device that driver $1 has.
bound() {
    for device in /sys/bus/virtio/drivers/"$1"/virtio*; do
        [ -d "$device" ] && echo "$device" && return
    done
    echo "no device with driver $1"
    return 1
}

# All that was found on the bus has a driver, but for the host bridge and the watchdog, for which
# Linux has none.
check_pci() {
    count=0
    for device in /sys/bus/pci/devices/*; do
        read -r vendor <"$device/vendor"
        read -r id <"$device/device"
        count=$((count + 1))
        case $vendor:$id in
        0x8086:0x0d57) continue ;;
        esac
        [ -d "$device/driver" ] || { echo "no driver for $vendor:$id" && return 1; }
    done
    for device in /sys/bus/virtio/devices/*; do
        read -r id <"$device/device"
        [ -d "$device/driver" ] || [ "$id" = 0x0023 ] || { echo "no driver for virtio $id" && return 1; }
    done
    echo "$count functions"
}

check_serial() {
    grep '^0: uart:16550A port:000003F8' /proc/tty/driver/serial || return
}

check_console() {
    bound virtio_console >/dev/null && echo 'words for the virtio console' >/dev/hvc0 && echo hvc0
}

# The first sector holds the host's words; the second gets the guest's.
check_disk() {
    read -r words </dev/vda || return
    [ "$words" = 'words of the host' ] || { echo "read $words" && return 1; }
    echo 'words of the guest' | dd of=/dev/vda bs=512 seek=1 conv=sync,fsync,notrunc 2>/dev/null || return
    read -r sectors </sys/block/vda/size
    echo "$sectors sectors"
}

check_net() {
    ifconfig eth0 192.168.249.2 netmask 255.255.255.0 up && ping -c 1 -W 60 192.168.249.1 >/dev/null || return
    read -r mac </sys/class/net/eth0/address
    echo "$mac"
}

check_rng() {
    read -r current </sys/devices/virtual/misc/hw_random/rng_current
    [ "${current%.*}" = virtio_rng ] || { echo "$current" && return 1; }
    first=$(head -c 16 /dev/hwrng | xxd -p) && second=$(head -c 16 /dev/hwrng | xxd -p) || return
    if [ ${#first} != 32 ] || [ "$first" = "$second" ]; then
        echo "$first $second"
        return 1
    fi
    echo "$current"
}

check_vsock() { /tests/vsock_words; }

# The two that change how much memory there is are here and have nothing to do: /tests/balloon and
# /tests/mem see them work.
check_balloon() { bound virtio_balloon; }

check_mem() { bound virtio_mem; }

check_pmem() {
    bound virtio_pmem >/dev/null || return
    read -r words </dev/pmem0 || return
    [ "$words" = 'words of the host' ] || { echo "read $words" && return 1; }
    echo 'words of the guest' | dd of=/dev/pmem0 bs=4096 seek=1 conv=sync,fsync,notrunc 2>/dev/null || return
    read -r sectors </sys/block/pmem0/size
    echo "$sectors sectors"
}

check_pvpanic() {
    for device in /sys/bus/pci/drivers/pvpanic-pci/0000:*; do
        read -r capability <"$device/capability" || return
        read -r events <"$device/events" || return
    done
    echo "events $events of $capability"
}

# Linux has no driver for it; the transport sees it all the same.
check_watchdog() {
    for device in /sys/bus/virtio/devices/*; do
        read -r id <"$device/device"
        [ "$id" != 0x0023 ] || { echo "${device##*/}" && return 0; }
    done
    return 1
}

# The devices behind it, by their drivers.
check_iommu() {
    bound virtio_iommu >/dev/null || return
    for driver in /sys/kernel/iommu_groups/*/devices/*/virtio*/driver; do
        driver=$(readlink "$driver") || return
        echo "${driver##*/}"
    done
}

failed=0
for device in pci serial console disk net rng vsock balloon mem pmem pvpanic watchdog iommu; do
    check $device
done
exit $failed
