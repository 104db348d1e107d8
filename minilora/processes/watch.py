"""Whether the other processes of the run still live: no rank waits for one that does not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch.distributed as dist

from minilora.files.output_folder import is_claimed
from minilora.files.snapshot import last_snapshot
from minilora.processes.board import (
    ANSWER_SECONDS,
    FLOOR_SECONDS,
    SILENT_SECONDS,
    SUSPICIOUS_SECONDS,
    WORD_SECONDS,
    Board,
)
from minilora.processes.machines import Process, Store, machines_of
from minilora.processes.signals import SIGNALS
from minilora.settings.errors import RunError
from minilora.settings.settings import TrainSettings

# Ranks that are done, or that all fail for one reason, do not end at the same moment. A rank that
# has ended counts as lost only after this time.
GRACE_SECONDS = 3
# How long a rank whose collective failed waits for news of another machine: a word there comes
# after GRACE_SECONDS, and counts after WORD_SECONDS.
NEWS_SECONDS = GRACE_SECONDS + WORD_SECONDS + 4


class Watch:
    """Looks every second whether the other ranks of this machine, and other machines, still live.

    A collective whose partner is gone fails at once, or after ddp_timeout, or never (NCCL). This
    ends the process in seconds, whatever it waits for, and says who was lost.

    over: set it when the run is over, and ranks may end
    saved: a sentence on the last snapshot, from rank 0's machine; "" before it is known
    """

    def __init__(
        self, rank: int, processes: Sequence[Process], train: TrainSettings, store: Store
    ) -> None:
        """processes: those of all ranks, by rank; store: where all of them can be told things."""
        machines = machines_of(processes)
        mine = next(number for number, one in enumerate(machines) if rank in one.ranks)
        self._rank = rank
        self._pids = {other: processes[other].pid for other in machines[mine].ranks}
        self._name = machines[mine].name
        self._place = f"{self._name}: " if len(machines) > 1 else ""
        self._patience = train.ddp_timeout
        self._silence_allowed = SILENT_SECONDS
        self._output = Path(train.output_dir or "")
        self._is_leaving, self._is_ending = False, False
        self.saved = ""
        self.over = threading.Event()
        self._board = Board(store, machines, mine, self.over) if len(machines) > 1 else None
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def lost(self) -> dict[int, str]:
        """By rank, what has become of those of this machine that do not run."""
        fates = {rank: _fate(pid) for rank, pid in self._pids.items()}
        return {rank: f"{self._place}rank {rank} {fate}" for rank, fate in fates.items() if fate}

    def settle(self, error: RuntimeError) -> None:
        """Find out whether an error is a collective's that failed because a rank is lost.

        Returns if it is no collective's and no rank is lost. If a rank is lost, the thread ends
        this process, and there is no return. Raises RunError if the ranks lost touch though all of
        this machine run, and nothing is known of another one.
        """
        # The launcher answers the loss of a rank with a signal, but the last words come first.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        is_collective = isinstance(error, dist.DistError) or "gloo" in str(error)

        # News of another machine comes to the thread, which then ends this process.
        self._silence_allowed = SUSPICIOUS_SECONDS
        patience = NEWS_SECONDS if self._board and is_collective else GRACE_SECONDS
        deadline = time.monotonic() + patience
        while not self.lost() and time.monotonic() < deadline:
            time.sleep(0.1)
        if self.lost() or self._is_ending:
            self._thread.join()

        if is_collective:
            words = f"the ranks lost touch: {reason_of(error)}"
            self.leave_word(words)
            raise RunError(f"{words}; {self.last_snapshot()}") from None

    def last_snapshot(self) -> str:
        """A sentence on the snapshot that the run can be resumed from."""
        if self._board is None:
            return last_snapshot(self._output)
        if 0 in self._pids:
            return last_snapshot(self._output, f" on {self._name}")
        return self.saved or "if there is a snapshot to resume from, it is on rank 0's machine"

    def leave_word(self, word: str) -> None:
        """Tell the other machines why this rank ends. Rank 0 says it here too, so nobody else does.

        Nothing is done where there is one machine.
        """
        if self._board is None or self.over.is_set():
            return
        self._is_leaving = True
        self._board.leave(word if word.startswith(self._name) else f"{self._name}: {word}")
        if self._rank == 0:
            self._board.take_floor()
            # Under DeepSpeed's launcher the board ends with rank 0, so all must have read it.
            time.sleep(ANSWER_SECONDS)

    @contextmanager
    def at_most(self, seconds: float, too_late: str) -> Iterator[None]:
        """End this process, for the reason `too_late`, if what is done inside takes longer."""
        late = threading.Timer(seconds, self.end, [too_late])
        late.daemon = True
        late.start()
        try:
            yield
        finally:
            late.cancel()

    def end(self, reason: str) -> None:
        """End the process; the lowest rank here that still runs says why, if nobody else does.

        reason: what is said if no rank is lost. Nothing is said if rank 0 is gone and left in good
        order, for then it has said it.
        """
        self._is_ending = True
        lost = self.lost()
        is_lowest = self._rank == min(self._pids.keys() - lost.keys())
        if is_lowest:
            self._say("; ".join(lost.values()) or reason, 0 in lost)

        # The others must find this rank alive when they decide which of them is the lowest. That
        # one may wait for rank 0's machine to speak, and the launcher ends it with the first.
        waits = self._board is not None and self._board.defers and not is_lowest
        time.sleep(GRACE_SECONDS + (FLOOR_SECONDS if waits else 0))
        os._exit(1)

    def _say(self, words: str, rank0_is_lost: bool) -> None:
        # Rank 0 removes its claim when it leaves in good order.
        if rank0_is_lost and not is_claimed(self._output):
            return
        if self._board is not None:
            self._board.leave(words)
            if not self._board.take_floor():
                return
        os.write(2, f"\nerror: {words}; {self.last_snapshot()}\n".encode())

    def _look(self) -> None:
        lost_since: dict[str, float] = {}
        while not self.over.wait(1) and not self._is_leaving:
            now = time.monotonic()
            lost_since = {fate: lost_since.get(fate, now) for fate in self.lost().values()}
            for fate, start in lost_since.items():
                # A stopped process (Ctrl-Z, a debugger) may be continued.
                patience = self._patience if "stopped" in fate else GRACE_SECONDS
                if now - start >= patience:
                    self.end("")

            if self._board is not None:
                self._board.look()
                if verdict := self._board.verdict(self._silence_allowed):
                    self.end(verdict)


def reason_of(error: RuntimeError) -> str:
    """What a collective says of its failure: one line, without the place in torch's source."""
    line = str(error).partition("\n")[0]
    return (line.partition("] ")[2] or line).partition(" This is typically")[0]


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
