"""Writes the tiny models that transformers' pipeline tests would fetch from the hub: `python tiny_models.py DIR`."""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama

from hf_llama_repro import modeling_llama_repro

HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def write_tiny_models(target: Path):
    """One folder a head under TARGET/MODEL_TYPE/, and the summary in which the tests look them up."""
    tokenizer = byte_tokenizer()
    summary = {}
    for module, prefix in ((modeling_llama, "Llama"), (modeling_llama_repro, "LlamaRepro")):
        config = getattr(module, f"{prefix}Config")(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
        )
        for name in (prefix + head for head in HEADS):
            folder = target / config.model_type / name
            getattr(module, name)(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            summary[name] = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
    (target / "reports").mkdir(exist_ok=True)
    (target / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    write_tiny_models(Path(sys.argv[1]))
