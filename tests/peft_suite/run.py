"""Runs PEFT's own tests of decoder models on stock Llama and on LlamaRepro; lists what only Llama passes.

    python -m tests.peft_suite.run [-k EXPRESSION]

The tests of the installed version come out of its sdist, fetched from PyPI once. Those of Llama are run: the id that
they name is a folder of a tiny random model in the folder in which they run, of stock Llama or of LlamaRepro, so that
nothing is asked of the Hub. Takes some 15 minutes on two cores. The exit status is 1 if the list is not empty.
"""

import argparse
import os
import shutil
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tests.transformers_suite.run import CACHE, MODELS, ROOT, lost, run_models, tests_of_sdist

HERE = Path(__file__).resolve().parent
FILES = ("test_decoder_models.py", "test_adaption_prompt.py")
# Packages that the tests import for models other than Llama, and that are not installed -> what stands in for them.
STAND_INS = {"diffusers": "class StableDiffusionPipeline:\n    pass\n"}


def lay_out(source: Path, tree: Path):
    """A checkout in small: TREE/tests, a package, and stand-ins for what it imports."""
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(source, tree / "tests")
    (tree / "tests" / "__init__.py").touch()
    for name, text in STAND_INS.items():
        (tree / f"{name}.py").write_text(text)


def environment(tree: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tree / "datasets"),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # The first folder makes the package `tests` PEFT's, the last one brings hf_llama_repro.
        "PYTHONPATH": os.pathsep.join(map(str, (tree, HERE, HERE.parent / "transformers_suite", ROOT))),
        "TQDM_DISABLE": "1",
    }


def run_both(tree: Path, expression: str) -> list[dict[str, dict]]:
    """The records of `recorder.py` for stock Llama and for LlamaRepro."""
    options = (
        f"-q -W ignore -p recorder -p llama_only -p no:cacheprovider --noconftest -c {os.devnull} --rootdir {tree}"
    )
    files = [str(tree / "tests" / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", *options.split(), "-k", expression, *files]
    return run_models(command, environment(tree), tree, folders=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", dest="expression", default="", help="only tests whose name matches, as pytest has it")
    args = parser.parse_args(argv)

    tree = CACHE / "peft_suite"
    lay_out(tests_of_sdist("peft"), tree)
    upstream, ours = run_both(tree, args.expression)
    lost_names = lost(upstream, ours)
    print(f"PEFT {version('peft')}: {', '.join(FILES)}")
    for model, records in zip(MODELS, (upstream, ours), strict=True):
        counts = Counter(record["outcome"] for record in records.values())
        print(
            f"  {model:12} " + ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "skipped", "failed"))
        )
    print(f"passed upstream, not here: {len(lost_names)}")
    for name in lost_names:
        record = ours.get(name, {"outcome": "absent", "message": ""})
        print(f"  {name}: {record['outcome']} {record['message']}")
    return int(bool(lost_names))


if __name__ == "__main__":
    sys.exit(main())
