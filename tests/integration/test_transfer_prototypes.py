"""The study's prototypes against other implementations: PyPI `fira`, `galore-torch`, and torch's own optimizers."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fira import FiraAdamW
from galore_torch import GaLoreAdamW
from torch import nn

import ds_fira
from ds_fira import FiraAdam
from examples.reproduction.lib.data import standard_library
from examples.reproduction.transfer import study, trials
from examples.reproduction.transfer.prototypes import METHODS
from examples.reproduction.transfer.prototypes.moving import transported, turned
from examples.reproduction.transfer.train import build_model, train
from examples.reproduction.transfer.trials import Trial, Trials, settings_of

GAP, STEPS, RANK = 4, 10, 0.25
SHAPES = ((16, 16), (16, 40), (40, 16))


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """A width of 16, which no trial has, for the rank's share."""
    monkeypatch.setitem(trials.MODELS, 16, (1, 40))
    monkeypatch.setitem(trials.MODELS, 32, (1, 48))


def model():
    torch.manual_seed(0)
    layers = [nn.Linear(n, m, bias=False) for m, n in SHAPES]
    return nn.ModuleDict({"embed": nn.Embedding(8, 16), "body": nn.ModuleList(layers)})


def gradients():
    """Seeded gradients of a decaying spectrum, so that a subspace means something."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        yield [
            torch.randn(m, n, generator=generator) @ torch.diag(0.8 ** torch.arange(n)) * (1 + 0.1 * step)
            for m, n in SHAPES
        ]


def stepped(method, lr=0.01, rank=RANK, **settings):
    """The hidden weights after some steps of a prototype."""
    net = model()
    trial = Trial(method=method, lr=lr, width=16, rank=rank, settings=settings_of(**settings))
    optimizer = METHODS[method](net, trial)
    for grads in gradients():
        net["embed"].weight.grad = torch.zeros(8, 16)
        for layer, grad in zip(net["body"], grads, strict=True):
            layer.weight.grad = grad.clone()
        optimizer.step(1.0)
    return [layer.weight.detach() for layer in net["body"]], optimizer


def referenced(make):
    """The hidden weights after the same steps of another optimizer."""
    net = model()
    optimizer = make([layer.weight for layer in net["body"]])
    for grads in gradients():
        for layer, grad in zip(net["body"], grads, strict=True):
            layer.weight.grad = grad.clone()
        optimizer.step()
    return [layer.weight.detach() for layer in net["body"]]


def projected(params):
    return [{"params": params, "rank": 4, "update_proj_gap": GAP, "proj_type": "std"}]


REFERENCES = {
    "fira": lambda params: FiraAdamW(
        [{**group, "alpha": 0.25} for group in projected(params)], lr=0.01, no_deprecation_warning=True
    ),
    "galore": lambda params: GaLoreAdamW(
        [{**group, "scale": 0.25} for group in projected(params)], lr=0.01, no_deprecation_warning=True
    ),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
}


@pytest.mark.parametrize("method", REFERENCES)
def test_published_method_equals_its_reference(method):
    found, _ = stepped(method, **({} if method == "adam" else {"gap": GAP}))
    for ours, theirs in zip(found, referenced(REFERENCES[method]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_muon_has_the_direction_of_torch():
    found, _ = stepped("muon")
    theirs = referenced(
        lambda params: torch.optim.Muon(params, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    )
    start = [layer.weight.detach() for layer in model()["body"]]
    for ours, other, first in zip(found, theirs, start, strict=True):
        # torch's iteration runs in bfloat16, and its momentum is an average, by which the direction does not change.
        change, reference = ours - first, other - first
        assert float((change - reference).norm() / reference.norm()) < 0.03


def test_normalized_step_is_the_formula_of_the_issue():
    """The first step, from its formula: q = p_hat, so every column of S has the norm sqrt(s - r)."""
    net = model()
    grads = next(gradients())
    trial = Trial(method="normalized", lr=0.01, width=16, rank=RANK, settings=settings_of(alpha=1.0, gap=GAP))
    optimizer = METHODS["normalized"](net, trial)
    for layer, grad in zip(net["body"], grads, strict=True):
        layer.weight.grad = grad
    net["embed"].weight.grad = torch.zeros(8, 16)
    before = [layer.weight.detach().clone() for layer in net["body"]]
    optimizer.step(1.0)
    for (m, n), first, layer, grad in zip(SHAPES, before, net["body"], grads, strict=True):
        tall = m >= n
        turned = (grad.T if tall else grad).double()
        basis = torch.linalg.svd(turned, full_matrices=False)[0][:, :4]
        residual = turned - basis @ basis.T @ turned
        scaled = math.sqrt(turned.shape[0] - 4) * residual / residual.norm(dim=0)
        low_rank = basis.T @ turned
        # M / (sqrt(V) + eps) with its correction, after one step.
        adam = low_rank / (low_rank.abs() + 1e-8 / math.sqrt(1e-3))
        expected = basis @ adam + scaled
        update = ((first - layer.weight.detach()) / 0.01).double()
        torch.testing.assert_close(update.T if tall else update, expected, rtol=1e-3, atol=1e-3)


def test_the_library_makes_the_normalized_steps():
    """As the preset has them: each column by its own norm, growing, over refreshes."""
    found, _ = stepped("normalized", gap=GAP, alpha=0.125, c=0.9, beta=0.0, warmup=6)
    theirs = {"residual": "normalized", "residual_beta": 0.0, "residual_scale": 0.9, "residual_warmup": 6}
    theirs |= {"alpha": 0.125, "eps": 1e-8, "matmul_precision": "float32", "lr": 0.01}
    for ours, library in zip(found, referenced(lambda params: FiraAdam(projected(params), **theirs)), strict=True):
        torch.testing.assert_close(ours, library, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("width", "layers", "rank"), [(64, None, 0.25), (128, 4, 0.125)])
def test_the_library_gives_what_the_study_calls_the_preset(width, layers, rank):
    trial = study.preset(width, rank, layers=layers)
    with torch.device("meta"):
        (group, *_) = ds_fira.param_groups(build_model(trial), round(rank * width), preset="recommended")
    mark, settings = group["preset"], {"alpha": 0.25, **dict(trial.settings)}
    assert (mark["lr"], mark["residual"], mark["residual_beta"]) == (trial.lr, trial.method, settings["beta"])
    assert mark["residual_warmup"] == settings["warmup"]
    assert mark["vector_lr_scale"] == settings["vectors"]
    assert mark["alpha"] == pytest.approx(settings["alpha"], abs=1e-4)
    # Rounded, and with an alpha that is.
    assert mark["residual_scale"] * mark["alpha"] == pytest.approx(settings["c"] * settings["alpha"], rel=1e-3)


def test_a_column_goes_by_the_low_rank_direction_too():
    """`signal` and `rows`, which the study tried: S by the size of N, and rows of one size at an unchanged norm."""
    _, optimizer = stepped("normalized", rows=True, gap=GAP)
    residual = torch.rand(6, 9) * torch.arange(1, 7).unsqueeze(1)
    even = optimizer.by_rows(residual, {})
    torch.testing.assert_close(even.norm(), residual.norm())
    assert even.square().mean(1).std() < 0.01 * residual.square().mean(1).std()
    plain, signal = (stepped("normalized", c=c, signal=on, gap=GAP)[0] for c, on in ((0.0, False), (0.0, True)))
    assert all(torch.equal(a, b) for a, b in zip(plain, signal, strict=True))
    assert not torch.equal(stepped("normalized", signal=True, gap=GAP)[0][0], stepped("normalized", gap=GAP)[0][0])


def test_law_lowers_the_rate_with_width_and_depth():
    trial = Trial(method="normalized", lr=0.01, width=256, rank=RANK, settings=settings_of(power=0.5))
    found = METHODS["normalized"](model(), trial)
    assert found.rate_factor((1, 1)) == pytest.approx(0.25 * 0.5)  # 256 x 4 layers is 4 times 128 x 2


def test_factored_moments_take_less_and_are_exact_at_rank_one():
    """V of a gradient whose squares are of rank one is its factors' product."""
    kept, whole = stepped("normalized")
    lean, factored = stepped("normalized", factored=True)
    low_rank = [(4, max(shape)) for shape in SHAPES]
    saved = sum(rows * columns - rows - columns for rows, columns in low_rank)
    assert whole.state_bytes - factored.state_bytes == 4 * saved
    assert all(torch.isfinite(weight).all() for weight in lean)
    assert not torch.equal(kept[0], lean[0])
    proto = METHODS["normalized"](model(), Trial(method="normalized", lr=0.01, width=16, rank=RANK))
    rows, columns = torch.rand(4, 1) + 0.1, torch.rand(1, 9) + 0.1
    state_a, state_b = {}, {}
    torch.testing.assert_close(
        proto.factored_direction(rows * columns, state_a), proto.adam_direction(rows * columns, state_b)
    )


def test_moving_is_normalized_where_nothing_is_changed():
    plain, moving = (stepped(method, gap=GAP, beta=0.0)[0] for method in ("normalized", "moving"))
    assert all(torch.equal(a, b) for a, b in zip(plain, moving, strict=True))
    for change in ({"transport": True}, {"complement": 0.5}, {"angle": 0.3}, {"shrink": 0.1}, {"bounded": True}):
        assert not torch.equal(stepped("moving", gap=GAP, beta=0.0, **change)[0][0], plain[0]), change


def test_a_basis_turns_by_its_angle():
    """The turned basis is orthonormal, one principal angle is the angle asked for, and it explains more of G."""
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(12, 20, generator=generator)
    basis = torch.linalg.qr(torch.randn(12, 4, generator=generator))[0]
    found = turned(basis, grad, 0.2)
    torch.testing.assert_close(found.T @ found, torch.eye(4))
    cosines = torch.linalg.svdvals(basis.T @ found)
    torch.testing.assert_close(cosines[:3], torch.ones(3))
    assert float(cosines[3]) == pytest.approx(math.cos(0.2), abs=1e-5)
    assert (found.T @ grad).norm() > (basis.T @ grad).norm()


def test_moments_are_transported_as_those_of_what_they_average():
    """Of independent entries about a mean, turned: their mean and second moment are those of the turned samples."""
    generator = torch.Generator().manual_seed(3)
    mean, spread = torch.randn(5, 3, generator=generator), torch.rand(5, 3, generator=generator)
    samples = mean + spread * torch.randn(100_000, 5, 3, generator=generator)
    change = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    steps = 7
    state = {"exp_avg": samples.mean(0) * (1 - 0.9**steps), "exp_avg_sq": samples.square().mean(0) * (1 - 0.999**steps)}
    found = transported(state, change, steps, 0.999)
    direct = torch.einsum("ij,sjk->sik", change, samples)
    torch.testing.assert_close(found["exp_avg"] / (1 - 0.9**steps), direct.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["exp_avg_sq"] / (1 - 0.999**steps), direct.square().mean(0), rtol=0.02, atol=0.02)


def test_part_of_a_basis_is_drawn_from_the_complement():
    _, optimizer = stepped("moving", complement=0.5, gap=GAP)
    basis = torch.linalg.qr(torch.randn(12, 4))[0]
    found = optimizer.with_complement(basis)
    torch.testing.assert_close(found.T @ found, torch.eye(4))
    torch.testing.assert_close(torch.linalg.svdvals(basis[:, :2].T @ found[:, :2]), torch.ones(2))
    assert float((basis[:, 2:].T @ found[:, 2:]).abs().max()) < 0.99


def test_trainings_that_start_together_prepare_one_text(tmp_path):
    path = tmp_path / "python.jsonl"
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(standard_library, [path] * 3)) == [path] * 3
    assert [found.name for found in tmp_path.iterdir()] == ["python.jsonl"]
    assert json.loads(path.read_text().partition("\n")[0])["text"]


def test_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="normalized has no settings"):
        METHODS["normalized"](model(), Trial(method="normalized", lr=0.01, width=16, settings=settings_of(gamma=2)))


@pytest.mark.full
@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.resumable])
def test_trial_resumes_to_the_bit(method, tmp_path, monkeypatch):
    """A trial that stops after half its steps ends as one that does not."""
    monkeypatch.setattr("examples.reproduction.transfer.train.SAVE_SECONDS", 0.0)
    trial = Trial(method=method, lr=0.01, width=32, rank=RANK, steps=6)
    whole = train(trial, None)

    class Stopped(Exception):
        pass

    kind, steps = METHODS[method], iter(range(3))

    class Stopping(kind):
        def step(self, share):
            if next(steps, None) is None:
                raise Stopped
            super().step(share)

    with monkeypatch.context() as patch:
        patch.setitem(METHODS, method, Stopping)
        with pytest.raises(Stopped):
            train(trial, tmp_path)
    assert list(tmp_path.glob("*.pt"))
    again = train(trial, tmp_path)
    assert again["validation"] == whole["validation"]
    assert again["curve"] == whole["curve"]
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.full
def test_results_are_found_again(tmp_path):
    trial = Trial(method="normalized", lr=0.01, width=64, rank=RANK, steps=2)
    store = Trials(tmp_path)
    store.train([trial, trial], workers=1)
    assert not Trials(tmp_path).missing([trial])
    assert Trials(tmp_path)[trial]["validation"] > 0
