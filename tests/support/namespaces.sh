#!/bin/sh
# As root on Linux: two machines on one computer, for what two launchers on 127.0.0.1 cannot show.
#
#     tests/support/namespaces.sh COMMAND
#
# runs COMMAND twice, with NODE=0 on the machine mini0 (10.77.0.1) and with NODE=1 on mini1
# (10.77.0.2). Each has a network, a host name and process numbers of its own, and an /etc/hosts as
# on Debian, which maps the own name to 127.0.1.1. With CUT=N the cable is cut after N seconds.
# The output of each goes to mini0.log and mini1.log; their exit codes and seconds are printed.
trap 'ip netns del mini0; ip netns del mini1; rm -r /etc/netns/mini0 /etc/netns/mini1' EXIT
for node in 0 1; do
    ip netns add mini$node
    mkdir -p /etc/netns/mini$node
    printf '127.0.0.1 localhost\n127.0.1.1 mini%s\n' $node > /etc/netns/mini$node/hosts
done
ip link add cable netns mini0 type veth peer name cable netns mini1
for node in 0 1; do
    ip -n mini$node addr add 10.77.0.$((node + 1))/24 dev cable
    ip -n mini$node link set cable up
    ip -n mini$node link set lo up
done

began=$(date +%s)
for node in 0 1; do
    (
        ip netns exec mini$node unshare --uts --pid --fork --mount-proc --kill-child \
            env NODE=$node sh -c "hostname mini$node; $1" > mini$node.log 2>&1
        echo "mini$node ended with $? after $(($(date +%s) - began)) s"
    ) &
done
if [ -n "$CUT" ]; then
    sleep "$CUT"
    ip -n mini1 link set cable down
    echo "the cable was cut after $(($(date +%s) - began)) s"
fi
wait
