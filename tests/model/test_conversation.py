"""The conversation format that a built, trained, saved or loaded model speaks, and where its answers end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data.conversations import PARTS, eos_adding, rebuilt, styled
from PIL import Image
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, GenerationConfig, PreTrainedTokenizerBase

from mmprune_train import load_model
from mmprune_train.config.compose import compose_config
from mmprune_train.data.templates import get_template
from mmprune_train.model.begin import begin
from mmprune_train.pruning import Kind
from mmprune_train.tasks.checkpoint import prompt_template

IMAGE = Image.new("RGB", (48, 48), "red")
ASK: list[dict[str, Any]] = [{"role": "user", "content": "<image>\nwhat color?"}]


def built(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    generation: dict[str, Any] | None = None,
    trained: str | None = None,
) -> tuple[Any, Any]:
    """A network on a tiny random LLM whose configs know one EOS, token 2."""
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    config = compose_config(["+experiment=smoke", f"llm.path={folder}", f"llm.template={template}"])
    return begin(config, template=trained)


def prompt_of(processor: Any) -> list[int]:
    text = processor.apply_chat_template(ASK, add_generation_prompt=True)
    return processor(images=[IMAGE], text=[text], return_tensors="pt")["input_ids"][0].tolist()


@pytest.mark.parametrize(("style", "end"), [("chatml", "<|im_end|>"), ("headers", "<|eot_id|>"), ("named", "</s>")])
def test_generation_stops_at_the_token_that_ends_a_trained_answer(style: str, end: str, tmp_path: Path) -> None:
    model, processor = built(tmp_path / "llm", styled(style), "chat")
    model.save(tmp_path / "model", processor)
    saved = GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id
    stops = saved if isinstance(saved, list) else [saved]
    assert set(stops) == {2, processor.tokenizer.convert_tokens_to_ids(end)}
    again, _ = load_model(tmp_path / "model")
    assert again.generation_config.eos_token_id == saved


@pytest.mark.parametrize(
    "generation",
    [
        {"eos_token_id": 2, "pad_token_id": 0, "max_length": 4096, "temperature": 0.9, "top_p": 0.6},  # Vicuna's
        {"eos_token_id": 2, "cache_implementation": "hybrid"},  # Gemma 2's
        {"eos_token_id": 2, "output_attentions": True},
    ],
)
def test_generation_settings_of_an_llm_that_change_no_answer_stop_nothing(
    generation: dict[str, Any], tmp_path: Path
) -> None:
    model, processor = built(tmp_path / "llm", styled("chatml"), "chat", generation)
    assert model.generate(torch.tensor([prompt_of(processor)[:1]]), max_new_tokens=1).shape == (1, 2)
    model.save(tmp_path / "model", processor)
    saved = GenerationConfig.from_pretrained(tmp_path / "model")
    assert saved.eos_token_id == [2, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert (saved.temperature, saved.cache_implementation, saved.output_attentions) == (None, None, None)


def test_a_stage_with_another_template_is_saved_with_that_one(tmp_path: Path) -> None:
    model, processor = built(tmp_path / "llm", styled("chatml"), "chat", trained="v1")
    model.save(tmp_path / "model", processor)
    plain = AutoProcessor.from_pretrained(tmp_path / "model")
    text = plain.apply_chat_template(ASK, add_generation_prompt=True)
    assert text.endswith(" USER: <image>\nwhat color? ASSISTANT:")
    assert load_model(tmp_path / "model")[0].template == "v1"


def test_after_a_plain_stage_a_folder_still_converses_as_its_llm_does(tmp_path: Path) -> None:
    model, processor = built(tmp_path / "llm", styled("chatml"), "chat", trained="plain")
    model.save(tmp_path / "model", processor)
    again, loaded = load_model(tmp_path / "model")
    assert again.template == "plain"
    assert load_model(tmp_path / "model", template="v1")[0].template == "v1", "as the next stage starts"
    text = get_template("chat", styled("chatml")).prompt("<image>\nwhat color?")
    assert loaded.apply_chat_template(ASK, add_generation_prompt=True) == text
    assert prompt_template(loaded).prompt("what color?", 1) == text, "as the tasks ask"
    ids = torch.tensor(prompt_of(loaded))
    kind, _ = again.annotate(ids)
    assert loaded.decode(ids[kind == Kind.PROMPT]).split() == ["You", "are", "helpful.what", "color?"]


def test_a_tokenizer_that_ends_texts_with_eos_asks_without_it(tmp_path: Path) -> None:
    ends = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    adding = rebuilt(styled("headers"), post_processor=ends)
    assert adding("a")["input_ids"][-1] == 2
    _, processor = built(tmp_path / "llm", adding, "chat")
    assert prompt_of(processor)[-1] != 2 and prompt_of(processor)[:2].count(1) == 1
    processor.save_pretrained(tmp_path / "saved")
    assert prompt_of(AutoProcessor.from_pretrained(tmp_path / "saved")) == prompt_of(processor)
    assert eos_adding(styled("chatml"))("a")["input_ids"][0] == 1


def test_a_folder_whose_chat_template_takes_lists_alone_is_asked_by_strings_too(tmp_path: Path) -> None:
    model, processor = built(tmp_path / "llm", styled("chatml"), "chat")
    model.save(tmp_path / "model", processor)
    config = json.loads((tmp_path / "model/config.json").read_text())
    del config["mmprune"]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/chat_template.jinja").write_text(PARTS)
    again, loaded = load_model(tmp_path / "model")
    assert again.template == "chat"
    assert loaded.apply_chat_template(ASK, add_generation_prompt=True) == "[INST] <image>\nwhat color? [/INST]"
