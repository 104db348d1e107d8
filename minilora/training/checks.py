"""Everything that can be wrong with a request, found before anything is built."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from minilora.data.datasets import read_conversations
from minilora.data.tokenizer import load_tokenizer
from minilora.files.adapter import read_adapter
from minilora.files.adapter_config import CONFIG, read_adapter_shape
from minilora.files.deepspeed_file import Facts, find_ds_config, resolve_ds_config
from minilora.files.model_config import read_model_config
from minilora.files.output_folder import check_room
from minilora.files.snapshot import find_snapshot
from minilora.files.weights import read_checkpoint
from minilora.memory.job import kept_blocks
from minilora.model.llama_shape import LlamaShape
from minilora.model.lora_shape import LoraShape
from minilora.report.curves import LOG
from minilora.settings.errors import RequestError
from minilora.settings.settings import Settings
from minilora.training.engine import ModelRecipe


def check(settings: Settings) -> ModelRecipe:
    """Check weights, adapter, DeepSpeed file and output folder, and report all problems at once."""
    problems: list[str] = []
    train_settings = settings.train
    shape = checkpoint = lora = adapter = None
    model = settings.base
    with _noting(problems):
        config = read_model_config(model)
        shape = config.shape
        checkpoint = read_checkpoint(config)
    if shape is not None:
        with _noting(problems):
            lora, adapter = _adapter(settings, shape)
    with _noting(problems):
        _check_output(settings)
    with _noting(problems):
        find_snapshot(settings.output, train_settings.resume_from_checkpoint)
    if shape is not None and lora is not None:
        with _noting(problems):
            check_room(settings.output, 4 * lora.size(shape))
    keep_blocks = 0
    with _noting(problems):
        keep_blocks = kept_blocks(settings, shape) if shape is not None else 0
    ds_config = {}
    with _noting(problems):
        path = find_ds_config(train_settings.deepspeed)
        if shape is not None:
            facts = Facts(
                world_size=int(os.environ.get("WORLD_SIZE", "1")),
                hidden_size=shape.hidden_size,
                bf16=train_settings.computes_in_bf16(torch.cuda.is_available()),
            )
            ds_config = resolve_ds_config(path, train_settings, facts)
    if train_settings.memory_snapshot and not torch.cuda.is_available():
        problems.append("memory_snapshot: torch notes a GPU's memory, and there is none; remove it")
    if problems or checkpoint is None or lora is None or adapter is None:
        raise RequestError([*problems, *_data_problems(settings, tokenizer=shape is not None)])
    return ModelRecipe(checkpoint, lora, adapter, train_settings, ds_config, keep_blocks)


def _data_problems(settings: Settings, tokenizer: bool) -> list[str]:
    """What is wrong with the data of a request that is refused anyway; rank 0 alone tells it."""
    problems: list[str] = []
    if os.environ.get("RANK", "0") == "0":
        if tokenizer:
            with _noting(problems):
                load_tokenizer(settings.base)
        for names in filter(None, (settings.data.dataset, settings.data.eval_dataset)):
            with _noting(problems):
                read_conversations(names, settings.data, settings.method.stage)
    return problems


def _adapter(settings: Settings, shape: LlamaShape) -> tuple[LoraShape, Mapping[str, Tensor]]:
    """The shape of the adapter, and what it starts from if it continues another."""
    method, folder = settings.method, settings.model.adapter_name_or_path
    asked = LoraShape.of(method, shape)
    if folder is None:
        return asked, {}
    if not Path(folder).is_dir():
        lacks = "no such folder; name one adapter, several are merged first (minilora.merge)"
        raise RequestError([f"adapter_name_or_path: {folder}: {lacks}"])
    lora = read_adapter_shape(Path(folder), shape, method.lora_dropout)
    problems = [
        f"{settings.name_of(key)}: {mine} contradicts the {has} of {folder}; remove the key"
        for key, mine, has in (
            ("lora_rank", asked.rank, lora.rank),
            ("lora_alpha", asked.alpha, lora.alpha),
            ("use_rslora", asked.use_rslora, lora.use_rslora),
            ("use_dora", asked.use_dora, lora.use_dora),
            ("rank_pattern", asked.rank_pattern, lora.rank_pattern),
            ("alpha_pattern", asked.alpha_pattern, lora.alpha_pattern),
            ("additional_target", {*asked.modules_to_save}, {*lora.modules_to_save}),
        )
        if key in settings.origins and mine != has
    ]
    if "lora_target" in settings.origins and {*asked.layers(shape)} != {*lora.layers(shape)}:
        name = settings.name_of("lora_target")
        problems.append(f"{name} means other layers than those of {folder}; remove the key")
    if problems:
        raise RequestError(problems)
    return lora, read_adapter(Path(folder), lora.parameter_shapes(shape))


def _check_output(settings: Settings) -> None:
    """Refuse to write over another run."""
    folder, train = settings.output, settings.train
    resumes = (train.resume_from_checkpoint or "false").lower() != "false"
    holds_run = any((folder / name).exists() for name in (LOG, CONFIG))
    if holds_run and not (train.overwrite_output_dir or resumes):
        raise RequestError(
            [
                f"output_dir: {folder} holds a run; name another, go on with it "
                "(resume_from_checkpoint: true), or set overwrite_output_dir: true"
            ]
        )


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Collect the problems of a RequestError, or of a file, and go on."""
    try:
        yield
    except RequestError as error:
        problems.extend(error.problems)
    except OSError as error:
        problems.append(f"{error.filename}: {error.strerror}")
