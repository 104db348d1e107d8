"""Requests whose data, DeepSpeed file, output folder or settings are wrong, and the answers."""

from __future__ import annotations

import os

from tests.support.wrong import BIG, ROWS, Break, ask, both, deepspeed, folder_named, put, rows

SAY = [{"messages": [{"role": role, "content": "x"}]} for role in ("assistant", "bot")]
# Name -> how to break a sound request, and words of the answer; @ is the request's folder.
DEEPSPEED: dict[str, tuple[Break, list[str]]] = {
    "unknown file": (ask(deepspeed="ds_z3.json"), ["ds_z3.json: no such file; shipped with mini"]),
    "broken": (put("ds.json", "{\n", deepspeed="@/ds.json"), ["ds.json:2: not JSON"]),
    "misspelt": (deepspeed(zero_optimisation={"stage": 3}), ["did you mean zero_optimization?"]),
    "foreign": (deepspeed(tensor_parallel={"autotp_size": 2}), ["tensor_parallel", "remove it"]),
    "no section": (deepspeed(zero_optimization=[]), ["zero_optimization is []; an object"]),
    "no stage": (deepspeed(zero_optimization={"stage": "3"}), ['stage is "3"; say 0, 1, 2 or 3']),
    "a flag for a section": (deepspeed(bf16=True), ["bf16 is true; an object {...} is needed"]),
    "NVMe": (deepspeed(zero_optimization={"offload_param": {"device": "nvme"}}), ['say "cpu"']),
    "another batch": (deepspeed(train_batch_size=3), ["train_batch_size is 3", 'write "auto"']),
    "another precision": (deepspeed(fp16={"enabled": True}), ["remove the fp16 section"]),
    "another optimizer": (deepspeed(optimizer={"type": "Lion"}), ["optimizer.type is Lion"]),
    "another schedule": (deepspeed(scheduler={"type": "WarmupLR"}), ["scheduler: remove it"]),
}  # fmt: skip
DATA: dict[str, tuple[Break, list[str]]] = {
    "no file": (ask(dataset="@/no.jsonl"), ["no such file: @/no.jsonl"]),
    "no such name": (ask(dataset="alpaca_demo"), ["alpaca_demo is neither in @/dataset_info.json"]),
    "CSV": (put("x.csv", "a,b", dataset="@/x.csv"), ["convert it to .json, .jsonl or .txt"]),
    "endless name": (ask(dataset="x" * 5000 + ".json"), ["dataset xxx", "file name too long"]),
    "empty": (put("rows.jsonl", "\n \n"), ["rows.jsonl: has no rows"]),
    "empty list": (put("x.json", [], dataset="@/x.json"), ["x.json: has no rows"]),
    "not UTF-8": (put("rows.jsonl", b'{"a": 1}\n\xff\n'), ["rows.jsonl:2: not UTF-8; save"]),
    "UTF-16": (put("rows.jsonl", "{}".encode("utf-16")), ["rows.jsonl:1: not UTF-8"]),
    "broken line": (put("rows.jsonl", '{"instruction": "q", "output": "a"}\n{,'),
                    ["rows.jsonl:2: not JSON", "a file has one row per line, or one list of rows"]),
    "broken list": (put("x.json", "[\n{},\n,", dataset="@/x.json"), ["x.json:3: not JSON"]),
    "endless depth": (put("rows.jsonl", '{"messages": ' + "[" * 10**5), ["rows.jsonl:1: not JSON"]),
    "endless digits": (put("rows.jsonl", f'{{"output": {BIG}}}'), ["rows.jsonl:1: not JSON"]),
    "a folder": (both(folder_named("x.json"), ask(dataset="@/x.json")), ["no such file: @/x.json"]),
    "a pipe": (both(lambda request: os.mkfifo(request.folder / "x.json"), ask(dataset="@/x.json")),
               ["no such file: @/x.json"]),
    "unreadable": (both(lambda request: (request.folder / "x.json").symlink_to("/proc/self/mem"),
                        ask(dataset="@/x.json")), ["x.json: input/output error"]),
    "no columns": (rows({"q": "a", "r": "b"}), ["has the columns q, r; expected messages, or"]),
    "numbers for rows": (rows(1, 2), ["rows.jsonl: has the columns none"]),
    "numbers for text": (rows({"instruction": 1, "output": 2}), ["is not text (@/rows.jsonl:1)"]),
    "a list of rows inside": (rows({"data": ROWS}), ["has the columns data; expected messages"]),
    "tools in the rows": (rows({**ROWS[0], "tools": [{"name": "f"}]}), ["rows have tools, which"]),
    "roles out of order": (rows(SAY[0]), ["do not alternate (@/rows.jsonl:1)"]),
    "unknown role": (rows(SAY[1]), ["role 'bot' is none of user, assistant"]),
    "too many bad rows": (rows(*ROWS, *[{"instruction": "q"}] * 6), ["over 1 %", "no output (@/"]),
    "nothing left": (ask(cutoff_len=2), ["no answer left within cutoff_len 2"]),
    "text without answers": (put("x.txt", "hello", dataset="@/x.txt"), ["it is for stage: pt"]),
    "answers without text": (ask(stage="pt"), ["no column text among instruction, output"]),
    "no entry of a hub": (put("dataset_info.json", {"x": {"hf_hub_url": "a/b"}}, dataset="x"),
                          ["dataset x: needs a file_name; datasets of hubs are not downloaded"]),
    "broken entries": (put("dataset_info.json", "{", dataset="x"), ["dataset_info.json:1: not"]),
    "all held out": (ask(val_size=12, eval_strategy="epoch"),
                     ["val_size: 12 of 12 documents leave none to train on"]),
    "nothing to validate with": (ask(eval_dataset="@/no.json", eval_strategy="epoch"),
                                 ["no such file: @/no.json"]),
    "output is a file": (ask(output_dir="@/rows.jsonl"), ["rows.jsonl is a file; name another"]),
    "output below a file": (ask(output_dir="@/rows.jsonl/out"), ["output_dir", "is a file"]),
    "output of another run": (both(folder_named("out"), put("out/trainer_log.jsonl", "")),
                              ["holds a run", "or set overwrite_output_dir: true"]),
    "no snapshot": (ask(resume_from_checkpoint="@/no"), ["resume_from_checkpoint: @/no holds no"]),
    "misspelt key": (ask(learing_rate=1e-4), ["learing_rate (command line)", "did you mean learn"]),
    "another trainer's key": (ask(max_seq_length=9), ["max_seq_length", "set cutoff_len"]),
    "no number": (ask(learning_rate="nan"), ["learning_rate (command line): nan is out of range"]),
    "contradiction": (ask(mask_history=True, train_on_prompt=True), ["contradict each other"]),
}  # fmt: skip
