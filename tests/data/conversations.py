"""Tokenizers with chat templates in the styles of the supported LLMs, and conversations to render with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmprune_train.data.records import Record, Turn
from mmprune_train.data.tokens import add_no_eos
from mmprune_train.model.tokenizer import add_image_token, tiny_tokenizer

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""Vicuna's."""
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2, Qwen2.5: a default system text."""
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen3: the last answer is opened differently."""
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Llama 3: writes the BOS that the tokenizer adds as well; question and answer headers end alike."""
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)
"""Mistral: markers of plain text, and no system role."""

PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""Its special tokens swallow the white space behind them."""
PARTS = (
    "{% for m in messages %}{{ '[INST] ' if m['role'] == 'user' else ' ' }}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ ' [/INST]' if m['role'] == 'user' else eos_token }}{% endfor %}"
)
"""llava-hf's: contents are lists of parts, and text is not read."""
NAMED = (
    "{% for m in messages %}{{ m['role'] | capitalize + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
"""No special token anywhere: nothing ends an answer. And what is asked for ends with a space."""
OPENED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""Special tokens open the parts and end none."""
EDGES = (
    "\n\n {% for m in messages %}\n{{- '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{%- generation -%}{{ m['content'] + '<|im_end|>' }}{%- endgeneration -%}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}\r\n\r\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}\r\n"
)
"""White space and line ends around what it writes, and marks of transformers' own."""

STYLES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "thinking": (THINKING, ["<|im_start|>", "<|im_end|>"]),
    "headers": (HEADERS, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "brackets": (BRACKETS, []),
    "phi3": (PHI3, ["<|user|>", "<|assistant|>", "<|end|>", "<|system|>"]),
    "parts": (PARTS, []),
    "named": (NAMED, []),
    "opened": (OPENED, ["<|user|>", "<|assistant|>"]),
    "edges": (EDGES, ["<|im_start|>", "<|im_end|>"]),
}
ENDS = {"headers": "<|eot_id|>", "phi3": "<|end|>", **dict.fromkeys(("chatml", "thinking", "edges"), "<|im_end|>")}
"""What ends an answer, where it is not EOS."""


def styled(style: str) -> PreTrainedTokenizerBase:
    """The built-in tokenizer with one of the chat templates above."""
    template, specials = STYLES[style]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokens = [AddedToken(s, special=True, normalized=False, rstrip=style == "phi3") for s in specials]
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


def rebuilt(tokenizer: PreTrainedTokenizerBase, **backend: Any) -> PreTrainedTokenizerBase:
    """The same tokenizer with other parts."""
    for name, part in backend.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def lower_casing(style: str) -> PreTrainedTokenizerBase:
    return rebuilt(styled(style) if style in STYLES else tiny_tokenizer(), normalizer=normalizers.Lowercase())


def eos_adding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """What a training stage makes of a tokenizer that ends every text with EOS, as `add_eos_token` does."""
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    add_no_eos(rebuilt(tokenizer, post_processor=processors.Sequence([processors.ByteLevel(trim_offsets=False), both])))
    return tokenizer


def sentencepiece_like() -> PreTrainedTokenizerBase:
    """Llama 2's kind of tokenizer: `\u2581` for a space, one put before the text, single bytes as a fallback."""
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in specials]
        + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    texts = [V1_SYSTEM, " USER: What is the color? ASSISTANT: a red shape", "USER: is it there? ASSISTANT: no"] * 3
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # no merge crosses words
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    add_image_token(fast)
    return fast


def llama2_like() -> PreTrainedTokenizerBase:
    """The same in its older form: a space is put before every text and behind every special token."""
    tokenizer = sentencepiece_like()
    spaces = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    rebuilt(tokenizer, normalizer=spaces).backend_tokenizer.pre_tokenizer = None
    tokenizer.chat_template = BRACKETS
    return tokenizer


def bracket_tokens() -> PreTrainedTokenizerBase:
    """Mistral's later form: the brackets are special tokens, behind which a space is put."""
    tokenizer = llama2_like()
    marks = [AddedToken(s, special=True, normalized=False) for s in ("[INST]", "[/INST]")]
    tokenizer.add_tokens(marks, special_tokens=True)
    return tokenizer


def unknowing() -> PreTrainedTokenizerBase:
    """Words of a Unigram model, without bytes to fall back on."""
    texts = [V1_SYSTEM, "USER: Is it? ASSISTANT: no yes"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    add_image_token(fast)
    return fast


def setups() -> dict[str, tuple[str, PreTrainedTokenizerBase]]:
    """Name -> (template, tokenizer), for the templates that hold a conversation."""
    chats = {style: ("chat", styled(style)) for style in STYLES}
    return {
        "v1": ("v1", tiny_tokenizer()),
        "v1-sentencepiece": ("v1", sentencepiece_like()),
        "v1-llama2": ("v1", llama2_like()),
        "v1-lower-case": ("v1", lower_casing("v1")),
        "v1-phi3": ("v1", styled("phi3")),
        "v1-add-eos": ("v1", eos_adding(tiny_tokenizer())),
        **chats,
        "llama2": ("chat", llama2_like()),
        "llama2-marks": ("chat", bracket_tokens()),
        "chatml-strip": ("chat", rebuilt(styled("chatml"), normalizer=normalizers.Strip())),
        "chatml-lower-case": ("chat", lower_casing("chatml")),
        "headers-add-eos": ("chat", eos_adding(styled("headers"))),
    }


SETUPS = setups()


def record(*turns: tuple[str, str], name: str = "r") -> Record:
    images = sum(question.count("<image>") for question, _ in turns)
    return Record(name, [Path(f"{k}.png") for k in range(images)], [Turn(*turn) for turn in turns], f"f.json[{name}]")


MANY = record(
    ("<image>\nWhat is this?<image>", "A  red shape, für dich 日本."),
    ("Is it red?", "yes"),
    ("and <image>", "no"),
    ("<image>", "a circle"),
)
"""Several turns and images, images after words, a turn without words, and letters of several bytes."""
