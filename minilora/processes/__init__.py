"""The processes of a run: how they join, watch each other, and stop.

world          the processes of a run: joined first, tried out, in touch, parted last
watch          whether the other processes of this machine still run
signals        SIGTERM and Ctrl-C: the run ends after its step, with a snapshot
startup_times  how long each part of the start took
"""
