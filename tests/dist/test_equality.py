"""With `elastic.reproducible`, a disturbed run has the losses of an undisturbed one, bit for bit.

The model has its default initial weights, bias speed and learning rate.
"""

from __future__ import annotations

import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_moe.config.schema import ModelConfig, OptimConfig, TrainConfig
from tests.dist.test_runtime import CORPUS, with_steps
from tests.local_run import LocalRun, tiny_config

EVENTS = 9
FEWEST, MOST = 2, 6
pytestmark = pytest.mark.timeout(1500)


def _config(run_dir: Path, steps: int, **elastic: int) -> TrainConfig:
    """The tests' small model with the default initial weights, bias speed and learning rate: near ties are common."""
    return default_scale(with_steps(tiny_config(run_dir, CORPUS, reproducible=True, **elastic), steps))


def default_scale(config: TrainConfig) -> TrainConfig:
    """The model's default initial weights, bias speed and learning rate, and small micro-batches."""
    usual = ModelConfig()
    model = replace(config.model, init_std=usual.init_std, bias_update_speed=usual.bias_update_speed)
    optim = replace(config.optim, lr=OptimConfig().lr)
    return replace(config, model=model, optim=optim, data=replace(config.data, micro_batch=2))


def deepseek(config: TrainConfig) -> TrainConfig:
    """V4's attention with its indexer, streams, a hash layer, groups' successor scores, and multi-token prediction."""
    model = replace(
        config.model, attention="csa", residual="mhc", readout="learned", stream_segment=3, num_hash_layers=1,
        mtp_depth=1, router_score="sqrtsoftplus", swiglu_limit=10.0, query_latent=16, output_latent=8, index_dim=8,
        rope_dim=4, window=8, csa_rate=2, hca_rate=4, index_topk=4, document_mask=True, mtp_switch=1.0,
        layer_kinds=["sliding", "csa", "hca"][: config.model.num_layers],
    )  # fmt: skip
    return replace(config, model=model)


def _disturb(run: LocalRun, seed: int, events: int = EVENTS) -> list[str]:
    """Kill, drain and add workers at random, one at a time. Returns the events, each with the number of workers."""
    dice, living, done = random.Random(seed), list(run.processes), []
    run.wait_step(2)  # a drain before its worker is known has no effect
    while len(done) < events:
        kinds = ["join"] * (len(living) < MOST) + ["kill", "drain"] * (len(living) > FEWEST)
        kind = dice.choice(kinds)
        if kind == "join":
            living.append(run.add())
        else:
            worker = living.pop(dice.randrange(len(living)))
            if kind == "kill":
                run.signal(worker, signal.SIGKILL)
            else:
                run.coordinator.submit({"event": "drain", "worker": worker})
        status = run.wait(f"{len(living)} workers", lambda s: s["world_size"] == len(living) and s["entered"])
        run.wait_step(status["step"] + dice.randint(2, 5))
        done.append(f"{kind} -> {len(living)}")
    return done


@pytest.mark.parametrize("copies", ["1", "node"])
def test_disturbed_run_equals_the_undisturbed_one_bit_for_bit(tmp_path: Path, copies: str) -> None:
    config = _config(tmp_path / "a" / "run", 100_000, max_workers=MOST)
    config.balance.copies = copies
    with LocalRun(config, 4, nodes=3 if copies == "1" else 2) as run:
        done = _disturb(run, seed=3)
        run.coordinator.submit({"event": "stop", "reason": "enough"})
        run.wait_end()
        disturbed = run.losses()
        assert all(e["lost_steps"] == 0 for e in run.events() if e["event"] == "entered")
        assert len({r["world_size"] for r in run.records()}) >= 4, done
        assert any(record["cross_node_rows"] for record in run.records()) == (copies == "1")
    with LocalRun(_config(tmp_path / "b" / "run", len(disturbed)), 1) as run:
        run.wait_end()
        undisturbed = run.losses()
    assert {kind.split()[0] for kind in done} == {"kill", "drain", "join"}
    assert disturbed == undisturbed
    assert disturbed[-1] < disturbed[0] - 0.5


def test_the_whole_model_family_in_one_disturbed_run(tmp_path: Path) -> None:
    with LocalRun(deepseek(_config(tmp_path / "a" / "run", 100_000, max_workers=MOST)), 3, nodes=2) as run:
        _disturb(run, seed=5, events=4)
        run.coordinator.submit({"event": "stop", "reason": "enough"})
        run.wait_end()
        disturbed, records = run.losses(), run.records()
    with LocalRun(deepseek(_config(tmp_path / "b" / "run", len(disturbed))), 1) as run:
        run.wait_end()
        assert run.losses() == disturbed
        for key in ("mtp_loss", "index_loss", "gain_forward", "gain_backward", "gain_backward_min"):
            alone = [r[key] for r in run.records()]
            assert alone == pytest.approx([r[key] for r in records], rel=1e-5), key
    assert disturbed[-1] < disturbed[0]


@pytest.mark.parametrize("workers", [1, 3, 4, 7])
def test_world_sizes_agree_bit_for_bit(tmp_path: Path, first_losses: list[float], workers: int) -> None:
    with LocalRun(_config(tmp_path / "run", 12), workers, nodes=2) as run:
        assert run.wait_end()["world_size"] == workers
        assert run.losses() == first_losses


@pytest.fixture(scope="module")
def first_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    with LocalRun(_config(tmp_path_factory.mktemp("base") / "run", 12), 1) as run:
        run.wait_end()
        return run.losses()
