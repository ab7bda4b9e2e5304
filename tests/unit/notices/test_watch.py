"""The loop of the watcher: it survives failures with a word, drains once, and ends when there is nothing to do."""

from __future__ import annotations

import threading
import time

import pytest

from elastic_moe.errors import UserError
from elastic_moe.notices.answers import MetadataError, Notice
from elastic_moe.notices.clouds import clouds
from elastic_moe.notices.metadata import MetadataClient
from elastic_moe.notices.watch import DONE, FAILED, Patience, RayNode, detect, watch
from tests.metadata_server import metadata_server

FAST = Patience(every_s=0.01, start_s=0.2, gone_s=0.2)
ONE, TWO = RayNode("1" * 56, "10.0.0.1:6379"), RayNode("2" * 56, "10.0.0.1:6379")


class Script:
    """A cloud that answers as told, one after the other, and then with its last answer."""

    name = "scripted"

    def __init__(self, *answers: Notice | MetadataError | None) -> None:
        self.answers = list(answers)

    def recognised(self) -> bool:
        return True

    def poll(self, wait_s: float) -> Notice | None:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, MetadataError):
            raise answer
        return answer


class Nodes:
    """The machine: its Ray nodes, and how often the cluster refuses a drain."""

    def __init__(self, *nodes: RayNode, refusals: int = 0, gone_after: int = 10**9) -> None:
        self.living, self.refusals, self.gone_after = nodes, refusals, gone_after
        self.looks, self.drained = 0, list[RayNode]()

    def nodes(self) -> list[RayNode]:
        self.looks += 1
        return list(self.living) if self.looks <= self.gone_after else []

    def drain(self, node: RayNode, notice: Notice, within_s: float) -> str:
        assert within_s > 0
        if self.refusals:
            self.refusals -= 1
            return "the GCS is away"
        self.drained.append(node)
        return ""


def run(cloud: Script, machine: Nodes, patience: Patience = FAST) -> tuple[int, list[str]]:
    said: list[str] = []
    return watch(cloud, machine, threading.Event(), said.append, patience), said


def notice(left_s: float = 60.0) -> Notice:
    return Notice("taken", time.time() + left_s)


def test_every_node_of_the_machine_is_drained_once() -> None:
    machine = Nodes(ONE, TWO)
    code, said = run(Script(None, None, notice()), machine)
    assert code == DONE
    assert machine.drained == [ONE, TWO]
    assert [line for line in said if "notice: taken" in line]


def test_failures_are_told_once_and_the_notice_still_counts() -> None:
    machine = Nodes(ONE)
    failures = [MetadataError("status 503")] * 2
    code, said = run(Script(*failures, None, notice()), machine)
    assert (code, machine.drained) == (DONE, [ONE])
    assert sum("did not tell" in line for line in said) == 1
    assert sum("answers again, after 2 failures" in line for line in said) == 1


def test_a_drain_that_fails_is_tried_again() -> None:
    machine = Nodes(ONE, refusals=2)
    code, said = run(Script(notice()), machine)
    assert (code, machine.drained) == (DONE, [ONE])
    assert sum("not drained yet (the GCS is away)" in line for line in said) == 1


def test_a_node_is_not_drained_again_while_another_one_is_tried() -> None:
    machine = Nodes(ONE, TWO)
    drain = machine.drain
    machine.drain = lambda node, *rest: "busy" if node == TWO and machine.looks < 6 else drain(node, *rest)
    code, _ = run(Script(notice()), machine)
    assert (code, machine.drained) == (DONE, [ONE, TWO])


@pytest.mark.parametrize("machine", [Nodes(ONE, refusals=10**9), Nodes()], ids=["refused", "no Ray"])
def test_the_machines_end_is_the_end_of_trying(machine: Nodes) -> None:
    code, said = run(Script(notice(0.5)), machine)
    assert code == FAILED
    assert "not every Ray node" in said[-1]


def test_it_ends_when_ray_has_ended_here() -> None:
    code, said = run(Script(None), Nodes(ONE, gone_after=3))
    assert code == DONE
    assert "Ray has ended" in said[-1]
    assert sum("found Ray node" in line for line in said) == 1


def test_it_ends_when_ray_never_starts_here() -> None:
    code, said = run(Script(None), Nodes())
    assert code == FAILED
    assert "no Ray node has started" in said[-1]


def test_a_stop_ends_it() -> None:
    stopped, said = threading.Event(), list[str]()
    thread = threading.Timer(0.1, stopped.set)
    thread.start()
    assert watch(Script(None), Nodes(ONE), stopped, said.append, Patience(every_s=60.0)) == DONE
    assert said[-1] == "stopped"
    thread.join()


def test_the_provider_is_found_or_its_absence_told() -> None:
    with metadata_server("gcp") as fake:
        known = clouds(MetadataClient(fake.url, timeout_s=0.5))
        found = detect(known, threading.Event(), print)
        assert found is known["gcp"]
    with pytest.raises(UserError, match="no metadata service of aws, gcp, azure answered"):
        detect(known, threading.Event(), print, within_s=0.0)
    stopped = threading.Event()
    stopped.set()
    assert detect(known, stopped, print) is None
