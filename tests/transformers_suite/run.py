"""Runs transformers' common model tests on stock Llama and on LlamaRepro; lists what only Llama passes.

    python -m tests.transformers_suite.run [--tests CHECKOUT/tests] [-k EXPRESSION] [--slow]

`--tests` is the tests/ folder of a transformers checkout of the installed version. Without it the tests that the sdist
on PyPI holds are brought into .cache/: those of modeling, training, tensor parallelism and FSDP; those of generation,
export, pipelines and classification heads are in a checkout only. Needs the package `parameterized`; takes some six
minutes on two cores. The exit status is 1 if the list is not empty.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache"
MODELS = ("llama", "llama_repro")

# Files that the sdist lacks -> what the mixins import from them; the empty mixins hold no test.
STAND_INS = {
    "distributed_testing_utils.py": (HERE / "distributed_testing_utils.py").read_text(),
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {'output_hidden_states': True, 'dtype': 'float16'}\n",
}
# Files whose absence leaves tests out -> which tests.
PARTS = {
    "generation/test_utils.py": "generation",
    "exporters/test_export.py": "export",
    "pipelines/__init__.py": "pipelines",
    "causal_lm_tester.py": "classification heads",
}


def tests_of_sdist(package: str) -> Path:
    """The tests/ folder out of the sdist of the installed version, fetched once."""
    name = f"{package}-{version(package)}"
    target = CACHE / name / "tests"
    if not target.is_dir():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", package]
            subprocess.run([*command, "--dest", scratch, name.replace("-", "==")], check=True)
            with tarfile.open(Path(scratch, f"{name}.tar.gz")) as archive:
                members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
                archive.extractall(scratch, members=members, filter="data")
            target.parent.mkdir(exist_ok=True)
            Path(scratch, name, "tests").rename(target)
    return target


def lay_out(source: Path, tree: Path):
    """A checkout in small: TREE/tests with links to SOURCE and stand-ins for what it lacks, and the installed src/."""
    shutil.rmtree(tree, ignore_errors=True)
    tests = tree / "tests"
    tests.mkdir(parents=True)
    for entry in source.iterdir():
        (tests / entry.name).symlink_to(entry)
    for name, text in STAND_INS.items():
        if not (tests / name).exists():
            (tests / name).parent.mkdir(exist_ok=True)
            (tests / name).write_text(text)
    if not (tests / "__init__.py").exists():
        (tests / "__init__.py").touch()
    (tree / "src").mkdir()
    (tree / "src" / "transformers").symlink_to(Path(find_spec("transformers").origin).parent)


def environment(tree: Path, *, slow: bool) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # The first folder makes the package `tests` theirs, the last one brings hf_llama_repro.
        "PYTHONPATH": os.pathsep.join(map(str, (tree, HERE, ROOT))),
        "RUN_SLOW": str(int(slow)),
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_TEST_DEVICE": "cpu",
        "TRANSFORMERS_TINY_MODEL_PATH": str(tree / "tiny"),
    }


def run_both(tree: Path, expression: str, *, slow: bool) -> list[dict[str, dict]]:
    """The records of `recorder.py` for stock Llama and for LlamaRepro."""
    env = environment(tree, slow=slow)
    subprocess.run([sys.executable, str(HERE / "tiny_models.py"), str(tree / "tiny")], env=env, cwd=tree, check=True)
    options = f"-q -W ignore -p recorder -p no:cacheprovider --noconftest -c {os.devnull} --rootdir {tree}"
    pytest = [sys.executable, "-m", "pytest", *options.split(), "-k", expression, str(HERE / "model_suite.py")]
    return run_models(pytest, env, tree)


def run_models(pytest: list[str], env: dict[str, str], tree: Path, *, folders: bool = False) -> list[dict[str, dict]]:
    """Runs a pytest for each of the two models side by side, in TREE or in a folder of its own; their records."""
    processes = []
    for model in MODELS:
        settings = {"SUITE_MODEL": model, "SUITE_RECORD": str(tree / f"{model}.json")}
        folder = tree / model if folders else tree
        folder.mkdir(exist_ok=True)
        with (tree / f"{model}.log").open("w") as log:
            processes.append(subprocess.Popen(pytest, env={**env, **settings}, cwd=folder, stdout=log, stderr=log))
    records = []
    for model, process in zip(MODELS, processes, strict=True):
        if process.wait() > 1:  # 1: some tests failed
            sys.exit(f"pytest broke off for {model}: see {tree / model}.log")
        records.append(json.loads((tree / f"{model}.json").read_text()))
    return records


def lost(upstream: dict[str, dict], ours: dict[str, dict]) -> list[str]:
    """The tests of which stock Llama passes more (the test, or some of its subtests) than LlamaRepro."""
    return [name for name, record in upstream.items() if record["passed"] > ours.get(name, {"passed": 0})["passed"]]


def table(upstream: dict[str, dict], ours: dict[str, dict], lost_names: list[str]) -> str:
    header = ("mixin", "upstream passed", "ours passed", "upstream skipped", "ours skipped", "lost")
    counts = Counter()
    for column, records in ((header[1::2], upstream), (header[2::2], ours)):
        for record in records.values():
            if record["outcome"] in ("passed", "skipped"):
                counts[record["mixin"], column[record["outcome"] == "skipped"]] += 1
    for name in lost_names:
        counts[upstream[name]["mixin"], "lost"] += 1
    mixins = sorted({record["mixin"] for record in upstream.values()})
    rows = [header, *((mixin, *(counts[mixin, column] for column in header[1:])) for mixin in mixins)]
    totals = (sum(counts[mixin, column] for mixin in mixins) for column in header[1:])
    return "\n".join(
        f"{name:28}" + "".join(f"{value:>18}" for value in values) for name, *values in [*rows, ("all", *totals)]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, help="tests/ folder of a transformers checkout (default: the sdist's)")
    parser.add_argument("-k", dest="expression", default="", help="only tests whose name matches, as pytest has it")
    parser.add_argument("--slow", action="store_true", help="also the tests that transformers marks as slow")
    args = parser.parse_args(argv)
    if not find_spec("parameterized"):
        parser.error("transformers' tests need the package parameterized: pip install parameterized")
    if args.tests and not (args.tests / "test_modeling_common.py").is_file():
        parser.error(f"{args.tests} holds no test_modeling_common.py: give the tests/ folder of a checkout")

    source = (args.tests or tests_of_sdist("transformers")).resolve()
    for name, part in PARTS.items():
        if not (source / name).is_file():
            print(f"not run: the tests of {part}, for {source} holds no {name}")
    tree = CACHE / "transformers_suite"
    lay_out(source, tree)
    upstream, ours = run_both(tree, args.expression, slow=args.slow)
    lost_names = lost(upstream, ours)
    print(table(upstream, ours, lost_names))
    print(f"passed upstream, not here: {len(lost_names)}")
    for name in lost_names:
        record = ours.get(name, {"outcome": "absent", "message": ""})
        print(f"  {name}: {record['outcome']} {record['message']}")
    return int(bool(lost_names))


if __name__ == "__main__":
    sys.exit(main())
