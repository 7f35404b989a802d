"""Kernels on drawn shapes, strides, dtypes and extreme values: the laws of test_ops.py.

`make fuzz` draws many more. A value that is not finite has to be the one that the reference or
exact arithmetic gives; the errors of the others are compared where all three are finite.
"""

import functools
import inspect
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fuzzing import CHAINS, FOUND, MAKERS, Trial, is_float, trials
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ops import cast, kernel_dtypes, run
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import calm_rt
from calm_rt import ops
from calm_rt.ops import check
from calm_rt.ops.linear_argmax import screen_vocabulary
from calm_rt.testing import CASES, Case
from calm_rt.threads import restored_threads

# `make test` tries the same examples every time, `make fuzz` others
fixed = settings.get_current_profile_name() != "fuzz"
fuzz = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=fixed,
    database=None if fixed else settings.default.database,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of small calls: threads would wait for each other longer than they compute."""
    with restored_threads():
        torch.set_num_threads(1)
        yield


def all_trials(op: str) -> st.SearchStrategy[Trial]:
    case = next(case for case in CASES if case.op == op)
    return trials(op, kernel_dtypes(case, "cpu"))


def outcome(backend: str, case: Case, arguments: dict) -> list[Tensor]:
    """Outputs and gradients of fresh leaves with these values and strides."""
    arguments = tree_map(lambda value: value.detach() if is_tensor(value) else value, arguments)
    for leaf in case.leaves(arguments):
        leaf.requires_grad_()
    with calm_rt.backend(backend):
        return run(case, arguments)


def is_tensor(value) -> bool:
    return isinstance(value, Tensor)


def kind(values: Tensor) -> Tensor:
    """0 for a finite value, 1 and -1 for the infinities, 2 for NaN."""
    return torch.where(values.isnan(), 2, values.isinf() * values.sign().nan_to_num()).int()


def largest(arguments: dict) -> float:
    """The largest finite number in the arguments, at least 1."""
    leaves = [leaf for leaf in tree_leaves(arguments) if is_float(leaf) and leaf.numel()]
    finite = [leaf.detach().double().nan_to_num(0, 0, 0).abs().max() for leaf in leaves]
    return max([1.0, *map(float, finite)])


def identical(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, any NaN being like any other."""
    same = (a == b) & (a.signbit() == b.signbit()) if a.is_floating_point() else a == b
    return bool((same | (a.isnan() & b.isnan())).all())


def check_floats(
    ours: Tensor,
    truth: Tensor,
    reference: Tensor,
    magnitude: Tensor,
    rounding: float,
    gradient: bool,
    chain: bool,
    largest: float,
    terms: int,
    overflows: bool,
) -> None:
    """Law 1 per element, in proportion to its magnitude.

    rounding: the reference's worst error in proportion to its magnitude, in ours' type.
    gradient: what is not finite may be infinite or NaN, as the formula for it has it.
    chain: what stands between the steps is rounded to ours' type.
    largest: of the arguments, with which a factor below the normal numbers may be multiplied.
    terms: that have such a factor, at most.
    overflows: what is not finite may come of huge numbers between the steps.
    """
    kinds = kind(ours)
    rounded = truth.to(ours.dtype)
    agrees = (kinds == kind(reference)) | (kinds == kind(rounded))
    if gradient:
        agrees |= (kinds != 0) & (kind(reference) != 0)
    if overflows:
        # a norm divides by an infinite root, which gives zeros; nothing is wider than float64
        agrees |= (kinds == 0) & (kind(reference) != 0) & (kind(rounded) != 0)
        if not reference.isfinite().all():  # it overflows in some rows: others are near that
            agrees |= kinds != 0
        # it has overflowed here, and its zeros have made a number of that which means nothing
        half = torch.finfo(torch.float32).eps ** 0.5  # of the digits
        agrees |= (kinds != 0) & ((reference.double() - truth).abs() > half * magnitude)
    # near the largest number sums in another order overflow
    agrees |= (kinds != 0) & ~(magnitude < torch.finfo(ours.dtype).max / 256)
    assert agrees.all(), f"{ours[~agrees]}, reference {reference[~agrees]}, exact {truth[~agrees]}"
    finite = (kinds == 0) & (kind(reference) == 0) & (kind(rounded) == 0)
    stored, wide = ours.dtype, torch.promote_types(ours.dtype, torch.float32)
    # in float64 the truth is rounded too: probabilities of 2,000 entries by 10 eps, all alike
    few = 48 if wide == torch.float64 else 4
    few_eps = few * torch.finfo(stored if chain else wide).eps
    allowed = (2 * rounding + few_eps) * magnitude.nan_to_num(nan=torch.inf)
    own = torch.finfo(stored)
    step = own.smallest_normal * own.eps  # of subnormal numbers
    allowed = allowed + terms * largest * step
    if stored != wide:
        allowed = allowed + own.eps * truth.abs()
    error = (ours.double() - truth).abs()
    wrong = finite & (error > allowed)
    assert not wrong.any(), (
        f"{ours[wrong]}, exact {truth[wrong]}, {(error / allowed)[wrong]} of the error allowed"
    )


def terms(case: Case, exact: dict, truth: list[Tensor]) -> list[Tensor]:
    """The sums of absolute terms; for gradients the largest of a row, as one of its elements may be
    the rounded difference of two that are much larger. Where the case has no formula, of the values
    themselves: 1 more than an output, or than the largest of a gradient.
    """
    num_outputs = len(truth) - len(case.leaves(exact))
    if case.magnitudes is None:
        return [value.abs() + 1 for value in truth[:num_outputs]] + [
            value.abs().amax().expand_as(value) + 1 if value.numel() else value
            for value in truth[num_outputs:]
        ]
    known = case.magnitudes(exact)[: len(truth)]
    outputs = [
        torch.maximum(magnitude, value.abs())
        for magnitude, value in zip(known[:num_outputs], truth, strict=False)
    ]
    rows = [
        value.amax(-1, keepdim=True).expand_as(value) if value.numel() else value
        for value in known[num_outputs:]
    ]
    others = [
        value.abs().amax().expand_as(value) if value.numel() else value
        for value in truth[len(known) :]
    ]
    return outputs + rows + others


def reference_errors(trial: Trial) -> list[float]:
    """What the reference misses; nothing is wider than float64, so there float32's, scaled."""
    wide = trial.dtype == torch.float64
    measured = replace(trial, dtype=torch.float32, mixed=False) if wide else trial
    case, arguments = measured.case(), with_dtype(measured)
    exact = cast(case, arguments, torch.float64)
    truth, reference = (outcome("reference", case, given) for given in (exact, arguments))
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if wide else 1.0
    magnitudes = terms(case, exact, truth)
    return [
        scale * worst_error(*tensors) for tensors in zip(reference, truth, magnitudes, strict=True)
    ]


def alike(trial: Trial, count: int = 3) -> list[Trial]:
    """The trial, and others whose rounding errors are typical of it: few numbers may be right by
    chance."""
    others = [trial]
    if trial.dtype == torch.float64:  # float32 may overflow
        others.append(replace(trial, values=replace(trial.values, leaves=0)))
    if trial.op in CHAINS:
        # How much a chain amplifies depends on its weights: others tell nothing. The same ones draw
        # every rounding within the chain anew, moved by a rounding, where a unit stays at the edge
        # at which it is, and by more, where powers of two are none.
        measured = torch.float32 if trial.dtype == torch.float64 else trial.dtype
        steps = torch.finfo(measured).eps, 1 / 128
        nudges = [dict(nudge=steps[n % 2], nudge_seed=1000 * n) for n in range(count)]
    elif trial.dtype == torch.float64:
        first = trial.values.seed + 1
        nudges = [dict(seed=seed) for seed in range(first, first + count)]
    else:
        nudges = []
    return others + [replace(trial, values=replace(trial.values, **nudge)) for nudge in nudges]


def with_dtype(trial: Trial) -> dict:
    """The arguments, with the dtype of what is returned where the op asks for it."""
    arguments = trial.make()
    if "dtype" in inspect.signature(getattr(ops, trial.op)).parameters:
        arguments["dtype"] = trial.dtype
    return arguments


def worst_error(values: Tensor, truth: Tensor, magnitude: Tensor) -> float:
    """The largest error in proportion to its magnitude."""
    proportion = ((values.double() - truth).abs() / magnitude)[magnitude > 0]
    proportion = proportion[proportion.isfinite()]
    return float(proportion.max()) if proportion.numel() else 0.0


def check_ids(case: Case, trial: Trial, exact: dict, ids: Tensor, chosen: Tensor, truth: Tensor):
    """Exact ties and what is not finite are decided as torch decides; elsewhere the exact score of
    an id is the best, up to the rounding of the inputs' dtype."""
    if case.scores is None:
        assert torch.equal(ids, truth)
        return
    scores, magnitudes = case.scores(exact)
    finite = scores.isfinite().all(-1)
    extreme = case.op in CHAINS and trial.values.leaves  # rounding may change the sign of a score
    assert extreme or torch.equal(ids[~finite], scores[~finite].argmax(-1))

    def missed(some_ids: Tensor) -> Tensor:
        """By how much each score is below the best, in proportion to its terms."""
        below = scores.amax(-1) - scores.gather(-1, some_ids[..., None]).squeeze(-1)
        return (below / magnitudes.amax(-1))[finite].nan_to_num()  # 0 / 0 where all scores are 0

    assert ((ids >= 0) & (ids < scores.shape[-1])).all()
    if finite.any() and not extreme:
        few = 4 if case.op in CHAINS else 1  # the steps before the scores are rounded too
        allowed = 2 * missed(chosen).max() + few * torch.finfo(trial.dtype).eps
        assert missed(ids).max() <= allowed


@pytest.mark.parametrize("op", ops.__all__)
def test_every_kernel_is_fuzzed(op: str) -> None:
    assert op in MAKERS


@pytest.mark.parametrize("op", ops.__all__)
@given(data=st.data())
@fuzz
def test_laws_on_drawn_arguments(op: str, data: st.DataObject) -> None:
    check_laws(data.draw(all_trials(op), "trial"))


@pytest.mark.parametrize("name", FOUND)
def test_laws_on_found_arguments(name: str) -> None:
    check_laws(FOUND[name])


def check_laws(trial: Trial) -> None:
    op = trial.op
    case, arguments = trial.case(), with_dtype(trial)
    ours = outcome("native", case, arguments)
    strided = outcome("native", case, trial.strided(arguments))
    if op != "encode" or not case.gradients:  # with gradients it takes torch's own products too
        assert all(identical(a, b) for a, b in zip(ours, strided, strict=True))

    if op == "linear_argmax":
        screened = {**arguments, "screen": screen_vocabulary(arguments["weight"])}
        assert torch.equal(outcome("native", case, screened)[0], ours[0])

    exact = cast(case, arguments, torch.float64)
    truth = outcome("reference", case, exact)
    reference = outcome("reference", case, arguments)
    magnitudes = terms(case, exact, truth)
    given = ours, truth, reference, magnitudes
    for count in (3, 40, 400):  # the reference may have been lucky in so few
        try:
            check_outputs(trial, case, arguments, exact, *given, alike(trial, count))
            break
        except AssertionError:
            if count == 400:
                raise


def check_outputs(
    trial: Trial,
    case: Case,
    arguments: dict,
    exact: dict,
    ours: list[Tensor],
    truth: list[Tensor],
    reference: list[Tensor],
    magnitudes: list[Tensor],
    others: list[Trial],
) -> None:
    """others: what the reference's own error is measured on."""
    chain = trial.op in CHAINS
    worst = [max(errors) for errors in zip(*map(reference_errors, others), strict=True)]
    num_outputs = len(ours) - len(case.leaves(arguments))
    for index, output in enumerate(ours):
        assert output.shape == truth[index].shape
        if output.is_floating_point():
            gradient = index >= num_outputs
            rounding = worst[index] if gradient or not chain else max(worst[:num_outputs])
            if grows_beyond_measure(trial, gradient):
                rounding = torch.inf  # only the places of what is not finite count
            if gradient and logits_are_rounding(trial, magnitudes[0]):
                nans = output.isnan()
                assert ((nans == reference[index].isnan()) | (nans == truth[index].isnan())).all()
                continue
            values = output, truth[index], reference[index], magnitudes[index]
            bounds = largest(arguments), max(4, sum(n for n in trial.sizes if type(n) is int))
            check_floats(*values, rounding, gradient, chain, *bounds, may_overflow(trial))
        else:
            check_ids(case, trial, exact, output, reference[index], truth[index])


def grows_beyond_measure(trial: Trial, gradient: bool) -> bool:
    """Whether rounding grows by what neither magnitudes nor the reference's own error tell."""
    if trial.op not in CHAINS:
        return False
    return bool(trial.values.leaves) and (gradient or trial.dtype == torch.float64)


def may_overflow(trial: Trial) -> bool:
    """Whether a chain of finite numbers may leave the finite ones between its steps."""
    extremes, leaves = trial.values.extremes, trial.values.leaves
    return trial.op in CHAINS and bool(leaves) and all(map(math.isfinite, extremes))


def logits_are_rounding(trial: Trial, loss_magnitude: Tensor) -> bool:
    """Whether rounding alone decides which logits the softmax takes, as for some beyond 1 / eps."""
    if trial.op != "linear_cross_entropy":
        return False
    largest = float(loss_magnitude.nan_to_num(nan=torch.inf).max())
    return largest * torch.finfo(trial.dtype).eps > 0.1


def wild_ids(generator: torch.Generator, count: int, vocabulary: int) -> Tensor:
    """Ids of no token: next to the vocabulary, and at the ends of int64."""
    choices = torch.tensor([-1, vocabulary, vocabulary + 7, -(2**63), 2**63 - 1, -(2**33)])
    return choices[torch.randint(len(choices), (count,), generator=generator)]


@functools.cache
def library_spreads_nan(dtype: torch.dtype) -> bool:
    """Whether NaN of a row reaches others in torch's own product, as with AMX in bfloat16: oneDNN
    multiplies what lies behind a row whose length is no multiple of 32 by zeros."""
    rows = torch.zeros(64, 63, dtype=dtype)
    rows[1::2] = torch.nan
    return bool(F.linear(rows, rows.new_zeros(2, 63))[::2].isnan().any())


@pytest.mark.parametrize(("op", "ids"), [("encode", "ids"), ("linear_cross_entropy", "target")])
@given(data=st.data())
@fuzz
def test_ids_of_no_token_make_their_rows_nan(op: str, ids: str, data: st.DataObject) -> None:
    """What a compiled program or a GPU may pass on: the public function looks only where it can."""
    trial = replace(data.draw(all_trials(op), "trial"), gradients=False)
    case, arguments = trial.case(), trial.make()
    tokens = arguments[ids]
    if op == "linear_cross_entropy":
        arguments["reduction"] = "none"
        vocabulary = len(arguments["weight"])
    else:
        weights = arguments["weights"]
        vocabulary = getattr(weights, "tables", weights[0]).shape[-2]
    generator = torch.Generator().manual_seed(trial.values.seed)
    wrong = torch.rand(tokens.shape, generator=generator) < 0.3
    wild = tokens.clone()
    wild[wrong] = wild_ids(generator, int(wrong.sum()), vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "may_look", lambda tensor: False)
        expected = outcome("native", case, arguments)
        outputs = outcome("native", case, {**arguments, ids: wild})
    rows = wrong.flatten(1).any(1) if wrong.dim() > 1 else wrong
    for output, clean in zip(outputs, expected, strict=True):
        assert output[rows].isnan().all()
        spread = op == "encode" and library_spreads_nan(trial.dtype)
        assert spread or identical(output[~rows], clean[~rows])


def test_mean_over_nothing_has_gradient_zero() -> None:
    """As in torch, whose loss is NaN then too."""
    hidden, weight = torch.ones(3, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    with calm_rt.backend("native"):
        loss = ops.linear_cross_entropy(hidden, weight, torch.full((3,), -100))
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert (gradient == 0).all()
