"""The text tower beside the network: which question an image has, rows per question, saving and loading, training."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loaded import VISION_SCORES
from PIL import Image
from tiny import PATCHES, SIDE, annotate, labels_of, packed, tiny_clip, tiny_inputs, tiny_llava, words
from torch import Tensor
from transformers import CLIPModel, LlavaForConditionalGeneration

from mmprune_train import load_model
from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.config.schema import OptimConfig, PeftConfig, StageConfig
from mmprune_train.data.batch import Batch, Sample, collate
from mmprune_train.data.encode import Example, encode
from mmprune_train.data.records import Record, Turn
from mmprune_train.data.templates import get_template
from mmprune_train.errors import UserError
from mmprune_train.model.begin import begin
from mmprune_train.model.build import build_on_meta
from mmprune_train.model.flops import StepFlops
from mmprune_train.model.inputs import pack
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.peft import add_adapters
from mmprune_train.model.question import (
    ImageQuestions,
    QuestionEncoder,
    image_questions,
    load_question_encoder,
    tiny_question_tokenizer,
)
from mmprune_train.pruning import IGNORE, Kind, Pruner, vision_scores
from mmprune_train.pruning.merging import centres
from mmprune_train.pruning.views import VisionView
from mmprune_train.training.freezing import freeze, freezing_table, store_frozen
from mmprune_train.training.module import MultimodalModule
from mmprune_train.training.optim import parameter_groups

CDPRUNER = {"name": "cdpruner", "vision": {"knee": {"count": 4}}}
RECOVERABLE = {
    "name": "recoverable",
    "vision": {"knee": {"neighbors": 2}, "recover": {"knee": {"method": "fixed_count", "count": 2}}},
}


def sample(name: str, images: list[int], question: list[int], kind: Kind = Kind.PROMPT) -> Sample:
    """BOS, images, a question, and an answer of two tokens; image n is the file `n.png`."""
    ids = torch.tensor([1, *[3] * PATCHES * len(images), *question, 90, 91])
    kinds = [Kind.SPECIAL, *[Kind.VISUAL] * PATCHES * len(images), *[kind] * len(question), Kind.ANSWER, Kind.ANSWER]
    kinds_tensor = torch.tensor([int(k) for k in kinds])
    labels = torch.where(kinds_tensor == Kind.ANSWER, ids, IGNORE)
    example = Example(name, ids, kinds_tensor, torch.ones_like(ids), labels, len(images))
    pixels = [torch.randn((3, SIDE, SIDE), generator=torch.Generator().manual_seed(n)) for n in images]
    return Sample(example, [Path(f"{n}.png") for n in images], pixels)


def run(model: PackedLlava, batch: Batch) -> tuple[list[list[int]], Tensor]:
    """Kept patches of each row of stage 1, and the summed loss."""
    with torch.no_grad():
        out = model.forward_packed(batch.sequence, batch.pixel_values)
    return [kept.tolist() for kept in out.trace.vision_kept], out.loss_sum


# ---------------------------------------------------------------------- which question


def test_an_image_has_the_question_of_its_own_turn_in_training_and_in_a_prompt() -> None:
    model, processor = begin(compose_config(["+experiment=smoke", "pruner=cdpruner"]))
    assert model.words is not None and model.annotate is not None
    turns = [Turn("<image>\nWhat color is it?", "red"), Turn("Is it round? <image>", "no"), Turn("Why?", "it is so")]
    record = Record("r", [Path("a.png"), Path("b.png")], turns, "r")
    tokenizer = processor.tokenizer
    for template in ("v1", "plain"):
        told = turns if template == "v1" else [Turn("<image>\nDescribe.", "A square.")]
        example = encode(replace(record, turns=told), get_template(template, tokenizer), tokenizer, 4, 500)
        files = record.images[: example.n_images]
        batch = collate([Sample(example, files, [torch.zeros(3, 2, 2)] * len(files))])
        pairs = image_questions(batch.sequence, model.words)
        expected = ["What color is it?", "Is it round?"] if template == "v1" else [""]
        assert (pairs.image, pairs.question) == (list(range(len(expected))), expected)
    prompt = "USER: <image>\nWhat color is the shape? ASSISTANT:"
    inputs = processor(images=[Image.new("RGB", (60, 40), "red")], text=[prompt], return_tensors="pt")
    packed_prompt = pack(
        inputs["input_ids"],
        inputs["attention_mask"].bool(),
        len(inputs["pixel_values"]),
        model.config.image_token_id,
        annotate=model.annotate,
        features=model.config.image_seq_length,
    )
    assert image_questions(packed_prompt, model.words).question == ["What color is the shape?"]
    assert image_questions(packed_prompt, model.words, [" the", " is"]).question == ["What color"]


@pytest.mark.parametrize(("name", "read"), [("cdpruner", "Is it\nred?"), ("recoverable", "Is it"), ("dpp", None)])
def test_a_preset_reads_the_question_as_far_as_its_authors_do(name: str, read: str | None) -> None:
    asked = "Is it\nred?\nAnswer the question using a single word or phrase."
    ends = load_pruner(name).vision.question_ends
    assert (read is None) == (not ends)
    batch = collate([sample("s", [0], [40, 41, 42])])
    for text in (asked, "Is it\nred?"):
        pairs = image_questions(batch.sequence, lambda ids, text=text: text, ends)
        assert pairs.question == [read or text]


def test_samples_that_share_image_and_question_share_a_row() -> None:
    batch = collate(
        [sample("a", [5], [10, 11]), sample("b", [5, 6], [10, 11]), sample("c", [5], [12]), sample("d", [6], [])]
    )
    pairs = image_questions(batch.sequence, words)
    one, other = words(torch.tensor([10, 11])), words(torch.tensor([12]))
    assert (pairs.image, pairs.question) == ([0, 0, 1, 1], [one, other, one, ""])
    rows = [pairs.row[(batch.sequence.segment == s) & batch.sequence.visual].unique_consecutive() for s in range(4)]
    assert [row.tolist() for row in rows] == [[0], [0, 2], [1], [3]]
    assert bool((pairs.row[~batch.sequence.visual] == -1).all())


# ---------------------------------------------------------------------- one image, several questions


@pytest.mark.parametrize("pruner", [CDPRUNER, RECOVERABLE])
@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_an_image_is_encoded_once_and_cut_for_each_question(pruner: dict, chunk: int) -> None:
    hf = tiny_llava()
    model = packed(hf, pruner, vision_chunk=chunk)
    samples = [
        sample("a", [5], [10, 11]),
        sample("b", [6, 5], [40]),
        sample("c", [5], [55, 60, 7]),
        sample("d", [6], [8]),
    ]
    encoded: list[int] = []
    model.hf.model.vision_tower.embeddings.register_forward_hook(lambda _, args, out: encoded.append(len(args[0])))
    together, loss = run(model, collate(samples))
    assert sum(encoded) == 2 and len(together) == 5
    alone = [run(model, collate([one])) for one in samples]
    rows = {("a", 5): 0, ("b", 5): 1, ("c", 5): 2, ("b", 6): 3, ("d", 6): 4}  # by image, then by sample
    for one, (kept, _) in zip(samples, alone, strict=True):
        for number, path in enumerate(one.images):
            assert together[rows[one.example.id, int(path.stem)]] == kept[number]
    assert len({tuple(kept) for kept in together[:3]}) > 1, "the questions made no difference"
    torch.testing.assert_close(loss, sum(found for _, found in alone), rtol=1e-5, atol=1e-5)


def test_forward_reports_what_was_kept_image_by_image() -> None:
    model = packed(tiny_llava(), CDPRUNER)
    inputs = tiny_inputs([1, 2, 1], [7, 9, 5], pad_left=True)
    inputs["pixel_values"][1:] = inputs["pixel_values"][:1].clone()
    inputs["pixel_values"][2] += 1.0
    with torch.no_grad():
        model(**inputs)
    trace = model.last_pruning
    assert trace is not None and trace.encoded == 3 and trace.asked[0] == 3
    assert trace.vision_scores is not None and len(trace.vision_kept) == 4
    for scores, kept in zip(trace.vision_scores, trace.vision_kept, strict=True):
        assert len(kept) == 4 and scores.shape == (PATCHES,)
    assert not torch.equal(trace.vision_scores[0], trace.vision_scores[1]), "one image, two questions"


def test_beams_of_one_prompt_ask_once() -> None:
    model = packed(tiny_llava(), CDPRUNER)
    inputs = tiny_inputs([1, 1], [7, 9], pad_left=True)
    asked = []
    model.question.clip.text_model.register_forward_hook(lambda *_: asked.append(1))
    model.generate(**inputs, num_beams=3, max_new_tokens=3, do_sample=False)
    assert len(asked) == 1 and model.last_pruning.asked[0] == 2


# ---------------------------------------------------------------------- no question


def test_without_a_question_diversity_alone_decides_and_nothing_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_llava()
    silent = collate([sample("a", [5], [10, 11], Kind.SPECIAL), sample("b", [6], [], Kind.SPECIAL)])
    kept, _ = run(packed(hf, CDPRUNER), silent)
    monkeypatch.setattr(vision_scores, "uniform_grid", lambda view: torch.zeros(view.patches.shape[:2]))
    diverse, _ = run(packed(hf, {"name": "dpp", "vision": {**CDPRUNER["vision"], "score": "uniform_grid"}}), silent)
    assert kept == diverse
    first, _ = run(packed(hf, RECOVERABLE), silent)
    off = {**RECOVERABLE["vision"], "recover": {"enabled": False}}
    assert first == run(packed(hf, {"name": "recoverable", "vision": off}), silent)[0]
    spoken = collate([sample("a", [5], [10, 11]), sample("b", [6], [12])])
    back, _ = run(packed(hf, RECOVERABLE), spoken)
    assert all(set(one) > set(other) for one, other in zip(back, first, strict=True))


# ---------------------------------------------------------------------- scores and merges


@pytest.mark.parametrize("layer", [None, 0, 1, 2, -1])
def test_text_scores_read_what_the_chosen_block_puts_out(layer: int | None) -> None:
    hf = tiny_llava()
    vision = {"score": "text_similarity", "layer": layer, "knee": {"method": "fixed_count", "count": 3}}
    model = packed(hf, {"name": "encoder_only", "vision": vision})
    batch = collate([sample("a", [5], [10, 11]), sample("b", [6], [40, 41, 42])])
    with torch.no_grad():
        scores = model.forward_packed(batch.sequence, batch.pixel_values).trace.vision_scores
    clip = tiny_clip(hf)
    for image, ids in enumerate(([10, 11], [40, 41, 42])):
        read = tiny_question_tokenizer()(words(torch.tensor(ids)), return_tensors="pt")
        with torch.no_grad():
            hidden = clip.vision_model(batch.pixel_values[[image]], output_hidden_states=True).hidden_states
            chosen = hidden[-2] if layer is None else hidden[1:][layer]
            patches = clip.visual_projection(clip.vision_model.post_layernorm(chosen[0, 1:]))
            meant = clip.get_text_features(read["input_ids"]).pooler_output
        torch.testing.assert_close(scores[image], torch.cosine_similarity(patches, meant), rtol=1e-4, atol=1e-5)


def test_centres_listen_to_the_question_of_the_recovering_pass() -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    keys, patches, query, sides = draw(2, 41, 8), draw(2, 40, 8), 6 * draw(2, 8), (draw(2, 40, 8), draw(2, 8))
    view = VisionView(
        patches,
        (5, 8),
        lambda: keys[:, 1:],
        cls_query_keys=lambda: (query, keys),
        question=lambda normed: sides,
        asked=torch.tensor([True, True]),
    )
    pruner = Pruner(load_pruner({"name": "recoverable", "vision": {"merge_args": {"count": 3}}}))
    kept, scores = pruner.keep_patches(view)
    found, places = pruner.merge_patches(patches, kept, scores, view)
    text = VISION_SCORES["text_similarity_bare"](view)
    expected = centres(patches, kept, scores, keys[:, 1:], text, count=3, share_of="width", keys_of="renumbered")
    deaf = centres(patches, kept, scores, keys[:, 1:], count=3, share_of="width", keys_of="renumbered")
    assert bool((places != kept).any()) and torch.equal(places, expected[1])
    torch.testing.assert_close(found, expected[0])
    assert not torch.allclose(found, deaf[0])


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("pruner", [CDPRUNER, RECOVERABLE])
@pytest.mark.parametrize("half", [False, True])
def test_gradients_reach_projector_and_adapters_and_never_the_text_tower(pruner: dict, half: bool) -> None:
    model = packed(tiny_llava(), pruner)
    add_adapters(model, PeftConfig(name="lora", r=4, alpha=8, dropout=0.0))
    parts = freeze(model, StageConfig(train_projector=True, train_llm=True, use_peft=True, lr=1e-3), adapters=True)
    assert "text tower" in freezing_table(parts, "")
    if half:
        store_frozen(model, torch.bfloat16)
    assert not model.question.training and model.hf.model.language_model.training
    inputs = tiny_inputs([2, 1], [7, 9])
    optimizer = torch.optim.AdamW(parameter_groups(model, parts, 0.0), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(**inputs, labels=labels_of(inputs)).loss.backward()
        optimizer.step()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("projector" in name for name in trained) and any("lora_" in name for name in trained)
    assert not any(name.startswith("question.") for name in trained)
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == (name in trained), name
    module = MultimodalModule("instruct", model, parts, OptimConfig(), 1, seed=1)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"] and not any("question" in name for name in checkpoint["state_dict"])


def test_a_text_only_batch_runs_the_text_tower_too() -> None:
    model = packed(tiny_llava(), CDPRUNER)
    freeze(model, StageConfig(train_projector=True), adapters=False)
    model.train()
    ran = []
    for part in ("text_model", "text_projection", "visual_projection"):
        getattr(model.question.clip, part).register_forward_hook(lambda *_, part=part: ran.append(part))
    orders = []
    for images in ([0, 0], [2, 1]):
        ran.clear()
        inputs = tiny_inputs(images, [7, 9])
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        orders.append(list(ran))
    assert orders[0] == orders[1] != []


def test_flops_count_the_text_tower_and_the_projection() -> None:
    hf = tiny_llava()
    textual, blind = packed(hf, CDPRUNER), packed(hf, {"name": "dpp", "vision": CDPRUNER["vision"]})
    batch = collate([sample("a", [5], [10, 11]), sample("b", [5], [40, 41, 42])])
    counted = {}
    for model in (textual, blind):
        with torch.no_grad():
            trace = model.forward_packed(batch.sequence, batch.pixel_values).trace
        trace.vision_kept = []
        counted[model] = StepFlops(model)(trace, 1, 0)
        if model is textual:
            questions, tokens = trace.asked
    clip = textual.question.clip
    linears = sum(
        p.numel() for n, p in clip.text_model.encoder.named_parameters() if n.endswith("weight") and p.dim() > 1
    )
    expected = 2 * PATCHES * clip.visual_projection.weight.numel() + questions * (
        2 * clip.text_projection.weight.numel() + 2 * tokens * linears + 2 * tokens**2 * 24 * 2
    )
    assert questions == 2 and counted[textual] - counted[blind] == expected
    last = packed(hf, "recoverable")  # reads what the last block puts out: one block more than the features need
    cls_alone = packed(hf, {"name": "recoverable", "vision": {"recover": {"enabled": False}}})
    block = sum(p.numel() for p in hf.model.vision_tower.encoder.layers[-1].parameters() if p.dim() > 1)
    extra = (
        2 * (PATCHES + 1) * block + 4 * (PATCHES + 1) ** 2 * 32 + 2 * PATCHES * clip.visual_projection.weight.numel()
    )
    assert StepFlops(last).vision.total - StepFlops(cls_alone).vision.total == extra


# ---------------------------------------------------------------------- saving and loading


def clip_folder(hf: LlavaForConditionalGeneration, folder: Path) -> Path:
    """A whole CLIP checkpoint with its tokenizer, as hubs have them."""
    tiny_clip(hf).save_pretrained(folder)
    tiny_question_tokenizer().save_pretrained(folder)
    return folder


def test_a_whole_clip_checkpoint_is_read_without_its_vision_layers(tmp_path: Path) -> None:
    hf = tiny_llava()
    loaded = load_question_encoder(clip_folder(hf, tmp_path), torch.float32, "encoder.text.path")
    assert not len(loaded.clip.vision_model.encoder.layers)
    pairs = ImageQuestions([0, 1, 2], ["what is it", "", "word " * 200], torch.empty(0, dtype=torch.long))
    expected = QuestionEncoder(tiny_clip(hf), tiny_question_tokenizer()).ask(pairs)
    asked = loaded.ask(pairs)
    torch.testing.assert_close(asked.text, expected.text)
    assert asked.shape == (3, 77) and not asked.text[1].any() and asked.known.tolist() == [True, False, True]


@pytest.mark.parametrize(("pruner", "bites"), [("cdpruner", "count=10"), ("recoverable", "neighbors=3")])
def test_a_saved_model_brings_its_text_tower(pruner: str, bites: str, tmp_path: Path) -> None:
    model, processor = begin(compose_config(["+experiment=smoke", f"pruner={pruner}", f"pruner.vision.knee.{bites}"]))
    model.eval().save(tmp_path, processor)
    hf, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert set(hf.state_dict()) == set(model.hf.state_dict())
    _, info = CLIPModel.from_pretrained(tmp_path / "question", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(parameter.dim() for parameter in model.parameters()), "DeepSpeed cannot broadcast scalars"
    again, processor = load_model(tmp_path)
    text = ["USER: <image>\nWhat color is it? ASSISTANT:", "USER: <image>\nIs it round? ASSISTANT:"]
    images = [Image.effect_mandelbrot((48, 48), (-2, -1, 1, 1), n).convert("RGB") for n in (9, 30)]
    inputs = processor(images=images, text=text, return_tensors="pt", padding=True)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, equal_nan=True)
    assert len(again.generate(**inputs, max_new_tokens=3, do_sample=False)) == 2
    assert 0 < again.last_pruning.keep_ratio < 1
    assert load_model(tmp_path, pruner="none")[0].question is None
    shutil.rmtree(tmp_path / "question")
    with pytest.raises(UserError, match="no text tower in question/.*encoder.text.path") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_any_llava_folder_takes_a_text_tower_from_elsewhere(tmp_path: Path) -> None:
    model, processor = begin(compose_config(["+experiment=smoke", "pruner=none"]))
    model.save(tmp_path / "llava", processor)
    folder = clip_folder(model.hf, tmp_path / "clip")
    chosen, _ = load_model(tmp_path / "llava", pruner="cdpruner", text=folder)
    assert chosen.question is not None and chosen.question.width == 32
    with pytest.raises(UserError, match="no text tower"):
        load_model(tmp_path / "llava", pruner="cdpruner")
    other = clip_folder(copy.deepcopy(model.hf), tmp_path / "wide")
    wide = CLIPModel.from_pretrained(other).config
    wide.vision_config.hidden_size = 48
    wide.vision_config.num_attention_heads = 4
    CLIPModel(wide).save_pretrained(other)
    with pytest.raises(UserError, match="patches of width 48, the encoder of width 32"):
        load_model(tmp_path / "llava", pruner="cdpruner", text=other)
    with pytest.raises(UserError, match="holds a whole LLaVA .*give the CLIP that the encoder comes from"):
        load_model(tmp_path / "llava", pruner="cdpruner", text=tmp_path / "llava")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights") as caught:
        load_model(tmp_path / "llava", pruner="cdpruner", text=folder)
    assert "\n" not in str(caught.value)


def test_a_text_tower_is_built_for_pruners_that_read_and_for_no_others() -> None:
    reads = build_on_meta(compose_config(["pruner=cdpruner"]))
    assert reads.question is not None and {p.device.type for p in reads.parameters()} == {"meta"}
    language, visual = (
        sum(p.numel() for p in part.parameters())
        for part in (reads.question.clip.text_model, reads.question.clip.visual_projection)
    )
    assert (language, visual) == (123_060_480, 786_432)
    assert build_on_meta(compose_config([])).question is None
    with pytest.raises(UserError, match="pass `question`"):
        PackedLlava(tiny_llava(), Pruner(load_pruner("cdpruner")), annotate)
