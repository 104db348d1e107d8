"""What an adapter adds to a Llama, layer by layer; the names are PEFT's. Without torch."""

# Shape letters: D model, V vocabulary, R rank; `in` and `out` are a linear layer's features.

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from minilora.model.llama_shape import LlamaShape
from minilora.settings.errors import RequestError
from minilora.settings.settings import MethodSettings

# What modules_to_save may name, and its parameter: (V, D) both.
WHOLE = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
MAGNITUDE = "lora_magnitude_vector"
# The settings that these fields come from, where the names differ.
SETTINGS = {"targets": "lora_target", "modules_to_save": "additional_target"}
_END = r"(.*\.)?({})$"  # as in PEFT's get_pattern_key
Number = TypeVar("Number", bound=float)


class Layer(NamedTuple):
    """A linear layer that gets a LoRA pair; dora: and a magnitude for each of its outputs."""

    out_features: int
    in_features: int
    rank: int
    scaling: float
    dora: bool


@dataclass(frozen=True)
class LoraShape:
    """Rank R, alpha, dropout in [0, 1), and which layers get a pair.

    targets: ends of paths such as `q_proj`, or as text one regular expression for whole paths;
    rank_pattern, alpha_pattern: regular expressions for ends of paths, the first that matches
    counts; modules_to_save: keys of WHOLE, trained without LoRA.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...] | str
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    modules_to_save: tuple[str, ...] = ()

    @classmethod
    def of(cls, method: MethodSettings, model: LlamaShape) -> LoraShape:
        """What the settings ask for. Raises RequestError for what does not fit the model."""
        named, known = method.lora_target, tuple(model.linear_shapes())
        targets: tuple[str, ...] | str = known
        if len(named) == 1 and not re.fullmatch(r"[-\w.]*", named[0]):
            targets = named[0]
        elif "all" not in named:
            targets = _in_order(named, known)
        lora = cls(
            rank=method.lora_rank,
            alpha=method.alpha,
            dropout=method.lora_dropout,
            targets=targets,
            use_rslora=method.use_rslora,
            use_dora=method.use_dora,
            rank_pattern=method.rank_pattern or {},
            alpha_pattern=method.alpha_pattern or {},
            modules_to_save=_in_order(method.additional_target or (), WHOLE),
        )
        problems = [f"{SETTINGS.get(key, key)}: {text}" for key, text in lora.problems(model)]
        if problems := problems or [*lora._idle_patterns(model)]:
            raise RequestError(problems)
        return lora

    def __str__(self) -> str:
        kind = "rs" * self.use_rslora + ("DoRA" if self.use_dora else "LoRA")
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        whole = "".join(f", {name} whole" for name in self.modules_to_save)
        return f"{kind} rank {self.rank} on {', '.join(targets)}{whole}"

    def layers(self, model: LlamaShape) -> dict[str, Layer]:
        """Every layer that gets a pair by its path, in the model's order."""
        layers = {}
        for path, (rows, columns) in model.linear_layers().items():
            if self._is_target(path):
                rank = _first(self.rank_pattern, path, self.rank)
                alpha = _first(self.alpha_pattern, path, self.alpha)
                scaling = alpha / (math.sqrt(rank) if self.use_rslora else rank)
                layers[path] = Layer(rows, columns, rank, scaling, self.use_dora)
        return layers

    def parameter_shapes(self, model: LlamaShape) -> dict[str, tuple[int, ...]]:
        """Every trained parameter by its name in the model."""
        shapes: dict[str, tuple[int, ...]] = {
            WHOLE[name]: (model.vocab_size, model.hidden_size) for name in self.modules_to_save
        }
        for path, layer in self.layers(model).items():
            shapes[f"{path}.lora_A"] = (layer.rank, layer.in_features)
            shapes[f"{path}.lora_B"] = (layer.out_features, layer.rank)
            if layer.dora:
                shapes[f"{path}.{MAGNITUDE}"] = (layer.out_features,)
        return shapes

    def size(self, model: LlamaShape) -> int:
        """Elements of all trained parameters."""
        return sum(math.prod(shape) for shape in self.parameter_shapes(model).values())

    def problems(self, model: LlamaShape) -> Iterator[tuple[str, str]]:
        """What does not fit the model: the field, and what is wrong with it."""
        broken = [*self._broken_patterns()]
        yield from broken
        known = f"known: {', '.join(model.linear_shapes())}"
        if isinstance(self.targets, str):
            if not broken and any(re.fullmatch(self.targets, _module(name)) for name in WHOLE):
                whole = ", ".join(WHOLE)
                yield "targets", f"{self.targets!r} matches {whole}; those get no LoRA pair"
            elif not broken and not self.layers(model):
                yield "targets", f"{self.targets!r} matches the whole path of no layer; {known}"
        else:
            if not self.targets:
                yield "targets", "names no layer; write `all` or a list"
            for name in self.targets:
                if not any(_ends_with(path, name) for path in model.linear_layers()):
                    yield "targets", f"no layer is called {name}; {known}"
        for name in self.modules_to_save:
            if name not in WHOLE:
                yield "modules_to_save", f"{name} cannot be trained whole; {', '.join(WHOLE)} can"
            elif model.tied:
                yield (
                    "modules_to_save",
                    f"this checkpoint ties lm_head to embed_tokens, so {name} cannot be trained "
                    "alone; name LoRA layers only, or untie the checkpoint",
                )

    def _is_target(self, path: str) -> bool:
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, path) is not None
        return any(_ends_with(path, name) for name in self.targets)

    def _broken_patterns(self) -> Iterator[tuple[str, str]]:
        patterns = [("targets", self.targets)] if isinstance(self.targets, str) else []
        patterns += [("rank_pattern", pattern) for pattern in self.rank_pattern]
        patterns += [("alpha_pattern", pattern) for pattern in self.alpha_pattern]
        for key, pattern in patterns:
            try:
                re.compile(pattern if key == "targets" else _END.format(pattern))
            except (re.error, RecursionError, OverflowError) as error:
                yield key, f"{pattern!r} is no regular expression: {error}"

    def _idle_patterns(self, model: LlamaShape) -> Iterator[str]:
        """A setting that would do nothing is an error."""
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, key):
                if not any(_matches(pattern, path) for path in self.layers(model)):
                    yield f"{key}: {pattern!r} matches the end of no path of lora_target"


def _module(name: str) -> str:
    return WHOLE[name].removesuffix(".weight")


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _matches(pattern: str, path: str) -> bool:
    return re.match(_END.format(pattern), path) is not None


def _in_order(named: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """Each once, those that are known first and in their order."""
    asked = dict.fromkeys(named)
    return tuple(dict.fromkeys([*(name for name in known if name in asked), *asked]))


def _first(patterns: Mapping[str, Number], path: str, default: Number) -> Number:
    return next((value for key, value in patterns.items() if _matches(key, path)), default)
