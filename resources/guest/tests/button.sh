#!/bin/busybox sh
# Waits for the power button, and says what the kernel tells of it: a struct input_event of 24 bytes.

for event in /sys/class/input/event*; do
    [ "$(cat "$event/device/name")" = 'Power Button' ] || continue
    exec 3<"/dev/input/${event##*/}"
    echo 'CH-BUTTON: waiting'
    # After the time: EV_KEY, KEY_POWER, pressed.
    echo "CH-BUTTON: $(dd bs=24 count=1 <&3 2>/dev/null | dd bs=8 skip=2 2>/dev/null | hexdump -v -e '8/1 "%02x"')"
    exit 0
done
echo 'CH-BUTTON: there is none'
exit 1
