"""Tokenizers with chat templates in the styles of the supported LLMs, and conversations to render with them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmprune_train.data.records import Record, Turn
from mmprune_train.data.templates import V1_SYSTEM
from mmprune_train.model.tokenizer import add_image_token, tiny_tokenizer

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

STYLES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "thinking": (THINKING, ["<|im_start|>", "<|im_end|>"]),
    "headers": (HEADERS, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "brackets": (BRACKETS, []),
}


def styled(style: str) -> PreTrainedTokenizerBase:
    """The built-in tokenizer with one of the chat templates above."""
    template, specials = STYLES[style]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_tokens([AddedToken(s, special=True, normalized=False) for s in specials], special_tokens=True)
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


def setups() -> dict[str, tuple[str, PreTrainedTokenizerBase]]:
    """Name -> (template, tokenizer), for the templates that hold a conversation."""
    chats = {style: ("chat", styled(style)) for style in STYLES}
    return {"v1": ("v1", tiny_tokenizer()), "v1-sentencepiece": ("v1", sentencepiece_like()), **chats}


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
