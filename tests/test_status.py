"""Status: the JSON of the contract, the judgement's table, what people see, and progress that is always true (R11)."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import msgspec
import pytest
from adminside import resyncing, status, volume
from hypothesis import given
from hypothesis import strategies as st

from mirrorpair.cli.statusview import BAR_WIDTH, bar, check_line, event_lines, render
from mirrorpair.history import DISK_STATES
from mirrorpair.status import (
    CHOOSE,
    CONDITIONS,
    DISKS,
    Arbiter,
    EventLog,
    Path,
    Refusal,
    Resync,
    ResyncMeter,
    Status,
    ago,
    holds,
    hopeless,
    judge,
    worst,
)

SAMPLE = """
{"schema":"mirrorpair.status/1","pair":"shop","node":"beta","role":"primary","epoch":7,"in_sync":["beta"],
 "health":"degraded","reason":"alpha rejoined 4 s ago, resync 69 %","action":"none: wait for in-sync",
 "peer":{"node":"alpha","connected":true,"role":"secondary","heartbeat_age_s":0.12,"rtt_s":0.0003},
 "arbiter":{"kind":"witness","reachable":true},
 "volumes":[{"name":"data","size":10737418240,"disk":"up-to-date","peer_disk":"inconsistent","out_of_sync_bytes":1299234816,
   "resync":{"direction":"source","done_bytes":1,"total_bytes":2,"skipped_bytes":0,"sent_bytes":1,"rate":1.0,"eta_s":6.0,"stalled":null}}]}
"""


def one_resync(**facts: Any) -> Resync:
    return Resync(
        **{
            "direction": "source",
            "done_bytes": 1,
            "total_bytes": 2,
            "skipped_bytes": 0,
            "sent_bytes": 1,
            "rate": 1.0,
            "eta_s": 1.0,
        }
        | facts
    )


# --- JSON


def test_the_json_has_every_field_of_the_contract() -> None:
    def contained(expected: Any, found: Any, path: str) -> None:
        if isinstance(expected, dict):
            assert set(expected) <= set(found), path
            for key, value in expected.items():
                contained(value, found[key], f"{path}.{key}")
        elif isinstance(expected, list):
            for one, other in zip(expected, found, strict=True):
                contained(one, other, f"{path}[]")
        elif expected is not None:
            assert isinstance(found, type(expected)), path

    shown = json.loads(msgspec.json.encode(judge(msgspec.structs.replace(resyncing(), in_sync=["beta"]))))
    contained(json.loads(SAMPLE), shown, "status")
    assert list(shown)[:12] == list(json.loads(SAMPLE))


def test_the_json_comes_back_as_it_was() -> None:
    for facts in (status(), resyncing(), status(refusal=Refusal(kind="unrelated", reason="x"))):
        assert msgspec.json.decode(msgspec.json.encode(judge(facts)), type=Status) == judge(facts)


def test_a_newer_daemon_may_say_more() -> None:
    text = msgspec.json.encode(status()).replace(b'{"schema"', b'{"weather":"fine","schema"', 1)
    assert msgspec.json.decode(text, type=Status) == status()


# --- the judgement


def way(**facts: Any) -> Path:
    return Path(**{"kind": "control", "node": "alpha", "address": "10.0.0.1:7790", "alive": True, **facts})


SILENT: dict[str, Any] = {"connected": False, "role": "unknown", "link": "silent", "heartbeat_age_s": 5.2}
LATE = volume(peer_disk="inconsistent", out_of_sync_bytes=4096)


@pytest.mark.parametrize(
    ("facts", "health", "summary", "reason", "action"),
    [
        ({}, "healthy", "mirrored", "every write is on both nodes", "none"),
        ({"starting": True, "role": "secondary", "serving": "no"}, "unknown", "starting", "opening", "wait"),
        (
            {"refusal": Refusal(kind="split-brain", reason="alpha and beta both wrote"), "peer": {"connected": False}},
            "critical",
            "split brain",
            "alpha and beta both wrote",
            "`mirrorpair init --force`",
        ),
        (
            {"refusal": Refusal(kind="unrelated", reason="nothing in common"), "peer": {"connected": False}},
            "critical",
            "unrelated data",
            "nothing in common",
            "choose",
        ),
        ({"peer": {"role": "primary"}}, "critical", "both nodes are primary", "alpha", "demote"),
        ({"volumes": [volume(disk="failed")]}, "degraded", "beta's disk has failed", "alpha has all", "replace"),
        (
            {"volumes": [volume(disk="failed", peer_disk="outdated")]},
            "critical",
            "beta's disk has failed",
            "alpha has no current copy",
            "replace",
        ),
        (
            {"volumes": [volume(peer_disk="diskless")]},
            "degraded",
            "alpha has no disk",
            "beta has all data",
            "log of alpha",
        ),
        ({"serving": "held", "held": "alpha is silent"}, "critical", "requests wait", "alpha is silent", "alpha runs"),
        ({"role": "secondary", "serving": "no"}, "critical", "no node is primary", "nobody serves", "promote"),
        (
            {"role": "secondary", "serving": "no", "peer": SILENT},
            "critical",
            "no primary is heard",
            "silent, last heard 5 s ago",
            "--accept-data-loss",
        ),
        (
            {"refusal": Refusal(kind="refused", reason="alpha has another size"), "peer": {"connected": False}},
            "degraded",
            "not mirrored",
            "alpha has another size",
            "cause",
        ),
        ({"serving": "alone", "peer": SILENT}, "degraded", "not mirrored", "last heard 5 s ago", "by itself"),
        (
            {"serving": "alone", "peer": SILENT, "volumes": [LATE]},
            "degraded",
            "not mirrored",
            "4.00 KiB out of sync",
            "by itself",
        ),
        (
            {"volumes": [volume(peer_disk="inconsistent", resync=one_resync())]},
            "degraded",
            "mirror is resyncing",
            "resync beta -> alpha 50.0 %",
            "none: wait for in-sync",
        ),
        (
            {
                "role": "secondary",
                "serving": "no",
                "peer": {"role": "primary"},
                "volumes": [volume(disk="inconsistent", resync=one_resync(direction="target"))],
            },
            "degraded",
            "mirror is resyncing",
            "resync alpha -> beta 50.0 %",
            "none",
        ),
        (
            {"volumes": [volume(resync=one_resync(stalled="nothing has moved for 7 s"))]},
            "degraded",
            "resync is stalled",
            "data: nothing has moved",
            "alpha",
        ),
        ({"volumes": [LATE]}, "degraded", "out of sync", "alpha is inconsistent", "resync"),
        (
            {"arbiter": Arbiter(kind="witness", reachable=False)},
            "degraded",
            "arbiter not reachable",
            "witness",
            "witness",
        ),
        ({"arbiter": Arbiter(kind="none", reachable=False)}, "healthy", "mirrored", "both", "none"),
        (
            {"arbiter": Arbiter(kind="witness", reachable=False, trouble="it has version 1", disbelieved=True)},
            "degraded",
            "arbiter not believed",
            "it has version 1: both nodes go on",
            "promote --accept-data-loss",
        ),
        (
            {"paths": [way(), way(kind="heartbeat", address="192.168.7.1:7790", alive=False)]},
            "degraded",
            "a heartbeat path is lost",
            "192.168.7.1:7790 (alpha)",
            "comes back by itself",
        ),
        ({"paths": [way(), way(kind="heartbeat")]}, "healthy", "mirrored", "both", "none"),
        ({"paths": [way(alive=False)]}, "healthy", "mirrored", "both", "none"),
    ],
)
def test_each_situation_has_its_judgement(
    facts: dict[str, Any], health: str, summary: str, reason: str, action: str
) -> None:
    judged = judge(status(**facts))
    assert (judged.health, judged.summary) == (health, summary)
    assert reason in judged.reason
    assert action in judged.action


def test_the_last_change_is_part_of_the_reason() -> None:
    judged = judge(resyncing())
    assert judged.reason == (
        "resync beta -> alpha 69.2 %; failed over alpha -> beta 2m14s ago: heartbeat lost for 3.0 s"
    )


ROLES = st.sampled_from(["primary", "secondary"])
DISK = st.sampled_from(DISKS)
VOLUMES = st.builds(
    lambda disk, peer_disk, behind, resync: volume(
        disk=disk, peer_disk=peer_disk, out_of_sync_bytes=behind, resync=resync
    ),
    DISK,
    DISK,
    st.sampled_from([0, 65536, 1 << 40]),
    st.none() | st.builds(one_resync, direction=st.sampled_from(["source", "target"])),
)
STATUSES = st.builds(
    lambda role, serving, peer, volumes, refusal, starting: status(
        role=role, serving=serving, peer=peer, volumes=volumes, refusal=refusal, starting=starting
    ),
    ROLES,
    st.sampled_from(["mirrored", "alone", "held", "no"]),
    st.fixed_dictionaries(
        {
            "connected": st.booleans(),
            "role": st.sampled_from(["primary", "secondary", "unknown"]),
            "link": st.sampled_from(["connected", "connecting", "silent", "refused"]),
            "heartbeat_age_s": st.none() | st.floats(0, 1e7),
        }
    ),
    st.lists(VOLUMES, min_size=1, max_size=3),
    st.none() | st.builds(Refusal, kind=st.sampled_from(["refused", "split-brain", "unrelated"]), reason=st.just("r")),
    st.booleans(),
)


@given(STATUSES)
def test_healthy_means_that_nothing_can_be_lost_with_one_host(facts: Status) -> None:
    judged = judge(facts)
    assert judged.summary
    assert judged.reason
    assert judged.action
    if judged.health == "healthy":
        assert holds(judged, "synced")
        assert {facts.role, facts.peer.role} == {"primary", "secondary"}
        assert facts.refusal is None


@given(STATUSES, st.booleans(), st.booleans())
def test_whatever_the_facts_every_line_can_be_shown(facts: Status, color: bool, ascii_only: bool) -> None:
    lines = render(judge(facts), color=color, ascii_only=ascii_only)
    assert all("\n" not in line for line in lines)
    assert any(line.startswith("reason: ") for line in lines)
    if ascii_only:
        assert all(line.isascii() for line in lines)
    check_line(judge(facts))


# --- conditions


@pytest.mark.parametrize(
    ("facts", "true"),
    [
        ({}, {"primary", "connected", "synced"}),
        ({"starting": True}, set()),
        ({"serving": "held"}, {"connected", "synced"}),
        ({"role": "secondary", "serving": "no", "peer": {"role": "primary"}}, {"secondary", "connected", "synced"}),
        ({"serving": "alone", "peer": SILENT}, {"primary"}),
        ({"volumes": [LATE]}, {"primary", "connected"}),
        ({"volumes": [volume(), volume("b", out_of_sync_bytes=1)]}, {"primary", "connected"}),
        ({"volumes": [volume(resync=one_resync())]}, {"primary", "connected"}),
    ],
)
def test_what_wait_waits_for(facts: dict[str, Any], true: set[str]) -> None:
    assert {condition for condition in CONDITIONS if holds(status(**facts), condition)} == true


def test_one_volume_may_be_waited_for_alone() -> None:
    facts = status(volumes=[volume(), volume("b", out_of_sync_bytes=1)])
    assert holds(facts, "synced", "data")
    assert not holds(facts, "synced", "b")


def test_waiting_for_sync_in_a_split_brain_is_hopeless() -> None:
    split = status(peer={"connected": False}, refusal=Refusal(kind="split-brain", reason="both wrote"))
    assert hopeless(split, "synced") == hopeless(split, "connected") == f"both wrote; {CHOOSE}"
    away = status(peer={"connected": False, "role": "unknown"}, refusal=split.refusal)  # it may come back made anew
    assert hopeless(away, "synced") is None
    assert hopeless(split, "primary") is None
    assert hopeless(status(refusal=Refusal(kind="refused", reason="busy")), "synced") is None


# --- for people


def test_the_view_is_the_contract_s() -> None:
    assert render(judge(resyncing())) == [
        "shop  DEGRADED - mirror is resyncing      epoch 7",
        "node     role       disk        link       out-of-sync  heartbeat  address",
        "* beta   primary    up-to-date  connected            -      12 ms  10.0.0.2:7790",
        "  alpha  secondary  resyncing   connected     1.21 GiB      14 ms  10.0.0.1:7790",
        "resync data beta -> alpha ━━━━━━━━━╺━━━━  69.2 %  2.70/3.90 GiB  212 MiB/s  eta 0:06   61.3 % skipped (equal)",
        "reason: resync beta -> alpha 69.2 %; failed over alpha -> beta 2m14s ago: heartbeat lost for 3.0 s",
        "action: none: wait for in-sync",
    ]


def test_the_target_sees_itself_behind() -> None:
    facts = status(
        role="secondary",
        serving="no",
        peer={"role": "primary"},
        volumes=[volume(disk="inconsistent", out_of_sync_bytes=65536, resync=one_resync(direction="target"))],
    )
    mine, theirs = render(judge(facts))[2:4]
    assert "resyncing" in mine
    assert "64.0 KiB" in mine
    assert "64.0 KiB" not in theirs


def test_several_paths_are_shown_with_their_round_trips() -> None:
    paths = [
        way(rtt_s=0.00034, heartbeat_age_s=0.012),
        way(kind="heartbeat", node="beta", address="192.168.7.2:7790", alive=False),
    ]
    assert render(judge(status(paths=paths)))[4:7] == [
        "path              of     for            state  round trip  heartbeat",
        "10.0.0.1:7790     alpha  control, data  alive      0.3 ms      12 ms",
        "192.168.7.2:7790  beta   heartbeats     lost            -          -",
    ]
    assert not any("round trip" in line for line in render(judge(status(paths=paths[:1]))))


def test_several_volumes_are_listed() -> None:
    lines = render(judge(status(volumes=[volume(), volume("blobs", clients=3, out_of_sync_bytes=4096)])))
    assert lines[4:7] == [
        "volume      size  beta        alpha       out-of-sync  clients",
        "data    10.0 GiB  up-to-date  up-to-date            -        0",
        "blobs   10.0 GiB  up-to-date  up-to-date     4.00 KiB        3",
    ]


def test_a_pair_without_encryption_says_so_every_time() -> None:
    assert any(line.startswith("insecure: ") for line in render(judge(status(insecure=True))))
    assert not any("insecure" in line for line in render(judge(status())))


def test_a_refusal_stands_in_the_link_column() -> None:
    facts = status(
        peer={"connected": False, "link": "refused"}, refusal=Refusal(kind="split-brain", reason="both wrote")
    )
    assert [re.split(" {2,}", line.strip())[3] for line in render(judge(facts))[2:4]] == ["split brain"] * 2


def test_what_a_peer_says_cannot_reach_the_terminal_raw() -> None:
    lines = render(judge(status(peer={"address": "\x1b]0;owned\x07"}, serving="held", held="\x1b[31mred\nline")))
    assert all("\x1b" not in line and "\n" not in line for line in lines)


def test_colour_is_only_added() -> None:
    import click

    plain, coloured = render(judge(resyncing())), render(judge(resyncing()), color=True)
    assert [click.unstyle(line) for line in coloured] == plain
    assert coloured != plain


@pytest.mark.parametrize(
    ("done", "total", "shown"),
    [(0, 100, ">-------------"), (50, 100, "=======>------"), (99, 100, "=============>"), (100, 100, "=" * 14)],
)
def test_a_bar_reads_without_colour_and_is_full_only_at_the_end(done: int, total: int, shown: str) -> None:
    assert bar(done, total, lambda text, _colour: text, ascii_only=True) == shown


@given(st.integers(-5, 1 << 70), st.integers(-5, 1 << 70))
def test_a_bar_has_its_width(done: int, total: int) -> None:
    assert len(bar(done, total, lambda text, _colour: text)) == BAR_WIDTH


# --- small things


@pytest.mark.parametrize(("seconds", "text"), [(0.3, "0 s ago"), (4.9, "4 s ago"), (134.2, "2m14s ago")])
def test_ago(seconds: float, text: str) -> None:
    assert ago(seconds) == text


def test_the_worst_disk() -> None:
    assert worst(["up-to-date", "inconsistent", "outdated"]) == "inconsistent"
    assert worst(["up-to-date", "unknown"]) == "up-to-date"
    assert worst([]) == "unknown"


def test_the_disk_states_are_history_s_in_the_same_order() -> None:
    assert (*DISK_STATES, "unknown") == DISKS


def test_events_are_numbered_and_bounded() -> None:
    log = EventLog("beta", keep=3)
    for number in range(1, 6):
        event = log.add(1.0 * number, "role", f"reason {number}", epoch=number)
        assert event.seq == number
    assert [event.seq for event in log.since(0)] == [3, 4, 5]
    assert [event.seq for event in log.since(4)] == [5]
    assert log.since(5) == []
    assert [event.seq for event in log.since(99)] == [3, 4, 5]  # a number of an earlier run


def test_event_lines() -> None:
    log = EventLog("beta")
    log.add(0.0, "role", "by hand", epoch=1, old="secondary", new="primary")
    log.add(61.5, "disk", "resync done", epoch=1, volume="data", old="inconsistent", new="up-to-date")
    assert event_lines(log.since(0)) == [
        "1  1970-01-01 00:00:00Z  role  -     secondary -> primary        by hand",
        "2  1970-01-01 00:01:01Z  disk  data  inconsistent -> up-to-date  resync done",
    ]
    assert event_lines([]) == []


@given(
    st.sampled_from(["source", "target"]),
    st.lists(st.tuples(st.floats(0, 5), st.tuples(*[st.integers(-(2**63), 2**63)] * 4)), max_size=20),
)
def test_r11_resync_progress_is_clamped(
    direction: Literal["source", "target"], looks: list[tuple[float, tuple[int, ...]]]
) -> None:
    now = 100.0
    meter = ResyncMeter(direction, now)
    for step, (total, done, skipped, sent) in looks:
        now += step
        shown = meter.update(now, total=total, done=done, skipped=skipped, sent=sent)
        assert 0 <= shown.skipped_bytes <= shown.done_bytes <= shown.total_bytes
        assert shown.sent_bytes >= 0
        assert shown.rate >= 0
        assert shown.eta_s is None or shown.eta_s >= 0
        assert (shown.stalled is None) or shown.done_bytes < shown.total_bytes


def test_r11_a_stall_has_its_reason_and_ends() -> None:
    meter = ResyncMeter("source", 0.0)
    assert meter.update(2.9, total=10, done=0, skipped=0, sent=0).stalled is None
    stalled = meter.update(4.0, total=10, done=0, skipped=0, sent=0, waits_for="the disk of alpha").stalled
    assert stalled == "nothing has moved for 4 s, waiting for the disk of alpha"
    assert meter.update(4.1, total=10, done=1, skipped=0, sent=0).stalled is None
    assert meter.update(9.0, total=10, done=10, skipped=0, sent=0).stalled is None
