"""Who of the ranks still runs: none of them waits for one that does not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from minilora.files.output_folder import is_claimed
from minilora.files.snapshot import last_snapshot
from minilora.processes.signals import SIGNALS
from minilora.settings.errors import RunError
from minilora.settings.settings import TrainSettings

# A rank that is done, or that fails as all of them do, may end this much before the others.
GRACE_SECONDS = 3
Process = tuple[str, int]  # a machine or container, and the process's number there


def this_process() -> Process:
    """This process, for others to look for."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return boot + os.readlink("/proc/self/ns/pid"), os.getpid()


class Watch:
    """Looks every second whether the other ranks of this machine still run.

    A collective whose partner is gone fails at once, or after ddp_timeout, or never (NCCL). This
    ends the process in seconds, whatever it waits for, and says which rank was lost.
    """

    def __init__(self, rank: int, processes: Sequence[Process], train: TrainSettings) -> None:
        place = processes[rank][0]
        self._rank, self._patience = rank, train.ddp_timeout
        self._pids = {other: pid for other, (at, pid) in enumerate(processes) if at == place}
        self._output = Path(train.output_dir or "")
        self.over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def lost(self) -> dict[int, str]:
        """By rank, what has become of those that do not run."""
        fates = {rank: _fate(pid) for rank, pid in self._pids.items()}
        return {rank: f"rank {rank} {fate}" for rank, fate in fates.items() if fate}

    def settle(self, error: RuntimeError) -> None:
        """After an error that may be a collective's: return if it is none and no rank is lost.

        Raises RunError if the ranks lost touch though all of this machine run.
        """
        for number in SIGNALS:  # the launcher's answer to the loss; but the last words come first
            signal.signal(number, signal.SIG_IGN)
        patience = time.monotonic() + GRACE_SECONDS
        while not self.lost() and time.monotonic() < patience:
            time.sleep(0.1)
        if self.lost():
            self._thread.join()
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            reason = str(error).partition("\n")[0].rpartition("] ")[2]
            last = last_snapshot(self._output)
            raise RunError(f"the ranks lost touch: {reason}; {last}") from None

    def _look(self) -> None:
        since: dict[str, float] = {}
        while not self.over.wait(1):
            now, lost = time.monotonic(), self.lost().values()
            since = {fate: since.get(fate, now) for fate in lost}
            for fate, start in since.items():
                if now - start >= (self._patience if "stopped" in fate else GRACE_SECONDS):
                    self.end("")

    def end(self, reason: str) -> None:
        """End the process; the lowest rank here that still runs says why.

        It says nothing if rank 0 is gone and left in good order, for that has said it.
        """
        lost = self.lost()
        if self._rank == min(self._pids.keys() - lost.keys()) and (
            0 not in lost or is_claimed(self._output)
        ):
            words = [*(lost.values() or [reason]), last_snapshot(self._output)]
            os.write(2, f"\nerror: {'; '.join(words)}\n".encode())
        time.sleep(GRACE_SECONDS)  # so that the others find this rank alive when they decide
        os._exit(1)


def _fate(pid: int) -> str:
    """What has become of a process; empty while it runs."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"(process {pid}) has ended"
    state = stat.rpartition(") ")[2][0]
    ended, stopped = f"(process {pid}) has ended", f"(process {pid}) is stopped"
    return {"Z": ended, "X": ended, "T": stopped}.get(state, "")
