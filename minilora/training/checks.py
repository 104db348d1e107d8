"""Everything that can be wrong with a request, found before anything is built.

`check` opens each small file once: config.json, the headers of the weights, the adapter to
continue, the DeepSpeed files. What it read is handed on in one object that all others take.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.data.chat import make_template
from minilora.data.datasets import read_conversations
from minilora.data.tokenizer import load_tokenizer
from minilora.files.adapter import read_adapter
from minilora.files.adapter_config import CONFIG, read_adapter_shape
from minilora.files.deepspeed_file import Facts, read_deepspeed_files
from minilora.files.model_config import ModelConfig, read_model_config
from minilora.files.model_families import window_problem
from minilora.files.output_folder import check_room
from minilora.files.rotation import draft_bytes
from minilora.files.snapshot import find_snapshot
from minilora.files.weights import Checkpoint, read_checkpoint
from minilora.memory.job import MemoryJob, kept_blocks
from minilora.memory.ways import Way, asked_way
from minilora.memory.zero3_gathers import Zero
from minilora.model.llama_shape import LlamaShape
from minilora.model.lora_shape import LoraShape
from minilora.processes.launcher import ranks_of_this_machine
from minilora.report.curves import LOG
from minilora.settings.errors import RequestError
from minilora.settings.settings import Settings
from minilora.training.deepspeed_internals import reject_bad_config
from minilora.training.engine import ModelRecipe

SNAPSHOT_BYTES = 4  # of an fp32 number, of which a snapshot has several for each trained parameter


@dataclass(frozen=True)
class CheckedRequest:
    """A request in which nothing was found wrong, with all that was read to find out.

    settings: what the user asked for, never changed by what the run decides
    model_type: the base's family, as config.json names it
    start_adapter: the tensors of the adapter to continue, by parameter name; empty for a new one
    ds_configs: DeepSpeed files that could serve, resolved, by name; the asked one is the first
    """

    settings: Settings
    model_type: str
    checkpoint: Checkpoint
    lora: LoraShape
    start_adapter: Mapping[str, Tensor]
    ds_configs: Mapping[str, dict[str, Any]]

    @property
    def ds_config(self) -> dict[str, Any]:
        """The DeepSpeed file that was asked for, resolved."""
        return next(iter(self.ds_configs.values()))

    def asked_way(self, ranks: int) -> tuple[Way, dict[str, Zero]]:
        """What the memory plan makes of the settings, and of the DeepSpeed files."""
        on_gpu = torch.cuda.is_available()
        return asked_way(self.settings, self.checkpoint.shape, self.ds_configs, ranks, on_gpu)

    def recipe(self, decided: MemoryJob) -> ModelRecipe:
        """What the engine builds, with the tiles and the blocks that save their activations."""
        return ModelRecipe(
            self.checkpoint,
            self.lora,
            self.start_adapter,
            self.settings.train,
            self.ds_config,
            decided.keep_blocks,
            decided.tile_tokens,
        )


def check(settings: Settings) -> CheckedRequest:
    """Check the whole request. Raises RequestError with every problem that was found."""
    problems: list[str] = []
    train = settings.train
    config: ModelConfig | None = None
    checkpoint: Checkpoint | None = None
    lora: LoraShape | None = None
    start_adapter: Mapping[str, Tensor] = {}
    ds_configs: Mapping[str, dict[str, Any]] = {}

    # The base model. What depends on its shape is checked only where config.json can be read.
    with _collecting(problems):
        config = read_model_config(settings.base, settings.model.quantization_bit)
        checkpoint = read_checkpoint(config)
    if config is not None:
        with _collecting(problems):
            lora, start_adapter = _adapter(settings, config.shape)
        with _collecting(problems):
            kept_blocks(settings, config.shape)
        problems += window_problem(config.shape, settings.data.cutoff_len, "cutoff_len")

    # Where the run writes, and what it resumes from. Rank 0 does that alone, and other machines
    # need not even have the folder.
    is_rank0 = os.environ.get("RANK", "0") == "0"
    if is_rank0:
        with _collecting(problems):
            _check_output(settings)
        with _collecting(problems):
            find_snapshot(settings.output, train.resume_from_checkpoint)
    if is_rank0 and config is not None and lora is not None:
        with _collecting(problems):
            size = SNAPSHOT_BYTES * lora.size(config.shape)
            check_room(settings.output, size, draft_bytes(settings.output))

    # The DeepSpeed file: its limits follow from the size of the model.
    if config is not None:
        with _collecting(problems):
            bf16 = train.computes_in_bf16(on_gpu=torch.cuda.is_available())
            ranks = int(os.environ.get("WORLD_SIZE", "1"))
            here = Facts(ranks, config.shape, bf16, ranks_of_this_machine())
            ds_configs = read_deepspeed_files(train, here)
            # What passes our own table may still be a combination that DeepSpeed does not take.
            if reason := reject_bad_config(next(iter(ds_configs.values()))):
                problems.append(f"deepspeed: {train.deepspeed}: {reason}")
    if train.memory_snapshot and not torch.cuda.is_available():
        problems.append("memory_snapshot: torch notes a GPU's memory, and there is none; remove it")

    if problems or config is None or checkpoint is None or lora is None:
        problems += _data_problems(settings, has_config=config is not None)
        raise RequestError(problems)
    model_type = config.values["model_type"]
    return CheckedRequest(settings, model_type, checkpoint, lora, start_adapter, ds_configs)


def _data_problems(settings: Settings, has_config: bool) -> list[str]:
    """What is wrong with the data of a request that is refused anyway, so that all is said at once.

    The data of a sound request are read later, by one process of each machine. Only one of each
    looks here, too.
    """
    problems: list[str] = []
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return problems
    if has_config:  # else there is no model folder, which has been said
        with _collecting(problems):
            tokenizer = load_tokenizer(settings.base)
            if settings.method.stage == "sft":
                make_template(settings.data.template, tokenizer)
    for names in (settings.data.dataset, settings.data.eval_dataset):
        if names:
            with _collecting(problems):
                read_conversations(names, settings.data, settings.method.stage)
    return problems


def _adapter(settings: Settings, shape: LlamaShape) -> tuple[LoraShape, Mapping[str, Tensor]]:
    """The shape of the adapter, and the tensors that it starts from if it continues another."""
    asked = LoraShape.of(settings.method, shape)
    if settings.model.adapter_name_or_path is None:
        return asked, {}

    folder = Path(settings.model.adapter_name_or_path)
    if not folder.is_dir():
        remedy = "no such folder; name one adapter, several are merged first (minilora.merge)"
        raise RequestError([f"adapter_name_or_path: {folder}: {remedy}"])
    continued = read_adapter_shape(folder, shape, settings.method.lora_dropout)
    problems = _contradictions(settings, asked, continued, shape)
    if problems:
        raise RequestError(problems)
    return continued, read_adapter(folder, continued.parameter_shapes(shape))


def _contradictions(
    settings: Settings, asked: LoraShape, continued: LoraShape, shape: LlamaShape
) -> list[str]:
    """Keys that the user wrote and that the adapter to continue contradicts."""
    folder = settings.model.adapter_name_or_path
    pairs = (
        ("lora_rank", asked.rank, continued.rank),
        ("lora_alpha", asked.alpha, continued.alpha),
        ("use_rslora", asked.use_rslora, continued.use_rslora),
        ("use_dora", asked.use_dora, continued.use_dora),
        ("rank_pattern", asked.rank_pattern, continued.rank_pattern),
        ("alpha_pattern", asked.alpha_pattern, continued.alpha_pattern),
        ("additional_target", {*asked.modules_to_save}, {*continued.modules_to_save}),
    )
    problems = [
        f"{settings.name_of(key)}: {mine} contradicts the {theirs} of {folder}; remove the key"
        for key, mine, theirs in pairs
        if key in settings.origins and mine != theirs
    ]
    other_layers = {*asked.layers(shape)} != {*continued.layers(shape)}
    if "lora_target" in settings.origins and other_layers:
        name = settings.name_of("lora_target")
        problems.append(f"{name} means other layers than those of {folder}; remove the key")
    return problems


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
def _collecting(problems: list[str]) -> Iterator[None]:
    """Collect the problems of a RequestError, or of a file that cannot be read, and continue."""
    try:
        yield
    except RequestError as error:
        problems.extend(error.problems)
    except OSError as error:
        problems.append(f"{error.filename}: {error.strerror}")
