"""The network of normalizers: what it learns on a batch, the gradient of the risk with it, resuming, ranks."""

import itertools

import pytest
import torch
import torch.distributed as dist
from processes import start_ranks
from safetensors.torch import load_file, save_file

from drrho.contrastive import contrastive_risk
from drrho.normalizer import NormalizerNetwork

TAU, B = 0.2, 10


def unit(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def batch(rows=slice(None), seed=0):
    image, text, guide_image, guide_text = unit(4, B, 16, seed=seed)[:, rows]
    return (image, text), (guide_image, guide_text)


def log_normalizers(own, guide, coefficient):
    """log mean over j != i of exp(x_ij - x_ii), one anchor at a time."""
    x = own[0] @ own[1].T / TAU
    if guide is not None:
        x = x - coefficient * guide[0] @ guide[1].T / TAU
    found = []
    for side in (x, x.T):
        others = [torch.logsumexp(torch.cat([row[:i], row[i + 1 :]]) - row[i], 0) for i, row in enumerate(side)]
        found.append(torch.stack(others) - torch.log(torch.tensor(B - 1.0)))
    return tuple(found)


@pytest.mark.parametrize("steered", [False, True])
def test_an_expressive_network_reaches_the_exact_normalizers_of_a_batch(steered):
    own, guide = batch()
    options = {"reference": guide, "coefficient": 0.7} if steered else {}
    exact = log_normalizers(own, guide if steered else None, 0.7)
    network = NormalizerNetwork(TAU, prototypes=2 * B, learning_rate=3e-3, steps=50)
    first = network.predict(*own, **options)
    errors = [torch.cat(first.log_u) - torch.cat(exact)]
    for _ in range(12):
        network.update(network.predict(*own, **options), exact, torch.tensor(True))
    errors.append(torch.cat(network.predict(*own, **options).log_u) - torch.cat(exact))
    assert errors[0].abs().max() > 0.1
    assert errors[1].abs().max() < 0.01


def test_the_updates_descend_the_conjugate_objective_whose_minimum_is_the_log_normalizer():
    own, _ = batch()
    exact = log_normalizers(own, None, 1.0)
    network, goal = NormalizerNetwork(TAU, prototypes=7, learning_rate=1e-3), torch.cat(exact)
    prediction, objectives = network.predict(*own), []
    for _ in range(20):
        network.update(prediction, exact, torch.tensor(True))
        predicted = torch.cat(network.predict(*own).log_u)
        objectives.append((torch.exp(goal - predicted) + predicted - 1).mean().item())
    assert all(after < before for before, after in itertools.pairwise(objectives))
    assert objectives[-1] > goal.mean()


def test_a_step_follows_the_gradient_of_the_conjugate_objective_by_autograd():
    own, _ = batch()
    exact = log_normalizers(own, None, 1.0)
    network = NormalizerNetwork(TAU, prototypes=7, learning_rate=1e-3)
    prediction = network.predict(*own)
    parameters = network.state_dict()["network"][0].clone().requires_grad_()
    logits = prediction.anchors @ parameters[..., :-1].mT / TAU + parameters[..., None, :, -1]
    predicted = torch.logsumexp(logits, 2) - prediction.positives
    loss = (torch.exp(torch.stack(exact) - predicted) + predicted).sum() / B
    adam = torch.optim.Adam([parameters], lr=1e-3)
    loss.backward()
    adam.step()
    network.update(prediction, exact, torch.tensor(True))
    assert torch.allclose(network.state_dict()["network"][0], parameters, rtol=0, atol=1e-5)


def test_the_risk_s_gradient_is_that_at_the_predicted_normalizers_by_differences():
    """With a rate of nearly 0 the gradient is that of ``mean_i tau g_i(w) / u_i`` with the predicted u held fixed."""
    own, guide = ([part.double() for part in pair] for pair in batch())
    network = NormalizerNetwork(TAU, prototypes=7)
    log_u = network.predict(*own, reference=tuple(guide), coefficient=0.7).log_u

    def objective(image):
        both = log_normalizers((image, own[1]), guide, 0.7)
        return sum(TAU * torch.exp(log_g - u.double()).mean() / 2 for log_g, u in zip(both, log_u, strict=True))

    image = own[0].clone().requires_grad_()
    options = {"reference": tuple(guide), "coefficient": 0.7, "log_u": log_u, "gamma": 1e-9}
    contrastive_risk(image, own[1], TAU, **options).value.backward()
    for k, d in ((0, 0), (3, 7), (9, 15)):
        step = torch.zeros_like(own[0])
        step[k, d] = 1e-5
        slope = (objective(own[0] + step) - objective(own[0] - step)) / 2e-5
        assert image.grad[k, d].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-8)


def trained(network, steps, first=0):
    for seed in range(first, first + steps):
        own, guide = batch(seed=seed)
        prediction = network.predict(*own, reference=guide)
        network.update(prediction, log_normalizers(own, guide, 1.0), torch.tensor(True))
    return network


def test_a_state_goes_on_at_the_same_bits_and_a_wrong_one_is_refused():
    whole, again = trained(NormalizerNetwork(TAU, prototypes=5), 6), NormalizerNetwork(TAU, prototypes=5)
    again.load_state_dict(trained(NormalizerNetwork(TAU, prototypes=5), 3).state_dict())
    trained(again, 3, first=3)
    assert whole.state_dict().keys() == again.state_dict().keys() == {"network", "steps"}
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())
    untouched = NormalizerNetwork(TAU, prototypes=5)
    untouched.load_state_dict({})
    assert untouched.state_dict() == {}
    with pytest.raises(ValueError, match=r"state must hold network \[3, 2, 6, d \+ 1\] and steps, got \[3, 2, 5, 33\]"):
        NormalizerNetwork(TAU, prototypes=6).load_state_dict(whole.state_dict())
    with pytest.raises(ValueError, match="state must hold finite numbers"):
        again.load_state_dict({"network": torch.full((3, 2, 5, 33), torch.nan), "steps": torch.tensor(1.0)})


def test_what_is_not_finite_changes_nothing_and_leaves_no_trace():
    own, _ = batch()
    exact = log_normalizers(own, None, 1.0)
    network = NormalizerNetwork(TAU, prototypes=5)
    spoiled = own[0].clone()
    spoiled[3] = torch.nan
    assert network.predict(spoiled, own[1]).log_u[0].isnan().any()  # the first batch, at which prototypes start
    before = network.state_dict()["network"]
    assert before.isfinite().all()
    network.update(network.predict(*own), exact, torch.tensor(False))
    network.update(network.predict(*own), (exact[0] * torch.nan, exact[1]), torch.tensor(True))
    assert torch.equal(network.state_dict()["network"], before) and network.state_dict()["steps"] == 0
    network.update(
        network.predict(*own), (exact[0] + 1000, exact[1]), torch.tensor(True)
    )  # a huge one does not overflow
    assert network.state_dict()["steps"] == 1


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"learning_rate": -1.0}, {"prototypes": 0}, {"steps": 0}], ids=str
)
def test_options_out_of_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        NormalizerNetwork(**{"temperature": TAU, **options})


def test_features_of_another_width_are_refused():
    own, guide = batch()
    network = NormalizerNetwork(TAU, prototypes=5)
    network.predict(*own)
    with pytest.raises(ValueError, match="must have 16 features together, as before, got 32"):
        network.predict(*own, reference=guide)


def answer(parts, group=None):
    network = NormalizerNetwork(TAU, prototypes=25, steps=2, group=group)
    rows, counts = parts
    for seed in range(3):
        own, guide = batch(rows, seed)
        prediction = network.predict(*own, reference=guide, counts=counts)
        goals = log_normalizers(*batch(seed=seed), 1.0)
        network.update(prediction, (goals[0][rows], goals[1][rows]), torch.tensor(True), counts)
    return network.state_dict()


def on_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = slice(0, 4) if rank == 0 else slice(4, B)
    save_file(answer((rows, [4, B - 4]), dist.group.WORLD), folder / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_have_the_network_of_one_process(tmp_path):
    start_ranks(on_rank, (tmp_path,), 2)
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    expected = answer((slice(None), [B]))
    assert torch.equal(one["network"], two["network"])
    assert torch.allclose(one["network"][0], expected["network"][0], rtol=0, atol=1e-4)
    assert one["steps"] == expected["steps"] == 6
