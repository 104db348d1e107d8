"""A sound request and the ways to break it, for the tests of refusals."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minilora.data.tokenizer_files import read_tokenizer_files
from minilora.files.adapter import write_adapter
from minilora.files.model_config import read_model_config
from minilora.files.tensor_parts import TensorPart
from minilora.files.weights import INDEX, read_parts
from minilora.model.lora_shape import LoraShape
from minilora.settings.command_line import read_settings
from minilora.settings.errors import RequestError
from minilora.training.checks import check
from tests.support.prepared import prepared_of
from tests.support.rows import write

NORM = "model.norm.weight"
ROWS = [{"instruction": f"q {index}", "output": f"a {index}"} for index in range(12)]
BIG = "9" * 5000  # more digits than Python makes a number of
Break = Callable[["Request"], None]


@dataclass
class Request:
    """A folder with all that a run needs, and the run's settings."""

    folder: Path
    settings: dict[str, Any]

    @property
    def words(self) -> list[str]:
        return [f"--{key}={value}" for key, value in self.settings.items()]

    def shard(self, name: str) -> Path:
        weight_map = json.loads((self.folder / "model" / INDEX).read_text())["weight_map"]
        return self.folder / "model" / str(weight_map[name])

    def problems(self) -> list[str]:
        """Why it is refused, up to the loading of weights; empty if it is not."""
        try:
            settings = read_settings(self.words, "train")
            request = check(settings)
            prepared_of(settings)
            for name, stored in request.checkpoint.tensors.items():
                whole = torch.empty(torch.Size(stored.shape).numel())
                read_parts(request.checkpoint, [TensorPart(name, 0, whole)])
        except RequestError as error:
            return [problem.replace(str(self.folder), "@") for problem in error.problems]
        return []


def sound(folder: Path, model: Path) -> Request:
    """A request that is all right; `model` is copied."""
    shutil.copytree(model, folder / "model")
    shape = read_model_config(model).shape
    lora = LoraShape(4, 8, 0.0, ("q_proj", "v_proj"))
    zeros = {name: torch.zeros(size) for name, size in lora.parameter_shapes(shape).items()}
    write_adapter(folder / "adapter", zeros, lora, read_tokenizer_files(model))
    write(folder / "rows.jsonl", ROWS)
    settings = {
        "model_name_or_path": folder / "model",
        "dataset": folder / "rows.jsonl",
        "output_dir": folder / "out",
        "dataset_dir": folder,
    }
    return Request(folder, settings)


def ask(**settings: Any) -> Break:
    """Other settings; @ is the request's folder."""

    def change(request: Request) -> None:
        for key, value in settings.items():
            request.settings[key] = str(value).replace("@", str(request.folder))

    return change


def put(name: str, content: str | bytes | list[Any] | dict[str, Any], **settings: Any) -> Break:
    """A file with this content: text, bytes, or what is written as JSON."""

    def change(request: Request) -> None:
        path = request.folder / name
        path.unlink(missing_ok=True)
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        ask(**settings)(request)

    return change


def rows(*values: Any, name: str = "rows.jsonl", **settings: Any) -> Break:
    """Training data of these rows."""
    return put(name, "".join(f"{json.dumps(value)}\n" for value in values),
               dataset=f"@/{name}", **settings)  # fmt: skip


def drop(name: str) -> Break:
    return lambda request: (request.folder / name).unlink()


def keys(name: str, **changes: Any) -> Break:
    """Other keys in a JSON file."""

    def change(request: Request) -> None:
        path = request.folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def config(**changes: Any) -> Break:
    return keys("model/config.json", **changes)


def template(text: Any) -> Break:
    return keys("model/tokenizer_config.json", chat_template=text)


def adapter(**changes: Any) -> Break:
    return both(
        keys("adapter/adapter_config.json", **changes), ask(adapter_name_or_path="@/adapter")
    )


def deepspeed(**content: Any) -> Break:
    return put("ds.json", content, deepspeed="@/ds.json")


def index(target: Any) -> Break:
    """The index puts the final norm elsewhere."""

    def change(request: Request) -> None:
        path = request.folder / "model" / INDEX
        content = json.loads(path.read_text())
        content["weight_map"][NORM] = target
        path.write_text(json.dumps(content))

    return change


def header(**changes: Any) -> Break:
    """The header of a shard says something else of the final norm."""

    def change(request: Request) -> None:
        raw = request.shard(NORM).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        content = json.loads(raw[8 : 8 + size])
        content[NORM] |= changes
        text = json.dumps(content).encode()
        request.shard(NORM).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    return change


def shard(make: Callable[[bytes], bytes]) -> Break:
    """Other bytes in a shard."""

    def change(request: Request) -> None:
        path = request.shard(NORM)
        path.write_bytes(make(path.read_bytes()))

    return change


def link(target: str) -> Break:
    """A shard is a link to somewhere else, and what was there lies beside the folder."""

    def change(request: Request) -> None:
        path = request.shard(NORM)
        shutil.move(path, request.folder / "elsewhere.safetensors")
        path.symlink_to(target.replace("@", str(request.folder)))

    return change


def folder_named(name: str) -> Break:
    return lambda request: (request.folder / name).mkdir()


def both(*changes: Break) -> Break:
    def change(request: Request) -> None:
        for one in changes:
            one(request)

    return change
