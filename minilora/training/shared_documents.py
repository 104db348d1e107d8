"""Documents for all ranks: tokenised once on each machine, and shared by its processes."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from minilora.data.documents import Documents
from minilora.data.prepare import Prepared, prepare
from minilora.data.tokenizer_files import TokenizerFiles
from minilora.model.llama_shape import LlamaShape
from minilora.processes.world import World
from minilora.settings.errors import RequestError
from minilora.settings.settings import Settings


def shared_documents(
    world: World, settings: Settings, shape: LlamaShape
) -> tuple[Documents, Documents, TokenizerFiles, list[str]]:
    """Training and validation documents, tokenizer files, and lines for the user. Collective.

    One process of each machine tokenises and writes the tokens to a temporary folder; all its
    processes map those files into memory. The folder is removed before this returns, which takes
    nothing from a process that has mapped its files. Only the process that tokenised has the
    tokenizer files, which rank 0 writes beside each adapter. Raises RequestError.
    """
    made: tuple[str, list[str]] = "", []
    base = TokenizerFiles(settings.base, {})
    with ExitStack() as stack:
        with world.agreed():
            if world.leads:
                # A network file system keeps mapped files under other names until they are closed.
                temporary = tempfile.TemporaryDirectory(
                    prefix="minilora-", ignore_cleanup_errors=True
                )
                folder = stack.enter_context(temporary)
                prepared = prepare(settings, shape, colour=sys.stderr.isatty())
                base = prepared.tokenizer.files
                made = folder, _save(prepared, Path(folder))

        folder, notes = world.gather_objects(made)[world.machine.ranks[0]]
        documents = Documents.load(Path(folder, "train"))
        validation = Documents.load(Path(folder, "validation"))
        world.gather_objects(None)  # wait until every process has mapped the files
    return documents, validation, base, notes


def _save(prepared: Prepared, folder: Path) -> list[str]:
    """Write the documents into the folder; returns the lines about them."""
    try:
        prepared.documents.save(folder / "train")
        prepared.validation.save(folder / "validation")
    except OSError as error:
        raise RequestError([f"{folder}: no room for tokens: {error}; set TMPDIR"]) from None
    title = "the first sample, its trained part marked:"
    return [prepared.summary, title, prepared.sample]
