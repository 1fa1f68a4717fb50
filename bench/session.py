"""One run of the benchmarks: its groups and their results so far. A group is measured when it is first asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench import machine
from bench.campaign import Campaign, Group, Plan, plans
from bench.liveplans import PLANS
from bench.workshop import Failed, Workshop

if TYPE_CHECKING:
    from pathlib import Path

    from bench.settings import Settings


@dataclass(frozen=True)
class Case:
    """One subject of one group."""

    group: str
    subject: str
    slug: str

    @property
    def id(self) -> str:
        return f"{self.group}-{self.slug}"


def cases() -> list[Case]:
    return [Case(plan.name, subject.name, subject.slug) for plan in plans() for subject in plan.subjects]


def live_cases() -> list[Case]:
    return [Case(plan.name, subject, slug) for plan in PLANS.values() for subject, slug in plan.cases()]


@dataclass
class Session:
    shop: Workshop
    groups: dict[str, Group] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    wanted: dict[str, set[str]] | None = None
    """Subjects by group; None: all of them."""
    _broken: dict[str, Exception] = field(default_factory=dict)
    _plans: dict[str, Plan] = field(default_factory=lambda: {plan.name: plan for plan in plans()})

    @staticmethod
    def open(settings: Settings, folder: Path | None = None) -> Session:
        session = Session(Workshop.open(settings, folder))
        session.about = machine.describe(session.shop) | {"size_bytes": settings.size}
        return session

    def close(self) -> None:
        self.shop.close()

    def group(self, name: str) -> Group:
        if name in self._broken:
            raise self._broken[name]
        if name not in self.groups:
            try:
                self.groups[name] = self._measure(name)
            except Exception as error:
                self._broken[name] = error
                raise
        return self.groups[name]

    def _measure(self, name: str) -> Group:
        if name == machine.LIMITS:
            return machine.measure_limits(self.shop)
        if name == machine.START_UP:
            return machine.measure_start_up(self.shop)
        wanted = None if self.wanted is None else self.wanted.get(name)
        if name in PLANS:
            return PLANS[name].measure(self.shop, PLANS[name], wanted)
        if name not in self._plans:
            raise Failed(f"there is no group {name}")
        return Campaign(self.shop, self._plans[name], wanted).run()
