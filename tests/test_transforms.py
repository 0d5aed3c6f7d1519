"""The risks under torch's transformations: vmap, forward and reverse mode, compile, autocast, dtypes, determinism.

Rows are generic (no ties, no sample on the edge of a support), where the value is smooth.
"""

import warnings

import numpy as np
import pytest
import torch
from families import EVERY, KINDS, SMOOTH_KINDS, thorough
from problems import tensor, value_tolerance
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from drrho import (
    KL,
    CappedKL,
    ChiSquare,
    CressieRead,
    CVaR,
    TotalVariation,
    constrained_risk,
    drrho_risk,
    hybrid_risk,
    penalized_risk,
)

# The first forward-mode derivative of a process makes torch itself warn of its own torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:")

CHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5}


def _hybrid(losses, divergence, parameter, **kwargs):
    return hybrid_risk(losses, divergence, parameter, 0.3, **kwargs)


SOLVERS = {"ball": (constrained_risk, 0.2), "penalty": (penalized_risk, 1.5), "hybrid": (_hybrid, 0.2)}
every_kind = pytest.mark.parametrize("name", thorough(KINDS))
every_smooth = pytest.mark.parametrize("name", thorough(SMOOTH_KINDS))
some_kinds = pytest.mark.parametrize("name", thorough(["kl", "chi2", "cvar", "tv", "order 0.5", "jensen-shannon"]))
every_solver = pytest.mark.parametrize("solve, parameter", SOLVERS.values(), ids=SOLVERS)


def generic(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def parameter_tensor(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def assert_close(actual, expected, tolerance=1e-12):
    """Numbers of size about one."""
    __tracebackhide__ = True
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- vmap -------------------------------------------------------------------------------------------------------


@every_kind
@every_solver
def test_vmap_over_losses(solve, parameter, name):
    losses = generic(4, 7)
    mapped = vmap(lambda z: tuple(solve(z, EVERY[name], parameter)))(losses)
    batch = solve(losses, EVERY[name], parameter)
    for field, expected in zip(mapped[:3], batch[:3], strict=True):
        assert_close(field, expected)


@every_kind
@every_solver
def test_vmap_over_the_parameter(solve, parameter, name):
    losses, parameters = generic(7), tensor([0.01, 0.1, 0.4, 2.0])
    mapped = vmap(lambda r: solve(losses, EVERY[name], r).value)(parameters)
    assert_close(mapped, solve(losses.expand(4, 7), EVERY[name], parameters).value)


@every_kind
@every_solver
def test_vmap_over_both(solve, parameter, name):
    losses, parameters = generic(4, 7), tensor([0.01, 0.1, 0.4, 2.0])
    mapped = vmap(lambda z, r: solve(z, EVERY[name], r).value)(losses, parameters)
    assert_close(mapped, solve(losses, EVERY[name], parameters).value)


@every_kind
@every_solver
def test_nested_vmap(solve, parameter, name):
    losses, parameters = generic(3, 7), tensor([0.01, 0.4])
    table = vmap(lambda r: vmap(lambda z: solve(z, EVERY[name], r).value)(losses))(parameters)
    assert_close(table, solve(losses.expand(2, 3, 7), EVERY[name], parameters[:, None]).value)
    other = vmap(lambda z: vmap(lambda r: solve(z, EVERY[name], r).weights)(parameters))(losses)
    assert_close(other, solve(losses[:, None].expand(3, 2, 7), EVERY[name], parameters).weights)


@every_solver
def test_vmap_over_other_dimensions(solve, parameter):
    losses = generic(7, 4)
    mapped = vmap(lambda z: solve(z, KL(), parameter).weights, in_dims=1, out_dims=1)(losses)
    assert_close(mapped, solve(losses.T, KL(), parameter).weights.T)
    batched = vmap(lambda z: solve(z, KL(), parameter).value, in_dims=2)(generic(3, 7, 2))
    assert_close(batched, solve(generic(3, 7, 2).movedim(2, 0), KL(), parameter).value)


@every_solver
def test_vmap_over_base_weights(solve, parameter):
    losses = generic(4)
    base = tensor([[1, 2, 3, 2], [4, 0, 2, 2]]) / 8
    mapped = vmap(lambda q: solve(losses, ChiSquare(), parameter, base_weights=q).value)(base)
    assert_close(mapped, solve(losses.expand(2, 4), ChiSquare(), parameter, base_weights=base).value)


def test_vmap_of_the_drrho_risk():
    losses, reference, rho = generic(3, 6), generic(3, 6, seed=1), tensor([0.1, 1.0, 2.0])
    mapped = vmap(lambda z, y, r: drrho_risk(z, y, ChiSquare(), rho=r).value)(losses, reference, rho)
    assert_close(mapped, drrho_risk(losses, reference, ChiSquare(), rho=rho).value)


@every_kind
def test_vmap_of_per_sample_gradients(name):
    losses = generic(4, 7)
    mapped = vmap(torch.func.grad(lambda z: constrained_risk(z, EVERY[name], 0.2).value))(losses)
    assert_close(mapped, constrained_risk(losses, EVERY[name], 0.2).weights)


# --- torch.func -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_kind
@every_solver
def test_first_derivatives_are_the_weights(solve, parameter, name):
    losses, direction = generic(7), generic(7, seed=1)

    def value(z):
        return solve(z, EVERY[name], parameter).value

    weights = solve(losses, EVERY[name], parameter).weights
    assert_close(torch.func.grad(value)(losses), weights)
    assert_close(jacrev(value)(losses), weights)
    assert_close(jacfwd(value)(losses), weights)
    at, tangent = jvp(value, (losses,), (direction,))
    assert_close(at, value(losses))
    assert_close(tangent, weights @ direction)


@pytest.mark.slow
@every_kind
@every_solver
def test_second_derivatives_agree_in_every_mode(solve, parameter, name):
    losses = generic(2, 5)

    def value(z):
        return solve(z, EVERY[name], parameter).value.sum()

    def weights(z):
        return solve(z, EVERY[name], parameter).weights

    expected = torch.autograd.functional.hessian(value, losses)
    assert_close(hessian(value)(losses), expected, 1e-10)
    assert_close(jacrev(jacrev(value))(losses), expected, 1e-10)
    assert_close(jacrev(jacfwd(value))(losses), expected, 1e-10)
    # torch gives silent zeros for forward over forward through any custom function.
    with pytest.raises(RuntimeError, match="forward mode over forward mode"):
        jacfwd(jacfwd(value))(losses)
    assert_close(jacrev(weights)(losses), expected, 1e-10)
    assert_close(jacfwd(weights)(losses), expected, 1e-10)
    assert_close(expected, expected.permute(2, 3, 0, 1), 1e-10)


@every_solver
def test_vmap_of_a_hessian(solve, parameter):
    losses = generic(3, 5)
    mapped = vmap(hessian(lambda z: solve(z, KL(), parameter).value))(losses)
    for i in range(3):
        assert_close(mapped[i], hessian(lambda z: solve(z, KL(), parameter).value)(losses[i]), 1e-10)


@pytest.mark.slow
@every_smooth
def test_ball_in_losses_and_radius_by_differences(name):
    def value(z, radius):
        return constrained_risk(z, EVERY[name], radius).value

    inputs = (generic(2, 4).requires_grad_(), parameter_tensor([0.01, 0.2]))
    assert gradcheck(value, inputs, **CHECK, check_forward_ad=True)
    assert gradgradcheck(value, inputs, **CHECK, check_fwd_over_rev=True)


@pytest.mark.slow
@every_smooth
def test_penalty_in_losses_and_strength_by_differences(name):
    def value(z, strength):
        return penalized_risk(z, EVERY[name], strength).value

    inputs = (generic(2, 4).requires_grad_(), parameter_tensor([0.5, 8.0]))
    assert gradcheck(value, inputs, **CHECK, check_forward_ad=True)
    assert gradgradcheck(value, inputs, **CHECK, check_fwd_over_rev=True)


@pytest.mark.slow
@every_smooth
@every_solver
def test_weights_and_strength_by_differences(solve, parameter, name):
    def outputs(z):
        risk = solve(z, EVERY[name], parameter)
        return risk[1:3] if solve is penalized_risk else (risk.weights, risk.premium, risk.strength)

    assert gradcheck(outputs, generic(5).requires_grad_(), **CHECK, check_forward_ad=True)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [CVaR(0.37), TotalVariation()], ids=["cvar", "tv"])
@every_solver
def test_piecewise_linear_values_by_differences(solve, parameter, divergence):
    def value(z):
        return solve(z, divergence, parameter).value

    assert gradcheck(value, generic(2, 5).requires_grad_(), **CHECK, check_forward_ad=True)
    assert torch.all(hessian(lambda z: value(z).sum())(generic(2, 5)) == 0)


def test_total_variation_in_radius_and_strength_by_differences():
    losses = generic(2, 5).requires_grad_()
    radius, strength = parameter_tensor([0.13, 0.47]), parameter_tensor([0.21, 1.3])
    assert gradcheck(lambda z, r: constrained_risk(z, TotalVariation(), r).value, (losses, radius), **CHECK)
    assert gradcheck(lambda z, s: penalized_risk(z, TotalVariation(), s).value, (losses, strength), **CHECK)


# --- the tail fraction as a tensor --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CVaR, CappedKL])
@every_solver
def test_value_in_alpha_by_differences(solve, parameter, kind):
    losses, alpha = generic(3, 6).requires_grad_(), parameter_tensor([0.08, 0.37, 0.65])

    def value(z, a):
        return solve(z, kind(a), parameter).value

    assert gradcheck(value, (losses, alpha), **CHECK)
    single = parameter_tensor(0.37)
    assert gradcheck(lambda a: value(losses.detach(), a), (single,), **CHECK)


@pytest.mark.parametrize("kind", [CVaR, CappedKL])
def test_alpha_has_the_envelope_derivative(kind):
    losses, alpha = generic(40), parameter_tensor(0.22)
    risk = constrained_risk(losses, kind(alpha), 0.9)
    (slope,) = grad(risk.value, alpha)
    lam, nu, a = risk.strength.item(), risk.threshold.item(), alpha.item()
    excess = (losses - nu - lam * np.log(1 / a)).clamp(min=0).mean()
    assert_close(slope, -excess / a**2, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CVaR, CappedKL])
@every_solver
def test_alpha_per_row(solve, parameter, kind):
    losses, alphas = generic(2, 3, 7), tensor([[0.1], [0.6]])
    batch = solve(losses, kind(alphas), parameter)
    for i, j in np.ndindex(2, 3):
        row = solve(losses[i, j], kind(alphas[i, 0].item()), parameter)
        assert_close(batch.value[i, j], row.value)
        assert_close(batch.weights[i, j], row.weights)


@pytest.mark.parametrize("kind", [CVaR, CappedKL])
def test_second_derivative_in_alpha_is_refused(kind):
    losses, alpha = generic(9).requires_grad_(), parameter_tensor(0.3)
    (first,) = grad(constrained_risk(losses, kind(alpha), 0.1).value, alpha, create_graph=True)
    with pytest.raises(RuntimeError):
        grad(first, alpha)


# --- third derivatives: right, or refused, never wrong ----------------------------------------------------------


@pytest.mark.parametrize(
    "name", thorough(["kl", "chi2", "order 0.5", "order 3", "capped kl 0.3", "jensen-shannon", "le cam"])
)
@every_solver
def test_third_derivative_by_differences(solve, parameter, name):
    losses, direction = generic(5), generic(5, seed=1)

    def second(z):
        (first,) = grad(solve(z, EVERY[name], parameter).value, z, create_graph=True)
        return grad(first @ direction, z, create_graph=True)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            result = second(losses.requires_grad_())
            third = torch.stack([grad(entry, losses, retain_graph=True)[0] for entry in result])
        except RuntimeError as error:
            assert "differentia" in str(error)
            return
    step = 1e-5
    differences = [(second(losses + step * e) - second(losses - step * e)) / (2 * step) for e in torch.eye(5).double()]
    assert_close(third, torch.stack(differences, dim=1).detach(), 1e-6)


# --- compile ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own making
@pytest.mark.parametrize("divergence", [KL(), CVaR(0.1)], ids=["kl", "cvar"])
def test_penalized_risk_compiles_into_one_graph(divergence):
    def value(z):
        return penalized_risk(z, divergence, 0.7).value.mean()

    torch.compiler.reset()
    compiled = torch.compile(value, fullgraph=True)
    for seed in (0, 1):
        losses = generic(6, 20, seed=seed).requires_grad_()
        plain = value(losses)
        (expected,) = grad(plain, losses)
        result = compiled(losses)
        (gradient,) = grad(result, losses)
        assert_close(result, plain)
        assert_close(gradient, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["kl", "cvar"])
def test_compiled_with_a_tensor_strength_and_weights_out(name):
    def outputs(z, strength):
        risk = penalized_risk(z, EVERY[name], strength)
        return risk.value, risk.weights, risk.premium

    torch.compiler.reset()
    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    losses, strength = generic(6, 20), tensor([0.1, 0.5, 1.0, 2.0, 10.0, 30.0])
    for result, expected in zip(compiled(losses, strength), outputs(losses, strength), strict=True):
        assert_close(result, expected)


# --- autocast, dtypes, arrays, determinism --------------------------------------------------------------------------


@every_kind
@every_solver
def test_autocast_changes_nothing(solve, parameter, name):
    losses = generic(3, 40).float().requires_grad_()
    plain = solve(losses, EVERY[name], parameter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = solve(losses, EVERY[name], parameter)
        (gradient,) = grad(inside.value.sum(), losses)
    assert inside.value.dtype == torch.float32
    assert torch.equal(inside.value, plain.value)
    assert torch.equal(inside.weights, plain.weights)
    assert torch.equal(gradient, grad(plain.value.sum(), losses)[0])


@some_kinds
@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_losses_are_answered_in_float32(dtype, solve, parameter, name):
    losses = generic(60).to(dtype).requires_grad_()
    risk, exact = solve(losses, EVERY[name], parameter), solve(losses.detach().double(), EVERY[name], parameter)
    assert all(field.dtype == torch.float32 for field in risk)
    assert (risk.value.double() - exact.value).abs() <= value_tolerance(losses.detach().double(), torch.float32)
    assert (risk.premium.double() - exact.premium).abs() <= 1e-5 * exact.premium
    assert_close(risk.weights.double(), exact.weights, 2e-5)
    (gradient,) = grad(risk.value, losses)
    assert gradient.dtype == dtype


@some_kinds
@every_solver
@pytest.mark.parametrize(
    "convert", [np.array, np.float32, lambda rows: np.asfortranarray(rows), lambda rows: rows, lambda rows: tuple(rows)]
)
def test_arrays_and_sequences_give_float64_tensors(convert, solve, parameter, name):
    rows = [[0.5, -1.0, 2.0, 0.25], [0.0, 1.0, 8.0, -3.0]]
    risk, expected = solve(convert(rows), EVERY[name], parameter), solve(tensor(rows), EVERY[name], parameter)
    for field, other in zip(risk, expected, strict=True):
        assert isinstance(field, torch.Tensor)
        assert field.dtype == torch.float64
        assert torch.equal(field, other)


@every_kind
@every_solver
def test_two_calls_agree_bitwise(solve, parameter, name):
    losses = generic(5, 300)
    first, second = (solve(losses.clone().requires_grad_(), EVERY[name], parameter) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


@every_kind
@every_solver
def test_gradients_do_not_reach_across_rows(solve, parameter, name):
    losses = generic(3, 6).requires_grad_()
    risk = solve(losses, EVERY[name], parameter)
    (gradient,) = grad(risk.value[1], losses)
    assert torch.all(gradient[[0, 2]] == 0)
    assert_close(gradient[1], risk.weights[1].detach())


@every_solver
def test_without_gradients_nothing_is_recorded(solve, parameter):
    losses = generic(6)
    assert not solve(losses, KL(), parameter).value.requires_grad
    with torch.no_grad():
        assert not solve(losses.requires_grad_(), KL(), parameter).value.requires_grad
    with torch.inference_mode():
        assert solve(generic(6), CressieRead(0.5), parameter).value.isfinite()


@pytest.mark.parametrize("kind", [CVaR, CappedKL])
def test_vmap_over_alpha(kind):
    losses, alphas = generic(9), tensor([0.1, 0.35, 0.8])

    def value(alpha):
        return penalized_risk(losses, kind(alpha), 0.7).value

    mapped = torch.func.vmap(value)(alphas)
    assert_close(mapped, torch.stack([value(float(alpha)) for alpha in alphas]))
    assert_close(
        torch.func.vmap(torch.func.grad(value))(alphas), torch.stack([torch.func.grad(value)(a) for a in alphas])
    )
    with pytest.raises(ValueError, match="alpha must lie in"):
        torch.func.vmap(value)(tensor([0.1, 1.5]))


@pytest.mark.parametrize("kind", [CVaR, CappedKL])
def test_derivatives_of_weights_in_alpha_are_never_zero(kind):
    losses, alpha, by = generic(9).requires_grad_(), parameter_tensor(0.3), generic(9)
    risk = penalized_risk(losses, kind(alpha), 0.7)
    assert torch.autograd.grad((risk.weights * by).sum() + risk.value, alpha, retain_graph=True)[0].isnan()
    (slope,) = torch.autograd.grad(risk.value, losses, create_graph=True)
    assert torch.autograd.grad((slope * by).sum(), alpha, retain_graph=True)[0].isnan()
    assert not torch.autograd.grad((slope * by).sum(), losses)[0].isnan().any()  # which is known
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        found = jacobian(lambda a: penalized_risk(losses.detach(), kind(a), 0.7).weights)(alpha.detach())
        assert found.isnan().all()


def test_derivatives_that_jump_with_total_variation_are_never_zero():
    losses, radius = generic(9).requires_grad_(), parameter_tensor(0.3)
    risk = constrained_risk(losses, TotalVariation(), radius)
    assert torch.autograd.grad(risk.weights[0], radius, retain_graph=True)[0].isnan()
    assert torch.autograd.grad(risk.weights[0], losses, retain_graph=True)[0].abs().max() == 0  # away from ties
    with pytest.raises(RuntimeError, match="only value and weights are differentiable: detach the multipliers"):
        torch.autograd.grad(risk.strength, losses)
