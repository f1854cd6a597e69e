"""Wrong settings are refused with a message that names the key and the remedy."""

import pytest

from mmprune_train.config.command import Command
from mmprune_train.config.compose import compose_config, config_from_file, to_yaml
from mmprune_train.config.notes import idle_budgets, idle_knee, notes
from mmprune_train.errors import UserError

RECYCLE = "pruner.language.merge=recycle"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pruner=twostge", "pruner=twostge.*did you mean twostage"),
        ("prunner=none", "prunner.*did you mean pruner"),
        ("pruner.vision.scroe=random", "did you mean pruner.vision.score"),
        ("pruner.score=random", "did you mean pruner.vision.score"),
        ("+trainer.device=2", "did you mean trainer.devices"),
        ("stage.pretrian.lr=1", "did you mean stage.pretrain.lr"),
        ("logger=[wndb]", "did you mean wandb"),
        ("knee=kneedl", "did you mean kneedle"),
        ("knee.method=kneedl", "knee.method=kneedl.*did you mean kneedle"),
        ("pruner.language.score=text_atention", "did you mean text_attention"),
        ("+experiment=dmeo", "did you mean demo"),
        ("experiment=demo", r"\+experiment"),
        ("+pruner=none", "without the plus"),
        ("+seed=1", "without the plus"),
        ("seed=1,2", "-m"),
        ("trainer.devices=two", "trainer.devices=two"),
        ("stages=pretrain", "list"),
        ("a=[", "readable"),
        ("encoder=", "one of"),
        ("data.root=${nowhere}", "nowhere"),
    ],
)
def test_typos_are_answered_with_the_nearest_valid_word(override, words):
    with pytest.raises(UserError, match=words) as caught:
        compose_config([override])
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages=[instruct,pretrain]"], "in order"),
        (["stages=[]"], "empty"),
        (["evaluate.budgets=[0.22,0.2200001]"], r"evaluate.budgets=\[0.22, 0.2200001\]: two shares have one name"),
        (["stages=[pretran]"], "did you mean pretrain"),
        (["stage.instruct.global_batch_size=9"], "global_batch_size=8"),
        (["stage.instruct.batch_size=0"], "at least 1"),
        (["stage.instruct.token_budget=0"], "token_budget=0 must be at least 1"),
        (
            ["stages=[instruct]", "stage.instruct.token_budget=900", "strategy=ddp", "trainer.devices=3"],
            "global_batch_size=8 is no multiple of 3 processes: set stage.instruct.global_batch_size=9",
        ),
        (["stage.pretrain.train_projector=false"], "trains nothing"),
        (["stage.pretrain.lr=0"], "more than 0"),
        (["stage.pretrain.max_length=36"], "no room for text"),
        (["stage.pretrain.max_length=4096"], "at most 2048"),
        (["stage.pretrain.strategy=zero2"], "stage.pretrain.strategy=zero2.*did you mean deepspeed_zero2"),
        (["trainer.devices=2"], "strategy=ddp"),
        (["stage.instruct.use_peft=false"], "use_peft=true"),
        (["stage.instruct.train_llm=false"], "train_llm=true"),
        (
            ["trainer.feature_cache=true", "stage.pretrain.train_vision=true"],
            "stage.pretrain.train_vision=true changes",
        ),
        (["trainer.feature_cache=true", "pruner=random"], "draw anew"),
        (["trainer.feature_cache=true", "pruner=cdpruner"], "anew for each question.*feature_cache=false"),
        (["trainer.feature_cache=true", "pruner=mmtok"], "selection=question_coverage cuts an image anew"),
        (["trainer.feature_cache=true", "pruner=recoverable"], "pruner.vision.recover.score=text_similarity_bare cuts"),
        (["encoder=dinov2_small", "pruner=cdpruner"], "needs a CLIP text tower.*choose encoder=clip_vit_l14_336"),
        (
            ["encoder=siglip_so400m_384", "pruner.vision.score=pooled_cosine", "pruner.vision.keep_cls=true"],
            "keep_cls=true needs a CLS token, which encoder siglip_so400m_384 does not have",
        ),
        (['pruner.vision.question_ends=[""]'], "question_ends holds an empty text"),
        (["pruner.vision.keep_cls=true", "pruner.vision.positions=original"], "keep_cls=true moves patches"),
        (["encoder.text=null", "pruner=recoverable"], "recover.score=text_similarity_bare needs a CLIP text tower"),
        (["encoder.arch.model_type=vit"], "encoder.text: a CLIP text tower does not fit a vit"),
        (["pruner.vision.score=text_similarity", "pruner.vision.merge=centres"], "merge=centres weighs patches"),
        (["pruner.vision.recover.score=text_similarty"], "did you mean text_similarity"),
        (["pruner.vision.recover.knee.min_tokens=-1"], "recover.knee.min_tokens=-1 must be at least 0"),
        (["pruner=recoverable", "pruner.vision.recover.knee.method=cumulative_mass"], "vision.recover.score=cls_atten"),
        (["trainer.attention=flash_5"], "trainer.attention=flash_5.*flash_4"),
        (["trainer.logits_chunk=0"], "trainer.logits_chunk=0.*at least 1"),
        (["trainer.feature_cache=true", "pruner=divprune"], "space=projected.*space=features"),
        (["task=calibrate", "pruner=cdpruner"], "cdpruner reads questions"),
        (["task=calibrate", "pruner=mmtok"], "mmtok reads questions"),
        (["pruner.vision.score=cls_cosine", "pruner.vision.selection=crops"], "vision.selection=crops weighs patches"),
        (["pruner=holov", "pruner.vision.selection_args.number=0"], "selection_args.number=0 must be at least 1"),
        (["trainer.feature_cache=true", "pruner.schedule.name=anneal"], "from step to step.*applies_to=.language"),
        (["pruner.schedule.name=aneal"], "did you mean anneal"),
        (["pruner.schedule.shape=sine"], "pruner.schedule.shape=sine"),
        (["pruner.schedule.applies_to=[visual]"], "pruner.schedule.applies_to=visual.*did you mean vision"),
        (["pruner.schedule.start=0.7"], "start=0.7 must be less than pruner.schedule.end=0.6"),
        (["pruner.schedule.low=0"], "low=0.0 must be more than 0: a share of the tokens"),
        (["pruner=none", "pruner.schedule.name=random"], "moves nothing.*name=constant"),
        (
            ["pruner=language_only", "pruner.schedule.name=random", "pruner.schedule.applies_to=[vision]"],
            "set pruner.schedule.applies_to=.language",
        ),
        (["pruner.language.layer=4"], "has 4 layers"),
        (["pruner.language.layer=[3,1]"], "must rise"),
        (["pruner.language.layer=two"], "layer index"),
        (["pruner.language.layer=1.5"], "a share of the depth"),
        (["pruner.language.layer=[0.5,0.25]"], "must rise"),
        (
            ["pruner.language.layer=0", "pruner.language.score_layer=previous"],
            "previous: no layer comes before",
        ),
        (["pruner.language.turns=latest"], "pruner.language.turns=latest.*did you mean last"),
        (["pruner.language.score_layer=prev"], "did you mean previous"),
        (["pruner.language.merge=recicle"], "did you mean recycle"),
        (
            ["pruner.language.merge=recycle", "pruner.language.merge_args.share=0"],
            "share=0.0 must be more than 0: a share",
        ),
        (
            ["pruner.language.merge=recycle", "pruner.language.merge_args.size=0"],
            "merge_args.size=0 must be at least 1",
        ),
        (
            ["pruner.language.query_tokens=relevant", "pruner.language.score=key_norm"],
            "set pruner.language.query_tokens=all",
        ),
        (["pruner.language.per_layer_budgets=[0.5]"], "knee.method=fixed_ratio or fixed_count"),
        (
            ["knee=fixed_ratio", "pruner.language.per_layer_budgets=[0.5,0.2]"],
            "each of pruner.language.layer=2",
        ),
        (["knee=fixed_ratio", "pruner.language.per_layer_budgets=[2]"], "at most 1: a share of the tokens"),
        (["knee=fixed_count", "pruner.language.per_layer_budgets=[2.5]"], "must be a whole number"),
        (["encoder.has_cls=false"], "needs a CLS token.*add pruner.vision.score=pooled_cosine"),
        (["pruner.vision.score=map_attention"], "attention pooling head.*add pruner.vision.score=cls_attention"),
        (["encoder.image_size=64"], "encoder.image_size=48"),
        (["encoder=dinov2_small", "encoder.image_size=230"], "use 224"),
        (["encoder.feature_layer=-9"], "feature_layer"),
        (["encoder.patch_size=16"], "encoder.arch.patch_size"),
        (["knee.ratio=1.5"], "share"),
        (["knee.mass=0"], "knee.mass=0.0 must be more than 0: a share"),
        (["knee.factor=-1"], "knee.factor=-1.0 must be at least 0"),
        (["knee.scale=0"], "knee.scale=0.0 must be more than 0"),
        (["knee.neighbors=0"], "knee.neighbors=0 must be at least 1"),
        (["knee.method=effective_rnk"], "did you mean effective_rank"),
        (["knee=cumulative_mass", "pruner.vision.score=cls_cosine"], "set pruner.vision.score=cls_attention"),
        (["knee=attention_entropy", "pruner.language.score=text_cosine"], "set pruner.language.score=text_attention"),
        (["knee.min_tokens=9", "knee.max_tokens=3"], "raise it"),
        (["pruner.vision.selection=topp"], "did you mean top"),
        (["pruner.vision.merge=prumrge"], "did you mean prumerge"),
        (["pruner.vision.space=projector"], "did you mean projected"),
        (["pruner.vision.order=rnk"], "did you mean rank"),
        (["pruner.vision.selection=top_and_distinct", "pruner.vision.selection_args.share=1.5"], "at most 1"),
        (["pruner.vision.merge=nearest", "pruner.vision.merge_args.count=1"], "nearest has no parameter count"),
        (["pruner.vision.layer=99"], "pruner.vision.layer=99: encoder tiny_clip has .* blocks"),
        (["pruner.vision.order=rank", "pruner.vision.positions=original"], "set pruner.vision.positions=contiguous"),
        (["pruner.vision.merge=prumerge", "pruner.vision.score=cls_cosine"], "set pruner.vision.score=cls_attention,"),
        (["optim.betas=[0.9]"], "two numbers"),
        (["peft.dropout=1"], "probability"),
        (["trainer.save_every_minutes=0"], "more than 0; null saves by trainer.checkpoint_every_steps"),
        (["trainer.checkpoint_every_steps=0"], "checkpoint_every_steps=0 must be at least 1"),
        (["trainer.keep_checkpoints=0"], "keep_checkpoints=0 must be at least 1"),
        (["run_id=a/b"], "no slashes"),
        (["data=files"], "data.pretrain.annotations"),
        (["logger=wandb", "logger.wandb.mode=offlin"], "did you mean offline"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_remedy(smoke, overrides, words):
    with pytest.raises(UserError, match=words):
        smoke(*overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pruner=visionzip", "knee=otsu"], "pruner=visionzip sets its own budgets; pruner.vision.knee.method does"),
        (["pruner=fastv", "knee=kneedle"], "pruner.language.knee.method does"),
        (["pruner=twostage", "knee=otsu"], None),
        (["pruner=twostage", "knee=otsu", "pruner.vision.knee.method=iqr"], None),
        (["pruner=none", "knee=otsu"], None),
    ],
)
def test_a_knee_that_moves_nothing_is_told(smoke, overrides, words):
    config = smoke(*overrides)
    note = idle_knee(config.pruner, config.knee)
    assert (note is None) if words is None else (note is not None and words in note)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pruner=fastervlm"], "pruner.vision.knee.count=128: nothing is dropped of an image, which has 16 patches"),
        (
            ["pruner=twostage", "knee=fixed_ratio", "knee.ratio=1"],
            "vision.knee.ratio=1.0 and pruner.language.knee.ratio",
        ),
        (["pruner=encoder_only", "knee=fixed_ratio", "knee.ratio=0.99"], "pruner.vision.knee.ratio=0.99"),
        (["pruner=encoder_only", "knee.min_tokens=16"], "pruner.vision.knee.min_tokens=16"),
        (["pruner=encoder_only", "knee=cumulative_mass", "knee.mass=1"], "pruner.vision.knee.mass=1.0"),
        (["pruner=language_only", "pruner.language.min_per_image=16"], "pruner.language.min_per_image=16"),
        (["pruner=sparsevlm"], "pruner.language.per_layer_budgets=[303.0, 110.0, 36.0]"),
        (
            ["pruner=recoverable", "encoder=tiny_clip", "pruner.vision.recover.knee.min_tokens=99"],
            "recover.knee.min_tok",
        ),
        (["pruner=fastervlm", "pruner.vision.knee.max_tokens=5"], None),
        (["pruner=fastervlm", "pruner.vision.knee.count=15"], None),
        (["pruner=encoder_only", "knee=fixed_ratio", "knee.ratio=1", "pruner.schedule.name=random"], None),
        (["pruner=sparsevlm", "pruner.language.per_layer_budgets=[300,100,5]"], None),
        (["pruner=none", "knee=fixed_ratio", "knee.ratio=1"], None),
        ([], None),
    ],
)
def test_budgets_that_drop_nothing_on_this_encoder_are_told(smoke, overrides, words):
    config = smoke(*overrides)
    note = idle_budgets(config.pruner, 16)
    assert (note is None) if words is None else (note is not None and words in note)


def test_notes_are_of_the_encoder_that_runs(smoke, tmp_path):
    whole = ["pruner=encoder_only", "knee=fixed_count"]
    config = smoke(*whole, "knee.count=100000")
    patches = config.encoder.patches
    told = (
        f"pruner.vision.knee.count=100000: nothing is dropped of an image, which has {patches} patches on this encoder"
    )
    assert notes(config, Command.of(whole)) == [told]
    assert notes(smoke("task=evaluate", f"ckpt={tmp_path}", *whole, "knee.count=100000"), Command.of(whole)) == []
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "manifest.json").write_text("{}")
    asked = smoke("task=evaluate", f"ckpt={tmp_path}", *whole, "knee.count=100000")
    assert notes(asked, Command.of(whole)) == [told] and notes(asked, Command.of(["task=evaluate"])) == []
    other = smoke("pruner=visionzip", "knee=otsu", "pruner.vision.knee.count=2")
    assert len(notes(other, Command.of(["knee=otsu"]))) == 1 and not notes(other, Command())


def test_a_config_written_before_a_key_means_what_it_did(smoke, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("".join(line for line in to_yaml(smoke()).splitlines(True) if "min_per_image" not in line))
    assert config_from_file(file).pruner.language.min_per_image == 0
    file.write_text(to_yaml(smoke()))
    assert config_from_file(file).pruner.language.min_per_image == 1


def test_the_feature_cache_concerns_training_alone(smoke):
    assert smoke("task=evaluate", "trainer.feature_cache=true", "pruner=random").trainer.feature_cache
    assert smoke("trainer.feature_cache=true", "strategy=deepspeed_zero3").trainer.feature_cache


def test_a_stage_that_is_off_may_have_any_score(smoke):
    off = smoke("knee=cumulative_mass", "pruner.vision.enabled=false", "pruner.vision.score=cls_cosine")
    assert off.pruner.vision.knee.method == "cumulative_mass"


def test_files_need_no_training_annotations_to_be_evaluated():
    config = compose_config(["task=evaluate", "data=files", "data.evaluate.annotations=questions.json"])
    assert config.data.pretrain.annotations is None


def test_a_stage_that_is_not_run_is_not_checked():
    assert compose_config(["+experiment=smoke", "stages=[pretrain]", "stage.instruct.batch_size=3"]).stages == [
        "pretrain"
    ]


def test_free_form_architecture_fields_can_be_added():
    assert compose_config(["+experiment=smoke", "+llm.arch.attention_bias=true"]).llm.arch["attention_bias"] is True


@pytest.mark.parametrize("name", ["../../x", "/x", "..", "a/b", "a\\\\b"])
@pytest.mark.parametrize("key", ["encoder.name", "llm.name", "data.name", "pruner.name", "experiment_name", "run_id"])
def test_a_name_that_files_are_called_by_leads_nowhere_else(key, name):
    with pytest.raises(UserError, match=f"{key}=.* names a folder: no slashes"):
        compose_config([f"{key}='{name}'"])


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("package=../x", "encoder.wheel.package=../x: give the project's name"),
        ("version=../1.0", "encoder.wheel.version=../1.0: give the project's name"),
        ("sha256=../../x", "encoder.wheel.sha256=../../x is no SHA-256"),
    ],
)
def test_a_wheel_has_its_own_place_in_the_cache(part, words):
    with pytest.raises(UserError, match=words):
        compose_config(["encoder=dinov2_small", f"encoder.wheel.{part}"])
