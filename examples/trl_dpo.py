"""TRL's DPOTrainer on a converted model: answers in whole sentences are to be preferred to shouted ones.

python examples/trl_dpo.py MODEL OUTPUT
"""

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import hf_llama_repro  # noqa: F401  (transformers and PEFT know the model type)

PLACES = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Tokyo", "Quito", "Accra")


def preferences() -> Dataset:
    """A prompt, the answer that is preferred and the one that is not."""
    return Dataset.from_list(
        [
            {
                "prompt": f"Name a city like {place}.\n",
                "chosen": f"A city like {other} would do.",
                "rejected": f"{other.upper()}!!!",
            }
            for place, other in zip(PLACES, reversed(PLACES), strict=True)
        ]
    )


def train(folder: Path, output: Path, *, steps: int = 20, **settings: Any) -> DPOTrainer:
    """The trainer after its last step; `output` holds the adapter. The base without it is the reference."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.split_special_tokens = False  # EOS is appended as text
    arguments = DPOConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        **settings,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=arguments,
        train_dataset=preferences(),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(output))
    return trainer


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))
