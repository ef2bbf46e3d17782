from dataclasses import dataclass, field

import pytest
from herdkit.train import (
    FreezeRule,
    GroupRule,
    OptimizerConfig,
    RecipeError,
    ScheduleConfig,
    TrainerConfig,
    as_dict,
    dump,
    load_recipe,
)


@dataclass(kw_only=True)
class Source:
    name: str
    weight: float = 1.0
    rules: list[GroupRule] = field(default_factory=list)


@dataclass(kw_only=True)
class Data:
    sources: list[Source] = field(default_factory=list)
    by_name: dict[str, Source] = field(default_factory=dict)


@dataclass(kw_only=True)
class Recipe:
    trainer: TrainerConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    freeze: list[FreezeRule] = field(default_factory=list)
    data: Data = field(default_factory=Data)
    extra: Source | None = None


GOOD = """
trainer: {steps: 10, batch_size: 4}
optimizer:
  lr: 3e-4
  groups:
    - {pattern: "image.*", lr_scale: 0.1}
freeze:
  - {pattern: "*", trainable: false}
data:
  sources:
    - name: a
      rules: [{pattern: x}]
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_recipe_becomes_dataclasses_and_back(write, tmp_path):
    recipe = load_recipe(write(GOOD), Recipe)
    assert recipe == Recipe(
        trainer=TrainerConfig(steps=10, batch_size=4),
        optimizer=OptimizerConfig(lr=3e-4, groups=[GroupRule(pattern="image.*", lr_scale=0.1)]),
        freeze=[FreezeRule(pattern="*", trainable=False)],
        data=Data(sources=[Source(name="a", rules=[GroupRule(pattern="x")])]),
    )
    again = tmp_path / "again.yaml"
    again.write_text(dump(recipe))
    assert load_recipe(again, Recipe) == recipe
    assert as_dict(recipe)["optimizer"]["betas"] == [0.9, 0.95]


def test_overrides_and_references(write):
    overrides = [
        "trainer.steps=20",
        "optimizer.groups[0].lr_scale=0.5",
        "schedule.kind=wsd",
        "schedule.decay_steps=${trainer.steps}",
        "extra={name: b, weight: 2}",
        "optimizer.betas=[0.8, 0.9]",
    ]
    recipe = load_recipe(write(GOOD), Recipe, overrides)
    assert recipe.trainer.steps == recipe.schedule.decay_steps == 20
    assert recipe.optimizer.groups[0].lr_scale == 0.5
    assert recipe.extra == Source(name="b", weight=2.0)
    assert tuple(recipe.optimizer.betas) == (0.8, 0.9)


BAD = {  # what is put into GOOD for what, and what the error must say
    "unknown, top": ("freeze:", "freez:", ["unknown key 'freez'", "did you mean 'freeze'?"]),
    "unknown, nested": ("steps: 10", "step: 10", ["unknown key 'trainer.step'", "'trainer.steps'?"]),
    "unknown, in a list": (
        "lr_scale: 0.1",
        "lr_scal: 0.1",
        ["'optimizer.groups[0].lr_scal'", "[0].lr_scale'?"],
    ),
    "unknown, list in a list": (
        "pattern: x",
        "patern: x",
        ["'data.sources[0].rules[0].patern'", "did you mean"],
    ),
    "unknown, elsewhere": ("freeze:", "batch_size: 3\nfreeze:", ["'batch_size'", "'trainer.batch_size'?"]),
    "unknown, far": ("freeze:", "zzzz: 3\nfreeze:", ["'zzzz'", "known: trainer, optimizer"]),
    "type": ("steps: 10", "steps: ten", ["trainer.steps", "'ten'", "Integer"]),
    "type, float for int": ("steps: 10", "steps: 1.5", ["trainer.steps", "1.5"]),
    "type, in a list": ("lr_scale: 0.1", "lr_scale: a", ["optimizer.groups[0].lr_scale", "'a'", "Float"]),
    "type, mapping": ("{steps: 10, batch_size: 4}", "7", ["trainer", "mapping", "7"]),
    "type, length": ("lr: 3e-4", "lr: 1\n  betas: [0.9]", ["optimizer.betas must have 2 values", "[0.9]"]),
    "type, list": ('\n  - {pattern: "*", trainable: false}', " {a: 1}", ["freeze", "list"]),
    "choice": ("freeze:", "schedule: {kind: cos}\nfreeze:", ["schedule.kind", "'cos'", "cosine"]),
    "missing": ("steps: 10, ", "", ["missing 'trainer.steps'"]),
    "missing, all named": ("steps: 10, batch_size: 4", "", ["'trainer.batch_size', 'trainer.steps'"]),
    "missing, in a list": ("- name: a\n      rules", "- rules", ["missing 'data.sources[0].name'"]),
    "missing, part": ("trainer: {steps: 10, batch_size: 4}", "", ["missing 'trainer'"]),
    "value": ("lr: 3e-4", "lr: -1", ["optimizer.lr must be above 0", "-1"]),
    "value, in a list": ("lr_scale: 0.1", "lr_scale: -2", ["optimizer.groups[0].lr_scale", "-2"]),
    "value, across fields": (
        "batch_size: 4",
        "batch_size: 4, accumulate: 3",
        ["trainer.batch_size 4", "multiple"],
    ),
    "syntax": ("lr: 3e-4", "lr: [3", ["not valid YAML", "line"]),
    "twice": ("lr: 3e-4", "lr: 1\n  lr: 2", ["not valid YAML", "duplicate key lr"]),
    "reference": ("lr: 3e-4", "lr: ${nowhere}", ["optimizer.lr", "nowhere"]),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named_in_one_line(write, case):
    old, new, says = BAD[case]
    assert old in GOOD
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(GOOD.replace(old, new)), Recipe)
    message = str(caught.value)
    assert "recipe.yaml: " in message
    assert "\n" not in message
    for part in says:
        assert part in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.step=3", ["'trainer.step'", "'trainer.steps'?"]),
        ("trainer.steps=many", ["trainer.steps", "many", "Integer"]),
        ("trainer.steps", ["key=value"]),
        ("optimizer.groups[3].lr_scale=1", ["groups[3]"]),
        ("optimizer.lr=[1", ["override"]),
    ],
)
def test_mistakes_in_overrides_name_the_override(write, override, says):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(GOOD), Recipe, ["trainer.seed=3", override])
    message = str(caught.value)
    assert f"override '{override}'" in message
    assert "\n" not in message
    for part in says:
        assert part in message


def test_missing_file_names_the_nearest(write, tmp_path):
    write(GOOD)
    with pytest.raises(RecipeError, match=r"recipes\.yaml: no such recipe; did you mean 'recipe\.yaml'\?"):
        load_recipe(tmp_path / "recipes.yaml", Recipe)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path, Recipe)
    with pytest.raises(RecipeError, match="mapping"):
        load_recipe(write("- 1\n"), Recipe)
    with pytest.raises(RecipeError, match="missing 'optimizer', 'trainer'"):
        load_recipe(write(""), Recipe)


def test_micro_batch_size():
    config = TrainerConfig(steps=1, batch_size=24, accumulate=3)
    assert [config.micro_batch_size(n) for n in (1, 2, 4)] == [8, 4, 2]
    with pytest.raises(ValueError, match="batch_size 24 must be a multiple of accumulate x processes = 3 x 5"):
        config.micro_batch_size(5)
