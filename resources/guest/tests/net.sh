#!/bin/busybox sh
# The first network device: an address, pings to the host's end, and bytes both ways over TCP, which
# the host counts and sums up.

ip=192.168.249.2
host=192.168.249.1
ifconfig eth0 $ip netmask 255.255.255.0 up || exit 1
read -r mtu </sys/class/net/eth0/mtu
read -r mac </sys/class/net/eth0/address
echo "CH-NET: mtu $mtu mac $mac"
ping -c 3 $host >/tmp/ping || exit 1
echo 'CH-NET: pinged'
# The host sends a file and its sum; then it takes one.
nc $host 5001 >/tmp/received || exit 1
nc $host 5002 >/tmp/received.sum || exit 1
(cd /tmp && sha256sum -c received.sum) || exit 1
nc $host 5003 </bin/busybox || exit 1
echo 'CH-NET: sent'
