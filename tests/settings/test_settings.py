"""Settings: every wrong request is answered with its key, its place and the way out."""

import dataclasses
import json
from pathlib import Path

import pytest

from minilora.settings.command_line import help_text, read_settings
from minilora.settings.errors import RequestError
from minilora.settings.fields import kind_of
from minilora.settings.foreign_keys import IGNORED, REFUSED
from minilora.settings.settings import (
    DataSettings,
    MethodSettings,
    ModelSettings,
    Settings,
    TrainSettings,
    all_settings,
)

NEEDED = "model_name_or_path: base\ndataset: rows.json\noutput_dir: out\n"


def read(tmp_path: Path, text: str, *argv: str, name: str = "run.yaml") -> Settings:
    """The settings of a file with this text, and of these arguments after it."""
    (tmp_path / name).write_text(text)
    return read_settings([str(tmp_path / name), *argv], "train")


def problems_of(tmp_path: Path, text: str, *argv: str, name: str = "run.yaml") -> tuple[str, ...]:
    with pytest.raises(RequestError) as caught:
        read(tmp_path, text, *argv, name=name)
    return caught.value.problems


# One line of YAML -> what the message must say besides the key and its line.
WRONG_VALUES = {
    "lora_rank: 0": "0 must be at least 1",
    "lora_rank: -8": "-8 must be at least 1",
    "lora_rank: 2.5": "'2.5' is not a whole number",
    "lora_rank: eight": "'eight' is not a whole number",
    "lora_rank: true": "'true' is not a whole number",
    "lora_rank: [8, 16]": "['8', '16'] is not a whole number",
    "lora_rank: {q_proj: 8}": "{'q_proj': '8'} is not a whole number",
    "lora_rank: 1e30": "is out of range",
    "lora_rank: inf": "'inf' is not a whole number",
    'lora_rank: ""': "'' is not a whole number",
    "lora_alpha: 0": "0 must be at least 1",
    "lora_dropout: 1.0": "1.0 must be below 1",
    "lora_dropout: -0.1": "-0.1 must be at least 0",
    "lora_dropout: nan": "nan is out of range",
    "lora_target: []": "[] is not a list of names",
    'lora_target: ""': "'' is not a list of names",
    "lora_target: {a: b}": "{'a': 'b'} is not a list of names",
    "lora_target: [q_proj, [v_proj]]": "is not a list of names",
    "rank_pattern: [q_proj, 4]": "['q_proj', '4'] is not names with whole numbers",
    "rank_pattern: q_proj": "'q_proj' is not names with whole numbers",
    "rank_pattern: {q_proj: x}": "{'q_proj': 'x'} is not names with whole numbers",
    "alpha_pattern: {q_proj: 0}": "{'q_proj': 0} is not names with whole numbers",
    "alpha_pattern: {q_proj: {a: 1}}": "is not names with whole numbers",
    "use_dora: 2": "'2' is not true or false",
    "loraplus_lr_ratio: 0": "0.0 must be above 0",
    "lora_target: all,q_proj": "give all alone, or only names",
    "dataset: ','": "',' is not a list of names",
    "stage: dpo": "'dpo' is not one of sft, pt",
    "stage: rm": "'rm' is not one of sft, pt",
    "flash_attn: fast": "'fast' is not one of auto, disabled, sdpa, fa2",
    "cutoff_len: 1": "1 must be at least 2",
    "cutoff_len: 2k": "'2k' is not a whole number",
    "max_samples: 0": "0 must be at least 1",
    "packing: maybe": "'maybe' is not true or false",
    "packing: 2": "'2' is not true or false",
    'template: ""': "'' is no usable text; leave the key out for its default",
    "template: [llama3]": "['llama3'] is not text",
    "per_device_train_batch_size: 0": "0 must be at least 1",
    "per_device_train_batch_size: auto": "'auto' is not a whole number",
    "gradient_accumulation_steps: 0": "0 must be at least 1",
    "learning_rate: 0": "0.0 must be above 0",
    "learning_rate: -1e-4": "-0.0001 must be above 0",
    "learning_rate: 5e-5x": "'5e-5x' is not a number",
    "learning_rate: .inf": "'.inf' is not a number",
    "learning_rate: 1e999": "inf is out of range",
    "num_train_epochs: 0": "0.0 must be above 0",
    "max_steps: -2": "-2 must be at least -1",
    "lr_scheduler_type: cosin": "'cosin' is not one of linear, cosine,",
    "lr_scheduler_type: reduce_lr_on_plateau": "is not one of linear",
    "warmup_ratio: 1.5": "1.5 must be at most 1",
    "warmup_steps: 0.1": "'0.1' is not a whole number",
    "weight_decay: -1": "-1.0 must be at least 0",
    "max_grad_norm: -1": "-1.0 must be at least 0",
    "adam_beta1: 1": "1.0 must be below 1",
    "adam_beta2: 1.5": "1.5 must be below 1",
    "adam_epsilon: 0": "0.0 must be above 0",
    "optim: paged_adamw_8bit": "is not one of adamw_torch, adamw_torch_fused",
    "bf16: float16": "'float16' is not true or false",
    "seed: -1": "-1 must be at least 0",
    "seed: 4294967296": "must be at most 4294967295",
    "logging_steps: 0": "0 must be at least 1",
    "logging_steps: 0.05": "'0.05' is not a whole number",
    "save_strategy: best": "'best' is not one of steps, epoch, no",
    "save_steps: 0": "0 must be at least 1",
    "save_total_limit: 0": "0 must be at least 1",
    "deepspeed: {zero_optimization: {stage: 3}}": "is not text",
    "ddp_timeout: 0": "0 must be at least 1",
    "tile_tokens: 0": "0 must be at least 1",
    "gather_tokens: 100": "100 is less than tile_tokens 2048; raise it or lower tile_tokens",
    # No settings here.
    "quantization_bit: 4": "'4' is not supported: remove it; the frozen weights stay bf16",
    "finetuning_type: full": "'full' is not supported: set it to lora",
    "finetuning_type: freeze": "'freeze' is not supported: set it to lora",
    "do_train: false": "'false' is not supported: set it to true",
    "do_predict: true": "use minilora.generate after the training",
    "fp16: true": "'true' is not supported: use bf16: true",
    "pure_bf16: true": "use bf16: true",
    "pissa_init: true": "LoRA starts as PEFT starts it",
    "use_galore: true": "use optim: adamw_torch",
    "use_unsloth: true": "use_unsloth works on one GPU only",
    "streaming: true": "remove it",
    "rope_scaling: yarn": "set it in the config.json of the base model",
    "report_to: mlflow": "'mlflow' is not one of none, tensorboard, wandb, comet_ml",
    "report_to: [wandb, all]": "'all' is not one of none, tensorboard, wandb, comet_ml",
    "mix_strategy: interleave_over": "bring the datasets to the sizes you want",
    "neftune_noise_alpha: 5": "'5' is not supported: remove it",
    "label_smoothing_factor: 0.1": "the loss is plain cross-entropy",
    "max_seq_length: 512": "set cutoff_len",
    "lr_scheduler_kwargs: {num_cycles: 2}": "each schedule has its standard shape",
    # Typing errors.
    "lora_rnak: 8": "is not a known key: did you mean lora_rank?",
    "lora-rank: 8": "is not a known key: did you mean lora_rank?",
    "Lora_rank: 8": "is not a known key: did you mean lora_rank?",
    "learning_rte: 1": "is not a known key: did you mean learning_rate?",
    "eval_stratgy: steps": "is not a known key: did you mean eval_strategy?",
    "quantisation_bit: 4": "is not a known key: did you mean quantization_bit?",
    "zzz: 1": "is not a known key: --help lists every key",
    "<<: {lora_rank: 8}": "is not a known key",
    "8: lora_rank": "is not a known key",
}


@pytest.mark.parametrize("line", WRONG_VALUES)
def test_wrong_value_in_the_file(tmp_path: Path, line: str) -> None:
    key = line.split(":")[0]
    needed = [other for other in NEEDED.splitlines() if not other.startswith(f"{key}:")]
    (problem,) = problems_of(tmp_path, "\n".join([*needed, line]))
    assert problem.startswith(f"{key} ({tmp_path / 'run.yaml'}:{len(needed) + 1})")
    assert WRONG_VALUES[line] in problem


@pytest.mark.parametrize(
    "line", [line for line in WRONG_VALUES if line[-1] not in "}]'\"" and "-rank" not in line]
)
def test_wrong_value_on_the_command_line(tmp_path: Path, line: str) -> None:
    key, _, value = line.partition(": ")
    (problem,) = problems_of(tmp_path, NEEDED, f"--{key}={value}")
    assert problem.startswith(f"{key} (command line)")
    assert WRONG_VALUES[line] in problem


def test_a_dash_is_an_underscore_on_the_command_line(tmp_path: Path) -> None:
    assert read(tmp_path, NEEDED, "--lora-rank", "4").method.lora_rank == 4


@pytest.mark.parametrize("key", REFUSED)
def test_refused_keys_have_harmless_values(tmp_path: Path, key: str) -> None:
    for harmless in ("null", *REFUSED[key][0].split()):
        assert read(tmp_path, f"{NEEDED}{key}: {harmless}\n").notices == ()
    (problem,) = problems_of(tmp_path, f"{NEEDED}{key}: 7\n")
    assert problem.endswith(REFUSED[key][1])


def test_no_key_has_two_fates() -> None:
    settings = {item.name for _, item in all_settings()}
    groups = [settings, set(REFUSED), set(IGNORED)]
    assert len(set().union(*groups)) == sum(len(group) for group in groups)


def test_ignored_keys_share_one_line(tmp_path: Path) -> None:
    text = NEEDED + "trust_remote_code: true\nvllm_maxlen: 4096\nper_device_eval_batch_size: 1\n"
    (notice,) = read(tmp_path, text).notices
    keys = "per_device_eval_batch_size, trust_remote_code, vllm_maxlen"
    assert notice == f"ignored, they mean nothing here: {keys}"


def test_everything_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    found = problems_of(
        tmp_path,
        "lora_rank: 0\nlora_rnak: 8\nfull_determinism: true\nlora_rank: 0\n"
        "quantization_bit: 4\nbf16: x\n",
        *("--learning_rate", "0", "stray", "--seed"),
    )
    expected = [
        "'stray' (command line) is not understood",
        "--seed (command line): a value is missing: --seed VALUE",
        f"lora_rank ({path}:4) stands already at {path}:1",
        f"lora_rnak ({path}:2) is not a known key",
        f"full_determinism ({path}:3): 'true' is not supported",
        f"quantization_bit ({path}:5): '4' is not supported",
        f"bf16 ({path}:6): 'x' is not true or false",
        f"lora_rank ({path}:4): 0 must be at least 1",
        "learning_rate (command line): 0.0 must be above 0",
        "model_name_or_path is missing: give it in the file or as --model_name_or_path VALUE",
        "dataset is missing: give it in the file or as --dataset VALUE",
        "output_dir is missing: give it in the file or as --output_dir VALUE",
    ]
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start)


def test_contradictions(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, NEEDED + "mask_history: true\n", "--train_on_prompt")
    assert problem == (
        f"mask_history ({tmp_path / 'run.yaml'}:4) and train_on_prompt (command line) "
        "contradict each other: set one of them to false"
    )


def test_plan_needs_only_the_model(tmp_path: Path) -> None:
    assert read_settings(["--model_name_or_path", "base"], "plan").model.model_name_or_path
    with pytest.raises(RequestError, match="^model_name_or_path is missing"):
        read_settings([], "plan")


def test_defaults_are_those_of_the_ecosystem() -> None:
    """HF TrainingArguments' and LLaMA-Factory's, but for the two that the help text calls ours."""
    transformers = pytest.importorskip("transformers")
    theirs = {
        item.name: item.default for item in dataclasses.fields(transformers.TrainingArguments)
    }
    # transformers 5 renamed or moved these; LLaMA-Factory's defaults are the older ones.
    ours = {"logging_steps", "output_dir", "bf16", "optim", "warmup_steps", "lr_scheduler_type"}
    shared = [item for item in dataclasses.fields(TrainSettings) if item.name in theirs]
    assert len(shared) > 15
    for item in shared:
        if item.name not in ours:
            value = theirs[item.name]
            default = ",".join(item.default) if isinstance(item.default, tuple) else item.default
            assert getattr(value, "value", value) == default, item.name
    assert MethodSettings(lora_rank=16).alpha == 32
    assert Settings().packs is False
    assert Settings(method=MethodSettings(stage="pt")).packs is True


def test_notices_for_what_is_taken_otherwise(tmp_path: Path) -> None:
    text = NEEDED + "neat_packing: true\nlr_scheduler_type: constant\nwarmup_ratio: 0.1\n"
    assert read(tmp_path, text).notices == (
        "neat_packing means packing: packed documents never see each other here",
        "lr_scheduler_type constant has no warm-up; see constant_with_warmup",
    )


def test_settings_made_in_python_are_checked_too() -> None:
    with pytest.raises(RequestError) as caught:
        Settings(
            ModelSettings(flash_attn="x"),
            MethodSettings(lora_rank=True, lora_dropout=float("nan")),
            DataSettings(dataset=("",), template="a\0b"),
            TrainSettings(learning_rate=10**400, max_steps=10**13),
        )
    starts = ["flash_attn", "lora_rank", "lora_dropout", "dataset", "template", "learning_rate"]
    assert [problem.split(":")[0] for problem in caught.value.problems] == [*starts, "max_steps"]
    assert Settings(train=TrainSettings(learning_rate=1)).train.learning_rate == 1


def test_to_dict_has_every_key_once() -> None:
    assert list(Settings().to_dict()) == [item.name for _, item in all_settings()]
    assert json.loads(json.dumps(Settings().to_dict()))["lora_target"] == ["all"]


def test_help_has_every_key_with_a_line() -> None:
    text = help_text("train").splitlines()
    for _, item in all_settings():
        (line,) = [line for line in text if line.startswith(f"  --{item.name} ")]
        assert item.metadata["help"] in line
        for choice in item.metadata["choices"]:
            assert choice in line
        assert kind_of(item)[0] in (bool, int, float, str, tuple, dict)
    assert any(line.startswith("  --learning_rate ") and line.endswith("[5e-05]") for line in text)
