"""The blind sum against plain addition, what its server sees, and what each of its rules prevents."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from partway.errors import JobFailed, PartwayError, PeerError
from partway.privacy.blind_sum import LIMBS, BlindSum, ClearSum, add, decode, encode
from partway.privacy.seal import SEAL_BYTES, Keys, Public, statement

JOB = bytes(range(32))
DTYPES = sorted(LIMBS, key=str)


def group(sites: int, epoch: int = 0) -> list[BlindSum]:
    """Sites that have agreed, in the order of their names."""
    keys = [Keys(f"site{i:02}", JOB, epoch) for i in range(sites)]
    publics = {k.me: Public(b"certificate of " + k.me.encode(), k.public) for k in keys}
    for key in keys:
        key.agree(publics)
    sums = {k.me: BlindSum(k) for k in keys}
    first = keys[0].seats[0]
    for name, sealed in sums[first].offer().items():
        sums[name].accept(sealed)
    return list(sums.values())


def shares(sites: int, dtype: str | np.dtype, numbers: int = 200, seed: int = 0) -> list[np.ndarray]:
    """From 1e-9 to 10, and some exact zeros."""
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((sites, numbers)) * 10.0 ** rng.integers(-9, 2, (sites, numbers))
    drawn[:, :9] = 0
    return list(drawn.astype(dtype))


def summed(sums: list[BlindSum], parts: list[np.ndarray], turn: int = 0, segment: str = "bottom") -> list[np.ndarray]:
    total = add([s.mask(turn, segment, p) for s, p in zip(sums, parts, strict=True)])
    return [s.unmask(turn, segment, total, parts[0].dtype) for s in sums]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sites", [2, 3, 4, 5, 8, 20, 21, 40])
def test_equals_plain_addition_with_the_same_bits_at_every_site(sites: int, dtype: np.dtype) -> None:
    parts = shares(sites, dtype)
    totals = summed(group(sites), parts)
    assert all(np.array_equal(totals[0], t) for t in totals)
    plain = np.sum(np.array(parts, np.float64), 0)
    rounding = {4: sites * 2.0**-41 + 2.0**-24 * np.abs(plain), 8: 1e-16 + 2.0**-50 * np.abs(parts).sum(0)}
    assert (np.abs(totals[0] - plain) <= rounding[dtype.itemsize]).all()
    assert not totals[0][:9].any()
    assert totals[0].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_server_sees_noise_in_every_share_and_in_the_total(dtype: np.dtype) -> None:
    sums, parts = group(5), shares(5, dtype, 3000)
    masked = [s.mask(0, "bottom", p) for s, p in zip(sums, parts, strict=True)]
    for seen in (*masked, add(masked)):
        counts = np.bincount(np.frombuffer(seen.tobytes(), np.uint8), minlength=256)
        expected = counts.sum() / 256
        assert 150 < ((counts - expected) ** 2 / expected).sum() < 400  # chi-square of 255 degrees of freedom
    clear = add([encode(p, 5) for p in parts])
    counts = np.bincount(np.frombuffer(clear.tobytes(), np.uint8), minlength=256)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() > 1000


def test_without_any_one_mask_the_server_cannot_read_the_total() -> None:
    """Each pair's mask, and the group's, must be there: leaving one out must not give the plain sum."""
    sums, parts = group(3), shares(3, "float64")
    masked = [s.mask(0, "bottom", p) for s, p in zip(sums, parts, strict=True)]
    plain = add([encode(p, 3) for p in parts])
    for chosen in itertools.chain.from_iterable(itertools.combinations(masked, n) for n in (1, 2, 3)):
        assert np.count_nonzero(add(chosen) == plain) < 3


def test_only_one_site_adds_the_group_mask() -> None:
    """Were it all of an even number, the low bits of the total would lie open."""
    sums = group(4)
    zeros = np.zeros(4000, "float32")
    total = add([s.mask(0, "bottom", zeros) for s in sums])
    assert 1700 < np.count_nonzero(total & np.uint64(1)) < 2300


@pytest.mark.parametrize("change", ["turn", "segment", "epoch", "job"])
def test_every_name_has_a_mask_of_its_own(change: str) -> None:
    secret, zeros = bytes(32), np.zeros(400, "float32")

    def masked(turn: int = 0, segment: str = "bottom", epoch: int = 0, job: bytes = JOB) -> np.ndarray:
        keys = Keys("a", job, epoch)
        keys.seats, keys.masking = ("b", "a"), {"b": secret}
        return BlindSum(keys).mask(turn, segment, zeros)

    assert np.array_equal(masked(), masked())
    other = {"turn": 1, "segment": "head", "epoch": 1, "job": bytes(32)}[change]
    assert not np.any(masked() == masked(**{change: other}))


def test_a_mask_is_used_once() -> None:
    sums, parts = group(3), shares(3, "float32")
    one = sums[0].mask(4, "bottom", parts[0])
    assert np.array_equal(sums[0].mask(4, "bottom", parts[0]), one)
    with pytest.raises(JobFailed, match="used the mask of bottom in turn 4 before"):
        sums[0].mask(4, "bottom", np.zeros_like(parts[0]))
    with pytest.raises(JobFailed, match="has left turn 3 behind"):
        sums[0].mask(3, "bottom", parts[0])
    sums[0].mask(4, "head", parts[1])
    sums[0].mask(5, "bottom", parts[1])


def test_what_a_mask_used_twice_would_give_away() -> None:
    sums, parts = group(3), shares(3, "float32")
    one = sums[0].mask(0, "bottom", parts[0])
    sums[0]._sent.clear()  # the rule broken
    zero = sums[0].mask(0, "bottom", np.zeros_like(parts[0]))
    assert np.array_equal(decode(one - zero, np.dtype("float32")), decode(encode(parts[0], 3), np.dtype("float32")))


def test_a_total_is_taken_only_where_a_share_was_sent() -> None:
    sums, parts = group(3), shares(3, "float32")
    total = sums[0].mask(2, "bottom", parts[0])
    for turn, segment in ((1, "bottom"), (2, "head"), (3, "bottom")):
        with pytest.raises(JobFailed, match="has sent no share"):
            sums[0].unmask(turn, segment, total, np.dtype("float32"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
def test_what_cannot_be_summed_stops_the_site_before_it_is_masked(bad: float, dtype: np.dtype) -> None:
    with pytest.raises(JobFailed, match="share of a sum"):
        encode(np.array([0, bad], dtype), 5)


def test_the_range_is_that_of_the_total() -> None:
    limit = 2.0**22 / 5
    encode(np.array([limit * 0.99, -limit * 0.99], "float32"), 5)
    for sign in (1, -1):
        with pytest.raises(JobFailed, match=r"at most 8\.39e"):
            encode(np.array([sign * limit], "float32"), 5)


@settings(max_examples=50)
@given(st.lists(st.floats(-1000, 1000), min_size=1, max_size=30), st.sampled_from(DTYPES))
def test_fixed_point_loses_no_more_than_it_says(numbers: list[float], dtype: np.dtype) -> None:
    x = np.array(numbers, dtype)
    back = decode(encode(x, 5), dtype)
    assert np.abs(back.astype("float64") - x.astype("float64")).max() <= 2.0 ** -(LIMBS[dtype][-1] + 1)


def test_a_clear_sum_is_plain_addition() -> None:
    parts = shares(3, "float64")
    clear = ClearSum()
    total = add([clear.mask(0, "bottom", p) for p in parts])
    assert np.array_equal(clear.unmask(0, "bottom", total, parts[0].dtype), parts[0] + parts[1] + parts[2])


# -- keys


def test_all_who_heard_the_same_confirm_the_same() -> None:
    sums, others = group(3), group(3)
    assert len({s.confirmation("site01") for s in sums}) == 1
    assert sums[0].confirmation("site01") != sums[0].confirmation("site02")
    assert sums[0].confirmation("site01") != others[0].confirmation("site01")


def test_a_key_that_somebody_between_the_sites_has_exchanged() -> None:
    a, b, c, between = (Keys(name, JOB) for name in ("a", "b", "c", "b"))
    publics = {k.me: Public(k.me.encode(), k.public) for k in (a, b, c)}
    a.agree(publics | {"b": Public(b"b", between.public)})
    b.agree(publics)
    assert a.transcript != b.transcript
    with pytest.raises(PeerError, match="does not open"):
        b.open("a", a.seal("b", b"weights", b""), b"")


def test_no_group_key_no_confirmation() -> None:
    with pytest.raises(JobFailed, match="no group key"):
        BlindSum(Keys("a", JOB)).confirmation("a")


def test_every_site_masks_towards_its_neighbours_and_they_towards_it() -> None:
    for sites in (2, 3, 5, 20, 21, 33):
        keys = [s._keys for s in group(sites)]
        near = {k.me: set(k.masking) for k in keys}
        expected = sites - 1 if sites <= 20 else 2 * math.ceil(math.log2(sites))
        assert all(len(names) == expected for names in near.values())
        assert all(me in near[other] for me, names in near.items() for other in names)
        for key in keys:
            for other in keys:
                if other.me in key.masking:
                    assert key.masking[other.me] == other.masking[key.me]


def test_seats_depend_on_what_all_have_shown() -> None:
    seats = {tuple(group(6)[0]._keys.seats) for _ in range(8)}
    assert len(seats) > 1


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(32)])
def test_a_key_that_is_none_is_its_sender_s_fault(key: bytes) -> None:
    a = Keys("a", JOB)
    with pytest.raises(PeerError, match="no X25519 public key") as caught:
        a.agree({"a": Public(b"a", a.public), "b": Public(b"b", key)})
    assert caught.value.peer == "b"


def pair() -> tuple[Keys, Keys]:
    sums = group(2)
    return sums[0]._keys, sums[1]._keys


def test_sealed_letters_open_once_bound_to_the_same_words() -> None:
    a, b = pair()
    sealed = a.seal("site01", b"weights", b"turn 3")
    assert len(sealed) == len(b"weights") + SEAL_BYTES
    assert b"weights" not in sealed
    assert b.open("site00", sealed, b"turn 3") == b"weights"
    assert a.seal("site01", b"weights", b"turn 3") != sealed


@pytest.mark.parametrize("what", ["words", "bytes", "length", "key"])
def test_a_sealed_letter_that_was_altered(what: str) -> None:
    a, b = pair()
    sealed, words = a.seal("site01", b"weights", b"turn 3"), b"turn 3"
    if what == "words":
        words = b"turn 4"
    elif what == "bytes":
        sealed = sealed[:-1] + bytes([sealed[-1] ^ 1])
    elif what == "length":
        sealed = sealed[:5]
    else:
        sealed = sealed[:12] + AESGCM(bytes(32)).encrypt(sealed[:12], b"weights", words)
    with pytest.raises(PeerError, match="does not open") as caught:
        b.open("site00", sealed, words)
    assert caught.value.peer == "site00"


def test_no_key_with_a_stranger() -> None:
    a, _ = pair()
    with pytest.raises(PartwayError, match="no key with nobody"):
        a.seal("nobody", b"", b"")


def test_a_statement_names_job_epoch_party_and_key() -> None:
    said = statement(JOB, 1, "a", bytes(32))
    assert said == b"partway/sum/hello/v1\0" + JOB + b"\x01\0\0\0\x01\0a" + bytes(32)
    # A longer name cannot borrow from the key behind it.
    assert statement(JOB, 1, "ab", b"c") != statement(JOB, 1, "a", b"bc")
