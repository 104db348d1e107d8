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
# The settings that fields of LoraShape come from, where the names differ.
SETTING_OF_FIELD = {"targets": "lora_target", "modules_to_save": "additional_target"}
Number = TypeVar("Number", bound=float)


class LoraLayer(NamedTuple):
    """A linear layer that gets a LoRA pair, and with dora a magnitude for each of its outputs."""

    out_features: int
    in_features: int
    rank: int
    scaling: float
    dora: bool


@dataclass(frozen=True)
class LoraShape:
    """Rank R, alpha, dropout in [0, 1), and which layers get a pair.

    targets: ends of paths such as `q_proj`, or as text one regular expression for whole paths.
    rank_pattern, alpha_pattern: the rank and alpha of some layers, by regular expressions for ends
    of their paths; the first that matches counts. modules_to_save: keys of WHOLE, trained as they
    are and without LoRA.
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
        lora = cls(
            rank=method.lora_rank,
            alpha=method.alpha,
            dropout=method.lora_dropout,
            targets=_targets(method.lora_target, model),
            use_rslora=method.use_rslora,
            use_dora=method.use_dora,
            rank_pattern=method.rank_pattern or {},
            alpha_pattern=method.alpha_pattern or {},
            modules_to_save=_known_first(method.additional_target or (), WHOLE),
        )

        problems = [
            f"{SETTING_OF_FIELD.get(key, key)}: {text}" for key, text in lora.problems(model)
        ]
        # Only once all else is right: the layers of a wrong target match no pattern.
        problems = problems or list(lora._unmatched_patterns(model))
        if problems:
            raise RequestError(problems)
        return lora

    def __str__(self) -> str:
        kind = "DoRA" if self.use_dora else "LoRA"
        if self.use_rslora:
            kind = "rs" + kind
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        whole = "".join(f", {name} whole" for name in self.modules_to_save)
        return f"{kind} rank {self.rank} on {', '.join(targets)}{whole}"

    def layers(self, model: LlamaShape) -> dict[str, LoraLayer]:
        """Every layer that gets a pair by its path, in the model's order."""
        layers = {}
        for path, (rows, columns) in model.linear_layers().items():
            if self._is_target(path):
                rank = _first_match(self.rank_pattern, path, self.rank)
                alpha = _first_match(self.alpha_pattern, path, self.alpha)
                # rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) divides by the root of the rank.
                scaling = alpha / (math.sqrt(rank) if self.use_rslora else rank)
                layers[path] = LoraLayer(rows, columns, rank, scaling, self.use_dora)
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
        invalid = list(self._invalid_patterns())
        yield from invalid
        if not isinstance(self.targets, str):
            yield from self._problems_of_names(self.targets, model)
        elif not invalid:  # otherwise nothing can be matched
            yield from self._problems_of_expression(self.targets, model)

        for name in self.modules_to_save:
            if name not in WHOLE:
                yield "modules_to_save", f"{name} cannot be trained whole; {', '.join(WHOLE)} can"
            elif model.tied:
                yield (
                    "modules_to_save",
                    f"this checkpoint ties lm_head to embed_tokens, so {name} cannot be trained "
                    "alone; name LoRA layers only, or untie the checkpoint",
                )

    def _problems_of_names(
        self, targets: tuple[str, ...], model: LlamaShape
    ) -> Iterator[tuple[str, str]]:
        if not targets:
            yield "targets", "names no layer; write `all` or a list"
        for name in targets:
            if not any(_ends_with(path, name) for path in model.linear_layers()):
                yield "targets", f"no layer is called {name}; {_known_layers(model)}"

    def _problems_of_expression(
        self, expression: str, model: LlamaShape
    ) -> Iterator[tuple[str, str]]:
        whole = [parameter.removesuffix(".weight") for parameter in WHOLE.values()]
        if any(re.fullmatch(expression, path) for path in whole):
            names = ", ".join(WHOLE)
            yield "targets", f"{expression!r} matches {names}; those get no LoRA pair"
        elif not self.layers(model):
            known = _known_layers(model)
            yield "targets", f"{expression!r} matches the whole path of no layer; {known}"

    def _invalid_patterns(self) -> Iterator[tuple[str, str]]:
        """Fields that hold a regular expression which Python cannot read."""
        patterns: list[tuple[str, str, str]] = []  # field, as given, as compiled
        if isinstance(self.targets, str):
            patterns.append(("targets", self.targets, self.targets))
        for pattern in self.rank_pattern:
            patterns.append(("rank_pattern", pattern, _path_end(pattern)))
        for pattern in self.alpha_pattern:
            patterns.append(("alpha_pattern", pattern, _path_end(pattern)))

        for key, pattern, compiled in patterns:
            try:
                re.compile(compiled)
            except (re.error, RecursionError, OverflowError) as error:
                yield key, f"{pattern!r} is no regular expression: {error}"

    def _unmatched_patterns(self, model: LlamaShape) -> Iterator[str]:
        """Patterns of ranks and alphas that no layer has: a setting without effect is an error."""
        paths = list(self.layers(model))
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, key):
                if not any(_matches_end(pattern, path) for path in paths):
                    yield f"{key}: {pattern!r} matches the end of no path of lora_target"

    def _is_target(self, path: str) -> bool:
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, path) is not None
        return any(_ends_with(path, name) for name in self.targets)


def _targets(named: tuple[str, ...], model: LlamaShape) -> tuple[str, ...] | str:
    """The field `targets` for what the setting names: `all`, ends of paths, or an expression."""
    linear_layers = tuple(model.linear_shapes())
    if len(named) == 1 and not re.fullmatch(r"[-\w.]*", named[0]):
        return named[0]  # it has characters that no path has
    if "all" in named:
        return linear_layers
    return _known_first(named, linear_layers)


def _known_layers(model: LlamaShape) -> str:
    return f"known: {', '.join(model.linear_shapes())}"


def _known_first(named: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """What is named, each once: first what is known, in the known order, then the rest."""
    asked = dict.fromkeys(named)
    in_known_order = [name for name in known if name in asked]
    return tuple(dict.fromkeys([*in_known_order, *asked]))


def _ends_with(path: str, name: str) -> bool:
    """Whether a path ends with these parts: `q_proj` and `self_attn.q_proj` do, `proj` not."""
    return path == name or path.endswith(f".{name}")


def _path_end(pattern: str) -> str:
    """The expression for paths whose last parts match the pattern, as in PEFT's get_pattern_key."""
    return rf"(.*\.)?({pattern})$"


def _matches_end(pattern: str, path: str) -> bool:
    return re.match(_path_end(pattern), path) is not None


def _first_match(patterns: Mapping[str, Number], path: str, default: Number) -> Number:
    """The value of the first pattern that matches the end of the path."""
    for pattern, value in patterns.items():
        if _matches_end(pattern, path):
            return value
    return default
