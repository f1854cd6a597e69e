"""Published stage-1 methods re-derived slowly, one image at a time, from what plain transformers computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.neighbors import LocalOutlierFactor
from tiny import IMAGE_TOKEN, PATCHES, spell, tiny_clip, words
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from mmprune_train.model.content_words import LEFT_OUT
from mmprune_train.model.question import tiny_question_tokenizer
from mmprune_train.pruning.merging import centres
from mmprune_train.pruning.vision_scores import even_order

FACTOR = 0.2  # nine patches have no outliers at 1.5


@dataclass
class Seen:
    """One image, as plain transformers shows it."""

    states: Tensor
    """[N, D] features."""
    projected: Tensor
    """[N, D']."""
    attention: Tensor
    """[N] CLS row of the block that made the features, each head normalised over the patches."""
    within: Tensor
    """[N] the same, each head normalised over CLS and patches."""
    keys: Tensor
    """[N, D] of that block."""
    cls: Tensor
    """[D] the CLS token beside the features."""
    wide: Tensor
    """[N] PruMerge's row of the last block."""
    last_keys: Tensor
    """[N, D] of the last block."""
    text: Tensor
    """[N] CLIP's similarity of the features and the question of the image's sample."""
    bare: Tensor
    """[N] the same of the last hidden state, without CLIP's last norm."""
    words: Tensor
    """[W, D'] the LLM's embeddings of the words of that question that MMTok reads."""


def looked_at(hf: LlavaForConditionalGeneration, inputs: dict[str, Tensor], images: list[int]) -> list[Seen]:
    pixels = inputs["pixel_values"]
    tower = copy.deepcopy(hf.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
        row = out.attentions[-2][:, :, 0, 1:]
        made, last = tower.encoder.layers[-2], tower.encoder.layers[-1]
        keys = made.self_attn.k_proj(made.layer_norm1(out.hidden_states[-3]))[:, 1:]
        normed = last.layer_norm1(out.hidden_states[-2])
        query, last_keys = last.self_attn.q_proj(normed[:, :1]), last.self_attn.k_proj(normed)
        wide = (query @ last_keys.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)[:, 0, 1:]
        states = out.hidden_states[-2][:, 1:]
        projected = hf.model.multi_modal_projector(states)
    attention = (row / row.sum(-1, keepdim=True)).mean(1)
    text, bare, meant_by = [], [], []
    clip = tiny_clip(hf)
    for image, question in enumerate(asked_of(inputs, images)):
        with torch.no_grad():
            hidden = clip.vision_model(pixels[image : image + 1], output_hidden_states=True).hidden_states
            read = tiny_question_tokenizer()(question, return_tensors="pt")
            meant = clip.get_text_features(read["input_ids"]).pooler_output[0]
            normed = clip.visual_projection(clip.vision_model.post_layernorm(hidden[-2][0, 1:]))
            plain_states = clip.visual_projection(hidden[-1][0, 1:])
        text.append(torch.tensor([alike(patch, meant) for patch in normed]))
        bare.append(torch.tensor([alike(patch, meant) for patch in plain_states]))
        read = [word for word in question.split() if word not in LEFT_OUT.split()]
        ids = torch.tensor(spell(" ".join(read or question.split())), dtype=torch.long)
        meant_by.append(hf.model.language_model.embed_tokens.weight[ids].detach())
    within, cls = row.mean(1), out.hidden_states[-2][:, 0]
    parts = (states, projected, attention, within, keys, cls, wide, last_keys[:, 1:], text, bare, meant_by)
    seen = zip(*parts, strict=True)
    return [Seen(*image) for image in seen]


def asked_of(inputs: dict[str, Tensor], images: list[int]) -> list[str]:
    """The question of each image: its sample's text but for the first and the last token."""
    questions = []
    for row, count in enumerate(images):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][1:-1]
        questions += [words(ids[ids != IMAGE_TOKEN])] * count
    return questions


Answer = tuple[list[int], dict[int, Tensor]]
"""Patches in the order in which they enter the LLM, and the feature that each place holds."""


def best(scores: Tensor, count: int) -> list[int]:
    return scores.argsort(descending=True, stable=True)[:count].tolist()


def alike(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


def plain(seen: Seen, kept: list[int]) -> Answer:
    return sorted(kept), {i: seen.states[i] for i in kept}


def uniform(seen: Seen) -> Answer:
    return plain(seen, best(-even_order(3, 3), 5))


def outliers(scores: Tensor) -> int:
    q1, q3 = np.percentile(scores.numpy(), [25, 75])
    return max(1, int((scores.numpy() > q3 + FACTOR * (q3 - q1)).sum()))


def prumerge_of(seen: Seen, kept: list[int]) -> Answer:
    s, keys, features = seen.wide, seen.last_keys, {}
    order = sorted(kept, key=lambda i: -float(s[i]))
    for i in kept:
        near = sorted((j for j in range(PATCHES) if j != i), key=lambda j: -alike(keys[i], keys[j]))[:3]
        features[i] = seen.states[i] + sum(s[j] * seen.states[j] for j in near)
    gone = [j for j in range(PATCHES) if j not in kept]
    if gone:
        place = max(gone, key=lambda j: float(s[j]))
        features[place] = sum(s[j] * seen.states[j] for j in gone)
        order.append(place)
    return order, features


def prumerge(seen: Seen) -> Answer:
    return prumerge_of(seen, best(seen.wide, outliers(seen.wide)))


def prumerge_plus(seen: Seen) -> Answer:
    count = outliers(seen.wide)
    spacing = max(1, PATCHES // count // 3)
    return prumerge_of(seen, sorted({*best(seen.wide, count), *range(0, PATCHES - 1, spacing)}))


def visionzip(seen: Seen) -> Answer:
    kept = best(seen.within, 4)
    gone = [j for j in range(PATCHES) if j not in kept]
    targets = gone[:: len(gone) // 2][:2]
    others = [j for j in gone if j not in targets]
    metric = torch.stack(seen.keys.split(8, 1)).mean(0)
    home = {j: max(targets, key=lambda t: alike(metric[j], metric[t])) for j in others}
    order, features = plain(seen, kept)
    for t in targets:
        members = [j for j in others if home[j] == t]
        features[t] = seen.states[t] + (seen.states[members].mean(0) if members else 0)
    place = min(others)
    features[place] = seen.cls
    return [place, *order, *targets], features


def fastervlm(seen: Seen) -> Answer:
    return plain(seen, best(seen.within, 4))


def vispruner(seen: Seen) -> Answer:
    order = best(seen.within, PATCHES)
    important, rest = order[:2], order[2:]  # half of 5, rounded down
    while len(rest) > 3:
        even, odd = rest[::2], rest[1::2]
        even.sort(key=lambda i: -max(alike(seen.states[i], seen.states[j]) for j in odd))
        rest = even[min(8, len(rest) - 3, len(even)) :] + odd
    return plain(seen, [*important, *rest])


def divprune(seen: Seen) -> Answer:
    far = [[1 - alike(a, b) for b in seen.projected] for a in seen.projected]
    chosen = [max(range(PATCHES), key=lambda i: sorted(far[i])[1])]  # its own zero comes first
    while len(chosen) < 5:
        others = [i for i in range(PATCHES) if i not in chosen]
        chosen.append(max(others, key=lambda i: min(far[i][j] for j in chosen)))
    return plain(seen, chosen)


def dpp(seen: Seen) -> Answer:
    return most_volume(seen, seen.attention)


def cdpruner(seen: Seen) -> Answer:
    return most_volume(seen, -seen.text)


def most_volume(seen: Seen, s: Tensor) -> Answer:
    quality = ((s - s.min() + 1e-6) / (s.max() - s.min())).double()
    unit = torch.nn.functional.normalize(seen.projected.double(), dim=-1)
    kernel = quality[:, None] * (unit @ unit.T) * quality
    chosen: list[int] = []
    for _ in range(4):
        others = [i for i in range(PATCHES) if i not in chosen]
        chosen.append(max(others, key=lambda i: float(torch.logdet(kernel[[*chosen, i]][:, [*chosen, i]]))))
    return plain(seen, chosen)


def stand_out(scores: Tensor) -> int:
    """Outliers by scikit-learn, as the method's authors count."""
    scaled = (scores - scores.min()) / (scores.max() - scores.min())
    found = LocalOutlierFactor(n_neighbors=min(2, len(scores) - 1)).fit_predict(scaled.double().numpy()[:, None])
    return int((found == -1).sum())


def recoverable(seen: Seen) -> Answer:
    first = best(seen.wide, max(1, stand_out(seen.wide)))
    gone = [j for j in range(PATCHES) if j not in first]
    curve = seen.bare.clone()
    curve[first] = curve.min()
    count = stand_out(curve) * len(gone) // PATCHES
    back = sorted(gone, key=lambda j: -float(seen.bare[j]))[:count]
    kept = torch.zeros(1, PATCHES, dtype=torch.bool)
    kept[0, [*first, *back]] = True
    features, places = centres(  # held to its own re-derivation in tests/pruning/test_merging.py
        seen.states[None],
        kept,
        seen.wide[None],
        seen.last_keys[None],
        seen.bare[None],
        count=3,
        share_of="width",
        keys_of="renumbered",
    )
    order = sorted([*first, *back])
    made = [i for i in places[0].nonzero().squeeze(1).tolist() if i not in order]
    order += sorted(made, key=lambda i: -float(seen.wide[i]))
    return order, {i: features[0, i] for i in order}


def windowed(seen: Seen) -> Answer:
    """Six of nine patches, of windows 2 x 2, 2 x 1, 1 x 2 and 1 x 1: the best of each, then the best of the seconds."""
    attention = seen.attention.tolist()
    windows = [[0, 1, 3, 4], [2, 5], [6, 7], [8]]
    ranked = [sorted(window, key=lambda i: -attention[i]) for window in windows]
    seconds = sorted((window[1] for window in ranked if len(window) > 1), key=lambda i: -attention[i])
    order = sorted([window[0] for window in ranked] + seconds[:2])
    return order, {i: seen.states[i] for i in order}


def covered(rows: list[Tensor], weights: Tensor) -> list[int]:
    """Four patches, greedily: the sum of the rows' largest values among the chosen ones grows most, times a weight."""
    chosen: list[int] = []

    def reached(patches: list[int]) -> float:
        return sum(max([0.0, *(float(row[i]) for i in patches)]) for row in rows)

    while len(chosen) < 4:
        others = [i for i in range(PATCHES) if i not in chosen]
        before = reached(chosen)
        chosen.append(max(others, key=lambda i: (reached([*chosen, i]) - before) * float(weights[i])))
    return chosen


def scope(seen: Seen) -> Answer:
    rows = [torch.cosine_similarity(state[None], seen.states) for state in seen.states]
    return plain(seen, covered(rows, seen.within))


def mmtok(seen: Seen) -> Answer:
    words, patches = len(seen.words), len(seen.states)
    asked = [torch.cosine_similarity(word[None], seen.projected) / 0.02 for word in seen.words]
    looks = [torch.cosine_similarity(state[None], seen.states) / 0.2 for state in seen.states]
    rows = [row.softmax(0) / words for row in asked] + [0.5 * row.softmax(0) / patches for row in looks]
    return plain(seen, covered(rows, torch.ones(PATCHES)))


def holov(seen: Seen) -> Answer:
    """Five of nine patches, of crops of 3, 2, 2 and 2."""
    crops, worths = [[0, 1, 2], [3, 4], [5, 6], [7, 8]], []
    for crop in crops:
        spread = []
        for i in crop:
            near = [0.0 if i == j else alike(seen.projected[i], seen.projected[j]) for j in crop]
            mean = sum(near) / (len(crop) - 1)
            spread.append(sum((one - mean) ** 2 for one in near) / (len(crop) - 1))
        attention = 1000 * seen.within[crop]
        scale = attention.mean() / (sum(spread) / len(crop) + 1e-6)
        worths.append(float((attention + 0.09 * torch.tensor(spread) * scale).mean()))
    counts = [int(5 * worth / (sum(worths) + 1e-6)) for worth in worths]
    for lucky in sorted(range(4), key=lambda c: -worths[c])[: 5 - sum(counts)]:
        counts[lucky] += 1
    kept = [crop[i] for crop, n in zip(crops, counts, strict=True) for i in best(seen.within[crop], n)]
    others = sorted((i for i in range(PATCHES) if i not in kept), key=lambda i: -float(seen.within[i]))
    return plain(seen, [*kept, *others[: 5 - len(kept)]])


def downsample(seen: Seen) -> Answer:
    """Four cells of a grid of 3 x 3: 2 x 2 patches each, which share the middle ones."""
    corners = [0, 1, 3, 4]
    return corners, {i: seen.states[[i, i + 1, i + 3, i + 4]].mean(0) for i in corners}


SLOW: dict[str, Callable[[Seen], Answer]] = {
    "uniform": uniform,
    "prumerge": prumerge,
    "prumerge_plus": prumerge_plus,
    "visionzip": visionzip,
    "fastervlm": fastervlm,
    "vispruner": vispruner,
    "windowed": windowed,
    "divprune": divprune,
    "dpp": dpp,
    "cdpruner": cdpruner,
    "recoverable": recoverable,
    "scope": scope,
    "mmtok": mmtok,
    "holov": holov,
    "downsample": downsample,
}
