"""TRL's SFTTrainer on a converted model, with an adapter on the layers that PEFT knows for the type.

python examples/trl_sft.py MODEL OUTPUT
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import hf_llama_repro  # noqa: F401  (transformers and PEFT know the model type)

RECORDS = Path(__file__).parent.parent / "finetune" / "data" / "demo.jsonl"


def dataset(count: int) -> Dataset:
    """Prompts and completions of Alpaca records."""
    records = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()[:count]]
    prompt = "### Instruction:\n{instruction}\n\n### Response:\n"
    return Dataset.from_list([{"prompt": prompt.format(**r), "completion": r["output"]} for r in records])


def train(folder: Path, output: Path, *, steps: int = 20, **settings: Any) -> SFTTrainer:
    """The trainer after its last step; `output` holds the adapter."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # TRL appends EOS as text, which a base model's tokenizer takes for text.
    tokenizer.split_special_tokens = False
    arguments = SFTConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        **settings,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=arguments,
        train_dataset=dataset(count=64),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(output))
    return trainer


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))
