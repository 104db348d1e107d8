"""Which files of a folder hold the weights of its model."""

from __future__ import annotations

from pathlib import Path

from minilora.settings.text_files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(folder: Path) -> tuple[dict[Path, set[str] | None], list[str]]:
    """The weight files, each with the names that the index says are in it, and what is wrong.

    The names are None for a single file, of which no index says anything.
    """
    single, index = folder / SINGLE, folder / INDEX
    if not index.exists():
        if single.exists():
            return {single: None}, []
        problem = f"no {SINGLE} and no {INDEX}; weights are read from safetensors files"
        return {}, [f"{folder}: {problem}"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        if single.exists():
            return {single: None}, []
        return {}, [f"{index}: weight_map is missing or empty"]

    # Programs that save into a folder with an older model leave its index behind, and transformers
    # then reads the single file. If the old shards are there too, nobody can tell which are meant.
    shards = {file for file in weight_map.values() if isinstance(file, str)}
    if single.exists() and SINGLE not in shards:
        if not any((folder / Path(file).name).exists() for file in shards):
            return {single: None}, []
        problem = f"holds {SINGLE} and also the shards of {INDEX}, which may be another model's"
        return {}, [f"{folder}: {problem}; remove one of them"]

    names_by_file: dict[Path, set[str] | None] = {}
    problems = []
    for name, file in weight_map.items():
        # A downloaded index must not make this program open files elsewhere. A link in the folder
        # is followed: whoever put it there had a shell.
        if not isinstance(file, str) or Path(file).name != file or not file.strip("."):
            problems.append(f"{folder / INDEX}: {name} lies in {file!r}, outside the folder")
            continue
        names = names_by_file.setdefault(folder / file, set())
        assert names is not None
        names.add(name)
    return names_by_file, problems
