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

from minilora.data.chat import make_template
from minilora.data.prompts import encode_prompts, read_prompts
from minilora.data.sources import Row
from minilora.data.tokenizer import load_tokenizer
from minilora.files.adapter import read_adapter, trained_in_bits
from minilora.files.adapter_config import read_adapter_shape
from minilora.files.model_config import read_model_config
from minilora.files.tensor_parts import TensorPart
from minilora.files.weights import Checkpoint, check_tied_head, read_checkpoint, read_parts
from minilora.memory.measured import free_memory
from minilora.model.build import NewAdapter, build_model
from minilora.model.decode import Sampling, generate
from minilora.model.llama import Llama
from minilora.model.lora import lora_parameters
from minilora.settings.errors import RequestError, RunError, exit_code
from minilora.settings.terminal import progress_bar

BATCH = 16  # prompts of a file that are answered side by side

# What decoders write for bytes that are not yet, or never, a character.
REPLACEMENT = "\ufffd"

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
    check_tied_head(checkpoint)
    tokenizer = load_tokenizer(args.model_name_or_path)
    template = make_template(args.template, tokenizer, args.system)
    shape = checkpoint.shape
    longest = min(shape.max_positions or math.inf, shape.window or math.inf)
    room = longest - args.max_new_tokens
    encode: Encode = partial(encode_prompts, template, room)
    decode: Decode = partial(tokenizer.decode, skip_special_tokens=True)

    # A prompt that cannot be answered is refused before the weights are read, which takes long.
    if args.prompts:
        rows = read_prompts(args.prompts)
    else:
        rows = [Row("--prompt", {"prompt": args.prompt})]
    prompts = [] if args.interactive else encode(rows)

    answer: Answer = partial(
        generate,
        load(checkpoint, args.adapter_name_or_path),
        max_new_tokens=args.max_new_tokens,
        stop_ids=template.stop_ids,
        sampling=Sampling(args.temperature, args.top_k, args.top_p, args.seed),
    )
    if args.interactive:
        chat(answer, encode, decode)
    elif args.prompts:
        rows_with_answers = answer_rows(rows, prompts, answer, decode)
        with args.output.open("x", encoding="utf-8") as output:
            for row in rows_with_answers:
                output.write(json.dumps(row, ensure_ascii=False) + "\n")
                output.flush()
    else:
        show(answer(prompts), decode)


def answer_rows(
    rows: Sequence[Row], prompts: Sequence[Sequence[int]], answer: Answer, decode: Decode
) -> Iterator[dict[str, Any]]:
    """Each row with its answer, in order; `prompts` are the tokens of the rows.

    Progress is shown on stderr.
    """
    with progress_bar(len(rows), "prompt") as bar:
        for first in range(0, len(rows), BATCH):
            batch = rows[first : first + BATCH]
            answers: list[list[int]] = [[] for _ in batch]
            for index, token in answer(prompts[first : first + BATCH], first=first):
                answers[index].append(token)

            for row, tokens in zip(batch, answers, strict=True):
                yield {**row.value, "predict": decode(tokens)}  # LLaMA-Factory's name
            bar.update(len(batch))


def show(tokens: Iterable[tuple[int, int]], decode: Decode) -> str:
    """Print an answer while it grows, and return all of it."""
    pieces = []
    for piece in stream((token for _, token in tokens), decode):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def stream(tokens: Iterable[int], decode: Decode) -> Iterator[str]:
    """Text piece by piece; a character waits until the tokens of all its bytes have come."""
    so_far: list[int] = []
    text = ""
    shown = 0
    for token in tokens:
        so_far.append(token)
        # All tokens again, because the text of a token may depend on the one before it.
        text = decode(so_far)
        complete = len(text.rstrip(REPLACEMENT))
        yield text[shown:complete]
        shown = complete
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


def load(checkpoint: Checkpoint, adapter: Path | None) -> Llama:
    """The model, on the GPU in bf16 or on the CPU in fp32. Raises RequestError if too large."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    _check_that_it_fits(checkpoint, device, dtype)

    new_adapter = None
    if adapter:
        lora = read_adapter_shape(adapter, checkpoint.shape, dropout=0.0)
        new_adapter = NewAdapter(lora, seed=0, dtype=dtype)
    model = build_model(checkpoint.shape, new_adapter, dtype=dtype, place=device)

    trained = dict(lora_parameters(model))
    if adapter:
        bits = trained_in_bits(adapter)
        if bits and not checkpoint.shape.packed:
            note = f"{adapter} was trained beside weights of {bits} bits"
            print(f"{note}; --quantization_bit {bits} answers with those", file=sys.stderr)
        held = read_adapter(adapter, {name: tuple(p.shape) for name, p in trained.items()})
        for name, parameter in trained.items():
            parameter.data.copy_(held[name])
    frozen = (item for item in model.named_parameters() if item[0] not in trained)
    read_parts(checkpoint, (TensorPart(name, 0, p.data.view(-1)) for name, p in frozen))
    return model


def _check_that_it_fits(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Raise RequestError if the device has no room for the weights in this dtype."""
    needed = checkpoint.shape.held_bytes(dtype.itemsize)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = free_memory(device, processes=1)
    if needed > free:
        problem = (
            f"{checkpoint.folder}: needs {needed / 2**30:.1f} GiB on the {device} in {dtype}, "
            f"where {free / 2**30:.1f} GiB are free; take a larger machine or a smaller model"
        )
        raise RequestError([problem])


def _option_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the options, before any file is read."""
    problems = []
    if args.max_new_tokens < 1:
        problems.append("--max_new_tokens must be at least 1")
    if not 0 <= args.temperature < math.inf:  # nan is refused too
        problems.append("--temperature must be at least 0")
    if not 0 < args.top_p <= 1:
        problems.append("--top_p must be above 0 and at most 1")
    if args.top_k < 0:
        problems.append("--top_k must be at least 0")
    if args.temperature == 0 and (args.top_p != 1 or args.top_k != 0):
        problems.append("--top_p and --top_k need a --temperature above 0")
    if args.seed < 0:
        problems.append("--seed must be at least 0")
    if args.quantization_bit not in (None, 4):
        bits = args.quantization_bit
        problems.append(f"--quantization_bit: {bits} is not supported; 4 is, or leave it out")
    if (args.prompts is None) != (args.output is None):
        problems.append("--prompts and --output need each other")
    if args.output is not None and args.output.exists():
        problems.append(f"--output: {args.output} exists already")
    return problems


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m minilora.generate", allow_abbrev=False)
    add = parser.add_argument
    ask = parser.add_mutually_exclusive_group(required=True).add_argument

    add("--model_name_or_path", type=Path, required=True, help="folder of the base model")
    add("--adapter_name_or_path", type=Path, help="folder of an adapter; default: none")
    ask("--prompt", help="answer this")
    ask(
        "--prompts",
        type=Path,
        help="file: .txt with a prompt per line, or .jsonl with prompt or messages",
    )
    ask("--interactive", action="store_true", help="chat on the terminal")
    add("--output", type=Path, help="new .jsonl file for the answers to --prompts")
    add("--system", help="system message for prompts that have none")
    add("--template", help="llama3; default: the one that came with the base model")
    add(
        "--quantization_bit",
        type=int,
        help="4: hold the linear layers in 4 bits, as they were trained; default: as in the files",
    )
    add("--max_new_tokens", type=int, default=512, help="tokens of the longest answer [512]")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token [0]")
    add(
        "--top_p",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens that together reach this probability [1]",
    )
    add(
        "--top_k",
        type=int,
        default=0,
        help="draw from this many of the likeliest tokens; 0: from all [0]",
    )
    add("--seed", type=int, default=42, help="seed of the draws [42]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
