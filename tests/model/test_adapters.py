"""The adapters of a stage in PEFT's own format: small, and the whole of what was trained beside the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model.adapted import adapted
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_inputs, tiny_llava
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mmprune_train.config.compose import compose_config
from mmprune_train.model.assemble import assemble, llava_config
from mmprune_train.model.peft import merge_adapters, save_adapters


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_what_is_saved_makes_the_merged_model_of_the_base(name: str, tmp_path: Path) -> None:
    hf = tiny_llava()
    model = adapted(hf, name)
    save_adapters(model, tmp_path, "runs/x/pretrain/model")
    inputs = tiny_inputs([1, 2], [6, 8])
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        unmerged = model(**inputs).logits[real]
        merge_adapters(model.hf)
        merged = model(**inputs).logits[real]
        base = hf(**inputs).logits[real]
        hf.model.multi_modal_projector.load_state_dict(load_file(tmp_path / "projector.safetensors"))
        loaded = PeftModel.from_pretrained(hf, tmp_path)
        beside = loaded(**inputs).logits[real]
        folded = loaded.merge_and_unload()(**inputs).logits[real]
    for found in (merged, beside, folded):
        torch.testing.assert_close(found, unmerged, atol=1e-5, rtol=1e-5)
    assert (unmerged - base).abs().max() > 1e-2
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "runs/x/pretrain/model" and told["r"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "projector.safetensors",
    ]  # fmt: skip


def test_adapters_of_smollm2_at_rank_16_take_less_than_25_megabytes(tmp_path: Path) -> None:
    config = compose_config(["+experiment=demo", "peft.r=16"])
    vision, text = AutoConfig.for_model(**config.encoder.arch), AutoConfig.for_model(**config.llm.arch)
    text.vocab_size = 512  # embeddings are not adapted
    llava = llava_config(config.encoder, vision, text, config.projector.name, image_token=500)
    hf = assemble(llava, AutoModel.from_config(vision), AutoModelForCausalLM.from_config(text))
    model = adapted(hf, r=config.peft.r)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "multi_modal_projector" in name for name in trained)
    save_adapters(model, tmp_path, None)
    saved = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert 19e6 < saved["adapter_model.safetensors"] < sum(saved.values()) < 25e6
    assert sum(saved.values()) == pytest.approx(4 * sum(p.numel() for p in trained.values()), rel=0.02)
    words = torch.randint(4, 400, (1, 12))
    with torch.no_grad():
        unmerged = model(input_ids=words, attention_mask=torch.ones_like(words)).logits
        merge_adapters(model.hf)
        merged = model(input_ids=words, attention_mask=torch.ones_like(words)).logits
        plain = PeftModel.from_pretrained(hf.eval(), tmp_path).merge_and_unload()
        loaded = plain(input_ids=words, attention_mask=torch.ones_like(words)).logits
    torch.testing.assert_close(merged, unmerged, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded, merged, atol=1e-5, rtol=1e-5)
