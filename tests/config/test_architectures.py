"""`arch` in conf/encoder and conf/llm describes the published networks: same number of parameters, same fields."""

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CLIPConfig, CLIPModel

from mmprune_train.storage.conf import conf_dir, options

PUBLISHED = {
    "clip_vit_b32": 87_456_000,
    "clip_vit_l14_336": 303_507_456,
    "dinov2_small": 22_056_576,
    "siglip_so400m_384": 428_225_600,
    "llama3_8b": 8_030_261_248,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_1_7b": 1_720_574_976,
    "smollm2_135m": 134_515_008,
    "vicuna_7b": 6_738_415_616,
    "vicuna_13b": 13_015_864_320,
}


@pytest.mark.parametrize("group", ["encoder", "llm"])
def test_arch_builds_the_published_network(group):
    for name in options(group):
        arch = yaml.safe_load((conf_dir() / group / f"{name}.yaml").read_text())["arch"]
        config = AutoConfig.for_model(**arch)
        assert {key: getattr(config, key) for key in arch} == arch, f"{name}: transformers changed a field"
        with torch.device("meta"):
            model = (AutoModel if group == "encoder" else AutoModelForCausalLM).from_config(config)
        if not name.startswith("tiny"):
            assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name], name


@pytest.mark.parametrize(("name", "published"), [("clip_vit_b32", 151_277_313), ("clip_vit_l14_336", 427_944_193)])
def test_an_encoder_and_its_text_tower_make_the_published_clip(name, published):
    encoder = yaml.safe_load((conf_dir() / "encoder" / f"{name}.yaml").read_text())
    text = encoder["text"]["arch"]
    config = CLIPConfig(text_config=text, vision_config=encoder["arch"], projection_dim=text["projection_dim"])
    with torch.device("meta"):
        assert sum(p.numel() for p in CLIPModel(config).parameters()) == published
