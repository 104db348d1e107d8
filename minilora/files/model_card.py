"""The model card, README.md beside an adapter or a merged model, in the form of Hugging Face's hub.

A card begins with YAML between two lines of dashes, which the hub reads: what the model was made
from, with which library it is loaded, and its licence. The rest is text for people.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from minilora.files.adapter import write_atomically
from minilora.settings.errors import RequestError
from minilora.settings.text_files import read_text

CARD = "README.md"
# Tells a card of ours from a file that somebody wrote.
MARK = "<!-- minilora writes this file anew, as long as this line is in it. -->"
# What a card says of the licence, in the hub's words.
LICENCE_KEYS = ("license", "license_name", "license_link")
# A folder of the hub's cache: models--OWNER--NAME/snapshots/REVISION.
IN_CACHE = re.compile(r"models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/[^/]+$")


def adapter_card(
    base: Path, dataset: Sequence[str], given: Mapping[str, Any], results: Mapping[str, Any]
) -> str:
    """The card of an adapter.

    base: the base model's folder; dataset: names and paths; given: the settings that its user
    wrote, by key; results: the content of train_results.json.
    """
    name = base_name(base)
    front = {
        "base_model": name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [f"base_model:adapter:{name}", "lora", "minilora"],
        **licence_of(base),
    }
    return _card(
        front,
        f"A LoRA adapter for {name}.",
        "## Data",
        "\n".join(f"- {Path(one).name}" for one in dataset),
        "## Settings",
        _table({key: value for key, value in given.items() if not _is_path(key)}),
        "## Results",
        _table(results),
    )


def merged_card(
    base: Path, adapters: Sequence[Path], weights: Sequence[float], into_base: bool
) -> str:
    """The card of what adapters were merged into, each with its weight.

    into_base: the base's weights; else one adapter, which stands for all of them.
    """
    name = base_name(base)
    front = {
        "base_model": name,
        "library_name": "transformers" if into_base else "peft",
        "pipeline_tag": "text-generation",
        "tags": [f"base_model:{'finetune' if into_base else 'adapter'}:{name}", "lora", "minilora"],
        **licence_of(base),
    }
    merged = {one.resolve().name: weight for one, weight in zip(adapters, weights, strict=True)}
    what = f"{name} with LoRA adapters merged in" if into_base else f"A LoRA adapter for {name}"
    return _card(front, f"{what}, made from these, by weight:", _table(merged))


def write_card(folder: Path, card: str) -> None:
    """Write README.md, but never over one that somebody else wrote. Raises OSError."""
    path = folder / CARD
    if path.exists():
        try:
            if MARK not in read_text(path):
                return
        except RequestError:
            return  # not even text: certainly not ours
    write_atomically(path, card.encode())


def base_name(base: Path) -> str:
    """What the hub may know the base by: OWNER/NAME for its cache, else the folder's name."""
    folder = base.resolve()
    found = IN_CACHE.search(folder.as_posix())
    return f"{found['owner']}/{found['name']}" if found else folder.name


def licence_of(base: Path) -> dict[str, str]:
    """What the base's own card says of its licence; nothing if it has no card that can be read."""
    try:
        text = read_text(base / CARD)
        _, front, _ = text.split("---", 2)
        values = yaml.safe_load(front)
    except (RequestError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {key: values[key] for key in LICENCE_KEYS if isinstance(values.get(key), str)}


def _card(front: Mapping[str, Any], *parts: str) -> str:
    header = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    return "\n\n".join([f"---\n{header}---", MARK, *parts]) + "\n"


def _table(values: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {_cell(value)} |" for key, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    """A value as YAML users write it, without what would end the cell or the line."""
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.replace("|", "\\|").split())


def _is_path(key: str) -> bool:
    """Whether the value is a folder or file of the machine that trained, of no use elsewhere."""
    return key in ("dataset", "deepspeed") or key.endswith(("_dir", "_path", "_checkpoint"))
