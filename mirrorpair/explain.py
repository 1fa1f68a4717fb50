"""Which rule allows or forbids that this node becomes primary, now. Pure.

Rules:
- What the table would do (foresee.py) is one half of the verdict; the other is what only the swap looks at, once the
  record is read (swaprules.py). The findings say why, rule by rule, from the same facts.
- A finding that forbids may forbid a takeover by itself only; then its sentence says what a person may do.
"""

from __future__ import annotations

import msgspec

from mirrorpair.foresee import foresee
from mirrorpair.rolecommands import outlived
from mirrorpair.rolewords import Phase, Promote, State


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One rule, by the id that the documentation has for it, and what it says of this node now."""

    rule: str
    allows: bool
    text: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """`promotable`: `promote` would be done; `by_itself`: it would take over unasked if the primary died."""

    schema: str = "mirrorpair.explain/1"
    node: str
    role: str
    epoch: int
    promotable: bool
    by_itself: bool
    verdict: str
    findings: list[Finding]


def explain(state: State, promote: Promote, now: int, *, witness: bool | None, known: bool) -> Explanation:
    """`promote`: what a person would ask, with this moment's facts. `witness`: whether it answered last time, None
    where there is none. `known`: the register has this node's incarnation, or none, for its name (A8)."""
    answer = foresee(state, promote, now)
    findings = _findings(state, promote, now, witness=witness, known=known)
    forbids = next((one.text for one in findings if not one.allows and one.rule != "A19 pause"), None)
    return Explanation(
        node=state.me,
        role=state.role,
        epoch=state.epoch,
        promotable=answer.code == 0 and forbids is None,
        by_itself=state.arbitrated and all(one.allows or one.rule in _PASSES for one in findings),
        verdict=answer.message if answer.code or forbids is None else f"{state.me} would not become primary: {forbids}",
        findings=findings,
    )


_PASSES = ("A4 one primary", "A11")
"""what the death of the primary ends"""


def _findings(state: State, promote: Promote, now: int, *, witness: bool | None, known: bool) -> list[Finding]:
    me, peer = state.me, state.peer
    if state.role == "primary":
        return [Finding(rule="A4 one primary", allows=True, text=f"{me} is primary already, of epoch {state.epoch}")]
    found: list[Finding] = []

    def add(rule: str, forbids: str | None, allows: str) -> None:
        found.append(Finding(rule=rule, allows=forbids is None, text=allows if forbids is None else forbids))

    add(
        "A4 one primary",
        f"{peer} is primary of epoch {state.peer_epoch}, and connected: `mirrorpair switchover` moves the role"
        if state.peer_up and state.peer_role == "primary"
        else None,
        f"{peer} is {'connected, and not primary' if state.peer_up else 'not connected'}",
    )
    add("A3 disks", promote.obstacle, f"{me}'s images are whole and can be used")
    others = " and ".join(state.in_sync)
    member = me in state.in_sync or not state.in_sync
    add(
        "A3 in sync",
        None if member else f"only {others} has every acknowledged write (`promote --accept-data-loss` gives up what)",
        f"{me} has every acknowledged write: in sync are {others}" if state.in_sync else "nobody was ever primary",
    )
    add(
        "A8",
        None if known else f"the register knows {me} as another one than this: it was made anew, or its state replaced",
        f"{me} is the very node that the register means",
    )
    if not state.in_sync:
        add("F17 register", outlived(state), f"nothing says that the register was lost: {peer} has seen no later epoch")
    lost = state.boot_lost and any(name != me for name in state.in_sync)
    add(
        "A4 boot",
        f"{me} lost its boot, and {peer} is in sync and may hold what was lost" if lost else None,
        f"{me} has lost no boot" if not state.boot_lost else f"{me} lost its boot, and nobody else is in sync",
    )
    left_s = (max(promote.bound_until_ns, state.bound_until_ns) - now) / 1e9
    bound = left_s > 0 and not state.peer_left and state.primary == peer
    add(
        "A11",
        f"{me} has promised {peer} not to take over for another {left_s:.1f} s" if bound else None,
        f"no promise to {peer} binds {me}",
    )
    if state.arbitrated:
        add("F7 witness", "the witness does not answer: no role can change" if witness is False else None, "it answers")
        add(
            "A19 pause", "the pair is paused: only a person changes the primary" if state.paused else None, "not paused"
        )
    busy = state.stopping or state.phase is Phase.ACQUIRING
    why = f"{me} is stopping" if state.stopping else f"a change of roles is under way on {me}"
    add("A18 stop", why if busy else None, f"{me} runs, and changes no role")
    return found
