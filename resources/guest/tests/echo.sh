#!/bin/busybox sh
# Serial input: reads one line from the console and says it back.

echo 'CH-ECHO: ready'
read -r line
echo "CH-ECHO: $line"
