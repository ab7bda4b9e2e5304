"""What keeps a newcomer out: it would not compute as the run's workers do. Pure."""

from __future__ import annotations

from collections.abc import Collection

from elastic_moe.control.messages import HelloMessage

Facts = tuple[str, str]  # digest of the sources, and where and how state is updated; "" if not known


def facts_of(hello: HelloMessage) -> Facts:
    """What a worker says of itself."""
    return hello.sources, hello.updates_on


def objection(node: str, facts: Facts, others: Collection[Facts]) -> str:
    """Why a worker that brings no state must not be in the run; "" if it may.

    With other sources it would fail together with those who are there, for what workers tell one another has no
    version. On another kind of device updates round otherwise, so the copies of a unit would differ. Whoever may have
    state is let in, and is not asked about here.

    Args:
        node: where it is.
        facts: what it says of itself.
        others: facts of the run's other workers.
    """
    source, device = facts
    sources = {known for known, _ in others if known}
    devices = {known for _, known in others if known}
    if source and sources and source not in sources:
        return (
            f"the files of elastic_moe on node {node} are not those that the run's workers have started with: "
            "put them back, or stop the run and resume it with the new ones"
        )
    if device and devices and device not in devices:
        return (
            f"node {node} updates its state on {device}, and the run's workers on "
            f"{', '.join(sorted(devices))}, which rounds otherwise: with CPUs beside GPUs set elastic.state_on=host, "
            "and with processors of different kinds optim.name=adamw"
        )
    return ""
