"""Plans: budgets are met exactly, impossible ones are refused with what is possible, and files are checked."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from surgery_helpers import operate
from tiny_models import tiny_model

from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.config import BudgetConfig
from layer_surgery.errors import PlanError
from layer_surgery.records import PLAN_SCHEMA_VERSION, LayerPlan, SurgeryPlan
from layer_surgery.surgeon import (
    LayerShape,
    ModelShape,
    check_plan,
    make_plan,
    model_shape,
    plan_parameters,
    removal_count,
)

NAMES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
SEEDS = range(60)


def layer_shape(linears: dict[str, tuple[int, int]], fixed: int) -> LayerShape:
    return LayerShape(linears=linears, parameters=fixed + sum(out * in_ for out, in_ in linears.values()))


def model_of(layers: list[LayerShape], outside: int = 1000) -> ModelShape:
    return ModelShape(layers=layers, parameters=outside + sum(layer.parameters for layer in layers))


def uniform_model(layers: int = 4) -> ModelShape:
    """Layers of 3400 parameters in linears and 100 others; one rank in every linear costs 360."""
    linears = {"self_attn.q_proj": (20, 40), "mlp.up_proj": (65, 20), "mlp.down_proj": (20, 65)}
    return model_of([layer_shape(linears, 100) for _ in range(layers)])


def random_model(generator: random.Random) -> ModelShape:
    """A model of 2 to 6 layers; all have the same names, and every linear a shape of its own."""
    names = NAMES[: generator.randint(1, len(NAMES))]

    def layer() -> LayerShape:
        linears = {name: (generator.randint(4, 90), generator.randint(4, 90)) for name in names}
        return layer_shape(linears, generator.randint(0, 50))

    return model_of([layer() for _ in range(generator.randint(2, 6))], outside=generator.randint(0, 5000))


def random_case(seed: int) -> tuple[random.Random, ModelShape, list[int], int]:
    """Return a generator, a random model, layers to be chosen of it, and the parameters of these."""
    generator = random.Random(seed)
    shape = random_model(generator)
    chosen = sorted(generator.sample(range(len(shape.layers)), generator.randint(1, len(shape.layers) - 1)))
    return generator, shape, chosen, sum(shape.layers[k].parameters for k in chosen)


def least_low_rank(shape: ModelShape, chosen: list[int]) -> int:
    """Parameters of the chosen layers with one rank in every linear."""
    return sum(
        shape.layers[k].parameters + sum(out + in_ - out * in_ for out, in_ in shape.layers[k].linears.values())
        for k in chosen
    )


def assert_budget_is_met(shape: ModelShape, plan: SurgeryPlan, bound: int) -> None:
    assert plan.parameter_bound == bound
    assert plan.parameters == plan_parameters(shape, plan) <= bound
    costs = [
        sum(shape.layers[layer.index].linears[name])
        for layer in plan.low_rank
        for name, rank in layer.ranks.items()
        if rank < min(shape.layers[layer.index].linears[name])
    ]
    assert bound - plan.parameters < min(costs), "another rank would have fitted"


# Budgets


@pytest.mark.parametrize("seed", SEEDS)
def test_keep_is_never_exceeded_and_missed_by_less_than_one_rank(seed: int) -> None:
    generator, shape, chosen, operated = random_case(seed)
    keep = round(generator.uniform(least_low_rank(shape, chosen) / operated + 1e-4, 1), 4)
    plan = make_plan(shape, chosen, BudgetConfig(keep=keep), "svd")
    # 4 digits, so that the bound is exact in whole numbers.
    bound = shape.parameters - operated + round(keep * 10_000) * operated // 10_000
    assert_budget_is_met(shape, plan, bound)
    assert [layer.index for layer in plan.low_rank] == chosen
    assert plan.target_layers == len(shape.layers) - len(chosen)


@pytest.mark.parametrize("seed", SEEDS)
def test_target_parameters_is_never_exceeded_and_missed_by_less_than_one_rank(seed: int) -> None:
    generator, shape, chosen, operated = random_case(seed)
    rest = shape.parameters - operated
    low = (rest + least_low_rank(shape, chosen)) / shape.parameters
    target = min(1.0, round(generator.uniform(low + 1e-4, 1), 4))
    plan = make_plan(shape, chosen, BudgetConfig(target_parameters=target), "svd")
    assert_budget_is_met(shape, plan, round(target * 10_000) * shape.parameters // 10_000)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_rank_is_from_one_to_full(seed: int) -> None:
    generator = random.Random(seed)
    shape = random_model(generator)
    operated = sum(layer.parameters for layer in shape.layers[1:])
    least = least_low_rank(shape, list(range(1, len(shape.layers))))
    plan = make_plan(shape, range(1, len(shape.layers)), BudgetConfig(keep=(least + 1) / operated), "svd")
    for layer in plan.low_rank:
        linears = shape.layers[layer.index].linears
        assert layer.ranks.keys() == linears.keys()
        assert all(1 <= rank <= min(linears[name]) for name, rank in layer.ranks.items())


def test_all_matrices_get_the_same_ratio() -> None:
    plan = make_plan(uniform_model(), [1, 2], BudgetConfig(keep=0.5), "svd")
    for layer in plan.low_rank:
        for name, rank in layer.ranks.items():
            out, in_ = uniform_model().layers[0].linears[name]
            # 100 of 3500 parameters cannot shrink.
            ratio = (0.5 * 3500 - 100) / 3400
            # A cheap linear may get a second rank from what is left where a dear one does not fit.
            assert -1 < rank - ratio * out * in_ / (out + in_) < 2


def test_a_budget_of_a_large_model_is_exact_to_the_parameter() -> None:
    shape = model_of([layer_shape({"mlp.up_proj": (50_000, 70_000)}, 0) for _ in range(2)])
    plan = make_plan(shape, [1], BudgetConfig(keep=0.3), "svd")
    assert plan.parameter_bound == shape.parameters - 3_500_000_000 + 1_050_000_000


def test_a_budget_that_is_a_whole_number_is_not_rounded_down() -> None:
    # In binary floating point 0.29 * 3500 is 1014.9999999999999.
    assert 0.29 * 3500 < 1015
    plan = make_plan(uniform_model(), [0], BudgetConfig(keep=0.29), "svd")
    assert plan.parameter_bound == uniform_model().parameters - 3500 + 1015


@pytest.mark.parametrize("chosen", [[0], [3, 1], [0, 1, 2]])
def test_keep_zero_removes_the_layers(chosen: list[int]) -> None:
    shape = uniform_model()
    plan = make_plan(shape, chosen, BudgetConfig(keep=0), "svd")
    assert [layer.index for layer in plan.layers if layer.action == "remove"] == sorted(chosen)
    assert plan.low_rank == []
    assert plan.surviving == [k for k in range(4) if k not in chosen]
    assert plan.parameters == plan.parameter_bound == shape.parameters - 3500 * len(chosen)


def test_keep_one_keeps_all_that_low_rank_factors_can_hold() -> None:
    shape = uniform_model()
    plan = make_plan(shape, [0, 2], BudgetConfig(keep=1.0), "svd")
    assert_budget_is_met(shape, plan, shape.parameters)


def test_without_a_budget_the_default_is_used() -> None:
    shape = uniform_model()
    default = BudgetConfig(keep=BudgetConfig.DEFAULT_KEEP)
    assert make_plan(shape, [0, 1], BudgetConfig(), "svd") == make_plan(shape, [0, 1], default, "svd")


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("unit", ["keep", "target_parameters"])
def test_an_unreachable_budget_names_the_range_and_its_edge_is_reachable(unit: str, seed: int) -> None:
    _, shape, chosen, operated = random_case(seed)
    least = least_low_rank(shape, chosen)
    if unit == "keep":
        too_low, true_edge = (least - 1) / operated, least / operated
    else:
        rest = shape.parameters - operated
        too_low, true_edge = (rest + least - 1) / shape.parameters, (rest + least) / shape.parameters
    with pytest.raises(PlanError, match="the budget cannot be reached") as caught:
        make_plan(shape, chosen, BudgetConfig(**{unit: too_low}), "svd")
    named = re.search(rf"reachable: --{unit.replace('_', '-')} ([0-9.]+) to 1,", str(caught.value))
    assert named is not None
    edge = float(named[1])
    assert true_edge <= edge < true_edge + 1.001e-4
    plan = make_plan(shape, chosen, BudgetConfig(**{unit: edge}), "svd")
    assert plan.parameters <= plan.parameter_bound


def test_a_target_below_what_the_other_layers_take_is_refused() -> None:
    with pytest.raises(PlanError, match="0 are allowed"):
        make_plan(uniform_model(), [0], BudgetConfig(target_parameters=0.1), "svd")


def test_layers_that_are_low_rank_already_cannot_be_low_rank_again() -> None:
    shape = model_of([layer_shape({}, 500), *uniform_model().layers])
    with pytest.raises(PlanError, match=r"layers \[0\] have no linears .*low-rank already"):
        make_plan(shape, [0, 1], BudgetConfig(keep=0.5), "svd")
    assert make_plan(shape, [0, 1], BudgetConfig(keep=0), "svd").surviving == [2, 3, 4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0.5, "target_parameters": 0.5}, "the same budget in two units"),
        ({"keep": -0.1}, "--keep is -0.1"),
        ({"keep": 1.1}, "--keep is 1.1"),
        ({"keep": float("nan")}, "--keep is nan"),
        ({"target_parameters": 0.0}, "--target-parameters is 0.0"),
        ({"target_parameters": 1.5}, "--target-parameters is 1.5"),
        ({"target_parameters": float("nan")}, "--target-parameters is nan"),
        ({"layers": (1, 2, 1)}, r"repeated: \[1\]"),
        ({"layers": ()}, "none given"),
    ],
)
def test_a_senseless_budget_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        BudgetConfig(**fields)


# How many layers


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        *[({"target_layers": target}, 4 - target) for target in (1, 2, 3)],
        ({"layers": (0, 3)}, 2),
        ({"layers": (0, 3), "target_layers": 2}, 2),
    ],
    ids=str,
)
def test_target_layers_and_named_layers_say_how_many_go(budget: dict[str, Any], count: int) -> None:
    assert removal_count(BudgetConfig(**budget), 4) == count


@pytest.mark.parametrize(
    ("layers", "target", "message"),
    [
        ((1, 4), None, r"--layers names \[4\], but the layers are 0 to 3"),
        ((-1,), None, r"--layers names \[-1\]"),
        ((0, 1, 2, 3), None, "at least one must stay whole"),
        ((0, 1), 3, "give only one of them"),
        (None, None, "there is no budget: give --target-parameters"),
        *[
            (None, target, rf"--target-layers is {target}; allowed: 1 to 3 \(the model has 4 layers\)")
            for target in (0, -1, 4, 5)
        ],
    ],
)
def test_numbers_of_layers_that_are_not_possible_are_refused_with_what_is(
    layers: tuple[int, ...] | None, target: int | None, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        removal_count(BudgetConfig(layers=layers, target_layers=target), 4)


# A user's plan


def plan_of(*layers: LayerPlan) -> SurgeryPlan:
    return SurgeryPlan(method="svd", target_layers=sum(layer.action == "keep" for layer in layers), layers=list(layers))


def keep(index: int) -> LayerPlan:
    return LayerPlan(index=index, action="keep")


def remove(index: int) -> LayerPlan:
    return LayerPlan(index=index, action="remove")


def low_rank(index: int, **ranks: int) -> LayerPlan:
    return LayerPlan(index=index, action="low_rank", ranks={f"mlp.{name}": rank for name, rank in ranks.items()})


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(keep(0)), "is for 1 layers, but the model has 2"),
        (plan_of(keep(0), keep(1), remove(2)), "is for 3 layers, but the model has 2"),
        (plan_of(remove(0), remove(1)), "removes every layer"),
        (plan_of(keep(0), low_rank(1, gate_proj=3)), "layer 1 has no linear 'mlp.gate_proj'; it has self_attn.q_proj,"),
        (plan_of(keep(0), low_rank(1, up_proj=21)), "rank 21 for 'mlp.up_proj' of layer 1 is above its full rank, 20"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(plan: SurgeryPlan, message: str) -> None:
    with pytest.raises(PlanError, match=f"my.json.*{message}"):
        check_plan(uniform_model(2), plan, "my.json")


def test_a_plan_that_fits_gets_its_number_of_parameters() -> None:
    shape = uniform_model(3)
    checked = check_plan(shape, plan_of(remove(0), low_rank(1, up_proj=20), keep(2)), "my.json")
    assert checked.parameters == checked.parameter_bound == shape.parameters - 3500 - 65 * 20 + 20 * (65 + 20)


def test_a_plan_may_leave_no_layer_whole() -> None:
    plan = plan_of(low_rank(0, up_proj=2), low_rank(1, up_proj=2))
    assert check_plan(uniform_model(2), plan, "my.json").surviving == [0, 1]


@pytest.mark.parametrize("model_type", ["llama", "starcoder2", "phi3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("budget", [{"keep": 0}, {"keep": 0.5}, {"target_parameters": 0.9}])
def test_predicted_parameters_are_those_of_the_operated_model(
    tmp_path: Path, model_type: str, tied: bool, budget: dict[str, float]
) -> None:
    checkpoint = open_checkpoint(tiny_model(model_type, tied=tied))
    plan = make_plan(model_shape(checkpoint), [1, 3], BudgetConfig(**budget), "svd")
    operated = operate(plan, checkpoint, tmp_path).checkpoint
    assert operated.parameters == plan.parameters
    stored = sum(spec.numel for name, spec in operated.source.specs.items() if not (tied and name == "lm_head.weight"))
    assert stored == plan.parameters


# Plans as files


def test_a_plan_survives_a_round_trip_through_json(tmp_path: Path) -> None:
    plan = make_plan(uniform_model(), [1, 3], BudgetConfig(keep=0.5), "grasp")
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_dict()))
    read = SurgeryPlan.read(path)
    assert read.layers == plan.layers
    assert read.method == "grasp"
    assert check_plan(uniform_model(), read, "plan.json").parameters == plan.parameters


def test_a_whole_surgery_report_serves_as_a_plan() -> None:
    plan = make_plan(uniform_model(), [1], BudgetConfig(keep=0.5), "svd")
    report = {"schema_version": PLAN_SCHEMA_VERSION, "base_model": {}, "plan": plan.to_dict()}
    assert SurgeryPlan.from_dict(report).layers == plan.layers


def test_target_layers_may_be_left_out_of_a_plan() -> None:
    data = make_plan(uniform_model(), [1], BudgetConfig(keep=0), "svd").to_dict()
    del data["target_layers"]
    assert SurgeryPlan.from_dict(data).target_layers == 3


def edited(change: Callable[[dict[str, Any]], object]) -> Any:
    """Return a good plan with one change; layer 1 is low-rank."""
    data = json.loads(json.dumps(make_plan(uniform_model(), [1], BudgetConfig(keep=0.5), "svd").to_dict()))
    change(data)
    return data


def layer_1(**fields: Any) -> Any:
    return edited(lambda data: data["layers"][1].update(fields))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "is not a JSON object"),
        ("plan", "is not a JSON object"),
        ({}, "has no list 'layers'"),
        ({"points": [], "schema_version": 1}, "is a sweep's, with a plan for every point; save the 'plan' of one"),
        (edited(lambda d: d.update(layers=[])), "has no list 'layers'"),
        (edited(lambda d: d.update(layers={"0": "keep"})), "has no list 'layers'"),
        (
            edited(lambda d: d.update(schema_version=PLAN_SCHEMA_VERSION + 1)),
            f"schema version {PLAN_SCHEMA_VERSION + 1}; this release reads up to {PLAN_SCHEMA_VERSION}",
        ),
        (edited(lambda d: d.update(schema_version="1")), "schema version 1"),
        (edited(lambda d: d.update(target_layers=2)), "says target_layers 2, but keeps 3 layers whole"),
        (edited(lambda d: d["layers"].pop(0)), "entry 0 of 'layers' must have \"index\": 0"),
        (edited(lambda d: d["layers"].reverse()), "entry 0 of 'layers' must have \"index\": 0"),
        (edited(lambda d: d["layers"].__setitem__(2, "keep")), "entry 2 of 'layers' must have \"index\": 2"),
        (layer_1(action="shrink"), "layer 1 has action 'shrink'; allowed: keep, remove, low_rank"),
        (layer_1(action=None), "layer 1 has action None"),
        (layer_1(ranks=[1, 2]), "the ranks of layer 1 must be whole numbers from 0 on"),
        (layer_1(ranks={"mlp.up_proj": -3}), "must be whole numbers from 0 on"),
        (layer_1(ranks={"mlp.up_proj": 2.0}), "must be whole numbers from 0 on"),
        (layer_1(ranks={"mlp.up_proj": True}), "must be whole numbers from 0 on"),
        (layer_1(ranks={"mlp.up_proj": "2"}), "must be whole numbers from 0 on"),
        (layer_1(ranks={}), "layer 1 has action 'low_rank' and 0 ranks"),
        (layer_1(action="keep"), "layer 1 has action 'keep' and 3 ranks; only low_rank has any"),
        (layer_1(action="remove"), "layer 1 has action 'remove' and 3 ranks"),
        ({"plan": []}, "is not a JSON object"),
    ],
)
def test_a_malformed_plan_is_refused_with_the_place(data: Any, message: str) -> None:
    with pytest.raises(PlanError, match=f"^my.json.*({message})"):
        SurgeryPlan.from_dict(data, "my.json")


def test_a_plan_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"--plan .*missing\.json cannot be read"):
        SurgeryPlan.read(tmp_path / "missing.json")


@pytest.mark.parametrize("content", [b"", b"{", b"layers: 3", b"\xff\xfe\x00"])
def test_a_plan_file_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json is not JSON"):
        SurgeryPlan.read(path)
