"""Every experiment and every short override of the contract composes into a typed, checked config."""

import itertools
from pathlib import Path

import pytest
import yaml

from mmprune_train.config.compose import compose_config, config_from_file, load_pruner, to_yaml
from mmprune_train.errors import UserError
from mmprune_train.storage.conf import conf_dir, options
from mmprune_train.usage import GROUPS

TINY = ["encoder=tiny_clip", "llm=tiny_llama"]


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes_under_its_own_name(name):
    config = compose_config([f"+experiment={name}"])
    assert config.experiment_name == name
    assert config.stages == ["pretrain", "instruct"]


def test_the_experiments_of_the_contract_exist():
    wanted = {"smoke", "demo", "llava7b_dense", "llava7b_twostage", "llava7b_twostage_lora", "llava13b_twostage"}
    assert wanted <= set(options("experiment"))


def _single_overrides():
    groups = [group for group in GROUPS if group not in ("experiment", "sweep")]
    for group, name in itertools.chain.from_iterable([(g, n) for n in options(g)] for g in groups):
        extra = ["pruner.vision.score=pooled_cosine"] if name.startswith("siglip") else []
        extra += ["pruner=learned"] if name == "above_zero" else []
        extra += ["trainer.devices=2", "strategy=ddp"] if name == "eight_gpus" else []
        extra += [f"data.{part}.annotations=x.json" for part in ("pretrain", "instruct")] if name == "files" else []
        extra += ["data.midtrain.annotations=x.json"] if name == "llava_onevision" else []
        yield pytest.param([f"{group}={name}", *extra], id=f"{group}={name}")


@pytest.mark.parametrize("overrides", list(_single_overrides()))
def test_every_option_fits_the_smoke_experiment(overrides):
    config = compose_config(["+experiment=smoke", *overrides])
    group, name = overrides[0].split("=")
    chosen = getattr(config, group)
    if group not in ("logger", "trainer", "stage") and name != "deepspeed_llava":
        assert getattr(chosen, "method" if group == "knee" else "name") == name


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("pruner.vision.score=cls_cosine", "pruner.vision.score", "cls_cosine"),
        ("pruner.language.layer=3", "pruner.language.layer", 3),
        ("pruner.language.layer=[1,3]", "pruner.language.layer", [1, 3]),
        ("strategy=deepspeed_zero3", "strategy.name", "deepspeed_zero3"),
        ("peft=lora", "peft.r", 8),
        ("pruner=none", "pruner.vision.enabled", False),
    ],
)
def test_a_short_override_changes_its_key(override, key, value):
    node = compose_config(["+experiment=smoke", override])
    for part in key.split("."):
        node = getattr(node, part)
    assert node == value


@pytest.mark.parametrize(
    ("override", "on"),
    [("logger=[wandb,csv]", {"wandb", "csv"}), ("logger=csv", {"csv"}), ("logger=tensorboard", {"tensorboard"})],
)
def test_one_or_several_loggers(override, on):
    logger = compose_config([override]).logger
    assert {name for name in ("csv", "tensorboard", "wandb") if getattr(logger, name) is not None} == on


def test_both_budgets_follow_the_knee_group_and_can_leave_it():
    config = compose_config(["knee=max_chord", "knee.min_tokens=7", "pruner.language.knee.method=fixed_count"])
    assert config.pruner.vision.knee.method == "max_chord"
    assert config.pruner.language.knee.method == "fixed_count"
    assert config.pruner.vision.knee.min_tokens == config.pruner.language.knee.min_tokens == 7


def test_fastv_keeps_its_own_budget_whatever_the_knee_group():
    pruner = compose_config(["pruner=fastv", "knee=max_chord"]).pruner
    assert (pruner.vision.enabled, pruner.language.knee.method, pruner.language.knee.ratio) == (
        False,
        "fixed_ratio",
        0.5,
    )


def test_llava_recipe_numbers():
    config = compose_config(["+experiment=llava7b_twostage"])
    first, second = config.stage["pretrain"], config.stage["instruct"]
    assert (first.global_batch_size, first.lr, first.strategy, first.template) == (
        256,
        1e-3,
        "deepspeed_zero2",
        "plain",
    )
    assert (first.train_projector, first.train_llm, first.image_aspect_ratio) == (True, False, "square")
    assert (second.global_batch_size, second.lr, second.strategy or config.strategy.name) == (
        128,
        2e-5,
        "deepspeed_zero3",
    )
    assert (second.train_llm, second.image_aspect_ratio, second.group_by_modality) == (True, "pad", True)
    assert (config.optim.weight_decay, config.optim.grad_clip, config.optim.warmup_ratio) == (0.0, None, 0.03)
    assert config.peft.name == "none"


def test_llava_lora_recipe_numbers():
    config = compose_config(["+experiment=llava7b_twostage_lora"])
    second = config.stage["instruct"]
    assert (config.peft.r, config.peft.alpha, config.peft.dropout, config.peft.target_modules) == (128, 256, 0.05, [])
    assert (second.lr, second.projector_lr, second.use_peft, second.group_by_modality) == (2e-4, 2e-5, True, True)
    assert config.stage["pretrain"].lr == 1e-3


def test_a_strategy_override_reaches_both_stages_of_the_llava_recipe():
    config = compose_config(["+experiment=llava7b_dense", "strategy=ddp"])
    assert {stage.strategy or config.strategy.name for stage in config.stage.values()} == {"ddp"}


def test_the_global_batch_does_not_depend_on_the_devices():
    config = compose_config(["+experiment=llava7b_dense", "trainer.devices=4"])
    assert config.stage["pretrain"].global_batch_size == 256


@pytest.mark.parametrize("name", ["demo", "smoke", "throughput"])
@pytest.mark.parametrize("data", ["files", "llava_v1_5"])
def test_limits_and_step_counts_of_an_experiment_belong_to_its_own_data(name, data):
    own = compose_config([f"+experiment={name}"])
    assert all(getattr(own.data, part).limit and own.stage[part].max_steps for part in own.stages)
    files = [f"data.{part}.annotations=x.json" for part in own.stages]
    other = compose_config([f"+experiment={name}", f"data={data}", *files])
    assert all(getattr(other.data, part).limit is None for part in (*other.stages, "evaluate"))
    assert all(other.stage[part].max_steps is None for part in other.stages) and other.evaluate.limit is None
    asked = compose_config(
        [f"+experiment={name}", f"data={data}", *files, "data.instruct.limit=7", "stage.instruct.max_steps=3"]
    )
    assert (asked.data.instruct.limit, asked.stage["instruct"].max_steps) == (7, 3)


def test_yaml_of_a_run_reads_back_equal(tmp_path: Path):
    config = compose_config(["+experiment=demo", "logger=[wandb,csv]", "pruner.language.layer=[2,8]"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert config_from_file(tmp_path / "config.yaml") == config


def test_a_run_directory_without_config_is_the_users_mistake(tmp_path: Path):
    with pytest.raises(UserError, match="run directory"):
        config_from_file(tmp_path / "config.yaml")


class TestLoadPruner:
    def test_by_name_equals_the_composed_one(self):
        for name in options("pruner"):
            assert load_pruner(name) == compose_config([f"pruner={name}"]).pruner

    def test_none_is_the_dense_model(self):
        pruner = load_pruner(None)
        assert not pruner.vision.enabled
        assert not pruner.language.enabled

    def test_mapping_starts_from_the_preset_it_names(self):
        pruner = load_pruner({"name": "fastv", "language": {"layer": 3}})
        assert (pruner.language.layer, pruner.language.score, pruner.vision.enabled) == (
            3,
            "last_token_attention",
            False,
        )

    def test_saved_mapping_reads_back_equal(self):
        pruner = load_pruner({"name": "mine", "vision": {"knee": {"method": "fixed_count", "count": 9}}})
        tree = yaml.safe_load(to_yaml(pruner))
        assert load_pruner(tree) == pruner

    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            ("twostge", "did you mean twostage"),
            ({"vison": {}}, "pruner.vision"),
            ({"vision": {"scroe": "random"}}, "pruner.vision.score"),
            ({"vision": {"score": "cls_atention"}}, "did you mean cls_attention"),
            ({"vision": {"knee": {"ratio": "half"}}}, "half"),
        ],
    )
    def test_mistakes_name_the_nearest_right_word(self, spec, words):
        with pytest.raises(UserError, match=words):
            load_pruner(spec)


def test_no_yaml_file_is_unreachable():
    assert {path.name for path in conf_dir().iterdir() if path.is_dir()} == set(GROUPS)
