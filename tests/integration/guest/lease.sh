#!/bin/busybox sh
# What udhcpc runs when it has a lease: takes it, and says what it is.

[ "$1" = bound ] || exit 0
# Set by udhcpc: shellcheck disable=SC2154
ifconfig "$interface" "$ip" netmask "$subnet" || exit 1
if [ "$interface" = eth0 ]; then
    # shellcheck disable=SC2154
    route add default gw "$router" || exit 1
fi
# shellcheck disable=SC2154
echo "CH-USER: $interface $ip $subnet router $router dns $dns mtu $mtu"
