"""What the machines of a run tell each other beside their work: that they live, and why they end.

A collective whose partner is on a machine that has stopped, or behind a cut cable, waits for
ddp_timeout. So all processes also meet at a board, which is the launcher's store, by connections
of their own. There each machine counts up a number, and whoever ends leaves a word of why.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from minilora.processes.machines import Machine, Store

BEAT_SECONDS = 0.5
# A machine that was silent for so long counts as lost. Python may be silent for some seconds while
# it reads a JSON file of several GB.
SILENT_SECONDS = 12
# So long is enough where a collective has failed already.
SUSPICIOUS_SECONDS = 4
# How long a last word lies on the board before it ends those who read it: processes that all fail
# for one reason do not fail at the same moment, and each says it itself.
WORD_SECONDS = 3
# The longest time between two looks that counts. A process that was stopped itself has heard of
# nobody meanwhile, and must not take the others for lost.
LOOK_SECONDS = 2
# How long the other machines leave it to rank 0's to say why the run ends.
FLOOR_SECONDS = 6
# How long a call to the store is waited for.
ANSWER_SECONDS = 2
WORD, FLOOR = "word", "floor"


class Board:
    """The board as one process sees it. A thread talks to the store, where any call may hang.

    machines: all, by number; mine: the number of this one
    over: set when the run is over
    """

    def __init__(
        self, store: Store, machines: Sequence[Machine], mine: int, over: threading.Event
    ) -> None:
        self._machines, self._mine, self._over = machines, mine, over
        self._my_word = ""
        self._wants_floor = False
        # What was read last: the word, whose the floor is, and the beat of each machine.
        self._word = ""
        self._floor_taken, self._floor_is_mine = False, False
        self._beats = [""] * len(machines)
        # What was seen at the last look, and for how many seconds nothing has changed.
        self._last_look = time.monotonic()
        self._seen_beats = [""] * len(machines)
        self._silence = [0.0] * len(machines)
        self._word_age = 0.0
        self._thread = threading.Thread(target=self._talk, args=[store], daemon=True)
        self._thread.start()

    @property
    def defers(self) -> bool:
        """Whether this machine leaves it to rank 0's to say why the run ends, if that one does."""
        return self._mine > 0 and self._is_in_reach()

    def look(self) -> None:
        """Look what has changed. To be called once a second."""
        now = time.monotonic()
        passed = min(now - self._last_look, LOOK_SECONDS)
        self._last_look = now

        for number, beat in enumerate(list(self._beats)):
            if beat == self._seen_beats[number]:
                self._silence[number] += passed
            else:
                self._seen_beats[number], self._silence[number] = beat, 0.0
        if self._word:
            self._word_age += passed

    def verdict(self, patience: float) -> str:
        """Why the run must end, by what the board says; "" if nothing is wrong.

        patience: for how many seconds a machine may be silent
        """
        if self._word_age >= WORD_SECONDS:
            return self._word
        if not self._thread.is_alive():  # a connection that was closed is more than silence
            patience = min(patience, SUSPICIOUS_SECONDS)
        lost = [number for number, silence in enumerate(self._silence) if silence >= patience]
        if self._mine in lost:
            # If not even this machine's own beat is seen, the board is out of reach. It is rank
            # 0's machine that keeps it; there the processes watch each other.
            lost = [0] if self._mine > 0 else []
        if not lost:
            return ""
        seconds = int(min(self._silence[number] for number in lost))
        names = " and ".join(str(self._machines[number]) for number in lost)
        return (
            f"nothing was heard of {names} for {seconds} s: stopped, or cut off from "
            f"{self._machines[self._mine].name}"
        )

    def leave(self, word: str) -> None:
        """Leave a word of why this process ends, and wait until it lies on the board.

        A word that was there before stays.
        """
        self._my_word = self._my_word or " ".join(word.split())
        self._wait(lambda: bool(self._word), ANSWER_SECONDS)

    def take_floor(self) -> bool:
        """Whether this process may say why the run ends: the first one that asks may.

        Where the board is out of reach, every machine may say it.
        """
        if self.defers:
            self._wait(lambda: self._floor_taken, FLOOR_SECONDS)
        self._wants_floor = True
        self._wait(lambda: self._floor_taken, ANSWER_SECONDS)
        return self._floor_is_mine or not self._floor_taken

    def _is_in_reach(self) -> bool:
        return self._thread.is_alive() and self._silence[self._mine] < SUSPICIOUS_SECONDS

    def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done() and self._is_in_reach() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _talk(self, shared: Store) -> None:
        beats = [f"beat {number}" for number in range(len(self._machines))]
        try:
            store = shared.clone()
            # What is asked for before it is there would be waited for.
            for key in (FLOOR, *beats):
                store.add(key, 0)
            store.compare_set(WORD, "", " ")

            while not self._over.wait(BEAT_SECONDS):
                if self._my_word:
                    store.compare_set(WORD, " ", self._my_word)
                if self._wants_floor and not self._floor_taken:
                    self._floor_is_mine = store.add(FLOOR, 1) == 1
                store.add(beats[self._mine], 1)
                word, floor, *heard = (
                    text.decode() for text in store.multi_get([WORD, FLOOR, *beats])
                )
                self._word, self._floor_taken, self._beats = word.strip(), floor != "0", heard
        except RuntimeError:
            return  # the store is gone, and so the silence grows
