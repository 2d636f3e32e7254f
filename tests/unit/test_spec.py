"""Reading a config: what is accepted, and how every problem is worded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_finetune.cache.entries import cache_root
from dist_finetune.cli.planning import schema
from dist_finetune.data.sources import expand, hub_parts
from dist_finetune.durations import parse_bytes, parse_duration_s
from dist_finetune.errors import UserError
from dist_finetune.home import expand_home
from dist_finetune.models.saved import saved_folder
from dist_finetune.models.weights import weights_file
from dist_finetune.run_folder import flat, folder_of
from dist_finetune.spec import FreezeSpec, Spec
from dist_finetune.spec_file import TRAINER_NAMES, load_spec, resolved_yaml

SMALL: dict[str, Any] = {"name": "small", "model": {"name": "m"}, "data": {"train": "rows.csv"}}

WRONG = """\
model:
  nme: x
  dropout: 1.5
data:
  validation: 1.5
  text: [a, null]
freeze: backbon
train:
  micro_batch_size: aut
  eval_batch_size: -3
  lrr: 3
  head_lr: fast
  epochs: true
  lr: .nan
  warmup: 3.5
  precision: bf61
  global_batch_size: 3.5
  wandb: online
shard:
  strategy: zero4
  deepspeed: 3
track: 7
launch:
  timeout: 3 fortnights
"""

# A snapshot: each line is what a user reads, so a change of words is a change of this text.
WRONG_MESSAGE = """\
wrong.yaml: 24 problems
  override 'epochs' is no override; write key=value with a dotted key, such as train.lr=3e-5
  override 'track.project=x': the config sets track to 7, which has no keys; override track as a whole
  wrong.yaml:1: model.name is required. A transformers hub id or local folder, `timm:NAME`, `torchvision:NAME`, \
`demo:NAME` or `module:function`.
  wrong.yaml:3: model.dropout can't be 1.5. It takes a number below 1.0.
  wrong.yaml:2: unknown key model.nme. Did you mean name?
  wrong.yaml:4: data.train is required. Hub id, file(s) .csv .tsv .json .jsonl .parquet .arrow .conll, a folder of \
class folders, or `builtin:NAME`.
  wrong.yaml:5: data.validation: 1.5 is no fraction of the training data; it must lie between 0 and 1, such as 0.1
  wrong.yaml:6: data.text.1 can't be None. It takes a text.
  override: data.max_rows can't be -1. It takes a number above 0.
  wrong.yaml:7: freeze: 'backbon' is no ready word. Did you mean backbone or bias-only?
  wrong.yaml:13: train.epochs: true has no meaning here. It takes: Passes over the training data; a fraction ends \
inside an epoch.
  wrong.yaml:17: train.global_batch_size can't be 3.5. It takes a whole number.
  wrong.yaml:9: train.micro_batch_size can't be 'aut'. Did you mean auto? It takes auto or a whole number.
  wrong.yaml:10: train.eval_batch_size can't be -3. It takes auto or a number above 0.
  wrong.yaml:14: train.lr can't be nan. It takes a finite number.
  wrong.yaml:12: train.head_lr can't be 'fast'. It takes a number.
  wrong.yaml:15: train.warmup: 3.5 is neither a fraction below 1 nor a whole number of steps
  wrong.yaml:16: train.precision can't be 'bf61'. Did you mean bf16 or fp16? It takes auto or fp32 or bf16 or fp16.
  wrong.yaml:11: unknown key train.lrr. Did you mean lr?
  wrong.yaml:18: unknown key train.wandb. Did you mean track.wandb?
  wrong.yaml:20: shard.strategy can't be 'zero4'. Did you mean zero3 or zero2 or zero1? It takes auto or ddp or zero1 \
or zero2 or zero3 or fsdp.
  wrong.yaml:21: shard.deepspeed can't be 3. It takes a mapping of keys.
  wrong.yaml:22: track can't be 7. It takes a section of keys, such as wandb, project, entity, tensorboard.
  wrong.yaml:24: launch.timeout: '3 fortnights' is no duration; write a number and s, min, h or day, such as \
"30 min\""""


def message_of(config: Any, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        load_spec(config, overrides)
    return str(refused.value)


def write(folder: Path, text: str, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_all_problems_of_a_config_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, WRONG, "wrong.yaml")
    assert message_of("wrong.yaml", "epochs", "track.project=x", "data.max_rows=-1") == WRONG_MESSAGE


def test_an_empty_config_names_what_is_required() -> None:
    assert message_of({"name": "x"}) == (
        "config: 2 problems\n"
        "  config: model is required. Which model, and its weights, such as `model: {name: bert-base-uncased}`.\n"
        "  config: data is required. What to train and to evaluate on, such as `data: {train: rows.csv}`."
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "c.yaml:1:9: not valid YAML"),
        ("a: 1\na: 2\n", 'c.yaml:2:1: not valid YAML: found duplicate key "a"'),
        (
            "model:\n\tname: x\n",
            r"c.yaml:2:1: not valid YAML: found character '\t' that cannot start any token; indent",
        ),
        ("name: 2026-13-45\n", "c.yaml: a value can't be read: month must be in 1..12. Write it in quotes"),
        (f"name: {'9' * 5000}\n", "c.yaml: a value can't be read: Exceeds the limit"),
        (f"train: {'[' * 3000}{']' * 3000}\n", "c.yaml: lists or keys within each other, too deep"),
        ("- model\n", "a config is a mapping of keys"),
        ("", "a config is a mapping of keys"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, words: str) -> None:
    assert words in message_of(write(tmp_path, text))


def test_a_missing_file_offers_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "", "quickstart.yaml")
    path = tmp_path / "quickstrat.yaml"
    assert message_of(path) == f"{path}: no such config file. Did you mean quickstart.yaml?"


def test_a_binary_file_is_no_config(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert "can't be read as a text file" in message_of(path)


def test_a_wrong_value_is_told_in_words_and_not_at_full_length() -> None:
    assert "data.train can't be None. It takes a text, or a list of them." in message_of(
        {**SMALL, "data": {"train": None}}
    )
    assert "shard.strategy can't be 'ZeRO2'. Did you mean zero2" in message_of(
        {**SMALL, "shard": {"strategy": "ZeRO2"}}
    )
    told = message_of({**SMALL, "train": {"lr": "9" * 5000}})
    assert "train.lr can't be '9999" in told
    assert len(told) < 400


def test_names_of_other_tools_are_known(tmp_path: Path) -> None:
    told = message_of({**SMALL, "batch_size": 8, "train": {"learning_rate": 1e-3, "fp16": True}})
    assert "unknown key batch_size. Did you mean train.global_batch_size?" in told
    assert "unknown key train.learning_rate. Did you mean train.lr?" in told
    assert "unknown key train.fp16. Did you mean train.precision?" in told
    known = set(flat(load_spec(SMALL).model_dump(mode="json", by_alias=True)))
    assert set(TRAINER_NAMES.values()) <= known


def test_short_forms_and_their_long_forms_are_equal() -> None:
    short = load_spec({**SMALL, "freeze": "backbone"})
    assert short == load_spec({**SMALL, "freeze": {"rule": "backbone"}})
    assert load_spec({**SMALL, "freeze": None, "train": None}) == load_spec(SMALL)
    assert load_spec({**SMALL, "freeze": {"layers": [1, 2]}}).freeze.layers == "1,2"
    assert load_spec({**SMALL, "freeze": {"layers": 3}}).freeze.layers == "3"
    assert load_spec({**SMALL, "freeze": {"except": "*.bias"}}).freeze.except_ == ("*.bias",)


def test_an_unquoted_number_or_date_can_be_a_name(tmp_path: Path) -> None:
    text = "model: {name: 7}\ndata: {train: rows.csv, label: 0, text: [1, 2]}\nname: 2024-05-01\n"
    spec = load_spec(write(tmp_path, text))
    assert (spec.name, spec.model.name, spec.data.label, spec.data.text) == ("2024-05-01", "7", ("0",), ("1", "2"))
    assert type(spec.model.name) is str


@pytest.mark.parametrize(
    ("given", "read"), [(0.2, 0.2), ("val.csv", ("val.csv",)), (["a.csv", "b.csv"], ("a.csv", "b.csv"))]
)
def test_validation_is_a_fraction_or_sources(given: Any, read: Any) -> None:
    assert load_spec({**SMALL, "data": {"train": "a.csv", "validation": given}}).data.validation == read


@pytest.mark.parametrize("given", [0, 1, -0.5, None, [], [0.1], {"a": 1}, "10%", "0.1"])
def test_a_wrong_validation_is_one_problem(given: Any) -> None:
    assert message_of({**SMALL, "data": {"train": "a.csv", "validation": given}}).startswith("config: 1 problem\n")


@pytest.mark.parametrize("word", ["none", "backbone", "norms", "bias-only", "all-but-last 2"])
def test_ready_words(word: str) -> None:
    assert load_spec({**SMALL, "freeze": word}).freeze == FreezeSpec(rule=word)


def test_overrides_replace_add_and_reach_into_absent_sections(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {name: m}\ndata: {train: a.csv}\ntrain: {lr: 1.0}\n")
    spec = load_spec(path, ["train.lr=3e-5", "freeze.layers=0-8", "shard.strategy=zero2", "train.max_grad_norm=null"])
    assert (spec.train.lr, spec.freeze.layers, spec.shard.strategy) == (3e-5, "0-8", "zero2")
    assert spec.train.max_grad_norm is None
    assert spec.name == "c"
    assert load_spec(path, ["name=other"]).name == "other"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lr", "'lr' is no override"),
        ("=3", "'=3' is no override"),
        ("train..lr=3", "is no override"),
        ("train.lr=[", "the value is not valid YAML"),
        ("name=2026-13-45", "the value is not valid YAML"),
        ("train.lr=0", "override: train.lr can't be 0. It takes a number above 0."),
        ("lr=1", "override: unknown key lr. Did you mean train.lr?"),
        ("freez.layers=1", "override: unknown key freez. Did you mean freeze?"),
    ],
)
def test_wrong_overrides(override: str, words: str) -> None:
    assert words in message_of(SMALL, override)


def test_overrides_leave_the_callers_dict_alone() -> None:
    config = {**SMALL, "train": {"lr": 1.0}}
    assert load_spec(config, ["train.lr=2.0"]).train.lr == 2.0
    assert config["train"] == {"lr": 1.0}


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\nb", "x" * 101])
def test_a_name_is_one_folder(name: str) -> None:
    assert "name" in message_of({**SMALL, "name": name})


def test_a_name_leaves_room_in_the_bytes_of_a_folders_name() -> None:
    assert load_spec({**SMALL, "name": "語" * 66}).name == "語" * 66
    assert "takes more than 200 bytes" in message_of({**SMALL, "name": "語" * 67})


def test_true_is_no_learning_rate_of_a_pattern() -> None:
    message = message_of({**SMALL, "train": {"pattern_lr": {"*.bias": True}}})
    assert "train.pattern_lr.*.bias: true is no learning rate" in message


@pytest.mark.parametrize("warmup", [0, 0.1, 1, 250])
def test_warmup_is_a_fraction_or_whole_steps(warmup: float) -> None:
    assert load_spec({**SMALL, "train": {"warmup": warmup}}).train.warmup == warmup


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"until": "never"}, "phases.0.until can't be 'never'. It takes plateau"),
        ({"warmup": 1.5}, "phases.0.warmup: 1.5 is neither a fraction below 1 nor a whole number of steps"),
        ({"untill": "plateau"}, "unknown key phases.0.untill. Did you mean until?"),
        ({"epochs": 0}, "phases.0.epochs"),
    ],
)
def test_what_is_wrong_in_a_phase_is_told_of_that_phase(phase: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_spec({**SMALL, "phases": [{"name": "a", "freeze": "backbone", "epochs": 1, **phase}]})
    assert message in str(error.value)
    assert "lp-ft" not in str(error.value)
    assert "1 problem" in str(error.value)


def test_a_phase_that_lacks_a_key_says_which() -> None:
    with pytest.raises(UserError, match=r"phases\.0\.epochs is required"):
        load_spec({**SMALL, "phases": [{"name": "a", "freeze": "backbone"}]})
    with pytest.raises(UserError, match=r"phases can't be 'gradul'\. Did you mean gradual"):
        load_spec({**SMALL, "phases": "gradul"})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30 min", 1800),
        ("90s", 90),
        ("1.5 h", 5400),
        ("2 hours", 7200),
        (" 1 DAY ", 86400),
        (45, 45),
        (0.5, 0.5),
        ("7", 7),
    ],
)
def test_durations(text: Any, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "min", "-3 s", "3 fortnights", 0, -1, "0 s", None, True, "1 min 30 s"])
def test_no_durations(text: Any) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration_s(text)


@pytest.mark.parametrize("value", [10**400, "9" * 400, "9" * 400 + " h", 1e20])
def test_durations_beyond_what_timers_count(value: Any) -> None:
    with pytest.raises(ValueError, match=r"at most 3,153,600,000 s"):
        parse_duration_s(value)


def test_no_size_is_infinite() -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes("9" * 400 + "GiB")


def test_resolved_yaml_reads_back_equal(tmp_path: Path) -> None:
    spec = load_spec(
        {
            **SMALL,
            "freeze": {"layers": "0-3", "except": ["*.bias"], "patterns": ["*.1", "yes"]},
            "train": {"lr": 3e-5, "micro_batch_size": 4},
            "shard": {"deepspeed": {"zero_optimization": {"overlap_comm": True}}},
            "data": {"train": ["a.csv", "b: c.csv"], "validation": ["0.1"], "label": "null"},
        }
    )
    assert load_spec(write(tmp_path, resolved_yaml(spec))) == spec


@pytest.mark.parametrize("text", ["a{}b", "{}", "a {} b", "b{}", "# {}", "x" * 90 + " y{}z"])
@pytest.mark.parametrize("char", ["\x85", "\u2028", "\u2029", "\ufeff", "\xa0", "\r", "\x0b", "\x7f", "\x9f", "😀"])
def test_odd_characters_read_back_equal(char: str, text: str, tmp_path: Path) -> None:
    text = text.format(char)
    spec = load_spec({**SMALL, "data": {"train": [text], "label": text}, "train": {"pattern_lr": {f"{char}.*": 1.0}}})
    path = tmp_path / "c.yaml"
    path.write_text(resolved_yaml(spec), encoding="utf-8")
    assert load_spec(path) == spec


@pytest.mark.parametrize("every", ["200 steps", "1000000 steps", "0.3333333 epochs", "0.00001 epochs", "12 days"])
def test_every_interval_reads_back_equal(every: str, tmp_path: Path) -> None:
    spec = load_spec({**SMALL, "checkpoint": {"every": every}})
    assert load_spec(write(tmp_path, resolved_yaml(spec))) == spec


def test_the_schema_takes_what_the_loader_takes() -> None:
    definitions = Spec.model_json_schema()["$defs"]
    layers = {option.get("type") for option in definitions["FreezeSpec"]["properties"]["layers"]["anyOf"]}
    assert layers == {"integer", "string", "array", "null"}
    assert {"type": "string"} in definitions["DataSpec"]["properties"]["train"]["anyOf"]
    assert {"type": "string"} in Spec.model_json_schema()["properties"]["freeze"]["anyOf"]
    assert "except" in definitions["FreezeSpec"]["properties"]
    slurm = definitions["SlurmSpec"]["properties"]
    every = definitions["CheckpointSpec"]["properties"]["every"]
    for takes_a_text in (every, slurm["grace"], slurm["modules"], slurm["container_mounts"], slurm["extra"]):
        assert {"type": "string"} in takes_a_text["anyOf"]


def test_a_home_in_yaml_is_that_of_who_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/her")
    spec = load_spec({**SMALL, "output": "~/runs"})
    assert folder_of(spec) == Path("/home/her/runs/small")
    assert cache_root(spec) == Path("/home/her/runs/.cache")
    assert cache_root(load_spec({**SMALL, "cache": {"folder": "~/fast"}})) == Path("/home/her/fast")
    assert "output: ~/runs" in resolved_yaml(spec)  # on another machine it is another


@pytest.mark.parametrize("read", [expand_home, weights_file, saved_folder, hub_parts, lambda name: expand(name, "k")])
def test_a_home_that_nobody_has_is_told(read: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match=r"~nouser/x\*: no home folder is known here for ~nouser; write the path"):
        read("~nouser/x*")


def test_the_document_of_the_config_has_every_key_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    schema(as_text=True)
    tables = capsys.readouterr().out
    document = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
    assert document.endswith(tables), "write what `dist-finetune schema --text` prints to the end of docs/config.md"
    rows = {row.split("`")[1]: row for row in tables.splitlines() if row.startswith("| `")}
    assert "| `linear`, `cosine`, `constant` | `linear` |" in rows["train.schedule"]
    assert "| needed |" in rows["model.name"]
    assert rows.keys() >= {"name", "freeze.layers", "phases[].until", "launch.slurm.time", "launch.cloud.spot"}
    assert [key for key, row in rows.items() if row.endswith("|  |")] == [], "keys without a meaning"
