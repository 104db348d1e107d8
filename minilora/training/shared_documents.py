"""Documents for all ranks, tokenised once on each machine."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from minilora.data.documents import Documents
from minilora.data.prepare import prepare
from minilora.model.llama_shape import LlamaShape
from minilora.processes.world import World
from minilora.settings.errors import RequestError
from minilora.settings.settings import Settings


def tokenise(
    world: World, settings: Settings, shape: LlamaShape
) -> tuple[Documents, Documents, list[str]]:
    """Tokenise in one process per machine; all its processes map the result into memory."""
    made: tuple[str, list[str]] = "", []
    with ExitStack() as stack:
        with world.agreed():
            if world.local_rank == 0:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="minilora-"))
                prepared = prepare(settings, shape, colour=sys.stderr.isatty())
                try:
                    prepared.documents.save(Path(folder, "train"))
                    prepared.validation.save(Path(folder, "validation"))
                except OSError as error:
                    raise RequestError(
                        [f"{folder}: no room for tokens: {error}; set TMPDIR"]
                    ) from None
                title = "the first sample, its trained part marked:"
                made = folder, [prepared.summary, title, prepared.sample]
        folder, notes = world.gather_objects(made)[world.rank - world.local_rank]
        documents = Documents.load(Path(folder, "train"))
        validation = Documents.load(Path(folder, "validation"))
        world.gather_objects(None)  # every process of this machine has the files open
    return documents, validation, notes
