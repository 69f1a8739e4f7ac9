"""A model asked by transformers alone."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(folder: Path, question: str, **generation: object) -> list[int]:
    """The greedy tokens of a checkpoint's float32 model to one question in its chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, do_sample=False, **generation)
    return list(output[0, prompt["input_ids"].shape[1] :].tolist())
