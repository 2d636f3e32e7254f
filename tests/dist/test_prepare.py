"""`prepare`: a hub's model and data fetched once, proved without network, and then trained from without any."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import finish, read_json, write_config
from hub_server import Hub, served
from material import Material

pytestmark = pytest.mark.dist

MODEL, DATA = "someone/tiny-bert", "someone/topics"
DEAD = "http://127.0.0.1:9"


def command(
    place: Path, verb: str, *arguments: str, endpoint: str = DEAD, **env: str
) -> subprocess.CompletedProcess[str]:
    """The command in `place` with a cache of its own there, online at `endpoint` unless `env` says otherwise."""
    hub = {"HF_HOME": str(place / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    return finish([sys.executable, "-m", "dist_finetune", verb, *arguments], 240, place, **{**hub, **env})


def hub_config(material: Material, place: Path, **changes: Any) -> Path:
    config = material.text(model={"name": MODEL}, data={"train": DATA, "validation": 0.2}, **changes)
    return write_config(place / "c.yaml", config, name="c")


@pytest.fixture(scope="module")
def repositories(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub's contents: the tiny BERT and the topics, as repositories."""
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(material.bert, folder / MODEL)
    (folder / DATA).mkdir(parents=True)
    shutil.copy(material.train, folder / DATA / "train.csv")
    return folder


@pytest.fixture(scope="module")
def prepared(
    repositories: Path, material: Material, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Hub, str, list[str]]:
    """A place that was prepared from the hub, which is gone since; what was said, and which contents were asked for."""
    place = tmp_path_factory.mktemp("prepared")
    hub_config(material, place)
    with served(repositories) as hub:
        first = command(place, "prepare", "c.yaml", endpoint=hub.url)
        assert first.returncode == 0, first.stderr
        asked = list(hub.asked)
        again = command(place, "prepare", "c.yaml", endpoint=hub.url)
        assert again.returncode == 0, again.stderr
        assert hub.asked == asked, "what is there was fetched again"
    return place, hub, first.stdout, asked


def test_it_fetches_each_file_once_and_says_where_everything_lies(
    prepared: tuple[Path, Hub, str, list[str]], material: Material
) -> None:
    place, _, out, asked = prepared
    names = [path.rpartition("/")[2] for path in asked]
    assert {"config.json", "model.safetensors", "tokenizer.json", "train.csv"} <= set(names)
    assert len(names) == len(set(names))
    assert f"fetching {MODEL}, {DATA}" in out
    assert f"HF_HOME    {place / 'hf'}" in out
    assert "without network" in out
    assert "launch.slurm.offline" in out
    weights = (material.bert / "model.safetensors").stat().st_size
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if " " in line)
    assert int(lines["total"].split()[0].replace(",", "")) > weights
    assert lines["weights"].startswith("55 tensors in model.safetensors"), "5 of embeddings, 3 x 16, 2 of the pooler"
    assert "121 train, 30 validation rows, 3 classes" in lines["data"]


def test_a_run_without_network_trains_from_it(prepared: tuple[Path, Hub, str, list[str]]) -> None:
    place = prepared[0]
    done = command(place, "train", "c.yaml", "train.max_steps=2", "name=offline", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert read_json(place / "runs" / "offline" / "summary.json")["steps"] == 2
    assert (place / "runs" / "offline" / "report.html").is_file()


@pytest.mark.parametrize(
    ("damaged", "words"),
    [("weights gone", MODEL), ("weights cut", "truncated"), ("data gone", DATA)],
)
def test_what_is_missing_ends_with_2_and_its_name(
    prepared: tuple[Path, Hub, str, list[str]], tmp_path: Path, damaged: str, words: str
) -> None:
    shutil.copytree(prepared[0] / "hf", tmp_path / "hf", symlinks=True)
    shutil.copy(prepared[0] / "c.yaml", tmp_path)
    (snapshot,) = (tmp_path / "hf" / "hub" / f"models--{MODEL.replace('/', '--')}" / "snapshots").iterdir()
    if damaged == "weights gone":
        (snapshot / "model.safetensors").unlink()
    elif damaged == "weights cut":
        content = (snapshot / "model.safetensors").read_bytes()
        (snapshot / "model.safetensors").unlink()
        (snapshot / "model.safetensors").write_bytes(content[:-100])
    else:
        shutil.rmtree(tmp_path / "hf" / "datasets")
        shutil.rmtree(tmp_path / "hf" / "hub" / f"datasets--{DATA.replace('/', '--')}")
    done = command(tmp_path, "prepare", "c.yaml", "--check")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_without_hub_and_cache_it_says_so(material: Material, tmp_path: Path) -> None:
    hub_config(material, tmp_path)
    done = command(tmp_path, "prepare", "c.yaml")
    assert done.returncode == 2
    assert MODEL in done.stderr
    assert "can't be reached" in done.stderr
    assert len(done.stderr.splitlines()) < 8


@pytest.mark.slow
def test_a_config_of_local_things_is_proved_all_the_same(material: Material, tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", material.text(), name="c")
    done = command(tmp_path, "prepare", "c.yaml")
    assert done.returncode == 0, done.stderr
    assert "nothing is to be fetched" in done.stdout
    assert "without network" in done.stdout
    write_config(tmp_path / "c.yaml", material.image(), name="c")
    done = command(tmp_path, "prepare", "c.yaml", "--check")
    assert done.returncode == 0, done.stderr
    assert "44 train, 13 validation rows" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_the_check_really_has_no_network(material: Material, tmp_path: Path) -> None:
    """A model of the user's own that fetches as it is built, whatever variables say: the check finds it out."""
    (tmp_path / "own.py").write_text(
        "import urllib.request\nfrom torch import nn\n\n"
        "def build(num_classes):\n"
        "    urllib.request.urlopen(URL, timeout=5).read()\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))\n\n"
        "build.modality, build.image_size = 'image', 32\n"
    )
    changes = {"model": {"name": "own:build", "weights": "none"}, "data": {"image_size": 32}, "freeze": "none"}
    write_config(tmp_path / "c.yaml", material.image(**changes), name="c")
    with served(tmp_path) as hub:
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "b" / "file").write_text("x")
        source = (tmp_path / "own.py").read_text()
        (tmp_path / "own.py").write_text(source.replace("URL", repr(f"{hub.url}/a/b/resolve/main/file")))
        done = command(tmp_path, "prepare", "c.yaml", "--check", endpoint=hub.url)
        assert hub.asked == []
    assert done.returncode == 2, done.stdout
    assert "runs without network" in done.stderr
