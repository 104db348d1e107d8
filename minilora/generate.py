"""Answer prompts: `python -m minilora.generate --model_name_or_path DIR --prompt TEXT`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minilora.data.chat import Template, make_template
from minilora.data.conversations import BadRow, Turn, to_turns
from minilora.data.sources import OPENAI_TAGS, Row, read_rows
from minilora.data.tokenizer import load_tokenizer
from minilora.files.adapter import read_adapter, trained_in_bits
from minilora.files.adapter_config import read_adapter_shape
from minilora.files.model_config import read_model_config
from minilora.files.tensor_parts import TensorPart
from minilora.files.weights import Checkpoint, read_checkpoint, read_parts
from minilora.memory.measured import free_memory
from minilora.model.decode import Sampling, generate
from minilora.model.llama import Llama
from minilora.model.lora import inject, lora_parameters
from minilora.settings.errors import RequestError, RunError, exit_code

BATCH = 16  # prompts of a file that are answered side by side

Answer = Callable[..., Iterator[tuple[int, int]]]  # `generate`, with its settings
Decode = Callable[[Sequence[int]], str]
Encode = Callable[[Sequence[Row]], list[list[int]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 done, 1 something happened, 2 the request is wrong."""
    args = _parser().parse_args(argv)

    def work() -> None:
        try:
            run(args)
        except torch.OutOfMemoryError as error:
            raise RunError(f"{error}; lower --max_new_tokens") from None

    return exit_code(work)


def run(args: argparse.Namespace) -> None:
    """Check, load, answer. Raises RequestError before the weights are read."""
    if problems := _option_problems(args):
        raise RequestError(problems)
    config = read_model_config(args.model_name_or_path, args.quantization_bit)
    checkpoint = read_checkpoint(config)
    tokenizer = load_tokenizer(args.model_name_or_path)
    template = make_template(args.template, tokenizer, args.system)
    room = (checkpoint.shape.max_positions or math.inf) - args.max_new_tokens
    encode: Encode = partial(encode_rows, template, room)
    rows = (
        read_prompts(args.prompts) if args.prompts else [Row("--prompt", {"prompt": args.prompt})]
    )
    prompts = [] if args.interactive else encode(rows)
    model = load(checkpoint, args.adapter_name_or_path)
    answer: Answer = partial(
        generate,
        model,
        max_new_tokens=args.max_new_tokens,
        stop_ids=template.stop_ids,
        sampling=Sampling(args.temperature, args.top_k, args.top_p, args.seed),
    )
    decode: Decode = partial(tokenizer.decode, skip_special_tokens=True)
    if args.interactive:
        chat(answer, encode, decode)
    elif args.prompts is None:
        show(answer(prompts), decode)
    else:
        with args.output.open("x", encoding="utf-8") as output:
            for first in tqdm(range(0, len(rows), BATCH)):
                tokens: list[list[int]] = [[] for _ in rows[first : first + BATCH]]
                for index, token in answer(prompts[first : first + BATCH], first=first):
                    tokens[index].append(token)
                for row, answered in zip(rows[first:], tokens, strict=False):
                    line = {**row.value, "predict": decode(answered)}  # LLaMA-Factory's name
                    output.write(json.dumps(line, ensure_ascii=False) + "\n")
                output.flush()


def show(tokens: Iterable[tuple[int, int]], decode: Decode) -> str:
    """Print an answer while it grows; returns it whole."""
    pieces = []
    for piece in stream((token for _, token in tokens), decode):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def stream(tokens: Iterable[int], decode: Decode) -> Iterator[str]:
    """Text piece by piece; a character waits until the tokens of all its bytes have come."""
    so_far: list[int] = []
    text, shown = "", 0
    for token in tokens:
        so_far.append(token)
        text = decode(so_far)
        whole = len(text.rstrip("\ufffd"))  # what decoders write for bytes that are no character
        yield text[shown:whole]
        shown = whole
    yield text[shown:]


def chat(answer: Answer, encode: Encode, decode: Decode) -> None:
    """Ask on the terminal until `exit` or the end of the input; `clear` forgets what was said."""
    print("exit leaves, clear starts anew", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            return
        if prompt == "exit":
            return
        if prompt == "clear":
            messages = []
        elif prompt:
            messages.append({"role": "user", "content": prompt})
            prompts = encode([Row("chat", {"messages": messages})])
            messages.append({"role": "assistant", "content": show(answer(prompts), decode)})


def read_prompts(path: Path) -> list[Row]:
    """Rows with `prompt` or `messages`: of a .jsonl file, or one per line of a .txt file."""
    if path.suffix not in (".txt", ".jsonl") or not path.is_file():
        raise RequestError([f"--prompts: {path} is not a .txt or .jsonl file"])
    rows = read_rows(path)
    if path.suffix == ".txt":
        return [Row(row.place, {"prompt": row.value["text"]}) for row in rows]
    return rows


def encode_rows(template: Template, room: float, rows: Sequence[Row]) -> list[list[int]]:
    """The tokens of every prompt. Raises RequestError naming each that cannot be answered."""
    prompts, problems = [], []
    for row in rows:
        try:
            prompts.append(template.prompt(_turns(row.value)))
            if len(prompts[-1]) > room:
                problems.append(
                    f"{row.place}: the prompt's {len(prompts[-1])} tokens and --max_new_tokens "
                    "exceed max_position_embeddings in config.json"
                )
        except BadRow as error:
            problems.append(f"{row.place}: {error}")
    if problems:
        raise RequestError(problems)
    return prompts


def _turns(row: Any) -> tuple[Turn, ...]:
    """The turns of a row that asks. Raises BadRow."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if isinstance(row, dict) and "prompt" in row:
        messages = [{"role": "user", "content": row["prompt"]}]
    if not isinstance(messages, list):
        raise BadRow("neither a prompt nor a list of messages")
    # With an answer it is a conversation, to be checked like those that are trained on.
    whole = {"messages": [*messages, {"role": "assistant", "content": ""}]}
    return to_turns(whole, "openai", {"messages": "messages"}, OPENAI_TAGS)[:-1]


def load(checkpoint: Checkpoint, adapter: Path | None) -> Llama:
    """The model, on the GPU in bf16 or on the CPU in fp32. Raises RequestError if too large."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    needed = checkpoint.shape.held_bytes(dtype.itemsize)
    free = torch.cuda.mem_get_info()[0] if on_gpu else free_memory(torch.device(device), 1)
    if needed > free:
        raise RequestError(
            [
                f"{checkpoint.folder}: needs {needed / 2**30:.1f} GiB on the {device} in {dtype}, "
                f"where {free / 2**30:.1f} GiB are free; take a larger machine or a smaller model"
            ]
        )
    lora = adapter and read_adapter_shape(adapter, checkpoint.shape, dropout=0.0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Llama(checkpoint.shape)
            if lora:
                inject(model, lora, seed=0, dtype=dtype)
    finally:
        torch.set_default_dtype(default)
    trained = dict(lora_parameters(model))
    base = ((name, p) for name, p in model.named_parameters() if name not in trained)
    if adapter:
        bits = trained_in_bits(adapter)
        if bits and not checkpoint.shape.packed:
            note = f"{adapter} was trained beside weights of {bits} bits"
            print(f"{note}; --quantization_bit {bits} answers with those", file=sys.stderr)
        held = read_adapter(adapter, {name: tuple(p.shape) for name, p in trained.items()})
        for name, parameter in trained.items():
            parameter.data.copy_(held[name])
    read_parts(checkpoint, (TensorPart(name, 0, p.data.view(-1)) for name, p in base))
    return model


def _option_problems(args: argparse.Namespace) -> list[str]:
    holds = {
        "--max_new_tokens must be at least 1": args.max_new_tokens >= 1,
        "--temperature must be at least 0": 0 <= args.temperature < math.inf,
        "--top_p must be above 0 and at most 1": 0 < args.top_p <= 1,
        "--top_k must be at least 0": args.top_k >= 0,
        "--top_p and --top_k need a --temperature above 0": args.temperature != 0
        or (args.top_p == 1 and args.top_k == 0),
        "--seed must be at least 0": args.seed >= 0,
        f"--quantization_bit: {args.quantization_bit} is not supported; 4 is, or leave it out": (
            args.quantization_bit in (None, 4)
        ),
        "--prompts and --output need each other": (args.prompts is None) == (args.output is None),
        f"--output: {args.output} exists already": args.output is None or not args.output.exists(),
    }
    return [problem for problem, held in holds.items() if not held]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m minilora.generate", allow_abbrev=False)
    asked = parser.add_mutually_exclusive_group(required=True)
    for option, kind, default, meaning in (
        ("model_name_or_path", Path, None, "folder of the base model"),
        ("adapter_name_or_path", Path, None, "folder of an adapter; default: the base model alone"),
        ("prompt", str, None, "answer this"),
        ("prompts", Path, None, "file: a prompt per line of .txt, or .jsonl (prompt or messages)"),
        ("output", Path, None, "new .jsonl file for the answers to --prompts"),
        ("system", str, None, "system message for prompts that have none"),
        ("template", str, None, "llama3; default: the one that came with the base model"),
        (
            "quantization_bit",
            int,
            None,
            "4: hold the linear layers in 4 bits, as they were trained",
        ),
        ("max_new_tokens", int, 512, "longest answer [512]"),
        ("temperature", float, 0.0, "0: always the likeliest token [0]"),
        ("top_p", float, 1.0, "draw from the likeliest tokens that together reach this [1]"),
        ("top_k", int, 0, "draw from this many of the likeliest tokens; 0: from all [0]"),
        ("seed", int, 42, "of the draws [42]"),
    ):
        group = asked if option.startswith("prompt") else parser
        required = option == "model_name_or_path"
        group.add_argument(
            f"--{option}", type=kind, default=default, required=required, help=meaning
        )
    asked.add_argument("--interactive", action="store_true", help="chat on the terminal")
    return parser


if __name__ == "__main__":
    sys.exit(main())
