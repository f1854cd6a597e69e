"""Every attention backend that a CPU has against plain attention under a mask; those of GPUs: tests/gpu."""

from __future__ import annotations

import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from tiny import labels_of, packed, tiny_inputs, tiny_llava
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention import varlen as varlen_module
from torch.nn.functional import scaled_dot_product_attention

from mmprune_train.config.schema import ATTENTION
from mmprune_train.errors import UserError
from mmprune_train.model import attention, kernels
from mmprune_train.model.kernels import BACKENDS, Backend, Borders, Needs, choose_backend

BY_NAME = {backend.name: backend for backend in BACKENDS}
HEADS = {"one_for_each": (4, 4), "grouped": (6, 2), "one_for_all": (4, 1)}
LENGTHS = {"ragged": [5, 1, 130, 260, 1, 7], "one": [300], "ones": [1, 1, 1], "whole_blocks": [128, 256, 128]}
CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    """[1, H, T, d] -> [1, T, H, d] in float64: softmax over the [T, T] scores, all but a sample's past at -inf."""
    sample = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)], device=q.device)
    place = torch.arange(len(sample), device=q.device)
    visible = (sample[:, None] == sample[None]) & (place[:, None] >= place[None])
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q.double() @ k.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def borders_of(lengths: list[int], backend: Backend, device: torch.device = CPU) -> Borders:
    return Borders(
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device), lengths, backend
    )


def check(
    backend: Backend,
    heads: tuple[int, int],
    lengths: list[int],
    dtype: torch.dtype,
    device: torch.device,
    train: bool,
    size: int = 16,
) -> None:
    generator = torch.Generator().manual_seed(1)
    total = sum(lengths)
    shapes = [(1, heads[0], total, size), (1, heads[1], total, size), (1, heads[1], total, size)]
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    ours = [x.clone().requires_grad_(train) for x in drawn]
    theirs = [x.clone().requires_grad_(train) for x in drawn]
    scale = 1.48 / size**0.5  # not the default, so that a scale which is not passed on is seen
    out = backend.run(*ours, borders_of(lengths, backend, device), scale, 0.0)
    expected = plain(*theirs, lengths, scale)
    near = 2e-5 if dtype == torch.float32 else 0.02
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=near, atol=near)
    if train:
        weights = torch.randn(expected.shape, generator=generator).to(device)
        (out * weights.to(dtype)).sum().backward()
        (expected * weights.double()).sum().backward()
        for mine, reference in zip(ours, theirs, strict=True):
            largest = max(1.0, float(reference.grad.abs().max()))
            torch.testing.assert_close(mine.grad.double(), reference.grad.double(), rtol=near, atol=near * largest)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["cpu_flash", "sdpa_per_sample"])
def test_every_backend_equals_plain_attention(
    name: str, dtype: torch.dtype, heads: tuple[int, int], lengths: list[int]
) -> None:
    if reason := BY_NAME[name].missing(Needs(CPU, dtype, head_dim=16)):
        pytest.skip(f"{name}: {reason}")
    check(BY_NAME[name], heads, lengths, dtype, CPU, train=True)


def test_on_a_cpu_gradients_in_bf16_are_exact_to_the_rounding_of_what_enters() -> None:
    """torch's own backward pass in bf16 is not: its sums are rounded on the way."""
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn((1, heads, 300, 64), generator=generator).bfloat16() for heads in (6, 2, 2)]
    weights = torch.randn((1, 300, 6, 64), generator=generator).bfloat16()

    def gradients(run: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in drawn]
        run(*inputs).backward(weights.to(dtype))
        return [x.grad.double() for x in inputs]

    exact = gradients(lambda *qkv: plain(*qkv, [300], 0.125), torch.float64)
    ours, torchs = (
        gradients(lambda *qkv, b=BY_NAME[name]: b.run(*qkv, borders_of([300], b), 0.125, 0.0), torch.bfloat16)
        for name in ("cpu_flash", "sdpa_per_sample")
    )
    for reference, mine, theirs in zip(exact, ours, torchs, strict=True):
        off, torchs_off = ((x - reference).norm() / reference.norm() for x in (mine, theirs))
        assert off < 0.003 and off <= torchs_off + 1e-5


# ---------------------------------------------------------------------- FlexAttention, as far as a CPU goes


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_flex_on_a_cpu_equals_plain_attention_forward(heads: tuple[int, int], lengths: list[int]) -> None:
    check(BY_NAME["flex"], heads, lengths, torch.float32, CPU, train=False)


@pytest.mark.parametrize("lengths", [*LENGTHS.values(), [64, 64, 300, 20], [127, 1, 129]], ids=str)
def test_the_block_mask_is_the_one_that_the_whole_mask_gives(lengths: list[int]) -> None:
    borders = borders_of(lengths, BY_NAME["flex"])
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    total = len(sample)
    expected = flex_module.create_block_mask(
        lambda b, h, q, k: (sample[q] == sample[k]) & (q >= k), None, None, total, total, device="cpu"
    )
    ours = borders.block_mask
    assert ours.shape == expected.shape and torch.equal(ours.to_dense(), expected.to_dense())
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        assert torch.equal(getattr(ours, counts), getattr(expected, counts))
        for row, count in enumerate(getattr(ours, counts)[0, 0].tolist()):
            mine, theirs = (getattr(mask, indices)[0, 0, row, :count] for mask in (ours, expected))
            assert torch.equal(mine, theirs)
    assert borders.block_mask is ours  # made once for all layers


def test_flex_does_not_recompile_for_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(flex_module.flex_attention, dynamic=True, backend=counter)
    monkeypatch.setattr(kernels, "flex_attention", compiled)
    for lengths in ([150, 80], [300], [20, 130, 400], [257, 33], [129, 500, 128]):
        check(BY_NAME["flex"], (4, 2), lengths, torch.float32, CPU, train=False)
    assert counter.frame_count <= 2  # the second for block masks of any size


# ---------------------------------------------------------------------- the CUDA packages' calling conventions


def reference_kernel(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float | None) -> Tensor:
    """[T, H, d] -> [T, H, d], as the packages describe theirs."""
    assert cu.dtype == torch.int32 and cu[0] == 0 and cu[-1] == len(q) and longest == int(cu.diff().max())
    assert q.dim() == 3 and q.shape[0] == k.shape[0] and k.shape == v.shape and q.shape[2] == k.shape[2]
    lengths = cu.diff().tolist()
    return plain(*(x.transpose(0, 1)[None] for x in (q, k, v)), lengths, scale or q.shape[-1] ** -0.5)[0].to(q.dtype)


def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert causal and max_seqlen_q == max_seqlen_k and cu_seqlens_q is cu_seqlens_k and dropout_p == 0.0
    return reference_kernel(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)


def flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    assert causal and max_seqlen_q == max_seqlen_k and cu_seqlens_q is cu_seqlens_k and seqused_q is qv is None
    return reference_kernel(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)


def flash_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
):  # fmt: skip
    assert causal and max_seqlen_q == max_seqlen_k and cu_seqlens_q is cu_seqlens_k and seqused_q is qv is None
    return reference_kernel(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale), torch.zeros(q.shape[1], len(q))


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int,
    *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None,
    num_splits=None,
) -> Tensor:  # fmt: skip
    assert window_size == (-1, 0) and max_q == max_k and cu_seq_q is cu_seq_k
    assert enable_gqa or query.shape[1] == key.shape[1]
    return reference_kernel(query, key, value, cu_seq_q, max_q, scale)


PACKAGES = {
    "flash_4": ("flash_attn.cute", "flash_attn_varlen_func", flash_4),
    "flash_3": ("flash_attn_interface", "flash_attn_varlen_func", flash_3),
    "flash_2": ("flash_attn", "flash_attn_varlen_func", flash_2),
    "torch_varlen": ("torch.nn.attention.varlen", "varlen_attn", varlen_attn),
    "flex": ("triton", "__version__", "3"),
}
"""What each backend imports, with the signatures of the packages' newest releases."""


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Put stand-ins for these backends' packages in place, and none for the others'."""

    def put(*names: str, capability: tuple[int, int] = (8, 0)) -> None:
        kernels.installed.cache_clear()
        for name, (module, attribute, stand_in) in PACKAGES.items():
            if name == "torch_varlen":
                monkeypatch.setattr(varlen_module, attribute, stand_in)
                monkeypatch.setattr(
                    torch.backends.cuda, "is_flash_attention_available", lambda: "torch_varlen" in names
                )
            elif name in names:
                fake = types.ModuleType(module)
                setattr(fake, attribute, stand_in)
                monkeypatch.setitem(sys.modules, module, fake)
            else:
                monkeypatch.setitem(sys.modules, module, None)
        if "flash_4" in names and "flash_2" not in names:
            monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    yield put
    kernels.installed.cache_clear()


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("name", ["flash_4", "flash_3", "flash_2", "torch_varlen"])
def test_the_call_fits_the_packages_signature(name: str, heads: tuple[int, int], install: Callable[..., None]) -> None:
    install(name)
    check(BY_NAME[name], heads, LENGTHS["ragged"], torch.float32, CPU, train=True)


def test_the_stand_in_for_torchs_varlen_attention_has_its_signature() -> None:
    ours, real = (inspect.signature(function).parameters for function in (varlen_attn, varlen_module.varlen_attn))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [(p.name, p.kind, p.default) for p in real.values()]


# ---------------------------------------------------------------------- the choice


def test_names_in_the_config_are_those_of_the_backends() -> None:
    assert list(ATTENTION) == ["auto", *BY_NAME]


def test_on_a_cpu_it_is_torchs_kernel_and_the_others_say_what_they_lack() -> None:
    for dtype, expected in ((torch.float32, "sdpa_per_sample"), (torch.bfloat16, "cpu_flash")):
        backend, reason = choose_backend("auto", CPU, dtype, 64)
        assert (backend.name, reason) == (expected, "on a CPU")
    assert choose_backend("auto", CPU, torch.bfloat16, 64, dropout=0.1)[0].name == "sdpa_per_sample"
    with pytest.raises(UserError, match="cpu_flash: is for bf16 and fp16"):
        choose_backend("cpu_flash", CPU, torch.float32, 64)
    for name in BY_NAME.keys() - {"cpu_flash", "sdpa_per_sample"}:
        with pytest.raises(UserError, match=rf"trainer\.attention={name}: .*CUDA device.*trainer\.attention=auto"):
            choose_backend(name, CPU, torch.bfloat16, 64)


EVERYTHING = ("flash_4", "flash_3", "flash_2", "torch_varlen", "flex")


@pytest.mark.parametrize(
    ("there", "capability", "dtype", "head_dim", "dropout", "expected"),
    [
        (EVERYTHING, (10, 0), torch.bfloat16, 128, 0.0, "flash_4"),
        (EVERYTHING, (10, 0), torch.bfloat16, 256, 0.0, "flash_2"),
        (EVERYTHING, (9, 0), torch.bfloat16, 64, 0.0, "flash_3"),
        (EVERYTHING, (8, 6), torch.float16, 64, 0.0, "flash_2"),
        (EVERYTHING, (12, 0), torch.bfloat16, 64, 0.0, "flash_2"),
        (EVERYTHING, (9, 0), torch.bfloat16, 64, 0.1, "flash_2"),
        (EVERYTHING, (9, 0), torch.float32, 64, 0.0, "flex"),
        (EVERYTHING, (9, 0), torch.float32, 64, 0.1, "sdpa_per_sample"),
        (EVERYTHING, (7, 5), torch.float16, 64, 0.0, "flex"),
        (EVERYTHING, (6, 1), torch.float16, 64, 0.0, "sdpa_per_sample"),
        (EVERYTHING, (8, 0), torch.bfloat16, 12, 0.0, "sdpa_per_sample"),
        (("torch_varlen", "flex"), (9, 0), torch.bfloat16, 64, 0.0, "torch_varlen"),
        (("flex",), (9, 0), torch.bfloat16, 64, 0.0, "flex"),
        ((), (9, 0), torch.bfloat16, 64, 0.0, "sdpa_per_sample"),
    ],
)
def test_on_a_gpu_the_fastest_that_fits_is_chosen(
    there: tuple[str, ...],
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    dropout: float,
    expected: str,
    install: Callable[..., None],
) -> None:
    install(*there, capability=capability)
    backend, reason = choose_backend("auto", CUDA, dtype, head_dim, dropout)
    assert backend.name == expected
    better = list(BY_NAME)[: list(BY_NAME).index(expected)]
    assert all(f"{name}: " in reason for name in better)  # why each of them was passed over


def test_what_cannot_run_is_refused_with_what_is_missing(install: Callable[..., None]) -> None:
    install("flash_3", capability=(8, 0))
    with pytest.raises(UserError, match="flash_3: needs a GPU of compute capability 9.0 to 9.x, this one has 8.0"):
        choose_backend("flash_3", CUDA, torch.bfloat16, 64)
    with pytest.raises(UserError, match="flash_2: flash_attn cannot be imported"):
        choose_backend("flash_2", CUDA, torch.bfloat16, 64)
    with pytest.raises(UserError, match="needs bf16 or fp16, not float32"):
        choose_backend("torch_varlen", CUDA, torch.float32, 64)
    assert choose_backend("sdpa_per_sample", CUDA, torch.float32, 64)[1] == "as trainer.attention asks"


def test_under_autocast_the_dtype_that_counts_is_autocasts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(attention, "choose_backend", lambda *needs: seen.append(needs))
    config = tiny_llava().model.language_model.config
    attention.backend_for("auto", config, CPU, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        attention.backend_for("auto", config, CPU, torch.float32)
    assert seen == [("auto", CPU, dtype, 12, 0.0) for dtype in (torch.float32, torch.bfloat16)]


# ---------------------------------------------------------------------- the whole model


@pytest.mark.parametrize("name", BY_NAME)
def test_the_whole_model_equals_the_padded_hugging_face_model(
    name: str, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = BY_NAME[name]
    trains = name != "flex"  # not on a CPU
    if name in PACKAGES and name != "flex":
        install(name)  # a stand-in, for any device and dtype
    monkeypatch.setattr(attention, "choose_backend", lambda *needs: (backend, ""))
    hf = tiny_llava()
    model = packed(hf).train()
    inputs = tiny_inputs([2, 0, 1], [7, 9, 1], pad_left=True)
    labels = labels_of(inputs)
    with torch.set_grad_enabled(trains):
        reference, ours = hf(**inputs, labels=labels), model(**inputs, labels=labels)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours.logits[real], reference.logits[real], rtol=1e-4, atol=1e-4)
    if trains:
        reference.loss.backward()
        ours.loss.backward()
        weights = [part.model.language_model.layers[0].self_attn.k_proj.weight for part in (hf, model.hf)]
        torch.testing.assert_close(weights[1].grad, weights[0].grad, rtol=1e-3, atol=1e-5)
    expected = hf.eval().generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.eval().generate(**inputs, max_new_tokens=4, do_sample=False), expected)


def test_the_model_attends_with_what_its_setting_names() -> None:
    model = packed(tiny_llava(), attention="flash_2")
    with pytest.raises(UserError, match="trainer.attention=flash_2: needs a CUDA device"):
        model(**tiny_inputs([1], [6]))


def test_dropout_is_passed_on() -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 2, 4, 16) for _ in range(3))
    backend = BY_NAME["sdpa_per_sample"]
    torch.manual_seed(4)
    out = backend.run(q, k, v, borders_of([4], backend), 0.25, 0.5)
    torch.manual_seed(4)
    expected = scaled_dot_product_attention(q, k, v, dropout_p=0.5, scale=0.25, is_causal=True).transpose(1, 2)
    assert torch.equal(out, expected)
