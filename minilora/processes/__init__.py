"""The processes of a run: how they join, watch each other, and stop.

world          the processes of a run: joined first, tried out, in touch, parted last
machines       which machine each process is on, and what messages call it
meeting        how the processes find each other at the launcher's store
board          what machines tell each other beside their work: that they live, and why they end
watch          whether the other processes still live
signals        SIGTERM and Ctrl-C: the run ends after its step, with a snapshot
startup_times  how long each part of the start took
"""
