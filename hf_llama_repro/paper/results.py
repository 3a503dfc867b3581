"""Published results, each with its table, and the numbers that are often repeated and wrong.

"LLaMA" is arXiv 2302.13971. Scores in percent; None where the paper gives none.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import InputError
from .formulas import num_parameters, training_flops
from .sizes import RUNS, SIZES, VOCAB_SIZE

BILLIONS: dict[str, float] = {
    **{size.title: num_parameters(size) / 1e9 for size in SIZES.values()},
    "GPT-3 175B": 175,
    "Gopher 280B": 280,
    "Chinchilla 70B": 70,
    "PaLM 62B": 62,
    "PaLM 540B": 540,
}
"""Parameters of each model; LLaMA's exact, the others' as their names say."""

FAMILIES = ("LLaMA 2", "LLaMA", "GPT-3", "Gopher", "Chinchilla", "PaLM")


def family(model: str) -> str:
    """The model without its size; the longest name that fits is the right one."""
    return next(name for name in FAMILIES if model.startswith(name))


@dataclass(frozen=True)
class Benchmark:
    """What was measured, and what each model reached."""

    title: str
    metric: str
    settings: tuple[str, ...]
    """Columns: numbers of shots, or the pass@k."""
    source: str
    scores: dict[str, tuple[float | None, ...]]
    """Percent, by model, for each setting."""
    notes: tuple[str, ...] = ()

    def score(self, model: str, setting: str) -> float | None:
        """The published score, None where there is none. Raises `InputError` for an unknown setting."""
        if setting not in self.settings:
            raise InputError(f"{self.title} has no setting {setting!r}; it has {', '.join(self.settings)}")
        row = self.scores.get(model)
        return None if row is None else row[self.settings.index(setting)]


BENCHMARKS: dict[str, Benchmark] = {
    "mmlu": Benchmark(
        "MMLU",
        "accuracy",
        ("5-shot",),
        "LLaMA, Table 9; LLaMA 2: model card",
        {
            "LLaMA 7B": (35.1,),
            "LLaMA 13B": (46.9,),
            "LLaMA 33B": (57.8,),
            "LLaMA 65B": (63.4,),
            "LLaMA 2 7B": (45.3,),
            "LLaMA 2 13B": (54.8,),
            "LLaMA 2 70B": (68.9,),
            "GPT-3 175B": (43.9,),
            "Gopher 280B": (60.0,),
            "Chinchilla 70B": (67.5,),
            "PaLM 62B": (53.7,),
            "PaLM 540B": (69.3,),
        },
    ),
    "hellaswag": Benchmark(
        "HellaSwag",
        "accuracy, by likelihood per character",
        ("0-shot",),
        "LLaMA, Table 3",
        {
            "LLaMA 7B": (76.1,),
            "LLaMA 13B": (79.2,),
            "LLaMA 33B": (82.8,),
            "LLaMA 65B": (84.2,),
            "GPT-3 175B": (78.9,),
            "Gopher 280B": (79.2,),
            "Chinchilla 70B": (80.8,),
            "PaLM 62B": (79.7,),
            "PaLM 540B": (83.4,),
        },
    ),
    "triviaqa": Benchmark(
        "TriviaQA",
        "exact match",
        ("0-shot", "1-shot", "5-shot", "64-shot"),
        "LLaMA, Table 5",
        {
            "LLaMA 7B": (50.0, 53.4, 56.3, 57.6),
            "LLaMA 13B": (56.6, 60.5, 63.1, 64.0),
            "LLaMA 33B": (65.1, 67.9, 69.9, 70.4),
            "LLaMA 65B": (68.2, 71.6, 72.6, 73.0),
            "Gopher 280B": (43.5, None, 57.0, 57.2),
            "Chinchilla 70B": (55.4, None, 64.1, 64.6),
        },
    ),
    "nq_open": Benchmark(
        "NaturalQuestions",
        "exact match",
        ("0-shot", "1-shot", "5-shot", "64-shot"),
        "LLaMA, Table 4",
        {
            "LLaMA 7B": (16.8, 18.7, 22.0, 26.1),
            "LLaMA 13B": (20.1, 23.4, 28.1, 31.9),
            "LLaMA 33B": (24.9, 28.3, 32.9, 36.0),
            "LLaMA 65B": (23.8, 31.0, 35.0, 39.9),
            "GPT-3 175B": (14.6, 23.0, None, 29.9),
            "Gopher 280B": (10.1, None, 24.5, 28.2),
            "Chinchilla 70B": (16.6, None, 31.5, 35.5),
            "PaLM 62B": (18.1, 26.5, None, 27.6),
            "PaLM 540B": (21.2, 29.3, None, 39.6),
        },
    ),
    "humaneval": Benchmark(
        "HumanEval",
        "pass@k; temperature 0.1 for pass@1, 0.8 for pass@100",
        ("pass@1", "pass@100"),
        "LLaMA, Table 8",
        {
            "LLaMA 7B": (10.5, 36.5),
            "LLaMA 13B": (15.8, 52.5),
            "LLaMA 33B": (21.7, 70.7),
            "LLaMA 65B": (23.7, 79.3),
            "PaLM 62B": (15.9, 46.3),
            "PaLM 540B": (26.2, 76.2),
        },
        ("PaLM 62B's pass@100 is read from a figure",),
    ),
}
"""By the name that lm-evaluation-harness gives the task."""

NORMALISATION = (
    "Likelihood tasks are normalised by the number of characters, except OpenBookQA and BoolQ "
    '(by the probability of the completion after "Answer:").'
)
"""LLaMA, section 3."""

GPT_3_FLOPS = 3.14e23
"""Of training GPT-3 175B: arXiv 2005.14165, appendix D."""


def _score(benchmark: str, model: str, setting: str) -> str:
    return f"{BENCHMARKS[benchmark].score(model, setting):.1f}"


def _flops(name: str) -> float:
    return training_flops(num_parameters(SIZES[name]), RUNS[name].tokens)


def _e(flops: float) -> str:
    return f"{flops:.2e}".replace("e+", "e")


@dataclass(frozen=True)
class Mistake:
    """A number that is often repeated and wrong."""

    of: str
    said: str
    right: Callable[[], str]
    """Read from the tables here."""
    reason: str


MISTAKES: tuple[Mistake, ...] = (
    Mistake("65B, HellaSwag", "79.2", lambda: _score("hellaswag", "LLaMA 65B", "0-shot"), "79.2 is 13B's"),
    Mistake("13B, HellaSwag", "76.1", lambda: _score("hellaswag", "LLaMA 13B", "0-shot"), "76.1 is 7B's"),
    Mistake(
        "65B, TriviaQA",
        "68.9",
        lambda: " / ".join(_score("triviaqa", "LLaMA 65B", shots) for shots in BENCHMARKS["triviaqa"].settings),
        "not in the table, for any number of shots (0 / 1 / 5 / 64)",
    ),
    Mistake(
        "13B, TriviaQA",
        "61.3",
        lambda: " / ".join(_score("triviaqa", "LLaMA 13B", shots) for shots in BENCHMARKS["triviaqa"].settings),
        "not in the table, for any number of shots (0 / 1 / 5 / 64)",
    ),
    Mistake(
        "65B, NaturalQuestions",
        "33.0",
        lambda: " / ".join(_score("nq_open", "LLaMA 65B", shots) for shots in BENCHMARKS["nq_open"].settings),
        "not in the table, for any number of shots (0 / 1 / 5 / 64)",
    ),
    Mistake(
        "13B, NaturalQuestions",
        "26.0",
        lambda: " / ".join(_score("nq_open", "LLaMA 13B", shots) for shots in BENCHMARKS["nq_open"].settings),
        "not in the table, for any number of shots (0 / 1 / 5 / 64)",
    ),
    Mistake(
        "PaLM 62B, HumanEval pass@1 / @100",
        "26.2 / 76.2",
        lambda: " / ".join(_score("humaneval", "PaLM 62B", k) for k in BENCHMARKS["humaneval"].settings),
        "26.2 / 76.2 is PaLM 540B's",
    ),
    Mistake("65B, training FLOPs", "2.5e23", lambda: _e(_flops("llama-65b")), "6 N D over 1.4T tokens"),
    Mistake(
        "13B, training tokens",
        "1.4T",
        lambda: f"{RUNS['llama-13b'].tokens / 1e12:.1f}T",
        "1.4T is for 33B and 65B",
    ),
    Mistake(
        "13B, training compute against GPT-3's",
        "about the same",
        lambda: f"{_flops('llama-13b') / GPT_3_FLOPS:.2f} of it",
        f"6 N D is {_e(_flops('llama-13b'))}; GPT-3's {_e(GPT_3_FLOPS)}",
    ),
    Mistake(
        "7B, parameters",
        f"{(num_parameters(SIZES['llama-7b']) - VOCAB_SIZE * SIZES['llama-7b'].dim) / 1e9:.2f}B",
        lambda: f"{num_parameters(SIZES['llama-7b']) / 1e9:.2f}B",
        "the output matrix is a second one beside the embedding",
    ),
)
