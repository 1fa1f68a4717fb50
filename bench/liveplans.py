"""The live groups by name, in the order in which they are shown."""

from __future__ import annotations

from bench import live, livecost, livefailover, liveresync, livestall

PLANS = {
    plan.name: plan
    for plan in (
        live.BARE_PLAN,
        live.SYNC_PLAN,
        liveresync.BITMAP_PLAN,
        liveresync.FULL_PLAN,
        liveresync.DURING_PLAN,
        liveresync.ABSENCE_PLAN,
        livecost.COST_PLAN,
        livefailover.PLAN,
        livestall.PLAN,
    )
}
