"""Whether the other processes of this machine still run: no rank waits for one that does not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch.distributed as dist

from minilora.files.output_folder import is_claimed
from minilora.files.snapshot import last_snapshot
from minilora.processes.signals import SIGNALS
from minilora.settings.errors import RunError
from minilora.settings.settings import TrainSettings

# Ranks that are done, or that all fail for one reason, do not end at the same moment. A rank that
# has ended counts as lost only after this time.
GRACE_SECONDS = 3

# A machine or container, and the number of a process there.
Process = tuple[str, int]


def this_process() -> Process:
    """This process, as others can look for it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    # Containers of one machine share the boot, but each counts its processes on its own.
    numbering = os.readlink("/proc/self/ns/pid")
    return boot + numbering, os.getpid()


class Watch:
    """Looks every second whether the other ranks of this machine still run.

    A collective whose partner is gone fails at once, or after ddp_timeout, or never (NCCL). This
    ends the process in seconds, whatever it waits for, and says which rank was lost.

    over: set it when the run is over, and ranks may end
    """

    def __init__(self, rank: int, processes: Sequence[Process], train: TrainSettings) -> None:
        """processes: those of all ranks, by rank."""
        here = processes[rank][0]
        self._rank = rank
        self._pids = {other: pid for other, (place, pid) in enumerate(processes) if place == here}
        self._patience = train.ddp_timeout
        self._output = Path(train.output_dir or "")
        self.over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def lost(self) -> dict[int, str]:
        """By rank, what has become of those that do not run."""
        fates = {rank: _fate(pid) for rank, pid in self._pids.items()}
        return {rank: f"rank {rank} {fate}" for rank, fate in fates.items() if fate}

    def settle(self, error: RuntimeError) -> None:
        """Find out whether an error is a collective's that failed because a rank is lost.

        Returns if it is no collective's and no rank is lost. If a rank is lost, the thread ends
        this process, and there is no return. Raises RunError if the ranks lost touch though all of
        this machine run.
        """
        # The launcher answers the loss of a rank with a signal, but the last words come first.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

        deadline = time.monotonic() + GRACE_SECONDS
        while not self.lost() and time.monotonic() < deadline:
            time.sleep(0.1)
        if self.lost():
            self._thread.join()

        if isinstance(error, dist.DistError) or "gloo" in str(error):
            # The first line, without the place in torch's source in front of it.
            reason = str(error).partition("\n")[0].rpartition("] ")[2]
            last = last_snapshot(self._output)
            raise RunError(f"the ranks lost touch: {reason}; {last}") from None

    def end(self, reason: str) -> None:
        """End the process; the lowest rank here that still runs says why.

        reason: what is said if no rank is lost. Nothing is said if rank 0 is gone and left in good
        order, for then it has said it.
        """
        lost = self.lost()
        is_lowest = self._rank == min(self._pids.keys() - lost.keys())
        # Rank 0 removes its claim when it leaves in good order.
        rank0_was_silent = 0 not in lost or is_claimed(self._output)
        if is_lowest and rank0_was_silent:
            words = [*(lost.values() or [reason]), last_snapshot(self._output)]
            os.write(2, f"\nerror: {'; '.join(words)}\n".encode())

        # The others must find this rank alive when they decide which of them is the lowest.
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    def _look(self) -> None:
        lost_since: dict[str, float] = {}
        while not self.over.wait(1):
            now = time.monotonic()
            lost_since = {fate: lost_since.get(fate, now) for fate in self.lost().values()}
            for fate, start in lost_since.items():
                # A stopped process (Ctrl-Z, a debugger) may be continued.
                patience = self._patience if "stopped" in fate else GRACE_SECONDS
                if now - start >= patience:
                    self.end("")


def _fate(pid: int) -> str:
    """What has become of a process; empty while it runs."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        status = psutil.STATUS_DEAD

    if status in (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE):
        return f"(process {pid}) has ended"
    if status == psutil.STATUS_STOPPED:
        return f"(process {pid}) is stopped"
    return ""
