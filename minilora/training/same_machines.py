"""What all machines of a run must have the same, compared before the first step.

A machine with other rows, another rate or other weights would train along without an error, and
nobody would see that the result is wrong. Each difference is refused by the name of the machine.
With one machine nothing is compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from minilora import __version__
from minilora.data.documents import Documents
from minilora.data.tokenizer_files import TokenizerFiles
from minilora.files.tensor_parts import TensorPart
from minilora.files.weights import Checkpoint, read_parts
from minilora.files.weights_digest import WeightsDigest, added
from minilora.processes.world import World
from minilora.settings.errors import RequestError, shortened
from minilora.training.checks import CheckedRequest
from minilora.training.same_run import data_digests

# Settings that name places, which may be others on each machine, or that only rank 0 heeds. What
# lies at those places is compared by its content.
MAY_DIFFER = {
    "model_name_or_path",
    "adapter_name_or_path",
    "dataset",
    "eval_dataset",
    "dataset_dir",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "deepspeed",
    "ddp_timeout",
    "verbose_deepspeed",
}
SHOWN = 60  # characters of a value in a message
AT_A_TIME = 2**24  # numbers of a base weight in memory, while a machine reads all of them


def check_same_settings(world: World, request: CheckedRequest) -> None:
    """Compare versions, settings, the model's shape and the adapter that training continues.

    Collective; raises RequestError on every rank.
    """
    if len(world.machines) == 1:
        return
    values = _values(request) if world.leads else {}
    problems = [
        f"{key} is {_short(theirs)} on {name}, and {_short(ours)} on {world.machines[0].name}"
        for name, key, theirs, ours in _differences(world, values)
    ]
    _refuse(problems, "give all machines the same settings, files and versions")


def check_same_data(
    world: World,
    request: CheckedRequest,
    documents: Documents,
    validation: Documents,
    base: TokenizerFiles,
) -> None:
    """Compare the documents that each machine has tokenised, and the files that they come from.

    base: the tokenizer's files, which a process of each machine has. Collective; raises
    RequestError on every rank.
    """
    if len(world.machines) == 1:
        return
    digests: dict[str, Any] = {}
    with world.agreed():
        if world.leads:
            # Datasets by number, since their names may be places.
            files = data_digests(request.settings, base)
            digests = {
                "the training documents are": documents.fingerprint(),
                "the validation documents are": validation.fingerprint(),
                "the tokenizer's files are": [files[name] for name in base.contents],
            }
            for number, name in enumerate(request.settings.data.dataset, 1):
                digests[f"the file of dataset {number} is"] = files[name]
    problems = [
        f"{what} not the same on {name} as on {world.machines[0].name}"
        for name, what, _, _ in _differences(world, digests)
    ]
    _refuse(problems, "copy the data and the tokenizer from one machine to all")


def check_same_weights(world: World, checkpoint: Checkpoint) -> None:
    """Compare every byte of the base weights on all machines.

    With ZeRO-3 a rank loads only its part, from its own machine's files. So each machine reads all
    of its files here, its ranks together, and compares the sums (files.weights_digest). It is what
    the page cache gets in advance of loading. Collective; raises RequestError on every rank.
    """
    if len(world.machines) == 1:
        return
    sums: dict[str, int] = {}
    with world.agreed():
        sums = _own_sums(world, checkpoint)
    by_rank = world.gather_objects(sums)
    ours, *others = world.machines
    right = added(by_rank[rank] for rank in ours.ranks)
    problems = []
    for machine in others:
        theirs = added(by_rank[rank] for rank in machine.ranks)
        names = [name for name in right if theirs.get(name) != right[name]]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            problems.append(
                f"model_name_or_path: {names[0]}{more} on {machine.name} "
                f"{'differ' if more else 'differs'} from {ours.name}'s"
            )
    _refuse(problems, "copy the model from one machine to all")


def _values(request: CheckedRequest) -> dict[str, Any]:
    """What is compared before anything is built, by the name that a message gives it."""
    settings = request.settings.to_dict()
    return {
        "the version of minilora": __version__,
        "the version of torch": str(torch.__version__),
        "the version of DeepSpeed": metadata.version("deepspeed"),
        **{key: value for key, value in settings.items() if key not in MAY_DIFFER},
        **dict(_leaves("the DeepSpeed file's", request.ds_config)),
        **{f"the model's {key}": value for key, value in asdict(request.checkpoint.shape).items()},
        **{
            f"the dtype of {name}": str(stored.dtype)
            for name, stored in request.checkpoint.tensors.items()
        },
        **{f"the adapter's {key}": value for key, value in asdict(request.lora).items()},
        **{
            f"the digest of {name} in adapter_name_or_path": _digest(tensor)
            for name, tensor in request.start_adapter.items()
        },
    }


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values in nested objects, by their path; but for those that name places."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name} {key}", inner)
    elif not name.endswith("path"):
        yield name, value


def _digest(tensor: Tensor) -> str:
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()[:16]


def _differences(world: World, values: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """Where another machine has something else than rank 0's: its name, the key, both values.

    values: of this machine, given by its first rank. Collective.
    """
    by_rank = world.gather_objects(values)
    ours = by_rank[0]
    for machine in world.machines[1:]:
        theirs = by_rank[machine.ranks[0]]
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                yield machine.name, key, theirs.get(key), ours.get(key)


def _own_sums(world: World, checkpoint: Checkpoint) -> dict[str, int]:
    """The sums of the tensors that this rank reads for its machine."""
    ranks = world.machine.ranks
    names = list(checkpoint.tensors)[ranks.index(world.rank) :: len(ranks)]
    digest = WeightsDigest({*names})
    for name in names:
        stored = checkpoint.tensors[name]
        size = torch.Size(stored.shape).numel()
        for start in range(0, size, AT_A_TIME):
            read = torch.empty(min(AT_A_TIME, size - start), dtype=stored.dtype)
            read_parts(checkpoint, [TensorPart(name, start, read)], digest)
    return digest.sums


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _refuse(problems: list[str], remedy: str) -> None:
    """Raise RequestError for problems, if there are any."""
    if problems:
        raise RequestError([f"{problem}; {remedy}" for problem in shortened(problems)])
