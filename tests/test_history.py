"""Generation ids and the handshake: the table row by row, its rules over whole generated spaces, and a pair that is
played through writes, cuts, crashes and lost boots (pairplay.py)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest
from pairplay import LostWriteError, Node, Pair, play

from mirrorpair import history
from mirrorpair.history import (
    DISK_STATES,
    HISTORY_IDS,
    MAX_ID,
    Decision,
    DiskState,
    Ids,
    Role,
    Side,
    adopt,
    began_alone,
    decide,
    first,
    forget_bitmap,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

UNSOUND: tuple[DiskState, ...] = ("diskless", "failed", "inconsistent")
SAME = Ids(7, 0, (3,))


def side(node: str = "alpha", ids: Ids = SAME, **facts: Any) -> Side:
    given: dict[str, Any] = {"size": 1 << 20, "block_size": 65536, "role": "secondary", "disk": "up-to-date"}
    return Side(node=node, ids=ids, new=ids.current == 0, **(given | facts))


def both(alpha: dict[str, Any], beta: dict[str, Any], *, register: str | None = None) -> Decision:
    """The decision of two sides, the same whoever asks (H4)."""
    one, other = side("alpha", **alpha), side("beta", **beta)
    found = decide(one, other, register_source=register)
    assert decide(other, one, register_source=register) == found
    return found


def outcome(decision: Decision) -> tuple[str, str | None]:
    return decision.amount, decision.source


# --- G1, G4: how ids change


def test_g1_the_first_write_alone_begins_a_generation_and_keeps_bits_since_the_last_one() -> None:
    assert began_alone(Ids(7, 0, (3,)), 9) == Ids(9, 7, (3,))


def test_g1_a_second_time_alone_keeps_the_older_bitmap_id_because_the_bits_count_from_there() -> None:
    assert began_alone(Ids(9, 7, (3,)), 11) == Ids(11, 7, (9, 3))


def test_g1_a_peer_whose_word_of_the_resyncs_end_was_lost_is_older_after_the_next_write_alone() -> None:
    alone = began_alone(first(7), 9)
    done = adopt(alone)  # durable at the target; its "done" is lost, and the source writes on
    assert outcome(both({"ids": alone, "dirty": True}, {"ids": done})) == ("bitmap", "alpha")
    crashed = {"crashed_primary": True, "boot_lost": True, "dirty": True}
    assert outcome(both({"ids": began_alone(alone, 11)} | crashed, {"ids": done})) == ("full", "alpha")
    # Without that id they seem equal, and what alpha wrote alone would be lost.
    assert outcome(both({"ids": alone} | crashed, {"ids": done})) == ("bitmap", "beta")


def test_both_new_with_writes_that_were_never_answered_are_not_taken_for_zeros() -> None:
    """Found by the simulation: alpha was promoted, crashed in its first write, was read, and the peer had zeros."""
    new = {"ids": Ids()}
    assert outcome(both(new, new)) == ("none", None)
    assert outcome(both(new | {"dirty": True}, new)) == ("full", "alpha")
    assert outcome(both(new | {"role": "primary"}, new | {"dirty": True})) == ("full", "alpha")


def test_g1_a_new_volume_gets_its_first_id_by_its_first_write() -> None:
    assert began_alone(Ids(), 5) == first(5) == Ids(5, 0, ())


def test_g4_the_target_has_what_the_source_will_have_when_it_has_forgotten_its_bitmap_id() -> None:
    source = Ids(11, 7, (9, 3))
    assert adopt(source) == forget_bitmap(source) == Ids(11, 0, (7, 9, 3))
    assert forget_bitmap(forget_bitmap(source)) == forget_bitmap(source)


def test_history_keeps_the_newest_32() -> None:
    ids = first(1)
    for new in range(2, 100):
        ids = forget_bitmap(began_alone(ids, new))
    assert ids.history == tuple(range(98, 98 - HISTORY_IDS, -1))


@pytest.mark.parametrize("wrong", [0, -1, MAX_ID + 1, 7, 9, 3])
def test_a_new_id_must_be_new(wrong: int) -> None:
    with pytest.raises(ValueError, match="generation id"):
        began_alone(Ids(7, 9, (3,)), wrong)


@pytest.mark.parametrize(
    "ids",
    [
        (0, 5, ()),
        (0, 0, (5,)),
        (5, 5, ()),
        (5, 0, (5,)),
        (5, 0, (4, 4)),
        (5, 0, (0,)),
        (-1, 0, ()),
        (2**64, 0, ()),
        (1, 0, tuple(range(2, 35))),
    ],
)
def test_ids_that_no_node_can_have_are_refused(ids: tuple[int, int, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="id"):
        Ids(*ids)


def test_a_peers_side_is_validated_when_it_is_decoded() -> None:
    good = side(ids=Ids(MAX_ID, 1, (2,)))
    assert msgspec.json.decode(msgspec.json.encode(good), type=Side) == good
    for change in (
        {"node": ""},
        {"node": "a\nb"},
        {"size": -1},
        {"block_size": 0},
        {"epoch": -1},
        {"new": True},
        {"disk": "fine"},
        {"role": "arbiter"},
        {"ids": {"current": 2**64}},
    ):
        raw = msgspec.json.encode(msgspec.to_builtins(good) | change)
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(raw, type=Side)


# --- the table, row by row

NEW = {"ids": Ids()}
A_NEWER = {"ids": Ids(9, 7, (3,))}
ROWS: list[tuple[str, dict[str, Any], dict[str, Any], str, str | None, str]] = [
    ("size", {"size": 1}, {}, "refuse", None, "options"),
    ("block size", {"block_size": 4096}, {}, "refuse", None, "options"),
    ("both discard", {"discard": True}, {"discard": True}, "refuse", None, "options"),
    ("failed disk", {}, {"disk": "failed"}, "refuse", None, "options"),
    ("both new", NEW, NEW, "none", None, "both-new"),
    ("both new, one a broken-off target", NEW, NEW | {"disk": "inconsistent"}, "full", "alpha", "both-new"),
    ("both new, both broken off", NEW | {"missed_end": True}, NEW | {"disk": "inconsistent"}, "refuse", None, "H1"),
    ("both new, both primary", NEW | {"role": "primary"}, NEW | {"role": "primary"}, "refuse", None, "H1"),
    ("one new", NEW, {}, "full", "beta", "one-new"),
    ("one new, the other inconsistent", NEW, {"disk": "inconsistent"}, "refuse", None, "H1"),
    ("one new and primary", NEW | {"role": "primary"}, {}, "refuse", None, "H1"),
    ("missed end", {"missed_end": True}, {}, "bitmap", "beta", "missed-end"),
    ("both missed the end", {"missed_end": True}, {"missed_end": True}, "refuse", None, "H1"),
    ("merely reconnect", {}, {}, "none", None, "reconnect"),
    ("merely reconnect, outdated", {"disk": "outdated"}, {"role": "primary"}, "none", None, "reconnect"),
    ("G5 bits left", {}, {"dirty": True}, "bitmap", "beta", "left-over-bits"),
    ("bits on both", {"dirty": True}, {"dirty": True, "epoch": 2}, "bitmap", "beta", "left-over-bits"),
    ("bits on both alike", {"dirty": True}, {"dirty": True}, "bitmap", "alpha", "left-over-bits"),
    ("bits left on one that discards", {}, {"dirty": True, "discard": True}, "bitmap", "alpha", "discard"),
    ("a primary that discards", {"role": "primary", "discard": True}, {"dirty": True}, "refuse", None, "discard"),
    ("H1 a primary stays source", {"dirty": True}, {"role": "primary"}, "bitmap", "beta", "primary"),
    ("both primary", {"role": "primary"}, {"role": "primary"}, "refuse", None, "H1"),
    ("H1 inconsistent", {"disk": "inconsistent", "dirty": True}, {}, "bitmap", "beta", "H1"),
    ("H1 both inconsistent", {"disk": "inconsistent"}, {"disk": "inconsistent"}, "refuse", None, "H1"),
    ("H1 outdated", {"disk": "outdated", "dirty": True}, {}, "bitmap", "beta", "H1"),
    ("H1 consistent", {"disk": "consistent", "dirty": True}, {}, "bitmap", "beta", "H1"),
    ("H1 inconsistent primary", {"disk": "inconsistent", "role": "primary"}, {}, "refuse", None, "H1"),
    ("crashed, same boot", {}, {"crashed_primary": True}, "bitmap", "beta", "crashed-primary"),
    (
        "crashed, same boot, survivor",
        {"connected_survivor": True},
        {"crashed_primary": True},
        "bitmap",
        "beta",
        "crashed-primary",
    ),
    ("crashed, replaced", {"epoch": 6}, {"crashed_primary": True, "epoch": 5}, "bitmap", "alpha", "replaced"),
    ("crashed, replaced by a primary", {"role": "primary"}, {"crashed_primary": True}, "bitmap", "alpha", "primary"),
    (
        "replaced by one that lost its boot",
        {"epoch": 6, "boot_lost": True},
        {"crashed_primary": True, "epoch": 5},
        "bitmap",
        "alpha",
        "replaced",
    ),
    (
        "A4 crashed, new boot, survivor",
        {"connected_survivor": True},
        {"crashed_primary": True, "boot_lost": True},
        "bitmap",
        "alpha",
        "survivor",
    ),
    ("A4 crashed, new boot", {}, {"crashed_primary": True, "boot_lost": True}, "bitmap", "alpha", "survivor"),
    ("survivor alone says so", {}, {"connected_survivor": True}, "bitmap", "beta", "survivor"),
    (
        "both off, one crashed primary",
        {"boot_lost": True},
        {"crashed_primary": True, "boot_lost": True},
        "bitmap",
        "beta",
        "both-off",
    ),
    (
        "both off, two crashed primaries",
        {"crashed_primary": True, "boot_lost": True, "epoch": 3},
        {"crashed_primary": True, "boot_lost": True, "epoch": 4},
        "bitmap",
        "beta",
        "replaced",
    ),
    (
        "the same, equal epochs",
        {"crashed_primary": True, "dirty": True},
        {"crashed_primary": True},
        "bitmap",
        "alpha",
        "both-off",
    ),
    (
        "the same, one boot kept",
        {"crashed_primary": True, "boot_lost": True},
        {"crashed_primary": True},
        "bitmap",
        "beta",
        "survivor",
    ),
    ("A7 crashed secondary", {"boot_lost": True, "dirty": True}, {}, "bitmap", "beta", "survivor"),
    (
        "A4 a primary without its boot",
        {"role": "primary", "boot_lost": True, "crashed_primary": True},
        {"connected_survivor": True},
        "refuse",
        None,
        "A4",
    ),
    (
        "A4 the same, discarded",
        {"role": "primary", "boot_lost": True, "crashed_primary": True},
        {"connected_survivor": True, "discard": True},
        "bitmap",
        "alpha",
        "primary",
    ),
    ("bitmap", A_NEWER, {}, "bitmap", "alpha", "bitmap"),
    ("bitmap, target inconsistent", A_NEWER, {"disk": "inconsistent"}, "bitmap", "alpha", "bitmap"),
    ("bitmap, source inconsistent", A_NEWER | {"disk": "inconsistent"}, {}, "refuse", None, "H1"),
    (
        "bitmap, source inconsistent and discarded",
        A_NEWER | {"disk": "inconsistent", "discard": True},
        {},
        "bitmap",
        "beta",
        "discard",
    ),
    ("discard of newer data", A_NEWER | {"discard": True}, {}, "refuse", None, "discard"),
    ("H2", A_NEWER, {"role": "primary", "alone": True}, "refuse", None, "H2"),
    ("older and primary", A_NEWER, {"role": "primary"}, "refuse", None, "H1"),
    ("M1 distrusted target", A_NEWER, {"distrusted": True}, "full", "alpha", "bitmap"),
    ("M1 distrusted source", A_NEWER | {"distrusted": True}, {}, "refuse", None, "H1"),
    ("M1 distrusted, equal ids", {"distrusted": True, "dirty": True}, {}, "full", "beta", "H1"),
    ("history", {"ids": Ids(9, 0, (8, 7))}, {}, "full", "alpha", "history"),
    ("history beside a bitmap id", {"ids": Ids(9, 8, (7,))}, {}, "full", "alpha", "history"),
    ("split brain, same bitmap ids", {"ids": Ids(9, 7)}, {"ids": Ids(8, 7)}, "split-brain", None, "split-brain"),
    ("split brain, common ancestor", {"ids": Ids(9, 2)}, {"ids": Ids(8, 0, (2,))}, "split-brain", None, "split-brain"),
    ("split brain, discarded", {"ids": Ids(9, 7), "discard": True}, {"ids": Ids(8, 7)}, "bitmap", "beta", "discard"),
    ("the same, deeper", {"ids": Ids(9, 2)}, {"ids": Ids(8, 0, (2,)), "discard": True}, "full", "alpha", "discard"),
    (
        "split brain, discarded by a primary",
        {"ids": Ids(9, 7), "discard": True, "role": "primary", "alone": True},
        {"ids": Ids(8, 7)},
        "refuse",
        None,
        "H2",
    ),
    ("unrelated", {"ids": Ids(9)}, {"ids": Ids(8, 2, (1,))}, "unrelated", None, "unrelated"),
    ("unrelated, discarded", {"ids": Ids(9)}, {"ids": Ids(8), "discard": True}, "full", "alpha", "discard"),
    ("contradiction", {"ids": Ids(9, 8)}, {"ids": Ids(8, 0, (9,))}, "refuse", None, "contradiction"),
]


@pytest.mark.parametrize(("alpha", "beta", "amount", "source", "rule"), [pytest.param(*r[1:], id=r[0]) for r in ROWS])
def test_row(alpha: dict[str, Any], beta: dict[str, Any], amount: str, source: str | None, rule: str) -> None:
    found = both(alpha, beta)
    assert (found.amount, found.source, found.rule) == (amount, source, rule)
    assert (found.target is None) == (found.source is None)
    assert "\n" not in found.reason
    assert "alpha" in found.reason or "beta" in found.reason


def test_a_node_does_not_meet_itself() -> None:
    found = decide(side("alpha", size=1), side("alpha"))
    assert found == decide(side("alpha"), side("alpha", size=1))
    assert found.amount == "refuse"


# --- H5: the register names the source


@pytest.mark.parametrize(
    ("alpha", "beta", "register", "amount", "source"),
    [
        ({"dirty": True}, {}, "beta", "bitmap", "beta"),
        ({}, {}, "beta", "none", None),
        (NEW, NEW, "alpha", "none", None),
        (NEW, {}, "beta", "full", "beta"),
        (NEW, {}, "alpha", "refuse", None),
        (NEW, {"discard": True}, "alpha", "refuse", None),
        (A_NEWER, {}, "alpha", "bitmap", "alpha"),
        (A_NEWER, {}, "beta", "refuse", None),
        (A_NEWER | {"discard": True}, {}, "beta", "bitmap", "beta"),
        (A_NEWER, {"discard": True}, "alpha", "bitmap", "alpha"),
        ({"ids": Ids(9, 7)}, {"ids": Ids(8, 7)}, "alpha", "split-brain", None),
        ({"ids": Ids(9, 7)}, {"ids": Ids(8, 7), "discard": True}, "alpha", "bitmap", "alpha"),
        ({"ids": Ids(9, 7)}, {"ids": Ids(8, 7), "discard": True}, "beta", "refuse", None),
        ({"crashed_primary": True}, {}, "beta", "bitmap", "beta"),
        ({"disk": "inconsistent"}, {}, "alpha", "refuse", None),
        ({"dirty": True}, {"role": "primary"}, "alpha", "refuse", None),
        ({}, {}, "gamma", "refuse", None),
    ],
)
def test_h5_the_register_names_the_source_and_the_table_the_amount(
    alpha: dict[str, Any], beta: dict[str, Any], register: str, amount: str, source: str | None
) -> None:
    assert outcome(both(alpha, beta, register=register)) == (amount, source)


# --- whole spaces


def all_ids(universe: int, deepest: int) -> list[Ids]:
    """Every valid Ids of so few numbers."""
    found = [Ids()]
    for current in range(1, universe + 1):
        others = [one for one in range(1, universe + 1) if one != current]
        for bitmap in [0, *others]:
            rest = [one for one in others if one != bitmap]
            for length in range(min(deepest, len(rest)) + 1):
                found += [Ids(current, bitmap, past) for past in itertools.permutations(rest, length)]
    return found


def facts(disks: tuple[DiskState, ...], flags: tuple[str, ...], epochs: tuple[int, ...]) -> list[dict[str, Any]]:
    return [
        {"role": role, "disk": disk, "epoch": epoch, **dict(zip(flags, values, strict=True))}
        for role in ("primary", "secondary")
        for disk in disks
        for epoch in epochs
        for values in itertools.product((False, True), repeat=len(flags))
    ]


def sides(ids: list[Ids], given: list[dict[str, Any]]) -> tuple[list[Side], list[Side]]:
    return (
        [side("alpha", one, **fact) for one in ids for fact in given],
        [side("beta", one, **fact) for one in ids for fact in given],
    )


CRASH_FLAGS = ("crashed_primary", "boot_lost", "connected_survivor", "dirty")


def equal_ids_space() -> Iterator[tuple[Side, Side]]:
    given = facts(("inconsistent", "outdated", "up-to-date"), (*CRASH_FLAGS, "missed_end"), (1, 2))
    yield from itertools.product(*sides([SAME], given))


def ids_space() -> Iterator[tuple[Side, Side]]:
    given = facts(("inconsistent", "consistent"), (), (1,))
    yield from itertools.product(*sides(all_ids(4, 2), given))


def discard_space() -> Iterator[tuple[Side, Side]]:
    given = facts(("inconsistent", "up-to-date"), ("discard", "distrusted", "alone"), (1,))
    yield from itertools.product(*sides(all_ids(3, 1), given))


def check(one: Side, other: Side, register: str | None = None) -> Decision:
    """What must hold of every decision, whatever the sides are."""
    found = decide(one, other, register_source=register)
    assert decide(other, one, register_source=register) == found  # H4
    if found.source is None:
        assert found.target is None
        assert found.amount in ("none", "refuse", "split-brain", "unrelated")
    else:
        source, target = (one, other) if one.node == found.source else (other, one)
        assert found.amount in ("bitmap", "full")
        assert found.target == target.node
        # H1
        assert source.disk not in UNSOUND
        assert not source.missed_end
        assert not source.distrusted
        assert not source.new or target.new
        assert target.role == "secondary"  # H1, H2
        assert not source.discard
        assert found.amount == "full" or not (target.distrusted or source.new or target.new)
        if source.ids.current != target.ids.current and not target.discard and not target.new:
            # Without a person's word only an ancestor is overwritten.
            assert target.ids.current in (source.ids.bitmap, *source.ids.history)
            assert source.ids.current not in (target.ids.bitmap, *target.ids.history)
        if found.amount == "bitmap" and source.ids.current != target.ids.current:
            # The bits count from data that both had.
            assert source.ids.bitmap in (target.ids.current, target.ids.bitmap) or (
                target.ids.bitmap == source.ids.current
            )
        if register is not None:
            assert found.source == register  # H5
    if found.amount == "none":
        for each in (one, other):
            assert each.disk not in UNSOUND
            assert not each.missed_end
            assert not each.distrusted
            assert not each.dirty  # also before the first id: what was never answered may have been read
            assert each.new or not each.crashed_primary  # G5
        assert one.ids.current == other.ids.current
    if found.amount == "split-brain":
        shared = {one.ids.current, one.ids.bitmap, *one.ids.history} & {
            other.ids.current,
            other.ids.bitmap,
            *other.ids.history,
        }
        assert shared - {0}
    if found.amount == "unrelated":
        assert not ({one.ids.current, *one.ids.history} & {other.ids.current, *other.ids.history})
    return found


def test_h1_h2_h4_every_combination_of_crash_facts_at_equal_ids() -> None:
    seen = {check(one, other).rule for one, other in equal_ids_space()}
    assert seen >= {"H1", "primary", "replaced", "survivor", "crashed-primary", "both-off", "left-over-bits", "A4"}


def test_h1_h2_h4_every_combination_of_ids() -> None:
    seen = {(check(one, other).amount) for one, other in ids_space()}
    assert seen == {"none", "bitmap", "full", "refuse", "split-brain", "unrelated"}


def test_h1_h2_h4_every_combination_of_discard_and_distrust() -> None:
    assert "discard" in {check(one, other).rule for one, other in discard_space()}


def test_h5_any_combination_with_a_register(rng: random.Random) -> None:
    for one, other in itertools.islice(random_sides(rng), 20_000):
        check(one, other, rng.choice(["alpha", "beta"]))


def test_h4_any_combination_at_all(rng: random.Random) -> None:
    for one, other in itertools.islice(random_sides(rng), 40_000):
        check(one, other)


def test_nothing_depends_on_the_names_but_the_rows_that_say_so(rng: random.Random) -> None:
    """With the names exchanged the same data are the source: what H4 alone, by its order of names, cannot show."""
    other_name = {"alpha": "beta", "beta": "alpha"}
    for one, other in itertools.islice(random_sides(rng), 20_000):
        renamed = [msgspec.structs.replace(each, node=other_name[each.node]) for each in (one, other)]
        found, again = decide(one, other), decide(*renamed)
        assert again.amount == found.amount
        if found.source is not None and "lower name" not in found.reason:
            assert again.source == other_name[found.source]


def random_sides(rng: random.Random) -> Iterator[tuple[Side, Side]]:
    ids = all_ids(3, 2)
    flags = (*CRASH_FLAGS, "missed_end", "alone", "discard", "distrusted")

    def one(node: str, shared: Ids | None) -> Side:
        return side(
            node,
            shared or rng.choice(ids),
            role=cast("Role", rng.choice(["primary", "secondary"])),
            disk=rng.choice(DISK_STATES[2:] if rng.random() < 0.9 else DISK_STATES),
            epoch=rng.randrange(3),
            **{flag: rng.random() < 0.25 for flag in flags},
        )

    while True:
        shared = rng.choice(ids) if rng.random() < 0.5 else None
        yield one("alpha", shared), one("beta", shared)


# --- R6: going on where it stopped


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [
        ({}, NEW),
        ({"ids": Ids(8, 7, (2,))}, {"ids": Ids(2)}),
        ({}, {"ids": Ids(99), "discard": True}),
        ({}, {"distrusted": True}),
        (NEW, {**NEW, "disk": "inconsistent"}),
    ],
    ids=["one-new", "history", "unrelated", "distrusted", "both-new"],
)
def test_r6_a_full_compare_that_was_cut_off_goes_on_with_the_bits_that_are_left(
    alpha: dict[str, Any], beta: dict[str, Any]
) -> None:
    cut_off = beta | {"disk": "inconsistent"}
    assert outcome(both(alpha, cut_off)) == ("full", "alpha")
    goes_on = both(alpha | {"full_id": 5}, cut_off | {"full_id": 5})
    assert outcome(goes_on) == ("bitmap", "alpha")
    assert "goes on with what the last compare had left" in goes_on.reason
    for one, other in ((0, 5), (5, 0), (4, 5)):  # not all bits were durable at the source, or it is another one
        assert outcome(both(alpha | {"full_id": one}, cut_off | {"full_id": other})) == ("full", "alpha")


def test_r6_its_number_makes_less_to_copy_and_changes_nothing_else() -> None:
    fewer = 0
    for one, other in ids_space():
        plain = decide(one, other)
        same = [msgspec.structs.replace(each, full_id=MAX_ID) for each in (one, other)]
        found = decide(*same)
        assert (found.rule, found.source, found.target) == (plain.rule, plain.source, plain.target)
        assert found.amount == ("bitmap" if plain.amount == "full" else plain.amount)
        fewer += found != plain
        assert decide(same[0], other) == decide(one, same[1]) == plain
    assert fewer > 100


def test_r6_the_direction_cannot_turn_while_the_target_is_inconsistent() -> None:
    for one, other in ids_space():
        if "inconsistent" in (one.disk, other.disk):
            found = decide(one, other)
            assert found.source is None or found.target == (one.node if one.disk == "inconsistent" else other.node)


# --- a pair that is played


def play_many(rng: random.Random, games: int) -> set[str]:
    seen: set[str] = set()
    for _ in range(games):
        seen |= play(Pair(rng), steps=60)
    return seen


@pytest.mark.parametrize("part", range(4))
def test_no_acknowledged_write_is_overwritten_whatever_happens(rng: random.Random, part: int) -> None:
    assert {"none", "bitmap", "full"} <= play_many(rng, 150)


# The rarest of the weakened rules below loses a write in one game of 580 (counted over 220,000 games): one run in 10^15
# would not see it in so many. A run ends with the first lost write, after 0.13 s on average.
ENOUGH_GAMES = 20_000

WEAKENED = {
    "without A4, A7 (a lost boot)": {"survivor"},
    "without H1 (disk states)": {"H1", "missed-end"},
    "without the rows of crashes": {"crashed-primary", "both-off", "replaced", "survivor"},
}


@pytest.mark.parametrize("rules", [pytest.param(rules, id=name) for name, rules in WEAKENED.items()])
def test_the_play_notices_a_weakened_table(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch, rules: set[str]
) -> None:
    rows = tuple(row for row in history._EQUAL_ROWS if row.rule not in rules)
    monkeypatch.setattr(history, "_EQUAL_ROWS", rows)
    if "H1" in rules:
        monkeypatch.setattr(history, "_sound", lambda _: True)
    with pytest.raises(LostWriteError):
        play_many(rng, ENOUGH_GAMES)


def test_the_play_notices_a_full_compare_whose_number_is_kept_before_the_bits(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_early(pair: Pair, source: Node, target: Node) -> None:
        if pair.resync and pair.resync.amount == "full":
            source.full_id = target.full_id

    monkeypatch.setattr(Pair, "keep_full", too_early)
    with pytest.raises(LostWriteError):
        play_many(rng, ENOUGH_GAMES)
