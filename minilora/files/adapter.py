"""LoRA adapters on disk in PEFT's format: adapter_config.json and adapter_model.safetensors.

Each file is written whole or not at all. After writing, the adapter is read back and compared
with what was trained.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from minilora.data.tokenizer_files import TokenizerFiles
from minilora.files.adapter_config import CONFIG, peft_config
from minilora.model.lora_shape import LoraShape
from minilora.settings.errors import RequestError, RunError, shortened

WEIGHTS = "adapter_model.safetensors"
# In the metadata of that file: quantization_bit of the run, if it was set.
QUANTIZATION = "quantization_bit"
# PEFT wraps the model twice, and the names of both wrappers stand before every parameter.
PREFIX = "base_model.model."
# What a disk says that is broken or full. Any other error may be gone a moment later.
DISK_ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS)
PAUSE_SECONDS = 1.0  # before something is written once more

Result = TypeVar("Result")


def stored_name(parameter: str) -> str:
    """The name of a parameter in PEFT's files.

    `model.layers.0.self_attn.q_proj.lora_A` is stored as
    `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`. The names of other trained
    parameters, `lm_head.weight` or DoRA's magnitudes, only get the prefix.
    """
    if parameter.endswith((".lora_A", ".lora_B")):
        return f"{PREFIX}{parameter}.weight"
    return f"{PREFIX}{parameter}"


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    lora: LoraShape,
    base: TokenizerFiles,
    quantization_bit: int | None = None,
) -> None:
    """Write adapter_model.safetensors, the base's tokenizer files, and adapter_config.json.

    tensors: each trained parameter by its name, on the CPU. base: the base model's tokenizer files;
    their folder is what adapter_config.json names as the base. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_stored_name = {stored_name(name): tensor for name, tensor in tensors.items()}
    metadata = {"format": "pt"}
    if quantization_bit is not None:
        # adapter_config.json has no key for it, and PEFT warns of keys that it does not know.
        metadata[QUANTIZATION] = str(quantization_bit)
    write_atomically(folder / WEIGHTS, save(by_stored_name, metadata=metadata))
    for name, content in base.contents.items():
        write_atomically(folder / name, content)

    # The config is what makes the folder an adapter, so it comes last. Its keys are not sorted:
    # of the patterns in rank_pattern and alpha_pattern the first that matches a layer counts.
    layers = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    config = json.dumps(peft_config(lora, base.folder, layers), indent=2) + "\n"
    write_atomically(folder / CONFIG, config.encode())


def trained_in_bits(folder: Path) -> str | None:
    """quantization_bit of the run that wrote a sound adapter, None if it was not set."""
    with safe_open(folder / WEIGHTS, framework="np") as opened:
        metadata = opened.metadata() or {}
    return metadata.get(QUANTIZATION)


def check_adapter(folder: Path, expected: Mapping[str, Tensor]) -> None:
    """Read the written weights back and compare them with what was trained.

    expected: each trained parameter by its name. Raises RunError unless the file holds exactly
    these tensors, to the bit, and every number is finite.
    """
    path = folder / WEIGHTS
    try:
        held = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} cannot be read back: {error}") from None

    wanted = {stored_name(name): tensor for name, tensor in expected.items()}
    if held.keys() != wanted.keys():
        raise RunError(f"{path}: tensors {sorted(held.keys() ^ wanted.keys())} differ")
    for name, tensor in wanted.items():
        if not tensor.numel() or not tensor.isfinite().all():
            raise RunError(f"{path}: {name} is empty or not finite")
        if not torch.equal(held[name], tensor):
            raise RunError(f"{path}: {name} differs from what was trained")


def read_adapter(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read an adapter's tensors by parameter name, in the dtype of the file.

    expected: the shape of each parameter by its name. Raises RequestError as `check_tensors` does.
    """
    check_tensors(folder, expected)
    held = load_file(folder / WEIGHTS)
    return {name: held[stored_name(name)] for name in expected}


def check_tensors(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check an adapter's tensors, holding one of them in memory at a time.

    expected: the shape of each parameter by its name. Raises RequestError naming each tensor that
    is missing, surplus, of another shape or not finite.
    """
    path = folder / WEIGHTS
    wanted = {stored_name(name): shape for name, shape in expected.items()}
    problems = []
    try:
        with safe_open(path, framework="pt") as opened:
            held = set(opened.keys())
            for name in sorted(held & wanted.keys()):
                tensor = opened.get_tensor(name)
                if tensor.shape != wanted[name]:
                    found, needed = list(tensor.shape), list(wanted[name])
                    problems.append(f"{name} has shape {found}, the model needs {needed}")
                elif not tensor.isfinite().all():
                    problems.append(f"{name} holds NaN or infinite numbers")
    except FileNotFoundError:
        raise RequestError([f"{path}: no such file; no other format is read"]) from None
    except (SafetensorError, OSError) as error:
        raise RequestError([f"{path}: not a whole safetensors file: {error}"]) from None

    problems += [f"{name} is missing" for name in sorted(wanted.keys() - held)]
    problems += [f"{name} is not in the model" for name in sorted(held - wanted.keys())]
    if problems:
        raise RequestError(shortened([f"{path}: {problem}" for problem in problems]))


def patiently(write: Callable[[], Result]) -> Result:
    """Write something, and once more if that failed, unless the disk is broken or full.

    Network shares refuse a rename or a new folder at times, because a machine still has a file open
    (EBUSY) or knows an older state of the folder (ENOENT, ESTALE), and take it a moment later.
    write: begins anew when it is called again. Raises OSError.
    """
    try:
        return write()
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
    time.sleep(PAUSE_SECONDS)
    return write()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it is the old one or the new one, never a part of one.

    Raises OSError.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            # A rename may reach the disk before the content does, unless that is there already.
            _sync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        # On a full disk half a file would take the room that others need.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _sync(handle: int) -> None:
    """Flush a file to the disk. Raises OSError, but not where the file system has no such call."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
