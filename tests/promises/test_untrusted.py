"""A checkpoint, an adapter or a snapshot from a stranger is data: none of its code ever runs."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import Ground, log, run_jobs

PACKAGE = sorted((Path(__file__).resolve().parent.parent.parent / "minilora").rglob("*.py"))
# What makes code out of data.
MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy",
           "code", "codeop", "subprocess", "ctypes"}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "importlib.import_module", "os.system",
         "os.popen", "torch.load", "torch.jit.load", "torch.hub.load", "yaml.load",
         "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"}  # fmt: skip


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_no_code_is_made_of_data(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not MODULES & {name.split(".")[0] for name in names}, where
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in CALLS, where
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "trust_remote_code"):
                    assert ast.unparse(keyword.value) == "False", where


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def lay_traps(folder: Path, mark: Path) -> None:
    """Files that other programs unpickle or import."""
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt",
                 "scheduler.pt", "rng_state_0.pth", "mp_rank_00_model_states.pt"):  # fmt: skip
        (folder / name).write_bytes(pickle.dumps(Trap(mark)))
    for name in ("modeling_trap.py", "conftest.py", "sitecustomize.py", "tokenization_trap.py"):
        (folder / name).write_text(f"import os\nos.mkdir({str(mark)!r})\n", encoding="utf-8")


def test_the_traps_work(tmp_path: Path) -> None:
    lay_traps(tmp_path, tmp_path / "mark")
    pickle.loads((tmp_path / "optimizer.pt").read_bytes())
    assert (tmp_path / "mark").is_dir()


def test_code_of_a_checkpoint_never_runs(
    ground: Ground, launch: Callable[..., tuple[int, str]]
) -> None:
    """Nor that of an adapter and of a snapshot, though trust_remote_code is asked for."""
    folder = ground.folder / "stranger"
    model = Path(shutil.copytree(ground.models["tiny"], folder / "model"))
    adapter = Path(shutil.copytree(ground.adapters["tiny"], folder / "adapter"))
    mark = folder / "mark"
    auto = {"AutoModelForCausalLM": "modeling_trap.Trap", "AutoConfig": "modeling_trap.Trap"}
    for name, key in (("config.json", auto), ("tokenizer_config.json", {"AutoTokenizer": auto})):
        content = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps({**content, "auto_map": key}), encoding="utf-8")
    job = ground.job("untrusted", "tiny", model_name_or_path=str(model), max_steps=2, save_steps=1)
    job |= {"adapter_name_or_path": str(adapter), "trust_remote_code": True}
    for place in (model, adapter):
        lay_traps(place, mark)
    run_jobs(launch, 1, [job])
    snapshot = Path(str(job["output_dir"])) / "checkpoint-1"
    lay_traps(snapshot, mark)
    again = {**job, "output_dir": str(folder / "out"), "resume_from_checkpoint": str(snapshot)}
    run_jobs(launch, 1, [again])
    assert log(again, "loss") == log(job, "loss")[1:]
    assert not mark.exists()
