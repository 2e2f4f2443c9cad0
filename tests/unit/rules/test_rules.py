"""Each rule's maths on statistics given by hand, and what is said of wrong options."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from sharded_spd import AdamSPD, SPDConfig, attach, load_config
from sharded_spd.errors import ConfigError
from sharded_spd.rules import (
    _RULES,
    CWD,
    FTP,
    MAPS,
    MARSSP,
    DiGraP,
    LayerInfo,
    Options,
    Rule,
    RuleSpec,
    Stats,
    make_rule,
    register,
)
from sharded_spd.rules.statistics import DELTA_SQ, GRAD_DOT_DELTA, GRAD_DOT_PREVIOUS, GRAD_SQ, ROW_L1, Block

ONE = Options(lr=torch.tensor([0.1]).double(), weight_decay=torch.tensor([2.0]).double())


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _ftp(rows: Tensor, h: float) -> Stats:
    return Stats(
        before={GRAD_DOT_PREVIOUS: _vector(h)}, after={ROW_L1: rows}, row_lengths=torch.tensor([rows.numel()])
    )


def test_ftp_begins_at_the_anchor_and_grows_against_the_gradient() -> None:
    """Radius 1e-8 at first; the second step's Adam has counted the first, whose gradient was 0."""
    rule = FTP()
    state = dict(rule.prepare([LayerInfo("w", (2, 3))]))
    s = rule.pull(_ftp(_vector(0.5, 0.25), 0.0), state, ONE)
    torch.testing.assert_close(s, _vector(1 - 1e-8 / (0.5 + 1e-8), 1 - 1e-8 / (0.25 + 1e-8)))
    s = rule.pull(_ftp(_vector(0.5, 0.001), -3.0), state, ONE)
    radius = 1e-8 + 1e-2 * (0.1 / (1 - 0.81)) / (0.001 / (1 - 0.999**2)) ** 0.5
    torch.testing.assert_close(state["radius"], _vector(radius))
    torch.testing.assert_close(s, _vector(1 - radius / (0.5 + 1e-8), 0.0))


def test_ftp_radius_stays_within_the_longest_row_and_k_anneals() -> None:
    """The radius never exceeds max n; k = 0 never lets it shrink."""
    state = dict(FTP().prepare([LayerInfo("w", (2, 3))]))
    state["radius"] = _vector(5.0)
    FTP().pull(_ftp(_vector(0.5, 0.25), 0.0), state, ONE)
    torch.testing.assert_close(state["radius"], _vector(0.5 + 1e-8))
    held = dict(state)
    FTP(k=0.0).pull(_ftp(_vector(0.5, 0.25), 7.0), held, ONE)
    assert torch.equal(held["radius"], state["radius"])
    FTP(k=1.0).pull(_ftp(_vector(0.5, 0.25), 7.0), state, ONE)
    assert float(state["radius"]) < float(held["radius"])


def test_ftp_keeps_the_scaled_deviation() -> None:
    """c / n, with the weight still tentative."""
    block = Block(weight=_vector(1.0, 3.0), anchor=_vector(0.5, 1.0))
    stats = _ftp(_vector(2.5), 0.0)
    new = FTP().next_shard_state(block, stats, lambda rows: rows.expand(2))
    torch.testing.assert_close(new["previous"], _vector(0.2, 0.8))


def test_mars_sp_cuts_rows_to_the_radius() -> None:
    """Rows within, on and outside of the ball, and one that is the anchor's."""
    stats = Stats(before={}, after={ROW_L1: _vector(0.0, 0.5, 1.0, 4.0)}, row_lengths=torch.tensor([4]))
    assert MARSSP(radius=1.0).pull(stats, {}, ONE).tolist() == [0.0, 0.0, 0.0, 0.75]


def test_maps_falls_linearly_and_skips_biases_and_heads() -> None:
    """The order is the model's, not that of the layers it governs."""
    order = ("a.weight", "a.bias", "b.weight", "c.weight", "head.weight", "head.bias")
    layers = [LayerInfo(fqn, (2, 2), order) for fqn in reversed(order)]
    share = MAPS(heads=r"head\..*").prepare(layers)["share"]
    assert dict(zip(reversed(order), share.tolist(), strict=True)) == {
        "a.weight": 1.0, "a.bias": 0.0, "b.weight": 0.5, "c.weight": 0.0, "head.weight": 0.0, "head.bias": 0.0
    }  # fmt: skip
    assert MAPS(first=2.0, last=1.0, heads="head.*").prepare(layers)["share"].tolist()[2:4] == [1.0, 1.5]


def test_maps_needs_the_order() -> None:
    """Optimizers that share their parameters out know their own layers only."""
    with pytest.raises(ConfigError, match=r"where layer 'w' stands in the model; give the model"):
        MAPS().prepare([LayerInfo("w", (2, 2))])


def test_maps_takes_the_order_of_a_model_of_which_it_sees_a_part() -> None:
    """As on a stage of a pipeline; a layer that the list lacks has no place."""
    order = ["a.weight", "a.bias", "b.weight", "c.weight", "d.weight", "e.weight"]
    part = [LayerInfo(fqn, (2, 2)) for fqn in ("c.weight", "d.weight", "a.bias")]
    assert MAPS(order=order).prepare(part)["share"].tolist() == [0.5, 0.25, 0.0]
    with pytest.raises(ConfigError, match=r"layer 'f' stands in the model; its option order names 6 layers"):
        MAPS(order=order).prepare([LayerInfo("f", (2, 2))])
    assert repr(MAPS(order=order)) != repr(MAPS(order=order[::-1]))
    assert "c.weight" not in repr(MAPS(order=order))


def test_cwd_decays_where_the_step_goes_home_too() -> None:
    """d > 0 with a step down is decayed, with a step up not; so is what does not move."""
    block = Block(
        weight=_vector(1.9, 2.1, -1.9, 2.0), anchor=torch.zeros(4), kept=_vector(2.0, 2.0, -2.0, 2.0)
    )
    s = CWD().pull_elements(block, torch.tensor(0.1).double(), torch.tensor(2.0).double())
    torch.testing.assert_close(s.double(), _vector(0.2, 0.0, 0.2, 0.2))


def test_digrap_omega_follows_the_cosine_and_takes_only_what_leads_away() -> None:
    """0 at first; h = cos(g, p') < 0 moves it up; <g, d> >= 0 is left alone."""
    rule = DiGraP()
    state = dict(rule.prepare([LayerInfo("w", (3,))]))

    def plan(dot: float, previous: float) -> float:
        before = dict(
            zip(
                (GRAD_DOT_DELTA, DELTA_SQ, GRAD_DOT_PREVIOUS, GRAD_SQ),
                map(_vector, (dot, 4.0, previous, 9.0)),
                strict=True,
            )
        )
        return float(
            rule.plan_edit(Stats(before=before, row_lengths=torch.tensor([1])), state, ONE)["amount"]
        )

    assert plan(-2.0, 0.0) == 0.0
    amount = plan(-2.0, 1.5)  # g goes along d', so against p' = -|..| d'
    h = -1.5 / (3.0 * 2.0)
    moments = 0.1 * h / (1 - 0.81), (0.001 * h * h / (1 - 0.999**2)) ** 0.5
    omega = -1e-2 * moments[0] / (moments[1] + 1e-8)
    assert amount == pytest.approx(omega * -2.0 / 4.0, rel=1e-12)
    assert plan(2.0, 1.5) == 0.0
    assert float(state["away"]) == 0.0


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("fpt", {}, r"unknown rule 'fpt'.*did you mean 'ftp'"),
        ("ftp", {"kk": 1}, r"unknown option 'kk' of rule 'ftp'.*did you mean 'k'"),
        ("ftp", {"k": -1}, r"got k=-1 for rule 'ftp'; wanted a number >= 0"),
        ("ftp", {"mu": "much"}, r"got mu='much'"),
        ("mars_sp", {}, r"rule 'mars_sp' needs its option 'radius'"),
        ("mars_sp", {"radius": 0}, r"got radius=0 .* wanted a number > 0"),
        ("maps", {"order": ["a", "a"]}, r"got order=.*each once"),
        ("maps", {"order": "a.weight"}, r"got order=.*wanted a list of the names"),
        ("maps", {"heads": "("}, r"got heads='\('.*wanted a regular expression"),
        ("digrap", {"mu": float("nan")}, r"got mu=nan"),
    ],
)
def test_wrong_options(rule: str, options: dict[str, object], message: str) -> None:
    """What was got, what was wanted."""
    with pytest.raises(ConfigError, match=message):
        make_rule(rule, options)


def test_a_rule_of_your_own_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered, a configuration can name it; a name is not taken from another rule."""
    monkeypatch.setattr("sharded_spd.rules._RULES", dict(_RULES))

    @register
    @dataclass(frozen=True, slots=True)
    class Half(Rule):
        """Half of the way back."""

        share: float = 0.5
        name: ClassVar[str] = "half"
        spec: ClassVar[RuleSpec] = RuleSpec()

        def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
            """S."""
            return torch.full_like(options.lr, self.share)

    again = type("Half", (Half,), {"__qualname__": Half.__qualname__, "__module__": Half.__module__})
    assert register(again) is again  # a notebook's cell that runs again
    assert register(Half) is Half
    assert make_rule("half", {"share": 0.25}) == Half(share=0.25)
    params = _parameters()
    start = [p.detach().clone() for _, p in params]
    optimizer = torch.optim.SGD(params, lr=1.0)
    attach(optimizer, None, load_config({"rule": "half", "weight_decay": 1}))
    for _, p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for (_, p), w0 in zip(params, start, strict=True):
        torch.testing.assert_close(p.detach(), w0 - 0.5)

    class Other(Half):
        name: ClassVar[str] = "ftp"

    with pytest.raises(ConfigError, match=r"got .*Other named 'ftp'; FTP has that name, choose another"):
        register(Other)
    with pytest.raises(ConfigError, match=r"wanted the class of a rule"):
        register(Half())  # type: ignore[type-var]
    with pytest.raises(ConfigError, match=r"@register stands above @dataclass"):
        register(type("Bare", (Rule,), {"name": "bare", "spec": RuleSpec()}))
    with pytest.raises(ConfigError, match=r"unknown rule 'hald'.*did you mean 'half'"):
        make_rule("hald")


def _parameters() -> list[tuple[str, torch.nn.Parameter]]:
    torch.manual_seed(0)
    return [
        ("a.weight", torch.nn.Parameter(torch.randn(4, 3))),
        ("a.bias", torch.nn.Parameter(torch.randn(4))),
    ]


def test_name_config_and_instance_are_one_rule() -> None:
    """`rule: ftp` with `rule_options` in a configuration is `FTP(k=0.3)`."""
    assert make_rule("ftp", {"k": 0.3}) == FTP(k=0.3)
    results = []
    for config in (load_config({"rule": "ftp", "rule_options": {"k": 0.3}}), SPDConfig(rule=FTP(k=0.3))):
        params = _parameters()
        optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # FTP has no lambda: the base's decay is as it should be
            attach(optimizer, None, config)
        for t in range(4):
            for _, p in params:
                p.grad = torch.full_like(p, float(t % 2) - 0.3)
            optimizer.step()
        results.append([p.detach().clone() for _, p in params])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("rule", [FTP(k=0.5), DiGraP(), MAPS()])
def test_a_checkpoint_of_adam_spd_holds_the_rule_state(rule: FTP | DiGraP | MAPS) -> None:
    """Stopped after any step and loaded: the same bits as without a break; the radius does not start anew."""
    grads = torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(1))

    def train(optimizer: AdamSPD, params: list[tuple[str, torch.nn.Parameter]], begin: int, end: int) -> None:
        for g in grads[begin:end]:
            params[0][1].grad, params[1][1].grad = g[:, :3].clone(), g[:, 3].clone()
            optimizer.step()

    whole = _parameters()
    straight = AdamSPD(whole, lr=0.05, weight_decay=0.1, rule=rule)
    train(straight, whole, 0, 8)
    for stop in (1, 2, 5):
        params = _parameters()
        first = AdamSPD(params, lr=0.05, weight_decay=0.1, rule=rule)
        train(first, params, 0, stop)
        saved = copy.deepcopy(first.state_dict())
        again = _parameters()
        second = AdamSPD(again, lr=0.05, weight_decay=0.1, rule=rule)
        with torch.no_grad():
            for (_, new), (_, old) in zip(again, params, strict=True):
                new.copy_(old)
        second.load_state_dict(saved)
        train(second, again, stop, 8)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(again, whole, strict=True)), (
            f"stopped at {stop}"
        )


def test_a_layer_that_does_not_step_keeps_its_state() -> None:
    """Neither its radius nor its count of steps moves without a gradient, and AdamW's decay waits, too."""
    params = _parameters()
    optimizer = AdamSPD(params, lr=0.05, weight_decay=0.1, rule=FTP())
    for g in (0.5, -0.5):
        for _, p in params:
            p.grad = torch.full_like(p, g)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["projector"]["layers"]["a.bias"])
    weight = params[1][1].detach().clone()
    params[1][1].grad = None
    optimizer.step()
    after = optimizer.state_dict()["projector"]["layers"]["a.bias"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(params[1][1], weight)


@pytest.mark.parametrize("name", ["cwd", "digrap"])
def test_what_is_no_number_per_layer_has_no_activation_rate(name: str) -> None:
    """0 would say that this was the plain base optimizer. Layers of another rule count on."""
    params, others = _parameters(), _parameters()
    optimizer = AdamSPD(params, lr=0.1, weight_decay=1.0, rule=name)
    groups = [{"params": others[:1], "rule": name}, {"params": others[1:], "rule": "l2sp"}]
    mixed = AdamSPD(groups, lr=0.1, weight_decay=1.0)
    for _ in range(3):
        for _, p in (*params, *others):
            p.grad = torch.ones_like(p)
        optimizer.step()
        mixed.step()
    found = optimizer.projector.metrics()
    assert math.isnan(found["activation_rate"])
    assert found["pulls_above_one"] == 0
    assert not any("s" in own for own in found["layers"].values())
    found = mixed.projector.metrics()
    assert found["activation_rate"] == 1.0
    assert found["layers"]["a.bias"]["s"] == pytest.approx(0.1)


def test_a_rule_of_the_release_before_works_on_and_warns() -> None:
    """`pull` was called `shrink`."""
    with pytest.warns(FutureWarning, match=r"Old\.shrink is called pull now"):

        @dataclass(frozen=True)
        class Old(Rule):
            name: ClassVar[str] = "old"
            spec: ClassVar[RuleSpec] = RuleSpec(anchored=False)

            def shrink(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
                return torch.full_like(options.lr, 0.5)

    param = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamSPD([param], lr=0.25, betas=(0.0, 0.0), eps=0.0, weight_decay=1.0, rule=Old())
    param.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.375))
